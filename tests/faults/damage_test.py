"""A run folder with damaged files: each is named, and the run ends equal or is refused; never does it go on wrong."""

import json
import os
import pathlib
import random
import shutil

import pytest
import tiny_config

from awrsr_jax.engine import checkpoint, processes
from awrsr_jax.engine.train import make_job, start_or_resume, train
from faults.runs import assert_equal, read_lines, read_result

# Orbax leaves failed reads behind, and Python tells of them when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NEWEST, BEFORE = 16, 15


def make_config(**values):
  config = tiny_config.get_config()
  config.train.epochs, config.checkpoint.every_steps, config.train.learning_rate = 6, 5, 0.01
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  train(make_config(), workdir)
  return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of a run that was stopped after step 16, while it evaluated."""
  workdir, asked = tmp_path_factory.mktemp("stopped"), []
  with pytest.raises(processes.Preempted):
    train(make_config(), workdir, lambda: asked.append(None) or len(asked) > 22)
  assert sorted(os.listdir(workdir / "checkpoints")) == ["12", str(BEFORE), str(NEWEST)]
  return workdir


@pytest.fixture
def workdir(stopped, tmp_path):
  return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(scope="module")
def job():
  return make_job(make_config())


def content_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: pathlib.Path, rng: random.Random) -> None:
  """Flips one bit of a file; an empty one gets a byte."""
  content = bytearray(path.read_bytes() or b"\0")
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
  os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def delete(path: pathlib.Path, _) -> None:
  path.unlink()


DAMAGES = {"a bit flipped in": flip, "a truncated": truncate, "no": delete}


@pytest.mark.parametrize("how, rounds", [("a bit flipped in", 1), ("no", 1), *(
    pytest.param(how, 20, marks=pytest.mark.faults) for how in ("a bit flipped in", "a truncated"))])
def test_any_damaged_file_of_the_newest_checkpoint_is_harmless_or_named(how, rounds, job, stopped, tmp_path, caplog,
                                                                      record):
  row = record(f"{how} file of the newest checkpoint, each of them", "the checkpoint is named and the one before is "
               "used, or the file holds nothing of the state; never another state", 0)

  def resume(workdir):
    with checkpoint.open_checkpoints(workdir) as manager:
      state, found = start_or_resume(job, manager)
      return found["step"], checkpoint.hash_arrays(state)

  def copy():
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / str(NEWEST)

  rng, newest, fell_back = random.Random(rounds), copy(), 0
  files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
  right = dict([resume(tmp_path / "run")])
  shutil.rmtree(newest)
  right |= dict([resume(tmp_path / "run")])
  assert sorted(right) == [BEFORE, NEWEST]
  for path in files * rounds:
    caplog.clear()
    DAMAGES[how](copy() / path, rng)
    step, found = resume(tmp_path / "run")
    assert right[step] == found, path
    assert (step == BEFORE) == (f"checkpoint {NEWEST} of " in caplog.text and "is damaged and is not used"
                                in caplog.text), path
    fell_back += step == BEFORE
    row["count"] += 1
  assert row["count"] > 20 * rounds and fell_back > 2 * rounds


def test_after_damaged_checkpoints_it_ends_bit_equal(whole, workdir, caplog, record):
  record("the newest two checkpoints are truncated", "they are named and kept aside, the best is gone on from, and "
         "lines after it are written again; ends bit-equal")
  for step in (NEWEST, BEFORE):
    for path in (workdir / "checkpoints" / str(step)).rglob("*"):
      if path.is_file():
        os.truncate(path, path.stat().st_size // 2)
  train(make_config(), workdir)
  for step in (NEWEST, BEFORE):
    assert f"checkpoint {step} of {workdir}/checkpoints is damaged and is not used" in caplog.text
  assert_equal(workdir, whole)
  assert sorted(os.listdir(workdir / "checkpoints_damaged")) == [str(BEFORE), str(NEWEST)]


def edit(name: str, **values):
  """Returns a function that changes keys ("train__epochs" is train.epochs) of a JSON file; None takes a key away."""
  def change(workdir):
    content = json.loads((workdir / name).read_text())
    for key, value in values.items():
      *parents, leaf = key.split("__")
      node = content
      for parent in parents:
        node = node[parent]
      node[leaf] = value
      if value is None:
        del node[leaf]
    (workdir / name).write_text(json.dumps(content, indent=2) + "\n")
  return change


def edit_record(**values):
  def change(workdir):
    name = f"checkpoints/{NEWEST}/record/metadata"
    edit(name, **{f"content__{key}": value for key, value in values.items()})(workdir)
    edit(name, sha256=checkpoint.hash_json(json.loads((workdir / name).read_text())["content"]))(workdir)
  return change


REFUSED = {
    "no config.json beside checkpoints": (
        lambda workdir: (workdir / "config.json").unlink(), "config.json cannot be read .*restore it, or start in ano"),
    "config.json is cut": (
        lambda workdir: os.truncate(workdir / "config.json", 100), "config.json cannot be read .*restore it, or start"),
    "config.json is no JSON object": (
        lambda workdir: (workdir / "config.json").write_text("[]"), r"cannot be read .it is \[\], not a JSON object"),
    "config.json was edited": (
        edit("config.json", train__learning_rate=0.02), "learning_rate: 0.02 there, 0.01 now.*Use the same config, or"),
    "config.json lost a key": (
        edit("config.json", train__epochs=None), "config.train.epochs: None there, 6 now"),
    "no corpus.json beside checkpoints": (
        lambda workdir: (workdir / "corpus.json").unlink(), "corpus.json cannot be read .*restore it, or start in ano"),
    "corpus.json is cut": (
        lambda workdir: os.truncate(workdir / "corpus.json", 30), "corpus.json cannot be read .*restore it, or start"),
    "corpus.json was edited": (
        edit("corpus.json", users=61), "another corpus: users: 61 there, 60 now. Use the same data, or another"),
    "a record without a key, of another version": (
        edit_record(worse=None), f"checkpoint {NEWEST} of .* has no worse: .*start in another --workdir"),
    "a record of another schema": (
        edit_record(schema=1), "its schema is 1, this version reads 2. Finish the run with the version that began it"),
    "a checkpoint beyond the end, config.json edited to fewer epochs like the command": (
        edit("config.json", train__epochs=3), f"checkpoint {NEWEST} of .* is beyond the last step of this config, 12:"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_it_is_refused_with_the_way_out_and_nothing_is_changed(fault, workdir, record):
  record(fault, "refused with the way out; no file is changed")
  damage, message = REFUSED[fault]
  damage(workdir)
  before = content_of(workdir)
  epochs = 3 if "fewer" in fault else 6
  with pytest.raises(ValueError, match=message):
    train(make_config(train__epochs=epochs), workdir)
  assert content_of(workdir) == before


def flip_in_the_middle(content: bytes) -> bytes:
  return content[:400] + bytes([content[400] ^ 0x80]) + content[401:]


@pytest.mark.parametrize("fault, change, lost", [
    ("metrics.jsonl with a bit flipped, and its last line cut", lambda content: flip_in_the_middle(content)[:-9], 1),
    pytest.param("metrics.jsonl is empty", lambda _: b"", None, marks=pytest.mark.faults),
])
def test_damaged_metric_lines_are_named_and_dropped_and_all_else_is_equal(fault, change, lost, whole, workdir, caplog,
                                                                          record):
  record(fault, "damaged lines are named and dropped; all else ends bit-equal")
  path = workdir / "metrics.jsonl"
  path.write_bytes(change(path.read_bytes()))
  train(make_config(), workdir)
  assert read_result(workdir) == read_result(whole)
  expected = read_lines(whole)
  found = read_lines(workdir)
  if lost is None:  # what is gone cannot be missed
    assert found == [line for line in expected if (line["step"], line["split"]) >= (NEWEST, "valid")]
  else:
    assert caplog.text.count("dropped a damaged line") == 2
    assert len(found) >= len(expected) - 2 and all(line in expected for line in found)


@pytest.mark.parametrize("content", ['{"test": ', "[1]"])
def test_a_damaged_result_is_named_and_made_again(content, whole, tmp_path, caplog, record):
  record("result.json is damaged", "it is named and made again from the checkpoints, bit-equal")
  workdir = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
  (workdir / "result.json").write_text(content)
  train(make_config(), workdir)
  assert "result.json is damaged and is made again" in caplog.text
  assert_equal(workdir, whole)
