"""The objective of a batch: every loss against sums by hand, the full softmax in chunks, and the draws of negatives."""

import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from refine_test import random_params

from awrsr_jax.config import default
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine import objective as module
from awrsr_jax.engine.objective import draw_shared, draw_unseen, join, objective
from awrsr_jax.model import losses
from awrsr_jax.model.backbones import BACKBONES
from awrsr_jax.model.hidden import Hidden

ITEMS = 13
MESH = meshes.make_mesh(ml_collections.ConfigDict({"data": 1, "model": 1}))
COUNTS = np.array([5, 1, 3, 0, 2, 2, 7, 1, 1, 4, 1, 0, 6])  # training interactions of items 1 to 13
CUMULATIVE = jnp.asarray(np.cumsum(COUNTS), jnp.int32)
HISTORIES = [[3, 1, 4, 13, 5, 9], [2, 6, 6, 8], []]
NAMES = [("softmax", "uniform"), ("bce", "uniform"), ("bpr", "uniform"), ("gbce", "uniform"),
         ("sampled_softmax", "uniform"), ("sampled_softmax", "popularity")]
# A loss sees scores, not the backbone that made them: SASRec has every loss, STOSA one of each kind of negatives.
PAIRS = [*((name, negatives, "sasrec") for name, negatives in NAMES), ("softmax", "uniform", "stosa"),
         ("bpr", "uniform", "stosa"), ("sampled_softmax", "popularity", "stosa")]


def batch_of(histories: list[list[int]], length: int) -> dict[str, jax.Array]:
  """Returns inputs (all but the last item) and targets (all but the first), left-padded, as data/batches.py does."""
  pad = lambda row: [0] * (length - len(row)) + row  # noqa: E731
  return {"inputs": jnp.array([pad(row[:-1]) for row in histories], jnp.int32),
          "targets": jnp.array([pad(row[1:]) for row in histories], jnp.int32)}


BATCH = batch_of(HISTORIES, length=5)
SHORT = [[7, 2], [9, 13, 9], [], [4, 5, 11], [12, 10]]


def buckets_of(*batches: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
  """Returns one batch of several buckets."""
  return {name: tuple(batch[name] for batch in batches) for name in ("inputs", "targets")}


BUCKETS = buckets_of(BATCH, batch_of(SHORT, length=2))  # in any order


def loss_of(name: str, negatives: str = "uniform", num_negatives: int = 8, pvn_weight: float = 0.0) -> Any:
  loss = default().loss
  loss.update({"name": name, "negatives": negatives, "num_negatives": num_negatives, "pvn_weight": pvn_weight})
  return loss


@functools.cache
def build(dropout: float = 0.0, backbone: str = "sasrec") -> tuple[Any, Any]:
  """Returns a backbone without blocks, which the objective cannot tell from others, and random parameters for it."""
  model = default().model
  model.update({"backbone": backbone, "width": 8, "layers": 0, "dropout": dropout, "table_multiple": 4})
  backbone = BACKBONES[backbone](model, 5, ITEMS)
  return backbone, random_params(backbone.init, BATCH["inputs"], scale=0.4)


@functools.cache
def compiled(with_gradient: bool, name: str, negatives: str, dropout: float, backbone: str, **loss: Any) -> Any:
  """Returns (params, batch, seed of dropout) -> (sum of the loss, number of targets), beside the gradient if wanted."""
  value = lambda params, batch, seed: objective(  # noqa: E731
      build(dropout, backbone)[0], MESH, params, batch, CUMULATIVE, loss_of(name, negatives, **loss),
      {"dropout": jax.random.key(seed), "negatives": jax.random.key(2)})
  return jax.jit(jax.value_and_grad(value, has_aux=True) if with_gradient else value)


def evaluate(name: str, negatives: str = "uniform", batch: Any = None, backbone: str = "sasrec", **loss: Any) -> Any:
  """Returns ((sum of the loss, number of targets), gradient)."""
  return compiled(True, name, negatives, 0.0, backbone, **loss)(build(0.0, backbone)[1], batch or BATCH, 1)


def sums(name: str, negatives: str = "uniform", batch: Any = None, dropout: float = 0.0, seed: int = 1,
         backbone: str = "sasrec", **loss: Any) -> Any:
  """Returns (sum of the loss, number of targets)."""
  return compiled(False, name, negatives, dropout, backbone, **loss)(
      build(dropout, backbone)[1], batch or BATCH, seed)


draw_unseen = jax.jit(draw_unseen, static_argnums=(3, 4))


def key_of(bucket: int) -> jax.Array:
  """Returns what the negatives of a bucket's positions are drawn with."""
  return jax.random.fold_in(jax.random.key(2), bucket)


def softplus(x: float) -> float:
  return np.logaddexp(0, x)


def loss_by_hand(loss: Any, scores_V: np.ndarray, target: int, negatives: np.ndarray) -> float:
  """Returns the loss of one position, float64; negatives are item numbers."""
  positive, others = scores_V[target], scores_V[negatives]
  match loss.name:
    case "softmax":
      return np.log(sum(np.exp(scores_V[item]) for item in range(1, ITEMS + 1))) - positive
    case "bpr":
      return sum(softplus(x - positive) for x in others) / len(others)
    case "sampled_softmax":
      chance = COUNTS / COUNTS.sum() if loss.negatives == "popularity" else np.full(ITEMS, 1 / ITEMS)
      total = np.exp(positive)
      for item, score in zip(negatives, others, strict=True):
        if item != target:
          total += np.exp(score) / (len(negatives) * chance[item - 1])
      return np.log(total) - positive
  alpha = len(negatives) / (ITEMS - 1)
  beta = alpha * (loss.gbce_t * (1 - 1 / alpha) + 1 / alpha) if loss.name == "gbce" else 1
  return beta * softplus(-positive) + sum(softplus(x) for x in others)


def scores_by_hand(backbone: Any, params: Any, hidden: Hidden) -> np.ndarray:
  """Returns (..., V) scores of all rows, float64: dot products, or minus Wasserstein distances."""
  if hidden.cov is None:
    return np.float64(hidden.mean) @ np.float64(params["embedding"]["item_table"]).T
  mean, cov = (np.float64(params[f"embedding_{stream}"]["item_table"]) for stream in ("mean", "cov"))
  deviation = np.sqrt(np.where(cov > 0, cov + 1, np.exp(np.minimum(cov, 0))))
  return -np.sum((np.float64(hidden.mean)[..., None, :] - mean) ** 2
                 + (np.sqrt(np.float64(hidden.cov))[..., None, :] - deviation) ** 2, axis=-1)


@pytest.mark.parametrize("name, negatives, backbone, in_buckets", [
    *((*pair, True) for pair in PAIRS),
    *((name, "uniform", "sasrec", False) for name in ("softmax", "bce", "sampled_softmax"))])
def test_objective_is_the_sum_over_real_targets_and_their_number(name, negatives, backbone, in_buckets):
  batch, real = (BUCKETS, 8 + 6) if in_buckets else (BATCH, 8)
  total, count = sums(name, negatives, batch, backbone=backbone)
  backbone, params = build(backbone=backbone)
  loss, wanted, collisions = loss_of(name, negatives), 0, 0
  for bucket, (inputs, targets) in enumerate(zip(*map(jax.tree.leaves, batch.values()), strict=True)):
    scores = scores_by_hand(backbone, params, backbone.apply({"params": params}, inputs, method="encode"))
    targets = np.asarray(targets)
    if name == "sampled_softmax":
      shared, _ = draw_shared(jax.random.key(2), loss, ITEMS, CUMULATIVE)
      drawn = np.broadcast_to(np.asarray(shared), (*targets.shape, 8))
      collisions += np.sum((drawn == targets[..., None]) & (targets > 0)[..., None])
    else:
      drawn = np.asarray(draw_unseen(key_of(bucket), inputs, targets, 8, ITEMS))
    wanted += sum(loss_by_hand(loss, scores[b, t], targets[b, t], drawn[b, t]) for b, t in np.argwhere(targets > 0))
  assert collisions or name != "sampled_softmax"  # they are part of this test
  assert count == real and count.dtype == total.dtype == jnp.float32
  np.testing.assert_allclose(total, wanted, rtol=1e-5)


@pytest.mark.parametrize("name, negatives, backbone", [pair for pair in PAIRS if "softmax" in pair[0]])
def test_buckets_have_the_loss_and_gradient_of_their_rows_padded_to_one_length(name, negatives, backbone):
  (total, count), grad = evaluate(name, negatives, BUCKETS, backbone=backbone)
  padded = batch_of([*HISTORIES, *SHORT], length=5)
  (wanted, real), wanted_grad = evaluate(name, negatives, padded, backbone=backbone)
  assert count == real == 14
  np.testing.assert_allclose(total, wanted, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grad, wanted_grad)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grad))


def test_buckets_draw_dropout_and_negatives_of_their_own():
  one = batch_of(HISTORIES, length=5)
  for name, dropout in (("softmax", 0.5), ("bce", 0.0)):
    single = sums(name, batch=one, dropout=dropout)[0]
    assert abs(sums(name, batch=buckets_of(one, one), dropout=dropout)[0] - 2 * single) > 1e-3
  same = sums("sampled_softmax", batch=buckets_of(one, one))[0]  # all meet the same negatives
  np.testing.assert_allclose(same, 2 * sums("sampled_softmax")[0], rtol=1e-6)


@pytest.mark.parametrize("data", [1, 8])
def test_joined_buckets_stay_on_their_devices(data):
  mesh = meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": 1}))
  split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  rng = np.random.default_rng(0)
  buckets = [{"x": rng.normal(size=(16, 5, 3)), "n": rng.integers(9, size=(16, 5))},
             {"x": rng.normal(size=(8, 2, 3)), "n": rng.integers(9, size=(8, 2))}]
  buckets = jax.device_put(jax.tree.map(lambda x: x.astype(np.float32), buckets), split)
  joined = jax.jit(functools.partial(join, mesh))
  assert not re.search("all-|collective", joined.lower(buckets).compile().as_text())
  found = joined(buckets)
  assert found["x"].sharding.is_equivalent_to(split, 3)
  for name in ("x", "n"):
    for device in range(data):
      parts = [np.split(np.asarray(bucket[name]), data)[device] for bucket in buckets]
      np.testing.assert_array_equal(found[name][device], np.concatenate(
          [part.reshape(-1, *part.shape[2:]) for part in parts]))
  assert join(mesh, buckets[:1]) is buckets[0]


@pytest.mark.parametrize("name", ["bpr", "bce", "gbce"])
def test_pvn_adds_what_negatives_are_nearer_to_the_target_than_the_history_is(name):
  backbone, params = build(backbone="stosa")
  plain, _ = sums(name, backbone="stosa")
  total, count = sums(name, backbone="stosa", pvn_weight=0.5)
  inputs, targets = np.asarray(BATCH["inputs"]), np.asarray(BATCH["targets"])
  drawn = np.asarray(draw_unseen(key_of(0), inputs, targets, 8, ITEMS))
  scores = scores_by_hand(backbone, params, backbone.apply({"params": params}, inputs, method="encode"))
  between = scores_by_hand(backbone, params, backbone.apply({"params": params}, targets, method="items"))
  too_near = [np.maximum(between[b, t, drawn[b, t]] - scores[b, t, targets[b, t]], 0) for b, t in np.argwhere(targets)]
  assert 0 < np.mean(np.array(too_near) > 0) <= 1 and count == 8
  np.testing.assert_allclose(total - plain, 0.5 * np.sum(np.mean(too_near, axis=1)), rtol=1e-4)


@pytest.mark.parametrize("name, negatives, backbone", PAIRS)
def test_padded_targets_give_nothing_to_value_and_gradient(name, negatives, backbone):
  pvn = {"pvn_weight": 0.5} if (name, backbone) == ("bpr", "stosa") else {}
  _, grad = evaluate(name, negatives, backbone=backbone, **pvn)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))
  for embedding in (tables for path, tables in grad.items() if path.startswith("embedding")):
    assert np.any(embedding["item_table"]) and not np.any(embedding["item_table"][0])
  no_targets = {"inputs": BATCH["inputs"], "targets": jnp.zeros_like(BATCH["targets"])}
  sums, grad = evaluate(name, negatives, no_targets, backbone=backbone, **pvn)
  assert sums == (0, 0) and not any(np.any(leaf) for leaf in jax.tree.leaves(grad))  # NaN counts as any


@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_objective_trains_with_dropout_by_its_key(name):
  values = [sums(name, dropout=0.5, seed=seed)[0] for seed in (0, 0, 1)]
  assert values[0] == values[1] != values[2]


def dense_softmax(params: Any, backbone: Any) -> jax.Array:
  """Returns the sum of the cross entropy over BATCH, from all scores at once."""
  hidden = backbone.apply({"params": params}, BATCH["inputs"], method="encode")
  scores = backbone.apply({"params": params}, hidden, method="score_all")
  each = optax.softmax_cross_entropy_with_integer_labels(jnp.maximum(scores, -1e30), BATCH["targets"])
  return jnp.sum(jnp.where(BATCH["targets"] > 0, each, 0))


@pytest.mark.parametrize("chunk_positions, chunk_scores, backbone", [
    (1, 1 << 20, "sasrec"), (4, 1 << 20, "sasrec"), (1000, 1 << 20, "sasrec"), (1000, 70, "sasrec"),
    (4, 1 << 20, "stosa")])
def test_the_full_softmax_equals_the_dense_one_in_value_and_gradients(chunk_positions, chunk_scores, backbone,
                                                                      monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "compiled", compiled.__wrapped__)  # for these chunks
  monkeypatch.setattr(module, "CHUNK_POSITIONS", chunk_positions)
  monkeypatch.setattr(module, "CHUNK_SCORES", chunk_scores)
  model, params = build(0.0, backbone)
  seen, score_rows = set(), type(model).score_rows
  monkeypatch.setattr(type(model), "score_rows", staticmethod(
      lambda hidden, rows: (seen.add(hidden.mean.shape), score_rows(hidden, rows))[1]))
  (total, _), grad = evaluate("softmax", backbone=backbone)
  assert seen == {(min(chunk_positions, 15, chunk_scores // 16), 8)}  # of 3 x 5 positions, by a table of 16 rows
  wanted = jax.jit(jax.value_and_grad(functools.partial(dense_softmax, backbone=model)))(params)
  np.testing.assert_allclose(total, wanted[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grad, wanted[1])


def test_the_gradient_of_the_full_softmax_goes_on_to_what_is_made_of_it():
  model, params = build()
  value = lambda params: jnp.log(3 * objective(  # noqa: E731
      model, MESH, params, BATCH, CUMULATIVE, loss_of("softmax"), {"dropout": jax.random.key(0)})[0])
  wanted = jax.jit(jax.grad(lambda params: jnp.log(3 * dense_softmax(params, model))))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.jit(jax.grad(value))(params),
               wanted)


# Rows with repeats, with both ends of the item numbers, with neighbouring numbers, padded, and without any item.
ROWS = [[3, 1, 4, 13, 5, 9], [2, 6, 6, 8], [], [1, 2, 3, 1, 2, 3], [13, 12], [1, 13, 1, 13, 13], [7, 7]]


def test_unseen_negatives_are_uniform_over_the_items_that_the_row_does_not_contain():
  batch, draws = batch_of(ROWS, length=5), 4000
  found = np.asarray(draw_unseen(jax.random.key(0), batch["inputs"], batch["targets"], draws, ITEMS))
  assert found.shape == (len(ROWS), 5, draws) and found.dtype == np.int32
  for row, negatives in zip(ROWS, found, strict=True):
    unseen = [item for item in range(1, ITEMS + 1) if item not in row]
    assert set(np.unique(negatives)) == set(unseen)
    for items in (negatives, negatives[0], negatives[-1]):  # the whole row, and positions by themselves
      share = np.bincount(items.ravel(), minlength=ITEMS + 1)[unseen] / items.size
      chance = 1 / len(unseen)
      np.testing.assert_allclose(share, chance, atol=5 * (chance * (1 - chance) / items.size) ** 0.5)


def test_unseen_negatives_of_positions_and_keys_differ():
  batch = batch_of(ROWS, length=5)
  draw = lambda seed: np.asarray(draw_unseen(  # noqa: E731
      jax.random.key(seed), batch["inputs"], batch["targets"], 50, ITEMS))
  found = draw(0)
  np.testing.assert_array_equal(found, draw(0))
  assert np.mean(found == draw(1)) < 0.3 and np.mean(found[:, 0] == found[:, 1]) < 0.3
  assert np.mean(found[:, :, 0] == found[:, :, 1]) < 0.3


def test_a_row_that_leaves_one_item_gets_that_item():
  batch = batch_of([[1, 2, 4, 5], [5, 4, 3, 2], [1, 2, 3, 4]], length=6)
  found = draw_unseen(jax.random.key(0), batch["inputs"], batch["targets"], 20, 5)
  np.testing.assert_array_equal(found, np.broadcast_to(np.array([3, 1, 5])[:, None, None], (3, 6, 20)))


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_shared_negatives_come_as_often_as_they_say(negatives):
  draws = 40000
  items, log_expected = draw_shared(jax.random.key(0), loss_of("sampled_softmax", negatives, draws), ITEMS, CUMULATIVE)
  chance = COUNTS / COUNTS.sum() if negatives == "popularity" else np.full(ITEMS, 1 / ITEMS)
  assert items.shape == log_expected.shape == (draws,) and items.dtype == jnp.int32
  np.testing.assert_allclose(log_expected, np.log(draws * chance[np.asarray(items) - 1]), rtol=1e-6)
  share = np.bincount(np.asarray(items), minlength=ITEMS + 1) / draws
  assert len(share) == ITEMS + 1 and np.all(share[1:][chance == 0] == 0) and share[0] == 0
  np.testing.assert_allclose(share[1:], chance, atol=5 * 0.5 / draws ** 0.5)


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_the_sum_inside_sampled_softmax_is_unbiased(negatives):
  counts, target = np.array([5, 1, 3, 8, 2, 1]), 3  # every item has a chance
  scores = np.concatenate([[-np.inf], np.random.default_rng(3).normal(size=6)]).astype(np.float32)
  loss = loss_of("sampled_softmax", negatives, num_negatives=4)

  def estimate(key: jax.Array) -> jax.Array:
    items, log_expected = draw_shared(key, loss, 6, jnp.asarray(np.cumsum(counts), jnp.int32))
    value = losses.sampled_softmax(scores[target], jnp.asarray(scores)[items], log_expected, items == target)
    return jnp.exp(value + scores[target])

  estimates = np.float64(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(4), 20000)))
  truth = np.sum(np.exp(np.float64(scores)))
  assert np.std(estimates) > 0.1 * truth  # the draws matter
  np.testing.assert_allclose(np.mean(estimates), truth, atol=5 * np.std(estimates) / 20000 ** 0.5)
