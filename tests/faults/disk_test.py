"""A disk that is full or cannot be written: one clear message, nothing lost, and the same command goes on."""

import os
import random
import subprocess
import sys

import jax
import numpy as np
import pandas
import pytest
import tiny_config

from awrsr_jax.engine import train as training
from faults.runs import FLAGS, GOES_ON, ROOT, assert_equal, finish, run

WORDS = "one line with the way out, code 1; after making room "
POINTS = {
    "1|line train 3": "a metric line",
    "1|open .*/10.orbax-checkpoint-tmp/state.*array_metadatas": "a checkpoint, by Orbax",
    "1|os.mkdir .*/15.orbax-checkpoint-tmp/ids": "a checkpoint, by TensorStore",
    "1|open .*/result.json": "result.json",
}


def run_full(disk, point: str) -> bool:
  """Runs with a disk that gets full at a point, and makes room again. Returns whether it got there."""
  workdir, ballast = disk / "run", disk / "ballast"
  stopped = run(workdir, *FLAGS, fault=f"fill {point}|{disk}")
  if not ballast.exists() or stopped.returncode == 0:  # the end of the run, or a place that needs no room
    ballast.unlink(missing_ok=True)
    return stopped.returncode != 0
  told = {f"DiskFull: the disk of --workdir={workdir} is full; what was saved is whole. Make room and start the same "
          "command again: it goes on from the newest checkpoint",
          f"ValueError: --workdir={workdir} cannot be written: No space left on device; choose another folder"}
  # Orbax and TensorStore may tell, from threads of their own, that nobody waits any more ("Event loop is closed"), and
  # one of them may be in the midst of a line when the message comes.
  said = [line for line in stopped.stderr.splitlines() if line.endswith(tuple(told))]
  assert stopped.returncode == 1 and len(said) == 1, stopped.stderr
  assert "awrsr_jax/engine" not in stopped.stderr, stopped.stderr  # every traceback of the run goes through there
  ballast.unlink()
  return True


def test_a_full_disk_is_one_message_and_with_room_it_ends_bit_equal(whole, disk, record):
  for point, what in POINTS.items():
    record(f"the disk is full when a run writes {what}", WORDS + GOES_ON)
    assert run_full(disk, point)
  done = finish(disk / "run", *FLAGS)
  assert "is damaged" not in done.stderr
  assert_equal(disk / "run", whole)


@pytest.mark.faults
def test_a_disk_that_is_full_at_random_moments_loses_nothing(whole, disk, record):
  row, rng = record("the disk is full at a random file or line of a run", WORDS + GOES_ON, 0), random.Random(0)
  while row["count"] < 20:
    at = rng.randrange(1, 120)
    row["count"] += run_full(disk, f"{at}|(os.mkdir|os.rename|open|line|fsync) .*(/disk/run|train|valid)")
    if (disk / "run" / "result.json").exists():
      assert_equal(disk / "run", whole)
      subprocess.run(["rm", "-r", disk / "run"], check=True)
  finish(disk / "run", *FLAGS)
  assert_equal(disk / "run", whole)


def prepare(log, out) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "awrsr_jax.prepare", f"--config.data.path={log}", f"--out={out}",
                         "--config.data.k_core=5", "--memory_mib=64"], cwd=ROOT, capture_output=True, text=True,
                        timeout=300)


@pytest.mark.parametrize("size", ["1m", *(pytest.param(size, marks=pytest.mark.faults) for size in (
    "64k", "256k", "2m", "3m", "4m", "5m", "6m"))])
def test_a_full_disk_while_preparing_is_one_message_and_leaves_nothing(disk, size, tmp_path, record):
  record("the disk is full when a log is prepared", "one line with the way out, code 1; nothing is left behind, and "
         "with room the same command ends")
  rng = np.random.default_rng(0)
  log = tmp_path / "log.csv"
  pandas.DataFrame({"user": rng.integers(0, 20_000, 200_000), "item": rng.integers(0, 500, 200_000),
                    "time": rng.integers(0, 10**9, 200_000)}).to_csv(log, index=False)
  subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
  full = prepare(log, disk / "out")
  assert full.returncode == 1, full.stderr
  told = [line for line in full.stderr.splitlines() if not line.startswith("I")]
  assert len(told) == 1 and told[0].startswith(f"ValueError: --out={disk / 'out'} cannot be prepared: "), full.stderr
  assert os.listdir(disk) == []
  subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
  assert prepare(log, disk / "out").returncode == 0 and os.listdir(disk) == ["out"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_cannot_be_written_is_one_line_before_anything_is_compiled(is_new, disk, monkeypatch, record):
  record("the disk of --workdir is read-only", "one line with the way out, before anything is compiled")
  workdir = disk / ("new" if is_new else "run")
  (disk / "run").mkdir()
  (disk / "run" / ".lock").write_text("")

  def refuse(*_, **__):
    raise AssertionError("compiled before the error")
  monkeypatch.setattr(training, "init_state", refuse)
  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
  with pytest.raises(ValueError) as error:
    training.train(tiny_config.get_config(), workdir)
  assert str(error.value) == f"--workdir={workdir} cannot be written: Read-only file system; choose another folder"
