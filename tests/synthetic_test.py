"""The synthetic law: its oracle against loops, what is drawn follows it, and seeds decide everything."""

import numpy as np
import pytest

from awrsr_jax.config import default
from awrsr_jax.data import corpus, synthetic


def law(**changes):
  """Returns `config.data.synthetic` of a small law."""
  node = default().data.synthetic
  node.num_users, node.num_items, node.length = 50, 30, 8
  node.update(changes)
  return node


def histories_of(found):
  """Returns the list of histories."""
  return np.split(found.items, np.flatnonzero(np.diff(found.users)) + 1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_oracle_equals_loops_over_the_stated_law(order):
  node = law(order=order, temperature=0.7, seed=3)
  latent, lags = synthetic._make_law(node)
  weights = [1 / np.sqrt(k) for k in range(1, order + 1)]
  total = sum(weight**2 for weight in weights) ** 0.5
  for lag, weight in zip(lags, weights, strict=True):  # w_k * SHARPNESS / temperature times an orthogonal matrix
    scale = weight / total * synthetic.SHARPNESS / 0.7
    np.testing.assert_allclose(lag @ lag.T, scale**2 * np.eye(synthetic.LATENT), atol=1e-12)
  histories = np.array([[0, 0, 0, 0], [0, 0, 0, 9], [0, 0, 4, 2], [7, 3, 30, 1]])
  scores = synthetic.oracle_scores(node)(histories)
  assert scores.shape == (4, 31) and scores.dtype == np.float64 and (scores[:, 0] == -np.inf).all()
  for row, history in enumerate(histories):
    for item in range(1, 31):
      expected = 0.0
      for k in range(1, order + 1):
        if history[-k] > 0:
          for a in range(synthetic.LATENT):
            for b in range(synthetic.LATENT):
              expected += latent[item, a] * lags[k - 1, a, b] * latent[history[-k], b]
      assert abs(scores[row, item] - expected) < 1e-10


def test_padding_and_width_do_not_matter():
  score = synthetic.oracle_scores(law())
  np.testing.assert_array_equal(score(np.array([[0, 0, 5, 6]])), score(np.array([[5, 6]])))
  np.testing.assert_array_equal(score(np.array([[0, 6]])), score(np.array([[6]])))


def test_histories_have_the_stated_form():
  found = synthetic.generate(law(num_users=600))
  lengths = np.bincount(found.users)[1:]
  assert lengths.size == 600 and lengths.min() == 5 and lengths.max() == 2 * 8 - 5 and abs(lengths.mean() - 8) < 0.4
  assert (np.diff(found.users) >= 0).all() and found.items.min() >= 1 and found.items.max() <= 30
  assert all(np.unique(history).size == history.size for history in histories_of(found))


def test_items_are_drawn_with_the_chances_of_the_law():
  node = law(num_users=40000, num_items=6, length=5)
  found = synthetic.generate(node)
  histories = found.items.reshape(-1, 5)
  firsts = np.bincount(histories[:, 0], minlength=7)[1:] / 40000
  np.testing.assert_allclose(firsts, 1 / 6, atol=0.01)
  chosen = histories[(histories[:, 0] == 2) & (histories[:, 1] == 5)]
  scores = synthetic.oracle_scores(node)(np.array([[2, 5]]))[0]
  chances = np.exp(scores)
  chances[[2, 5]] = 0
  counts = np.bincount(chosen[:, 2], minlength=7)
  expected = chances / chances.sum()
  error = np.sqrt(expected * (1 - expected) / len(chosen))
  assert len(chosen) > 100 and (np.abs(counts / len(chosen) - expected) <= 4.5 * error + 1e-12).all()


def test_the_seed_decides_everything():
  first, again, other = (synthetic.generate(law(seed=seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first.items, again.items)
  np.testing.assert_array_equal(first.users, again.users)
  assert first.items.size != other.items.size or (first.items != other.items).any()
  assert (np.bincount(first.users)[:20] != np.bincount(other.users)[:20]).any()  # lengths too
  history = np.array([[3, 4]])
  assert (synthetic.oracle_scores(law(seed=1))(history) != synthetic.oracle_scores(law(seed=2))(history))[0, 1:].all()


def test_no_item_comes_twice_however_cold_the_law_is():
  drawn = synthetic.generate(law(temperature=0.001))
  assert drawn.items.min() >= 1
  assert all(len(set(row)) == len(row) for row in histories_of(drawn))


def test_more_than_one_earlier_item_matters_and_temperature_flattens():
  score = synthetic.oracle_scores(law())
  assert (score(np.array([[1, 3]])) != score(np.array([[2, 3]])))[0, 1:].all()
  one_back = synthetic.oracle_scores(law(order=1))
  np.testing.assert_array_equal(one_back(np.array([[1, 3]])), one_back(np.array([[2, 3]])))
  cool, hot = (synthetic.oracle_scores(law(temperature=t))(np.array([[1, 3]]))[0, 1:] for t in (1, 2))
  np.testing.assert_allclose(cool, 2 * hot)


def test_too_few_items_are_refused():
  with pytest.raises(ValueError, match=r"num_items=10 .* longest history, 11 items.*--config.data.synthetic.length"):
    synthetic.generate(law(num_items=10))


def ndcg_at_10(scores, histories, targets):
  """Returns the mean NDCG@10, items of the history filtered, half of the ties above the target."""
  total = 0.0
  for row, history, target in zip(scores, histories, targets, strict=True):
    row = row.copy()
    row[history] = -np.inf
    others = np.delete(row, target)
    rank = 1 + (others > row[target]).sum() + (others == row[target]).sum() / 2
    total += 1 / np.log2(rank + 1) if rank <= 10 else 0
  return total / len(targets)


def test_the_default_law_leaves_something_to_learn_and_its_oracle_is_the_best():
  node = default().data
  node.name = "synthetic"
  made = corpus.load(node)
  histories = [made.history(user) for user in range(made.num_users)]
  inputs, targets = [history[:-1] for history in histories], [history[-1] for history in histories]
  newest = np.array([history[-2:] for history in inputs])
  best = ndcg_at_10(made.oracle(newest), inputs, targets)
  last_only = ndcg_at_10(made.oracle(newest * np.array([0, 1])), inputs, targets)
  counts = np.bincount(np.concatenate(inputs), minlength=made.num_items + 1).astype(float)
  counts[0] = -np.inf
  popular = ndcg_at_10([counts] * made.num_users, inputs, targets)
  assert 0.4 < best < 0.6 and last_only < 0.65 * best and popular < 0.25 * best
