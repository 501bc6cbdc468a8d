"""Statistics of a log, by hand and against loops over all rows; warnings; the report; the command that prints it."""

import collections
import json
import pathlib
import re
import subprocess
import sys
import types

import duckdb
import numpy as np
import pytest
from absl import app

from awrsr_jax import describe
from awrsr_jax.config import default
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import log as logs
from awrsr_jax.data import prepared, rules, statistics
from awrsr_jax.data.log import Interactions

ROOT = pathlib.Path(__file__).parent.parent
# User 1 has items 7 7 8 7 9 at times 1 1 2 5 6, user 2 has 8 7 8 at 0 1 1, user 3 has 7 at 9.
BY_HAND = [(1, 9, 6), (2, 8, 0), (1, 7, 1), (3, 7, 9), (2, 7, 1), (1, 7, 1), (1, 8, 2), (2, 8, 1), (1, 7, 5)]
CSV = "user,item,time\n" + "".join(f"{user},{item},{time}\n" for user, item, time in BY_HAND)
# Everything that `warn` looks at, so that it says nothing.
QUIET = {
    "read": {"rows": 1100, "bad_rows": 0, "low_ratings": 40, "taken_out": 60}, "users": 50, "items": 200,
    "interactions": 1000, "repeats": {"interactions": 0, "immediate": 0}, "ties": {"neighbours": 50, "share": 0.05},
    "popularity": {"top_1_percent": 0.5, "top_10_percent": 0.9, "gini": 0.5, "once": 9, "histogram": {}},
    "later_training": 0.0, "never_trained": 0,
    "beyond_max_length": {"max_length": 50, "histories": 3, "interactions": 0},
}


def measure(rows, read=None, is_refused=False, **settings):
  """Returns the statistics of (user, item) or (user, item, time) rows under `config.data`, and the corpus and its rows.

  Rows come as user -> their (item, time), oldest first, in a plain dict.
  """
  users, items, *times = (np.array(column) for column in zip(*rows, strict=True))
  data = default().data
  data.update_from_flattened_dict(settings)
  with logs.open_database() as database:
    log = logs.put(database, Interactions(users, items, times[0] if times else None, {}, "rows"))
    found = logs.clean(log, None, "error")
    rules.apply_rules(database, data, "rows")
    corpus = None if is_refused else corpora.number(database, log, found, data)
    histories = collections.defaultdict(list)
    for user, item, time in database.execute("SELECT user, item, time FROM coded ORDER BY user, time, row").fetchall():
      histories[user].append((item, time))
    return statistics.measure(database, corpus, data, read or found), corpus, histories


def test_every_statistic_by_hand():
  read = {"rows": 20, "bad_rows": 2, "low_ratings": 5}
  found, _, _ = measure(BY_HAND, read, is_refused=True)
  assert found == {
      "read": {"rows": 20, "bad_rows": 2, "low_ratings": 5, "taken_out": 4}, "users": 3, "items": 3, "interactions": 9,
      "lengths": {"min": 1, "quartiles": [2.0, 3.0, 4.0], "max": 5, "mean": 3.0,
                  "histogram": {"1": 1, "2-3": 1, "4-7": 1}},
      "times": {"oldest": 0, "newest": 9, "from": "0", "to": "9"},
      "repeats": {"interactions": 3, "immediate": 1},
      "ties": {"neighbours": 2, "share": 2 / 6},
      "popularity": {"top_1_percent": 5 / 9, "top_10_percent": 5 / 9, "gini": pytest.approx(8 / 27, abs=1e-15),
                     "once": 1, "histogram": {"1": 1, "2-3": 1, "4-7": 1}},
      # Targets are at 6 and at 1 (user 3 has none). Training is at 1, 1, 2 and 0: one of four is later than the second.
      "later_training": 1 / 8, "never_trained": None, "beyond_max_length": None}
  assert json.loads(json.dumps(found)) == found and set(read) == {"rows", "bad_rows", "low_ratings"}


@pytest.mark.parametrize("part", [1 << 22, 40])
@pytest.mark.parametrize("seed", range(4))
def test_every_statistic_equals_a_loop(seed, part, monkeypatch):
  monkeypatch.setattr(statistics, "SLICE", part)
  rng = np.random.default_rng(seed)
  size = 300
  times = rng.integers(-5, 60, size) / (4 if seed % 2 else 1)  # real and whole numbers
  items = 1 + (150 * rng.random(size) ** 3).astype(int)
  rows = list(zip(rng.integers(1, 40, size).tolist(), items.tolist(),
                  times.astype(float if seed % 2 else int).tolist(), strict=True))
  found, corpus, histories = measure(rows, k_core=3 if seed < 3 else 0, is_refused=seed == 3, max_length=4)
  lengths = [len(history) for history in histories.values()]
  total = sum(lengths)
  assert (found["users"], found["interactions"]) == (len(histories), total)
  assert found["read"]["taken_out"] == size - total
  assert found["lengths"]["mean"] == total / len(lengths) and found["lengths"]["quartiles"][1] == np.median(lengths)

  repeats = immediate = ties = 0
  training, targets, trained_items, beyond = [], [], set(), []
  for history in histories.values():
    for at in range(1, len(history)):
      repeats += history[at][0] in [item for item, _ in history[:at]]
      immediate += history[at][0] == history[at - 1][0]
      ties += history[at][1] == history[at - 1][1]
    training += [time for _, time in history[:-2]]
    trained_items |= {item for item, _ in history[:-2]}
    beyond.append(max(len(history) - 2 - 5, 0))
    targets += [history[-1][1]] if len(history) > 2 else []
  assert found["repeats"] == {"interactions": repeats, "immediate": immediate} and repeats > immediate > 0
  assert found["ties"] == {"neighbours": ties, "share": ties / (total - len(lengths))} and ties
  later = np.mean([np.mean([time > target for time in training]) for target in targets])
  assert found["later_training"] == pytest.approx(later, rel=1e-12) and 0 < later < 1

  counts = collections.Counter(item for history in histories.values() for item, _ in history)
  popular = sorted(counts.values(), reverse=True)
  assert found["items"] == len(counts) and found["popularity"]["once"] == popular.count(1)
  for percent in (1, 10):
    top = popular[:-(-len(popular) * percent // 100)]
    assert found["popularity"][f"top_{percent}_percent"] == sum(top) / total
  apart = sum(abs(a - b) for a in popular for b in popular) / (2 * len(popular) * total)  # the definition
  assert found["popularity"]["gini"] == pytest.approx(apart, rel=1e-12)
  for values, histogram in ((lengths, found["lengths"]["histogram"]), (popular, found["popularity"]["histogram"])):
    edges = [(*map(int, label.split("-")),) for label in histogram]
    assert [sum(edge[0] <= value <= edge[-1] for value in values) for edge in edges] == list(histogram.values())
    assert sum(histogram.values()) == len(values)
  if corpus is None:
    assert found["never_trained"] is None and found["beyond_max_length"] is None
  else:
    assert found["never_trained"] == len(counts.keys() - trained_items)
    assert found["beyond_max_length"] == {"max_length": 4, "histories": sum(map(bool, beyond)),
                                          "interactions": sum(beyond)}
    assert sum(beyond) and corpus.num_interactions == total


def test_a_log_without_times_has_no_ties_and_no_leakage():
  found, _, _ = measure([(1, 5), (1, 5), (1, 6), (2, 5), (2, 6), (2, 5)])
  assert found["times"] is None and found["ties"] is None and found["later_training"] is None
  assert found["repeats"] == {"interactions": 2, "immediate": 1}  # in the order of rows
  assert "times         none: rows are in the order of time\nties          no times\n" in statistics.render(
      found, {"rules": {}, "description": None, "padding": None})


def test_times_that_are_dates_are_shown_as_dates():
  found, _, _ = measure([(1, 5, 1_700_000_000), (1, 6, 1_700_086_400), (1, 5, 1_700_000_000)])
  assert found["times"] == {"oldest": 1_700_000_000, "newest": 1_700_086_400, "from": "2023-11-14 22:13",
                            "to": "2023-11-15 22:13"}


def test_histograms_are_cut_at_powers_of_two_and_begin_where_something_is():
  rows = [(user, item) for item, count in enumerate([2, 3, 4, 7, 8, 64, 127, 128], start=1) for user in range(count)]
  found, _, _ = measure(rows, is_refused=True)
  assert list(found["popularity"]["histogram"].items()) == [
      ("2-3", 2), ("4-7", 2), ("8-15", 1), ("16-31", 0), ("32-63", 0), ("64-127", 2), ("128-255", 1)]


def test_leakage_depends_on_the_split():
  rows = [(user, item, user + item) for user in range(1, 30) for item in range(1, 7)]
  assert measure(rows)[0]["later_training"] > 0.2
  assert measure(rows, **{"split.name": "time", "split.valid_from": "20", "split.test_from": "30"})[0][
      "later_training"] == 0
  assert measure(rows, **{"split.name": "users", "split.valid_share": 0.3, "split.test_share": 0.3})[0][
      "later_training"] is None
  assert measure([(1, 5, 1), (1, 6, 2)], is_refused=True)[0]["later_training"] is None  # no targets


@pytest.mark.parametrize("settings, expected", [
    # Training parts have 1, 5 and 6 items; n inputs and one target fit.
    ({"max_length": 3}, {"max_length": 3, "histories": 2, "interactions": 3}),
    ({"max_length": 4}, {"max_length": 4, "histories": 1, "interactions": 1}),
    ({"max_length": 5}, {"max_length": 5, "histories": 0, "interactions": 0}),
    ({"max_length": 3, "long_history": "windows"}, {"max_length": 3, "histories": 2, "interactions": 0}),
])
def test_what_does_not_fit_into_a_row(settings, expected):
  rows = [(user, item) for user, length in enumerate([3, 7, 8]) for item in range(length)]
  assert measure(rows, **settings)[0]["beyond_max_length"] == expected


def test_nothing_is_warned_of_without_reason():
  assert statistics.warn(QUIET) == []
  assert statistics.warn(QUIET | {"ties": None, "later_training": None, "never_trained": None,
                                  "beyond_max_length": None}) == []


@pytest.mark.parametrize("change, words", [
    ({"read": QUIET["read"] | {"bad_rows": 7}}, ["7 of 1,100 rows are bad", "--config.data.on_bad_row=error"]),
    ({"ties": {"neighbours": 51, "share": 0.051}}, ["5.1% of neighbours", "order of the source's rows"]),
    ({"repeats": {"interactions": 20, "immediate": 1}}, ["20 interactions (2.0%)", "except the target",
                                                         "--config.data.duplicates=first"]),
    ({"later_training": 0.123}, ["12.3% of the training interactions", "--config.data.split.name=time"]),
    ({"beyond_max_length": {"max_length": 50, "histories": 3, "interactions": 40}},
     ["40 interactions (4.0%) are never trained on", "3 histories", "--config.data.max_length=50",
      "--config.data.long_history=windows"]),
    ({"never_trained": 2}, ["2 of 200 items are never trained on", "--config.data.k_core"]),
    ({"popularity": QUIET["popularity"] | {"top_1_percent": 0.51}}, ["51.0% of interactions", "most popular 2 items"]),
    ({"popularity": QUIET["popularity"] | {"top_1_percent": 0.51}, "items": 100}, ["most popular item:"]),
])
def test_each_warning_has_its_numbers_and_its_way_out(change, words):
  warning, = statistics.warn(QUIET | change)
  assert [word for word in words if word not in warning] == [] and not warning.endswith(".")


def test_the_report_by_hand():
  found, _, _ = measure(BY_HAND, is_refused=True)
  split = {"words": "in two", "training": 4000, **{part: {"targets": 2, "new_users": 1, "new_items": 0}
                                                   for part in ("valid", "test")}}
  text = statistics.render(found, {
      "rules": {"duplicates": "keep", "k_core": 2, "max_history": 0, "min_rating": None, "split.name": "leave_one_out"},
      "description": {"fingerprint": "abc", "split": split},
      "padding": [{"buckets": 1, "lengths": [50], "share": 0.5}, {"buckets": 2, "lengths": [5, 50], "share": 0.0625}]})
  assert text == """\
rows          9 read, 0 bad, 0 rated too low, 0 taken out by other rules
rules         k_core=2
users         3
items         3; 1 occur once
interactions  9; density 100.000%
lengths       min 1, quartiles 2 / 3 / 4, max 5, mean 3.00
times         0 to 9
ties          2 (33.3% of neighbours)
repeats       3 (33.3%), 1 of them right after the same item
popularity    top 1% of items: 55.6% of interactions, top 10%: 55.6%; Gini 0.296
leakage       12.5% of training interactions are later than a test target
fingerprint   abc
split         in two
  training    4,000 interactions
  valid       2 targets; 1 of their users, 0 of their items never trained on
  test        2 targets; 1 of their users, 0 of their items never trained on
padding       50.0% with 1 bucket: 50
               6.2% with 2 buckets: 5, 50

history lengths (users)
    1  1 ████████████████████████████████████████
  2-3  1 ████████████████████████████████████████
  4-7  1 ████████████████████████████████████████

interactions of an item (items)
    1  1 ████████████████████████████████████████
  2-3  1 ████████████████████████████████████████
  4-7  1 ████████████████████████████████████████"""


def test_bars_are_in_proportion_and_lines_fit_the_page():
  found, _, _ = measure(BY_HAND, is_refused=True)
  found["lengths"]["histogram"] = {"1": 123_456_789, "2-3": 61_728_395, "4-7": 1, "8-15": 0, "1048576-2097151": 2}
  found |= {"interactions": 10 ** 9, "users": 10 ** 8, "items": 10 ** 8, "read": dict.fromkeys(found["read"], 10 ** 9)}
  split = {"words": "a split of many words " * 9, "training": 10 ** 9, **{
      part: dict.fromkeys(("targets", "new_users", "new_items"), 10 ** 8) for part in ("valid", "test")}}
  lines = statistics.render(found, {"rules": {}, "description": {"fingerprint": "f" * 64, "split": split}, "padding": [
      {"buckets": 8, "lengths": [10_000] * 8, "share": 0.123}]}).splitlines()
  assert max(map(len, lines)) <= 100 and "rules         none" in lines
  first = lines.index("history lengths (users)") + 1
  assert [line.count("█") for line in lines[first:first + 5]] == [40, 21, 1, 0, 1]  # rounded up: only 0 has none
  assert len({len(line.rstrip("█ ")) for line in lines[first:first + 5]}) == 1


def describe_text(tmp_path, text, file="log.csv", **settings):
  """Writes a log, and describes it."""
  path = tmp_path / file
  path.write_text(text)
  config = default()
  config.data.update_from_flattened_dict(settings)
  return describe.describe(config, str(path))


def make_csv(users=30):
  """Returns histories of 3 to 12 items; their times overlap."""
  return "user,item,time\n" + "".join(f"{user},{(user * user + k * k) % 11},{10 * user + 7 * k}\n"
                                      for user in range(users) for k in range(3 + user % 10))


def test_padding_by_hand(tmp_path):
  # Training parts of 1, 3, 4 and 7 items give no row, and rows of 2, 3 and 5 inputs, the most there may be.
  text = "".join(f"{user} {' '.join(map(str, range(1, length + 1)))}\n" for user, length in enumerate([3, 5, 6, 9], 1))
  found = describe_text(tmp_path, text, "log.txt", max_length=5)
  assert found["padding"] == [
      {"buckets": 1, "lengths": [5], "share": 1 - 10 / 15}, {"buckets": 2, "lengths": [3, 5], "share": 1 - 10 / 11},
      {"buckets": 4, "lengths": [2, 3, 5], "share": 0}, {"buckets": 8, "lengths": [2, 3, 5], "share": 0}]
  assert found["statistics"]["beyond_max_length"] == {"max_length": 5, "histories": 1, "interactions": 1}


@pytest.mark.parametrize("settings, reason", [
    ({}, "training refuses this log: .*log.csv: 1 of 3 users have fewer than 3 interactions .*--config.data.k_core=3"),
    ({"split.name": "time", "split.valid_from": "2024-01-31"}, "training refuses this log: .*2024-01-31 is a date"),
    ({"name": "ml-1m", "k_core": 2, "max_history": 3}, "training refuses this log: this is not the benchmark ml-1m"),
])
def test_what_training_refuses_is_described_too(settings, reason, tmp_path):
  found = describe_text(tmp_path, CSV, **settings)
  assert re.search(reason, found["warnings"][0])
  assert found["description"] is None and found["padding"] is None
  assert found["statistics"]["interactions"] == (6 if "k_core" in settings else 9)
  assert found["rules"]["max_history"] == settings.get("max_history", 0)
  assert "\nsplit" not in describe.render(found) and "\nwarnings: " in describe.render(found)


def test_rules_that_leave_nothing_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no users left after k-core 3"):
    describe_text(tmp_path, CSV, k_core=3, duplicates="first")


@pytest.mark.parametrize("error", [duckdb.OutOfMemoryException("full"), MemoryError()])
def test_a_log_larger_than_memory_is_sent_to_prepare(tmp_path, monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(describe.corpora, "read_log", fail)
  with pytest.raises(ValueError, match="a.csv: the log does not fit into memory.*awrsr_jax.prepare"):
    describe.describe(default(), str(tmp_path / "a.csv"))


def test_a_log_with_too_little_to_train_on_is_described_too(tmp_path):
  found = describe_text(tmp_path, "1 5 6 7\n2 6 5 7\n3 7 5 6\n", "log.txt")
  assert found["padding"] is None and found["description"]["users"] == 3
  assert found["warnings"][0].startswith("training refuses this log: ")
  assert "none of 3 users has 2 items to train on" in found["warnings"][0]


def test_the_config_says_what_to_read_where_no_path_does():
  config = default()
  config.data.name = "synthetic"
  config.data.synthetic.num_users = 50
  config.data.synthetic.num_items = 60
  found = describe.describe(config)
  assert found["statistics"]["users"] == found["description"]["users"] == 50
  assert found["warnings"] == statistics.warn(found["statistics"])
  with pytest.raises(ValueError, match="nothing to read .*--config.data.path"):
    describe.describe(default())


def test_the_config_given_stays_as_it_is(tmp_path):
  config = default()
  (tmp_path / "log.csv").write_text(CSV)
  describe.describe(config, str(tmp_path / "log.csv"))
  assert config.data.path == ""


@pytest.fixture(scope="module")
def folder_of_log(tmp_path_factory):
  """Returns a prepared folder (k_core=4), and what `describe` says of its source."""
  base = tmp_path_factory.mktemp("prepared")
  found = describe_text(base, make_csv(), k_core=4, max_length=6)
  data = default().data
  data.path, data.k_core, data.max_length = str(base / "log.csv"), 4, 50
  prepared.prepare(data, base / "made", 1 << 28)
  return base / "made", found


def test_a_prepared_folder_is_described_as_its_source(folder_of_log):
  folder, expected = folder_of_log
  config = default()
  config.data.max_length = 6  # not the one it was prepared with: what is left out follows the config
  found = describe.describe(config, str(folder))
  assert expected["statistics"]["beyond_max_length"]["interactions"] and expected["rules"]["k_core"] == 4
  assert found == expected
  assert json.loads(json.dumps(found)) == found
  config.data.k_core = 5
  with pytest.raises(ValueError, match="config.data.k_core: 4 there, 5 now"):
    describe.describe(config, str(folder))


def test_a_damaged_folder_is_named(folder_of_log):
  folder, _ = folder_of_log
  shard = next(folder.glob("*.array_record-*"))
  whole = shard.read_bytes()
  try:
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{shard.name} is not what it was when it was prepared"):
      describe.describe(default(), str(folder))
  finally:
    shard.write_bytes(whole)


def run_main(monkeypatch, *argv, as_json=False):
  """Runs the command after its flags are parsed."""
  monkeypatch.setattr(describe, "CONFIG", types.SimpleNamespace(value=default()), raising=False)
  monkeypatch.setattr(describe, "JSON", types.SimpleNamespace(value=as_json), raising=False)
  describe.main(["describe", *map(str, argv)])


def test_the_command_prints_the_report_and_its_warnings(tmp_path, monkeypatch, capsys):
  (tmp_path / "log.csv").write_text(make_csv())
  run_main(monkeypatch, tmp_path / "log.csv")
  text = capsys.readouterr().out
  assert text.startswith("rows          225 read, 0 bad,") and "\nsplit         leave-one-out\n" in text
  assert "\nwarnings: 2\n- " in text and "--config.data.duplicates=first" in text
  assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("argv, kind, message", [
    (["a.csv", "b.csv"], app.UsageError, r"unknown arguments \['b.csv'\]"),
    (["nowhere.csv"], SystemExit, "ValueError: no such file or folder: nowhere.csv"),
    ([], SystemExit, "ValueError: nothing to read"),
])
def test_wrong_arguments_are_one_clear_line(argv, kind, message, monkeypatch):
  with pytest.raises(kind, match=message):
    run_main(monkeypatch, *argv)


def test_the_command_itself(tmp_path):
  (tmp_path / "log.csv").write_text(CSV)
  command = [sys.executable, "-m", "awrsr_jax.describe", str(tmp_path / "log.csv"), "--json"]
  good, file, bad = (
      subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for flags in (["--config.data.max_history=4"], ["--config=configs/beauty.py", "--config.data.max_history=4"],
                    ["--config.data.kcore=5"]))
  for one in (good, file):
    printed, errors = one.communicate(timeout=120)
    assert one.returncode == 0, errors
    found = json.loads(printed)
    assert found["rules"]["max_history"] == 4 and found["statistics"]["lengths"]["max"] == 4
    assert found["warnings"][0].startswith("training refuses this log: ")
  _, errors = bad.communicate(timeout=120)
  assert errors.startswith("ValueError: --config.data.kcore: the config has no such key; did you mean data.k_core")
