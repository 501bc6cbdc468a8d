"""What a run measured: each line goes to metrics.jsonl, to TensorBoard and to the terminal."""

import io
import json
import logging
import os
import sys
import time

import tqdm
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from awrsr_jax.engine.run_folder import is_remote, write_text
from awrsr_jax.foreign import parse_json

LOG = logging.getLogger(__name__)


class MetricsWriter:
  """Writes each metric line to metrics.jsonl, to TensorBoard, and to the terminal (a bar on a TTY, else log lines)."""

  def __init__(self, workdir: str | os.PathLike[str], start: int, total: int):
    """Opens the files at step `start` of `total`; lines that a lost part of the run wrote go."""
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._kept = keep_lines(self._path, start)
    self._file = io.StringIO() if is_remote(workdir) else self._path.open("a")
    self._events = None if is_remote(workdir) else open_events(self._path.with_name("tensorboard"), start)
    self._bar = tqdm.tqdm(initial=start, total=total, unit="step") if sys.stderr.isatty() else None
    self._shown: dict[str, str] = {}
    self._total = total
    self._begun: tuple[int, float] | None = None  # the first step that was done here, and when: eta counts from there

  def advance(self, step: int) -> None:
    """Moves the progress bar on to a step that is done."""
    self._begun = self._begun or (step, time.monotonic())
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
    """Writes one line: what was measured on a split after a step."""
    self._file.write(json.dumps({"step": step, "epoch": epoch, "split": split, **values}) + "\n")
    self._file.flush()
    if self._events is not None:
      for name, value in values.items():
        self._events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(f"{split}/{name}", value)))
    shown: dict[str, str] = {
        name: f"{values[name]:.4g}" for name in ("loss", "ndcg@10", "interactions_per_sec") if name in values}
    if self._bar is not None:
      self._shown |= shown
      self._bar.set_postfix(self._shown)
    else:
      if self._begun and step > self._begun[0]:
        took = (time.monotonic() - self._begun[1]) / (step - self._begun[0])
        shown["eta"] = f"{took * (self._total - step):.0f}s"
      LOG.info("step %d/%d epoch %d %s %s", step, self._total, epoch, split,
               " ".join(f"{name}={value}" for name, value in shown.items()))

  def sync(self) -> None:
    """Makes sure that all lines are stored, before a checkpoint makes them final."""
    if isinstance(self._file, io.StringIO):
      self._path.write_text(self._kept + self._file.getvalue())
      return
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Closes files and bar."""
    self.sync()
    self._file.close()
    if self._events is not None:
      self._events.close()
    if self._bar is not None:
      self._bar.close()


def open_events(folder: epath.Path, start: int) -> EventsWriter:
  """Opens a file of TensorBoard events after a step: what an earlier file says of later steps, TensorBoard forgets.

  Not by SummaryWriter: its thread dies on a full disk, and then the run would wait for it without end.
  """
  folder.mkdir(exist_ok=True)
  # the name has whole seconds only: without the suffix a quick resumption would overwrite the events before it
  events = EventsWriter(str(folder / "events"), f".{start}")
  events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
  return events


class NoWriter:
  """The MetricsWriter of the other processes of a run: they write nothing."""

  def advance(self, step: int) -> None: ...
  def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None: ...
  def sync(self) -> None: ...
  def close(self) -> None: ...


def keep_lines(path: epath.Path, last_step: int) -> str:
  """Drops the lines of metrics.jsonl that a run which goes on after a step writes again, and a half-written one.

  Those are the lines of later steps, and the evaluation of that step. In one atomic replacement.

  Returns:
    The lines kept.
  """
  if not path.exists():
    return ""
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      content = parse_json(line, "it")
      if line.endswith(b"\n") and (content["step"], content["split"] != "train") <= (last_step, False):
        kept.append(line.decode())
    except (ValueError, TypeError):
      LOG.warning("%s: dropped a damaged line: %r", path, line[:80])
  text = "".join(kept)
  write_text(path, text)
  return text
