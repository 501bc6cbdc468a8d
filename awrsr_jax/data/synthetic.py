"""Owns the synthetic corpus: histories drawn from a stated law, so that the best possible ranking is known.

The law (we define). Item i has a latent vector x_i of `LATENT` independent standard normal numbers; lag k (the item k
steps back) has a random orthogonal matrix M_k. After a history whose newest items are h_1 (newest), h_2, ..., the next
item is drawn from the items NOT yet in the history with

    P(next = j | history) proportional to exp(SHARPNESS / temperature * x_j . sum_k w_k M_k x_{h_k}),   k = 1 .. order,

w_k proportional to 1 / sqrt(k) with sum of w_k^2 = 1, so that the scale of the logits is the same for every order. A
history that is shorter than `order` has fewer terms; the first item is uniform. Lengths are uniform on the whole
numbers from `SHORTEST` to 2 * length - `SHORTEST`, so that `length` is their mean. All of it follows from `seed`.
"""

from collections.abc import Callable

import ml_collections
import numpy as np

from awrsr_jax.data.log import Interactions

LATENT = 8  # width of the law's own item vectors
SHARPNESS = 1.0  # scale of the logits at temperature 1
SHORTEST = 5  # items in the shortest history
USERS_AT_ONCE = 1024  # bounds memory


def generate(synthetic: ml_collections.ConfigDict) -> Interactions:
  """Draws histories from the law.

  Args:
    synthetic: `config.data.synthetic`.

  Returns:
    One row per (user, item), user after user from 1, oldest first; items 1 .. `num_items`, none twice for one user.

  Raises:
    ValueError: there are fewer items than the longest history has.
  """
  longest = 2 * synthetic.length - SHORTEST
  if synthetic.num_items < longest:
    raise ValueError(f"config.data.synthetic.num_items={synthetic.num_items} is less than the longest history, "
                     f"{longest} items (2 * config.data.synthetic.length - {SHORTEST}); raise "
                     "--config.data.synthetic.num_items or lower --config.data.synthetic.length")
  rng = np.random.default_rng([synthetic.seed, 1])  # the law itself has [seed, 0]
  lengths_U = rng.integers(SHORTEST, longest, size=synthetic.num_users, endpoint=True)
  starts = range(0, synthetic.num_users, USERS_AT_ONCE)
  items = np.concatenate([_draw(synthetic, lengths_U[start:start + USERS_AT_ONCE], rng) for start in starts])
  users = np.repeat(np.arange(1, synthetic.num_users + 1), lengths_U)
  return Interactions(users, items, None, {}, f"synthetic law, seed {synthetic.seed}")


def oracle_scores(synthetic: ml_collections.ConfigDict) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the law's own scores, the best possible ranking of the items not yet in a history.

  Args:
    synthetic: `config.data.synthetic`.

  Returns:
    A function from histories (B, L) of items 1 .. `num_items`, oldest first, left-padded with 0, to (B, num_items + 1)
    float64 log-probabilities up to a constant per row; column 0 is -inf. Items of the history are scored like the rest.
  """
  latent_IxD, lags_KxDxD = _make_law(synthetic)

  def score(histories_BxL: np.ndarray) -> np.ndarray:
    context_BxD = np.zeros((len(histories_BxL), LATENT))
    for lag, lag_DxD in enumerate(lags_KxDxD[:np.shape(histories_BxL)[1]], start=1):
      context_BxD += latent_IxD[np.asarray(histories_BxL)[:, -lag]] @ lag_DxD.T
    scores_BxI = context_BxD @ latent_IxD.T
    scores_BxI[:, 0] = -np.inf
    return scores_BxI

  return score


def _make_law(synthetic: ml_collections.ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Returns item vectors (num_items + 1, LATENT), row 0 zero, and per lag w_k M_k SHARPNESS / temperature."""
  rng = np.random.default_rng([synthetic.seed, 0])
  latent_IxD = rng.standard_normal((synthetic.num_items + 1, LATENT))
  latent_IxD[0] = 0
  q_KxDxD, r_KxDxD = np.linalg.qr(rng.standard_normal((synthetic.order, LATENT, LATENT)))
  q_KxDxD *= np.sign(np.diagonal(r_KxDxD, axis1=1, axis2=2))[:, None, :]  # uniform over rotations and reflections
  weights_K = 1 / np.sqrt(np.arange(1, synthetic.order + 1))
  weights_K *= SHARPNESS / synthetic.temperature / np.linalg.norm(weights_K)
  return latent_IxD, weights_K[:, None, None] * q_KxDxD


def _draw(synthetic: ml_collections.ConfigDict, lengths_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns the items of B histories, one after another."""
  score = oracle_scores(synthetic)
  rows_B = np.arange(len(lengths_B))
  histories_BxL = np.zeros((len(lengths_B), lengths_B.max()), np.int64)
  left_BxI = np.ones((len(lengths_B), synthetic.num_items + 1))
  for step in range(lengths_B.max()):  # all are drawn to the longest length; the rest is cut
    scores_BxI = score(histories_BxL[:, max(step - synthetic.order, 0):step])
    scores_BxI = np.where(left_BxI > 0, scores_BxI, -np.inf)  # the best is one that is left: else all may be 0
    chances_BxI = np.exp(scores_BxI - scores_BxI.max(axis=1, keepdims=True))
    sums_BxI = np.cumsum(chances_BxI, axis=1)
    threshold_B = (1 - rng.random(len(lengths_B))) * sums_BxI[:, -1]  # in (0, total]: never an item of chance 0
    histories_BxL[:, step] = np.argmax(sums_BxI >= threshold_B[:, None], axis=1)
    left_BxI[rows_B, histories_BxL[:, step]] = 0
  return histories_BxL[np.arange(histories_BxL.shape[1]) < lengths_B[:, None]]
