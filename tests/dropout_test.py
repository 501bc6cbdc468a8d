"""What dropout promises: its rate, independence, and a mask that no mesh and no cut into blocks changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from awrsr_jax.model.dropout import Drop, dropout, number_rows


class Dropped(nn.Module):
  """Dropout alone."""

  rate: float

  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    return dropout(self, x, self.rate, train)


def drop(rate: float, x: jax.Array, seed: int = 0) -> np.ndarray:
  return np.asarray(Dropped(rate).apply({}, x, rngs={"dropout": jax.random.key(seed)}))


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [1, 3, 4, 7])
@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_the_mean(rate, width):
  x = np.ones((2 ** 20 // width, width), np.float32)
  out = drop(rate, x)
  assert out.shape == x.shape
  np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)
  error = 5 * (rate * (1 - rate) / x.size) ** 0.5
  np.testing.assert_allclose(np.mean(out == 0), rate, atol=error)
  np.testing.assert_allclose(np.mean(out), 1, atol=error / (1 - rate))


def test_dropout_rows_and_columns_are_independent():
  kept = (drop(0.5, np.ones((4096, 4096), np.float32)) > 0).astype(np.float32)
  for of_columns in (kept[:, :64].T, kept[:64]):
    between = np.corrcoef(of_columns) - np.eye(64)
    assert np.max(np.abs(between)) < 5.5 / 4096 ** 0.5
  neighbours = [np.mean(kept[1:, 1:] == kept[:-1, :-1]), np.mean(kept[1:] == kept[:-1]),
                np.mean(kept[:, 1:] == kept[:, :-1]), np.mean(kept[:, 1:-1] == (kept[:, :-2] != kept[:, 2:]))]
  np.testing.assert_allclose(neighbours, 0.5, atol=5 * 0.5 / kept.size ** 0.5)
  for counts in (kept.sum(axis=0), kept.sum(axis=1)):  # binomial: neither too even nor too uneven
    np.testing.assert_allclose(np.var(counts) / 1024, 1, atol=5 * (2 / 4096) ** 0.5)


def test_successive_keys_drop_independently():
  """The sum over many keys is binomial in every entry: no entry is dropped too often or too regularly."""
  kept = np.stack([drop(0.5, np.ones((64, 64), np.float32), seed=seed) > 0 for seed in range(256)])
  np.testing.assert_allclose(np.var(kept.sum(axis=0)) / 64, 1, atol=5 * (2 / 4096) ** 0.5)
  np.testing.assert_allclose(np.mean(kept[1:] == kept[:-1]), 0.5, atol=5 * 0.5 / kept.size ** 0.5)


def test_a_block_of_rows_drops_what_the_whole_array_drops():
  whole = Drop(jnp.array([3, 4], jnp.uint32), 0.3)
  x, rows = jnp.asarray(draw(0, 2, 8, 16)), number_rows((2, 8))
  np.testing.assert_array_equal(whole(x[:, 3:6, :9], rows[:, 3:6]), whole(x, rows)[:, 3:6, :9])


@pytest.mark.parametrize("rate", [0.998, 0.9999, 1 - 1e-11])
def test_dropout_near_one_stays_finite(rate):
  out = drop(rate, np.ones((64, 64), np.float32))
  assert np.all(np.isfinite(out)) and np.mean(out == 0) > 0.9


def test_dropout_is_the_identity_outside_training_and_at_rate_zero():
  x = draw(0, 3, 5)  # no key is given: none may be asked for
  np.testing.assert_array_equal(Dropped(0.5).apply({}, x, train=False), x)
  np.testing.assert_array_equal(Dropped(0.0).apply({}, x), x)


def test_dropout_scales_values_and_keeps_their_type():
  x = jnp.asarray(draw(1, 64, 6), jnp.bfloat16)
  out = Dropped(0.25).apply({}, x, rngs={"dropout": jax.random.key(0)})
  assert out.dtype == jnp.bfloat16
  kept = np.asarray(out) != 0
  np.testing.assert_allclose(np.float32(out)[kept], np.float32(x)[kept] / 0.75, rtol=0.01)


def test_dropout_differs_between_keys_and_not_between_calls():
  x = np.ones((64, 6), np.float32)
  np.testing.assert_array_equal(drop(0.5, x, seed=0), drop(0.5, x, seed=0))
  assert 0.4 < np.mean((drop(0.5, x, seed=0) > 0) != (drop(0.5, x, seed=1) > 0)) < 0.6


@pytest.mark.parametrize("spec, width", [(("data",), 6), (("data", None, "model"), 16), ((None, "data", "model"), 24)])
def test_dropout_does_not_depend_on_the_sharding(spec, width):
  x = draw(2, 8, 4, width)
  mesh = jax.make_mesh((4, 2), ("data", "model"))
  call = jax.jit(lambda x: Dropped(0.3).apply({}, x, rngs={"dropout": jax.random.key(0)}))
  sharded = call(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))))
  assert len(sharded.sharding.device_set) == 8
  np.testing.assert_array_equal(sharded, drop(0.3, x))
