"""The parts of a backbone: dropout, item and position embedding, attention with refinement, feed-forward, block.

Shapes: B batch, L length of this batch, n longest length, D width, H heads, h = D / H; real_BxL is True on real items.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import attend, causal_mask, dot_scores
from awrsr_jax.model.refine import Refinement

xavier = nn.initializers.xavier_normal()
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "elu": nn.elu}


def dropout(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Zeroes entries with probability `rate` (to 1/256) and scales the others so that the mean stays.

  One random byte an entry, cut out of 32-bit words: a quarter of the random numbers, which on a CPU are the larger
  part of a training step. Words are drawn by position, so the result does not depend on how x is sharded.

  Args:
    module: whose "dropout" stream gives the key.
    x: any shape.
    rate: in [0, 1).
    train: False returns x.
  """
  dropped = min(round(rate * 256), 255)
  if not train or dropped == 0:
    return x
  words = jax.random.bits(module.make_rng("dropout"), (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32)
  as_bytes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., :x.shape[-1]]
  return jnp.where(as_bytes >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def attention_dropout(model: Any) -> float:
  """Returns the rate that attention weights are dropped at."""
  return model.dropout if model.attention_dropout is None else model.attention_dropout


class Embedding(nn.Module):
  """Item table and positions: ids -> vectors.

  A position is counted from the END (the newest item always has the last one), so left padding changes nothing.
  """

  rows: int  # of the item table: items, row 0 for padding, and rows that fill up to a multiple
  max_length: int
  width: int
  dropout: float
  dtype: Any
  scale: float  # of item vectors
  norm: nn.Module | None = None  # of the sum
  initializer: Callable = xavier

  def setup(self) -> None:
    self.item_table = self.param("item_table", self.initializer, (self.rows, self.width))
    self.position_table = self.param("position_table", self.initializer, (self.max_length, self.width))

  def __call__(self, inputs_BxL: jax.Array, train: bool) -> jax.Array:
    """Returns x_BxLxD: scaled item vectors plus positions, normalised where there is a norm, 0 where padded."""
    positions = self.position_table[self.max_length - inputs_BxL.shape[-1]:]
    x_BxLxD = self.item_table[inputs_BxL] * self.scale + positions[None]
    x_BxLxD = (self.norm(x_BxLxD) if self.norm else x_BxLxD).astype(self.dtype)
    return dropout(self, x_BxLxD, self.dropout, train) * (inputs_BxL > 0)[..., None]


def split_heads(x_BxLxD: jax.Array, heads: int) -> jax.Array:
  """Returns (B, L, H, h)."""
  return x_BxLxD.reshape(*x_BxLxD.shape[:-1], heads, x_BxLxD.shape[-1] // heads)


class SelfAttention(nn.Module):
  """Multi-head causal self-attention whose weights pass through a refinement."""

  heads: int
  dropout: float
  dtype: Any
  refinement: Refinement

  @nn.compact
  def __call__(self, query_BxLxD: jax.Array, x_BxLxD: jax.Array, real_BxL: jax.Array, train: bool) -> jax.Array:
    """Returns (B, L, D); query_BxLxD gives the queries, x_BxLxD keys and values."""
    width = x_BxLxD.shape[-1]
    q, k, v = (split_heads(nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)(x), self.heads)
               for name, x in (("query", query_BxLxD), ("key", x_BxLxD), ("value", x_BxLxD)))
    weights_BxHxLxL = self.refinement(dot_scores(q, k), causal_mask(real_BxL))
    out_BxLxHxh = attend(dropout(self, weights_BxHxLxL, self.dropout, train), v)
    return nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name="out")(out_BxLxHxh.reshape(x_BxLxD.shape))


class FeedForward(nn.Module):
  """Two dense layers, applied to every position by itself."""

  hidden: int
  activation: str
  dropout: float
  dtype: Any
  initializer: Callable = xavier
  dropout_inside: bool = True  # between the two layers too

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, train: bool) -> jax.Array:
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, kernel_init=self.initializer, name=name)  # noqa: E731
    hidden = ACTIVATIONS[self.activation](dense(self.hidden, "in")(x_BxLxD))
    hidden = dropout(self, hidden, self.dropout, train and self.dropout_inside)
    return dropout(self, dense(x_BxLxD.shape[-1], "out")(hidden), self.dropout, train)


class Block(nn.Module):
  """One transformer block; `norm` places the layer norms.

  pre: x + attention(LN x), x + ffn(LN x). post: LN(x + attention(x)), LN(x + ffn(x)). query: the original SASRec,
  LN x + attention(query LN x, keys and values x), then the same form around the feed-forward, LN x + ffn(LN x).
  """

  attention: SelfAttention
  feed_forward: FeedForward
  norm: str

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, train: bool) -> jax.Array:
    """Returns (B, L, D), 0 where padded."""
    norm_1, norm_2 = (nn.LayerNorm(name=name) for name in ("norm_attention", "norm_feed_forward"))
    x, dtype = x_BxLxD, x_BxLxD.dtype
    match self.norm:
      case "pre":
        y = norm_1(x).astype(dtype)
        x = x + self.attention(y, y, real_BxL, train)
        x = x + self.feed_forward(norm_2(x).astype(dtype), train)
      case "post":
        x = norm_1(x + self.attention(x, x, real_BxL, train)).astype(dtype)
        x = norm_2(x + self.feed_forward(x, train)).astype(dtype)
      case "query":
        y = norm_1(x).astype(dtype)
        x = y + self.attention(y, x, real_BxL, train)
        y = norm_2(x).astype(dtype)
        x = y + self.feed_forward(y, train)
    return x * real_BxL[..., None]
