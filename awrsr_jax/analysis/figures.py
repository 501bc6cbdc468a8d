"""Figures from run folders alone: curves over training and over cut-offs, and test NDCG by kind of target.

A figure is a function of groups of runs (see runs.group) that returns a `Drawing`: a matplotlib figure with its words
and its numbers. Of several seeds a line is their mean and a band is one sample deviation to both sides; of one seed
there is a line alone.

Shapes: N points of a curve, T targets, K bins.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from awrsr_jax.analysis.drawing import COLUMN, Drawing, legend, line_style, log_axis, settle, styled, thin
from awrsr_jax.analysis.runs import Run
from awrsr_jax.analysis.significance import check_same_targets, gains
from awrsr_jax.foreign import plain

Groups = dict[str, list[Run]]

MARKS = 8  # markers on a line
CUTOFFS = 50
BINS = 5


@dataclasses.dataclass(frozen=True)
class Curve:
  """Values of a group over x: x (N,), mean (N,) over its runs, and deviation (N,), None where there is one run."""

  name: str
  x: np.ndarray
  mean: np.ndarray
  deviation: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Binned:
  """Test NDCG by bins of targets.

  Attributes:
    low, high: (K,) the smallest and largest value in each bin.
    targets: (K,) how many.
    mean: group -> (K,).
    error: group -> (K,) standard errors, NaN where a bin has one user.
  """

  low: np.ndarray
  high: np.ndarray
  targets: np.ndarray
  mean: dict[str, np.ndarray]
  error: dict[str, np.ndarray]


def average(name: str, runs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Curve:
  """Returns the curve of a group over the x that all of its runs have: so it ends where the shortest run does.

  Args:
    name: of the group.
    runs: x and values of each, x ascending.

  Raises:
    ValueError: the runs have no x in common.
  """
  runs = list(runs)
  shared = runs[0][0]
  for x, _ in runs[1:]:
    shared = np.intersect1d(shared, x)
  if not len(shared):
    raise ValueError(f"{name}: there is no step at which all of its runs ({len(runs)}) have something to draw; "
                     "metrics.jsonl holds what they logged (config.train.log_every, config.eval.every_epochs)")
  values = np.stack([y[np.searchsorted(x, shared)] for x, y in runs]).astype(np.float64)
  return Curve(name, shared, values.mean(axis=0), values.std(axis=0, ddof=1) if len(runs) > 1 else None)


def cumulate(ranks: np.ndarray, most: int) -> np.ndarray:
  """Returns (most,) the mean NDCG@N of all targets, N = 1 .. most. Ranks may be halves (ties)."""
  first = np.ceil(np.asarray(ranks, np.float64)).astype(np.int64)  # the first cut-off that lets a rank in
  sums = np.bincount(np.minimum(first, most + 1), weights=gains(ranks, f"ndcg@{most}"), minlength=most + 2)
  return np.cumsum(sums)[1:most + 1] / len(ranks)


def cut(values: np.ndarray, count: int) -> np.ndarray:
  """Returns (T,) the bin of each value, from 0: at most `count` bins of about as many values each, none empty.

  A bin ends at a quantile and holds all values that are equal to its end, so equal values share a bin.
  """
  ends = np.unique(np.quantile(values, np.arange(1, count + 1) / count, method="inverted_cdf"))
  return np.searchsorted(ends, values)


def standard_error(values: np.ndarray, users: np.ndarray) -> float:
  """Returns the standard error of the mean over targets, where targets of one user go together.

  With one target a user it is the sample deviation / sqrt(targets). Else deviations are summed within a user before
  they are squared (the cluster-robust variance of a mean: Liang and Zeger, 1986, with the factor U / (U - 1)).
  NaN of one user.
  """
  _, user = np.unique(users, return_inverse=True)
  sums = np.bincount(user, weights=values - values.mean())
  if len(sums) < 2:
    return float("nan")
  return float(np.sqrt(len(sums) / (len(sums) - 1) * np.sum(sums ** 2)) / len(values))


def bin_targets(groups: Groups, column: str, cutoff: int = 10, count: int = BINS) -> Binned:
  """Cuts the test targets into quantile bins of a column of ranks.parquet, and averages NDCG@cutoff in each.

  A target's NDCG is averaged over the runs of a group first; the standard error is then over targets.

  Raises:
    ValueError: runs kept no ranks, or ranked other targets than the first.
  """
  first = next(iter(groups.values()))[0]
  values, users = first.ranks[column], first.ranks["user"]
  if not len(values):
    raise ValueError(f"{first.folder}/ranks.parquet has no rows: there is no test target")
  check_same_targets([run for members in groups.values() for run in members])
  bins, names = cut(values, count), np.unique(users, return_inverse=True)[1]
  where = [bins == k for k in range(bins.max() + 1)]
  mean, error = {}, {}
  for name, members in groups.items():
    gain = np.mean([gains(run.ranks["rank"], f"ndcg@{cutoff}") for run in members], axis=0)
    mean[name] = np.array([gain[inside].mean() for inside in where])
    error[name] = np.array([standard_error(gain[inside], names[inside]) for inside in where])
  low, high = (np.array([pick(values[inside]) for inside in where]) for pick in (np.min, np.max))
  return Binned(low, high, np.array([inside.sum() for inside in where]), mean, error)


def ndcg_by_cutoff(groups: Groups) -> Drawing:
  """Draws test NDCG@N over N (Figure 2 of the paper). Raises ValueError where a run kept no ranks."""
  cutoffs = np.arange(1, CUTOFFS + 1)
  curves = [average(name, ((cutoffs, cumulate(run.ranks["rank"], CUTOFFS)) for run in members))
            for name, members in groups.items()]
  return _drawing("ndcg_by_cutoff", "Test NDCG@N by cut-off", "Mean NDCG@N over all test targets, for N from 1 to "
                  f"{CUTOFFS}. {_of_seeds(groups)}", draw_curves(curves, "N", "test NDCG@N"), curves, "N")


def validation_curve(groups: Groups, metric: str = "ndcg@5") -> Drawing:
  """Draws a validation metric over epochs (Figure 4 of the paper). Raises ValueError where there is no such line."""
  def read(run: Run) -> tuple[np.ndarray, np.ndarray]:
    _, epochs, values = run.curve("valid", metric)
    return epochs, values

  curves = [average(name, map(read, members)) for name, members in groups.items()]
  name = metric.upper()
  return _drawing(f"validation_{metric.replace('@', '_')}", f"Validation {name} by epoch",
                  f"{name} of the validation split after each evaluation. {_of_seeds(groups)}",
                  draw_curves(curves, "epoch", f"validation {name}"), curves, "epoch")


def gradient_norm(groups: Groups) -> Drawing:
  """Draws the global norm of the gradient over steps (Figure 5 of the paper). Raises ValueError: see average."""
  curves = _training_curves(groups, "grad_norm")
  return _drawing("gradient_norm", "Gradient norm by step", "Global norm of the gradient before clipping, the mean "
                  f"over the steps of a line of metrics.jsonl; logarithmic scale. {_of_seeds(groups)}",
                  draw_curves(curves, "step", "global gradient norm", log_y=True), curves, "step")


def training_loss(groups: Groups) -> Drawing:
  """Draws the training loss over steps. Raises ValueError: see average."""
  curves = _training_curves(groups, "loss")
  losses = sorted({str(run.config.get("loss.name")) for members in groups.values() for run in members})
  warning = f" The losses are different functions ({', '.join(losses)}), so their values do not compare." * (
      len(losses) > 1)
  return _drawing("training_loss", "Training loss by step", "Training loss, dropout on, the mean over the targets of "
                  f"the steps of a line of metrics.jsonl.{warning} {_of_seeds(groups)}",
                  draw_curves(curves, "step", "training loss (nats a target)"), curves, "step")


def ndcg_by_history(groups: Groups) -> Drawing:
  """Draws test NDCG@10 by the length of the history. Raises ValueError: see bin_targets."""
  return _draw_bins(groups, "history", "ndcg_by_history", "Test NDCG@10 by length of the history",
                    "history (items before the target)")


def ndcg_by_popularity(groups: Groups) -> Drawing:
  """Draws test NDCG@10 by how often the target was trained on. Raises ValueError: see bin_targets."""
  return _draw_bins(groups, "trained", "ndcg_by_popularity", "Test NDCG@10 by popularity of the target",
                    "popularity (times the target was trained on)")


FROM_RUNS: tuple[Callable[[Groups], Drawing], ...] = (
    ndcg_by_cutoff, validation_curve, training_loss, gradient_norm, ndcg_by_history, ndcg_by_popularity)


def draw_curves(curves: Sequence[Curve], x_label: str, y_label: str, log_y: bool = False) -> Figure:
  """Returns a figure of one column's width. On a logarithmic scale what is not above 0 is left out."""
  with styled():
    figure = Figure((COLUMN, 2.3), layout="constrained")
    axes = figure.subplots()
    lowest = min((curve.mean[curve.mean > 0].min() for curve in curves if (curve.mean > 0).any()), default=1e-12)
    for index, curve in enumerate(curves):
      style = line_style(index)
      every = 1 if len(curve.x) <= 2 * MARKS else -(-len(curve.x) // MARKS)
      offset = index % len(curves) * every // len(curves)  # so that markers do not hide each other
      axes.plot(curve.x, curve.mean, label=plain(curve.name), markevery=(offset, every), **style)
      if curve.deviation is not None:
        low = curve.mean - curve.deviation
        axes.fill_between(curve.x, np.maximum(low, lowest / 2) if log_y else low, curve.mean + curve.deviation,
                          color=style["color"], alpha=0.2, linewidth=0)
    if log_y:
      log_axis(axes, np.concatenate([curve.mean for curve in curves]))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.02)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    legend(figure, axes, len(curves))
    return settle(figure)


def draw_binned(binned: Binned, x_label: str, y_label: str) -> Figure:
  """Returns a figure of one column's width: a point with a bar of one standard error for each group and bin."""
  with styled():
    figure = Figure((COLUMN, 2.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(binned.targets))
    step = min(0.16, 0.7 / len(binned.mean))
    for index, name in enumerate(binned.mean):
      style = line_style(index)
      axes.errorbar(places + (index - (len(binned.mean) - 1) / 2) * step, binned.mean[name], binned.error[name],
                    label=plain(name), color=style["color"], marker=style["marker"], linestyle="none", capsize=2,
                    elinewidth=1, markersize=4.5)
    ranges = [_range(low, high) for low, high in zip(binned.low, binned.high, strict=True)]
    if max(map(len, ranges)) > 10:  # too wide for a fifth of a column
      ranges = [words.replace("–", "–\n") if "–" in words else f"{words}\n" for words in ranges]
    axes.set_xticks(places, [f"{words}\nn={count:,}" for words, count in zip(ranges, binned.targets, strict=True)],
                    fontsize=6.5)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(False, axis="x")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    legend(figure, axes, len(binned.mean))
    return settle(figure)


def _training_curves(groups: Groups, name: str) -> list[Curve]:
  """Returns what the training lines say under a name, over steps."""
  return [average(group, ((steps, values) for steps, _, values in (run.curve("train", name) for run in members)))
          for group, members in groups.items()]


def _of_seeds(groups: Groups) -> str:
  """Returns in words what a line and its band are."""
  band = ("Lines are means over runs, bands one sample deviation to both sides; a line ends where the shortest run of "
          "its group does." if any(len(members) > 1 for members in groups.values()) else "One run a line.")
  return f"{band} {_count_runs(groups)}"


def _count_runs(groups: Groups) -> str:
  """Returns in words how many runs each group has."""
  return "; ".join(f"{name}: {len(members)} run{'s' * (len(members) > 1)}" for name, members in groups.items()) + "."


def _drawing(key: str, title: str, caption: str, figure: Figure, curves: list[Curve], x_label: str) -> Drawing:
  """Returns the drawing of curves, with one row for each x of any of them."""
  columns, of_curve = [x_label], []
  for curve in curves:
    columns += [curve.name] + [f"{curve.name}, deviation"] * (curve.deviation is not None)
    values = [x for x in (curve.mean, curve.deviation) if x is not None]
    of_curve.append((dict(zip(curve.x.tolist(), zip(*(x.tolist() for x in values), strict=True), strict=True)),
                     ("",) * len(values)))
  every = sorted({x for found, _ in of_curve for x in found})
  rows = [(x, *(value for found, missing in of_curve for value in found.get(x, missing))) for x in thin(every)]
  return Drawing(key, title, caption, figure, tuple(columns), rows)


def _draw_bins(groups: Groups, column: str, key: str, title: str, label: str) -> Drawing:
  """Returns the drawing of NDCG@10 by bins of a column."""
  binned = bin_targets(groups, column)
  columns = [label, "targets"] + [f"{name}{what}" for name in groups for what in ("", ", standard error")]
  rows = [(_range(binned.low[k], binned.high[k]), int(binned.targets[k]),
           *(float(values[name][k]) for name in groups for values in (binned.mean, binned.error)))
          for k in range(len(binned.targets))]
  caption = (f"Mean NDCG@10 of the n test targets of each bin; bins end at quantiles of the {label.split(' (')[0]}. "
             "Bars are one standard error over targets to both sides, those of one user together, after the mean over "
             f"runs. {_count_runs(groups)}")
  return Drawing(key, title, caption, draw_binned(binned, label, "test NDCG@10"), tuple(columns), rows)


def _range(low: int, high: int) -> str:
  """Returns a range of whole numbers in words."""
  return f"{low:,}" if low == high else f"{low:,}–{high:,}"
