"""Runs a command of the package with a fault in it: `python tests/faults/driver.py FAULT MODULE [flags]`.

FAULT is one of

  kill N|EVENT          kill -9 at the N-th event in which the pattern EVENT is found
  fill N|EVENT|FOLDER   at that event, a file FOLDER/ballast takes all that is left of the disk
  clock                 time.time goes back by a minute at every call, and the clocks of the package likewise

An event comes before what it tells of: `os.rename FROM TO`, `os.remove PATH`, `os.rmdir PATH`, `os.mkdir PATH`,
`open PATH MODE`, `fsync PATH`, `line SPLIT STEP` (of metrics.jsonl).
"""

import contextlib
import itertools
import os
import re
import runpy
import signal
import sys
import time
import types


def fill(folder: str) -> None:
  """Writes a file until the disk is full."""
  with open(os.path.join(folder, "ballast"), "ab", buffering=0) as file, contextlib.suppress(OSError):
    for size in (1 << 16, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))


def strike(action: str, at: int, pattern: str, folder: str) -> None:
  """Lets the fault happen at an event."""
  found = itertools.count(1)

  def watch(event: str, args: tuple) -> None:
    if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "fsync", "line"):
      return
    places = list(map(str, args))
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # relative to an open folder
      places[0] = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), places[0])
    if re.search(pattern, f"{event} {' '.join(places[:2])}") and next(found) == at:
      fill(folder) if action == "fill" else os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(watch)

  from awrsr_jax.engine.metrics import MetricsWriter
  fsync, write = os.fsync, MetricsWriter.write

  def audited_fsync(file: int) -> None:
    sys.audit("fsync", os.readlink(f"/proc/self/fd/{file}"))
    fsync(file)

  def audited_write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
    sys.audit("line", split, step)
    write(self, step, epoch, split, values)
  os.fsync, MetricsWriter.write = audited_fsync, audited_write


def turn_back_the_clock() -> None:
  """Lets all clocks of the package run backwards."""
  from awrsr_jax.engine import run_folder, train
  now, calls = time.time(), itertools.count(1)
  time.time = lambda: now - 60 * next(calls)
  # not that of the system, which would stop all timers
  train.time = run_folder.time = types.SimpleNamespace(time=time.time, monotonic=time.time)


if __name__ == "__main__":
  fault, module, *flags = sys.argv[1:]
  sys.path[0] = os.getcwd()
  action, *details = fault.split(maxsplit=1)
  if action == "clock":
    turn_back_the_clock()
  else:
    at, _, pattern = details[0].partition("|")
    pattern, _, folder = pattern.rpartition("|") if action == "fill" else (pattern, "", "")
    strike(action, int(at), pattern, folder)
  sys.argv = [module, *flags]
  runpy.run_module(module, run_name="__main__", alter_sys=True)
