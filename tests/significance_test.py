"""Significance against scipy, by hand and by simulation; what is compared of runs, and what is refused."""

import json
import tracemalloc

import numpy as np
import pytest
from runs_test import CORPUS, PROTOCOL, write_run
from scipy import stats

from awrsr_jax.analysis import runs, significance
from awrsr_jax.engine import ranking

RANKS = np.array([1, 1.5, 2, 3, 5, 5.5, 6, 9.5, 10, 10.5, 11, 20, 20.5, 21, 400])


# --- values of targets and users


def test_the_mean_of_gains_is_the_metric():
  for metric, value in ranking.summarize(RANKS).items():
    assert significance.gains(RANKS, metric).mean() == value
    assert significance.gains(RANKS.astype(np.float32), metric).dtype == np.float64


def test_gains_by_hand():
  assert significance.gains([1, 3, 3.5, 4], "hr@3").tolist() == [1, 1, 0, 0]
  assert significance.gains([1, 3, 4], "ndcg@3").tolist() == [1, 0.5, 0]
  assert significance.gains([1, 2.5, 8], "mrr").tolist() == [1, 0.4, 0.125]
  assert significance.gains([1, 15, 100.5], "hr@100").sum() == 2


@pytest.mark.parametrize("metric", ["hr", "hr@0", "hr@-1", "hr@1.5", "map@5", "mrr@10", "ndcg@", "NDCG@5", "", "mrr "])
def test_other_metrics_are_refused(metric):
  with pytest.raises(ValueError, match="is no metric; choose from hr@K"):
    significance.gains([1], metric)


def test_users_of_several_targets_count_once():
  starts = significance.find_users(np.array(["b", "b", "a", "c", "c", "c"], object))
  assert starts.tolist() == [0, 2, 3]
  assert significance.average_targets(np.array([1.0, 2, 5, 0, 3, 6]), starts).tolist() == [1.5, 5, 3]


# --- intervals


def draw_gains(users, seed, columns=1):
  """Returns (U, C) of values like NDCG's: many zeros, and skewed."""
  rng = np.random.default_rng(seed)
  return significance.gains(rng.geometric(0.05, size=(users, columns)), "ndcg@10")


def test_resampled_means_are_those_of_drawn_users():
  values = draw_gains(7, 0, columns=2)
  found = significance.resample_means(values, 5, 3)
  rng = np.random.default_rng([3, 0])
  np.testing.assert_allclose(found, [values[rng.integers(7, size=7)].mean(axis=0) for _ in range(5)], rtol=1e-13)


def test_columns_are_paired_and_change_nothing():
  values = draw_gains(50, 0, columns=3)
  found = significance.resample_means(np.concatenate([values, values[:, :1] + 2], axis=1), 200, 0)
  np.testing.assert_allclose(found[:, 3] - found[:, 0], 2, rtol=1e-12)
  np.testing.assert_allclose(found[:, :1], significance.resample_means(values[:, :1], 200, 0), rtol=1e-12)
  assert len(set(found[:, 0])) > 100


def test_the_interval_is_that_of_scipy():
  base, other = draw_gains(400, 1, columns=2).T
  other = other + 0.02
  samples = significance.resample_means(np.stack([base, other], axis=1), 20_000, 0)
  for level in (0.95, 0.8):
    for found, statistic in (
        (samples[:, 1] - samples[:, 0], lambda a, b, axis: b.mean(axis) - a.mean(axis)),
        (samples[:, 1] / samples[:, 0] - 1, lambda a, b, axis: b.mean(axis) / a.mean(axis) - 1)):
      expected = stats.bootstrap((base, other), statistic, paired=True, vectorized=True, n_resamples=20_000, batch=1000,
                                 confidence_level=level, method="percentile", rng=np.random.default_rng(5))
      interval = significance.find_interval(found[:, None], level)[:, 0]
      # an end of 20,000 resamples varies by about a fiftieth of the standard error
      np.testing.assert_allclose(interval, expected.confidence_interval, atol=0.08 * expected.standard_error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
  simulations, truth = 2000, 0.03
  base = draw_gains(150, 7, simulations)
  other = base * np.random.default_rng(1).uniform(0.5, 1.5, base.shape) + np.random.default_rng(2).normal(
      truth, 0.1, base.shape)
  samples = significance.resample_means(other - base, 1000, 0)
  for level in (0.95, 0.7):
    low, high = significance.find_interval(samples, level)
    assert abs(np.mean((low <= truth) & (truth <= high)) - level) < 0.02
    assert abs(np.mean(low > truth) - np.mean(high < truth)) < 0.03


# --- p values


def flip_by_scipy(differences, resamples):
  """Returns the p value of a column as scipy has it."""
  return stats.permutation_test((differences, np.zeros_like(differences)), lambda a, b, axis: (a - b).mean(axis),
                                permutation_type="samples", vectorized=True, n_resamples=resamples,
                                rng=np.random.default_rng(5)).pvalue


@pytest.mark.parametrize("shift", [0, 0.3, 1.0])
def test_a_few_users_have_the_exact_p_value_of_scipy(shift):
  differences = np.random.default_rng(0).normal(shift, 1, (10, 1))
  differences[3:5] = differences[0]  # ties
  found = significance.flip_signs(differences, 10_000, 0)[0]
  assert found == flip_by_scipy(differences[:, 0], np.inf) and found * 2**10 == round(found * 2**10)
  assert abs(significance.flip_signs(differences, 1023, 0)[0] - found) < 0.05
  assert len(list(significance._draw_flips(10, 1023, 0))) == 1023  # fewer than 2^10: random
  assert significance.flip_signs(differences, 1024, 0)[0] == found


def test_all_ways_to_flip_by_hand():
  assert significance.flip_signs(np.array([[1.0, 1], [1, 2], [1, -3]]), 8, 0).tolist() == [0.25, 1.0]
  assert significance.flip_signs(np.array([[0.1], [0.2], [0.3]]), 8, 0).tolist() == [0.25]  # ties but for rounding


def test_random_flips_agree_with_scipy():
  differences = draw_gains(200, 1, 2) @ np.array([[1.0], [-1.0]])
  expected = flip_by_scipy(differences[:, 0], 9999)
  assert 0.02 < expected < 0.98 and abs(significance.flip_signs(differences, 10_000, 0)[0] - expected) < 0.02


def test_p_is_never_zero_and_one_where_nothing_differs():
  assert significance.flip_signs(np.ones((100, 1)), 99, 0).tolist() == [1 / 100]
  assert significance.flip_signs(np.zeros((100, 1)), 99, 0).tolist() == [1]


def test_p_is_uniform_where_groups_are_alike():
  differences = draw_gains(60, 3, 2000) - draw_gains(60, 4, 2000)
  found = significance.flip_signs(differences, 999, 0)
  assert stats.kstest(found, "uniform").statistic < 0.04
  assert 0.03 < np.mean(found <= 0.05) < 0.065 and np.mean(significance.flip_signs(differences + 0.2, 999, 0)) < 0.02


def test_flips_are_independent_of_draws_and_of_each_other():
  flips = np.array(list(significance._draw_flips(30, 4000, 0)))
  assert flips.shape == (4000, 30) and set(flips.ravel()) == {0, 1}
  correlation = np.corrcoef(flips.T) - np.eye(30)
  assert np.abs(flips.mean(axis=0) - 0.5).max() < 0.04 and np.abs(correlation).max() < 0.08


def test_holm_by_hand():
  assert significance.correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert significance.correct_holm([0.6, 0.7]) == [1, 1] and significance.correct_holm([0.2]) == [0.2]
  assert significance.correct_holm([]) == []


# --- seeds


def test_deviation_over_seeds():
  assert significance.measure_deviation(np.array([1.0, 2, 6])) == pytest.approx(np.sqrt(7))
  assert significance.measure_deviation(np.array([1.0])) is None


def test_users_and_seeds_by_hand():
  base_U, other_U = np.array([0.0, 1, 2, 5]), np.array([1.0, 1, 3, 3])
  base_S, other_S = np.array([1.5, 2, 2.5]), np.array([1.0, 2, 3, 2])
  parts = np.array([np.var([2 * 1 - 0, 2 - 1, 6 - 2, 6 - 5], ddof=1) / 4, 0.25 / 3, 4 * np.var(other_S, ddof=1) / 4])
  freedom = parts.sum() ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2 + parts[2] ** 2 / 3)
  expected = stats.t(freedom).interval(0.9)[1] * np.sqrt(parts.sum())
  assert significance.cover_seeds(base_U, other_U, base_S, other_S, (-1, 2), 0.9) == pytest.approx(expected, rel=1e-12)
  assert significance.cover_seeds(base_U, other_U, base_S[:2], other_S, (-1, 2), 0.9) is None
  assert significance.cover_seeds(base_U, other_U, base_S, other_S[:2], (-1, 2), 0.9) is None
  assert significance.cover_seeds(base_U, base_U, np.ones(3), np.ones(3), (-1, 1), 0.9) == 0


def simulate_coverage(seed_deviation, simulations=1000, users=200, seeds=3):
  """Returns how often the intervals over users, and over users and seeds, cover a true difference of 0."""
  rng, found = np.random.default_rng(0), []
  for _ in range(simulations):
    both = rng.normal(size=(users, 1, 1)) + 0.5 * rng.normal(size=(users, seeds, 2))
    both = both + seed_deviation * rng.normal(size=(1, seeds, 2))
    (base_U, other_U), (base_S, other_S) = both.mean(axis=1).T, both.mean(axis=0).T
    reach = 1.96 * np.std(other_U - base_U, ddof=1) / np.sqrt(users)
    difference = abs(np.mean(other_U - base_U))
    found.append((difference <= reach,
                  difference <= significance.cover_seeds(base_U, other_U, base_S, other_S, (-1, 1), 0.95)))
  return np.mean(found, axis=0)


def test_only_users_and_seeds_cover_the_luck_of_training():
  over_users, over_both = simulate_coverage(0.1)
  assert over_users < 0.7 and 0.94 < over_both < 0.98
  over_users, over_both = simulate_coverage(0.0)
  assert 0.93 < over_users < 0.97 and 0.94 < over_both < 0.995


# --- runs


def draw_ranks(users, seed, share=0.1):
  """Returns (U,) ranks with halves."""
  rng = np.random.default_rng(seed)
  return rng.geometric(share, size=users) + rng.integers(2, size=users) / 2


@pytest.fixture
def groups(tmp_path):
  """None: 2 seeds, value: 3, simple: 1; 120 users with 1 to 3 targets."""
  users = np.repeat(np.arange(120), 1 + np.arange(120) % 3)
  settings = [("none", 0, 0.1), ("none", 1, 0.1), ("value", 0, 0.15), ("value", 1, 0.15), ("value", 2, 0.15),
              ("simple", 0, 0.11)]
  return runs.group([
      runs.read_run(write_run(tmp_path / f"{refine}{seed}", draw_ranks(len(users), place, share), users,
                              model__refine=refine, seed=seed))
      for place, (refine, seed, share) in enumerate(settings)])


def average_by_loop(run, metric):
  """Returns a list of a run's value of each user."""
  found = {}
  for user, rank in zip(run.ranks["user"].tolist(), run.ranks["rank"].tolist(), strict=True):
    found.setdefault(user, []).append({"hr@3": float(rank <= 3), "mrr": 1 / rank}[metric])
  return [np.mean(found[user]) for user in range(120)]


def test_what_is_compared_equals_a_loop_over_users(groups):
  found = significance.compare(groups, ["hr@3", "mrr"], resamples=300, seed=4, level=0.9)
  assert list(found["metrics"]) == ["hr@3", "mrr"] and found["baseline"] == "refine=none"
  assert (found["users"], found["targets"], found["protocol"], found["corpus"]) == (120, 240, PROTOCOL, CORPUS)
  assert found["groups"]["refine=value"]["seeds"] == [0, 1, 2] and len(found["groups"]["refine=none"]["runs"]) == 2
  assert (found["resamples"], found["seed"], found["level"]) == (300, 4, 0.9)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  rng = np.random.default_rng([4, 0])
  drawn = [rng.integers(120, size=120) for _ in range(300)]
  for metric, of_groups in found["metrics"].items():
    users = {name: np.mean([average_by_loop(run, metric) for run in members], axis=0)
             for name, members in groups.items()}
    base, p_values = users["refine=none"], {}
    for name, values in of_groups.items():
      assert values["mean"] == pytest.approx(users[name].mean(), rel=1e-12)
      seeds = [np.mean(average_by_loop(run, metric)) for run in groups[name]]
      assert values["seeds"] == pytest.approx(seeds, rel=1e-12)
      assert values["deviation"] == (pytest.approx(np.std(seeds, ddof=1)) if len(seeds) > 1 else None)
      if name == "refine=none":
        assert list(values) == ["mean", "seeds", "deviation"]
        continue
      other = users[name]
      difference = other.mean() - base.mean()
      assert values["difference"] == pytest.approx(difference, rel=1e-9)
      assert values["relative"] == pytest.approx(100 * difference / base.mean(), rel=1e-9)
      samples = np.array([[other[u].mean() - base[u].mean(), 100 * (other[u].mean() / base[u].mean() - 1)]
                          for u in drawn])
      interval, relative = np.quantile(samples, [0.05, 0.95], axis=0).T
      assert values["interval"] == pytest.approx(interval, rel=1e-9)
      assert values["relative_interval"] == pytest.approx(relative, rel=1e-9)
      p_values[name] = significance.flip_signs((other - base)[:, None], 300, 4)[0]
      assert values["p"] == pytest.approx(p_values[name]) and values["users_and_seeds"] is None
    corrected = dict(zip(p_values, significance.correct_holm(list(p_values.values())), strict=True))
    assert {name: of_groups[name]["p_holm"] for name in corrected} == pytest.approx(corrected)
  assert found["metrics"]["mrr"]["refine=value"]["p"] < 0.02 < found["metrics"]["mrr"]["refine=simple"]["p"]


def test_three_seeds_of_both_have_an_interval_over_seeds_too(groups, tmp_path):
  users = groups["refine=none"][0].ranks["user"]
  groups["refine=none"].append(runs.read_run(write_run(
      tmp_path / "third", draw_ranks(len(users), 9), users, model__refine="none", seed=7)))
  found = significance.compare(groups, ["mrr"], resamples=100)["metrics"]["mrr"]
  assert found["refine=simple"]["users_and_seeds"] is found["refine=simple"]["relative_users_and_seeds"] is None
  base_U, other_U = (np.mean([average_by_loop(run, "mrr") for run in groups[name]], axis=0)
                     for name in ("refine=none", "refine=value"))
  base, other = found["refine=none"], found["refine=value"]
  parts = base_U, other_U, np.array(base["seeds"]), np.array(other["seeds"])
  reach = significance.cover_seeds(*parts, (-1, 1), 0.95)
  assert other["users_and_seeds"] == pytest.approx([other["difference"] - reach, other["difference"] + reach])
  # the derivatives of the ratio by differences
  step = 1e-6
  ratio = lambda low, high: 100 * (high / low - 1)  # noqa: E731
  slopes = [(ratio(base["mean"] + step * (side == 0), other["mean"] + step * (side == 1)) - other["relative"]) / step
            for side in (0, 1)]
  reach = significance.cover_seeds(*parts, tuple(slopes), 0.95)
  expected = [other["relative"] - reach, other["relative"] + reach]
  assert other["relative_users_and_seeds"] == pytest.approx(expected, rel=1e-4)


def test_the_seed_decides_all_numbers(groups):
  first, again, other = (significance.compare(groups, ["mrr"], 200, seed) for seed in (0, 0, 1))
  assert first == again
  for key in ("interval", "relative_interval"):
    assert first["metrics"]["mrr"]["refine=value"][key] != other["metrics"]["mrr"]["refine=value"][key]
  assert first["metrics"]["mrr"]["refine=simple"]["p"] != other["metrics"]["mrr"]["refine=simple"]["p"]


def test_other_groups_and_metrics_change_no_number_but_the_corrected_p(groups):
  whole = significance.compare(groups, ["hr@3", "mrr"], 200)["metrics"]["mrr"]["refine=value"]
  del groups["refine=simple"]
  alone = significance.compare(groups, ["hr@7", "hr@7", "mrr"], 200)["metrics"]["mrr"]["refine=value"]
  assert alone.pop("p_holm") == alone["p"] < whole.pop("p_holm")
  for key in ("mean", "seeds", "difference", "interval", "relative", "relative_interval", "p"):
    assert alone[key] == pytest.approx(whole[key], rel=1e-9), key


def test_one_group_has_means_and_deviation_alone(groups):
  found = significance.compare({"refine=value": groups["refine=value"]}, ["mrr"])["metrics"]
  assert list(found) == ["mrr"] and list(found["mrr"]["refine=value"]) == ["mean", "seeds", "deviation"]


def test_a_baseline_of_zero_has_no_relative_difference(tmp_path):
  values = {"none": [50] * 20, "value": [1] * 20, "simple": [1] + [50] * 19}
  read = {name: [runs.read_run(write_run(tmp_path / name, ranks))] for name, ranks in values.items()}
  found = significance.compare({name: read[name] for name in ("none", "value")}, ["hr@10"], 100)["metrics"]["hr@10"]
  assert found["value"]["difference"] == 1 and found["value"]["interval"] == [1, 1]
  assert found["value"]["relative"] is found["value"]["relative_interval"] is None
  found = significance.compare({name: read[name] for name in ("simple", "value")}, ["hr@10"], 100)["metrics"]["hr@10"]
  assert found["value"]["relative"] == pytest.approx(1900) and found["value"]["relative_interval"] is None


def test_a_million_users_take_little_memory():
  values = np.zeros((1_000_000, 2))
  values[::7] = 1.0
  tracemalloc.start()
  try:
    significance.resample_means(values, 4, 0)
    significance.flip_signs(values - 0.5, 4, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    significance.resample_means(values, 12, 0)
    significance.flip_signs(values - 0.5, 12, 0)
    assert tracemalloc.get_traced_memory()[1] < 1.01 * peak < 101 * 2**20  # whatever the number of resamples
  finally:
    tracemalloc.stop()


# --- what is refused


@pytest.mark.parametrize("values, words", [
    ({"metrics": ["mrr", "auc"]}, "--metrics: 'auc' is no metric"), ({"metrics": []}, "--metrics names no metric"),
    ({"resamples": 0}, "--resamples=0 must be at least 1"), ({"seed": -1}, "--seed=-1 must be at least 0"),
    ({"level": 0.0}, "--level=0.0 must lie"), ({"level": 1.0}, "--level=1.0 must lie"),
    ({"level": float("nan")}, "--level=nan must lie")])
def test_settings_that_say_nothing_are_refused(values, words, groups):
  significance.compare(groups, resamples=1, metrics=["hr@7"])
  with pytest.raises(ValueError, match=words):
    significance.compare(groups, **{"resamples": 10} | values)


@pytest.mark.parametrize("values, words", [
    ({"ranks": [1, 2, 3]}, "they rank 4 and 3 targets"),
    ({"users": [0, 1, 2, 4]}, "row 3 of their ranks.parquet are different targets: user 3 and 4"),
    ({"users": ["0", "1", "2", "3"]}, "row 0 .*user 0 and 0"), ({"items": [0, 2, 2, 3]}, "row 1 .*item 1 and 2"),
    ({"corpus": {"fingerprint": "f2"}}, "fingerprint"),
    ({"ranks": [1, float("nan"), 3, 0.5]}, "holds 2 ranks that are not")])
def test_runs_of_other_targets_are_refused(values, words, tmp_path):
  first, same = (runs.read_run(write_run(tmp_path / name)) for name in "ab")
  other = runs.read_run(write_run(tmp_path / "c", **values))
  significance.compare({"a": [first], "b": [same]}, resamples=5)
  with pytest.raises(ValueError, match=words):
    significance.compare({"a": [first, same], "c": [other]}, resamples=5)


def test_ranks_of_another_result_are_refused(tmp_path):
  read = [runs.read_run(write_run(tmp_path / name)) for name in "ab"]
  read[1].result["test"]["ndcg@5"] += 0.001
  with pytest.raises(ValueError, match="/b: ranks.parquet has ndcg@5 0.* and result.json 0.*not of this result"):
    significance.compare({"a": read[:1], "b": read[1:]}, resamples=5)


def test_one_user_is_no_sample(tmp_path):
  read = [runs.read_run(write_run(tmp_path / name, users=[7] * 4)) for name in "ab"]
  with pytest.raises(ValueError, match="/a ranks targets of 1 user"):
    significance.compare({"a": read[:1], "b": read[1:]}, resamples=5)
