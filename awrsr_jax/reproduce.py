"""Runs a declared grid of experiments, and writes its results: `python -m awrsr_jax.reproduce --data=FOLDER`.

Every run is an ordinary one of `awrsr_jax.main`, in a process of its own, in OUT/<table>/<row>/seed_<s>. Unless OUT is
named, it holds the runs that are published. What is complete is skipped, what was cut off goes on, and a run that fails
stops no other: the same command again does what is left. Runs go by seed first, so that whenever it stops there is
something to compare. After every run the results are written anew, from the run folders alone.

Exit codes: 0 all runs are complete; 1 some failed; 75 it was told to stop, and the same command goes on.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from etils import epath

from awrsr_jax.analysis.grid import COMPLETE, Grid, Planned, load_grid, read_state, read_states
from awrsr_jax.analysis.results import write_results
from awrsr_jax.analysis.text import show_metric
from awrsr_jax.command import refuse
from awrsr_jax.engine import processes
from awrsr_jax.engine.run_folder import lock_folder, read_json
from awrsr_jax.foreign import printable

RUNS = "docs/results/runs"  # where runs are published; whoever adds one has the page of all
MOST_AGAIN = 3  # times that a run which asks for it (code 75) is started again
PAUSE_S = 0.1  # between looks at the processes

MEMORY = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"  # JAX's variables
MEMORY_FOR_RUNS = 0.9  # of an accelerator's; the rest is for what each process keeps there beside its arrays


@dataclasses.dataclass(frozen=True)
class Share:
  """Of this machine, for a run: cores that it is bound to (none: it is not), and environment variables."""

  cores: frozenset[int]
  environment: dict[str, str]


Launch = Callable[[list[str], pathlib.Path, Share], Any]  # command, log file, share -> as subprocess.Popen is


@dataclasses.dataclass
class Started:
  """A run in progress: what it is, its process and share, how often and when (seconds) it was started."""

  planned: Planned
  process: Any
  share: Share
  again: int
  began: float


def share_machine(jobs: int) -> list[Share]:
  """Returns what each of so many runs at a time has of this machine.

  Runs on cores of their own are faster than runs whose threads take turns on all of them. Of an accelerator's memory
  JAX takes three quarters for the first process that comes, unless it is told how much: so it is, where the user does
  not say.
  """
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  cuts = [len(cores) * job // jobs if len(cores) >= jobs else 0 for job in range(jobs + 1)]
  says = jobs == 1 or any(name in os.environ for name in MEMORY)
  environment = {} if says else {MEMORY[0]: f"{MEMORY_FOR_RUNS / jobs:.3f}"}
  return [Share(frozenset(cores[first:last]), environment) for first, last in itertools.pairwise(cuts)]


@functools.cache
def tied_to_this() -> list[str]:
  """Returns what to put before a command that is to be told to stop when this process ends however it ends.

  Nothing where there is no setpriv (of util-linux) that can do it.
  """
  tie = ["setpriv", "--pdeathsig", "TERM"]
  try:
    works = subprocess.run([*tie, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
  except OSError:
    return []
  return tie if works else []


def launch(command: list[str], log: pathlib.Path, share: Share) -> subprocess.Popen:
  """Starts a run on its share of the machine, its output at the end of a log file.

  In a session of its own: Ctrl-C is for this command, which tells the run to stop, once. Where this command is killed,
  the system tells the run (on Linux).

  Raises:
    ValueError: the folder of the log cannot be written.
  """
  try:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("a")
  except OSError as error:
    raise ValueError(f"--out: {log} cannot be written: {error.strerror}; choose another folder") from error
  with file:
    file.write(f"$ {shlex.join(command)}\n")
    file.flush()
    process = subprocess.Popen([*tied_to_this(), *command], stdin=subprocess.DEVNULL, stdout=file,
                               stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | share.environment)
  if share.cores:
    with contextlib.suppress(ProcessLookupError):  # it may have failed at once
      os.sched_setaffinity(process.pid, share.cores)
  return process


def select(grid: Grid, only: str | None = None, part: str | None = None) -> list[Planned]:
  """Returns the runs that are chosen, in order; all without a choice.

  Args:
    grid: of all runs.
    only: a regular expression; runs of which a name holds it.
    part: "K/N", of N hosts the K-th, from 1; every N-th of the runs, from the K-th on.

  Raises:
    ValueError: they are no regular expression or part, or choose no run.
  """
  try:
    pattern = re.compile(only or "")
  except re.error as error:
    raise ValueError(f"--only={only} is no regular expression: {error}") from error
  found = [planned for planned in grid.runs if any(map(pattern.search, (*planned.names, planned.folder)))]
  if not found:
    raise ValueError(f"--only={only}: none of the {len(grid.runs)} runs of {grid.path} is named so; names are like "
                     f"{grid.runs[0].names[0]!r}, and --list prints all of them")
  if part is None:
    return found
  host, _, hosts = part.partition("/")
  if not (host.isdecimal() and hosts.isdecimal() and 1 <= int(host) <= int(hosts)):
    raise ValueError(f"--part={part} must be K/N: of N hosts, the K-th, from 1; as in --part=1/4")
  if len(found) < int(host):
    raise ValueError(f"--part={part}: there are only {len(found)} runs, none is left for it; use fewer hosts")
  return found[int(host) - 1::int(hosts)]


def check_data(runs: Sequence[Planned], data: str | None) -> None:
  """Raises ValueError unless the data files of all runs are there."""
  wanted = sorted({planned.data for planned in runs if planned.data})
  if not wanted:
    return
  if data is None:
    raise ValueError(f"--data=FOLDER is missing; it is where {', '.join(wanted)} lie, which these runs read")
  absent = [name for name in wanted if not os.path.exists(os.path.join(data, name))]
  if absent:
    raise ValueError(f"--data={data} has no {', '.join(absent)}; put them there, or leave their tables out with --only")


def print_list(runs: Sequence[Planned], out: str, data: str | None) -> None:
  """Prints state, names and command of every run."""
  states: collections.Counter[str] = collections.Counter()
  for planned in runs:
    state, why = read_state(planned, out)
    states[state] += 1
    _say(f"{state:<8}  {' = '.join(planned.names)}{f'  ({why})' if why else ''}\n"
          f"          {shlex.join(planned.command(out, data or 'DATA'))}")
  print(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")


def run_all(runs: Sequence[Planned], out: str, data: str | None, jobs: int, after: Callable[[], None],
            told_to_stop: Callable[[], bool] = lambda: False, start: Launch = launch) -> list[str]:
  """Runs what is not complete, so many at a time; a run that another process has waits until it is free.

  Args:
    runs: in this order.
    out, data: folders of runs and data files.
    jobs: processes at a time.
    after: called after every run that became complete.
    told_to_stop: asked again and again; True ends all runs, each with a checkpoint.
    start: see Launch.

  Returns:
    The names of the runs that failed, with the reason.

  Raises:
    ValueError: the folder of a run cannot be written, or a file in it is damaged.
    processes.Preempted: told_to_stop; the same call goes on.
  """
  waiting = collections.deque(runs)
  running: list[Started] = []
  failed: list[str] = []
  elsewhere: set[str] = set()  # what was said to be in use
  free = share_machine(jobs)
  total = len(runs)

  def begin(planned: Planned, again: int = 0, began: float | None = None) -> None:
    share = free.pop(0)
    process = start(*_to_start(planned, out, data), share)
    running.append(Started(planned, process, share, again, began or time.monotonic()))

  try:
    while (waiting or running) and not told_to_stop():
      for _ in range(len(waiting)):  # those that are in use come round again
        if len(running) == jobs:
          break
        planned = waiting.popleft()
        if read_state(planned, out)[0] == COMPLETE:  # asked now: another command may have run it meanwhile
          continue
        if _is_in_use(planned, out):
          waiting.append(planned)
          if planned.folder not in elsewhere:
            elsewhere.add(planned.folder)
            _say(f"{planned.names[0]}: in use by another process, it waits")
          continue
        begin(planned)
        _say(f"{planned.names[0]}: started, {total - len(waiting)} of {total}; log in {_log(planned, out)}")
      for job in [job for job in running if job.process.poll() is not None]:
        running.remove(job)
        free.append(job.share)
        code, name = job.process.poll(), job.planned.names[0]
        if code == processes.TRY_AGAIN and job.again < MOST_AGAIN and not told_to_stop():
          _say(f"{name}: ended with code {code}, it goes on where it was ({job.again + 1} of {MOST_AGAIN} times)")
          begin(job.planned, job.again + 1, job.began)
        elif code == 0 and read_state(job.planned, out)[0] == COMPLETE:
          minutes = (time.monotonic() - job.began) / 60
          _say(f"{name}: test NDCG@10 {_read_ndcg(job.planned, out)}, {minutes:.1f} minutes")
          after()
        elif code == processes.TRY_AGAIN and told_to_stop():  # it was told, too, and earlier than by this command
          waiting.appendleft(job.planned)
        elif _is_in_use(job.planned, out):  # another command began it in the same moment
          waiting.append(job.planned)
        else:
          failed.append(f"{name} ({_explain(code, job.planned, out)})")
          _say(f"{name}: FAILED, {_explain(code, job.planned, out)}; log in {_log(job.planned, out)}")
      if running or waiting:
        time.sleep(PAUSE_S)
    if told_to_stop() and (running or waiting):
      _say(f"told to stop: {len(running)} runs save what they have")
      _end(running)
      if any(read_state(job.planned, out)[0] == COMPLETE for job in running):  # it was at its end
        after()
      raise processes.Preempted(f"{len(running)} runs were stopped and {len(waiting)} not started")
  finally:
    for job in running:  # nothing after a clean end; after an error, or a second Ctrl-C, none may stay behind
      if job.process.poll() is None:
        job.process.kill()
        job.process.wait()
  return failed


def _end(running: Sequence[Started]) -> None:
  """Tells all runs to stop, and waits until they have saved."""
  for job in running:
    job.process.terminate()
  for job in running:
    job.process.wait()


def _to_start(planned: Planned, out: str, data: str | None) -> tuple[list[str], pathlib.Path]:
  """Returns what a Launch takes, but for the share."""
  return planned.command(out, data or "", python=sys.executable), _log(planned, out)


def _is_in_use(planned: Planned, out: str) -> bool:
  """Whether another process has the folder of a run."""
  try:
    lock_folder(epath.Path(out) / planned.folder, "--out").close()
  except ValueError as error:
    if not isinstance(error.__cause__, BlockingIOError):
      raise
    return True
  return False


def _log(planned: Planned, out: str) -> pathlib.Path:
  return pathlib.Path(out) / planned.folder / "log.txt"


def _read_ndcg(planned: Planned, out: str) -> str:
  return show_metric(read_json(epath.Path(out) / planned.folder / "result.json")["test"]["ndcg@10"])


def _explain(code: int, planned: Planned, out: str) -> str:
  """Returns why a run failed: its exit code, and the last line that it wrote."""
  log = _log(planned, out)
  lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
  last = lines[-1].strip()[:300] if lines and not lines[-1].startswith("$ ") else "it wrote nothing"
  if code == 0:
    return "it ended with code 0 and is not complete"
  return f"{f'killed by signal {-code}' if code < 0 else f'code {code}'}: {last}"


def _say(text: str) -> None:
  print(printable(text), flush=True)


def reproduce(grid_path: str, out: str, data: str | None, only: str | None, jobs: int, results: str,
              part: str | None = None, list_only: bool = False, report_only: bool = False,
              told_to_stop: Callable[[], bool] = lambda: False, start: Launch = launch) -> None:
  """Runs what is left of a grid, and writes its results.

  Args:
    grid_path: a grid file.
    out, data, jobs, told_to_stop, start: see run_all.
    only, part: see select; the results are of the whole grid all the same.
    results: the markdown file.
    list_only: print all runs, and nothing else.
    report_only: write the results, and run nothing.

  Raises:
    ValueError: an argument is wrong; see load_grid, select, check_data, read_states and write_results; or runs failed.
    processes.Preempted: see run_all.
  """
  if jobs < 1:
    raise ValueError(f"--jobs={jobs} must be at least 1")
  if list_only and report_only:
    raise ValueError("--list and --report_only exclude each other; give one of them")
  grid = load_grid(grid_path)
  runs = select(grid, only, part)
  if list_only:
    print_list(runs, out, data)
    return
  if report_only:
    write_results(grid, out, results)
    print(results)
    return
  states = read_states(grid, out)
  left = [planned for planned in runs if states[planned.folder] != COMPLETE]
  check_data(left, data)
  _say(f"{len(runs)} runs: {len(runs) - len(left)} complete, {len(left)} to run, {jobs} at a time")
  unwritten = ""

  def report() -> None:
    nonlocal unwritten
    try:
      write_results(grid, out, results)
      unwritten = ""
    except ValueError as error:  # runs that are under way are worth more than the page
      unwritten = f"the results could not be written: {error}"
      print(printable(unwritten), file=sys.stderr, flush=True)

  failed = run_all(left, out, data, jobs, report, told_to_stop, start)
  report()  # also of what others ran meanwhile
  if failed or unwritten:
    raise ValueError("; ".join([*([f"{len(failed)} of {len(left)} runs failed: {', '.join(failed)}. The same command "
                                   "tries them again"] if failed else []), *([unwritten] if unwritten else [])]))
  print(results)


def main(argv: Sequence[str]) -> None:
  """Runs the grid; exit code 75: start the same command again."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; flags start with --")
  runs_anything = not (LIST.value or REPORT_ONLY.value)
  try:
    reproduce(GRID.value, OUT.value, DATA.value, ONLY.value, JOBS.value, RESULTS.value, PART.value, LIST.value,
              REPORT_ONLY.value, processes.listen() if runs_anything else lambda: False)
  except processes.Preempted as notice:
    print(f"stopped as told, {notice}; all steps are saved, and the same command goes on", file=sys.stderr)
    sys.exit(processes.TRY_AGAIN)
  except ValueError as error:
    refuse(error)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  GRID = flags.DEFINE_string("grid", "configs/grids/results.py", "The declared grid.")
  OUT = flags.DEFINE_string("out", RUNS, "The folder of all runs; those that are published are there already.")
  DATA = flags.DEFINE_string("data", None, "The folder of the data files: amazon-beauty.txt, amazon-sports.txt, "
                             "ml-1m.txt.")
  ONLY = flags.DEFINE_string("only", None, "Runs whose TABLE/ROW/seed_S holds this regular expression, as "
                             "'B beauty/(none|value)/seed_0'.")
  PART = flags.DEFINE_string("part", None, "K/N: this is the K-th, from 1, of N hosts that share the folder of runs, "
                             "and runs its part.")
  LIST = flags.DEFINE_bool("list", False, "Print state and command of every run, and run nothing.")
  REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write the results from what is there, and run nothing.")
  RESULTS = flags.DEFINE_string("results", "docs/results.md", "The page that is written, with figures in a folder "
                                "beside it.")
  JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time, each a process with its share of the machine.")
  app.run(main)
