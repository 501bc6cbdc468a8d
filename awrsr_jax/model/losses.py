"""Losses: pure functions from scores to one value per position; nothing here knows a model.

Shapes: (...) positions, K negatives, V items. Scores may be -inf where an item cannot be (padding rows): such an item
adds nothing. The caller masks padded positions and divides.
"""

import jax
import jax.numpy as jnp


def bce(positive: jax.Array, negatives: jax.Array) -> jax.Array:
  """Binary cross entropy of one positive against K negatives (Kang and McAuley 2018 has K = 1).

  -log sigmoid(positive) - sum_k log(1 - sigmoid(negative_k)).

  Args:
    positive: (...) scores of the targets.
    negatives: (..., K).

  Returns:
    (...) float32.
  """
  return jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negatives), axis=-1)


def bpr(positive: jax.Array, negatives: jax.Array) -> jax.Array:
  """Bayesian personalised ranking (Rendle et al. 2009): mean over k of -log sigmoid(positive - negative_k).

  Args:
    positive: (...) scores of the targets.
    negatives: (..., K).

  Returns:
    (...) float32.
  """
  return jnp.mean(jax.nn.softplus(negatives - positive[..., None]), axis=-1)


def positive_vs_negative(positive: jax.Array, between: jax.Array) -> jax.Array:
  """The regularisation of STOSA (Fan et al. 2022): mean over k of max(0, d(h, pos) - d(pos, neg_k)).

  It asks negatives to lie farther from the target than the history does.

  Args:
    positive: (...) scores of the targets, -d(h, pos).
    between: (..., K) scores of the negatives by the target itself, -d(pos, neg_k).

  Returns:
    (...) float32, in the unit of the scores.
  """
  return jnp.mean(jax.nn.relu(between - positive[..., None]), axis=-1)


def gbce(positive: jax.Array, negatives: jax.Array, num_items: int, t: float) -> jax.Array:
  """Generalised binary cross entropy (Petrov and Macdonald, RecSys 2023, eq. 12 and 18), stable in float32.

  -log sigmoid(positive)^beta - sum_k log(1 - sigmoid(negative_k)), with alpha = min(1, K / (I - 1)) the sampling rate
  and beta = alpha (t (1 - 1 / alpha) + 1 / alpha); without the published code's mean over the K + 1 scores.
  Taken in the log domain no power of a sigmoid is ever formed: the paper's transformed logit, which wants float64, is
  not needed.

  Args:
    positive: (...). negatives: (..., K).
    num_items: I.
    t: calibration in [0, 1]; 0 is bce.

  Returns:
    (...) float32.
  """
  alpha = min(negatives.shape[-1] / max(num_items - 1, 1), 1.0)
  beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
  return beta * jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negatives), axis=-1)


def sampled_softmax(positive: jax.Array, negatives: jax.Array, log_expected: jax.Array,
                    collides: jax.Array) -> jax.Array:
  """Cross entropy with the sum over other items estimated from K draws, the log-Q correction.

  log(exp(positive) + sum_k exp(negative_k - log E_k)) - positive, E_k the expected number of draws of that item
  (Bengio and Senecal 2008). A draw that is the target itself is left out; the always present target is not corrected.
  The sum inside the log is unbiased, and for K large the loss is the full softmax.

  Args:
    positive: (...).
    negatives: (..., K).
    log_expected: (K,) log of K times the probability that one draw gives this item.
    collides: (..., K) bool, True where the draw is the target.

  Returns:
    (...) float32.
  """
  log_expected = jnp.broadcast_to(log_expected, negatives.shape)
  corrected = jnp.where(collides, -jnp.inf, negatives - log_expected)
  everything = jnp.concatenate([positive[..., None], corrected], axis=-1)
  return jax.nn.logsumexp(everything, axis=-1) - positive
