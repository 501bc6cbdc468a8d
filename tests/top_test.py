"""The best k items: against a sort of all scores in numpy, whatever the blocks and devices."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from awrsr_jax.engine import mesh as meshes
from awrsr_jax.inference import top
from awrsr_jax.model.hidden import Hidden

ITEMS, ROWS, WIDTH, USERS = 29, 32, 8, 16  # row 0 and the last two rows are no items


class Dot:
  """A backbone of a table alone, which gives hidden states that a test chooses."""

  num_items = ITEMS

  def apply(self, variables, *_, method):
    assert method == "catalogue"
    return variables["params"]

  @staticmethod
  def score_rows(hidden, rows):
    return hidden.mean @ rows["table"].T


def make(data, model):
  return meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))


def draw(seed=0, tied=False):
  """Table, hidden states, excluded items and allowed rows; with `tied`, scores take few values."""
  rng = np.random.default_rng(seed)
  table = rng.integers(-1, 2, (ROWS, WIDTH)) if tied else rng.normal(size=(ROWS, WIDTH))
  mean = rng.integers(-1, 2, (USERS, WIDTH)) if tied else rng.normal(size=(USERS, WIDTH))
  excluded = rng.integers(0, ITEMS + 1, (USERS, 7))
  allowed = rng.random(ROWS) < 0.8
  return np.float32(table), np.float32(mean), np.int32(excluded), allowed


def find(mesh, table, mean, excluded, allowed, k, block_items):
  run = jax.jit(lambda table, mean, excluded, allowed: top.top_among_all(
      Dot(), mesh, Dot.score_rows, {"table": table}, Hidden(mean=mean), excluded, allowed, k, block_items))
  return jax.tree.map(np.asarray, run(table, mean, excluded, allowed))


def expected(table, mean, excluded, allowed, k):
  """The same by a sort in numpy: larger scores first, then lower numbers."""
  scores, items = np.full((USERS, k), -np.inf, np.float32), np.zeros((USERS, k), np.int32)
  for user in range(USERS):
    left = [item for item in range(1, ITEMS + 1) if allowed[item] and item not in excluded[user]]
    of_user = {item: float(np.float64(mean[user]) @ np.float64(table[item])) for item in left}
    best = sorted(left, key=lambda item: (-of_user[item], item))[:k]
    items[user, :len(best)], scores[user, :len(best)] = best, [of_user[item] for item in best]
  return scores, items


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape,block_items", [((1, 1), 64), ((1, 1), 5), ((1, 1), 32), ((8, 1), 9), ((2, 4), 3),
                                               ((1, 8), 64)])
def test_the_best_are_those_of_a_sort_of_all_scores(shape, block_items, tied):
  arrays = draw(tied=tied)
  for k in (1, 4, ITEMS):
    scores, items = find(make(*shape), *arrays, k, block_items)
    want_scores, want_items = expected(*arrays, k)
    np.testing.assert_array_equal(items, want_items)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)


def test_what_is_no_item_is_never_given():
  table, mean, excluded, allowed = draw()
  table[0], table[ITEMS + 1:] = 100 * mean[0], 100 * mean[0]
  _, items = find(make(1, 1), table, mean, excluded * 0, np.ones_like(allowed), ITEMS, 7)
  assert all(sorted(row) == list(range(1, ITEMS + 1)) for row in items.tolist())


def test_places_that_no_item_is_left_for_are_empty():
  table, mean, excluded, allowed = draw()
  allowed[:] = False
  allowed[[3, 8]] = True
  excluded[0] = 3
  scores, items = find(make(2, 2), table, mean, excluded[:, :1] * 0 + np.int32([[3]] + [[0]] * 15), allowed, 4, 4)
  assert items[0].tolist() == [8, 0, 0, 0] and scores[0, 1:].tolist() == [-np.inf] * 3
  assert sorted(items[1].tolist()) == [0, 0, 3, 8]


def test_no_excluded_items_at_all():
  table, mean, excluded, allowed = draw()
  found = find(make(2, 2), table, mean, excluded[:, :0], allowed, 5, 4)
  np.testing.assert_array_equal(found[1], expected(table, mean, excluded[:, :0], allowed, 5)[1])


@pytest.mark.parametrize("item", [1, 16, ITEMS])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_nan_among_the_scores_is_never_hidden(item, shape):
  table, mean, excluded, allowed = draw()
  table[item] = np.nan
  scores, _ = find(make(*shape), table, mean, excluded, allowed * False, 3, 5)
  assert np.isnan(scores).all()
  table[item], mean[2] = 0, np.nan
  scores, _ = find(make(*shape), table, mean, excluded, allowed, 3, 5)
  assert np.isnan(scores).any(axis=1).tolist() == [user == 2 for user in range(USERS)]


def test_a_nan_in_a_row_that_is_no_item_does_no_harm():
  table, mean, excluded, allowed = draw()
  before = find(make(1, 1), table, mean, excluded, allowed, 3, 5)
  table[0] = table[ITEMS + 1] = np.nan
  jax.tree.map(np.testing.assert_array_equal, find(make(1, 1), table, mean, excluded, allowed, 3, 5), before)


def test_only_the_best_of_each_device_travel():
  """Between devices go (B, k) scores and items, and not a score of every item."""
  mesh, rows = make(1, 8), 8 * 128
  shapes = (jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32), jax.ShapeDtypeStruct((USERS, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((USERS, 7), jnp.int32), jax.ShapeDtypeStruct((rows,), bool))
  step = jax.jit(lambda table, *rest: top.top_among_all(Dot(), mesh, Dot.score_rows, {"table": table},
                                                        Hidden(mean=rest[0]), *rest[1:], 5, 64))
  place = lambda x: NamedSharding(mesh, PartitionSpec("model") if x.shape[0] == rows else PartitionSpec())  # noqa: E731
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)) for x in shapes]
  text = step.lower(*placed).compile().as_text()
  gathered = [line for line in text.splitlines() if "all-gather(" in line or "all-reduce(" in line]
  assert gathered and not any(f"[{USERS},{rows}" in line or f"[{rows}" in line for line in gathered)
