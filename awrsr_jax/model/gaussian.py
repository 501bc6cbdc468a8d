"""Diagonal Gaussians: positive covariances, and the squared 2-Wasserstein distance.

A Gaussian is a mean and a diagonal covariance, both (..., D). Everything here is computed in float32.
"""

import jax
import jax.numpy as jnp

SMALLEST = 1e-24  # of a covariance under the root, as STOSA has it: below it the gradient is 0, never infinite


def covariance(x: jax.Array) -> jax.Array:
  """Returns ELU(x) + 1 > 0 (STOSA, Fan et al. 2022), written as exp(x) below zero so that nothing is lost there."""
  x = x.astype(jnp.float32)
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def deviation(cov: jax.Array) -> jax.Array:
  """Returns sqrt(cov), float32, with a finite gradient down to a covariance of 0."""
  return jnp.sqrt(jnp.maximum(cov.astype(jnp.float32), SMALLEST))


def wasserstein(mean_p: jax.Array, cov_p: jax.Array, mean_q: jax.Array, cov_q: jax.Array) -> jax.Array:
  """Squared 2-Wasserstein distance of two diagonal Gaussians.

  |mu_p - mu_q|^2 + |sqrt(Sigma_p) - sqrt(Sigma_q)|^2 (STOSA).

  Args:
    mean_p, cov_p, mean_q, cov_q: (..., D), broadcast against each other.

  Returns:
    (...) float32, never negative, exactly 0 for equal Gaussians.
  """
  between_means = jnp.square(mean_p.astype(jnp.float32) - mean_q.astype(jnp.float32))
  return jnp.sum(between_means + jnp.square(deviation(cov_p) - deviation(cov_q)), axis=-1)


def pairwise_wasserstein(mean_q: jax.Array, cov_q: jax.Array, mean_k: jax.Array, cov_k: jax.Array) -> jax.Array:
  """The same distance of every query Gaussian to every key Gaussian, expanded into one matrix product.

  Args:
    mean_q, cov_q: (..., Lq, D).
    mean_k, cov_k: (..., Lk, D), with the same leading axes.

  Returns:
    (..., Lq, Lk) float32, never negative; off by rounding of the Gaussians' own size, |mu|^2 + |sqrt(Sigma)|^2.
  """
  q = jnp.concatenate([mean_q.astype(jnp.float32), deviation(cov_q)], axis=-1)
  k = jnp.concatenate([mean_k.astype(jnp.float32), deviation(cov_k)], axis=-1)
  norms = jnp.sum(q * q, axis=-1)[..., :, None] + jnp.sum(k * k, axis=-1)[..., None, :]
  return jnp.maximum(norms - 2 * jnp.einsum("...id,...jd->...ij", q, k, precision="highest"), 0)


def wasserstein_as_dot(mean_q: jax.Array, cov_q: jax.Array, mean_k: jax.Array,
                       cov_k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Writes minus the distance as a dot product.

  [2 mu_q, 2 sqrt(Sigma_q), -|q|^2, 1] . [mu_k, sqrt(Sigma_k), 1, -|k|^2] = -W2(q, k), where |x|^2 is
  |mu_x|^2 + |sqrt(Sigma_x)|^2.

  Args:
    mean_q, cov_q, mean_k, cov_k: (..., D).

  Returns:
    Features of queries and of keys, (..., 2 D + 2) float32.
  """
  q = jnp.concatenate([mean_q.astype(jnp.float32), deviation(cov_q)], axis=-1)
  k = jnp.concatenate([mean_k.astype(jnp.float32), deviation(cov_k)], axis=-1)
  size_q, size_k = (jnp.sum(x * x, axis=-1, keepdims=True) for x in (q, k))
  return (jnp.concatenate([2 * q, -size_q, jnp.ones_like(size_q)], axis=-1),
          jnp.concatenate([k, jnp.ones_like(size_k), -size_k], axis=-1))
