"""Masked attention with its weights in memory: the reference path.

Shapes: B batch, H heads, L length, h head width. Query i may look at key j when j is real and j <= i; a row without
any such key (padding) gets all-zero weights, never NaN.
"""

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # a score that no real score reaches, and exp() turns into exactly 0


def causal_mask(real_BxL: jax.Array) -> jax.Array:
  """Returns mask_Bx1xLxL: True where query i may attend to key j, that is j real and j <= i."""
  length = real_BxL.shape[-1]
  return real_BxL[:, None, None, :] & jnp.tri(length, dtype=bool)[None, None]


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Softmax over the last axis within a mask, in float32.

  Args:
    scores: (..., L, L), any float dtype.
    mask: bool, broadcasts to scores.

  Returns:
    float32, same shape: rows sum to 1, exactly 0 outside the mask; rows without any True are all zero.
  """
  scores = jnp.where(mask, scores.astype(jnp.float32), HIDDEN)
  return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


def dot_scores(q_BxLxHxh: jax.Array, k_BxLxHxh: jax.Array) -> jax.Array:
  """Returns scores_BxHxLxL = Q K^T / sqrt(h), float32 (SASRec)."""
  scale = q_BxLxHxh.shape[-1] ** -0.5
  return jnp.einsum("bihd,bjhd->bhij", q_BxLxHxh * scale, k_BxLxHxh, preferred_element_type=jnp.float32)


def attend(weights_BxHxLxL: jax.Array, v_BxLxHxh: jax.Array) -> jax.Array:
  """Returns (B, L, H, h): values summed by attention weights, in the dtype of the values."""
  return jnp.einsum("bhij,bjhd->bihd", weights_BxHxLxL.astype(v_BxLxHxh.dtype), v_BxLxHxh)
