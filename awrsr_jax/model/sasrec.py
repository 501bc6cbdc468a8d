"""SASRec: histories and items are vectors, an item's score is a dot product.

Shapes: B batch, L length, D width, K candidates, V rows of the item table, I items (numbers 1 to I; 0 is padding).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.blocks import Block, Embedding, FeedForward, SelfAttention, attention_rate
from awrsr_jax.model.hidden import Backbone, Hidden, table_rows
from awrsr_jax.model.refine import build_refinement


def unit(x: jax.Array) -> jax.Array:
  """Returns vectors (..., D) of length 1, in their directions; one of 0 stays, and has a gradient."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class SASRec(Backbone):
  """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), with refined attention.

  With `model.cosine` = c the score of an item is c cos(hidden state, item vector), as in NISER (Gupta et al., 2019);
  the embedding below the blocks is the same as without.
  """

  vectors_path = "embedding/item_table"

  def setup(self) -> None:
    model, dtype = self.model, jnp.dtype(self.model.dtype)
    rows = table_rows(self.num_items, model.table_multiple)
    self.embedding = Embedding(rows, self.max_length, model.width, model.dropout, dtype, scale=model.width ** 0.5)
    block = nn.remat(Block, static_argnums=(3, 4)) if model.remat else Block  # `train`, `newest`
    self.blocks = [
        block(attention=SelfAttention(model.heads, attention_rate(model), dtype,
                                      build_refinement(model, self.max_length), model.attention.implementation),
              feed_forward=FeedForward(model.ffn_width, model.activation, model.dropout, dtype), norm=model.norm,
              gates=model.branch_gates)
        for _ in range(model.layers)]
    self.norm_out = nn.LayerNorm() if model.norm != "post" else lambda x: x  # post-norm blocks end normalised

  def encode(self, inputs_BxL: jax.Array, train: bool = False, newest: bool = False) -> Hidden:
    """Encodes left-padded histories.

    Args:
      inputs_BxL: int32 item numbers, L <= n, 0 is padding.
      train: True applies dropout and needs a key for "dropout".
      newest: only the last column is wanted: the last layer works for no other.

    Returns:
      Hidden with mean (B, L, D) float32: position t knows items up to t. Padded positions hold no information.
      With `newest`, (B, 1, D). With `model.cosine` each is of that length.
    """
    real_BxL = inputs_BxL > 0
    x_BxLxD = self.embedding(inputs_BxL, train)
    for block in self.blocks:
      x_BxLxD = block(x_BxLxD, real_BxL, train, newest and block is self.blocks[-1])
    mean_BxLxD = self.norm_out(x_BxLxD).astype(jnp.float32)
    return Hidden(mean=mean_BxLxD if self.model.cosine is None else self.model.cosine * unit(mean_BxLxD))

  def items(self, numbers: jax.Array) -> Hidden:
    """Returns the items (...) themselves as a hidden state, mean (..., D): the vectors that score them."""
    return Hidden(mean=self._scoring(self.embedding.item_table[numbers]))

  def score(self, hidden: Hidden, items: jax.Array) -> jax.Array:
    """Scores chosen items: the dot product of hidden state and item vector, or their cosine times `model.cosine`.

    Args:
      hidden: mean (..., D).
      items: int32, (K,) the same candidates for every hidden state, or (..., K) for each its own.

    Returns:
      (..., K) float32.
    """
    table = self._scoring(self.embedding.item_table[items])
    if items.ndim == 1:
      return jnp.einsum("...d,kd->...k", hidden.mean, table)
    return jnp.einsum("...d,...kd->...k", hidden.mean, table)

  def catalogue(self) -> dict[str, jax.Array]:
    """Returns the vectors (V, D) that score the items: the item table, with `model.cosine` of length 1."""
    return {"mean": self._scoring(self.embedding.item_table)}

  def _scoring(self, vectors: jax.Array) -> jax.Array:
    return vectors if self.model.cosine is None else unit(vectors)

  @staticmethod
  def score_rows(hidden: Hidden, rows: dict[str, jax.Array]) -> jax.Array:
    """Returns (..., K) float32: the scores of K rows of the catalogue, whether they are items or not."""
    return jnp.einsum("...d,kd->...k", hidden.mean, rows["mean"])

  @staticmethod
  def compare_rows(items: Hidden, rows: dict[str, jax.Array]) -> jax.Array:
    """Returns (..., K) float32: how similar items are to K rows of the catalogue, the cosine of vectors [we define].

    The dot product would call popular items, whose vectors are long, similar to everything.
    """
    return jnp.einsum("...d,kd->...k", unit(items.mean), unit(rows["mean"]))
