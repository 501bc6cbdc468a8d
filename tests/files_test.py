"""Recommendations from file to file: what stands in each form, and jobs that are cut off anywhere and go on."""

import contextlib
import csv
import gzip
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import tiny_config
from etils import epath

from awrsr_jax.engine.run_folder import lock_folder
from awrsr_jax.engine.train import train
from awrsr_jax.inference import files
from awrsr_jax.inference.files import Job, recommend_file, recommend_stream
from awrsr_jax.inference.trained import load

ROOT = pathlib.Path(__file__).parent.parent
TITLES = {"i1": 'Say "Hi", he said', "i2": "two\nlines", "i3": "Amélie, 天空の城 🏰", "i4": " blank ", "i5": "a\rb"}


def train_run(folder, are_numbers=False):
  """Trains for an epoch on a log with titles, and returns the run folder."""
  rng = np.random.default_rng(0)
  rows = [(f"u{user}", item if are_numbers else f"i{item}", at, TITLES.get(f"i{item}"))
          for user in range(40) for at, item in enumerate(rng.integers(1, 31, 8).tolist())]
  pandas.DataFrame(rows, columns=["user", "item", "time", "title"]).to_parquet(folder / "log.parquet")
  config = tiny_config.get_config()
  config.data.name, config.data.path, config.train.epochs = "", str(folder / "log.parquet"), 1
  train(config, folder / "run")
  return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return train_run(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(run):
  return load(run)


@pytest.fixture(scope="module")
def histories():
  """Of all kinds: long, with repeats, unknown items and nothing at all; every third one has no name."""
  rng = np.random.default_rng(1)
  found = []
  for number, length in enumerate(rng.integers(0, 30, 45).tolist()):
    items = [f"i{item}" for item in rng.integers(1, 34, length)]
    found.append({"items": items} if number % 3 == 0 else {"user": f"ü{number}" if number % 3 == 1 else number,
                                                           "items": items})
  return found


@pytest.fixture
def source(histories, tmp_path):
  return write(tmp_path / "h.jsonl", histories)


def write(path, histories):
  path.write_text("".join(json.dumps(history) + "\n" for history in histories))
  return str(path)


@pytest.fixture
def small(monkeypatch):
  """Parts of 8 histories."""
  monkeypatch.setattr(files, "PART", 8)


def read_jsonl(out):
  text = gzip.open(out, "rt", newline="") if str(out).endswith(".gz") else open(out, newline="")
  with text:
    return [json.loads(line) for line in text]


def expect(trained, histories, **options):
  """(user or place, [(rank, item, score, title)]) by the function that is not of files."""
  found = trained.recommend([history["items"] for history in histories], **options)
  return [(history.get("user", place), [(rank, *one) for rank, one in enumerate(rows, start=1)])
          for place, (history, rows) in enumerate(zip(histories, found, strict=True), start=1)]


def assert_close(scores, others):
  """Batches of other sizes add in another order."""
  np.testing.assert_allclose(scores, others, rtol=1e-4, atol=1e-5)


def rows_of(expected):
  return [(user, *row) for user, rows in expected for row in rows]


@pytest.mark.parametrize("name, job", [
    ("o.jsonl", Job(k=4)), ("o.jsonl.gz", Job(k=30, deny=("i1",))), ("O.NDJSON", Job(exclude_seen=False,
                                                                                  allow=("i1", "i3")))])
def test_json_lines_hold_what_recommend_gives(name, job, trained, histories, source, small, tmp_path):
  counts = recommend_file(trained, source, str(tmp_path / name), job, {})
  unknown = [sum(int(raw[1:]) > 30 for raw in history["items"]) for history in histories]
  without = sum(length == len(history["items"]) for length, history in zip(unknown, histories, strict=True))
  assert (counts.histories, counts.unknown, counts.without) == (45, sum(unknown), without) and without > 1
  expected = expect(trained, histories, k=job.k, exclude_seen=job.exclude_seen, allow=job.allow, deny=job.deny)
  found = read_jsonl(tmp_path / name)
  assert [line.get("unknown", 0) for line in found] == unknown
  assert [line.get("user") for line in found] == [history.get("user") for history in histories]
  for line, (_, rows) in zip(found, expected, strict=True):
    assert line["items"] == [item for _, item, _, _ in rows] and line["titles"] == [title for *_, title in rows]
    assert_close(line["scores"], [score for _, _, score, _ in rows])
  assert sorted(os.listdir(tmp_path)) == sorted([name, "h.jsonl"])


@pytest.mark.parametrize("name", ["o.csv", "o.csv.gz"])
def test_csv_holds_what_recommend_gives(name, trained, histories, source, small, tmp_path):
  recommend_file(trained, source, str(tmp_path / name), Job(k=9), {})
  expected = rows_of(expect(trained, histories, k=9))
  with gzip.open(tmp_path / name, "rt", newline="") if name.endswith(".gz") else open(tmp_path / name, newline="") as f:
    header, *found = csv.reader(f)
  assert header == ["user", "rank", "item", "score", "title"]
  assert [(user, rank, item, title) for user, rank, item, _, title in found] == [
      (str(user), str(rank), item, title) for user, rank, item, _, title in expected]
  assert_close([float(row[3]) for row in found], [row[3] for row in expected])
  assert {row[4] for row in found} >= set(TITLES.values())


@pytest.mark.parametrize("users", ["mixed", "numbers", "late text", "huge"])
def test_parquet_holds_what_recommend_gives(users, trained, histories, small, tmp_path):
  named = [dict(history) for history in histories]
  for place, history in enumerate(named):
    if users != "mixed":
      history["user"] = f"u{place}" if users == "late text" and place > 20 else place
  if users == "huge":
    named[1]["user"] = 2**70
  recommend_file(trained, write(tmp_path / "h.jsonl", named), str(tmp_path / "o.parquet"), Job(k=9), {})
  expected = rows_of(expect(trained, named, k=9))
  table = pyarrow.parquet.read_table(tmp_path / "o.parquet")
  assert table.column_names == list(files.COLUMNS)
  found = [table.column(name).to_pylist() for name in files.COLUMNS]
  form = int if users == "numbers" else str
  assert found[0] == [form(user) for user, *_ in expected]
  assert found[1] == [row[1] for row in expected] and found[2] == [row[2] for row in expected]
  assert [title or "" for title in found[4]] == [row[4] for row in expected]
  assert_close(found[3], [row[3] for row in expected])
  assert list(map(str, table.schema.types)) == ["int64" if form is int else "string", "int32", "string", "float",
                                                "string"]


def test_ids_that_are_numbers_stay_numbers(tmp_path, small):
  trained = load(train_run(tmp_path, are_numbers=True))
  histories = [{"user": number, "items": [number, str(number + 1)]} for number in range(1, 20)]
  source = write(tmp_path / "h.jsonl", histories)
  recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(k=2), {})
  recommend_file(trained, source, str(tmp_path / "o.parquet"), Job(k=2), {})
  expected = expect(trained, histories, k=2)
  assert [line["items"] for line in read_jsonl(tmp_path / "o.jsonl")] == [[row[1] for row in rows]
                                                                          for _, rows in expected]
  assert pandas.read_parquet(tmp_path / "o.parquet").item.tolist() == [row[2] for row in rows_of(expected)]
  assert all(type(item) is int for line in read_jsonl(tmp_path / "o.jsonl") for item in line["items"])


def test_a_stream_gives_the_same_as_a_file(trained, histories, source, small, tmp_path, monkeypatch):
  monkeypatch.setattr(files, "AT_ONCE", 7)
  recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(k=3), {})
  written = []
  counts = recommend_stream(trained, source, Job(k=3), {}, written.append)
  streamed = [json.loads(line) for line in "".join(written).splitlines()]
  for line, other in zip(streamed, read_jsonl(tmp_path / "o.jsonl"), strict=True):
    assert_close(line.pop("scores"), other.pop("scores"))
    assert line == other
  assert counts.histories == 45 and len(written) == 7
  text = []
  recommend_stream(trained, source, Job(k=3), {}, text.append, "text")
  assert "history 1: 1" in "".join(text) and "user ü1: " in "".join(text)


def test_scores_in_text_are_the_float32_numbers_themselves():
  rng = np.random.default_rng(0)
  scores = np.concatenate([rng.normal(size=999), rng.normal(size=999) * 1e-12, -rng.random(99) * 1e30, [0, 1, -3]])
  scores = scores.astype(np.float32)
  np.testing.assert_array_equal(np.array(list(map(float, files._digits(scores)))).astype(np.float32), scores)


def test_scores_of_the_same_batches_are_the_same_to_the_last_bit(trained, histories, source, tmp_path):
  expected = np.array([row[3] for row in rows_of(expect(trained, histories, k=4))], np.float32)
  for name in ("o.jsonl", "o.csv", "o.parquet"):
    recommend_file(trained, source, str(tmp_path / name), Job(k=4), {})
  found = {"o.jsonl": np.concatenate([line["scores"] for line in read_jsonl(tmp_path / "o.jsonl")]),
           "o.csv": pandas.read_csv(tmp_path / "o.csv", lineterminator="\n").score,
           "o.parquet": pandas.read_parquet(tmp_path / "o.parquet").score}
  for scores in found.values():
    np.testing.assert_array_equal(np.asarray(scores, np.float32), expected)


def test_an_explanation_goes_with_every_line(trained, tmp_path):
  source = write(tmp_path / "h.jsonl", [["i1", "i2", "i9"], [], ["i7", "no"]])
  recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(k=2, explain=True), {})
  first, empty, last = read_jsonl(tmp_path / "o.jsonl")
  assert first["explanation"]["history"] == ["i1", "i2", "i9"] and last["explanation"]["history"] == ["i7"]
  assert np.shape(first["explanation"]["effects"]) == (2, 3) and "explanation" not in empty
  np.testing.assert_allclose(first["explanation"]["effects"], trained.explain(["i1", "i2", "i9"], k=2).effects,
                             atol=1e-4)


@pytest.mark.parametrize("listed, message", [
    ([["i1"]] * 12 + [{"user": "me", "items": ["i1", "x", "y"]}],
     r"history 13 \(user 'me'\) has 2 unknown items, such as \['x', 'y'\].* leave out --strict"),
    ([["i1"]] * 3 + [[]], "history 4 is empty"),
])
def test_strict_names_the_place_and_leaves_no_file(listed, message, trained, small, tmp_path):
  source = write(tmp_path / "h.jsonl", listed)
  with pytest.raises(ValueError, match=message):
    recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(strict=True), {})
  assert not (tmp_path / "o.jsonl").exists()
  recommend_file(trained, write(tmp_path / "h.jsonl", [["i1"]] * 13), str(tmp_path / "p.jsonl"), Job(strict=True), {})


@pytest.mark.parametrize("name, job, message", [
    ("o.txt", Job(), "o.txt must end in one of .jsonl"), ("jsonl", Job(), "must end in"),
    ("o.csv", Job(explain=True), "--explain has room in JSON lines only"),
    ("h.jsonl", Job(), "h.jsonl exists; remove it"), ("nowhere/o.jsonl", Job(), "lies in no folder"),
    ("h.jsonl/o.jsonl", Job(), "lies in no folder"), ("link.jsonl", Job(), "exists; remove it"),
    ("o.jsonl", Job(k=0), "k=0 must lie between 1 and the 30 items"), ("o.jsonl", Job(k=31), "k=31 must lie"),
    ("o.jsonl", Job(allow=("x",)), "leave none of the 30 items"),
    ("o.jsonl", Job(deny=("x",), strict=True), "deny holds 1 items that are not in the catalogue"),
])
def test_bad_jobs_are_refused_before_anything_is_written(name, job, message, trained, source, tmp_path):
  (tmp_path / "link.jsonl").symlink_to("nothing")
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(ValueError, match=message):
    recommend_file(trained, source, str(tmp_path / name), job, {})
  assert sorted(os.listdir(tmp_path)) == before


def test_a_bad_job_is_refused_before_its_input_is_read(trained, tmp_path):
  (tmp_path / "h.jsonl").write_text("no JSON\n")
  for call in (lambda job: recommend_file(trained, str(tmp_path / "h.jsonl"), str(tmp_path / "o.jsonl"), job, {}),
               lambda job: recommend_stream(trained, str(tmp_path / "h.jsonl"), job, {}, print)):
    with pytest.raises(ValueError, match="k=0 must lie"):
      call(Job(k=0))
    with pytest.raises(ValueError, match="leave none"):
      call(Job(allow=("x",)))


@pytest.mark.parametrize("text, message", [("", "holds no histories"), ("\n\n", "holds no histories"),
                                           ('["i1"]\n[1.5]\n', "h.jsonl:2")])
def test_bad_input_leaves_nothing(text, message, trained, small, tmp_path):
  (tmp_path / "h.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    recommend_file(trained, str(tmp_path / "h.jsonl"), str(tmp_path / "o.jsonl"), Job(), {})
  with pytest.raises(ValueError, match=message):
    recommend_stream(trained, str(tmp_path / "h.jsonl"), Job(), {}, lambda text: None)
  assert os.listdir(tmp_path) == ["h.jsonl"]


def test_a_folder_that_cannot_be_written(trained, source, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="--output=/proc/.*cannot be written"):  # even root cannot
    recommend_file(trained, source, "/proc/o.jsonl", Job(), {})
  monkeypatch.setattr(os, "access", lambda *args: False)
  with pytest.raises(ValueError, match="cannot be written: no permission in"):
    files.check_output(str(tmp_path / "o.jsonl"), False)


# Cut off, and on again -----------------------------------------------------------------------------------------------


class Cut(BaseException):
  """The process ends here."""


def cutting(function, cut, after):
  """Returns a function that ends the process at a call, before or after it does what it does."""
  calls = []

  def cut_off(*args):
    calls.append(args)
    if len(calls) == cut + 1 and not after:
      raise Cut
    function(*args)
    if len(calls) == cut + 1:
      raise Cut

  return cut_off


def count_histories(trained, monkeypatch):
  """Returns a list that grows by the number of histories of every call of the model."""
  seen, top = [], type(trained).top
  monkeypatch.setattr(type(trained), "top", lambda self, numbered, *args, **options: (
      seen.append(len(numbered)), top(self, numbered, *args, **options))[1])
  return seen


@pytest.mark.parametrize("name, cuts", [("o.jsonl", range(14)), ("o.csv.gz", (4, 13)), ("o.parquet", (4, 13))])
@pytest.mark.parametrize("after", [False, True])
def test_a_job_that_is_cut_at_any_rename_goes_on_to_the_same_bytes(name, cuts, after, trained, source, small, tmp_path,
                                                                   monkeypatch):
  """45 histories are 6 parts: the state is written 7 times, each part once, and the whole is renamed."""
  (tmp_path / "whole").mkdir()
  recommend_file(trained, source, str(tmp_path / "whole" / name), Job(k=3), {})
  expected = (tmp_path / "whole" / name).read_bytes()
  out, replace = tmp_path / name, os.replace
  for cut in cuts:
    with monkeypatch.context() as patch, pytest.raises(Cut):
      patch.setattr(os, "replace", cutting(replace, cut, after))
      patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as little as where a process is killed
      recommend_file(trained, source, str(out), Job(k=3), {})
    assert out.exists() == (after and cut == 13)
    out.unlink(missing_ok=True)
    done = (cut - (not after)) // 2 if cut else 0
    with monkeypatch.context() as patch:
      seen = count_histories(trained, patch)
      counts = recommend_file(trained, source, str(out), Job(k=3), {})
    assert out.read_bytes() == expected and counts.histories == 45
    assert sum(seen) == 45 - min(8 * done, 45)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "h.jsonl", "whole"])
    out.unlink()


def test_a_folder_of_parts_that_went_by_half_is_not_gone_on_from(trained, source, small, tmp_path, monkeypatch):
  out, removed = tmp_path / "o.jsonl", []

  def remove_some(folder, *args, **options):
    removed.append(folder)
    (pathlib.Path(folder) / "000001").unlink(missing_ok=True)
    raise Cut

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", remove_some)
    with pytest.raises(Cut):
      recommend_file(trained, source, str(out), Job(), {})
  expected = out.read_bytes()
  out.unlink()
  recommend_file(trained, source, str(out), Job(), {})
  assert out.read_bytes() == expected and removed


def cut_after_two_parts(trained, source, out, job, monkeypatch):
  """Leaves the first two parts of a job in OUT.partial."""
  write_bytes, written = files.write_bytes, []

  def cut_off(*args):
    if len(written) == 2:
      raise Cut
    written.append(write_bytes(*args))

  with monkeypatch.context() as patch, pytest.raises(Cut):
    patch.setattr(files, "write_bytes", cut_off)
    recommend_file(trained, source, str(out), job, {})


def test_parts_of_another_job_are_not_taken(run, trained, histories, source, small, tmp_path, monkeypatch):
  out, job = tmp_path / "o.jsonl", Job(k=3, allow=("i1", "i2"))
  cut_after_two_parts(trained, source, out, job, monkeypatch)
  before = sorted(os.listdir(tmp_path / "o.jsonl.partial"))
  other = load(shutil.copytree(run, tmp_path / "run2"))
  other.record["checksums"] = {**other.record["checksums"], "x": "y"}
  for changed, model, message in ((Job(k=4, allow=job.allow), trained, "--k differ"),
                                  (Job(k=3, allow=("i1", "i3")), trained, "--allow differ"),
                                  (Job(k=3), trained, "--allow differ"), (job, other, "checkpoint differ")):
    with pytest.raises(ValueError, match=f"o.jsonl.partial is left of another job .*{message}.*; remove it"):
      recommend_file(model, source, str(out), changed, {})
  with pytest.raises(ValueError, match="columns differ"):
    recommend_file(trained, source, str(out), job, {"user": "user"})
  stat = os.stat(source)
  write(tmp_path / "h.jsonl", histories[:-1])
  with pytest.raises(ValueError, match="--input differ"):
    recommend_file(trained, source, str(out), job, {})
  write(tmp_path / "h.jsonl", histories)
  os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert sorted(os.listdir(tmp_path / "o.jsonl.partial")) == before  # refusing has changed nothing
  seen = count_histories(trained, monkeypatch)
  recommend_file(trained, source, str(out), job, {})
  assert sum(seen) == 45 - 16 and len(read_jsonl(out)) == 45


def test_a_job_without_parts_is_in_nobodys_way(trained, source, small, tmp_path):
  (tmp_path / "o.jsonl.partial").mkdir()
  (tmp_path / "o.jsonl.partial" / "job.json").write_text(json.dumps({"job": {"--k": 77}, "counts": {"histories": 0}}))
  recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(), {})
  assert len(read_jsonl(tmp_path / "o.jsonl")) == 45


def test_standard_input_starts_over(trained, histories, source, small, tmp_path, monkeypatch):
  out = tmp_path / "o.jsonl"
  cut_after_two_parts(trained, source, out, Job(), monkeypatch)
  (tmp_path / "o.jsonl.partial" / "junk").touch()
  monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": open(source, "rb"), "isatty": lambda self: False})())
  recommend_file(trained, "-", str(out), Job(), {})
  assert [line.get("user") for line in read_jsonl(out)] == [history.get("user") for history in histories]
  assert not (tmp_path / "o.jsonl.partial").exists()


def test_a_job_in_use_is_refused(trained, source, small, tmp_path):
  with lock_folder(epath.Path(tmp_path / "o.jsonl.partial")):
    with pytest.raises(ValueError, match="o.jsonl.partial is in use by another process"):
      recommend_file(trained, source, str(tmp_path / "o.jsonl"), Job(), {})
  assert (tmp_path / "o.jsonl.partial").exists()


@contextlib.contextmanager
def largest_file(size):
  """A file may not grow beyond a size, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "o.parquet"])
@pytest.mark.parametrize("size", [50, 2500, 10_000])  # too little for the state, for a part, for the whole
def test_a_full_disk_is_one_clear_error(name, size, trained, histories, small, tmp_path, monkeypatch):
  source, out = write(tmp_path / "h.jsonl", histories * (4 if name == "o.parquet" else 1)), tmp_path / name
  trained.recommend([["i1"]] * 8)
  with largest_file(size), pytest.raises(ValueError, match=f"--output=.*{name} cannot be written: .*File too large"
                                         ) as caught:
    recommend_file(trained, source, str(out), Job(k=30), {})
  assert (size == 10_000) == ("and the same command goes on there" in str(caught.value))
  assert not out.exists() and (size == 10_000) == (tmp_path / f"{name}.partial").exists()
  counts = recommend_file(trained, source, str(out), Job(k=30), {})
  assert out.exists() and counts.histories in (45, 180) and not (tmp_path / f"{name}.partial").exists()


DRIVER = """
import sys, time, jax
jax.config.update("jax_platforms", "cpu"); jax.config.update("jax_num_cpu_devices", 8)
from awrsr_jax.inference import files
from awrsr_jax.inference.trained import load
files.PART, write = 8, files.write_bytes
files.write_bytes = lambda *args: (write(*args), time.sleep(0.02))
trained = load(sys.argv[1])
print("ready", flush=True)
print(files.recommend_file(trained, sys.argv[2], sys.argv[3], files.Job(k=3), {}))
"""


def test_a_job_that_is_killed_goes_on(run, trained, histories, small, tmp_path, monkeypatch):
  """Twice at random moments; another process is refused meanwhile."""
  source, out = write(tmp_path / "h.jsonl", histories * 30), tmp_path / "o.jsonl"
  recommend_file(trained, source, str(tmp_path / "whole.jsonl"), Job(k=3), {})
  state, done = tmp_path / "o.jsonl.partial" / "job.json", 0
  for seed in range(2):
    job = subprocess.Popen([sys.executable, "-c", DRIVER, str(run), source, str(out)], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE)
    assert job.stdout.readline() == "ready\n"
    while not state.exists() or json.loads(state.read_text())["counts"]["histories"] <= done:
      assert job.poll() is None
      time.sleep(0.01)
    with pytest.raises(ValueError, match="in use by another process"):
      recommend_file(trained, source, str(out), Job(k=3), {})
    time.sleep(random.Random(seed).random() * 0.5)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate(timeout=60)
    done = json.loads(state.read_text())["counts"]["histories"]
    assert 0 < done < 45 * 30 and not out.exists()
  seen = count_histories(trained, monkeypatch)
  counts = recommend_file(trained, source, str(out), Job(k=3), {})
  assert counts.histories == 45 * 30 and sum(seen) == 45 * 30 - done
  assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# Size and devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o.jsonl", "o.parquet"])
def test_memory_does_not_grow_with_the_parts(name, trained, histories, tmp_path, monkeypatch):
  monkeypatch.setattr(files, "PART", 45)
  source = write(tmp_path / "h.jsonl", histories * 40)
  held, write_json = [], files.write_json

  def measure(*args):
    write_json(*args)
    held.append(tracemalloc.get_traced_memory()[0])

  monkeypatch.setattr(files, "write_json", measure)
  recommend_file(trained, write(tmp_path / "few.jsonl", histories), str(tmp_path / f"few.{name}"), Job(), {})
  held.clear()
  tracemalloc.start()
  try:
    recommend_file(trained, source, str(tmp_path / name), Job(), {})
  finally:
    tracemalloc.stop()
  assert len(held) == 41 and max(held[-10:]) < max(held[5:15]) + 100_000  # a part of 45 histories is some 30 kB of text


def test_any_layout_of_devices_gives_the_same(run, histories, source, tmp_path):
  found = {}
  for model in (1, 2, 8):
    trained = load(run, model_devices=model)
    assert trained.mesh.shape == {"data": 8 // model, "model": model}
    recommend_file(trained, source, str(tmp_path / f"{model}.jsonl"), Job(k=5), {})
    found[model] = read_jsonl(tmp_path / f"{model}.jsonl")
  for model in (2, 8):
    for line, other in zip(found[model], found[1], strict=True):
      np.testing.assert_allclose(line["scores"], other["scores"], atol=1e-6)
      assert line["items"] == other["items"] and line.get("user") == other.get("user")
