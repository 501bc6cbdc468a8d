"""Attention of a tiny trained model: which history is shown, what the maps hold, and profiles against loops."""

import csv
import dataclasses
import functools
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict
from matplotlib.collections import PolyCollection

from awrsr_jax.analysis import attention, maps, runs
from awrsr_jax.analysis.drawing import to_svg
from awrsr_jax.config import restore
from awrsr_jax.data import prepared
from awrsr_jax.engine.train import train
from awrsr_jax.inference import trained as models
from awrsr_jax.model.backbones import attention_maps, build_backbone, param_shapes

TITLES = ["<script>alert(1)</script>", "\"&<>' $5", "A Very Long Title of a Film (1999)", "", "Amélie"]
LENGTHS = [3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 16, 18, 22]


def write_log(path: pathlib.Path, users: int = 42) -> None:
  """Writes a CSV log with titles; user u of "who00", "who01", ... has LENGTHS[u % 14] items."""
  rng = np.random.default_rng(0)
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["user", "item", "time", "title"])
    for user in range(users):
      items = rng.choice(30, LENGTHS[user % len(LENGTHS)], replace=False)
      for time, item in enumerate(items.tolist()):
        writer.writerow([f"who{user:02d}", f"item{item:02d}", time, TITLES[item % len(TITLES)]])


def own_config(path: pathlib.Path):
  """Returns a config of two layers with two heads on a log of one's own."""
  config = tiny_config.get_config()
  config.data.name = ""
  config.data.path = str(path)
  config.data.columns.title = "title"
  config.data.max_length = 12
  config.model.layers = 2
  config.train.epochs = 1
  return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("maps")
  write_log(folder / "log.csv")
  train(own_config(folder / "log.csv"), folder / "run")
  return folder


@pytest.fixture(scope="module")
def run(workdir):
  return runs.read_run(workdir / "run")


@pytest.fixture(scope="module")
def trained(workdir):
  return models.load(workdir / "run")


@pytest.fixture(scope="module")
def histories(run):
  return attention.read_histories(run)


def change(trained: models.Trained, refine: str, sink: float | None = None) -> models.Trained:
  """Returns the first layer of a trained model with another refinement and sinks, whose tables it keeps."""
  config = ml_collections.ConfigDict(trained.config)
  config.model.update({"layers": 1, "refine": refine, "attention": {"sink": sink}})
  config = ml_collections.FrozenConfigDict(config)
  backbone = build_backbone(config, trained.record["corpus"]["items"])
  kept = flatten_dict(trained.params)
  params = {path: kept[path] if path in kept else np.full(leaf.shape, sink, leaf.dtype)
            for path, leaf in flatten_dict(param_shapes(backbone)).items()}
  return dataclasses.replace(trained, config=config, backbone=backbone, params=unflatten_dict(params))


@pytest.fixture
def strange_lengths(histories):
  """Returns a function: the histories of some rows only."""
  return lambda rows: attention.Histories(histories.corpus, histories.users[rows], histories.ends[rows])


def test_histories_are_what_comes_before_each_test_target(histories):
  corpus = histories.corpus
  assert histories.users.tolist() == list(range(42))
  for row in (0, 5, 41):
    expected = corpus.history(row)[:-1]
    assert histories.lengths[row] == len(expected)
    assert histories.newest(np.array([row]), 12)[0].tolist() == [0] * (12 - len(expected)) + expected[-12:].tolist()


def test_the_default_user_is_of_median_length_among_the_long_ones(histories, strange_lengths):
  long = sorted((int(length), row) for row, length in enumerate(histories.lengths) if length >= 10)
  assert attention.choose(histories) == long[(len(long) - 1) // 2][1]
  short = np.flatnonzero(histories.lengths < 10)
  assert strange_lengths(short).lengths[attention.choose(strange_lengths(short))] == histories.lengths[short].max()


def test_a_user_is_found_by_raw_id(histories):
  assert attention.choose(histories, "who07") == 7
  with pytest.raises(ValueError, match="--user=7: .*log.csv.* has no such user; its 42 raw ids are like who00, who01"):
    attention.choose(histories, "7")


def test_a_user_without_a_history_is_refused(strange_lengths):
  with pytest.raises(ValueError, match="--user=who07 has no history before a test target .*like who01, who02"):
    attention.choose(strange_lengths(np.array([1, 2])), "who07")


def test_data_that_are_not_there_are_one_clear_error(run, workdir, tmp_path):
  moved = tmp_path / "moved.csv"
  shutil.copy(workdir / "log.csv", moved)
  gone = runs.Run(run.folder, run.config | {"data.path": str(tmp_path / "gone.csv")}, run.corpus, [], run.result)
  with pytest.raises(ValueError, match="gone.csv cannot be read as the data of .*--data_path=PATH says where they"):
    attention.read_histories(gone)
  assert attention.read_histories(gone, str(moved)).lengths.tolist() == attention.read_histories(run).lengths.tolist()


def test_other_data_are_refused(run, tmp_path):
  write_log(tmp_path / "other.csv", users=41)
  with pytest.raises(ValueError, match="other.csv is not the data of .*the corpus differ, 41 users .*42 and 30"):
    attention.read_histories(run, str(tmp_path / "other.csv"))


def test_histories_of_a_prepared_folder_are_the_same(run, histories, tmp_path):
  data = restore(run.config, "the run").data
  prepared.prepare(data, tmp_path / "prepared", 1 << 28)
  found = attention.read_histories(run, str(tmp_path / "prepared"))
  rows = np.array([0, 5, 13, 41])
  np.testing.assert_array_equal(found.newest(rows, 12), histories.newest(rows, 12))
  assert attention.choose(found) == attention.choose(histories)


def profile_by_loop(trained, histories, rows, n=12):
  """Returns queries, attention and entropy as in attention.Profile, one history, layer, head and query at a time."""
  layers, heads = trained.config.model.layers, trained.config.model.heads
  find = jax.jit(functools.partial(attention_maps, trained.backbone))
  queries, mass, entropy = np.zeros(n), {}, {}
  for row in rows:
    length = min(int(histories.lengths[row]), n)
    inputs = histories.newest(np.array([row]), length)
    queries[:length] += 1
    for layer, found in enumerate(find(trained.params, inputs)):
      for name, weights in jax.tree.map(np.asarray, found).items():
        by_distance = mass.setdefault(name, np.zeros((layers, heads, n)))
        by_keys = entropy.setdefault(name, np.zeros((layers, heads, n)))
        for head in range(heads):
          for query in range(length):
            for key in range(query + 1):
              weight = float(weights[0, head, query, key])
              by_distance[layer, head, query - key] += weight
              share = weight / float(weights[0, head, query].sum())
              by_keys[layer, head, query] -= share * np.log2(share) if share > 0 else 0
  return (queries, {name: x / queries.sum() for name, x in mass.items()},
          {name: x / queries for name, x in entropy.items()})


@pytest.fixture(scope="module")
def profiled_by_loop(trained, histories):
  """Of the 11 users that the seed 3 draws."""
  return profile_by_loop(trained, histories, np.random.default_rng(3).permutation(42)[:11])


@pytest.mark.parametrize("most_users, most_bytes", [(64, 1 << 27), (3, 1 << 27), (64, 1 << 13)])
def test_profiles_are_those_of_a_loop_whatever_the_batches(most_users, most_bytes, trained, histories,
                                                           profiled_by_loop, monkeypatch):
  monkeypatch.setattr(attention, "MOST_USERS", most_users)
  monkeypatch.setattr(attention, "MOST_BYTES", most_bytes)
  profile = attention.measure_profile(trained, histories, 11, seed=3)
  queries, mass, entropy = profiled_by_loop
  assert profile.users == 11 and profile.queries.tolist() == queries.tolist()
  for name in ("first_order", "refined"):
    np.testing.assert_allclose(profile.attention[name], mass[name], atol=1e-6)
    np.testing.assert_allclose(profile.entropy[name], entropy[name], atol=1e-5)
    np.testing.assert_allclose(profile.attention[name].sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(profile.relative(name)[..., 1:], entropy[name][..., 1:] / np.log2(np.arange(2, 13)),
                               atol=1e-5)
    assert np.isnan(profile.relative(name)[..., 0]).all()


def test_profiles_are_multiplied_in_full_precision_on_every_device(trained):
  program = attention._make_step(trained.backbone).lower(trained.params, np.ones((2, 12), np.int32)).as_text()
  assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") > 0


def test_all_users_are_taken_where_there_are_fewer(trained, histories):
  profile = attention.measure_profile(trained, histories, 512)
  assert profile.users == 42
  assert profile.queries.sum() == np.minimum(histories.lengths, 12).sum()


def test_entropy_of_even_weights_is_the_logarithm_of_their_number():
  for keys in (1, 2, 5, 8):
    weights = np.zeros((3, 8), np.float32)
    weights[:, :keys] = 1 / keys
    np.testing.assert_allclose(attention.entropy_bits(weights), np.log2(keys), atol=1e-6)
    np.testing.assert_allclose(attention.entropy_bits(weights * 0.3), np.log2(keys), atol=1e-6)  # beside a sink
  np.testing.assert_array_equal(attention.entropy_bits(np.array([[0, 0], [-1, 0], [-1, 2]], np.float32)), [0, 0, 0])


def test_a_sink_takes_weight_from_profiles_and_maps_but_no_entropy(trained, histories, monkeypatch):
  model = change(trained, "simple", sink=2.0)
  rows = np.random.default_rng(3).permutation(42)[:5]
  profile = attention.measure_profile(model, histories, 5, seed=3)
  _, mass, entropy = profile_by_loop(model, histories, rows)
  for name in ("first_order", "refined"):
    np.testing.assert_allclose(profile.attention[name], mass[name], atol=1e-6)
    assert np.all(profile.attention[name].sum(axis=-1) < 0.7)  # of at most 12 keys, scored near 0
    np.testing.assert_allclose(profile.entropy[name], entropy[name], atol=1e-5)
    assert 0.9 < np.nanmax(profile.relative(name)) < 1 + 1e-6
  monkeypatch.setattr(maps, "LONG", 1)
  shares = np.stack([np.cumsum(x, axis=-1) / x.sum(axis=-1, keepdims=True) for x in mass.values()])
  span = int(np.argmax(shares.min(axis=(0, 1, 2)) >= 0.99)) + 1
  drawing = maps.profile_drawings(profile, is_refined=True)[0]
  assert span > 2 and max(len(line.get_ydata()) for line in drawing.figure.axes[0].lines) == span
  drawing = maps.map_drawings(model, histories, attention.choose(histories, "who06"))[0]
  assert "A row is a query and sums to 1 less what its sink takes, over all keys" in drawing.caption
  assert sum(row[2] for row in drawing.rows) < 0.7 * 9


def test_maps_show_the_weights_of_the_newest_items(trained, histories, monkeypatch):
  monkeypatch.setattr(maps, "SHOWN", 6)
  row = attention.choose(histories, "who13")
  numbers = histories.newest(np.array([row]), 12)
  found = attention_maps(trained.backbone, trained.params, numbers)
  drawings = maps.map_drawings(trained, histories, row)
  assert [drawing.key for drawing in drawings] == ["attention_layer1", "attention_layer2"]
  cells = [(i, j) for i in range(6) for j in range(i + 1)]
  for layer, drawing in enumerate(drawings):
    panels = [collection for axes in drawing.figure.axes for collection in axes.collections
              if isinstance(collection, PolyCollection)]
    assert len(panels) == 6  # two heads, three panels
    for head in range(2):
      first, refined = (np.asarray(found[layer][name][0, head, -6:, -6:]) for name in ("first_order", "refined"))
      for panel, weights in zip(panels[3 * head:], (first, refined, refined - first), strict=False):
        np.testing.assert_allclose(panel.get_array(), [weights[cell] for cell in cells], atol=1e-6)
        assert len(panel.get_paths()) == len(cells)  # nothing where a query may not look
    assert panels[0].norm.vmin == 0 and panels[0].norm is panels[1].norm
    assert float(panels[2].norm(0)) == 0.5 and panels[2].norm.vmin == -panels[2].norm.vmax
    assert len(drawing.rows) == len(cells) and drawing.columns[:3] == ("query", "key", "head 1, first order")
  assert "User who13, 21 items before the test target, of which the model sees 12 and" in drawings[0].caption


def test_rows_of_a_map_of_a_whole_history_sum_to_one(trained, histories):
  [drawing, _] = maps.map_drawings(trained, histories, attention.choose(histories, "who06"))
  sums = {}
  for query, _, *values in drawing.rows:
    sums[query] = sums.get(query, 0) + np.array(values)
  assert len(sums) == len({row[0] for row in drawing.rows})
  for place in range(2, 6):
    total = sum(row[place] for row in drawing.rows)
    np.testing.assert_allclose(total, 9, atol=1e-4)  # a row for each of nine queries


def test_labels_are_short_titles_or_raw_ids(trained, histories):
  [drawing, _] = maps.map_drawings(trained, histories, attention.choose(histories, "who13"))
  labels = {label.get_text() for axes in drawing.figure.axes for label in axes.get_yticklabels()}
  names = {row[0] for row in drawing.rows}
  assert "A Very Long Title of a Film (1999)" in names and "A Very Long Title…" in labels
  assert any(name.startswith("item") for name in names)  # those without a title
  assert max(map(len, labels)) <= maps.LETTERS


def test_without_refinement_one_map_and_one_line_are_drawn(trained, histories):
  plain = change(trained, "none")
  [drawing] = maps.map_drawings(plain, histories, attention.choose(histories, "who13"))
  assert drawing.columns == ("query", "key", "head 1, attention", "head 2, attention")
  assert sum(isinstance(collection, PolyCollection) for axes in drawing.figure.axes
             for collection in axes.collections) == 2  # heads
  profile = attention.measure_profile(plain, histories, 8)
  np.testing.assert_array_equal(profile.attention["first_order"], profile.attention["refined"])
  for drawing in maps.profile_drawings(profile, is_refined=False):
    labels = [line.get_label() for line in drawing.figure.axes[0].lines if not line.get_label().startswith("_")]
    assert "attention" in labels and "refined" not in labels


def test_profiles_are_drawn_by_layer_with_heads_and_their_mean(trained, histories):
  profile = attention.measure_profile(trained, histories, 42)
  drawings = {drawing.key: drawing for drawing in maps.profile_drawings(profile, is_refined=True)}
  assert list(drawings) == ["attention_by_distance", "attention_entropy", "attention_entropy_relative"]
  for layer, axes in enumerate(drawings["attention_by_distance"].figure.axes[:2]):
    for name, label in attention.NAMES.items():
      [thick] = [line for line in axes.lines if line.get_label() == label]
      np.testing.assert_allclose(thick.get_ydata(), profile.attention[name][layer].mean(axis=0))
    thin = [line.get_ydata() for line in axes.lines if line.get_linewidth() < 1]
    np.testing.assert_allclose(thin[0], profile.attention["first_order"][layer, 0])
    assert len(thin) == 4
  [even] = [line for line in drawings["attention_entropy"].figure.axes[0].lines if line.get_label() == "even weights"]
  np.testing.assert_allclose(even.get_ydata(), np.log2(even.get_xdata()))
  for drawing in drawings.values():
    for axes in drawing.figure.axes:  # all lines are within the limits
      top = max(np.nanmax(line.get_ydata()) for line in axes.lines)
      assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= top


def test_drawings_have_the_same_bytes_each_time(trained, histories):
  model = change(trained, "value")
  make = lambda: [to_svg(drawing) for drawing in maps.map_drawings(model, histories, 0) +  # noqa: E731
                  maps.profile_drawings(attention.measure_profile(model, histories, 5), True)]
  assert make() == make()


@pytest.mark.parametrize("most, gap, expected", [
    (1.0, 0.12, [0.02, 0.1, 0.2, 0.5, 1.0]), (0.9, 0.3, [0.1, 0.5]), (0.03, 0.3, [0.005, 0.02])])
def test_ticks_are_round_and_apart(most, gap, expected):
  np.testing.assert_allclose(maps._ticks(most, gap), expected)


def test_many_heads_take_several_figures(trained, histories, monkeypatch):
  monkeypatch.setattr(maps, "HEADS", 1)
  drawings = maps.map_drawings(trained, histories, 6)
  assert [drawing.key for drawing in drawings] == [
      f"attention_layer{layer}_heads{head}to{head}" for layer in (1, 2) for head in (1, 2)]
  assert jax.device_count() == 8  # as all of this runs where parameters lie on a mesh
