"""Checkpoints: one Orbax bundle a step, with everything that a run or its users need, checked when it is read.

Items of a bundle: `state` (TrainState), `record` (JSON: step, early stopping, config, corpus, a checksum for every
array), `ids` (raw ids and titles of the items). Kept: the two newest, and the best on validation.

A bundle is the state of a step before its evaluation, which its record does not know: saving goes on beside evaluating,
and whoever goes on from it evaluates first. All processes of a run call these functions together; Orbax lets each write
what its devices hold.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from awrsr_jax.engine import processes
from awrsr_jax.engine.mesh import pieces
from awrsr_jax.engine.run_folder import is_remote
from awrsr_jax.engine.state import TrainState
from awrsr_jax.foreign import check_kinds, parse_json

LOG = logging.getLogger(__name__)
SCHEMA = 2  # of a bundle
LAW = 2  # of batches and dropout, what a step does with seed and config; 1: batches of one length each
KINDS = {"step": int, "best_step": int, "checksums": {...: int}, "ids_sha256": str, "config": dict,
         "corpus": {"items": int}}  # of a record
KEPT_LATEST = 2
MOST_BYTES = np.iinfo(np.int32).max  # of the ids of a bundle, and of its titles
# What tells of the machine and not of a file: errors of the system, of TensorStore, and of what reads a bucket.
MACHINE = {errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM}
STATUSES = "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED"
CLIENTS = "gcsfs.", "aiohttp.", "google.auth.", "requests."


class AnotherSchema(ValueError):
  """A checkpoint of another version of this package: not damaged, but not to be read here."""


class Unreachable(Exception):
  """A checkpoint cannot be read now, by the machine (memory, disk, network, rights); it may be good."""


class NewestAndBest(preservation_policy.PreservationPolicy):
  """Keeps the newest, and the best on validation as the newest of them knows it."""

  best_step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    newest = {info.step for info in checkpoints[-KEPT_LATEST:]}
    return [info.step in newest or info.step == self.best_step for info in checkpoints]


@contextlib.contextmanager
def open_checkpoints(workdir: str | os.PathLike[str], read_only: bool = False) -> Iterator[ocp.CheckpointManager]:
  """Opens the checkpoints of a run folder, which may be gs://...; leftovers of an interrupted save are removed.

  With `read_only` nothing is removed or written: the run may be going on.
  """
  kept = NewestAndBest()
  options = ocp.CheckpointManagerOptions(
      read_only=True, create=False, save_interval_steps=0) if read_only else ocp.CheckpointManagerOptions(
      preservation_policy=kept,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True)
  folder = epath.Path(workdir)
  folder = folder if is_remote(folder) else folder.absolute()
  manager = ocp.CheckpointManager(folder / "checkpoints", options=options)
  manager.kept = kept
  try:
    yield manager
  except Exception as error:
    if not processes.tells_of_a_loss(error):  # closing would wait for the process that is gone
      manager.close()
    raise
  manager.close()


@jax.jit
def checksum_leaves(tree: Any) -> Any:
  """Returns a uint32 for every array: the sum of its 32-bit words, each times an odd number made of its index.

  An odd factor loses no bit modulo 2^32, so every single flipped bit changes the sum. Integer sums are exact in any
  order: the checksum does not depend on how many devices or processes hold the array.
  """
  def checksum(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (index * np.uint32(0x9E3779B1) * 2 + 1), dtype=jnp.uint32)
  return jax.tree.map(checksum, tree)


def name_arrays(tree: Any) -> dict[str, Any]:
  """Returns path -> leaf, as "params/embedding/item_table", of every leaf of a tree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def name_checksums(tree: Any) -> dict[str, int]:
  """Returns path -> checksum of every array of a tree."""
  return {name: int(value) for name, value in name_arrays(jax.device_get(checksum_leaves(tree))).items()}


def save(manager: ocp.CheckpointManager, state: TrainState, record: dict[str, Any], ids: dict[str, np.ndarray]) -> None:
  """Starts saving a bundle in the background.

  Args:
    manager: from open_checkpoints.
    state: taken over at once: the caller may donate it right after.
    record: JSON, with "step" and "best_step", the best of the steps evaluated so far.
    ids: from encode_items.
  """
  step, manager.kept.best_step = record["step"], record["best_step"]
  record = record | {"schema": SCHEMA, "law": LAW, "checksums": name_checksums(state), "ids_sha256": hash_arrays(ids)}
  manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), ids=ocp.args.StandardSave(ids),
                              record=ocp.args.JsonSave({"content": record, "sha256": hash_json(record)})),
      force=True)


def restore_newest(manager: ocp.CheckpointManager, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
  """Restores the newest good bundle; a damaged one is named, moved aside and the one before is tried.

  Args:
    manager: from open_checkpoints.
    template: a TrainState of ShapeDtypeStructs with the shardings wanted here, whatever they were when saving.

  Returns:
    (state, record), or None when there is no checkpoint, and never was.

  Raises:
    ValueError: there are checkpoints, but none is good, or the newest is of another version of this package.
    Unreachable: nothing was moved; also of the functions below that read.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for step in steps:
    try:
      return restore_step(manager, step, template)
    except AnotherSchema as error:
      raise ValueError(f"checkpoint {step} of {manager.directory} is of another version of this package: {error}. "
                       "Finish the run with the version that began it, or start in another --workdir") from error
    except ValueError as error:
      LOG.error("checkpoint %d of %s is damaged and is not used: %s", step, manager.directory, error)
      set_aside(manager, step)
  if damaged_folder(manager).exists():
    raise ValueError(f"none of the checkpoints in {manager.directory} can be restored: all were damaged, and are in "
                     f"{damaged_folder(manager)}. Bring a good one back, or start again in another --workdir")
  return None


def restore_step(manager: ocp.CheckpointManager, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """Restores one bundle and checks every array against its checksum.

  Raises:
    ValueError: it does not fit the template, or is damaged, as any of the processes sees it.
  """
  with processes.together():
    record = read_record(manager, step)
    check_version(record, template)
  with processes.together(), reading():
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))["state"]
  check_arrays(state, record["checksums"])
  return state, record


def restore_params(manager: ocp.CheckpointManager, step: int, template: Any, record: dict[str, Any]) -> Any:
  """Restores the parameters of one bundle and nothing else of its state, checked as by restore_step.

  Args:
    manager: from open_checkpoints, with `read_only`.
    step: of the bundle.
    template: the parameters as ShapeDtypeStructs with the shardings wanted here.
    record: of the bundle.

  Raises:
    ValueError: it lacks some of the template, they do not fit it, or they are damaged.
  """
  wanted = {"params": template}
  lacking = sorted(name_arrays(wanted).keys() - record["checksums"].keys())
  if lacking:
    raise ValueError(f"it lacks {', '.join(lacking)}, which its own config asks for: another program than this "
                     "version's trained it; load it with that one")
  with reading():
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)))["state"]
  check_arrays(state, {name: value for name, value in record["checksums"].items() if name.startswith("params/")})
  return state["params"]


def check_version(record: dict[str, Any], template: TrainState) -> None:
  """Raises AnotherSchema when a run with states like the template cannot go on where that of the record was."""
  law, names = record.get("law", 1), sorted(record["checksums"].keys() ^ name_arrays(template).keys())
  if law != LAW:
    raise AnotherSchema(f"it was trained under law {law} of batches and dropout, and this version has law {LAW}, so "
                         "that going on would end as neither run; its model can still be used")
  if names:
    raise AnotherSchema(f"its state or this version's lacks {', '.join(names[:3])}{', ...' if names[3:] else ''} "
                         "(optax or flax may have been another one)")


def check_arrays(tree: Any, checksums: dict[str, int]) -> None:
  """Raises ValueError, with names, when arrays of a tree are not those whose checksums were saved."""
  found = name_checksums(tree)
  broken = [name for name in checksums | found if checksums.get(name) != found.get(name)]
  if broken:
    raise ValueError(f"checksums differ: {', '.join(broken)}")


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """Returns the record of one bundle.

  Raises:
    ValueError: it is damaged, or of another schema.
  """
  with reading():
    restored = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
  return check_record(restored["record"])


def check_record(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns the record inside of what is stored of it; raises ValueError when it is not what was saved."""
  with reading():
    text = json.dumps(stored)
  found = parse_json(text, "its record")
  check_kinds(found, {"content": dict, "sha256": str}, "its record")
  record = found["content"]
  if hash_json(record) != found["sha256"]:
    raise ValueError("its record was changed after saving")
  if record.get("schema") != SCHEMA:
    raise AnotherSchema(f"its schema is {record.get('schema')}, this version reads {SCHEMA}")
  check_kinds(record, KINDS, "its record")
  return record


@contextlib.contextmanager
def reading() -> Iterator[None]:
  """Turns what Orbax raises into ValueError for damaged files, and into Unreachable where the machine fails."""
  try:
    yield
  except Exception as error:
    if processes.tells_of_a_loss(error):
      raise
    cause: BaseException | None = error
    while cause and not is_of_machine(cause):
      cause = cause.__cause__  # Orbax wraps what TensorStore raises
    if cause:
      raise Unreachable(f"checkpoints cannot be read now ({in_short(cause)}); once they can, start the same command "
                        "again") from error
    raise ValueError(in_short(error)) from error


def in_short(error: BaseException) -> str:
  """Returns the first line of an error, without the spec that TensorStore adds."""
  return f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec")[0]


def restore_ids(manager: ocp.CheckpointManager, step: int, record: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
  """Returns the raw ids (int64, or text) and the titles ("" where unknown) of items 1 to I, from one bundle alone.

  Raises:
    ValueError: they are damaged.
  """
  with reading():
    ids = manager.restore(step, args=ocp.args.Composite(ids=ocp.args.StandardRestore()))["ids"]
  if hash_arrays(ids) != record["ids_sha256"]:
    raise ValueError("its item ids are damaged")
  with reading():
    items, titles = decode_texts(ids["items"]), decode_texts(ids["titles"])
    return np.array(items, np.int64 if record.get("ids_are_numbers") else object), titles


def is_of_machine(error: BaseException) -> bool:
  """Whether an error tells of the machine (memory, disk, network, rights) and not of the file that was read."""
  text = str(error)
  numbers = {getattr(error, "errno", None), *map(int, re.findall(r"os_error_code\S*='(\d+)'", text))}  # by TensorStore
  is_full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
  is_told = text.startswith(STATUSES) or type(error).__module__.startswith(CLIENTS)
  return is_full or is_told or not numbers.isdisjoint(MACHINE)


def damaged_folder(manager: ocp.CheckpointManager) -> epath.Path:
  """Returns where damaged checkpoints are moved to."""
  return manager.directory.with_name("checkpoints_damaged")


def set_aside(manager: ocp.CheckpointManager, step: int) -> None:
  """Moves a damaged checkpoint out of the way of the run, so that its step can be saved again; nothing is deleted."""
  if processes.is_first():
    folder = damaged_folder(manager)
    folder.mkdir(exist_ok=True)
    if is_remote(folder):  # a bucket has a folder only where an object is, and a rename wants one
      (folder / "README").write_text("Checkpoints that were damaged, moved out of the way of the run.\n")
    target, copies = folder / str(step), 0
    while target.exists():
      copies += 1
      target = folder / f"{step}.{copies}"
    (manager.directory / str(step)).rename(target)
  processes.gather("")  # all wait until it is gone
  manager.reload()


def hash_json(content: dict[str, Any]) -> str:
  """Returns the sha256 of a JSON value, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_arrays(tree: Any) -> str:
  """Returns the sha256 of all bytes of a tree of arrays: little-endian, C order, leaves sorted by their path."""
  named = name_arrays(tree)
  digest = hashlib.sha256()
  for name in sorted(named):
    for piece in pieces(named[name]):
      digest.update(np.ascontiguousarray(piece, piece.dtype.newbyteorder("<")))  # type: ignore[arg-type]
  return digest.hexdigest()


def encode_texts(texts: list[str]) -> dict[str, np.ndarray]:
  """Returns texts as two arrays: their UTF-8 bytes, and where each ends (int32).

  Raises:
    ValueError: they have more bytes than that.
  """
  encoded = [text.encode() for text in texts]
  total = sum(map(len, encoded))
  if total > MOST_BYTES:
    raise ValueError(f"the ids or titles of {len(texts)} items have {total} bytes, and a checkpoint holds up to "
                     f"{MOST_BYTES}; shorten the titles, or leave their column out")
  return {"bytes": np.frombuffer(b"".join(encoded) or b"\0", np.uint8),
          "ends": np.cumsum([len(text) for text in encoded]).astype(np.int32)}


def decode_texts(arrays: dict[str, np.ndarray]) -> list[str]:
  """Undoes encode_texts."""
  whole = np.asarray(arrays["bytes"]).tobytes()
  return [whole[start:end].decode() for start, end in itertools.pairwise([0, *np.asarray(arrays["ends"]).tolist()])]
