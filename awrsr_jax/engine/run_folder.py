"""The run folder (`--workdir`): the contract with users and tools.

  config.json    the resolved config            metrics.jsonl  one JSON object a line
  corpus.json    counts and fingerprint         tensorboard/   the same numbers ("@" is "_" there)
  checkpoints/   see engine/checkpoint.py       ranks.parquet  the rank of every test target (config.eval.keep_ranks)
  result.json    written last, whole or not at all

Process 0 of a run writes them. A folder may be gs://bucket/...: there a file is one object, always replaced whole, so
metrics.jsonl is as new as the newest checkpoint; there are no locks and no TensorBoard files.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, TextIO

import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet
from etils import epath

from awrsr_jax.config import default, walk
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import prepared
from awrsr_jax.data.batches import RankingBatches, history_lengths
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.foreign import check_kinds, parse_json

LOG = logging.getLogger(__name__)
# Keys that a resumed run may have changed, and why that is safe.
FREE_KEYS = {
    "train.epochs",  # may grow: the run goes on
    "data.path", "data.format", "data.header", "data.on_bad_row", "data.columns.user", "data.columns.item",
    "data.columns.time", "data.columns.rating", "data.columns.title",  # fingerprint and raw ids are compared instead
    "mesh.data", "mesh.model",  # the global batch does not depend on the devices
    "model.remat",  # the same values, made twice
    "data.feed", "train.steps_per_call",  # the same batches, built elsewhere
    "eval.keep_ranks", "eval.hash_ids",  # a file more or less, with ids or without
    "eval.batch_size", "eval.block_items",  # they change no rank
}
NEWER = {"train.item_start"}  # than published runs: what it brought was not to be had
NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK  # Lustre without -o flock, NFS without lockd
IDS = pyarrow.int64(), pyarrow.string(), pyarrow.large_string()
NUMBERS = pyarrow.int32(), pyarrow.int64()
KINDS_OF_RANKS = {"user": IDS, "item": IDS, "rank": (pyarrow.float32(), pyarrow.float64()), "history": NUMBERS,
                  "trained": NUMBERS}


class DiskFull(Exception):
  """There is no space left for the run folder."""


@contextlib.contextmanager
def noticing_full_disk(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what is raised on a full disk, by Python or by Orbax with no type of its own, into DiskFull."""
  try:
    yield
  except Exception as error:
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
      raise DiskFull(f"the disk of --workdir={workdir} is full; what was saved is whole. Make room and start the same "
                     "command again: it goes on from the newest checkpoint") from error
    raise


@contextlib.contextmanager
def noticing_no_bucket(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what gcsfs raises, also with types of its own, for a bucket that cannot be written, into ValueError."""
  try:
    yield
  except ImportError as error:
    raise ValueError(f"--workdir={workdir}: {error}; install what opens such a path (gs://: gcsfs)") from error
  except Exception as error:
    if isinstance(error, ValueError) or not is_remote(workdir):
      raise
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise ValueError(f"--workdir={workdir} cannot be written: {reason}. Check the name of the bucket; the service "
                     "account of the machines needs its roles Storage Object Admin and Storage Legacy Bucket "
                     "Reader") from error


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL of a bucket."""
  return "://" in str(path)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all; an object of a bucket always is."""
  if is_remote(path):
    path.write_bytes(content)
    return
  temporary = path.with_name(path.name + ".tmp")
  temporary.unlink(missing_ok=True)  # a link in a folder of others would be followed
  with open(temporary, "xb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_json(path: epath.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file whole or not at all."""
  write_text(path, json.dumps(content, indent=2) + "\n")


def check_out(out: str) -> None:
  """Raises ValueError where --out, for a file of what a command finds, is a folder or lies in none."""
  if epath.Path(out).is_dir() or not epath.Path(out).parent.is_dir():
    raise ValueError(f"--out={out} is a folder, or lies in none that exists; name a file in a folder that does")


def write_found(out: str, found: dict[str, Any]) -> None:
  """Writes what a command found into the JSON file of its --out, whole or not at all.

  Raises:
    ValueError: it cannot be written.
  """
  try:
    write_json(epath.Path(out), found)
  except OSError as error:
    raise ValueError(f"--out={out} cannot be written: {error.strerror}; choose another file") from error


def lock_folder(folder: epath.Path, flag: str = "--workdir", wait: float = 0) -> TextIO:
  """Makes a folder and takes it for this job, until the file returned is closed or the process ends however it ends.

  A bucket has no locks: there nothing is made or taken. Some file systems have none either: there it is only made.

  Args:
    folder: its `.lock` is taken.
    flag: that names it, for messages.
    wait: so many seconds for one that another process has.

  Raises:
    ValueError: the folder cannot be written or locked; or, from a BlockingIOError, it is in use.
  """
  if is_remote(folder):
    return io.StringIO()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.fdopen(os.open(folder / ".lock", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a")
  except OSError as error:
    raise ValueError(f"{flag}={folder} cannot be written: {error.strerror}; choose another folder") from error
  deadline = time.monotonic() + wait
  while True:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return lock
    except BlockingIOError as error:
      if time.monotonic() >= deadline:
        lock.close()
        raise ValueError(f"{flag}={folder} is in use by another process; wait for it or choose another "
                         "folder") from error
      time.sleep(0.1)
    except OSError as error:
      if error.errno not in NO_LOCKS:
        lock.close()
        raise ValueError(f"{flag}={folder} cannot be locked: {error.strerror}; choose another folder") from error
      LOG.warning("%s=%s: this file system has no locks: see that no other run uses the folder", flag, folder)
      return lock


def open_run(workdir: str | os.PathLike[str], config: Any,
             corpus: dict[str, Any]) -> tuple[TextIO, dict[str, Any] | None]:
  """Makes a run folder, or checks that an existing one belongs to this config and corpus; writes both into it.

  Args:
    workdir: the folder.
    config: finalized.
    corpus: what `corpus.describe` says.

  Returns:
    See lock_folder; and the content of result.json where the run is complete, and nothing is written: else None.

  Raises:
    ValueError: the folder cannot be written, is in use, or belongs to another config or corpus.
  """
  folder = epath.Path(workdir)
  lock = lock_folder(folder, wait=1)  # who only looks whether it is free has it for an instant
  try:
    values = json.loads(json.dumps(dict(walk(config))))
    with noticing_no_bucket(workdir):
      result = read_result(workdir)
      saved = result or ((folder / "checkpoints").exists() and any((folder / "checkpoints").iterdir()))
      stored: dict[str, dict[str, Any]] = {}
      for name, check, now in (("config.json", check_same_config, values), ("corpus.json", check_same_corpus, corpus)):
        if saved or (folder / name).exists():
          stored[name] = read_json(folder / name)
          check(workdir, stored[name], now)
      if result and result.get("epochs") == config.train.epochs:
        made = dict(walk(stored["config.json"]))
        for key in ("eval.keep_ranks", "eval.hash_ids"):
          if made.get(key, values[key]) != values[key]:
            LOG.warning("%s is complete: its ranks stay as config.%s=%s has made them; for others train in another "
                        "--workdir", workdir, key, made[key])
        return lock, result
      write_json(folder / "config.json", nest(values))
      write_json(folder / "corpus.json", corpus)
  except BaseException:
    lock.close()  # who caught the error may still hold it, and with it this frame
    raise
  return lock, None


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON file of a run folder.

  Raises:
    ValueError: it is missing or damaged; or, when it is asked for, a key is.
  """
  try:
    content = parse_json(path.read_text(), str(path))
    check_kinds(content, {}, "it")
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read ({error}); restore it, or start in another --workdir") from error
  return content


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the content of result.json; None: there is none, or it is damaged and is to be made again."""
  path = epath.Path(workdir) / "result.json"
  try:
    return read_json(path) if path.exists() else None
  except ValueError:
    LOG.warning("%s is damaged and is made again from the checkpoints", path)
    return None


def write_ranks(path: epath.Path, batches: RankingBatches, ranks: np.ndarray, hash_ids: bool = False) -> None:
  """Writes the rank of every target of a split as a parquet file, whole or not at all.

  A row is a target, ordered by user and time: `user`, `item` (raw ids), `rank` (float32, from 1), `history` (how many
  items came before it) and `trained` (how often the item was trained on).

  Args:
    path: of the file.
    batches: of the split.
    ranks: (C,), see ranking.rank_users.
    hash_ids: users are numbered from 0 instead, and an item is one byte of a hash of user and item: it shows whether
      two runs rank the same targets, and is too short to find the item by.
  """
  corpus, order = batches.corpus, np.argsort(batches.targets)
  targets = batches.targets[order]
  items = np.asarray(corpus.items[targets])
  user_ids, item_ids = corpus.user_ids[batches.users[order]].tolist(), corpus.item_ids[items].tolist()
  if hash_ids:
    item_ids = [hashlib.sha256(f"{user}\n{item}".encode()).digest()[0] for user, item in zip(user_ids, item_ids,
                                                                                            strict=True)]
    user_ids = np.unique(batches.users[order], return_inverse=True)[1].tolist()
  table = pyarrow.table({
      "user": user_ids, "item": item_ids,
      "rank": ranks[order].astype(np.float32), "history": history_lengths(corpus, targets).astype(np.int32),
      "trained": corpus.counts[items]})
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer, compression="zstd")
  write_bytes(path, buffer.getvalue())


def read_ranks(path: epath.Path) -> dict[str, np.ndarray]:
  """Returns the columns of ranks.parquet as arrays; ids are int64 or objects.

  Raises:
    ValueError: it is missing or damaged.
  """
  try:
    table = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()))
    columns = {name: table.column(name) for name in ("user", "item", "rank", "history", "trained")}
    for name, column in columns.items():
      if column.null_count or column.type not in KINDS_OF_RANKS[name]:
        raise ValueError(f"its column {name!r} is {column.type}, with {column.null_count} empty places")
    found = {name: column.to_numpy() for name, column in columns.items()}
    broken = ~(np.isfinite(found["rank"]) & (found["rank"] >= 1))
    if broken.any():
      raise ValueError(f"it holds {broken.sum()} ranks that are not 1 or more")
    return found
  except (OSError, ValueError, KeyError, MemoryError, pyarrow.ArrowException) as error:
    raise ValueError(f"{path} cannot be read ({error}); a run writes it when it is complete and config.eval.keep_ranks "
                     "is set: train again in another --workdir") from error


def nest(values: dict[str, Any]) -> dict[str, Any]:
  """Returns {"a": {"b": 1}} for {"a.b": 1}."""
  tree: dict[str, Any] = {}
  for key, value in values.items():
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def check_same_config(workdir: str | os.PathLike[str], before: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises ValueError, with the difference, when a run folder was made with another config.

  One of the NEWER keys has its default in a folder that lacks it.
  """
  before = {key: value for key, value in walk(default()) if key in NEWER} | dict(walk(before))
  changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
  free = FREE_KEYS if isinstance(before.get("train.epochs"), int) else FREE_KEYS - {"train.epochs"}
  shown = [f"config.{key}: {before.get(key)} there, {now.get(key)} now" for key in changed if key not in free]
  if shown:
    raise ValueError(f"--workdir={workdir} was made with another config: {'; '.join(shown)}. Use the same config, or "
                     "another --workdir (config.train.epochs may grow)")
  if now["train.epochs"] < before["train.epochs"]:
    raise ValueError(f"--workdir={workdir} was made with config.train.epochs={before['train.epochs']}; "
                     f"{now['train.epochs']} now is less, and epochs may only grow")
  if changed and "train.epochs" in changed and now["train.schedule"] != "constant":
    LOG.warning("config.train.epochs grew from %d to %d: the %s schedule is stretched from here on",
                    before["train.epochs"], now["train.epochs"], now["train.schedule"])


def check_same_corpus(workdir: str | os.PathLike[str], before: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises ValueError, with the difference, when a run folder was made from another corpus."""
  changed = [f"{key}: {before.get(key)} there, {now.get(key)} now" for key in now
             if key != "name" and before.get(key) != now.get(key)]
  if changed:
    raise ValueError(f"--workdir={workdir} was made from another corpus: {'; '.join(changed)}. Use the same data, or "
                     "another --workdir")


def read_data(data: Any, recorded: dict[str, Any], where: str | os.PathLike[str],
              data_path: str | os.PathLike[str] | None = None) -> Corpus:
  """Reads the data of a run again, as whoever uses a run does: nothing is downloaded by a name of TFDS.

  Args:
    data: `config.data` of the run.
    recorded: what `corpus.describe` said of them; of it what tells of histories, splits and raw item ids is compared.
    where: the run folder, for messages.
    data_path: where the data lie now, instead of `data.path`.

  Raises:
    ValueError: a TFDS data set is named without its folder, or nothing is, as of a table from Python; the data are not
      there, or they are not those of the run.
  """
  if data_path:
    data = ml_collections.ConfigDict(data.to_dict() | {"path": os.fspath(data_path), "format": "auto"})
  if not data.path and (data.tfds.name or data.format == "tfds"):
    raise ValueError(f"{where} was trained on the TFDS data set {data.tfds.name!r}, and a run folder may not have it "
                     "downloaded here; --data_path=FOLDER says where it is prepared")
  path = data.path or data.name
  if not path:
    raise ValueError(f"{where} was trained on a table that was given from Python; --data_path=FILE names a file of its "
                     "rows")
  try:
    corpus = prepared.load(data)
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} cannot be read as the data of {where}: {error}. --data_path=PATH says where they lie "
                     "now") from error
  found = corpora.describe(corpus)
  for key, what in (("fingerprint", "corpus"), ("numbering", "raw item ids")):
    if found[key] != recorded[key]:
      raise ValueError(f"{path} is not the data of {where}: the {what} differ, {found['users']} users and "
                       f"{found['items']} items there, {recorded['users']} and {recorded['items']} in the run; "
                       "--data_path=PATH says where the run's data lie")
  return corpus
