"""Masked attention: with its weights in memory (the reference), and in blocks of rows that never are all there.

Shapes: B batch, H heads, L length, h head width. Query i may look at key j when j is real and j <= i; a row without
any such key (padding) gets all-zero weights, never NaN.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # a score that no real score reaches, and exp() turns into exactly 0
BLOCK = 64  # rows of weights at a time
STAIRS = 4  # the most programs of one pass: each looks at as many keys as its newest row may


def split_heads(x_BxLxD: jax.Array, heads: int) -> jax.Array:
  """Returns (B, L, H, h)."""
  return x_BxLxD.reshape(*x_BxLxD.shape[:-1], heads, x_BxLxD.shape[-1] // heads)


def causal_mask(real_BxL: jax.Array) -> jax.Array:
  """Returns mask_Bx1xLxL: True where query i may attend to key j, that is j real and j <= i."""
  length = real_BxL.shape[-1]
  return real_BxL[:, None, None, :] & jnp.tri(length, dtype=bool)[None, None]


def softmax(scores: jax.Array, sink: jax.Array | None = None) -> jax.Array:
  """Softmax over the last axis, beside a sink: a key without a value, with this score (None: there is none).

  Args:
    scores: (..., L) float32.
    sink: broadcasts to (..., 1); what it takes is missing in the sum of a row.
  """
  if sink is None:
    return jax.nn.softmax(scores, axis=-1)
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
  powers = jnp.exp(scores - top)
  return powers / (jnp.sum(powers, axis=-1, keepdims=True) + jnp.exp(sink - top))


def masked_softmax(scores: jax.Array, mask: jax.Array, sink: jax.Array | None = None) -> jax.Array:
  """Softmax over the last axis within a mask, in float32.

  Args:
    scores: (..., L, L), any float dtype.
    mask: bool, broadcasts to scores.
    sink: as of softmax.

  Returns:
    float32, same shape: rows sum to 1 (less with a sink), exactly 0 outside the mask; rows without any True are all
    zero.
  """
  scores = jnp.where(mask, scores.astype(jnp.float32), HIDDEN)
  return jnp.where(mask, softmax(scores, sink), 0.0)


def dot_scores(q_BxLxHxh: jax.Array, k_BxLxHxh: jax.Array) -> jax.Array:
  """Returns scores_BxHxLxL = Q K^T / sqrt(h), float32 (SASRec)."""
  scale = q_BxLxHxh.shape[-1] ** -0.5
  return jnp.einsum("bihd,bjhd->bhij", q_BxLxHxh * scale, k_BxLxHxh, preferred_element_type=jnp.float32)


def attend(weights_BxHxLxL: jax.Array, v_BxLxHxh: jax.Array) -> jax.Array:
  """Returns (B, L, H, h): values summed by attention weights, in the dtype of the values."""
  return jnp.einsum("bhij,bjhd->bihd", weights_BxHxLxL.astype(v_BxLxHxh.dtype), v_BxLxHxh)


def attend_in_blocks(q_HxBxQxE: jax.Array, k_HxBxLxE: jax.Array, real_BxL: jax.Array,
                     read: Callable[[jax.Array, jax.Array], Any], precision: str | None = None,
                     sink: jax.Array | None = None) -> Any:
  """Reads weights A = softmax_M(Q K^T) a block of rows at a time, in memory that grows with L, not with its square.

  The keys that no row of a block may look at are left out, which saves up to half of the work. Where there are several
  blocks, the backward pass makes their weights again.

  Args:
    q_HxBxQxE, k_HxBxLxE: whose products are the scores, the queries those of the newest Q rows; E need not be h.
    real_BxL: which positions are real.
    read: (weights_HxBxbxK float32, rows_b) -> tree of (H, B, b, ...), what is wanted of the rows with these numbers,
      each by itself; their weights beyond the first K keys are 0. Of rows without any key it comes out as 0.
    precision: of the scores.
    sink: as of softmax, (H, 1, 1, 1).

  Returns:
    The tree, its leaves (H, B, Q, ...).
  """
  count, length = q_HxBxQxE.shape[2], k_HxBxLxE.shape[2]
  older = length - count
  blocks = -(-count // BLOCK)
  size, per_stair = -(-count // blocks), -(-blocks // STAIRS)

  def block(keys: int, q_HxBxbxE: jax.Array, first: int | jax.Array) -> Any:
    rows = older + first + jnp.arange(size)
    mask = (real_BxL[:, None, :keys] & (jnp.arange(keys)[None] <= rows[:, None])[None])[None]
    scores = jnp.einsum("hbie,hbje->hbij", q_HxBxbxE, k_HxBxLxE[:, :, :keys], precision=precision,
                        preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, HIDDEN)
    has_key = jnp.any(mask, axis=-1)  # rows without one are put to 0 after they are read, when they are narrow
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(has_key, range(3, x.ndim)), x, 0),
                        read(softmax(scores, sink), rows))

  if blocks == 1:
    return block(length, q_HxBxQxE, 0)
  tail = -count % (size * per_stair)
  q_HxBxQxE = jnp.pad(q_HxBxQxE, [(0, 0), (0, 0), (0, tail), (0, 0)])
  results = []
  for start in range(0, count, size * per_stair):
    again = jax.checkpoint(functools.partial(block, min(older + start + size * per_stair, length)))
    stair = q_HxBxQxE[:, :, start:start + size * per_stair]
    if per_stair == 1:
      results.append(again(stair, start))
      continue
    cut = jnp.moveaxis(stair.reshape(*stair.shape[:2], per_stair, size, -1), 2, 0)
    _, stacked = jax.lax.scan(lambda _, x: (None, again(*x)), None,  # noqa: B023 (run at once)
                              (cut, start + size * jnp.arange(per_stair)))
    results.append(jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:]), stacked))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2)[:, :, :count], *results)
