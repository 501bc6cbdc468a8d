"""A run that was killed, by anything at any moment, ends bit for bit like one that was not."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from awrsr_jax.engine.processes import TRY_AGAIN

ROOT = pathlib.Path(__file__).parent.parent
EPOCHS = 30
FLAGS = (f"--config.train.epochs={EPOCHS}", "--config.checkpoint.every_steps=7", "--config.eval.every_epochs=2",
         "--config.train.learning_rate=0.01")


def command(workdir: pathlib.Path, *flags: str) -> list[str]:
  return [sys.executable, "-m", "awrsr_jax.main", "--config=tests/tiny_config.py", f"--workdir={workdir}", *flags]


def run(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(command(workdir, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)


def read_lines(workdir: pathlib.Path) -> list[dict]:
  """Returns the metric lines without their one wall-clock value."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{key: value for key, value in line.items() if key != "interactions_per_sec"} for line in lines]


def read_result(workdir: pathlib.Path) -> dict:
  result = json.loads((workdir / "result.json").read_text())
  return {key: value for key, value in result.items() if key not in ("wall_time_s", "peak_memory", "compiled")}


def kill_when(workdir: pathlib.Path, condition, number: int = signal.SIGKILL) -> int:
  """Starts the run and sends it a signal as soon as the condition holds. Returns its exit code."""
  process = subprocess.Popen(command(workdir, *FLAGS), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while not condition():
    assert process.poll() is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline
    time.sleep(0.001)
  os.kill(process.pid, number)
  return process.wait()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("uninterrupted")
  done = run(workdir, *FLAGS)
  assert done.returncode == 0, done.stderr
  return workdir


def test_killed_twice_and_told_to_stop_once_ends_bit_equal(uninterrupted, tmp_path):
  workdir = tmp_path / "run"

  def lines() -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

  def is_saving(after: int) -> bool:
    return lines() > after and any((workdir / "checkpoints").glob("*tmp*"))

  kill_when(workdir, lambda: lines() >= 8)  # between checkpoints
  assert not (workdir / "result.json").exists()
  assert kill_when(workdir, lambda: is_saving(15), signal.SIGTERM) == TRY_AGAIN  # which lets it save twice
  kill_when(workdir, lambda: is_saving(25))  # inside an asynchronous save
  done = run(workdir, *FLAGS)
  assert done.returncode == 0, done.stderr
  assert "resumed at step" in done.stderr
  assert read_result(workdir) == read_result(uninterrupted)  # params_sha256 among them
  assert read_lines(workdir) == read_lines(uninterrupted)


def test_complete_run_says_so_and_epochs_may_grow(uninterrupted, tmp_path):
  short = tmp_path / "grown"
  assert run(short, *FLAGS, "--config.train.epochs=10").returncode == 0
  again = run(short, *FLAGS, "--config.train.epochs=10")
  assert again.returncode == 0 and "is complete" in again.stderr
  assert "resumed" not in again.stderr
  grown = run(short, *FLAGS)
  assert grown.returncode == 0 and "resumed at step" in grown.stderr, grown.stderr
  assert read_result(short) == read_result(uninterrupted)
  assert read_lines(short) == read_lines(uninterrupted)


def test_another_config_is_refused_with_the_difference(uninterrupted):
  before = sorted(path.name for path in uninterrupted.rglob("*"))
  refused = run(uninterrupted, *FLAGS, "--config.model.width=16")
  assert refused.returncode != 0
  assert "config.model.width: 8 there, 16 now" in refused.stderr and "Traceback" not in refused.stderr
  assert sorted(path.name for path in uninterrupted.rglob("*")) == before
