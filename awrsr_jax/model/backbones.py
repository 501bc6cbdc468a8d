"""Backbones: item ids -> hidden states -> item scores. A larger score is always better.

The contract, which is all that the rest of the package knows of a backbone:
  encode(inputs_BxL, train) -> Hidden        score(hidden, items) -> candidate scores
  score_all(hidden, first, count) -> scores of consecutive item numbers
  num_items, num_rows: I, and the rows of the item table, V
Shapes: B batch, L length, D width, K candidates, V rows of the item table, I items (numbers 1 to I; 0 is padding).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from awrsr_jax.model.blocks import Block, Embedding, FeedForward, SelfAttention
from awrsr_jax.model.refine import build_refinement


@struct.dataclass
class Hidden:
  """What a backbone knows after each position: mean (..., D), and a diagonal covariance where it has one."""

  mean: jax.Array
  cov: jax.Array | None = None

  def newest(self) -> "Hidden":
    """Returns the hidden state of the last column: (B, L, D) -> (B, D)."""
    return jax.tree.map(lambda x_BxLxD: x_BxLxD[:, -1], self)


class SASRec(nn.Module):
  """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), with refined attention.

  Attributes:
    model: the `model` node of a finalized config.
    max_length: n.
    num_items: I.
  """

  model: Any
  max_length: int
  num_items: int

  @property
  def num_rows(self) -> int:
    """V."""
    return table_rows(self.num_items, self.model.table_multiple)

  def setup(self) -> None:
    model, dtype = self.model, jnp.dtype(self.model.dtype)
    attention_dropout = model.dropout if model.attention_dropout is None else model.attention_dropout
    self.embedding = Embedding(self.num_rows, self.max_length, model.width, model.dropout, dtype)
    self.blocks = [
        Block(attention=SelfAttention(model.heads, attention_dropout, dtype, build_refinement(model, self.max_length)),
              feed_forward=FeedForward(model.ffn_width, model.activation, model.dropout, dtype), norm=model.norm)
        for _ in range(model.layers)]
    self.norm_out = nn.LayerNorm() if model.norm != "post" else lambda x: x  # post-norm blocks end normalised

  def __call__(self, inputs_BxL: jax.Array) -> jax.Array:
    """Touches every parameter (for initialisation). Returns (B, L, V)."""
    return self.score_all(self.encode(inputs_BxL))

  def encode(self, inputs_BxL: jax.Array, train: bool = False) -> Hidden:
    """Encodes left-padded histories.

    Args:
      inputs_BxL: int32 item numbers, L <= n, 0 is padding.
      train: True applies dropout and needs a key for "dropout".

    Returns:
      Hidden with mean (B, L, D) float32: position t knows items up to t. Padded positions hold no information.
    """
    real_BxL = inputs_BxL > 0
    x_BxLxD = self.embedding(inputs_BxL, train)
    for block in self.blocks:
      x_BxLxD = block(x_BxLxD, real_BxL, train)
    return Hidden(mean=self.norm_out(x_BxLxD).astype(jnp.float32))

  def score(self, hidden: Hidden, items: jax.Array) -> jax.Array:
    """Scores chosen items: the dot product of hidden state and item vector.

    Args:
      hidden: mean (..., D).
      items: int32, (K,) the same candidates for every hidden state, or (..., K) for each its own.

    Returns:
      (..., K) float32.
    """
    table = self.embedding.item_table[items]
    if items.ndim == 1:
      return jnp.einsum("...d,kd->...k", hidden.mean, table)
    return jnp.einsum("...d,...kd->...k", hidden.mean, table)

  def score_all(self, hidden: Hidden, first: int | jax.Array = 0, count: int | None = None) -> jax.Array:
    """Scores `count` consecutive table rows from row `first` on (None: the whole table).

    Args:
      hidden: mean (..., D).
      first: row of the first score; may be traced.
      count: static.

    Returns:
      (..., count) float32; -inf for row 0 and for rows that only fill the table.
    """
    table = self.embedding.item_table
    table = table if count is None else jax.lax.dynamic_slice_in_dim(table, first, count)
    scores = jnp.einsum("...d,kd->...k", hidden.mean, table)
    row = first + jnp.arange(len(table))
    is_item = jnp.broadcast_to((row >= 1) & (row <= self.num_items), scores.shape)
    return jnp.where(is_item, scores, -jnp.inf)


BACKBONES = {"sasrec": SASRec}


def build_backbone(config: Any, num_items: int) -> nn.Module:
  """Returns the backbone that a finalized config names, for items 1 to num_items."""
  return BACKBONES[config.model.backbone](config.model, config.data.max_length, num_items)


def table_rows(num_items: int, multiple: int) -> int:
  """Returns V: rows for all items and padding, rounded up to a multiple."""
  return -(-(num_items + 1) // multiple) * multiple


def attention_maps(backbone: nn.Module, params: Any, inputs_BxL: jax.Array) -> list[dict[str, jax.Array]]:
  """Reads the attention weights out of a forward pass; nothing is stored in a pass that does not ask for them.

  Returns:
    One dict a layer: "first_order" and "refined", both (B, H, L, L) float32, row = query, column = key.
  """
  _, sown = backbone.apply({"params": params}, inputs_BxL, method="encode", mutable=["intermediates"])
  layers = sown["intermediates"]
  return [{name: maps[0] for name, maps in layers[f"blocks_{layer}"]["attention"]["refinement"].items()}
          for layer in range(len(layers))]
