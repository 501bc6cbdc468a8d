"""State: keys, schedules and optimizers against their definitions; the state is born where it lives."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from awrsr_jax.config import default, finalize
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine import state as states
from awrsr_jax.model.backbones import build_backbone
from awrsr_jax.model.sasrec import SASRec


def make_train(**values):
  """Returns the `train` node of a config with these values."""
  train = default().train
  train.update(values)
  return train


def make(data, model):
  return meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))


# --- keys


def test_keys_differ_by_seed_purpose_and_step_and_come_again():
  asked = [(seed, purpose, step) for seed in (0, 1) for purpose in states.PURPOSES for step in (0, 1, 2, 1000)]
  words = {ask: tuple(np.asarray(jax.random.key_data(states.make_key(*ask))).tolist()) for ask in asked}
  assert len(set(words.values())) == len(asked)
  for ask in asked:
    assert tuple(np.asarray(jax.random.key_data(states.make_key(*ask))).tolist()) == words[ask]


def test_a_traced_step_gives_the_key_of_the_number():
  traced = jax.jit(lambda step: jax.random.key_data(states.make_key(3, "dropout", step)))(jnp.int32(7))
  np.testing.assert_array_equal(traced, jax.random.key_data(states.make_key(3, "dropout", 7)))


# --- schedules


def expected_rate(schedule, peak, warmup, total, step):
  """The learning rate by its definition."""
  if step < warmup:
    return peak * (step + 1) / (warmup + 1)
  done = min((step - warmup) / (total - warmup), 1)
  return {"constant": peak, "cosine": peak * (1 + math.cos(math.pi * done)) / 2, "linear": peak * (1 - done)}[schedule]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_schedule_is_its_definition_at_every_step(schedule, warmup):
  rate = states.make_schedule(make_train(schedule=schedule, warmup_steps=warmup, learning_rate=0.02), 20)
  got = [float(rate(jnp.int32(step))) for step in range(24)]
  np.testing.assert_allclose(got, [expected_rate(schedule, 0.02, warmup, 20, step) for step in range(24)],
                             rtol=1e-5, atol=1e-9)


def test_a_schedule_rises_to_its_peak_and_ends_as_named():
  for schedule, end in (("constant", 0.02), ("cosine", 0.0), ("linear", 0.0)):
    rate = states.make_schedule(make_train(schedule=schedule, warmup_steps=5, learning_rate=0.02), 50)
    rates = [float(rate(step)) for step in range(51)]
    assert rates[:6] == sorted(rates[:6]) and 0 < rates[0] < rates[5]
    assert max(rates) == pytest.approx(0.02) == rates[5] and rates[50] == pytest.approx(end, abs=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))


def test_a_warm_up_longer_than_the_run_never_fails():
  rate = states.make_schedule(make_train(schedule="cosine", warmup_steps=100, learning_rate=1.0), 10)
  assert [float(rate(step)) for step in (0, 9)] == pytest.approx([1 / 101, 10 / 101])


# --- optimizer


def loop_adam(param, grads, rate, beta1, beta2, decay=0.0, clip=None):
  """Adam with decoupled weight decay and global-norm clipping, in float64."""
  m = v = np.zeros_like(param)
  for t, grad in enumerate(grads, start=1):
    norm = np.sqrt((grad ** 2).sum())
    if clip is not None and norm > clip:
      grad = grad * clip / norm
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad ** 2
    step = m / (1 - beta1 ** t) / (np.sqrt(v / (1 - beta2 ** t)) + 1e-8)
    param = param - rate * (step + decay * param)
  return param


@pytest.mark.parametrize("values,loop", [
    ({}, {}), ({"beta1": 0.5, "beta2": 0.8}, {"beta1": 0.5, "beta2": 0.8}), ({"clip_norm": 1.0}, {"clip": 1.0}),
    ({"optimizer": "adamw"}, {}), ({"optimizer": "adamw", "weight_decay": 0.3}, {"decay": 0.3}),
    ({"optimizer": "adamw", "weight_decay": 0.3, "clip_norm": 2.0, "beta1": 0.7},
     {"decay": 0.3, "clip": 2.0, "beta1": 0.7}),
])
def test_an_optimizer_is_its_definition(values, loop):
  rng = np.random.default_rng(0)
  param, grads = rng.normal(size=6), rng.normal(size=(4, 6)) * np.array([[0.1], [5.0], [0.3], [1.0]])
  optimizer = states.make_optimizer(make_train(learning_rate=0.1, **values), 100)
  got = {"a": jnp.float32(param[:2]), "b": jnp.float32(param[2:])}
  opt_state = optimizer.init(got)
  for grad in grads:
    updates, opt_state = optimizer.update({"a": jnp.float32(grad[:2]), "b": jnp.float32(grad[2:])}, opt_state, got)
    got = jax.tree.map(jnp.add, got, updates)
  expected = loop_adam(param, grads, 0.1, **({"beta1": 0.9, "beta2": 0.999} | loop))
  np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), expected, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.9, 0.15])
def test_averages_are_their_definition_of_what_the_same_optimizer_trains(decay):
  grads = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
  plain, averaging = (states.make_optimizer(make_train(learning_rate=0.1, clip_norm=1.0, average=average), 100)
                      for average in (None, decay))
  trained = average = jnp.ones(3)
  plain_state, opt_state = plain.init(trained), averaging.init(average)
  wanted = np.ones(3)
  for t, grad in enumerate(grads):
    updates, plain_state = plain.update(grad, plain_state, trained)
    trained += updates
    keep = min(decay, (1 + t) / (10 + t))
    wanted = keep * wanted + (1 - keep) * np.float64(trained)
    moves, opt_state = averaging.update(grad, opt_state, average)
    average += moves
    np.testing.assert_array_equal(opt_state.trained, trained)
    np.testing.assert_allclose(average, wanted, rtol=1e-5)


def test_an_optimizer_follows_its_schedule():
  train = make_train(learning_rate=0.1, schedule="linear", warmup_steps=2)
  optimizer, rate = states.make_optimizer(train, 6), states.make_schedule(train, 6)
  param = {"a": jnp.ones(3)}
  opt_state = optimizer.init(param)
  for step in range(7):  # of equal gradients Adam's step is the learning rate itself
    updates, opt_state = optimizer.update({"a": jnp.ones(3)}, opt_state, param)
    np.testing.assert_allclose(updates["a"], -float(rate(step)), rtol=1e-4, atol=1e-7)


# --- the initial state


@pytest.fixture(scope="module")
def parts():
  """A backbone of 24 items in a table of 40 rows, and its optimizer."""
  config = default()
  config.data.max_length, config.model.width, config.model.layers, config.model.ffn_width = 6, 8, 1, 12
  config.model.awr.rank, config.model.table_multiple = 4, 40
  config = finalize(config)
  return build_backbone(config, 24), states.make_optimizer(config.train, 10)


@pytest.fixture(scope="module")
def initial(parts):
  """The initial state on meshes 1 x 1, 8 x 1 and 2 x 4."""
  return {shape: states.init_state(*parts, 0, make(*shape)) for shape in ((1, 1), (8, 1), (2, 4))}


def test_the_initial_state_has_done_nothing(initial):
  state = initial[1, 1]
  assert int(state.step) == 0 and int(state.bad_step) == states.NO_STEP
  assert all(float(value) == 0 for value in jax.tree.leaves(state.window))
  assert jax.tree.leaves(state.window)[0].dtype == jnp.float32 and state.step.dtype == jnp.int32


def test_table_and_moments_are_split_over_the_model_axis_and_never_whole(initial):
  named = jax.tree_util.tree_flatten_with_path(initial[2, 4])[0]
  tables = [leaf for path, leaf in named if "item_table" in jax.tree_util.keystr(path)]
  assert len(tables) == 3  # the table and Adam's two moments
  for table in tables:
    assert table.shape == (40, 8) and {shard.data.shape for shard in table.addressable_shards} == {(10, 8)}
    assert {shard.index[0].start or 0 for shard in table.addressable_shards} == {0, 10, 20, 30}
  for path, leaf in named:
    if "item_table" not in jax.tree_util.keystr(path):
      assert leaf.is_fully_replicated and len(leaf.addressable_shards) == 8, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def compiled(parts):
  """The compiled program that makes the initial state of seed 1 on a mesh of 2 x 4."""
  return jax.jit(lambda: states.init_state(*parts, 1, make(2, 4))).lower().compile()


def test_no_device_makes_the_whole_table_while_initialising(compiled):
  text = compiled.as_text()
  assert re.search(r"\w+\[10,8\]", text) and not re.search(r"\w+\[(40,8|320)\]", text)


def test_the_initial_state_does_not_depend_on_the_devices(initial):
  for shape in ((8, 1), (2, 4)):
    jax.tree.map(np.testing.assert_array_equal, initial[1, 1], initial[shape])


def test_vectors_for_a_table_that_is_not_there_are_refused(parts):
  class Renamed(SASRec):
    vectors_path = "embedding/vectors"

  backbone = Renamed(parts[0].model, parts[0].max_length, parts[0].num_items)
  with pytest.raises(ValueError, match="no parameter embedding/vectors, but .* embedding/item_table,"):
    states.init_state(backbone, parts[1], 0, make(1, 1), np.ones((25, 8), np.float32))


def test_seeds_give_other_parameters(compiled, initial):
  assert np.any(initial[2, 4].params["embedding"]["item_table"] != compiled().params["embedding"]["item_table"])
