"""Diagonal Gaussians: positive covariances, and the squared 2-Wasserstein distance as matrix products.

A Gaussian is a mean and a standard deviation per dimension; D is the dimension. All in float32.
"""

import jax
import jax.numpy as jnp


def covariance(x: jax.Array) -> jax.Array:
  """Returns ELU(x) + 1 > 0, the diagonal covariance of STOSA (Fan et al. 2022)."""
  return jax.nn.elu(x.astype(jnp.float32)) + 1


def deviation(x: jax.Array) -> jax.Array:
  """Returns sqrt(ELU(x) + 1), written as exp(x / 2) below zero so that neither value nor gradient is lost there."""
  x = x.astype(jnp.float32)
  return jnp.where(x > 0, jnp.sqrt(jnp.maximum(x, 0) + 1), jnp.exp(jnp.where(x > 0, 0, x) / 2))


def wasserstein(mean_q: jax.Array, deviation_q: jax.Array, mean_k: jax.Array, deviation_k: jax.Array) -> jax.Array:
  """Squared 2-Wasserstein distance of every query Gaussian to every key Gaussian, both diagonal.

  |mu_q - mu_k|^2 + |sqrt(Sigma_q) - sqrt(Sigma_k)|^2 (STOSA), expanded into one matrix product.

  Args:
    mean_q, deviation_q: (..., Lq, D).
    mean_k, deviation_k: (..., Lk, D).

  Returns:
    (..., Lq, Lk) float32, never negative.
  """
  q = jnp.concatenate([mean_q, deviation_q], axis=-1).astype(jnp.float32)
  k = jnp.concatenate([mean_k, deviation_k], axis=-1).astype(jnp.float32)
  norms = jnp.sum(q * q, axis=-1)[..., :, None] + jnp.sum(k * k, axis=-1)[..., None, :]
  return jnp.maximum(norms - 2 * jnp.einsum("...id,...jd->...ij", q, k, precision="highest"), 0)
