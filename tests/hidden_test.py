"""What backbones share: the rows of item tables, and the scan over them in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awrsr_jax.model.hidden import Hidden, hide_other_rows, make_block_scan, table_rows

ITEMS, ROWS, WIDTH, USERS = 9, 12, 4, 3


def test_a_table_has_a_row_for_padding_and_is_filled_up_to_the_multiple():
  assert [table_rows(items, 4) for items in (1, 3, 4, 7, 8)] == [4, 4, 8, 8, 12]


def test_rows_that_are_no_items_score_minus_infinity():
  scores = hide_other_rows(jnp.ones((2, 5)), 7, ITEMS)  # rows 7 to 11
  np.testing.assert_array_equal(scores, [[1, 1, 1, -np.inf, -np.inf]] * 2)
  np.testing.assert_array_equal(hide_other_rows(jnp.ones(3), 0, ITEMS), [-np.inf, 1, 1])


@pytest.mark.parametrize("first_row, held", [(0, 12), (0, 5), (5, 7)])  # all rows, or those of one device
@pytest.mark.parametrize("block_items", [1, 2, 5, 8, 12, 100])
def test_a_scan_in_blocks_meets_every_row_once_with_its_number_and_score(first_row, held, block_items):
  rng = np.random.default_rng(0)
  table, mean = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.normal(size=(USERS, WIDTH)).astype(np.float32)
  score_rows = lambda hidden, rows: jnp.einsum("bd,kd->bk", hidden.mean, rows["mean"])  # noqa: E731

  def note(carry, scores, first, is_new):
    met, noted = carry
    number = first + jnp.arange(scores.shape[1])
    return met.at[number].add(is_new), noted.at[:, number].set(scores)

  def run(table, mean):
    scan = make_block_scan(score_rows, Hidden(mean), {"mean": table}, first_row, ITEMS, block_items)
    start = jnp.zeros(ROWS, jnp.int32), jnp.full((USERS, ROWS), jnp.nan)
    return scan(note, start), scan(note, start)  # as often as one likes

  wanted = np.where((np.arange(ROWS) >= 1) & (np.arange(ROWS) <= ITEMS), mean @ table.T, -np.inf)
  is_held = (np.arange(ROWS) >= first_row) & (np.arange(ROWS) < first_row + held)
  for met, noted in jax.jit(run)(table[first_row:first_row + held], mean):
    np.testing.assert_array_equal(met, is_held)
    np.testing.assert_allclose(noted, np.where(is_held, wanted, np.nan), rtol=1e-5, atol=1e-6)
