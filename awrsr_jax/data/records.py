"""Owns the histories of a prepared corpus: array_record files that are written once and read at random.

A record is a `tf.train.Example` of one user: `id` (raw, as text) and `items` (int32, oldest first), which are its last
bytes, so that reading needs no parser.
"""

import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from awrsr_jax.data.splits import users_of

SHARD_BYTES = 1 << 30
NAME = "awrsr_corpus"


class Records:
  """The (N,) int32 items of a corpus in array_record files; reads like an array, at random, in constant memory."""

  def __init__(self, folder: pathlib.Path, shards: list[str], users_of_shards: np.ndarray, offsets: np.ndarray,
               num_items: int = 2**31 - 1):
    """Opens the files.

    Args:
      folder: holds them.
      shards: their names.
      users_of_shards: (S + 1,) the first user of each, and U.
      offsets: (U + 1,) of the corpus.
      num_items: I; a larger number in a history is an error when it is read.

    Raises:
      ValueError: a file does not hold the users that it should.
    """
    self._folder, self._shards, self._first_user, self._offsets = folder, shards, users_of_shards, offsets
    self._num_items = num_items
    self._of_thread = threading.local()  # a reader is not for several threads
    for shard, expected in enumerate(np.diff(users_of_shards)):
      found = self._reader(shard).num_records()
      if found != expected:
        raise ValueError(f"{folder / shards[shard]} holds {found} users and should hold {expected}; it is damaged: "
                         "prepare the corpus again")

  def __len__(self) -> int:
    return int(self._offsets[-1])

  def __getitem__(self, place: slice | np.ndarray) -> np.ndarray:
    """Returns the items of a slice without steps, or at positions."""
    if not isinstance(place, slice):
      place = np.asarray(place)
      return self.gather(place, place + 1, 1)[:, 0]
    start, stop, _ = place.indices(len(self))
    first, last = users_of(self._offsets, np.array([start, max(stop - 1, start)]))
    histories = list(self._read_range(int(first), int(last) + 1))
    return self._check(np.concatenate(histories)[start - self._offsets[first]:stop - self._offsets[first]])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self[:], dtype)

  def gather(self, starts: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """Returns (B, length) int32, as `batches.gather_rows`; each row lies within one user."""
    rows_BxL = np.zeros((len(starts), length), np.int32)
    user_B = users_of(self._offsets, starts)
    shard_B = np.searchsorted(self._first_user, user_B, side="right") - 1
    real_B = ends > starts
    for shard in np.unique(shard_B[real_B]):
      rows = np.flatnonzero(real_B & (shard_B == shard))
      users = user_B[rows]
      records = self._read(shard, users - self._first_user[shard])
      count = np.minimum(ends[rows] - starts[rows], length)
      from_end = self._offsets[users + 1] - ends[rows] + count
      for row, record, k, back in zip(rows.tolist(), records, count.tolist(), from_end.tolist(), strict=True):
        rows_BxL[row, length - k:] = np.frombuffer(record, "<i4", k, len(record) - 4 * back)
    return self._check(rows_BxL)

  def _check(self, items: np.ndarray) -> np.ndarray:
    """Returns items whose numbers are all in the catalogue."""
    if items.size and not (items.min() >= 0 and items.max() <= self._num_items):
      raise ValueError(f"{self._folder} has histories with item numbers that none of its {self._num_items} items has; "
                       "prepare the corpus again")
    return items

  def _read_range(self, first: int, last: int) -> Iterator[np.ndarray]:
    """Yields the histories of users first .. last - 1."""
    for shard in range(len(self._shards)):
      low, high = max(first, self._first_user[shard]), min(last, self._first_user[shard + 1])
      if low < high:
        records = self._read(shard, slice(int(low - self._first_user[shard]), int(high - self._first_user[shard])))
        for record, length in zip(records, np.diff(self._offsets[low:high + 1]).tolist(), strict=True):
          yield np.frombuffer(record, "<i4", length, len(record) - 4 * length)

  def _read(self, shard: int, which: slice | np.ndarray) -> list[bytes]:
    """Returns records of a shard: a range in bulk, or any ones."""
    reader = self._reader(shard)
    try:
      if isinstance(which, slice):
        return reader.read(which.start, which.stop)
      records = []
      for place in which.tolist():  # ten times as fast as reader.read(list) for the few of a batch
        reader.seek(place)
        records.append(reader.read())
      return records
    except (RuntimeError, ValueError, IndexError) as error:
      raise ValueError(f"{self._folder / self._shards[shard]} is damaged: {error}; prepare the corpus again") from error

  def _reader(self, shard: int) -> Any:
    from array_record.python import array_record_module
    readers = self._of_thread.__dict__.setdefault("readers", {})
    if shard not in readers:
      path = str(self._folder / self._shards[shard])
      try:
        readers[shard] = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
      except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {error}; prepare the corpus again") from error
    return readers[shard]


def write_records(folder: pathlib.Path, chunks: Iterator[np.ndarray], offsets: np.ndarray,
                   user_ids: np.ndarray) -> dict[str, int]:
  """Writes all histories.

  Args:
    folder: where to.
    chunks: the items of a corpus, in pieces.
    offsets: (U + 1,) of it.
    user_ids: (U,).

  Returns:
    Name -> users of the files.
  """
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2
  users, count = len(offsets) - 1, max(1, -(-int(offsets[-1]) * 4 // SHARD_BYTES))
  bounds = [users * shard // count for shard in range(count + 1)]
  names = [f"{NAME}-train.array_record-{shard:05d}-of-{count:05d}" for shard in range(count)]
  histories = _cut(chunks, offsets)
  for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
    # groups of one record: any user is read alone; not compressed: numbers hardly shrink, and reading is twice as fast
    writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1,uncompressed")
    for user, items in zip(user_ids[first:last].tolist(), histories, strict=False):
      example = tf_example_pb2.Example()
      example.features.feature["id"].bytes_list.value.append(str(user).encode(errors="surrogatepass"))
      example.features.feature["items"].bytes_list.value.append(items.astype("<i4").tobytes())
      writer.write(example.SerializeToString(deterministic=True))  # features by name: "items" comes last
    writer.close()
  return dict(zip(names, np.diff(bounds).tolist(), strict=True))


def _cut(chunks: Iterator[np.ndarray], offsets: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the items of each user."""
  left, user = np.empty(0, np.int32), 0
  for chunk in chunks:
    left = np.concatenate([left, chunk])
    last = int(np.searchsorted(offsets, offsets[user] + len(left), side="right")) - 1
    *whole, left = np.split(left, offsets[user + 1:last + 1] - offsets[user])
    yield from whole
    user = last
