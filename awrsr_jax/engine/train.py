"""Training: one loop that reads top to bottom."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from awrsr_jax.config import finalize, walk
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import cooccurrence, prepared
from awrsr_jax.data import corpus as data_corpus
from awrsr_jax.engine import checkpoint, compiling, memory, metrics, processes, ranking, run_folder
from awrsr_jax.engine import feed as feeds
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import NO_STEP, TrainState, init_state, make_optimizer, make_schedule
from awrsr_jax.engine.step import Report, make_train_step
from awrsr_jax.model.backbones import build_backbone

LOG = logging.getLogger(__name__)
CHOSEN_BY = "ndcg@10"  # on validation: early stopping and the best checkpoint
FRESH = {"step": 0, "best": -1.0, "best_step": 0, "worse": 0, "seconds": 0.0}  # a record; best: below any metric


@dataclasses.dataclass(frozen=True)
class Job:
  """What a run is made of and never changes."""

  config: Any
  corpus: data_corpus.Corpus
  mesh: Mesh
  backbone: nn.Module
  optimizer: optax.GradientTransformation
  batches: data_batches.TrainBatches
  ranking: dict[str, data_batches.RankingBatches]
  items: jax.Array | None  # the corpus on the devices, where it lives there
  cumulative: jax.Array  # (I,) int32, training interactions with items 1 to i, on the devices
  train_step: jax.stages.Wrapped
  rank_step: Callable

  @property
  def total_steps(self) -> int:
    """Optimizer steps of all epochs."""
    return len(self.batches)

  def epoch(self, step: int) -> int:
    """Returns the epoch, from 1, that a step (from 1) belongs to."""
    return -(-step // self.batches.steps_per_epoch)

  def evaluates(self, step: int) -> bool:
    """Whether validation is due after a step: every so many epochs, and at the end."""
    epoch, rest = divmod(step, self.batches.steps_per_epoch)
    return rest == 0 < step and (epoch % self.config.eval.every_epochs == 0 or step == self.total_steps)

  def steps_to_pause(self, step: int) -> int:
    """Returns how many steps may follow on a step before a line, a checkpoint or the end of an epoch is due."""
    return min(every - step % every for every in (
        self.config.train.log_every, self.config.checkpoint.every_steps, self.batches.steps_per_epoch))


def make_job(config: Any, table: Any = None) -> Job:
  """Reads the data and builds everything; no compilation yet.

  Args:
    config: from a config file.
    table: a pandas, polars or pyarrow table, instead of the data that the config names.

  Raises:
    ValueError: config, data or devices do not fit together, on this process or another.
  """
  with processes.together():
    config = finalize(config)
    mesh = meshes.make_mesh(config.mesh)
    meshes.check_config(mesh.shape["data"], mesh.shape["model"], config)
    corpus = prepared.load(config.data, table)
    parts = meshes.local_parts(mesh)
    batches = data_batches.training_batches(corpus, config, parts)
    ranked = {split: data_batches.ranking_batches(corpus, config, split, parts) for split in ("valid", "test")}
    is_resident = feeds.is_resident(config, batches)
    backbone = build_backbone(config, corpus.num_items)
  processes.check_equal("config", dict(walk(config)))
  processes.check_equal("corpus", data_corpus.describe(corpus))
  optimizer = make_optimizer(config.train, len(batches))
  items = meshes.replicate(mesh, np.asarray(corpus.items)) if is_resident else None
  cumulative = meshes.replicate(mesh, np.cumsum(corpus.counts[1:], dtype=np.int32))
  return Job(config, corpus, mesh, backbone, optimizer, batches, ranked, items, cumulative,
             make_train_step(backbone, mesh, optimizer, config, batches.targets_per_step),
             ranking.make_rank_step(backbone, mesh, config.eval.block_items))


def train(config: Any, workdir: str | os.PathLike[str],
          told_to_stop: Callable[[], bool] = lambda: False, table: Any = None) -> dict[str, Any]:
  """Trains, evaluates and leaves a run folder; the same call goes on where an earlier one was cut off.

  All processes of a run call it, with the same arguments.

  Args:
    config: from a config file.
    workdir: the run folder, see engine/run_folder.py; the same one for all processes.
    told_to_stop: asked at every step and batch; True on one process ends the run on all, with a checkpoint.
    table: a pandas, polars or pyarrow table, instead of the data that the config names.

  Returns:
    The content of result.json.

  Raises:
    ValueError: anything wrong with config, data, devices or workdir, before the first step; or, later, a prepared
      corpus or the best checkpoint is damaged.
    FloatingPointError: the loss or the gradient stopped being finite; the last good checkpoint stays.
    run_folder.DiskFull: no space is left; the same call goes on from the newest checkpoint once there is.
    checkpoint.Unreachable: the machine cannot read a checkpoint; the same call goes on once it can.
    processes.Preempted: told_to_stop; the same call goes on from the step that it was at.
    processes.ProcessLost: another process is gone; the same call goes on from the newest checkpoint.
  """
  began = time.monotonic()
  with processes.noticing_losses(), compiling.watching() as compiled:
    job = make_job(config, table)
    with hold_folder(workdir, job) as result:
      if result is not None:
        LOG.info("%s is complete (%d steps); nothing to do", workdir, result["steps"])
        return result
      with checkpoint.open_checkpoints(workdir) as manager:
        with processes.together():
          state, record = start_or_resume(job, manager)
        state, record = run_steps(job, workdir, manager, state, record, began, compiled, told_to_stop)
        record |= {"seconds": record["seconds"] + time.monotonic() - began}
        result = conclude(job, workdir, manager, state, record, told_to_stop)
        result |= {"compiled": dataclasses.asdict(compiled)}  # in this start
      if processes.is_first():
        run_folder.write_json(epath.Path(workdir) / "result.json", result)
  return result


@contextlib.contextmanager
def hold_folder(workdir: str | os.PathLike[str], job: Job) -> Iterator[dict[str, Any] | None]:
  """Opens the run folder: process 0 takes it, the others only see that it is the same one.

  Yields:
    The content of result.json where the run is complete; else None.

  Raises:
    ValueError: see run_folder.open_run; or another process does not see the folder.
    DiskFull: what is done with the open folder needs more than is left.
  """
  result = None
  with run_folder.noticing_full_disk(workdir), contextlib.ExitStack() as held:
    with processes.together():
      if processes.is_first():
        lock, result = run_folder.open_run(workdir, job.config, data_corpus.describe(job.corpus))
        held.enter_context(lock)
    with processes.together(), run_folder.noticing_no_bucket(workdir):
      if not (epath.Path(workdir) / "corpus.json").exists():
        raise ValueError(f"--workdir={workdir} of process 0 is not seen here; all processes need the same folder, on a "
                         "shared file system or gs://")
    yield processes.from_first(result)


def start_or_resume(job: Job, manager: ocp.CheckpointManager) -> tuple[TrainState, dict[str, Any]]:
  """Returns the state and record of the newest good checkpoint, or fresh ones.

  Raises:
    ValueError: it was trained by another version, or longer; or see checkpoint.restore_newest.
  """
  init = functools.partial(init_state, job.backbone, job.optimizer, job.config.seed, job.mesh)
  template = meshes.template(job.mesh, jax.eval_shape(init))
  found = checkpoint.restore_newest(manager, template)
  if found is None:
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template.params))
    LOG.info("%d users, %d items, %d interactions; %d parameters; %d steps of %d epochs, lengths %s",
             job.corpus.num_users, job.corpus.num_items, job.corpus.num_interactions, count, job.total_steps,
             job.config.train.epochs, job.batches.buckets)
    return init(vectors=item_vectors(job)), dict(FRESH)
  step, lacking = found[1].get("step", 0), sorted(FRESH.keys() - found[1].keys())
  if lacking or step > job.total_steps:
    what = f"has no {', '.join(lacking)}" if lacking else f"is beyond the last step of this config, {job.total_steps}"
    raise ValueError(f"checkpoint {step} of {manager.directory} {what}: going on is for the version and config that "
                     "made it; start in another --workdir")
  LOG.info("resumed at step %d of %d", step, job.total_steps)
  return found


def item_vectors(job: Job) -> np.ndarray | None:
  """Returns the vectors (I + 1, D) that item vectors start from, the same on all processes; None: they are random."""
  if job.config.train.item_start == "random":
    return None
  width = job.config.model.width
  return processes.array_from_first(lambda: cooccurrence.item_vectors(job.corpus, width, job.config.seed),
                                    (job.corpus.num_items + 1, width), np.float32)


def run_steps(job: Job, workdir: str | os.PathLike[str], manager: ocp.CheckpointManager, state: TrainState,
              record: dict[str, Any], began: float, compiled: compiling.Compiled,
              told_to_stop: Callable[[], bool]) -> tuple[TrainState, dict[str, Any]]:
  """The loop: what is due of an evaluation, batch, step, then what is due of a line and a checkpoint.

  Returns:
    The last state and record.
  """
  config, step, seconds = job.config, record["step"], record["seconds"]
  first = step
  constants = {"config": config.to_dict(), "corpus": data_corpus.describe(job.corpus),
               "ids_are_numbers": job.corpus.item_ids.dtype.kind == "i"}
  ids = encode_items(job.corpus)
  writer = metrics.MetricsWriter(workdir, step, job.total_steps) if processes.is_first() else metrics.NoWriter()
  line = Line(job, writer, step)
  if job.items is None:
    calls = feeds.streamed_calls(job.mesh, job.batches, step)
  else:
    calls = feeds.resident_calls(job.mesh, job.batches, job.items, step, feeds.steps_per_call(config, job.mesh),
                                 job.steps_to_pause)
  while True:
    if job.evaluates(step):
      paused = time.monotonic()
      ranks = ranking.rank_users(job.rank_step, state.params, job.ranking["valid"], job.mesh, told_to_stop, job.items)
      found = processes.from_first(ranking.summarize(ranks))
      writer.write(step, job.epoch(step), "valid", found)
      record = note_evaluation(record, step, found[CHOSEN_BY])
      line.leave_out(time.monotonic() - paused)
    if step == job.total_steps or is_over(config, record):
      break
    call = next(calls)
    feed = call.feed | {"stop": meshes.stop_flags(job.mesh, told_to_stop())}
    before = compiled.seconds
    state, report = job.train_step(state, feed, job.cumulative, lengths=call.lengths)
    line.leave_out(compiled.seconds - before)
    if step == first:
      jax.block_until_ready(report)
      LOG.info("first step %.1f s after the start, of which compiling took %.1f s (%d programs, %d of them from the "
               "cache)", time.monotonic() - began, compiled.seconds, compiled.programs, compiled.from_cache)
    step += call.steps
    stop = line.flush()  # of the call before, while this one runs
    line.put(step, report)
    if not (stop or job.evaluates(step) or step % config.checkpoint.every_steps == 0):
      continue
    stop = line.flush() or stop
    writer.sync()
    record = record | constants | {"step": step, "seconds": seconds + time.monotonic() - began}
    paused = time.monotonic()
    checkpoint.save(manager, state, record, ids)
    line.leave_out(time.monotonic() - paused)
    if stop:
      manager.wait_until_finished()
      raise processes.Preempted(f"at step {step} of {job.total_steps}")
  manager.wait_until_finished()
  writer.close()
  return state, record | {"seconds": seconds}


class Line:
  """The training line of metrics.jsonl: takes device values after a step, reads them one step later."""

  def __init__(self, job: Job, writer: metrics.MetricsWriter | metrics.NoWriter, step: int):
    """Begins at a step, in the middle of a window where a run goes on."""
    self._job, self._writer = job, writer
    self._schedule = make_schedule(job.config.train, job.total_steps)
    self._waiting: tuple[int, Report] | None = None
    self._since, self._clock = step, time.monotonic()

  def leave_out(self, seconds: float) -> None:
    """Leaves so much of the time since the last line, which was no training, out of interactions_per_sec."""
    self._clock += seconds

  def put(self, step: int, report: Report) -> None:
    """Takes the report of a step; nothing is read."""
    self._waiting = step, report

  def flush(self) -> bool:
    """Reads the report that waits, if one does; writes a line when one is due: every so many steps, and at the end.

    Returns:
      Whether to stop.

    Raises:
      FloatingPointError: a loss or gradient was not finite.
    """
    if self._waiting is None:
      return False
    (step, report), self._waiting = self._waiting, None
    self._writer.advance(step)
    bad_step, stop = map(int, jax.device_get((report.bad_step, report.stop)))
    if bad_step != NO_STEP:
      raise FloatingPointError(
          f"the loss or its gradient is not finite at step {bad_step} (epoch {self._job.epoch(bad_step)}); "
          "the last checkpoint before it is kept. Lower config.train.learning_rate, or set config.train.clip_norm")
    if step % self._job.config.train.log_every and step != self._job.total_steps:
      return stop > 0
    window = jax.device_get(report.window)
    now, positions = time.monotonic(), window.positions / window.steps * (step - self._since)  # here, not before it
    self._writer.write(step, self._job.epoch(step), "train", {
        "loss": float(window.loss / max(window.positions, 1)), "grad_norm": float(window.grad_norm / window.steps),
        "learning_rate": float(self._schedule(step - 1)),
        "interactions_per_sec": round(float(positions) / (now - self._clock), 1)})
    self._since, self._clock = step, now
    return stop > 0


def note_evaluation(record: dict[str, Any], step: int, value: float) -> dict[str, Any]:
  """Returns the early-stopping record after one more evaluation."""
  if value > record["best"]:
    return record | {"best": value, "best_step": step, "worse": 0}
  return record | {"worse": record["worse"] + 1}


def is_over(config: Any, record: dict[str, Any]) -> bool:
  """Whether early stopping says so."""
  return config.train.patience is not None and record["worse"] >= config.train.patience


def encode_items(corpus: data_corpus.Corpus) -> dict[str, Any]:
  """Returns the raw ids and titles of the items as arrays, for the checkpoint."""
  titles = [corpus.titles.get(number, "") for number in range(1, corpus.num_items + 1)]
  return {"items": checkpoint.encode_texts(list(map(str, corpus.item_ids[1:].tolist()))),
          "titles": checkpoint.encode_texts(titles)}


def conclude(job: Job, workdir: str | os.PathLike[str], manager: ocp.CheckpointManager, state: TrainState,
             record: dict[str, Any], told_to_stop: Callable[[], bool]) -> dict[str, Any]:
  """Evaluates the best checkpoint on validation and, this once, on test; writes ranks; the state is given up.

  Returns:
    The content of result.json.

  Raises:
    ValueError: the best checkpoint cannot be read.
    FloatingPointError, processes.Preempted: see ranking.rank_users.
  """
  steps, params_sha256, devices = int(state.step), checkpoint.hash_arrays(state.params), job.mesh.devices
  template = meshes.template(job.mesh, state)
  jax.tree.map(lambda x: x.delete(), state)  # makes room for the best one
  with processes.together():
    try:
      best, _ = checkpoint.restore_step(manager, record["best_step"], template)
    except ValueError as error:
      raise ValueError(
          f"the run is trained, but its best checkpoint, step {record['best_step']} in {manager.directory}, cannot be "
          f"read: {error}. Bring that folder back, or train again in another --workdir") from error
  ranks = {split: ranking.rank_users(job.rank_step, best.params, batches, job.mesh, told_to_stop, job.items)
           for split, batches in job.ranking.items()}
  if job.config.eval.keep_ranks and processes.is_first():
    run_folder.write_ranks(epath.Path(workdir) / "ranks.parquet", job.ranking["test"], ranks["test"],
                           job.config.eval.hash_ids)
  splits = {split: ranking.summarize(found) for split, found in ranks.items()}
  result = {
      **{split: splits[split] for split in ("test", "valid")},
      "protocol": ranking.describe_protocol(job.config.eval.protocol, job.corpus.split.words),
      "loss": job.config.loss.name, "refine": job.config.model.refine, "backbone": job.config.model.backbone,
      "seed": job.config.seed, "epochs": job.config.train.epochs, "steps": steps,
      "best_step": record["best_step"], "best_epoch": job.epoch(record["best_step"]),
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(best.params)),
      "params_sha256": params_sha256,  # of the last step, see checkpoint.hash_arrays for the order
      "corpus": data_corpus.describe(job.corpus),
      "device": f"{devices.size} x {devices.flat[0].device_kind} ({devices.flat[0].platform})",
      "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
      "wall_time_s": round(record["seconds"], 1), "peak_memory": memory.measure_peak(),
  }
  if job.corpus.oracle is not None:
    everyone = dataclasses.replace(job.ranking["test"], parts=data_batches.WHOLE)
    result["oracle"] = ranking.summarize(ranking.rank_by(everyone, job.corpus.oracle))
  return result
