"""What backbones share: hidden states, and the rows of item tables.

Shapes: B batch, L length, D width, K rows that are scored, V rows of the item table, I items (numbers 1 to I; 0 is
padding).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
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


def make_block_scan(score_rows: Callable[[Hidden, Any], jax.Array], hidden: Hidden, rows: Any,
                    first_row: int | jax.Array, num_items: int, block_items: int) -> Callable[[Callable, Any], Any]:
  """Returns what goes through some rows of the catalogue in blocks, in memory that grows with the block.

  Args:
    score_rows: (hidden, K rows) -> (B, K); larger is better.
    hidden: of B histories.
    rows: tree of tables (V', D), the rows `first_row` to `first_row` + V' - 1 of the catalogue.
    first_row: the number of their first.
    num_items: I; the other rows are no items.
    block_items: rows scored at a time; K is V' where those are fewer.

  Returns:
    (step, carry) -> the last carry. step: (carry, scores, first, is_new) -> carry is run for every block: its scores
    (B, K), -inf where a row is no item, the number of its first row, and bool (K,), False where an earlier block had
    the row: the last one overlaps the one before it. Only the scores of a single block are kept for more than one scan.
  """
  total = len(jax.tree.leaves(rows)[0])
  size = min(block_items, total)

  def score_block(start: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    inside = jnp.minimum(start, total - size)
    block = jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, inside, size), rows)
    first = first_row + inside
    return hide_other_rows(score_rows(hidden, block), first, num_items), first, inside + jnp.arange(size) >= start

  only = score_block(0) if size == total else None

  def scan(step: Callable, carry: Any) -> Any:
    if only:
      return step(carry, *only)
    carry, _ = jax.lax.scan(lambda carry, start: (step(carry, *score_block(start)), None), carry,
                            jnp.arange(0, total, size))
    return carry

  return scan


class Backbone(nn.Module):
  """What every backbone has; backbones.py lists what it adds.

  Attributes:
    model: the `model` node of a finalized config.
    max_length: n.
    num_items: I.
    vectors_path: where in the parameters the item vectors (V, D) are; of Gaussians the means.
  """

  model: Any
  max_length: int
  num_items: int
  vectors_path: ClassVar[str]

  def __call__(self, inputs_BxL: jax.Array) -> jax.Array:
    """Touches every parameter (for initialisation). Returns (B, L, V)."""
    return self.score_all(self.encode(inputs_BxL))

  def score_all(self, hidden: Hidden) -> jax.Array:
    """Returns (..., V) float32: the scores of all table rows, -inf for row 0 and for rows that only fill the table."""
    return hide_other_rows(self.score_rows(hidden, self.catalogue()), 0, self.num_items)
