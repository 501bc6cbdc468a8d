"""Attention weight refinement (AWR): the rows of an attention matrix attend to each other.

Liu, Liu and Liu, "Pay Attention to Attention for Sequential Recommendation", RecSys 2024. The paper says that
attention weights are themselves attended to, a digest of it names the refinements simple, value-weighted, additive
and stochastic; the equations below are our definition (docs/method.md).

Shapes: B batch, H heads, L length of this batch, n the longest length, r rank. A slot table has n rows, row j
belongs to the column n-1-j steps before the END, so a batch of length L < n uses the last L rows, and the amount of
left padding never matters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import masked_softmax
from awrsr_jax.model.gaussian import covariance, pairwise_wasserstein

# preset -> how rows are compared, how the comparison becomes weights
PRESETS = {
    "none": (None, None),
    "simple": ("dot", "simple"),
    "value": ("dot", "value"),
    "additive": ("dot", "additive"),
    "stochastic": ("wasserstein", "simple"),
}


class Refinement(nn.Module):
  """scores -> refined attention weights; `combine=None` is softmax itself.

  Attributes:
    combine: None, "simple", "value" or "additive".
    correlation: "dot" or "wasserstein".
    heads: H. max_length: n. rank: r.
    order: how often weights are refined; each time with its own tables. Order k reaches (k+1)-hop relations.
    share_heads: one slot table for all heads.
    additive_on: "scores" or "weights".
    value_projection: multiply A by a learned [H, n, n] matrix, the identity at first, before it is mixed.
  """

  combine: str | None
  correlation: str | None
  heads: int
  max_length: int
  rank: int
  order: int = 1
  share_heads: bool = False
  additive_on: str = "scores"
  value_projection: bool = False

  @nn.compact
  def __call__(self, scores_BxHxLxL: jax.Array, mask_Bx1xLxL: jax.Array) -> jax.Array:
    """Returns weights_BxHxLxL, float32, exactly 0 outside the mask.

    Sows "first_order" and "refined" weights into the collection "intermediates".
    """
    scores, mask = scores_BxHxLxL.astype(jnp.float32), mask_Bx1xLxL
    weights = masked_softmax(scores, mask)
    self.sow("intermediates", "first_order", weights)
    for order in range(self.order if self.combine else 0):
      correlation = self._correlate(weights, f"order{order + 1}")
      match self.combine, self.additive_on:
        case "simple", _:
          weights = masked_softmax(correlation, mask)
        case "value", _:
          weights = masked_softmax(correlation, mask) @ self._project(weights, mask, order + 1)
        case "additive", "scores":
          scores = scores + correlation
          weights = masked_softmax(scores, mask)
        case "additive", "weights":
          gate = nn.sigmoid(self.param(f"order{order + 1}_gate", nn.initializers.zeros, (1, self.heads, 1, 1)))
          weights = (1 - gate) * weights + gate * masked_softmax(correlation, mask)
    self.sow("intermediates", "refined", weights)
    return weights

  def _correlate(self, weights: jax.Array, name: str) -> jax.Array:
    """Returns S'_BxHxLxL: how alike the rows of an attention matrix are in the learned correlation space."""
    if self.correlation == "dot":
      query, key = (self._features(weights, f"{name}_{role}") for role in ("query", "key"))
      return jnp.einsum("bhir,bhjr->bhij", query, key) * self.rank ** -0.5
    mean_q, cov_q, mean_k, cov_k = (self._features(weights, f"{name}_{role}") for role in (
        "query_mean", "query_cov", "key_mean", "key_cov"))
    return -pairwise_wasserstein(mean_q, covariance(cov_q), mean_k, covariance(cov_k)) * self.rank ** -0.5

  def _features(self, weights: jax.Array, name: str) -> jax.Array:
    """Returns A W_BxHxLxr: the features of every row of A, W a slot table."""
    heads = 1 if self.share_heads else self.heads
    table = self.param(name, nn.initializers.xavier_normal(batch_axis=0), (heads, self.max_length, self.rank))
    table = jnp.broadcast_to(table[:, self.max_length - weights.shape[-1]:], (self.heads, weights.shape[-1], self.rank))
    return jnp.einsum("bhij,hjr->bhir", weights, table)

  def _project(self, weights: jax.Array, mask: jax.Array, order: int) -> jax.Array:
    """Returns A Wv within the mask, or A where there is no value projection."""
    if not self.value_projection:
      return weights
    identity = lambda key, shape: jnp.broadcast_to(jnp.eye(shape[-1]), shape)  # noqa: E731
    table = self.param(f"order{order}_value", identity, (self.heads, self.max_length, self.max_length))
    unused = self.max_length - weights.shape[-1]
    return jnp.where(mask, jnp.einsum("bhij,hjk->bhik", weights, table[:, unused:, unused:]), 0.0)


def build_refinement(model: Any, max_length: int, name: str | None = None) -> Refinement:
  """Returns the refinement that a config's `model` node describes, for sequences up to max_length (n)."""
  correlation, combine = PRESETS[model.refine]
  return Refinement(
      combine=combine, correlation=model.awr.correlation or correlation, heads=model.heads, max_length=max_length,
      rank=model.awr.rank, order=model.awr.order, share_heads=model.awr.share_heads, additive_on=model.awr.additive_on,
      value_projection=model.awr.value_projection, name=name)
