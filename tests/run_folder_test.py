"""The run folder: files whole or not at all, one owner, one config and corpus, and lines that others can read."""

import errno
import fcntl
import json
import logging
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import types

import pytest
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from awrsr_jax.config import default, finalize
from awrsr_jax.engine import metrics, run_folder

ROOT = pathlib.Path(__file__).parent.parent
CORPUS = {"name": "one", "fingerprint": "abc", "users": 3, "items": 4, "interactions": 12}


def make_config(**values):
  """Returns a finalized config with values at dotted keys ("train__epochs" is train.epochs)."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return finalize(config)


def open_and_close(workdir, corpus=CORPUS, **values):
  lock, result = run_folder.open_run(workdir, make_config(**values), corpus)
  lock.close()
  return result


def read(path):
  return json.loads(path.read_text())


# --- files


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  run_folder.write_json(path, {"a": 1, "b": None})
  assert read(path) == {"a": 1, "b": None} and path.read_text().endswith("}\n")
  with pytest.raises(TypeError):  # fails after half of it is written
    run_folder.write_json(path, {"a": 2, "b": object()})
  assert read(path) == {"a": 1, "b": None}

  def fail(*_):
    raise OSError("power cut")
  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="power cut"):
    run_folder.write_json(path, {"a": 3})
  assert read(path) == {"a": 1, "b": None}
  monkeypatch.undo()
  run_folder.write_json(path, {"a": 4})  # what the failures left behind is no obstacle, and goes
  assert read(path) == {"a": 4} and os.listdir(tmp_path) == ["result.json"]


def test_a_json_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
  rename = os.replace
  monkeypatch.setattr(os, "replace", lambda *args: (calls.append("replace"), rename(*args)))
  run_folder.write_json(tmp_path / "result.json", {"a": 1})
  assert calls == ["fsync", "replace"] and read(tmp_path / "result.json") == {"a": 1}


@pytest.mark.parametrize("content", [None, "", '{"a": ', "\x00\x00"])
def test_a_missing_or_damaged_json_file_is_an_error_that_names_it(tmp_path, content):
  path = tmp_path / "config.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=re.escape(str(path))):
    run_folder.read_json(path)


def test_a_new_run_writes_its_config_and_corpus(tmp_path):
  assert open_and_close(tmp_path / "deep" / "run", model__width=32) is None
  assert read(tmp_path / "deep" / "run" / "config.json") == make_config(model__width=32).to_dict()
  assert read(tmp_path / "deep" / "run" / "corpus.json") == CORPUS


# --- one config, one corpus


def test_another_config_is_refused_with_every_key_and_both_values(tmp_path):
  open_and_close(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ValueError) as error:
    open_and_close(tmp_path, model__width=32, train__learning_rate=0.01, train__epochs=200)
  assert "config.model.width: 64 there, 32 now" in str(error.value)
  assert "config.train.learning_rate: 0.001 there, 0.01 now" in str(error.value)
  assert str(tmp_path) in str(error.value) and "epochs:" not in str(error.value)
  assert (tmp_path / "config.json").read_bytes() == before


def test_an_optional_key_that_was_set_is_a_difference(tmp_path):
  open_and_close(tmp_path)
  with pytest.raises(ValueError, match="config.train.patience: None there, 5 now"):
    open_and_close(tmp_path, train__patience=5)


def test_a_folder_of_another_version_is_refused_by_the_key_it_lacks_or_has_too_much(tmp_path):
  open_and_close(tmp_path)
  config = read(tmp_path / "config.json")
  config["model"]["legacy"] = config["model"].pop("width")
  run_folder.write_json(tmp_path / "config.json", config)
  with pytest.raises(ValueError, match="config.model.legacy: 64 there, None now; config.model.width: None there, 64"):
    open_and_close(tmp_path)


def test_a_key_that_is_newer_than_published_runs_has_its_default_in_their_folders(tmp_path):
  open_and_close(tmp_path)
  config = read(tmp_path / "config.json")
  del config["train"]["item_start"]
  run_folder.write_json(tmp_path / "config.json", config)
  with pytest.raises(ValueError, match="config.train.item_start: random there, cooccurrence now"):
    open_and_close(tmp_path, train__item_start="cooccurrence")
  open_and_close(tmp_path)
  assert read(tmp_path / "config.json")["train"]["item_start"] == "random"


def test_epochs_may_grow_and_not_shrink(tmp_path):
  open_and_close(tmp_path, train__epochs=5)
  open_and_close(tmp_path, train__epochs=5)
  open_and_close(tmp_path, train__epochs=7)
  assert read(tmp_path / "config.json")["train"]["epochs"] == 7
  with pytest.raises(ValueError, match=r"config.train.epochs=7; 6 now is less"):
    open_and_close(tmp_path, train__epochs=6)
  assert read(tmp_path / "config.json")["train"]["epochs"] == 7


def test_growing_epochs_under_a_schedule_are_told(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  open_and_close(tmp_path / "a", train__epochs=5, train__schedule="cosine")
  open_and_close(tmp_path / "a", train__epochs=9, train__schedule="cosine")
  assert "grew from 5 to 9: the cosine schedule" in caplog.text
  caplog.clear()
  open_and_close(tmp_path / "b", train__epochs=5)
  open_and_close(tmp_path / "b", train__epochs=9)
  open_and_close(tmp_path / "a", train__epochs=9, train__schedule="cosine")
  assert not caplog.records


def test_data_may_move_and_devices_and_ranking_batches_may_change(tmp_path):
  open_and_close(tmp_path, data__path="here.txt", mesh__data=1)
  open_and_close(tmp_path, data__path="there.txt", mesh__data=4, mesh__model=2, eval__batch_size=8, eval__block_items=9)
  now = read(tmp_path / "config.json")
  assert (now["data"]["path"], now["mesh"], now["eval"]["batch_size"], now["eval"]["block_items"]) == (
      "there.txt", {"data": 4, "model": 2}, 8, 9)


def test_another_corpus_is_refused_with_both_values_but_may_be_renamed(tmp_path):
  open_and_close(tmp_path)
  with pytest.raises(ValueError) as error:
    open_and_close(tmp_path, CORPUS | {"fingerprint": "def", "users": 2})
  assert "fingerprint: abc there, def now" in str(error.value) and "users: 3 there, 2 now" in str(error.value)
  assert "items" not in str(error.value) and read(tmp_path / "corpus.json") == CORPUS
  open_and_close(tmp_path, CORPUS | {"name": "moved"})


def test_a_refused_open_changes_no_file(tmp_path):
  open_and_close(tmp_path, train__epochs=5)
  with pytest.raises(ValueError, match="another corpus"):
    open_and_close(tmp_path, CORPUS | {"users": 2}, train__epochs=9)
  assert read(tmp_path / "config.json")["train"]["epochs"] == 5


def test_in_a_complete_run_nothing_is_written(tmp_path, caplog):
  open_and_close(tmp_path, train__epochs=5)
  result = {"epochs": 5, "test": {}}
  (tmp_path / "result.json").write_text(json.dumps(result))
  assert open_and_close(tmp_path, train__epochs=5, data__path="moved.txt") == result
  assert read(tmp_path / "config.json")["data"]["path"] == ""
  with pytest.raises(ValueError, match="another config"):
    open_and_close(tmp_path, train__epochs=5, model__width=32)
  assert "ranks" not in caplog.text
  assert open_and_close(tmp_path, train__epochs=5, eval__hash_ids=True) == result
  assert "is complete: its ranks stay as config.eval.hash_ids=False has made them" in caplog.text
  assert open_and_close(tmp_path, train__epochs=6, data__path="moved.txt") is None
  assert read(tmp_path / "config.json")["data"]["path"] == "moved.txt"
  (tmp_path / "corpus.json").unlink()
  with pytest.raises(ValueError, match="corpus.json cannot be read"):
    open_and_close(tmp_path, train__epochs=6)


# --- one owner


def test_a_second_open_is_refused_until_the_first_closes(tmp_path):
  lock, _ = run_folder.open_run(tmp_path, make_config(), CORPUS)
  with pytest.raises(ValueError, match=rf"--workdir={tmp_path} is in use"):
    open_and_close(tmp_path)
  lock.close()
  with run_folder.open_run(tmp_path, make_config(), CORPUS)[0], pytest.raises(ValueError, match="is in use"):
    open_and_close(tmp_path)
  open_and_close(tmp_path)


def test_who_waits_has_the_folder_next(tmp_path):
  order, lock = [], run_folder.lock_folder(epath.Path(tmp_path))

  def take():
    with run_folder.lock_folder(epath.Path(tmp_path), wait=math.inf):
      order.append("taken")

  thread = threading.Thread(target=take)
  thread.start()
  order.append("free")
  lock.close()
  thread.join()
  assert order == ["free", "taken"]


def test_a_refused_open_does_not_keep_the_folder(tmp_path):
  open_and_close(tmp_path)
  with pytest.raises(ValueError) as error:  # and the error lives on, as in an interactive session
    open_and_close(tmp_path, model__width=32)
  open_and_close(tmp_path)
  assert "another config" in str(error.value)


def test_another_process_owns_the_folder_until_it_ends_however_it_ends(tmp_path):
  code = ("import sys, time\nfrom awrsr_jax.config import default, finalize\nfrom awrsr_jax.engine import run_folder\n"
          "lock = run_folder.open_run(sys.argv[1], finalize(default()), {})\nprint('open', flush=True)\ntime.sleep(60)")
  child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
  try:
    assert child.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="is in use by another process"):
      open_and_close(tmp_path, {})
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
  open_and_close(tmp_path, {})


def test_who_only_looks_whether_a_folder_is_free_stops_no_run(tmp_path):
  looking = run_folder.lock_folder(epath.Path(tmp_path))
  threading.Timer(0.2, looking.close).start()
  open_and_close(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
  def fail(*_):
    raise OSError(number, os.strerror(number))
  monkeypatch.setattr(fcntl, "flock", fail)
  open_and_close(tmp_path)
  assert caplog.text.count(f"--workdir={tmp_path}: this file system has no locks: see that no other run uses") == 1
  assert read(tmp_path / "corpus.json") == CORPUS


def test_a_lock_that_fails_is_an_error_with_its_reason(tmp_path, monkeypatch):
  def fail(file, _):
    locks.append(file)
    raise OSError(errno.EIO, "Input/output error")
  locks = []
  monkeypatch.setattr(fcntl, "flock", fail)
  with pytest.raises(ValueError, match=rf"--workdir={tmp_path} cannot be locked: Input/output error; choose another"):
    open_and_close(tmp_path)
  assert locks[0].closed


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, below):
  (tmp_path / "file").write_text("no folder")
  with pytest.raises(ValueError, match=rf"--workdir={tmp_path}/file/{below} cannot be written: Not a directory"):
    open_and_close(tmp_path / "file" / below)
  with pytest.raises(ValueError, match=rf"--workdir={tmp_path}/file cannot be written"):
    open_and_close(tmp_path / "file")


# --- lines


def line(step, **values):
  return json.dumps({"step": step, **values}) + "\n"


def test_lines_of_a_lost_part_and_damaged_lines_go_and_the_others_stay_as_they_were(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  good = [line(3, split="train", loss=0.1), line(4, split="valid", mrr=1e-7), line(6, split="train")]
  bad = ['{"step": 5, "lo\n', "[1]\n", "7\n", '{"loss": 1}\n', "\n", '{"step": null}\n', "\x00\x00\n"]
  lost = [line(6, split="valid"), line(7, split="train"), line(6, split="late")[:-1]]
  path.write_text("".join([good[0], *bad, good[1], good[2], *lost]))
  assert metrics.keep_lines(epath.Path(path), 6) == "".join(good)
  assert path.read_text() == "".join(good) and os.listdir(tmp_path) == ["metrics.jsonl"]
  assert len([record for record in caplog.records if "damaged line" in record.message]) == len(bad)


def test_no_lines_are_kept_of_nothing(tmp_path):
  assert metrics.keep_lines(epath.Path(tmp_path) / "metrics.jsonl", 6) == ""
  assert os.listdir(tmp_path) == []
  (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))
  assert metrics.keep_lines(epath.Path(tmp_path) / "metrics.jsonl", 0) == ""
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def read_events(folder):
  """Returns (tag, step, value) of the events that TensorBoard would show; checks every record's own checksums."""
  found = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
      record, check = data[12:12 + size], data[12 + size:16 + size]
      assert int.from_bytes(check, "little") == masked_crc32c(record)
      event = event_pb2.Event.FromString(record)
      if event.session_log.status == event_pb2.SessionLog.START:  # a restart: TensorBoard forgets what comes after
        found = [(tag, step, value) for tag, step, value in found if step < event.step]
      found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
      data = data[16 + size:]
  return found


def test_metrics_are_json_lines_and_tensorboard_events(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0, 10)
  writer.write(3, 1, "train", {"loss": 0.1, "interactions_per_sec": 1234.5})
  writer.write(4, 1, "valid", {"ndcg@10": 0.25})
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # there at once, for who watches
  writer.sync()
  writer.close()
  assert [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
      {"step": 3, "epoch": 1, "split": "train", "loss": 0.1, "interactions_per_sec": 1234.5},
      {"step": 4, "epoch": 1, "split": "valid", "ndcg@10": 0.25}]
  assert read_events(tmp_path / "tensorboard") == [
      ("train/loss", 3, pytest.approx(0.1)),
      ("train/interactions_per_sec", 3, 1234.5), ("valid/ndcg_10", 4, 0.25)]  # no @ in its tags


def test_a_resumed_writer_goes_on_after_its_step(tmp_path):
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = metrics.MetricsWriter(tmp_path, start, 10)
    for step in steps:
      writer.advance(step)
      writer.write(step, 1, "train", {"loss": start + step / 8})
    writer.close()
  lines = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  expected = [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5)]
  assert [(row["step"], row["loss"]) for row in lines] == expected
  assert [(step, value) for _, step, value in read_events(tmp_path / "tensorboard")] == expected


def test_without_a_terminal_each_line_is_logged(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.INFO)
  clock = [0.0]
  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0.0))
  writer = metrics.MetricsWriter(tmp_path, 0, 10)
  for now, step in ((100, 1), (102, 2), (108, 5)):  # compiling for the first step took 100 s
    clock[0] = now
    writer.advance(step)
    writer.write(step, 2, "valid", {"ndcg@10": 0.125})
  writer.close()
  assert [record.getMessage() for record in caplog.records if record.name == metrics.LOG.name] == [
      "step 1/10 epoch 2 valid ndcg@10=0.125", "step 2/10 epoch 2 valid ndcg@10=0.125 eta=16s",
      "step 5/10 epoch 2 valid ndcg@10=0.125 eta=10s"]


def test_a_bucket_gets_whole_files_and_no_lock(tmp_path, monkeypatch):
  """On a local folder, taken for a bucket: what is written differs, not where."""
  for module in (run_folder, metrics):
    monkeypatch.setattr(module, "is_remote", lambda path: True)
  monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("a bucket cannot rename"))
  for _ in range(2):  # the second time it is compared
    open_and_close(tmp_path)
  with pytest.raises(ValueError, match="another config"):
    open_and_close(tmp_path, model__width=32)
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = metrics.MetricsWriter(tmp_path, start, 10)
    for step in steps:
      writer.write(step, 1, "train", {"loss": start + step / 8})
      assert len((tmp_path / "metrics.jsonl").read_text().splitlines() if start else []) in (0, 2)
    writer.close()
  lines = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(row["step"], row["loss"]) for row in lines] == [(1, 0.125), (2, 0.25), (3, 2.375), (4, 2.5)]
  assert sorted(os.listdir(tmp_path)) == ["config.json", "corpus.json", "metrics.jsonl"]


@pytest.mark.parametrize("error,reason", [
    (OSError("Forbidden: b/my-bucket/o\nrobot@my-project has no storage.objects.create access"),
     "OSError: Forbidden: b/my-bucket/o robot@my-project has no storage.objects.create access"),
    (FileNotFoundError("b/my-bucket/o"), "FileNotFoundError: b/my-bucket/o"),
    (type("HttpError", (Exception,), {})("Anonymous caller, 401"), "HttpError: Anonymous caller, 401"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
])
@pytest.mark.parametrize("action", ["exists", "_open"])
def test_a_bucket_that_cannot_be_written_is_one_line_with_the_way_out(bucket, monkeypatch, action, error, reason):
  def fail(*_, **__):
    raise error
  monkeypatch.setattr(bucket, action, fail)
  with pytest.raises(ValueError) as found:
    open_and_close("gs://my-bucket/run")
  assert str(found.value) == (
      f"--workdir=gs://my-bucket/run cannot be written: {reason}. Check the name of the bucket; the service account of "
      "the machines needs its roles Storage Object Admin and Storage Legacy Bucket Reader")


def test_a_bucket_that_cannot_be_opened_here_is_an_error_that_says_what_is_missing():
  with pytest.raises(ValueError, match=r"--workdir=gs://nowhere/run: .*install what opens such a path .*gcsfs"):
    run_folder.open_run("gs://nowhere/run", make_config(), CORPUS)
