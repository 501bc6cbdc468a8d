"""Diagonal Gaussians: positive covariances, and the Wasserstein distance against the formula for full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from awrsr_jax.model.gaussian import covariance, deviation, wasserstein

PLACES = np.array([-200, -90, -30, -5, -1, -1e-3, 0, 1e-3, 1, 5, 30, 200], np.float32)


def draw_gaussians(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns means and deviations of this shape, float32."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32), rng.uniform(0.1, 2, shape).astype(np.float32)


def distance_of_matrices(mean_q: np.ndarray, deviation_q: np.ndarray, mean_k: np.ndarray,
                         deviation_k: np.ndarray) -> float:
  """|m - m'|^2 + trace(C + C' - 2 (C'^1/2 C C'^1/2)^1/2): the distance of any two Gaussians, in float64."""
  cov_q, cov_k = (np.diag(np.square(np.float64(deviation))) for deviation in (deviation_q, deviation_k))
  root_k = scipy.linalg.sqrtm(cov_k)
  between = scipy.linalg.sqrtm(root_k @ cov_q @ root_k)
  return float(np.sum((np.float64(mean_q) - mean_k) ** 2) + np.trace(cov_q + cov_k - 2 * np.real(between)))


def test_covariance_is_elu_plus_one():
  wanted = [x + 1 if x > 0 else np.exp(x) for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(covariance(PLACES), wanted, rtol=1e-6, atol=1.2e-7)


def test_deviation_is_the_root_of_the_covariance_and_loses_nothing_below_zero():
  np.testing.assert_allclose(np.square(deviation(PLACES)), covariance(PLACES), rtol=1e-6, atol=1.2e-7)
  wanted = [np.sqrt(x + 1) if x > 0 else np.exp(x / 2) for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(deviation(PLACES), wanted, rtol=1e-6, atol=1e-37)
  assert deviation(jnp.float32(-90.0)) > 0  # its square is no float32


def test_deviation_has_the_right_finite_gradient_everywhere():
  wanted = [0.5 / np.sqrt(x + 1) if x > 0 else np.exp(x / 2) / 2 for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(jax.vmap(jax.grad(deviation))(PLACES), wanted, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("activation", [covariance, deviation])
def test_activations_are_float32(activation):
  assert activation(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_wasserstein_equals_the_closed_form_of_matrices():
  q, k = draw_gaussians(0, 2, 3, 4), draw_gaussians(1, 2, 5, 4)
  wanted = [[[distance_of_matrices(q[0][b, i], q[1][b, i], k[0][b, j], k[1][b, j]) for j in range(5)]
             for i in range(3)] for b in range(2)]
  found = wasserstein(*q, *k)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert found.dtype == jnp.float32


def test_wasserstein_is_symmetric():
  q, k = draw_gaussians(2, 6, 4), draw_gaussians(3, 5, 4)
  np.testing.assert_allclose(wasserstein(*q, *k), np.transpose(wasserstein(*k, *q)), rtol=1e-6, atol=1e-6)


def test_wasserstein_of_a_gaussian_to_itself_is_zero_and_of_others_is_not():
  q = draw_gaussians(4, 6, 4)
  distance = np.asarray(wasserstein(*q, *q))
  np.testing.assert_allclose(np.diag(distance), 0, atol=1e-5)
  assert np.min(distance + np.eye(6)) > 0.1


def test_wasserstein_is_never_negative_by_rounding():
  mean, spread = draw_gaussians(5, 64, 8)
  distance = wasserstein(mean + 1000, spread, mean + 1000, spread)
  assert np.min(distance) == 0  # the means' squares are 8e6, where float32 is off by a half and more


def test_wasserstein_gradients_are_finite_and_vanish_between_equal_gaussians():
  one = draw_gaussians(6, 1, 4)
  grads = jax.grad(lambda *gaussians: jnp.sum(wasserstein(*gaussians)), argnums=(0, 1, 2, 3))(*one, *one)
  np.testing.assert_allclose(grads, np.zeros((4, 1, 4)), atol=1e-6)
