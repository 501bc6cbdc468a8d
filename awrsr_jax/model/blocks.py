"""The parts of a backbone: item and position embedding, attention with refinement, feed-forward, block.

Shapes: B batch, L length of this batch, n longest length, D width, H heads, h = D / H; real_BxL is True on real items.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import attend, causal_mask, dot_scores, split_heads
from awrsr_jax.model.dropout import draw_drop, dropout
from awrsr_jax.model.refine import Refinement

xavier = nn.initializers.xavier_normal()
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "elu": nn.elu}


def attention_rate(model: Any) -> float:
  """Returns the rate that attention weights are dropped at."""
  return model.dropout if model.attention.dropout is None else model.attention.dropout


def in_blocks(module: nn.Module, implementation: str, refusal: str) -> bool:
  """Whether attention runs in blocks: not where it cannot (`refusal` says why), nor where maps are asked for.

  Raises:
    ValueError: it cannot, and fused is asked for.
  """
  if implementation == "fused" and refusal:
    raise ValueError("config.model.attention.implementation=fused cannot do what config.model.refine, awr and backbone "
                     f"say: {refusal}; use auto or reference")
  wants_maps = module.is_mutable_collection("intermediates")
  return implementation != "reference" and not refusal and not wants_maps


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


class SelfAttention(nn.Module):
  """Multi-head causal self-attention whose weights pass through a refinement."""

  heads: int
  dropout: float
  dtype: Any
  refinement: Refinement
  implementation: str  # auto, reference or fused

  @nn.compact
  def __call__(self, query_BxLxD: jax.Array, x_BxLxD: jax.Array, real_BxL: jax.Array, train: bool,
               newest: bool = False) -> jax.Array:
    """Returns (B, L, D), or the newest column of it; query_BxLxD gives the queries, x_BxLxD keys and values."""
    width = x_BxLxD.shape[-1]
    if newest and not self.refinement.combine:
      query_BxLxD = query_BxLxD[:, -1:]
    q, k, v = (split_heads(nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)(x), self.heads)
               for name, x in (("query", query_BxLxD), ("key", x_BxLxD), ("value", x_BxLxD)))
    drop = draw_drop(self, self.dropout, train)
    if in_blocks(self, self.implementation, self.refinement.refuses_blocks(squares=False)):
      q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q * q.shape[-1] ** -0.5, k, v))
      out_BxLxHxh = jnp.moveaxis(self.refinement.attend(q, k, real_BxL, (v,), drop, newest=newest)[0], 0, 2)
    else:
      kept_BxHxLxL, _ = self.refinement.weights(dot_scores(q, k), causal_mask(real_BxL)[:, :, -q.shape[1]:], drop)
      out_BxLxHxh = attend(kept_BxHxLxL, v)[:, -1 if newest else 0:]
    return nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name="out")(
        out_BxLxHxh.reshape(*out_BxLxHxh.shape[:2], width))


class FeedForward(nn.Module):
  """Two dense layers, applied to every position by itself: out(f(in x)).

  `activation` f is a function, or swiglu, silu(in x) * (gate x) (Shazeer, "GLU variants improve Transformer", 2020).
  """

  hidden: int
  activation: str
  dropout: float
  dtype: Any
  initializer: Callable = xavier
  dropout_inside: bool = True  # between the two layers too

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, train: bool) -> jax.Array:
    """Returns (B, L, D) in `dtype`; with `train` it drops, and needs a key for "dropout"."""
    dense = lambda width, name: nn.Dense(width, dtype=self.dtype, kernel_init=self.initializer, name=name)  # noqa: E731
    hidden = dense(self.hidden, "in")(x_BxLxD)
    if self.activation == "swiglu":
      hidden = nn.silu(hidden) * dense(self.hidden, "gate")(x_BxLxD)
    else:
      hidden = ACTIVATIONS[self.activation](hidden)
    hidden = dropout(self, hidden, self.dropout, train and self.dropout_inside)
    return dropout(self, dense(x_BxLxD.shape[-1], "out")(hidden), self.dropout, train)


class Block(nn.Module):
  """One transformer block; `norm` places the layer norms.

  pre: x + attention(LN x), x + ffn(LN x). post: LN(x + attention(x)), LN(x + ffn(x)). query: the original SASRec,
  LN x + attention(query LN x, keys and values x), then the same form around the feed-forward, LN x + ffn(LN x).
  With `gates` each sum x + branch is x + sigmoid(W x + b) * branch, as in LiGR (Borisyuk et al., 2025).
  """

  attention: SelfAttention
  feed_forward: FeedForward
  norm: str
  gates: bool

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, train: bool, newest: bool = False) -> jax.Array:
    """Returns (B, L, D), or the newest column of it; 0 where padded."""
    kept = slice(-1 if newest else 0, None)
    norm_1, norm_2 = (nn.LayerNorm(name=name) for name in ("norm_attention", "norm_feed_forward"))
    x, dtype = x_BxLxD, x_BxLxD.dtype
    attention = lambda query, x: self.attention(query, x, real_BxL, train, newest)  # noqa: E731

    def add(x: jax.Array, branch: jax.Array, gate: str) -> jax.Array:
      if not self.gates:
        return x + branch
      return x + nn.sigmoid(nn.Dense(x.shape[-1], dtype=dtype, kernel_init=xavier, name=gate)(x)) * branch

    match self.norm:
      case "pre":
        y = norm_1(x).astype(dtype)
        x = add(x[:, kept], attention(y, y), "gate_attention")
        x = add(x, self.feed_forward(norm_2(x).astype(dtype), train), "gate_feed_forward")
      case "post":
        x = norm_1(add(x[:, kept], attention(x, x), "gate_attention")).astype(dtype)
        x = norm_2(add(x, self.feed_forward(x, train), "gate_feed_forward")).astype(dtype)
      case "query":
        y = norm_1(x).astype(dtype)
        x = add(y[:, kept], attention(y, x), "gate_attention")
        y = norm_2(x).astype(dtype)
        x = add(y, self.feed_forward(y, train), "gate_feed_forward")
    return x * real_BxL[:, kept, None]
