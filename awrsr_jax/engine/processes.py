"""The processes of a run: how they start, agree, are told to stop, and notice that one of them is gone.

A run has one process a host (or a GPU), all in the same program; process 0 alone writes files. What one of them finds
wrong stops all of them; what they decide from their own clock or signals they decide together.
"""

import atexit
import contextlib
import functools
import glob
import importlib.util
import json
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LOG = logging.getLogger(__name__)
HEARTBEAT_TIMEOUT = 40  # seconds until a process that says nothing counts as lost
ON_ALL = "All processes of the run raise this."  # a note of such an error
TRY_AGAIN = 75  # exit code of a run that the same command continues (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
  """The run was told to stop, and everything up to its newest step is saved."""


class ProcessLost(Exception):
  """Another process of the run is gone."""


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the other processes of the run, if flags or the environment say that there are any.

  SLURM (srun) and Cloud TPU VMs say who is who; elsewhere the three flags do. Call it before JAX is used.

  Raises:
    ValueError: some but not all flags are given, they do not fit together, or process 0 cannot have the port.
  """
  given = {"--coordinator_address": coordinator_address, "--num_processes": num_processes, "--process_id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(f"{', '.join(missing)} missing: a process of a run needs all of {', '.join(given)}, "
                     "or none where SLURM or a Cloud TPU VM says them")
  if coordinator_address is not None and num_processes is not None and process_id is not None:
    if not 0 <= process_id < num_processes:
      raise ValueError(f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}")
    if not coordinator_address.rpartition(":")[2].isdigit():
      raise ValueError(f"--coordinator_address={coordinator_address} must be HOST:PORT of process 0")
    if process_id == 0:
      try:  # JAX may end with a segmentation fault where it cannot have the port
        socket.create_server(("", int(coordinator_address.rpartition(":")[2]))).close()
      except (OSError, OverflowError) as error:
        raise ValueError(f"--coordinator_address={coordinator_address}: process 0 cannot have this port ({error}); "
                         "choose another for all processes") from error
  # JAX's own preemption service wants a counter that only grows, and Orbax sets it back from a thread, to older steps:
  # a notice at that moment would be for a step that never comes. The train step carries the notice instead.
  jax.config.update("jax_enable_preemption_service", False)
  join = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
  if not missing:
    join(coordinator_address, num_processes, process_id)
  elif "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
    join()
  elif importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
    try:
      join()
    except ValueError as error:  # a TPU with no metadata of a Cloud TPU VM around it
      LOG.warning("this TPU host starts alone, because the environment does not name other hosts (%s)", error)


def is_first() -> bool:
  """Whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def gather(text: str) -> list[str]:
  """Returns the texts of all processes, in their order."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)  # names of files may not be Unicode
  sizes = multihost_utils.process_allgather(np.int32(content.size)).reshape(-1)
  room = 1 << max(int(sizes.max()) - 1, 255).bit_length()  # few sizes: each is a program to compile
  padded = np.pad(content, (0, room - content.size))
  return [row[:size].tobytes().decode() for row, size in zip(
      multihost_utils.process_allgather(padded).reshape(len(sizes), -1), sizes, strict=True)]


def from_first(value: Any) -> Any:
  """Returns process 0's value, a JSON value, on every process."""
  return value if jax.process_count() == 1 else json.loads(gather(json.dumps(value))[0])


def array_from_first(make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns the array that process 0 makes on every process; it is made there only.

  Raises:
    ValueError: `make` does; on all processes.
  """
  with together():
    array = make() if is_first() else np.zeros(shape, dtype)
  return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """What fails with a ValueError on one process fails on all: none is left waiting for the others.

  A collective inside has to fail on all processes or on none.
  """
  failure = None
  try:
    yield
  except ValueError as error:
    failure = error
  messages = gather("" if failure is None else str(failure))
  for process, message in enumerate(messages):
    if message and failure is None:
      failure = ValueError(f"process {process}: {message}")
  if failure is not None:
    if len(messages) > 1:
      failure.add_note(ON_ALL)
    raise failure


def check_equal(what: str, content: dict[str, Any]) -> None:
  """Raises ValueError when processes disagree about the content of `what`, with the first difference."""
  described = [json.loads(text) for text in gather(json.dumps(content, sort_keys=True))]
  for process, other in enumerate(described):
    changed = [f"{key}: {described[0].get(key)} on process 0, {other.get(key)} on process {process}"
               for key in sorted(described[0].keys() | other.keys()) if described[0].get(key) != other.get(key)]
    if changed:
      error = ValueError(f"the processes of this run have a different {what}: {'; '.join(changed)}. Start all of them "
                         "with the same command and the same data")
      error.add_note(ON_ALL)
      raise error


def fails_alone(error: Exception) -> bool:
  """Whether an error is of this process and not of the others, which wait for it.

  A FloatingPointError is of all: they read the same figures.
  """
  agreed = isinstance(error, FloatingPointError) or ON_ALL in getattr(error, "__notes__", ())
  return jax.distributed.is_initialized() and jax.process_count() > 1 and not agreed


def tells_of_a_loss(error: Exception) -> bool:
  """Whether an error is what JAX raises when another process is gone; there is no type for it.

  NCCL fails too where it was set up wrongly (another network, little shared memory), and a bucket can be UNAVAILABLE:
  the same command would fail again.
  """
  text = str(error)
  by_nccl = "NCCL" in text and "ncclCommInit" not in text and re.search("remote|connection|abort", text, re.IGNORECASE)
  by_service = "UNAVAILABLE" in text and isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError))  # or Orbax's
  signs = ("Gloo", "coordination service", "Connection closed by peer")
  return jax.process_count() > 1 and bool(by_nccl or by_service or any(sign in text for sign in signs))


@contextlib.contextmanager
def noticing_losses() -> Iterator[None]:
  """Turns what JAX raises when another process is gone into ProcessLost."""
  try:
    yield
  except Exception as error:
    if tells_of_a_loss(error):
      raise ProcessLost(str(error).splitlines()[0]) from error
    raise


def listen() -> Callable[[], bool]:
  """Returns a function: whether SIGTERM or SIGINT (Ctrl-C) has come since.

  A second Ctrl-C ends the process at once. A second SIGTERM does not: a machine that goes down sends several. While the
  process exits, where Python takes its own handlers away, both are ignored: its exit code stays what it is.
  """
  came = []

  def note(number: int, _: Any) -> None:
    came.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
    atexit.register(signal.signal, number, signal.SIG_IGN)
  return lambda: bool(came)
