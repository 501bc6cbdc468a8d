"""Histories of a file, in pieces: JSON lines, parquet with a list of items in each row, or any log that training reads.

  ["2571", "1270"]                              a line of JSON: the raw ids, oldest first
  {"user": "u7", "items": ["2571", "1270"]}     the same with a name
  user,item,time                                a row of a log, one interaction: CSV, JSON, parquet, MovieLens, ...
"""

import dataclasses
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import ml_collections
import numpy as np
import pyarrow.parquet

from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import log as logs
from awrsr_jax.data import rules
from awrsr_jax.data.lines import BLANKS, LONGEST_LINE, read_lines, shorten
from awrsr_jax.data.tables import kind_of
from awrsr_jax.inference.trained import Id, Trained

FORM = 'a line is a list of raw item ids, oldest first, or {"user": ..., "items": [...]}'
MEMORY = 1 << 31  # bytes that ordering a log may take; the rest goes to disk


@dataclasses.dataclass(frozen=True)
class Histories:
  """Some histories, in the order of their source.

  Attributes:
    users: their names; None where the source has none.
    numbered: their item numbers, without unknown items.
    unknown: (U,) how many unknown items each had.
  """

  users: list[Id | None]
  numbered: list[np.ndarray]
  unknown: np.ndarray

  def __len__(self) -> int:
    return len(self.users)


def read_histories(path: str, trained: Trained, size: int, first: int = 0,
                   columns: dict[str, str] | None = None) -> Iterator[Histories]:
  """Yields the histories of a source in pieces of `size`, from history `first` on.

  A log is read as in training: columns, bad rows, ratings and duplicates as the config of the run says, but for k-core
  and max_history, since unknown items drop out anyway and all of a history counts as seen. Its users come in ascending
  order of their raw ids.

  Args:
    path: a file, folder or pattern; "-" is standard input, JSON lines.
    trained: the model whose items are meant.
    size: histories of a piece.
    first: how many to leave out.
    columns: "user", "item", "time" -> the name of that column of a log, where it is not that of the run's data.

  Raises:
    ValueError: there is no such file, it is damaged, or a line is no history.
  """
  match _kind(path):
    case "lines":
      rows = _read_lines(path, first)
    case "lists":
      rows = _read_lists(path, first)
    case "log":
      yield from _read_log(path, trained, size, first, columns or {})
      return
  for piece in iter(lambda: list(itertools.islice(rows, size)), []):
    users, found = zip(*piece, strict=True)
    numbered, unknown = trained.number(found)
    yield Histories(list(users), numbered, np.array(list(map(len, unknown))))


def _kind(path: str) -> str:
  """Returns "lines" or "lists", with a history in each row, or "log"."""
  if path == "-":
    return "lines"
  if not os.path.isfile(path):
    return "log"  # a folder, a pattern, or nothing, of which its reader tells
  match kind_of(path):
    case "json":
      head = next((text for _, text in read_lines(path) if text.strip(BLANKS)), "").strip(BLANKS)
      return "lines" if head[:1] == "[" or '"items"' in head else "log"
    case "parquet":
      try:
        names = pyarrow.parquet.read_schema(path).names
      except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {logs.first_line(error)}; is the file whole?") from error
      return "lists" if "items" in names else "log"
  with open(path, "rb") as file:
    return "lines" if file.read(1) == b"[" else "log"


def _read_lines(path: str, first: int) -> Iterator[tuple[Id | None, list[Id]]]:
  """Yields user and items of each line of JSON."""
  lines = _read_standard_input() if path == "-" else read_lines(path)
  lines = ((number, line) for number, line in lines if line.strip(BLANKS))
  for number, line in itertools.islice(lines, first, None):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path}:{number}: {shorten(line)} is no JSON ({error}); {FORM}") from error
    user, items = (row.get("user"), row.get("items")) if isinstance(row, dict) else (None, row)
    if not isinstance(items, list) or not all(isinstance(raw, (str, int)) for raw in items) or not isinstance(
        user, (str, int, type(None))):
      raise ValueError(f"{path}:{number}: {shorten(line)} is no history; {FORM}")
    yield user, items


def _read_standard_input() -> Iterator[tuple[int, str]]:
  for number in itertools.count(1):
    line = sys.stdin.readline(LONGEST_LINE + 1)
    if not line:
      return
    if len(line) > LONGEST_LINE:
      raise ValueError(f"-:{number}: {shorten(line[:100])}: a line of more than {LONGEST_LINE} characters")
    yield number, line


def _read_lists(path: str, first: int) -> Iterator[tuple[Id | None, list[Id]]]:
  """Yields user and items of each row of a parquet file with a list of items in each."""
  with pyarrow.parquet.ParquetFile(path) as file:
    names = file.schema_arrow.names
    kind = file.schema_arrow.field("items").type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
      raise ValueError(f"{path}: column 'items' holds {kind}, not lists of raw item ids, oldest first")
    user = next((name for name in ("user", "user_id") if name in names), None)
    end = 0
    for batch in file.iter_batches(1 << 12, columns=["items", *([user] if user else [])]):
      end += len(batch)
      if end <= first:
        continue
      batch = batch.slice(max(0, first - (end - len(batch))))
      items = batch.column("items").to_pylist()
      users = batch.column(user).to_pylist() if user else [None] * len(items)
      yield from ((name, listed or []) for name, listed in zip(users, items, strict=True))


def _read_log(path: str, trained: Trained, size: int, first: int, columns: dict[str, str]) -> Iterator[Histories]:
  """Yields the histories of a log, ordered out of core."""
  data = ml_collections.ConfigDict(trained.config.data.to_dict())
  data.update({"path": path, "name": "", "format": "auto", "k_core": 0, "max_history": 0})
  data.columns.update(columns)
  with tempfile.TemporaryDirectory() as folder, logs.open_database(folder, MEMORY) as database:
    try:
      corpora.read_log(database, data)
    except ValueError as error:  # speaks of the config of a run
      message = re.sub(r"--config\.data\.columns\.(\w+)", r"--\1_column", str(error))
      raise ValueError(message.replace("--config.data.path", "--input")) from error
    codes, lengths = rules.codes(database, "user")
    users = logs.fetch_ids(database, "users", codes).tolist()
    item_codes, _ = rules.codes(database, "item")
    number_of_code = np.zeros(item_codes[-1] + 1, np.int32)
    raw_ids = logs.fetch_ids(database, "items", item_codes).tolist()
    number_of_code[item_codes] = [trained.numbers.get(str(raw), 0) for raw in raw_ids]
    ends = np.cumsum(lengths)
    pieces, held, start = rules.order_items(database), np.zeros(0, np.int32), 0  # held: items from place `start` on
    for begin in range(0, len(users), size):
      last = min(begin + size, len(users))
      while start + len(held) < ends[last - 1]:
        held = np.concatenate([held, number_of_code[next(pieces)]])
      if begin >= first:
        whole = np.split(held[:ends[last - 1] - start], ends[begin:last - 1] - start)
        numbered = [numbers[numbers > 0] for numbers in whole]
        yield Histories(users[begin:last], numbered, lengths[begin:last] - np.array(list(map(len, numbered))))
      held, start = held[ends[last - 1] - start:], int(ends[last - 1])
