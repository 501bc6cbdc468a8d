"""Losses: values by hand, extreme and impossible scores, and what each loss turns into at its ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awrsr_jax.model import losses

log, exp = np.log, np.exp
sigmoid = lambda x: 1 / (1 + exp(-np.float64(x)))  # noqa: E731

POSITIVE = np.array([0.5, -1.0], np.float32)
NEGATIVES = np.array([[0.0, 2.0, -1.0], [3.0, -0.5, 1.0]], np.float32)

# Every loss as a function of the scores of one position's target and negatives.
LOSSES = {
    "bce": losses.bce,
    "bpr": losses.bpr,
    "gbce": functools.partial(losses.gbce, num_items=11, t=0.75),
    "sampled_softmax": lambda p, n: losses.sampled_softmax(
        p, n, log_expected=jnp.full(n.shape[-1], log(0.3), jnp.float32), collides=jnp.zeros(n.shape, bool)),
}

WANTED = {
    "bce": lambda p, n: -log(sigmoid(p)) - sum(log(1 - sigmoid(x)) for x in n),
    "bpr": lambda p, n: sum(-log(sigmoid(p - x)) for x in n) / len(n),
    # alpha = 3 / 10, beta = 0.3 (0.75 (1 - 10 / 3) + 10 / 3) = 0.475
    "gbce": lambda p, n: -log(sigmoid(p) ** 0.475) - sum(log(1 - sigmoid(x)) for x in n),
    "sampled_softmax": lambda p, n: -log(exp(p) / (exp(p) + sum(exp(x) / 0.3 for x in n))),
}


def test_positive_vs_negative_is_the_mean_of_what_negatives_are_too_near():
  # d(h, pos) = 2 and 1; d(pos, neg) = 3, 1.5, 0.25 and 0.5, 4, 1
  positive, between = jnp.array([-2.0, -1.0]), -jnp.array([[3, 1.5, 0.25], [0.5, 4, 1]])
  np.testing.assert_allclose(losses.positive_vs_negative(positive, between), [(0.5 + 1.75) / 3, 0.5 / 3], rtol=1e-6)


def grads_of(name: str, positive: np.ndarray, negatives: np.ndarray) -> tuple[jax.Array, jax.Array]:
  return jax.grad(lambda p, n: jnp.sum(LOSSES[name](p, n)), argnums=(0, 1))(positive, negatives)


@pytest.mark.parametrize("name", LOSSES)
def test_value_of_the_formula(name):
  found = LOSSES[name](POSITIVE, NEGATIVES)
  wanted = [WANTED[name](np.float64(p), np.float64(n)) for p, n in zip(POSITIVE, NEGATIVES, strict=True)]
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name, positive, negatives, wanted", [
    ("bce", 0.0, [0.0], 2 * log(2)),
    ("bce", log(3), [-log(3), -log(3)], 3 * log(4 / 3)),  # sigmoid(log 3) = 3/4
    ("bpr", 1.0, [1.0, 1.0], log(2)),
    ("bpr", log(3), [0.0, 2 * log(3)], (log(4 / 3) + log(4)) / 2),
    ("gbce", 0.0, [0.0], 1.325 * log(2)),  # alpha = 1/10, beta = 0.1 (0.75 (1 - 10) + 10) = 0.325
    ("sampled_softmax", log(2), [log(0.6), log(1.2)], log(4)),  # 2 / (2 + 0.6 / 0.3 + 1.2 / 0.3)
])
def test_value_by_hand(name, positive, negatives, wanted):
  found = LOSSES[name](jnp.array([positive], jnp.float32), jnp.array([negatives], jnp.float32))
  np.testing.assert_allclose(found, [wanted], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_position_has_its_own_loss(name):
  positive, negatives = np.stack([POSITIVE, POSITIVE + 1]), np.stack([NEGATIVES, NEGATIVES * 2])
  found = LOSSES[name](positive, negatives)
  assert found.shape == (2, 2)
  for index in np.ndindex(2, 2):
    alone = LOSSES[name](positive[index][None], negatives[index][None])
    np.testing.assert_allclose(found[index], alone[0], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("positive, negative", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)])
def test_extreme_scores_have_finite_values_and_gradients(name, positive, negative):
  p, n = np.full(1, positive, np.float32), np.full((1, 3), negative, np.float32)
  value = LOSSES[name](p, n)
  beta = 0.475 if name == "gbce" else 1
  wanted = {"bpr": max(negative - positive, 0), "bce": max(-positive, 0) + 3 * max(negative, 0),
            "gbce": beta * max(-positive, 0) + 3 * max(negative, 0)}.get(name, max(negative - positive, 0))
  np.testing.assert_allclose(value, [wanted], rtol=1e-5, atol=3)  # the ends of softplus and logsumexp
  assert np.all(np.isfinite(value)) and all(np.all(np.isfinite(grad)) for grad in grads_of(name, p, n))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_raises_the_target_and_lowers_the_negatives(name):
  grad_positive, grad_negatives = grads_of(name, POSITIVE, NEGATIVES)
  assert np.all(grad_positive < 0) and np.all(grad_negatives > 0)


@pytest.mark.parametrize("name", ["bce", "gbce", "sampled_softmax"])
def test_minus_infinity_adds_nothing_and_gets_no_gradient(name):
  impossible = np.concatenate([NEGATIVES, np.full((2, 2), -np.inf, np.float32)], axis=1)
  if name == "gbce":  # its beta counts the negatives
    wanted = [0.625 * -log(sigmoid(p)) - sum(log(1 - sigmoid(x)) for x in n)
              for p, n in zip(POSITIVE, NEGATIVES, strict=True)]  # alpha = 5 / 10, beta = 0.5 (0.75 (1 - 2) + 2)
  else:
    wanted = LOSSES[name](POSITIVE, NEGATIVES)
  np.testing.assert_allclose(LOSSES[name](POSITIVE, impossible), wanted, rtol=1e-6)
  grad_positive, grad_negatives = grads_of(name, POSITIVE, impossible)
  assert np.all(np.isfinite(grad_positive)) and np.all(np.isfinite(grad_negatives))
  assert not np.any(grad_negatives[:, 3:]) and np.all(grad_negatives[:, :3])


def test_bpr_of_an_impossible_negative_is_zero_with_zero_gradient():
  negatives = np.full((2, 3), -np.inf, np.float32)
  np.testing.assert_array_equal(losses.bpr(POSITIVE, negatives), np.zeros(2))
  for grad in grads_of("bpr", POSITIVE, negatives):
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_gbce_without_calibration_is_bce():
  found = losses.gbce(POSITIVE, NEGATIVES, num_items=1000, t=0.0)
  np.testing.assert_allclose(found, losses.bce(POSITIVE, NEGATIVES), rtol=1e-5)


@pytest.mark.parametrize("t", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("num_items", [5, 100, 20000])
def test_gbce_is_bce_of_the_papers_transformed_logit(t, num_items):
  """Petrov and Macdonald: gamma(s) = log(1 / (sigmoid(s)^-beta - 1)) in place of the positive score, in float64."""
  alpha = 3 / (num_items - 1)
  beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
  found = losses.gbce(POSITIVE, NEGATIVES, num_items, t)
  for i, positive in enumerate(POSITIVE):
    transformed = log(1 / (sigmoid(positive) ** -beta - 1))
    wanted = -log(sigmoid(transformed)) - sum(log(1 - sigmoid(x)) for x in NEGATIVES[i])
    np.testing.assert_allclose(found[i], wanted, rtol=1e-5)


def test_gbce_with_more_negatives_than_items_is_bce():
  np.testing.assert_allclose(losses.gbce(POSITIVE, NEGATIVES, 3, 1.0), losses.bce(POSITIVE, NEGATIVES), rtol=1e-6)


def test_sampled_softmax_of_all_other_items_once_is_the_full_softmax():
  scores = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32) * 2
  for target in (0, 3, 8):
    rest = np.delete(scores, target, axis=1)
    found = losses.sampled_softmax(scores[:, target], rest, np.zeros(8, np.float32), np.zeros((4, 8), bool))
    wanted = log(np.sum(exp(np.float64(scores)), axis=1)) - scores[:, target]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_sampled_softmax_leaves_out_collisions_and_divides_by_what_was_expected():
  expected = np.array([0.5, 2.0, 4.0], np.float32)
  collides = np.array([[False, True, False], [True, True, True]])
  found = losses.sampled_softmax(POSITIVE, NEGATIVES, log(expected), collides)
  wanted = log(exp(0.5) + exp(0.0) / 0.5 + exp(-1.0) / 4) - 0.5
  np.testing.assert_allclose(found, [wanted, 0], rtol=1e-6, atol=1e-6)
  grads = jax.grad(lambda p, n: jnp.sum(losses.sampled_softmax(p, n, log(expected), collides)), argnums=(0, 1))(
      POSITIVE, NEGATIVES)
  assert all(np.all(np.isfinite(grad)) for grad in grads)
  np.testing.assert_array_equal(np.asarray(grads[1])[collides], 0)
