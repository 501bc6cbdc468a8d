"""Owns what a difference between trained models is worth: intervals and p values over users, deviation over seeds.

What the numbers cover. Users are taken as drawn from all users that there may be, the trained models as given. So the
bootstrap interval and the p value say whether THESE models differ beyond the luck of which users were ranked, and not
whether training again would say the same: with one seed of each config a clear difference may be the luck of a seed.
The deviation over seeds speaks of that luck. With three seeds or more of both configs there is a second interval,
"users and seeds", that covers both.

Loops of numpy instead of scipy.stats.bootstrap and permutation_test, which `tests/significance_test.py` compares with:
one draw of users serves all metrics and groups, and memory stays at a few arrays of one value a user.

Shapes: T targets, U users, D of them that differ, S seeds, C columns (values that are resampled together: a metric of a
group), R resamples.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from awrsr_jax.analysis.runs import Run, check_comparable
from awrsr_jax.engine.ranking import summarize

METRIC = re.compile(r"(hr|ndcg)@([1-9][0-9]*)|mrr")
METRICS = ("ndcg@10", "hr@10", "mrr")
RESAMPLES, LEVEL = 10_000, 0.95
LEAST_SEEDS = 3  # of each group, for an interval over users and seeds
ROUNDING = 1e-12  # of sums, relative to the sum of sizes: smaller differences are ties


def gains(ranks: np.ndarray, metric: str) -> np.ndarray:
  """Returns (T,) float64 what each target adds to a metric; the mean is the metric as in ranking.summarize.

  Args:
    ranks: (T,) from 1; x.5 where items are tied.
    metric: "hr@k" or "ndcg@k" with any k from 1, or "mrr" (over the full list).

  Raises:
    ValueError: there is no such metric.
  """
  found = METRIC.fullmatch(metric)
  if not found:
    raise ValueError(f"--metrics: {metric!r} is no metric; choose from hr@K, ndcg@K (K from 1) and mrr")
  kind, cutoff = found.groups()
  ranks_T = np.asarray(ranks, np.float64)
  if kind is None:
    return 1 / ranks_T
  return (np.ones_like(ranks_T) if kind == "hr" else 1 / np.log2(ranks_T + 1)) * (ranks_T <= int(cutoff))


def find_users(users: np.ndarray) -> np.ndarray:
  """Returns (U,) int64 where each user's targets begin, of (T,) raw user ids in the order of ranks.parquet."""
  return np.concatenate([[0], 1 + np.flatnonzero(users[1:] != users[:-1])]).astype(np.int64)


def average_targets(values_T: np.ndarray, starts_U: np.ndarray) -> np.ndarray:
  """Returns (U,) float64 the mean over each user's targets; see find_users for the second argument."""
  return np.add.reduceat(values_T, starts_U) / np.diff(starts_U, append=len(values_T))


def resample_means(values_UxC: np.ndarray, resamples: int, seed: int) -> np.ndarray:
  """Returns (R, C) the means of U users drawn with replacement, R times (the bootstrap of Efron, 1979).

  All columns of a row are means of the same users, so that columns stay paired. Time grows with R * U, memory with U.

  Args:
    values_UxC: float64.
    resamples: R, from 1.
    seed: from 0; the same seed draws the same users, whatever the columns.
  """
  users, rng = len(values_UxC), np.random.default_rng([seed, 0])
  means_RxC = np.empty((resamples, values_UxC.shape[1]))
  for row in range(resamples):
    times_U = np.bincount(rng.integers(users, size=users), minlength=users)  # how often each user was drawn
    means_RxC[row] = times_U @ values_UxC / users
  return means_RxC


def find_interval(samples_RxC: np.ndarray, level: float) -> np.ndarray:
  """Returns (2, C) the percentile interval: what lies between its ends is the share `level` of the samples.

  Percentiles and not BCa (Efron, 1987): what is resampled is a mean over users, or a ratio of two. BCa would move the
  ends by about skewness / (6 sqrt U) standard errors, which is nothing with the thousands of users of a benchmark, and
  takes a jackknife. With a few dozen users the interval is somewhat too narrow, as that of every plain bootstrap.
  """
  return np.quantile(samples_RxC, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _is_exact(users: int, flips: int) -> bool:
  """Whether there are no more than `flips` ways to flip signs, 2^U."""
  return users < flips.bit_length()


def _draw_flips(users: int, flips: int, seed: int) -> Iterator[np.ndarray]:
  """Yields (U,) of 0 and 1, which users' differences change sign: each way once where that is exact."""
  if _is_exact(users, flips):
    yield from (np.array(way, np.uint8) for way in itertools.product((0, 1), repeat=users))
    return
  rng = np.random.default_rng([seed, 1])  # not the numbers that draw users
  for _ in range(flips):
    yield np.unpackbits(np.frombuffer(rng.bytes(-(-users // 8)), np.uint8), count=users)


def flip_signs(differences_UxC: np.ndarray, flips: int, seed: int) -> np.ndarray:
  """Returns (C,) two-sided p values of the paired sign-flip permutation test (Fisher, 1935).

  Were the two groups alike, each user's difference would have either sign with the same probability: p is the share of
  flips whose mean is at least as far from 0 as the real one. Of random flips it is (1 + count) / (1 + flips), so that p
  is never 0 and the test keeps its level (Phipson and Smyth, 2010). Where there are no more than `flips` ways to flip,
  each comes once, and p is exact.

  Args:
    differences_UxC: float64, paired by user.
    flips: from 1.
    seed: from 0.
  """
  sums_C = differences_UxC.sum(axis=0)
  least_C = np.abs(sums_C) - ROUNDING * np.abs(differences_UxC).sum(axis=0)
  differ = np.flatnonzero(differences_UxC.any(axis=1))  # most users have no hit in either group: no sign to flip
  twice_DxC = 2 * differences_UxC[differ]
  counts_C, total = np.zeros(len(sums_C), np.int64), 0
  for flipped_U in _draw_flips(len(differences_UxC), flips, seed):
    counts_C += np.abs(sums_C - flipped_U[differ].astype(np.float64) @ twice_DxC) >= least_C
    total += 1
  return counts_C / total if _is_exact(len(differences_UxC), flips) else (1 + counts_C) / (1 + total)


def correct_holm(p_values: Sequence[float]) -> list[float]:
  """Returns p values that may be compared with one level together (Holm, 1979), in the order given."""
  order, most, corrected = np.argsort(p_values, kind="stable"), 0.0, [0.0] * len(p_values)
  for place, index in enumerate(order):
    most = max(most, min(1.0, (len(p_values) - place) * float(p_values[index])))
    corrected[index] = most
  return corrected


def measure_deviation(seeds_S: np.ndarray) -> float | None:
  """Returns the sample deviation (over S - 1) of a metric over seeds, None of one seed."""
  return float(np.std(seeds_S, ddof=1)) if len(seeds_S) > 1 else None


def cover_seeds(base_U: np.ndarray, other_U: np.ndarray, base_S: np.ndarray, other_S: np.ndarray,
                weights: tuple[float, float], level: float) -> float | None:
  """Returns how far an estimate may be off for the luck of users and of seeds together.

  Users and the seeds of either group are three samples, drawn independently of each other. The variance of the estimate
  is the sum of theirs, and the interval is a t interval with the degrees of freedom of Satterthwaite (1946). What a
  seed does to a single user stands in two of the variances, and runs that share a seed number may share its luck: both
  err towards a wider interval. A bootstrap of seeds is no way: three, drawn with replacement, vary by a third
  too little.

  Args:
    base_U, other_U: values of each user, averaged over the seeds of a group.
    base_S, other_S: values of each seed, averaged over users.
    weights: of base and other in the estimate (its derivatives, where it is not linear).
    level: of the interval, in (0, 1).

  Returns:
    The distance of the ends from the estimate; None where a group has fewer than `LEAST_SEEDS` seeds.
  """
  if min(len(base_S), len(other_S)) < LEAST_SEEDS:
    return None
  samples = (weights[0] * base_U + weights[1] * other_U, weights[0] * base_S, weights[1] * other_S)
  variances = np.array([np.var(sample, ddof=1) / len(sample) for sample in samples])
  freedom = np.array([len(sample) - 1 for sample in samples])
  if not variances.any():
    return 0.0
  whole = variances.sum()
  return float(stats.t.ppf((1 + level) / 2, whole**2 / np.sum(variances**2 / freedom)) * np.sqrt(whole))


def check_settings(metrics: Sequence[str], resamples: int, seed: int, level: float) -> None:
  """Raises ValueError for settings of `compare` that say nothing."""
  if not metrics:
    raise ValueError("--metrics names no metric; choose from hr@K, ndcg@K (K from 1) and mrr")
  for metric in metrics:
    gains(np.ones(1), metric)
  if resamples < 1:
    raise ValueError(f"--resamples={resamples} must be at least 1; 10000 is usual")
  if seed < 0:
    raise ValueError(f"--seed={seed} must be at least 0")
  if not 0 < level < 1:
    raise ValueError(f"--level={level} must lie between 0 and 1; 0.95 is usual")


def check_same_targets(runs: Sequence[Run]) -> None:
  """Raises ValueError, with the difference, unless all runs ranked the same targets, row for row."""
  first = runs[0]
  for run in runs:
    ranks = run.ranks
    for name in ("user", "item", "history"):
      if len(ranks[name]) != len(first.ranks[name]):
        raise ValueError(f"{first.folder} and {run.folder} cannot be compared, they rank {len(first.ranks[name])} and "
                         f"{len(ranks[name])} targets; compare runs of the same rows")
      differ = np.flatnonzero(ranks[name] != first.ranks[name])
      if len(differ):
        row = differ[0]
        raise ValueError(f"{first.folder} and {run.folder} cannot be compared, row {row} of their ranks.parquet are "
                         f"different targets: {name} {first.ranks[name][row]} and {ranks[name][row]}; compare runs of "
                         "the same rows")


def read_targets(runs: Sequence[Run]) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns the ranks (T,) of each run, row for row of the same targets, and (U,) where each user's begin.

  Raises:
    ValueError: a run kept no ranks, or not those of its result; rows differ; or there is only one user.
  """
  check_same_targets(runs)
  first, found = runs[0], []
  for run in runs:
    ranks = run.ranks
    means, said = summarize(ranks["rank"]), run.result["test"]
    for metric in means.keys() & said.keys():
      if not np.isclose(means[metric], said[metric], rtol=1e-6, atol=1e-9):
        raise ValueError(f"{run.folder}: ranks.parquet has {metric} {means[metric]:.6f} and result.json "
                         f"{said[metric]:.6f}: the ranks are not of this result. Was it trained on without "
                         "config.eval.keep_ranks? Train again in another --workdir")
    found.append(ranks["rank"])
  starts_U = find_users(first.ranks["user"])
  if len(starts_U) < 2:
    raise ValueError(f"{first.folder} ranks targets of {len(starts_U)} user; an interval needs two users or more")
  return found, starts_U


def compare(groups: dict[str, list[Run]], metrics: Sequence[str] = METRICS, resamples: int = RESAMPLES, seed: int = 0,
            level: float = LEVEL) -> dict[str, Any]:
  """Compares groups of runs with the first of them, user by user, on the test targets.

  A user's value is the mean over the seeds of a group and over the user's targets; means are over users. (Where users
  have several targets, config.data.split.target=all, result.json weighs targets alike, and this weighs users alike.)
  The same users are drawn for all metrics and groups. What interval and p value cover: see the top of the file.

  Args:
    groups: see runs.group; the first is the baseline. Of one group there is only mean and deviation.
    metrics: see gains.
    resamples: how often users are drawn, and signs flipped.
    seed: of both, from 0.
    level: of the intervals, in (0, 1).

  Returns:
    "protocol" in words, "corpus" (see `corpus.describe`), "users" and "targets" (counts), "baseline" (a name),
    "resamples", "seed", "level"; "groups": name -> "runs" (folders) and "seeds"; and "metrics": metric -> name ->
    "mean", "seeds" (the mean of each), "deviation" (over seeds, None of one), and of all groups but the baseline

      "difference", "relative"                      to the baseline; in %, None where the baseline is 0
      "interval", "relative_interval"               [low, high] over users; None where a resampled baseline is 0
      "users_and_seeds", "relative_users_and_seeds" [low, high], see cover_seeds; None of fewer than three seeds
      "p", "p_holm"                                 see flip_signs; corrected for the groups of this metric

  Raises:
    ValueError: a setting is out of range, runs do not rank the same targets under one protocol, or kept no ranks;
      see also read_targets.
  """
  check_settings(metrics, resamples, seed, level)
  metrics, names = list(dict.fromkeys(metrics)), list(groups)
  runs = [run for members in groups.values() for run in members]
  check_comparable(runs)
  ranks, starts_U = read_targets(runs)
  ranks_of = dict(zip(map(id, runs), ranks, strict=True))
  values_UxC = np.empty((len(starts_U), len(metrics) * len(names)))
  found: dict[str, dict[str, Any]] = {metric: {} for metric in metrics}
  by_seed = {}
  for column, (metric, name) in enumerate(itertools.product(metrics, names)):
    values_U, seeds = np.zeros(len(starts_U)), []
    for run in groups[name]:
      seed_U = average_targets(gains(ranks_of[id(run)], metric), starts_U)
      values_U += seed_U / len(groups[name])
      seeds.append(float(seed_U.mean()))
    values_UxC[:, column], by_seed[metric, name] = values_U, np.array(seeds)
    found[metric][name] = {"mean": float(values_U.mean()), "seeds": seeds,
                           "deviation": measure_deviation(by_seed[metric, name])}
  if len(names) > 1:
    _compare_columns(found, values_UxC, by_seed, resamples, seed, level)
  return {"protocol": runs[0].result["protocol"], "corpus": runs[0].corpus, "users": len(starts_U),
          "targets": len(ranks[0]), "baseline": names[0], "resamples": resamples, "seed": seed, "level": level,
          "groups": {name: {"runs": [run.folder for run in members], "seeds": [run.seed for run in members]}
                     for name, members in groups.items()},
          "metrics": found}


def _compare_columns(found: dict[str, dict[str, Any]], values_UxC: np.ndarray,
                     by_seed: dict[tuple[str, str], np.ndarray], resamples: int, seed: int, level: float) -> None:
  """Adds to what was found what all groups but the first have besides means; columns are metrics times groups."""
  columns = {pair: column for column, pair in enumerate(by_seed)}
  pairs = [((metric, next(iter(groups))), (metric, name)) for metric, groups in found.items()
           for name in list(groups)[1:]]
  bases, others = ([columns[pair] for pair in side] for side in zip(*pairs, strict=True))
  samples_RxC = resample_means(values_UxC, resamples, seed)
  p_C = flip_signs(values_UxC[:, others] - values_UxC[:, bases], resamples, seed)
  for (base, other), p in zip(pairs, p_C.tolist(), strict=True):
    base_U, other_U = values_UxC[:, columns[base]], values_UxC[:, columns[other]]
    base_R, other_R = samples_RxC[:, columns[base]], samples_RxC[:, columns[other]]
    base_mean, other_mean = float(base_U.mean()), float(other_U.mean())
    values = found[other[0]][other[1]]
    values["difference"] = other_mean - base_mean
    values["interval"] = find_interval(other_R - base_R, level).tolist()
    reach = cover_seeds(base_U, other_U, by_seed[base], by_seed[other], (-1, 1), level)
    values["users_and_seeds"] = _around(values["difference"], reach)
    values |= {"relative": None, "relative_interval": None, "relative_users_and_seeds": None}
    if base_mean > 0:
      values["relative"] = 100 * (other_mean - base_mean) / base_mean
      # derivatives of the ratio: the delta method
      weights = (-100 * other_mean / base_mean**2, 100 / base_mean)
      reach = cover_seeds(base_U, other_U, by_seed[base], by_seed[other], weights, level)
      values["relative_users_and_seeds"] = _around(values["relative"], reach)
    if base_R.min() > 0:
      values["relative_interval"] = find_interval(100 * (other_R - base_R) / base_R, level).tolist()
    values["p"] = p
  for groups in found.values():
    compared = list(groups.values())[1:]
    for values, p_holm in zip(compared, correct_holm([values["p"] for values in compared]), strict=True):
      values["p_holm"] = p_holm


def _around(estimate: float, reach: float | None) -> list[float] | None:
  """Returns the interval of an estimate, None where it has none."""
  return None if reach is None else [estimate - reach, estimate + reach]
