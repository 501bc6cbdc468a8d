"""The parts of a backbone: dropout, item and position embedding, attention with refinement, feed-forward, block.

Attention and block come twice: for vectors (SASRec), and for Gaussians (STOSA) as a stream of means beside a stream of
covariances. Shapes: B batch, L length of this batch, n longest length, D width, H heads, h = D / H; real_BxL is True
on real items.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import attend, causal_mask, dot_scores
from awrsr_jax.model.gaussian import covariance, pairwise_wasserstein
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


class Embedding(nn.Module):
  """Item table and positions: ids -> vectors.

  A position is counted from the END (the newest item always has the last one), so left padding changes nothing.
  """

  rows: int  # of the item table: items, row 0 for padding, and rows that fill up to a multiple
  max_length: int
  width: int
  dropout: float
  dtype: Any
  initializer: Callable = xavier

  def setup(self) -> None:
    self.item_table = self.param("item_table", self.initializer, (self.rows, self.width))
    self.position_table = self.param("position_table", self.initializer, (self.max_length, self.width))

  def __call__(self, inputs_BxL: jax.Array, train: bool) -> jax.Array:
    """Returns x_BxLxD: item vectors times sqrt(D) plus positions, 0 where padded."""
    x_BxLxD = self.add_positions(inputs_BxL, scale=self.width ** 0.5).astype(self.dtype)
    return dropout(self, x_BxLxD, self.dropout, train) * (inputs_BxL > 0)[..., None]

  def add_positions(self, inputs_BxL: jax.Array, scale: float) -> jax.Array:
    """Returns (B, L, D) float32: item vectors times `scale` plus positions, padded columns like any other."""
    positions = self.position_table[self.max_length - inputs_BxL.shape[-1]:]
    return self.item_table[inputs_BxL] * scale + positions[None]


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
  initializer: Callable
  faithful: bool

  @nn.compact
  def __call__(self, query: tuple[jax.Array, jax.Array], x: tuple[jax.Array, jax.Array], real_BxL: jax.Array,
               train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (mean, covariance stream), both (B, L, D); query gives the queries, x keys and values, both such pairs."""
    width = x[0].shape[-1]
    dense = lambda name, x: nn.Dense(width, dtype=self.dtype, kernel_init=self.initializer, name=name)(x)  # noqa: E731
    inputs = {"query": query, "key": x, "value": x}
    (mean_q, cov_q), (mean_k, cov_k), (mean_v, cov_v) = (
        (split_heads(dense(f"{role}_mean", mean), self.heads),
         split_heads(covariance(dense(f"{role}_cov", cov)), self.heads)) for role, (mean, cov) in inputs.items())
    distances_BxHxLxL = pairwise_wasserstein(*(jnp.moveaxis(x, 2, 1) for x in (mean_q, cov_q, mean_k, cov_k)))
    scores_BxHxLxL = -distances_BxHxLxL * (width // self.heads) ** -0.5
    weights = self.refinement(scores_BxHxLxL, causal_mask(real_BxL))
    dropped = dropout(self, weights, self.dropout, train)
    squares = dropped * (dropped if self.faithful else weights)
    outs = (dense("out_mean", attend(dropped, mean_v).reshape(query[0].shape)),
            dense("out_cov", attend(squares, cov_v).reshape(query[0].shape)))
    return tuple(dropout(self, out, self.dropout_out, train) for out in outs)


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


def gaussian_norm(faithful: bool, name: str | None = None) -> nn.LayerNorm:
  """Returns a layer norm; `faithful` has STOSA's epsilon, which counts for embeddings as small as its own, 0.02."""
  return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name) if faithful else nn.LayerNorm(name=name)


class GaussianBlock(nn.Module):
  """The same block over two streams, means and covariances, that only attention brings together.

  The covariance stream holds any real numbers; who reads a covariance from it takes ELU + 1. Each stream has layer
  norms and a feed-forward of its own; `faithful` takes one norm for both around the attention.
  """

  attention: GaussianSelfAttention
  feed_forward_mean: FeedForward
  feed_forward_cov: FeedForward
  norm: str
  faithful: bool

  @nn.compact
  def __call__(self, streams: tuple[jax.Array, jax.Array], real_BxL: jax.Array,
               train: bool) -> tuple[jax.Array, jax.Array]:
    """Takes and returns (mean, covariance stream), both (B, L, D)."""
    dtype = streams[0].dtype
    norm = lambda name: gaussian_norm(self.faithful, name)  # noqa: E731
    norms_1 = (norm("norm_attention"),) * 2 if self.faithful else (
        norm("norm_attention_mean"), norm("norm_attention_cov"))
    norms_2 = norm("norm_feed_forward_mean"), norm("norm_feed_forward_cov")
    each = lambda layers, x: tuple(layer(x).astype(dtype) for layer, x in zip(layers, x, strict=True))  # noqa: E731
    feed = lambda x: (self.feed_forward_mean(x[0], train), self.feed_forward_cov(x[1], train))  # noqa: E731
    add = lambda x, y: tuple(x + y for x, y in zip(x, y, strict=True))  # noqa: E731
    x = streams
    match self.norm:
      case "pre":
        y = each(norms_1, x)
        x = add(x, self.attention(y, y, real_BxL, train))
        x = add(x, feed(each(norms_2, x)))
      case "post":
        x = each(norms_1, add(x, self.attention(x, x, real_BxL, train)))
        x = each(norms_2, add(x, feed(x)))
      case "query":
        y = each(norms_1, x)
        x = add(y, self.attention(y, x, real_BxL, train))
        y = each(norms_2, x)
        x = add(y, feed(y))
    return x
