"""Masked attention against loops in float64, and what a mask promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awrsr_jax.model.attention import attend, causal_mask, dot_scores, masked_softmax, softmax

REAL_BxL = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
MASK = np.asarray(causal_mask(jnp.asarray(REAL_BxL)))


def softmax_by_loops(scores: np.ndarray, allowed: np.ndarray, sink: float | None = None) -> np.ndarray:
  """Returns the softmax of one row within its mask, float64; zeros where nothing is allowed."""
  row = np.zeros(len(scores))
  total = sum(np.exp(float(s)) for s, ok in zip(scores, allowed, strict=True) if ok)
  total += 0 if sink is None else np.exp(float(sink))
  for j in range(len(scores)):
    if allowed[j]:
      row[j] = np.exp(float(scores[j])) / total
  return row


def weights_by_loops(scores: np.ndarray, mask: np.ndarray, sink: float | None = None) -> np.ndarray:
  """Returns the softmax of every row of one (L, L) matrix within its mask, float64."""
  return np.stack([softmax_by_loops(scores[i], mask[i], sink) for i in range(len(scores))])


def mask_by_loops(real_L: np.ndarray) -> np.ndarray:
  """Returns (L, L): key j is real and not after query i."""
  return np.array([[bool(real_L[j]) and j <= i for j in range(len(real_L))] for i in range(len(real_L))])


def scores_by_loops(q_LxHxh: np.ndarray, k_LxHxh: np.ndarray) -> np.ndarray:
  """Returns (H, L, L): Q K^T / sqrt(h) of one sequence, float64."""
  length, heads, width = q_LxHxh.shape
  scores = np.zeros((heads, length, length))
  for h in range(heads):
    for i in range(length):
      for j in range(length):
        scores[h, i, j] = sum(float(q_LxHxh[i, h, d]) * float(k_LxHxh[j, h, d]) for d in range(width)) / width ** 0.5
  return scores


def attend_by_loops(weights_HxLxL: np.ndarray, v_LxHxh: np.ndarray) -> np.ndarray:
  """Returns (L, H, h): the values of one sequence summed by its weights, float64."""
  out = np.zeros(v_LxHxh.shape)
  for i, h in np.ndindex(v_LxHxh.shape[:2]):
    for j in range(len(v_LxHxh)):
      out[i, h] += weights_HxLxL[h, i, j] * v_LxHxh[j, h].astype(np.float64)
  return out


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_causal_mask_lets_real_keys_through_that_are_not_in_the_future():
  assert MASK.shape == (4, 1, 5, 5)
  for b, real_L in enumerate(REAL_BxL):
    np.testing.assert_array_equal(MASK[b, 0], mask_by_loops(real_L))


def test_masked_softmax_agrees_with_loops():
  scores = draw(0, 4, 2, 5, 5) * 3
  found = masked_softmax(scores, MASK)
  for b, h in np.ndindex(4, 2):
    np.testing.assert_allclose(found[b, h], weights_by_loops(scores[b, h], MASK[b, 0]), atol=1e-6)


SINKS = np.array([-1.5, 2.0], np.float32)[None, :, None, None]  # of two heads


def test_a_softmax_beside_a_sink_agrees_with_loops_and_the_sink_takes_what_is_missing():
  scores = draw(0, 4, 2, 5, 5) * 3
  found = np.asarray(masked_softmax(scores, MASK, SINKS))
  for b, h in np.ndindex(4, 2):
    np.testing.assert_allclose(found[b, h], weights_by_loops(scores[b, h], MASK[b, 0], SINKS[0, h, 0, 0]), atol=1e-6)
  has_key = np.broadcast_to(MASK.any(axis=-1), found.shape[:-1])
  sums = found.sum(axis=-1)
  assert np.all(sums[has_key] < 1) and np.all(sums[has_key] > 0) and np.all(found[~has_key] == 0)
  # A key with the sink's score, whose weight is the missing part.
  with_key = np.concatenate([np.broadcast_to(SINKS, (4, 2, 5, 1)), np.where(MASK, scores, -np.inf)], axis=-1)
  whole = np.asarray(jax.nn.softmax(with_key, axis=-1))
  np.testing.assert_allclose((1 - sums)[has_key], whole[..., 0][has_key], atol=1e-6)
  np.testing.assert_allclose(found[has_key], whole[..., 1:][has_key], atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_sink_is_finite_with_its_gradient_wherever_it_lies(scale):
  scores, probe = draw(7, 4, 2, 5, 5) * np.float32(scale), draw(8, 4, 2, 5, 5)
  for sink in (SINKS, SINKS * np.float32(1e4)):
    with jax.debug_nans(True):
      weights, back = jax.vjp(lambda scores, sink: masked_softmax(scores, MASK, sink), scores, sink)
      grads = back(jnp.asarray(probe))
    assert all(np.all(np.isfinite(leaf)) for leaf in (weights, *grads))
    without_key = np.broadcast_to(~MASK.any(axis=-1), (4, 2, 5))
    assert not np.any(np.asarray(weights)[without_key]) and not np.any(np.asarray(grads[0])[without_key])
  shift = jax.grad(lambda shift: jnp.sum(masked_softmax(scores + shift, MASK, SINKS + shift) * probe))(0.0)
  assert abs(shift) < 1e-4  # moves nothing


def test_a_sink_far_below_all_scores_is_none():
  scores = draw(0, 4, 2, 5, 5)
  np.testing.assert_allclose(softmax(scores, SINKS - 1e3), softmax(scores), atol=1e-7)


def test_dot_attention_agrees_with_loops():
  q, k, v = (draw(seed, 4, 5, 2, 3) for seed in (1, 2, 3))
  scores = dot_scores(q, k)
  found = attend(masked_softmax(scores, MASK), v)
  assert found.shape == (4, 5, 2, 3)
  for b in range(4):
    wanted = scores_by_loops(q[b], k[b])
    np.testing.assert_allclose(scores[b], wanted, atol=1e-5)
    wanted = attend_by_loops(np.stack([weights_by_loops(s, mask_by_loops(REAL_BxL[b])) for s in wanted]), v[b])
    np.testing.assert_allclose(found[b], wanted, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_softmax_rows_sum_to_one_and_are_exactly_zero_outside_the_mask(dtype, scale):
  found = masked_softmax(jnp.asarray(draw(4, 4, 2, 5, 5) * scale, dtype), MASK)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(np.sum(found, axis=-1), np.broadcast_to(MASK.any(axis=-1), (4, 2, 5)), atol=1e-6)
  assert np.all(np.asarray(found)[~np.broadcast_to(MASK, found.shape)] == 0)


def test_masked_scores_never_matter_not_even_in_gradients():
  scores, probe = draw(5, 4, 2, 5, 5), draw(6, 4, 2, 5, 5)
  poisoned = np.where(MASK, scores, np.inf)
  value_and_grad = jax.value_and_grad(lambda s: jnp.sum(masked_softmax(s, MASK) * probe))
  (value, grad), (value_poisoned, grad_poisoned) = value_and_grad(scores), value_and_grad(poisoned)
  assert value == value_poisoned
  np.testing.assert_array_equal(grad, grad_poisoned)
  assert np.all(np.asarray(grad)[~np.broadcast_to(MASK, grad.shape)] == 0) and np.any(grad)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_without_any_key_are_zero_with_zero_gradient_and_no_nan_on_the_way(scale):
  scores, probe = draw(7, 4, 2, 5, 5) * np.float32(scale), draw(8, 4, 2, 5, 5)
  with jax.debug_nans(True):
    weights, back = jax.vjp(lambda s: masked_softmax(s, MASK), scores)
    grad = back(jnp.asarray(probe))[0]
  assert np.all(np.isfinite(grad))
  without_key = np.broadcast_to(~MASK.any(axis=-1), (4, 2, 5))
  assert without_key[3].all() and np.all(np.asarray(weights)[without_key] == 0)
  assert np.all(np.asarray(grad)[without_key] == 0)


def test_bfloat16_scores_are_float32_and_values_keep_their_type():
  q, v = jnp.asarray(draw(9, 1, 5, 2, 3), jnp.bfloat16), jnp.asarray(draw(10, 1, 5, 2, 3), jnp.bfloat16)
  scores = dot_scores(q, q)
  assert scores.dtype == jnp.float32
  assert attend(masked_softmax(scores, MASK[:1]), v).dtype == jnp.bfloat16
