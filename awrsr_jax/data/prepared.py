"""Owns prepared corpora: folders that hold a corpus larger than memory, and that training reads at random.

`prepare` makes a folder, which is also a data set that TFDS opens (`tfds.builder_from_directory(folder)`):

  awrsr_corpus-train.array_record-*    histories, in the order of raw user ids; see data/records.py
  dataset_info.json, features.json     what TFDS needs
  users.parquet, items.parquet         raw ids (titles, and how often each item is trained on) by number
  split.npz                            lengths of histories, ends of training parts, positions of ranked items
  prepared.json                        the rules it was made by, its description and statistics, and all files with
                                       their sizes and SHA-256; written last

It is made under the name FOLDER.partial and renamed when whole, so that a half-written corpus is never opened.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import duckdb
import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet

from awrsr_jax.config import walk
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import log as logs
from awrsr_jax.data import records, splits, statistics
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.foreign import check_kinds, check_names, parse_json

LOG = logging.getLogger(__name__)
SCHEMA = 1
FILES = ("users.parquet", "items.parquet", "split.npz")
KINDS = {"schema": int, "rules": dict, "statistics": dict, "shards": list, "users_of_shards": list,
         "files": {...: {"bytes": int, "sha256": str}},
         "description": {"name": str, "fingerprint": str, "numbering": str, "users": int, "items": int,
                         "interactions": int, "split": {"words": str, "training": int}}}  # of prepared.json
INT32 = 2**31 - 1
RULES = ("min_rating", "duplicates", "k_core", "max_history", "split.")  # of config.data: what makes another corpus


def load(data: ml_collections.ConfigDict, table: Any = None) -> Corpus:
  """Opens the prepared folder that `config.data.path` names, or makes the corpus in memory: see `corpus.load`."""
  if table is None and data.path and data.format in ("auto", "prepared") and is_prepared(data.path):
    return open_corpus(data)
  return corpora.load(data, table)


def is_prepared(path: str) -> bool:
  """Whether `prepare` made this folder."""
  return os.path.isfile(os.path.join(path, "prepared.json"))


def open_corpus(data: ml_collections.ConfigDict) -> Corpus:
  """Opens a prepared folder; histories stay in its files.

  Args:
    data: `config.data`; its rules must be those that the folder was made by.

  Raises:
    ValueError: the rules differ, or a file is missing or damaged (histories are checked when they are read).
  """
  folder = pathlib.Path(data.path)
  made = read_manifest(folder)
  now = rules_of(data)
  changed = [f"config.data.{key}: {made['rules'].get(key)} there, {now.get(key)} now"
             for key in sorted(made["rules"].keys() | now.keys()) if made["rules"].get(key) != now.get(key)]
  if changed:
    raise ValueError(f"{folder} was prepared by other rules: {'; '.join(changed)}. Use the same, or prepare "
                     "another folder")
  check_files(folder, made, whole=False)
  try:
    corpus = _open(folder, made, data)
  except (KeyError, TypeError, OverflowError, MemoryError, zipfile.BadZipFile, pyarrow.ArrowException) as error:
    raise ValueError(f"{folder} does not hold what a corpus does ({type(error).__name__}: {error}); prepare it "
                     "again") from error
  return corpora.check(corpus, data)


def _open(folder: pathlib.Path, made: dict[str, Any], data: Any) -> Corpus:
  """As open_corpus, when prepared.json and sizes are checked; what is no such file raises errors of its reader."""
  with np.load(folder / "split.npz", allow_pickle=False) as arrays:
    lengths, train_ends, *targets = (arrays[name] for name in ("lengths", "train_ends", *splits.HELD_OUT))
  users = _read_ids(folder / "users.parquet")
  items = pyarrow.parquet.read_table(folder / "items.parquet")
  ids = _to_ids(items.column("item"))
  trained, description, first_users = items.column("trained").to_numpy(), made["description"], made["users_of_shards"]
  fits = all(array.ndim == 1 and array.dtype.kind == "i" for array in (lengths, train_ends, trained, *targets)) and (
      len(lengths) == len(train_ends) == len(users) == description["users"] and len(ids) == description["items"]
      and len(lengths) > 0 and lengths.min() > 0 and lengths.max() <= INT32 and max(len(users), len(ids)) < INT32)
  if fits:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    bounds = np.array(first_users)
    fits = bool((offsets[:-1] <= train_ends).all() and (train_ends <= offsets[1:]).all()
                and all(target.size and target[0] >= 0 and target[-1] < offsets[-1] and (np.diff(target) > 0).all()
                        for target in targets)
                and bounds.dtype.kind == "i" and bounds[0] == 0 and bounds[-1] == len(users)
                and len(bounds) == len(made["shards"]) + 1 and (np.diff(bounds) >= 0).all()
                and offsets[-1] == description["interactions"])
  if not fits:
    raise TypeError("its counts, lengths and numbers do not go together")
  split = splits.Split(made["rules"]["split.name"], description["split"]["words"], train_ends,
                       dict(zip(splits.HELD_OUT, targets, strict=True)))
  titles = {at: title for at, title in enumerate(items.column("title").to_pylist(), start=1) if title is not None}
  return Corpus(
      records.Records(folder, made["shards"], bounds, offsets, len(ids)), offsets, split, users,
      np.concatenate([np.zeros(1, ids.dtype), ids]), titles, data.name or description["name"], None,
      np.concatenate([[0], trained]), description)


def prepare(data: ml_collections.ConfigDict, out: str | os.PathLike[str], memory: int) -> dict[str, Any]:
  """Makes a prepared folder of what `config.data` names, in bounded memory; one that was cut off starts over.

  Args:
    data: `config.data`.
    out: the folder to make.
    memory: bytes that the database may take; the rest takes some hundred MiB, and about 100 bytes a user and an item.

  Returns:
    The content of prepared.json.

  Raises:
    ValueError: as `corpus.load`; or data.path is a prepared folder, `out` exists or is being prepared, or there is no
      space.
  """
  out = pathlib.Path(os.path.abspath(out))
  if data.path and is_prepared(data.path):
    raise ValueError(f"--config.data.path={data.path} is a prepared corpus already; give the log that it was made of")
  if out.exists():
    raise ValueError(f"--out={out} exists; remove it, or choose another folder")
  partial = out.with_name(out.name + ".partial")
  with _owned(partial):
    try:
      made = _prepare(data, partial, memory)
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException, RuntimeError) as error:
      if getattr(error, "errno", None) not in (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        raise
      raise ValueError(f"--out={out} cannot be prepared: {logs.first_line(error)}. It needs about the size of the "
                       "log as space beside it; --memory_mib is what the database may take of memory") from error
    os.rename(partial, out)
  (out / ".lock").unlink()
  return made


def _prepare(data: ml_collections.ConfigDict, folder: pathlib.Path, memory: int) -> dict[str, Any]:
  """Fills the folder; see `prepare`."""
  work = folder / "work"
  work.mkdir()
  shards: dict[str, int] = {}

  def store(chunks: Iterator[np.ndarray], offsets: np.ndarray, user_ids: np.ndarray) -> records.Records:
    """Writes the histories as they come."""
    LOG.info("ordering and writing %d histories", len(user_ids))
    shards.update(records.write_records(folder, chunks, offsets, user_ids))
    return records.Records(folder, list(shards), np.cumsum([0, *shards.values()]), offsets)

  with logs.open_database(work, memory) as database:
    log, read = corpora.read_log(database, data)
    LOG.info("%d rows read", read["rows"])
    corpus = corpora.number(database, log, read, data, store)
    corpus = corpora.check(corpus, data)
    found = statistics.measure(database, corpus, data, read)
  shutil.rmtree(work)
  _write_ids(folder, corpus)
  with (folder / "split.npz").open("wb") as file:
    np.savez(file, lengths=corpus.lengths, train_ends=corpus.split.train_ends, **corpus.split.targets)  # type: ignore[arg-type]
  _write_tfds(folder, corpus, list(shards.values()))
  files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())
           if path.name != ".lock"}
  made = {"schema": SCHEMA, "rules": rules_of(data), "description": corpora.describe(corpus), "statistics": found,
          "shards": list(shards), "users_of_shards": [0, *np.cumsum(list(shards.values())).tolist()], "files": files}
  for path in folder.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())
  temporary = folder / "prepared.json.tmp"
  with temporary.open("w") as file:
    json.dump(made, file, indent=2)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, folder / "prepared.json")
  return made


def rules_of(data: Any) -> dict[str, Any]:
  """Returns the keys of `config.data` that make a corpus another one, with their values; of the split, what is read."""
  read = {"leave_one_out": (), "time": ("valid_from", "test_from", "target"),
          "users": ("valid_share", "test_share", "seed")}[data.split.name]
  return {key: value for key, value in walk(data) if key.startswith(RULES)
          and (not key.startswith("split.") or key.removeprefix("split.") in ("name", *read))}


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of prepared.json.

  Raises:
    ValueError: it is missing, damaged or of another version of this package.
  """
  path = folder / "prepared.json"
  try:
    made = parse_json(path.read_text(), "it")
    check_kinds(made, KINDS, "it")
    if made["schema"] != SCHEMA:
      raise ValueError(f"its schema is {made['schema']}, and {SCHEMA} is read here")
    lacking = KINDS.keys() - made.keys()
    if lacking:
      raise ValueError(f"it has no {', '.join(sorted(lacking))}")
    check_names([*made["files"], *made["shards"]], "it")
    unsaid = {*FILES, *made["shards"]} - made["files"].keys()
    if unsaid:
      raise ValueError(f"it does not say what {', '.join(sorted(unsaid))} had been")
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read ({error}); prepare the corpus again") from error
  return made


def check_files(folder: pathlib.Path, made: dict[str, Any], whole: bool) -> None:
  """Compares the files of a prepared folder with what prepared.json says of them.

  Args:
    folder: the folder.
    made: its prepared.json.
    whole: also the content of shards, which takes as long as reading them.

  Raises:
    ValueError: a file is missing, or has another size or content.
  """
  for name, expected in made["files"].items():
    path = folder / name
    if not path.is_file():
      raise ValueError(f"{path} is missing; bring it back, or prepare the corpus again")
    if path.stat().st_size != expected["bytes"]:
      raise ValueError(f"{path} has {path.stat().st_size} bytes, and had {expected['bytes']} when it was prepared; "
                       "bring it back, or prepare the corpus again")
    if (whole or name not in made["shards"]) and hash_file(path) != expected["sha256"]:
      raise ValueError(f"{path} is not what it was when it was prepared (its SHA-256 differs); bring it back, or "
                       "prepare the corpus again")


def hash_file(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _owned(partial: pathlib.Path) -> Iterator[None]:
  """Makes an empty folder for this process alone; it goes again, unless it was renamed.

  Raises:
    ValueError: another process is at it, or it cannot be made.
  """
  try:
    partial.mkdir(parents=True, exist_ok=True)
    lock = (partial / ".lock").open("w")
  except OSError as error:
    raise ValueError(f"{partial} cannot be written: {error.strerror}; choose another --out") from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{partial} is being prepared by another process; wait for it or choose another "
                       "--out") from error
    left = [path for path in partial.iterdir() if path.name != ".lock"]
    if left:
      LOG.warning("%s is left of a preparation that was cut off; starting over", partial)
    for path in left:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
      yield
    finally:
      shutil.rmtree(partial, ignore_errors=True)


def _write_ids(folder: pathlib.Path, corpus: Corpus) -> None:
  """Writes users.parquet and items.parquet."""
  pyarrow.parquet.write_table(pyarrow.table({"user": corpus.user_ids.tolist()}), folder / "users.parquet")
  titles = pyarrow.array([corpus.titles.get(number) for number in range(1, corpus.num_items + 1)], pyarrow.string())
  pyarrow.parquet.write_table(pyarrow.table({"item": corpus.item_ids[1:].tolist(), "title": titles,
                                             "trained": corpus.counts[1:]}), folder / "items.parquet")


def _read_ids(path: pathlib.Path) -> np.ndarray:
  return _to_ids(pyarrow.parquet.read_table(path).column(0))


def _to_ids(column: Any) -> np.ndarray:
  """Returns int64 ids, or text of any length."""
  if pyarrow.types.is_integer(column.type):
    return column.to_numpy()
  return np.array(column.to_pylist(), np.dtypes.StringDType())


def _write_tfds(folder: pathlib.Path, corpus: Corpus, users_of_shards: list[int]) -> None:
  """Writes what TFDS needs to open the folder."""
  import tensorflow_datasets as tfds
  template = tfds.core.ShardedFileTemplate(data_dir=tfds.core.Path(folder), dataset_name=records.NAME, split="train",
                                           filetype_suffix="array_record")
  features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "items": tfds.features.Tensor(
      shape=(None,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES)})
  info = tfds.core.SplitInfo(name="train", shard_lengths=users_of_shards, num_bytes=4 * corpus.num_interactions,
                             filename_template=template)
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=[info], filename_template=template, version="1.0.0",
      check_data=False,  # it would need TensorFlow
      description="Histories of users, oldest item first. Item numbers count from 1; items.parquet has their raw ids.")
