"""STOSA: histories and items are Gaussians, an item's score is minus a Wasserstein distance.

Two streams of vectors run side by side, one for means and one for covariances, and meet in attention only.
Shapes: B batch, L length, D width, H heads, h = D / H, K candidates, V rows of the item table, I items (numbers 1 to I;
0 is padding).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import attend, causal_mask, split_heads
from awrsr_jax.model.blocks import Embedding, FeedForward, attention_rate, in_blocks
from awrsr_jax.model.dropout import draw_drop, dropout
from awrsr_jax.model.gaussian import covariance, pairwise_wasserstein, wasserstein, wasserstein_as_dot
from awrsr_jax.model.hidden import Backbone, Hidden, table_rows
from awrsr_jax.model.refine import Refinement, build_refinement

Streams = tuple[jax.Array, jax.Array]  # means and covariances, both (B, L, D)


def initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Draws weights as the published STOSA does: normal with mean .01 and deviation .02."""
  return 0.01 + 0.02 * jax.random.normal(key, shape, dtype)


class GaussianSelfAttention(nn.Module):
  """Multi-head causal self-attention of Gaussians by their distance (STOSA, Fan et al. 2022), with refined weights.

  scores -W2(q_i, k_j) / sqrt(h); means are summed by the weights, covariances by their squares: the law of a weighted
  sum of independent Gaussians. The squares share the weights' dropout mask, and are scaled so that their mean stays
  too [we define]; `faithful` squares the weights after dropout, 1 / (1 - rate) times more in training than in use.
  """

  heads: int
  dropout: float  # of weights
  dropout_out: float
  dtype: Any
  refinement: Refinement
  implementation: str  # auto, reference or fused
  faithful: bool

  @nn.compact
  def __call__(self, query: Streams, x: Streams, real_BxL: jax.Array, train: bool, newest: bool = False) -> Streams:
    """Returns both streams (B, L, D), or the newest column of them; `query` gives the queries, `x` keys and values."""
    width = x[0].shape[-1]
    if newest and not self.refinement.combine:
      query = tuple(x[:, -1:] for x in query)
    dense = lambda name, x: nn.Dense(width, dtype=self.dtype, kernel_init=initializer, name=name)(x)  # noqa: E731
    inputs = {"query": query, "key": x, "value": x}
    (mean_q, cov_q), (mean_k, cov_k), (mean_v, cov_v) = (
        (split_heads(dense(f"{role}_mean", mean), self.heads),
         split_heads(covariance(dense(f"{role}_cov", cov)), self.heads)) for role, (mean, cov) in inputs.items())
    scale, drop = (width // self.heads) ** -0.5, draw_drop(self, self.dropout, train)
    square = lambda kept, weights: kept * (kept if self.faithful else weights)  # noqa: E731
    if in_blocks(self, self.implementation, self.refinement.refuses_blocks(squares=True)):
      q, k = wasserstein_as_dot(*(jnp.moveaxis(x, 2, 0) for x in (mean_q, cov_q, mean_k, cov_k)))
      values = tuple(jnp.moveaxis(x, 2, 0) for x in (mean_v, cov_v))
      outs = self.refinement.attend(q * scale, k, real_BxL, values, drop, square, "highest", newest)
      mean, cov = (jnp.moveaxis(out, 0, 2) for out in outs)
    else:
      distances_BxHxLxL = pairwise_wasserstein(*(jnp.moveaxis(x, 2, 1) for x in (mean_q, cov_q, mean_k, cov_k)))
      kept, weights = self.refinement.weights(-distances_BxHxLxL * scale,
                                              causal_mask(real_BxL)[:, :, -mean_q.shape[1]:], drop)
      kept, squares = (x[:, :, -1 if newest else 0:] for x in (kept, square(kept, weights)))
      mean, cov = attend(kept, mean_v), attend(squares, cov_v)
    mean, cov = (dense(f"out_{stream}", out.reshape(*out.shape[:2], width)) for stream, out in
                 (("mean", mean), ("cov", cov)))
    return dropout(self, mean, self.dropout_out, train), dropout(self, cov, self.dropout_out, train)


def gaussian_norm(faithful: bool, name: str | None = None) -> nn.LayerNorm:
  """Returns a layer norm; `faithful` has STOSA's epsilon, which counts for embeddings as small as its own, 0.02."""
  return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name) if faithful else nn.LayerNorm(name=name)


class GaussianBlock(nn.Module):
  """The block of blocks.py over two streams, that only attention brings together; `norm` places norms as it does there.

  The covariance stream holds any real numbers; who reads a covariance from it takes ELU + 1. Each stream has layer
  norms and a feed-forward of its own; `faithful` takes one norm for both around the attention.
  """

  attention: GaussianSelfAttention
  feed_forward_mean: FeedForward
  feed_forward_cov: FeedForward
  norm: str
  faithful: bool

  @nn.compact
  def __call__(self, x: Streams, real_BxL: jax.Array, train: bool, newest: bool = False) -> Streams:
    """Returns both streams (B, L, D), or the newest column of them; padded columns need not be 0."""
    dtype = x[0].dtype
    kept = lambda x: tuple(x[:, -1:] for x in x) if newest else x  # noqa: E731
    norm = lambda name: gaussian_norm(self.faithful, name)  # noqa: E731
    norms_1 = (norm("norm_attention"),) * 2 if self.faithful else (
        norm("norm_attention_mean"), norm("norm_attention_cov"))
    norms_2 = norm("norm_feed_forward_mean"), norm("norm_feed_forward_cov")
    each = lambda layers, x: tuple(layer(x).astype(dtype) for layer, x in zip(layers, x, strict=True))  # noqa: E731
    feed = lambda x: (self.feed_forward_mean(x[0], train), self.feed_forward_cov(x[1], train))  # noqa: E731
    add = lambda x, y: tuple(x + y for x, y in zip(x, y, strict=True))  # noqa: E731
    match self.norm:
      case "pre":
        y = each(norms_1, x)
        x = add(kept(x), self.attention(y, y, real_BxL, train, newest))
        x = add(x, feed(each(norms_2, x)))
      case "post":
        x = each(norms_1, add(kept(x), self.attention(x, x, real_BxL, train, newest)))
        x = each(norms_2, add(x, feed(x)))
      case "query":
        y = each(norms_1, x)
        x = add(kept(y), self.attention(y, x, real_BxL, train, newest))
        y = each(norms_2, x)
        x = add(y, feed(y))
    return x


class STOSA(Backbone):
  """Stochastic self-attention (Fan et al., WWW 2022), with refined attention: histories and items are Gaussians.

  A stream of means and one of covariances run side by side, each like a SASRec of its own, and meet in attention by
  Wasserstein distance. An item's score is minus its distance to the hidden state.

  `model.faithful` is the published network, defects and all (zfan20/STOSA at 1f00ecb): both streams start as
  ELU(dropout(LayerNorm(item + position))), plus 1 for the covariance; they share that norm and the one after the
  attention; the covariance passes ELU + 1 after each block. And the mean that a block computes is lost (a misspelt
  variable): the mean of the FIRST input goes into every block and comes out at the end, so attention, and its
  refinement, reach the covariance only. docs/method.md sets both networks side by side.
  """

  vectors_path = "embedding_mean/item_table"

  def setup(self) -> None:
    model, dtype = self.model, jnp.dtype(self.model.dtype)
    norm = lambda: gaussian_norm(model.faithful)  # noqa: E731
    rows = table_rows(self.num_items, model.table_multiple)
    embedding = lambda norm: Embedding(  # noqa: E731
        rows, self.max_length, model.width, model.dropout, dtype, scale=1.0, norm=norm, initializer=initializer)
    feed_forward = lambda: FeedForward(  # noqa: E731
        model.ffn_width, model.activation, model.dropout, dtype, initializer, dropout_inside=False)
    if model.faithful:
      self.norm_in = norm()
    norms_in = (self.norm_in,) * 2 if model.faithful else (norm(), norm())
    self.embedding_mean, self.embedding_cov = (embedding(norm_in) for norm_in in norms_in)
    block = nn.remat(GaussianBlock, static_argnums=(3, 4)) if model.remat else GaussianBlock  # `train`, `newest`
    self.blocks = [
        block(
            attention=GaussianSelfAttention(model.heads, attention_rate(model), model.dropout, dtype,
                                            build_refinement(model, self.max_length), model.attention.implementation,
                                            model.faithful),
            feed_forward_mean=feed_forward(), feed_forward_cov=feed_forward(), norm=model.norm,
            faithful=model.faithful)
        for _ in range(model.layers)]
    if not model.faithful:
      norm_out = norm if model.norm != "post" else lambda: lambda x: x  # post-norm blocks end normalised
      self.norm_out_mean, self.norm_out_cov = norm_out(), norm_out()

  def encode(self, inputs_BxL: jax.Array, train: bool = False, newest: bool = False) -> Hidden:
    """Encodes left-padded histories.

    Args:
      inputs_BxL: int32 item numbers, L <= n, 0 is padding.
      train: True applies dropout and needs a key for "dropout".
      newest: only the last column is wanted: the last layer works for no other.

    Returns:
      Hidden with mean and cov (B, L, D) float32: position t knows items up to t. Padded positions are mean 0, cov 1.
      With `newest`, (B, 1, D).
    """
    faithful, real = self.model.faithful, inputs_BxL > 0
    mean, cov = self.embedding_mean(inputs_BxL, train), self.embedding_cov(inputs_BxL, train)
    if faithful:
      mean, cov = nn.elu(mean), covariance(cov)
    for block in self.blocks:
      block_mean, cov = block((mean, cov), real, train, newest and block is self.blocks[-1])
      if faithful:
        cov = covariance(cov)
      else:
        mean = block_mean
    if not faithful:
      mean, cov = self.norm_out_mean(mean), covariance(self.norm_out_cov(cov))
    mean, real = mean[:, -cov.shape[1]:], real[:, -cov.shape[1]:, None]
    return Hidden(mean=jnp.where(real, mean.astype(jnp.float32), 0), cov=jnp.where(real, cov, 1))

  def items(self, numbers: jax.Array) -> Hidden:
    """Returns the items (...) themselves as a hidden state: mean and cov (..., D)."""
    return Hidden(mean=self.embedding_mean.item_table[numbers],
                  cov=covariance(self.embedding_cov.item_table[numbers]))

  def score(self, hidden: Hidden, items: jax.Array) -> jax.Array:
    """Scores chosen items: minus the squared Wasserstein distance of hidden state and item.

    Args:
      hidden: mean and cov (..., D).
      items: int32, (K,) the same candidates for every hidden state, or (..., K) for each its own.

    Returns:
      (..., K) float32, never positive.
    """
    candidates = self.items(items)
    if items.ndim == 1:
      return minus_distances(hidden, candidates.mean, candidates.cov)  # type: ignore[arg-type]
    return -wasserstein(hidden.mean[..., None, :], hidden.cov[..., None, :],  # type: ignore[index]
                        candidates.mean, candidates.cov)  # type: ignore[arg-type]

  def catalogue(self) -> dict[str, jax.Array]:
    """Returns both item tables (V, D), as they are stored."""
    return {"mean": self.embedding_mean.item_table, "cov": self.embedding_cov.item_table}

  @staticmethod
  def score_rows(hidden: Hidden, rows: dict[str, jax.Array]) -> jax.Array:
    """Returns (..., K) float32: the scores of K rows of the catalogue, whether they are items or not."""
    return minus_distances(hidden, rows["mean"], covariance(rows["cov"]))

  compare_rows = score_rows  # how similar items are: a score is a distance already


def minus_distances(hidden: Hidden, mean_KxD: jax.Array, cov_KxD: jax.Array) -> jax.Array:
  """Returns (..., K): minus the squared Wasserstein distance of every hidden state (..., D) to K Gaussians."""
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), hidden)
  distances = pairwise_wasserstein(flat.mean, flat.cov, mean_KxD, cov_KxD)
  return -distances.reshape(*hidden.mean.shape[:-1], len(mean_KxD))
