"""Several real processes on this machine: they agree with one, stop together, miss each other, and hand a run over."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from faults.runs import read_lines, read_result

from awrsr_jax.engine import processes

ROOT = pathlib.Path(__file__).parent.parent
# 24 steps, with lines at 3, 6, 8 (valid), 9, 12, ... and checkpoints at 8, 9, 16, 18 and 24
FLAGS = ("--config.mesh.data=-1", "--config.train.epochs=6", "--config.checkpoint.every_steps=9",
         "--config.eval.every_epochs=2", "--config.train.learning_rate=0.01", "--config.train.item_start=cooccurrence",
         "--config.model.refine=none")


class Run:
  """The processes of a run, started; their output goes to files in `folder`."""

  def __init__(self, folder: pathlib.Path, workdir: pathlib.Path, count: int, *flags: str, devices: int = 1,
               other_flags: tuple[str, ...] = ()):
    """`other_flags` are for the last process only."""
    with socket.socket() as found:
      found.bind(("localhost", 0))
      port = found.getsockname()[1]
    folder.mkdir(exist_ok=True)
    self.workdir, self.started, self.logs = workdir, [], [folder / f"{process}.log" for process in range(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    for process, log in enumerate(self.logs):
      who = (f"--coordinator_address=localhost:{port}", f"--num_processes={count}", f"--process_id={process}")
      extra = other_flags if process == count - 1 else ()
      command = [sys.executable, "-m", "awrsr_jax.main", "--config=tests/tiny_config.py", f"--workdir={workdir}",
                 *FLAGS, *flags, *extra, *(who if count > 1 else ())]
      with log.open("w") as file:
        self.started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))

  def wait(self, timeout: float = 300) -> list[int]:
    """Returns the exit codes."""
    deadline = time.monotonic() + timeout
    return [process.wait(deadline - time.monotonic()) for process in self.started]

  def signal_when(self, lines: int, process: int, number: int) -> "Run":
    """Sends a signal to one process once metrics.jsonl has so many lines."""
    path, deadline = self.workdir / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
      assert all(other.poll() is None for other in self.started), self.output()
      assert time.monotonic() < deadline
      time.sleep(0.001)
    os.kill(self.started[process].pid, number)
    return self

  def output(self) -> str:
    return "\n".join(log.read_text() for log in self.logs)

  def kill(self) -> None:
    for process in self.started:
      process.kill()
      process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Returns the function that starts a run; what is still running at the end of the tests is killed."""
  with contextlib.ExitStack() as started:
    def start(workdir, count, *flags, **options):
      run = Run(tmp_path_factory.mktemp("logs"), workdir, count, *flags, **options)
      started.callback(run.kill)
      return run
    yield start


@pytest.fixture(scope="module")
def finish(start, tmp_path_factory):
  """Returns a function: runs to the end in a new folder. Returns the folder."""
  def finish(count, *flags, **options):
    run = start(tmp_path_factory.mktemp("run"), count, *flags, **options)
    assert run.wait() == [0] * count, run.output()
    return run.workdir
  return finish


@pytest.fixture(scope="module")
def by_one(finish):
  return finish(1)


@pytest.fixture(scope="module")
def by_two(finish):
  return finish(2)


def assert_agree(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """The same lines and result, to float tolerance: rounding differs where sums are split over devices."""
  def compare(found, wanted, where):
    if isinstance(wanted, dict):
      assert found.keys() == wanted.keys(), where
      for key in wanted.keys() - {"device", "params_sha256"}:
        compare(found[key], wanted[key], f"{where} {key}")
    elif isinstance(wanted, float):
      np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=where)
    else:
      assert found == wanted, where
  found, wanted = read_lines(workdir), read_lines(expected)
  assert len(found) == len(wanted)
  for one, other in zip(found, wanted, strict=True):
    compare(one, other, f"line {other['step']} {other['split']}")
  compare(read_result(workdir), read_result(expected), "result")


def assert_equal(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """Bit for bit: the same lines, and the same result with its hash of the parameters."""
  assert read_lines(workdir) == read_lines(expected)
  assert read_result(workdir) == read_result(expected)


def test_two_processes_agree_with_one(by_one, by_two):
  assert_agree(by_two, by_one)
  assert json.loads((by_two / "result.json").read_text())["device"].startswith("2 x")


def test_a_complete_run_is_complete_to_all_processes(start, by_two):
  run = start(by_two, 2)
  assert run.wait(60) == [0, 0] and "is complete" in run.output(), run.output()


@pytest.mark.skipif(not (ROOT / ".venv" / "installed.txt").exists(), reason="the script would install an environment")
def test_the_script_for_this_machine_starts_them_all(tmp_path):
  command = ["bash", "launch/local_processes.sh", "2", "--config=tests/tiny_config.py", f"--workdir={tmp_path}/run",
             *FLAGS, "--config.train.epochs=1"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "run" / "result.json").read_text())["device"].startswith("2 x")
  assert "ndcg@10" in done.stdout and "ndcg@10" not in (tmp_path / "run.process_1.log").read_text()


def test_told_to_stop_killed_and_damaged_a_run_of_two_ends_bit_equal(start, by_two, tmp_path):
  workdir = tmp_path / "run"
  run = start(workdir, 2).signal_when(lines=1, process=1, number=signal.SIGTERM)
  assert run.wait() == [processes.TRY_AGAIN] * 2, run.output()
  at = [int(step) for step in re.findall(r"stopped as told, at step (\d+)", run.output())]
  assert len(at) == 2 and at[0] == at[1] and (workdir / "checkpoints" / str(at[0])).exists()

  run = start(workdir, 2).signal_when(lines=5, process=1, number=signal.SIGKILL)
  began = time.monotonic()
  assert f"resumed at step {at[0]} of" in run.output()
  codes = run.wait()
  assert codes == [processes.TRY_AGAIN, -signal.SIGKILL] and time.monotonic() - began < 60, run.output()
  assert "another process of this run is gone" in run.output() and not (workdir / "result.json").exists()

  newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  for path in (workdir / "checkpoints" / str(newest) / "state" / "d").iterdir():
    path.write_bytes(b"")
  run = start(workdir, 2)
  assert run.wait() == [0, 0], run.output()
  assert f"checkpoint {newest} of {workdir}/checkpoints is damaged and is not used" in run.output()
  assert_equal(workdir, by_two)


def test_when_process_0_is_killed_the_other_ends_too(start, tmp_path):
  run = start(tmp_path / "run", 2).signal_when(lines=1, process=0, number=signal.SIGKILL)
  began = time.monotonic()
  codes = run.wait()
  assert codes[1] in (processes.TRY_AGAIN, -signal.SIGABRT) and time.monotonic() - began < 60, run.output()
  assert re.search("another process of this run is gone|another task died", run.output()), run.output()


def test_a_run_goes_from_four_processes_with_a_split_table_to_one_and_to_two(start, by_one, tmp_path):
  workdir = tmp_path / "run"
  run = start(workdir, 4, "--config.mesh.data=2", "--config.mesh.model=2").signal_when(1, 0, signal.SIGTERM)
  assert run.wait() == [processes.TRY_AGAIN] * 4, run.output()
  run = start(workdir, 1, devices=4).signal_when(3, 0, signal.SIGTERM)
  assert run.wait() == [processes.TRY_AGAIN], run.output()
  run = start(workdir, 2, "--config.mesh.data=1", "--config.mesh.model=2")
  assert run.wait() == [0, 0] and "resumed at step" in run.output(), run.output()
  assert_agree(workdir, by_one)


def test_a_process_without_a_device_is_refused(start, tmp_path):
  run = start(tmp_path / "run", 2, "--config.mesh.data=1")
  assert run.wait(60) == [1, 1], run.output()
  assert "leaves processes [1] of 2 without a device; use all 2 devices" in run.logs[0].read_text()


@pytest.mark.parametrize("flags, message", [
    (("--config.train.batch_size=8", "--config.data.synthetic.num_users=61"),
     "num_users: 60 on process 0, 61 on process 1; train.batch_size: 16 on process 0, 8 on process 1"),
    (("--config.model.heads=3",), "process 1: config.model.heads=3 does not divide config.model.width=8"),
    (("--workdir=elsewhere",), "process 1: --workdir=elsewhere of process 0 is not seen here"),
])
def test_what_is_wrong_on_one_process_ends_all_with_its_message(start, tmp_path, flags, message):
  run = start(tmp_path / "run", 2, other_flags=flags)
  assert run.wait(60) == [1, 1], run.output()
  assert message in run.logs[0].read_text() and "Traceback" not in run.output()
  assert not (ROOT / "elsewhere").exists()


def test_an_error_of_one_process_alone_is_told_from_one_of_all(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "gather", lambda text: [text, '{"a": 2}'])  # process 1 says this
  with pytest.raises(UnicodeError, match="mine") as of_this, processes.together():
    raise UnicodeError("mine")
  with pytest.raises(ValueError, match='process 1: {"a": 2}') as of_another, processes.together():
    pass
  with pytest.raises(ValueError, match="a: 1 on process 0, 2 on process 1") as of_both:
    processes.check_equal("config", {"a": 1})
  with pytest.raises(ValueError, match="invalid literal") as of_first:
    processes.array_from_first(lambda: int("made by process 0"), (), np.int32)
  agreed = [of_this.value, of_another.value, of_both.value, of_first.value, FloatingPointError("not finite")]
  assert not any(map(processes.fails_alone, agreed)) and processes.fails_alone(ValueError("mine"))
  monkeypatch.setattr(jax, "process_count", lambda: 1)
  assert not processes.fails_alone(ValueError("mine"))


NCCL = "INTERNAL: NCCL operation {} failed: {}. Last NCCL warning(error) log entry (may be unrelated) '{}'."


@pytest.mark.parametrize("kind, message, is_loss", [
    (jax.errors.JaxRuntimeError, "UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:4711", True),
    (jax.errors.JaxRuntimeError, "UNAVAILABLE: The following tasks are unhealthy: /job:jax_worker/task:1", True),
    (TimeoutError, "Timeout waiting at barrier. The original error raised was: UNAVAILABLE: failed to connect", True),
    (ValueError, "UNAVAILABLE: Error reading \"gs://bucket/run/checkpoints/9\": All 32 retry attempts failed", False),
    (RuntimeError, "checkpoints cannot be read now (ValueError: UNAVAILABLE: Error reading gs://bucket/run)", False),
    (jax.errors.JaxRuntimeError, NCCL.format(
        "ncclGroupEnd()", "remote process exited or there was a network error", ""), True),
    (jax.errors.JaxRuntimeError, NCCL.format(
        "ncclGroupEnd()", "unhandled system error", "socketProgress: Connection closed by remote peer"), True),
    (jax.errors.JaxRuntimeError, NCCL.format(
        "ncclGroupEnd()", "unhandled cuda error", "Cuda failure 2 'out of memory'"), False),
    (jax.errors.JaxRuntimeError, NCCL.format(
        "ncclCommInitRank(&comm, nranks, id, rank)", "unhandled system error", "No space left on device"), False),
    (jax.errors.JaxRuntimeError, NCCL.format(
        "ncclCommInitRank(&comm, nranks, id, rank)", "unhandled system error", "Connection refused"), False),
])
def test_what_tells_that_another_process_is_gone(kind, message, is_loss, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(processes.ProcessLost if is_loss else kind), processes.noticing_losses():
    raise kind(message)


@pytest.mark.parametrize("who, message", [
    ((None, 2, 0), "--coordinator_address missing"),
    (("localhost:1", None, None), "--num_processes, --process_id missing"),
    (("localhost:1", 2, 2), "--process_id=2 must be at least 0 and below --num_processes=2"),
    (("localhost", 2, 0), "--coordinator_address=localhost must be HOST:PORT"),
])
def test_flags_that_do_not_name_a_process_are_refused(who, message):
  with pytest.raises(ValueError, match=message):
    processes.start(*who)


def test_a_port_that_process_0_cannot_have_is_refused():
  with socket.create_server(("", 0)) as taken:
    with pytest.raises(ValueError, match="cannot have this port .*Address already in use"):
      processes.start(f"localhost:{taken.getsockname()[1]}", 2, 0)
  with pytest.raises(ValueError, match="cannot have this port .*0-65535"):
    processes.start("localhost:99999", 2, 0)


def test_a_message_that_quotes_a_name_that_is_no_unicode_reaches_all(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.stack([x, x]))
  assert processes.gather("\udcff is é") == ["\\udcff is é"] * 2


def test_one_process_alone_needs_no_flags_and_agrees_with_itself(monkeypatch):
  monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined others"))
  for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST"):
    monkeypatch.delenv(name, raising=False)
  processes.start(None, None, None)
  assert processes.gather("é") == ["é"] and processes.from_first({"a": [1]}) == {"a": [1]} and processes.is_first()
  processes.check_equal("config", {"a": 1})
  with pytest.raises(ValueError, match="mine"), processes.together():
    raise ValueError("mine")


def test_a_slurm_step_of_several_tasks_joins_and_of_one_does_not(monkeypatch):
  joined = []
  monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *args, **_: joined.append(args))
  monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
  for tasks in ("1", "2"):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    processes.start(None, None, None)
  assert joined == [()]


@pytest.mark.parametrize("named", [True, False])
def test_a_tpu_host_joins_the_others_or_starts_alone_where_nothing_names_them(monkeypatch, caplog, named):
  joined = []

  def initialize(*args, **_):
    joined.append(args)
    if not named:
      raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
  monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
  monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
  monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
  processes.start(None, None, None)
  assert joined == [()] and ("starts alone" in caplog.text) == (not named)


def test_signals_are_noted_and_a_second_ctrl_c_ends_the_process():
  code = ("import time\nfrom awrsr_jax.engine import processes\ntold = processes.listen()\nprint(told(), flush=True)\n"
          "while not told(): time.sleep(0.01)\nprint(told(), flush=True)\ntime.sleep(60)")
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "False\n"
  process.terminate()
  assert process.stdout.readline() == "True\n"
  process.terminate()
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.3)
  process.send_signal(signal.SIGINT)
  assert process.wait(30) == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_process_exits_leaves_its_code(number):
  code = ("import os, sys\nfrom awrsr_jax.engine import processes\nprocesses.listen()\n"
          f"class Last:\n  def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {int(number)})\n"
          "sys.last = Last()\nsys.exit(75)")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 75
