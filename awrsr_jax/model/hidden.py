"""What backbones share: hidden states, and the rows of item tables.

Shapes: B batch, L length, D width, K scores, V rows of the item table, I items (numbers 1 to I; 0 is padding).
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Hidden:
  """What a backbone knows after each position: mean (..., D), and a diagonal covariance where it has one."""

  mean: jax.Array
  cov: jax.Array | None = None

  def newest(self) -> "Hidden":
    """Returns the hidden state of the last column: (B, L, D) -> (B, D)."""
    return jax.tree.map(lambda x_BxLxD: x_BxLxD[:, -1], self)


def table_rows(num_items: int, multiple: int) -> int:
  """Returns V: rows for all items and padding, rounded up to a multiple."""
  return -(-(num_items + 1) // multiple) * multiple


def hide_other_rows(scores: jax.Array, first: int | jax.Array, num_items: int) -> jax.Array:
  """Sets scores (..., K) of table rows `first` to first + K - 1 to -inf where the row is no item."""
  row = first + jnp.arange(scores.shape[-1])
  return jnp.where(jnp.broadcast_to((row >= 1) & (row <= num_items), scores.shape), scores, -jnp.inf)
