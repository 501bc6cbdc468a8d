"""Diagonal Gaussians: positive covariances, and Wasserstein distances against the formula for full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from awrsr_jax.model.gaussian import covariance, deviation, pairwise_wasserstein, wasserstein, wasserstein_as_dot

Gaussians = tuple[np.ndarray, np.ndarray]  # mean, covariance
PLACES = np.array([-200, -90, -30, -5, -1, -1e-3, 0, 1e-3, 1, 5, 30, 200], np.float32)


def draw_gaussians(seed: int, *shape: int) -> Gaussians:
  """Returns means and covariances of this shape, float32."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32), rng.uniform(0.01, 4, shape).astype(np.float32)


def distance_of_matrices(mean_q: np.ndarray, cov_q: np.ndarray, mean_k: np.ndarray, cov_k: np.ndarray) -> float:
  """|m - m'|^2 + trace(C + C' - 2 (C'^1/2 C C'^1/2)^1/2): the distance of any two Gaussians, in float64."""
  cov_q, cov_k = np.diag(np.float64(cov_q)), np.diag(np.float64(cov_k))
  root_k = scipy.linalg.sqrtm(cov_k)
  between = scipy.linalg.sqrtm(root_k @ cov_q @ root_k)
  return float(np.sum((np.float64(mean_q) - mean_k) ** 2) + np.trace(cov_q + cov_k - 2 * np.real(between)))


def test_covariance_is_elu_plus_one():
  wanted = [x + 1 if x > 0 else np.exp(x) for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(covariance(PLACES), wanted, rtol=1e-6, atol=1.2e-7)


def test_covariance_loses_nothing_below_zero_and_has_the_right_gradient_everywhere():
  assert covariance(jnp.float32(-80.0)) == pytest.approx(np.exp(-80), rel=1e-5)  # as ELU + 1 it would be 0
  wanted = [1 if x > 0 else np.exp(x) for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(jax.vmap(jax.grad(covariance))(PLACES), wanted, rtol=1e-5, atol=1e-37)


def test_deviation_is_the_root_of_the_covariance_and_its_gradient_is_finite_down_to_zero():
  places = np.array([0, 1e-30, 1e-20, 1e-6, 0.3, 1, 50], np.float32)
  np.testing.assert_allclose(deviation(places), np.sqrt(np.maximum(places.astype(np.float64), 1e-24)), rtol=1e-6)
  wanted = [0.5 / np.sqrt(x) if x > 1e-24 else 0 for x in places.astype(np.float64)]
  np.testing.assert_allclose(jax.vmap(jax.grad(deviation))(places), wanted, rtol=1e-5)
  whole = jax.vmap(jax.grad(lambda x: deviation(covariance(x))))(PLACES)
  wanted = [0.5 / np.sqrt(x + 1) if x > 0 else np.exp(x / 2) / 2 if x > -55 else 0 for x in PLACES.astype(np.float64)]
  np.testing.assert_allclose(whole, wanted, rtol=1e-5)


@pytest.mark.parametrize("activation", [covariance, deviation])
def test_activations_are_float32(activation):
  assert activation(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def of_pairs(q: Gaussians, k: Gaussians) -> np.ndarray:
  """Every query to every key (Lq, Lk), one pair at a time."""
  broadcast = [x[:, None] for x in q] + [x[None] for x in k]
  return np.asarray(wasserstein(*broadcast))


def by_product(q: Gaussians, k: Gaussians) -> np.ndarray:
  """The same as one matrix product."""
  return np.asarray(pairwise_wasserstein(*q, *k))


def by_features(q: Gaussians, k: Gaussians) -> np.ndarray:
  """The same as products of the features that attention in blocks takes."""
  query, key = wasserstein_as_dot(*q, *k)
  assert query.shape[-1] == key.shape[-1] == 2 * q[0].shape[-1] + 2 and query.dtype == key.dtype == jnp.float32
  return -np.asarray(jnp.einsum("id,jd->ij", query, key, precision="highest"))


BOTH = pytest.mark.parametrize("distances", [of_pairs, by_product, by_features])


@BOTH
def test_wasserstein_equals_the_closed_form_of_matrices(distances):
  q, k = draw_gaussians(0, 3, 4), draw_gaussians(1, 5, 4)
  wanted = [[distance_of_matrices(q[0][i], q[1][i], k[0][j], k[1][j]) for j in range(5)] for i in range(3)]
  found = distances(q, k)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert found.dtype == jnp.float32


def test_pairwise_wasserstein_keeps_leading_axes_apart():
  q, k = draw_gaussians(0, 2, 3, 4), draw_gaussians(1, 2, 5, 4)
  found = pairwise_wasserstein(*q, *k)
  for b in range(2):
    np.testing.assert_allclose(found[b], of_pairs([x[b] for x in q], [x[b] for x in k]), rtol=1e-5, atol=1e-5)


@BOTH
def test_wasserstein_is_symmetric(distances):
  q, k = draw_gaussians(2, 6, 4), draw_gaussians(3, 5, 4)
  np.testing.assert_allclose(distances(q, k), distances(k, q).T, rtol=1e-6, atol=1e-6)


@BOTH
def test_wasserstein_of_a_gaussian_to_itself_is_zero_and_of_others_is_not(distances):
  q = draw_gaussians(4, 6, 4)
  distance = distances(q, q)
  np.testing.assert_allclose(np.diag(distance), 0, atol=0 if distances is of_pairs else 1e-5)
  assert np.min(distance + np.eye(6)) > 0.1


def test_wasserstein_is_never_negative_by_rounding():
  mean, cov = draw_gaussians(5, 64, 8)
  distance = by_product((mean + 1000, cov), (mean + 1000, cov))
  assert np.min(distance) == 0  # the means' squares are 8e6, where float32 is off by a half and more


@pytest.mark.parametrize("function", [wasserstein, pairwise_wasserstein])
@pytest.mark.parametrize("smallest", [0.01, 0.0])
def test_wasserstein_gradients_are_finite_and_vanish_between_equal_gaussians(function, smallest):
  mean, cov = draw_gaussians(6, 1, 4)
  one = mean, np.where(cov > 2, smallest, cov).astype(np.float32)
  assert np.any(one[1] == np.float32(smallest))
  grads = jax.grad(lambda *gaussians: jnp.sum(function(*gaussians)), argnums=(0, 1, 2, 3))(*one, *one)
  np.testing.assert_allclose(grads, np.zeros((4, 1, 4)), atol=1e-5)


@pytest.mark.parametrize("function", [wasserstein, pairwise_wasserstein])
def test_wasserstein_computes_in_float32_whatever_it_is_given(function):
  gaussians = [jnp.asarray(x, jnp.bfloat16) for x in (*draw_gaussians(7, 3, 4), *draw_gaussians(8, 3, 4))]
  found = function(*gaussians)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, function(*(x.astype(jnp.float32) for x in gaussians)))
