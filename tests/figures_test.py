"""Figures from run folders: the numbers that they show, what they look like in words, and their bytes."""

import io
import json
import pathlib
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from awrsr_jax.analysis import drawing as drawings
from awrsr_jax.analysis import figures, runs
from awrsr_jax.config import default
from awrsr_jax.engine.ranking import summarize
from awrsr_jax.foreign import shorten

USERS = 90
CORPUS = {
    "name": "made for a test", "fingerprint": "f" * 64, "numbering": "e" * 64, "users": USERS, "items": 40,
    "interactions": 900, "mean_length": 10.0, "median_length": 9.0, "min_length": 3, "max_length": 30, "density": 0.25,
    "titles": 0, "split": {"name": "leave_one_out", "words": "leave-one-out", "training": 720, **{
        split: {"targets": USERS, "new_users": 0, "no_history": 0, "new_items": 0} for split in ("valid", "test")}}}


def write_run(folder: pathlib.Path, seed: int = 0, changes: dict | None = None, steps: int = 6,
              ranks: bool = True) -> str:
  """Writes a run folder by hand; numbers are drawn by the seed."""
  folder.mkdir()
  config = default()
  config.seed = seed
  config.update_from_flattened_dict(changes or {})
  rng = np.random.default_rng(seed)
  table = {"user": [f"u{user:02d}" for user in range(USERS)], "item": list(range(USERS)),
           "rank": rng.geometric(0.05, USERS).astype(np.float32) + 0.5 * (rng.random(USERS) < 0.2).astype(np.float32),
           "history": (np.arange(USERS) % 7 + 2).astype(np.int32), "trained": (np.arange(USERS) ** 2).astype(np.int64)}
  lines = []
  for step in range(1, steps + 1):
    lines.append({"step": 10 * step, "epoch": step, "split": "train", "loss": 5 / step + rng.random(),
                  "grad_norm": 0.1 + rng.random(), "learning_rate": 0.001, "interactions_per_sec": 1.0})
    lines.append({"step": 10 * step, "epoch": step, "split": "valid", "ndcg@5": rng.random(), "ndcg@10": rng.random()})
  metrics = summarize(table["rank"])
  result = {"test": metrics, "valid": metrics, "protocol": "leave-one-out, full ranking", "loss": "softmax",
            "refine": config.model.refine, "backbone": config.model.backbone, "seed": seed, "epochs": steps,
            "steps": 10 * steps, "best_step": 10 * steps, "best_epoch": steps, "parameters": 1234, "corpus": CORPUS,
            "device": "1 x cpu (cpu)", "versions": {"jax": "0.10.2"}, "wall_time_s": 3.5,
            "peak_memory": {"host": 1 << 30}, "compiled": {"seconds": 1.25, "programs": 3, "from_cache": 0}}
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  (folder / "corpus.json").write_text(json.dumps(CORPUS))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "result.json").write_text(json.dumps(result))
  if ranks:
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "ranks.parquet")
  return str(folder)


def make_groups(tmp_path, seeds: int = 3):
  """Returns two groups, of refinement "none" and "value", with so many seeds each."""
  return runs.group([runs.read_run(write_run(tmp_path / f"{refine}_{seed}", seed + 10 * (refine == "value"),
                                             {"model.refine": refine}))
                     for refine in ("none", "value") for seed in range(seeds)])


def lines_of(drawing):
  """Returns the x and y of each labelled line of the first axes."""
  return {line.get_label(): line.get_data() for line in drawing.figure.axes[0].lines}


@pytest.mark.parametrize("seeds", [1, 3])
def test_ndcg_by_cutoff_is_the_mean_over_runs_of_the_metric(seeds, tmp_path):
  groups = make_groups(tmp_path, seeds)
  lines = lines_of(figures.ndcg_by_cutoff(groups))
  for name, members in groups.items():
    x, y = lines[name]
    assert x.tolist() == list(range(1, 51))
    for cutoff in (5, 10, 20):
      expected = np.mean([summarize(run.ranks["rank"])[f"ndcg@{cutoff}"] for run in members])
      np.testing.assert_allclose(y[cutoff - 1], expected, rtol=1e-12)
    slow = np.mean([[np.mean([1 / np.log2(rank + 1) if rank <= cutoff else 0 for rank in run.ranks["rank"].tolist()])
                     for cutoff in range(1, 51)] for run in members], axis=0)
    np.testing.assert_allclose(y, slow, rtol=1e-12)


@pytest.mark.parametrize("make, split, key, at, scale", [
    (figures.validation_curve, "valid", "ndcg@5", "epoch", "linear"),
    (figures.training_loss, "train", "loss", "step", "linear"),
    (figures.gradient_norm, "train", "grad_norm", "step", "log"),
])
def test_curves_and_bands_are_mean_and_sample_deviation(make, split, key, at, scale, tmp_path):
  groups = make_groups(tmp_path)
  drawing = make(groups)
  axes = drawing.figure.axes[0]
  assert axes.get_yscale() == scale
  bands = [collection.get_paths()[0].vertices for collection in axes.collections]
  for (name, members), band in zip(groups.items(), bands, strict=True):
    of_runs = [[line[key] for line in run.metrics if line["split"] == split] for run in members]
    x = [line[at] for line in members[0].metrics if line["split"] == split]
    mean = [sum(values) / 3 for values in zip(*of_runs, strict=True)]
    deviation = [(sum((value - m) ** 2 for value in values) / 2) ** 0.5
                 for m, values in zip(mean, zip(*of_runs, strict=True), strict=True)]
    found = lines_of(drawing)[name]
    np.testing.assert_allclose(found[0], x)
    np.testing.assert_allclose(found[1], mean)
    for place, m, d in zip(x, mean, deviation, strict=True):
      heights = band[band[:, 0] == place, 1]
      np.testing.assert_allclose(heights.max(), m + d)
      if scale == "linear":
        np.testing.assert_allclose(heights.min(), m - d)
  assert [row[0] for row in drawing.rows] == x
  np.testing.assert_allclose([row[1] for row in drawing.rows], lines_of(drawing)["refine=none"][1])


def test_one_seed_has_a_line_and_no_band(tmp_path):
  drawing = figures.validation_curve(make_groups(tmp_path, 1))
  assert len(drawing.figure.axes[0].collections) == 0
  assert drawing.columns == ("epoch", "refine=none", "refine=value")
  assert "1 run" in drawing.caption and "band" not in drawing.caption


def test_a_line_ends_where_the_shortest_run_of_its_group_does(tmp_path):
  groups = runs.group([runs.read_run(write_run(tmp_path / f"{seed}", seed, steps=4 + seed)) for seed in range(3)])
  [(x, _)] = lines_of(figures.validation_curve(groups)).values()
  assert x.tolist() == [1, 2, 3, 4]


def test_runs_without_a_common_step_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"a: there is no step at which all of its runs \(2\) have something to draw"):
    figures.average("a", [(np.array([1]), np.array([1.0])), (np.array([2]), np.array([1.0]))])


def test_a_run_without_validation_lines_is_refused(tmp_path):
  groups = make_groups(tmp_path)
  with pytest.raises(ValueError, match="something to draw"):
    figures.validation_curve(groups, "hr@99")


def test_a_run_without_ranks_is_refused(tmp_path):
  groups = runs.group([runs.read_run(write_run(tmp_path / "a", ranks=False))])
  for make in (figures.ndcg_by_cutoff, figures.ndcg_by_history, figures.ndcg_by_popularity):
    with pytest.raises(ValueError, match="ranks.parquet cannot be read .*keep_ranks"):
      make(groups)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 50), min_size=1, max_size=60), count=st.integers(1, 8))
def test_bins_partition_all_values(values, count):
  values = np.array(values)
  bins = figures.cut(values, count)
  assert set(bins.tolist()) == set(range(bins.max() + 1)) and bins.max() < count  # none is empty
  for value in np.unique(values):
    assert len(np.unique(bins[values == value])) == 1
  assert (np.diff(bins[np.argsort(values, kind="stable")]) >= 0).all()


def test_bins_of_distinct_values_are_even():
  assert np.bincount(figures.cut(np.random.default_rng(0).permutation(100), 5)).tolist() == [20] * 5


@pytest.mark.parametrize("column", ["history", "trained"])
def test_binned_ndcg_is_that_of_the_targets_in_each_bin(column, tmp_path):
  groups = make_groups(tmp_path)
  binned = figures.bin_targets(groups, column)
  first = groups["refine=none"][0].ranks
  assert binned.targets.sum() == USERS
  assert (binned.low[1:] > binned.high[:-1]).all()
  for k, (low, high) in enumerate(zip(binned.low, binned.high, strict=True)):
    inside = [at for at, value in enumerate(first[column].tolist()) if low <= value <= high]
    assert len(inside) == binned.targets[k]
    for name, members in groups.items():
      gain = [np.mean([1 / np.log2(run.ranks["rank"][at] + 1) * (run.ranks["rank"][at] <= 10) for run in members])
              for at in inside]
      np.testing.assert_allclose(binned.mean[name][k], np.mean(gain), rtol=1e-6)
      np.testing.assert_allclose(binned.error[name][k], np.std(gain, ddof=1) / len(inside) ** 0.5, rtol=1e-5)
  whole = sum(n * mean for n, mean in zip(binned.targets, binned.mean["refine=none"], strict=True)) / USERS
  expected = np.mean([summarize(run.ranks["rank"])["ndcg@10"] for run in groups["refine=none"]])
  np.testing.assert_allclose(whole, expected, rtol=1e-12)


def test_the_standard_error_takes_targets_of_a_user_together():
  values, users = np.array([1.0, 1, 0, 0, 1, 1]), np.array(["a", "a", "b", "b", "c", "c"])
  alike = figures.standard_error(values[::2], users[::2])
  np.testing.assert_allclose(figures.standard_error(values, users), alike)  # every target twice says nothing new
  np.testing.assert_allclose(alike, np.std(values[::2], ddof=1) / 3 ** 0.5)
  assert np.isnan(figures.standard_error(values[:2], users[:2]))


def test_other_targets_are_refused(tmp_path):
  groups = make_groups(tmp_path, 1)
  groups["refine=value"][0].ranks["item"] = np.arange(USERS)[::-1]
  with pytest.raises(ValueError, match="none_0 and .*value_0 cannot be compared, row 0 of .*different targets"):
    figures.ndcg_by_history(groups)


@pytest.mark.parametrize("make", figures.FROM_RUNS)
def test_the_same_numbers_give_the_same_bytes_in_any_order(make, tmp_path):
  groups = make_groups(tmp_path)
  with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):  # a matplotlibrc of one's own
    one = make(groups)
  other = make(groups)
  svg, png = drawings.to_svg(one), drawings.to_png(one)
  assert drawings.to_png(other) == png and drawings.to_svg(other) == svg
  assert b"metadata" not in svg  # it would hold the date


@pytest.mark.parametrize("make", figures.FROM_RUNS)
def test_figures_say_what_they_show(make, tmp_path):
  drawing = make(make_groups(tmp_path))
  axes = drawing.figure.axes[0]
  assert axes.get_xlabel() and axes.get_ylabel() and drawing.title and drawing.caption.endswith(".")
  assert "3 runs" in drawing.caption
  assert drawing.figure.get_figwidth() in (drawings.COLUMN, drawings.TEXT)
  assert all(len(row) == len(drawing.columns) for row in drawing.rows)
  texts = [element.text for element in ElementTree.fromstring(drawings.to_svg(drawing)).iter()
           if element.tag.endswith("}text")]
  assert {"refine=none", "refine=value", axes.get_xlabel(), axes.get_ylabel()} <= set(texts)  # text, not outlines


@pytest.mark.parametrize("make", figures.FROM_RUNS)
def test_nothing_is_clipped_and_the_legend_covers_no_data(make, tmp_path):
  drawing = make(make_groups(tmp_path))
  pixels = matplotlib.image.imread(io.BytesIO(drawings.to_png(drawing)))[..., :3]
  assert pixels.min() < 0.1  # there is ink, but none at the edge
  for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
    assert (edge == 1).all()
  canvas = FigureCanvasAgg(drawing.figure)
  canvas.draw()
  assert not drawing.figure.legends[0].get_window_extent().overlaps(drawing.figure.axes[0].get_window_extent())


def test_every_group_looks_different_without_colour():
  styles = [(str(style["linestyle"]), style["marker"]) for style in map(drawings.line_style, range(5))]
  assert len(set(styles)) == 5
  assert len({str(drawings.line_style(index)) for index in range(35)}) == 35


def test_names_from_configs_are_text_and_no_formulas():
  curve = figures.Curve("$\\frac{1}$ <b>&\x00\u202e\n", np.arange(3), np.arange(3.0), None)
  figure = figures.draw_curves([curve, curve], "x", "y")
  drawing = drawings.Drawing("key", "", "", figure, (), [])
  texts = [element.text for element in ElementTree.fromstring(drawings.to_svg(drawing)).iter()]
  assert texts.count("$\\frac{1}$ <b>&") == 2


def test_a_letter_that_the_font_does_not_have_warns_of_nothing(recwarn):
  figure = figures.draw_curves([figures.Curve("一二", np.arange(3), np.arange(3.0), None)] * 2, "x", "y")
  drawings.to_png(drawings.Drawing("key", "", "", figure, (), []))
  assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("text, most, expected", [
    ("short", 5, "short"), ("longer", 5, "long…"), ("a b c d", 5, "a b…"), ("\x07a\tb\u200b", 9, "a b"), ("", 4, "")])
def test_texts_are_shortened(text, most, expected):
  assert shorten(text, most) == expected
  assert len(shorten(text, most)) <= most


def test_long_tables_are_thinned_and_keep_their_ends():
  rows = drawings.thin(list(range(1001)))
  assert len(rows) == drawings.MOST_ROWS and rows[0] == 0 and rows[-1] == 1000
  assert drawings.thin([3, 4]) == [3, 4]


def test_a_logarithmic_axis_takes_zeros(tmp_path):
  curve = figures.Curve("a", np.arange(4), np.array([0.0, 1, 10, 100]), np.array([0.0, 2, 1, 1]))
  figure = figures.draw_curves([curve], "step", "global gradient norm", log_y=True)
  labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
  assert not [label for label in labels if re.search(r"[$\\]", label)]
  assert np.isfinite(figure.axes[0].get_ylim()).all()
  assert io.BytesIO(drawings.to_png(drawings.Drawing("key", "", "", figure, (), []))).read(4) == b"\x89PNG"


def test_figures_leave_pyplot_and_settings_alone(tmp_path):
  before = dict(matplotlib.rcParams)
  drawings.to_png(figures.ndcg_by_cutoff(make_groups(tmp_path, 1)))
  assert dict(matplotlib.rcParams) == before
  code = "import sys, awrsr_jax.analyze; print('matplotlib.pyplot' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parent.parent, capture_output=True,
                        text=True, timeout=120)
  assert done.stdout.strip() == "False", done.stderr
