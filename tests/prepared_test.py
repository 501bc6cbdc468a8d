"""Prepared corpora: the same corpus as in memory, read at random from files; faults, and TFDS."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pandas
import pytest

from awrsr_jax.config import default, finalize
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import prepared, records

ROOT = pathlib.Path(__file__).parent.parent


def write_log(path, rows=4000, users=150, items=60, seed=0):
  """Writes a CSV file of clicks with many equal times, and some users too short."""
  rng = np.random.default_rng(seed)
  pandas.DataFrame({"user": [f"u{user}" for user in rng.integers(0, users, rows)],
                    "item": [f"i{item}" for item in np.minimum(rng.geometric(0.05, rows), items)],
                    "time": rng.integers(0, 300, rows)}).to_csv(path, index=False)
  return str(path)


def make_config(path, **values):
  """Returns a finalized config on a path, with values at dotted keys."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in {
      "data__path": str(path), "data__k_core": 5, "data__max_length": 8, "data__buckets": 3, "train__batch_size": 16,
      "train__epochs": 3, "eval__batch_size": 16, **values}.items()})
  return finalize(config)


@pytest.fixture
def small_shards(monkeypatch):
  """Several shards and several chunks of a small corpus."""
  monkeypatch.setattr(records, "SHARD_BYTES", 1500)
  monkeypatch.setattr(corpora, "CHUNK", 700)


@pytest.fixture(scope="module")
def folder_of_log(tmp_path_factory):
  """A prepared folder, and its log."""
  folder = tmp_path_factory.mktemp("prepared")
  path = write_log(folder / "log.csv")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(records, "SHARD_BYTES", 4000)
    prepared.prepare(make_config(path).data, folder / "out", 2**28)
  return path, folder / "out"


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype


@pytest.mark.parametrize("values", [
    {}, {"data__split__name": "users"}, {"data__split__name": "time", "data__split__target": "all"},
    {"data__split__name": "time", "data__split__valid_from": "200", "data__split__test_from": "250"},
    {"data__duplicates": "first", "data__max_history": 9, "data__long_history": "windows"},
])
def test_a_prepared_corpus_is_the_one_in_memory(tmp_path, small_shards, values):
  path = write_log(tmp_path / "log.csv")
  config = make_config(path, **values)
  whole = prepared.load(config.data)
  made = prepared.prepare(config.data, tmp_path / "out", 2**28)
  assert len(made["shards"]) > 2
  config = make_config(tmp_path / "out", **values)
  streamed = prepared.load(config.data)
  assert streamed.description == whole.description and streamed.titles == whole.titles
  for name in ("offsets", "user_ids", "item_ids", "counts"):
    np.testing.assert_array_equal(getattr(streamed, name), getattr(whole, name))
  np.testing.assert_array_equal(np.asarray(streamed.items), whole.items)
  assert corpora.fingerprint(streamed) == corpora.fingerprint(whole) == whole.description["fingerprint"]
  first, second = (data_batches.training_batches(corpus, config) for corpus in (whole, streamed))
  assert len(first) == len(second) > 6
  for step in range(len(first)):
    assert_same(second[step], first[step])
  for split in ("valid", "test"):
    for got, expected in zip(data_batches.ranking_batches(streamed, config, split),
                             data_batches.ranking_batches(whole, config, split), strict=True):
      assert_same(got, expected)


def test_reading_like_an_array(folder_of_log):
  whole = prepared.load(make_config(folder_of_log[0]).data)
  corpus = prepared.load(make_config(folder_of_log[1]).data)
  rng = np.random.default_rng(0)
  assert isinstance(corpus.items, records.Records) and len(corpus.items) == len(whole.items)
  for _ in range(50):
    start, stop = sorted(rng.integers(0, len(whole.items) + 1, 2))
    np.testing.assert_array_equal(corpus.items[start:stop], whole.items[start:stop])
    places = rng.integers(0, len(whole.items), 20)
    np.testing.assert_array_equal(corpus.items[places], whole.items[places])
  for user in range(corpus.num_users):
    np.testing.assert_array_equal(corpus.history(user), whole.history(user))


def test_one_two_and_four_processes_see_the_same_global_batches_from_any_step(folder_of_log):
  config = make_config(folder_of_log[1])
  corpus = prepared.load(config.data)
  expected = data_batches.training_batches(corpus, config)
  for count in (2, 4):
    parts = [data_batches.training_batches(prepared.load(config.data), config, ((part,), count))
             for part in range(count)]
    start = len(expected) // 2 + 1  # in the middle of an epoch
    streams = [data_batches.stream(part, start) for part in parts]
    for step in range(start, len(expected)):
      found = [next(stream) for stream in streams]
      assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *found), expected[step])


def test_several_threads_read_at_once(folder_of_log):
  config = make_config(folder_of_log[1])
  batches = data_batches.training_batches(prepared.load(config.data), config)
  expected, wrong = [batches[step] for step in range(len(batches))], []

  def read(seed):
    for step in np.random.default_rng(seed).permutation(len(batches)):
      if not jax.tree.all(jax.tree.map(np.array_equal, batches[step], expected[step])):
        wrong.append(step)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_tfds_opens_the_folder(folder_of_log):
  import tensorflow_datasets as tfds
  whole = prepared.load(make_config(folder_of_log[0]).data)
  source = tfds.builder_from_directory(str(folder_of_log[1])).as_data_source("train")
  assert len(source) == whole.num_users
  for user in range(0, len(source), 7):
    assert source[user]["id"].decode() == whole.user_ids[user]
    np.testing.assert_array_equal(source[user]["items"], whole.history(user))
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("values, message", [
    ({"data__k_core": 3}, "config.data.k_core: 5 there, 3 now"),
    ({"data__split__name": "users"}, "split.name: leave_one_out there, users now.*split.seed: None there, 0 now"),
    ({"data__min_rating": 2.0}, "min_rating: None there, 2.0 now"),
])
def test_other_rules_than_those_of_the_folder_are_refused(folder_of_log, values, message):
  with pytest.raises(ValueError, match=f"was prepared by other rules: .*{message}.*Use the same"):
    prepared.load(make_config(folder_of_log[1], **values).data)
  prepared.load(make_config(folder_of_log[1], data__header="a,b").data)  # not read


def copy(folder_of_log, tmp_path):
  return pathlib.Path(shutil.copytree(folder_of_log[1], tmp_path / "copy"))


def test_damage_is_named_when_it_is_read(folder_of_log, tmp_path):
  folder = copy(folder_of_log, tmp_path)
  shard = sorted(folder.glob("*.array_record*"))[1]
  whole = shard.read_bytes()
  at = whole.index(b"items")
  shard.write_bytes(whole[:at + 12] + bytes([whole[at + 12] ^ 1]) + whole[at + 13:])
  corpus = prepared.load(make_config(folder).data)
  with pytest.raises(ValueError, match=f"{shard.name} is damaged: .*hash mismatch.*prepare the corpus again"):
    np.asarray(corpus.items)
  with pytest.raises(ValueError, match=f"{shard.name} is not what it was"):
    prepared.check_files(folder, prepared.read_manifest(folder), whole=True)
  shard.write_bytes(whole[:len(whole) // 2])
  with pytest.raises(ValueError, match=f"{shard.name} has .* bytes, and had {len(whole)}"):
    prepared.load(make_config(folder).data)
  shard.unlink()
  with pytest.raises(ValueError, match=f"{shard.name} is missing"):
    prepared.load(make_config(folder).data)


@pytest.mark.parametrize("name", ["users.parquet", "items.parquet", "split.npz", "features.json"])
def test_small_files_are_checked_when_opened(folder_of_log, tmp_path, name):
  folder = copy(folder_of_log, tmp_path)
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= 1
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match=f"{name} is not what it was when it was prepared"):
    prepared.load(make_config(folder).data)


def test_manifests_that_cannot_be_read_are_refused(folder_of_log, tmp_path):
  folder = copy(folder_of_log, tmp_path)
  made = json.loads((folder / "prepared.json").read_text())
  for content in ("", "{", "[]", json.dumps(made | {"schema": 99}), json.dumps({"schema": 1})):
    (folder / "prepared.json").write_text(content)
    with pytest.raises(ValueError, match="prepared.json cannot be read .*prepare the corpus again"):
      prepared.load(make_config(folder).data)
  (folder / "prepared.json").unlink()
  with pytest.raises(ValueError, match="is not a folder that awrsr_jax.prepare made"):
    prepared.load(make_config(folder, data__format="prepared").data)


def test_what_exists_is_not_overwritten(folder_of_log):
  with pytest.raises(ValueError, match="--out=.* exists; remove it, or choose another folder"):
    prepared.prepare(make_config(folder_of_log[0]).data, folder_of_log[1], 2**28)
  with pytest.raises(ValueError, match="is a prepared corpus already"):
    prepared.prepare(make_config(folder_of_log[1]).data, folder_of_log[0] + ".again", 2**28)
  with pytest.raises(ValueError, match="cannot be written: .*; choose another --out"):
    prepared.prepare(make_config(folder_of_log[0]).data, folder_of_log[0] + "/x", 2**28)


def test_a_refused_log_leaves_nothing_behind(tmp_path):
  path = write_log(tmp_path / "log.csv")
  with pytest.raises(ValueError, match="no users left after k-core 999"):
    prepared.prepare(make_config(path, data__k_core=999).data, tmp_path / "out", 2**28)
  assert os.listdir(tmp_path) == ["log.csv"]


def start(path, out, **kwargs):
  """Starts the command on a log."""
  return subprocess.Popen([sys.executable, "-m", "awrsr_jax.prepare", f"--config.data.path={path}", f"--out={out}",
                           "--config.data.k_core=5", "--memory_mib=256"], cwd=ROOT, stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, **kwargs)


def test_a_killed_preparation_starts_over_and_two_at_once_are_refused(tmp_path):
  path = write_log(tmp_path / "log.csv", rows=600_000, users=30_000)
  first = start(path, tmp_path / "out")
  while not (tmp_path / "out.partial" / "work").exists():
    time.sleep(0.02)
    assert first.poll() is None, first.communicate()
  with pytest.raises(ValueError, match="out.partial is being prepared by another process"):
    prepared.prepare(make_config(path).data, tmp_path / "out", 2**28)
  first.send_signal(signal.SIGKILL)
  first.communicate()
  assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "work").exists()
  assert not prepared.is_prepared(str(tmp_path / "out.partial"))
  second = start(path, tmp_path / "out")
  output, errors = second.communicate(timeout=120)
  assert second.returncode == 0 and "left of a preparation that was cut off; starting over" in errors, errors
  assert f"train on it with --config.data.path={tmp_path / 'out'}" in output
  assert sorted(os.listdir(tmp_path)) == ["log.csv", "out"]
  whole = prepared.load(make_config(path).data)
  assert prepared.load(make_config(tmp_path / "out").data).description == whole.description


@pytest.mark.parametrize("limit", [1 << 12, 1 << 18, 5 << 18])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path, limit):
  """A file may not grow beyond a limit, which stops the preparation at several places, as a full disk does."""
  path = write_log(tmp_path / "log.csv", rows=400_000, users=20_000)
  full = start(path, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
  _, errors = full.communicate(timeout=120)
  assert full.returncode == 1 and "ValueError: --out=" in errors and "cannot be prepared: " in errors, errors
  assert "Traceback" not in errors and os.listdir(tmp_path) == ["log.csv"]
