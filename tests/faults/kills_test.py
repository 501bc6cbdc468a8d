"""A run that is killed, told to stop, started twice or lied to by the clock ends bit for bit like one that was not."""

import collections
import itertools
import os
import random
import re
import signal

import pytest

from awrsr_jax.engine.processes import TRY_AGAIN
from faults.runs import FLAGS, GOES_ON, Started, Timed, assert_equal, finish, run

POINTS = {  # event of driver.py -> what is going on; in the order in which a run comes to them
    "1|os.rename .*/config.json.tmp": "config.json takes its place",
    "1|os.rename .*/checkpoints/4$": "the first checkpoint takes its place",
    "1|open .*/8.orbax-checkpoint-tmp/state.*/_METADATA": "an asynchronous save is half done",
    "1|line valid 8": "an evaluation is done, and its line is not written",
    "3|os.remove .*/checkpoints/8/": "the best is replaced and the old one half removed",
    "1|os.rename .*/metrics.jsonl.tmp": "lines of a lost part are dropped",
    "2|fsync .*/metrics.jsonl$": "lines are written and not yet on disk",
    "1|os.rename .*/result.json.tmp": "result.json takes its place",
}


def test_killed_at_every_delicate_point_in_turn_it_ends_bit_equal(whole, tmp_path, record):
  for point, what in POINTS.items():
    record(f"kill -9 while {what}", GOES_ON)
    struck = run(tmp_path / "run", *FLAGS, fault=f"kill {point}")
    assert struck.returncode == -signal.SIGKILL, (what, struck.stderr)
    assert not (tmp_path / "run" / "result.json").exists()
  finish(tmp_path / "run", *FLAGS)
  assert_equal(tmp_path / "run", whole)


@pytest.mark.faults
def test_killed_at_any_file_of_a_save_and_of_a_removal_it_ends_bit_equal(whole, tmp_path, record):
  """Every ninth event of the saves of steps 12 and 15, of which the second removes the best before: a run for each."""
  pattern = "(os.mkdir|os.rename|os.remove|os.rmdir|open) .*/checkpoints/(12|15|8|10)[/.]"
  row = record("kill -9 at any file that a save makes or a removal takes away", GOES_ON, 0)
  for at in itertools.count(1, 9):
    workdir = tmp_path / str(at)
    struck = run(workdir, *FLAGS, fault=f"kill {at}|{pattern}")
    if struck.returncode == 0:
      break
    assert struck.returncode == -signal.SIGKILL, struck.stderr
    row["count"] += 1
    finish(workdir, *FLAGS)
    assert_equal(workdir, whole)
  assert row["count"] > 20


def go_through(number: int, count: int, whole: Timed, tmp_path, seed: int, *flags: str) -> collections.Counter:
  """Interrupts runs at random moments, as many as it takes. Returns how often it hit which phase."""
  rng, phases, listens = random.Random(seed), collections.Counter(), number != signal.SIGKILL
  number_of_run = 0
  while phases.total() < count:
    workdir, number_of_run = tmp_path / f"run_{number_of_run}", number_of_run + 1
    while phases.total() < count:
      started = Started(workdir, *flags)
      if listens:
        started.wait_for("train.py")  # from where on it does
      at = started.interrupt(number, rng.uniform(0, whole.end - whole.start) + (not listens) * whole.start)
      if started.process.returncode == 0:
        break
      assert started.process.returncode == (TRY_AGAIN if listens else -number), started.output()
      phases[at] += 1
    finish(workdir, *flags)  # or says that it is complete
    assert_equal(workdir, whole.workdir)
  return phases


def test_killed_at_random_moments_it_ends_bit_equal(timed, tmp_path, record):
  for phase, count in go_through(signal.SIGKILL, 2, timed, tmp_path, 2, *FLAGS).items():
    record(f"kill -9 at a random moment: {phase}", GOES_ON, count)


@pytest.mark.faults
@pytest.mark.parametrize("number, count", [(signal.SIGKILL, 50), (signal.SIGTERM, 10), (signal.SIGINT, 10)])
def test_interrupted_many_times_at_random_moments_it_ends_bit_equal(number, count, tmp_path, record):
  flags = (*FLAGS, "--config.train.epochs=30")
  phases = go_through(number, count, Timed(tmp_path / "whole", *flags), tmp_path, int(number), *flags)
  how = "kill -9" if number == signal.SIGKILL else f"{number.name} (code {TRY_AGAIN})"
  for phase, found in phases.items():
    record(f"{how} at a random moment: {phase}", GOES_ON, found)
  assert number != signal.SIGKILL or len(phases) >= 4, phases


def test_a_second_process_is_refused_and_a_killed_or_stopped_one_leaves_no_lock(whole, tmp_path, record):
  record("a second process starts on the same --workdir", "it is refused at once; the first one does not notice")
  record("kill -9 of a process that holds the lock", "the lock is gone with it; " + GOES_ON)
  record(f"SIGTERM, then SIGINT (code {TRY_AGAIN})", "the step that it is at is saved; " + GOES_ON, 2)
  workdir = tmp_path / "run"
  first = Started(workdir, *FLAGS)
  first.wait_for("first step")
  first.process.send_signal(signal.SIGSTOP)
  files = sorted(path.name for path in workdir.rglob("*"))
  try:
    refused = run(workdir, *FLAGS)
    assert sorted(path.name for path in workdir.rglob("*")) == files
  finally:
    first.process.kill()
    first.process.wait()
  assert refused.returncode == 1 and refused.stderr == (
      f"ValueError: --workdir={workdir} is in use by another process; wait for it or choose another folder\n")
  at = None
  for number in (signal.SIGTERM, signal.SIGINT):
    started = Started(workdir, *FLAGS)
    started.wait_for("train.py")
    started.process.send_signal(number)
    assert started.process.wait(300) == TRY_AGAIN and (at is None or f"resumed at step {at} of" in started.output())
    at = re.search(r"stopped as told, at step (\d+) of", started.output())[1]
  assert f"resumed at step {at} of" in finish(workdir, *FLAGS).stderr
  assert_equal(workdir, whole)


def test_clocks_that_run_backwards_change_nothing(whole, tmp_path, record):
  record("clocks run backwards; files are from the future, the newest checkpoint from 1970", GOES_ON)
  first = Started(tmp_path / "run", *FLAGS, fault="clock")
  first.wait_for("step 20/")
  first.process.kill()
  first.process.wait()
  checkpoints = tmp_path / "run" / "checkpoints"
  steps = sorted((int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), reverse=True)
  assert len(steps) > 1
  for age, step in enumerate(steps):
    for path in [checkpoints / str(step), *(checkpoints / str(step)).rglob("*")]:
      os.utime(path, (age * 2e9, age * 2e9))
  done = run(tmp_path / "run", *FLAGS, fault="clock")
  assert done.returncode == 0 and f"resumed at step {steps[0]} of" in done.stderr, done.stderr
  assert_equal(tmp_path / "run", whole)
