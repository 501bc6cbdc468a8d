"""Real runs of the command on a tiny corpus: started, struck, and compared."""

import json
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS_PER_EPOCH = 4
# Validation gets better at every evaluation, so that the best is replaced every time. Where item vectors start from
# co-occurrence, a run that is killed before its first checkpoint makes them again.
FLAGS = ("--config.train.epochs=6", "--config.checkpoint.every_steps=5", "--config.train.learning_rate=0.01",
         "--config.train.item_start=cooccurrence")
GOES_ON = "the same command goes on, and ends bit-equal"


def command(workdir: pathlib.Path, *flags: str, fault: str = "") -> list[str]:
  """Returns the command of a run; with a fault, see driver.py."""
  how = ["tests/faults/driver.py", fault] if fault else ["-m"]
  return [sys.executable, *how, "awrsr_jax.main", "--config=tests/tiny_config.py", f"--workdir={workdir}", *flags]


def run(workdir: pathlib.Path, *flags: str, fault: str = "") -> subprocess.CompletedProcess:
  return subprocess.run(command(workdir, *flags, fault=fault), cwd=ROOT, capture_output=True, text=True, timeout=300)


def finish(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
  """Runs to the end."""
  done = run(workdir, *flags)
  assert done.returncode == 0, done.stderr
  return done


class Started:
  """A run that goes on in the background; its output goes to WORKDIR.log."""

  def __init__(self, workdir: pathlib.Path, *flags: str, fault: str = ""):
    self.workdir, self.path = workdir, workdir.with_name(workdir.name + ".log")
    with self.path.open("w") as file:
      self.process = subprocess.Popen(command(workdir, *flags, fault=fault), cwd=ROOT, stdout=file, stderr=file)

  def output(self) -> str:
    return self.path.read_text()

  def wait_for(self, text: str) -> None:
    """Waits until it has printed something."""
    deadline = time.monotonic() + 300
    while text not in self.output():
      assert self.process.poll() is None and time.monotonic() < deadline, self.output()
      time.sleep(0.002)

  def interrupt(self, number: int, after: float) -> str | None:
    """Sends a signal after so many seconds.

    Returns:
      What it was at, as its folder says; None: it had ended by then.
    """
    try:
      assert self.process.wait(after) == 0, self.output()
      return None
    except subprocess.TimeoutExpired:
      self.process.send_signal(signal.SIGSTOP)
      at = self.phase()
      self.process.send_signal(number)
      self.process.send_signal(signal.SIGCONT)
      self.process.wait(300)
      return at

  def phase(self) -> str:
    """Returns what it is at, as its folder says while it stands still."""
    found = self.workdir / "checkpoints"
    if "first step" not in self.output():
      return "starting"
    lines = (self.workdir / "metrics.jsonl").read_text()
    saved = [int(path.name) for path in found.iterdir() if path.name.isdigit()]
    saving = [int(path.name.partition(".")[0]) for path in found.iterdir() if not path.name.isdigit()]
    newest = max([*saved, *saving, 1])
    evaluating = newest % STEPS_PER_EPOCH == 0 and f'"step": {newest}, "epoch": {newest // STEPS_PER_EPOCH}, ' \
                                                   '"split": "valid"' not in lines
    if not lines.endswith("\n") and lines:
      return "writing a metric line"
    if any(not (found / str(step) / "commit_success.txt").exists() for step in saved):
      return "removing an old checkpoint"
    if saving:
      return "saving" + " and evaluating" * evaluating
    return "evaluating" if evaluating else "training"


class Timed:
  """An uninterrupted run, its folder never changed: when, after its process, it started, and when it ended."""

  def __init__(self, workdir: pathlib.Path, *flags: str):
    began, started = time.monotonic(), Started(workdir, *flags)
    started.wait_for("parameters; ")  # what starts the interpreter is no part of a run
    self.workdir, self.start = workdir, time.monotonic() - began
    assert started.process.wait(300) == 0, started.output()
    self.end = time.monotonic() - began


def read_lines(workdir: pathlib.Path) -> list[dict]:
  """Returns the metric lines without their one wall-clock value."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{key: value for key, value in line.items() if key != "interactions_per_sec"} for line in lines]


def read_result(workdir: pathlib.Path) -> dict:
  """Returns the result, params_sha256 in it, without what was measured of the machine."""
  result = json.loads((workdir / "result.json").read_text())
  return {key: value for key, value in result.items() if key not in ("wall_time_s", "peak_memory", "compiled")}


def assert_equal(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """Nothing lost, nothing doubled, bit for bit."""
  assert read_lines(workdir) == read_lines(expected)
  assert read_result(workdir) == read_result(expected)
  assert not list((workdir / "checkpoints").glob("*tmp*")) and not list(workdir.glob("*.tmp"))
