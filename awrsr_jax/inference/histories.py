"""Histories of a file, in pieces: JSON lines, parquet with a list of items in each row, or any log that training reads.

  ["2571", "1270"]                              a line of JSON: the raw ids, oldest first
  {"user": "u7", "items": ["2571", "1270"]}     the same with a name
  user,item,time                                a row of a log, one interaction: CSV, JSON, parquet, MovieLens, ...
"""

import dataclasses
import glob
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import duckdb
import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet

from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import log as logs
from awrsr_jax.data import prepared, readers, rules
from awrsr_jax.data.lines import BLANKS, LONGEST_LINE, check_gzip, open_file, quote, read_lines
from awrsr_jax.data.tables import kind_of, list_files
from awrsr_jax.inference.standalone import Id
from awrsr_jax.inference.trained import Trained

FORM = 'a line is a list of raw item ids (text or whole numbers), oldest first, or {"user": ..., "items": [...]}'
MEMORY = 1 << 31  # bytes that ordering a log may take; the rest goes to disk
IDS = {str, int}  # the very types: True is no id, though bool is a kind of int
BOM = "\ufeff"
WORDS = (  # of readers, which speak to who trains -> to who recommends
    (r", or leave such rows out with --config\.data\.on_bad_row=skip", ""),
    (r"--config\.data\.columns\.user=NAME, \.item=NAME and \.time=NAME",
     "--user_column=NAME, --item_column=NAME and --time_column=NAME; or give a history a line: " +
     FORM.replace("\\", "\\\\")),
    (r"--config\.data\.columns\.(\w+)", r"--\1_column"),
    (r"--config\.data\.path", "--input"),
    (r"--config\.data", "the run's config.data"),
)

Row = tuple[Id | None, list[Id]]  # user and raw item ids


@dataclasses.dataclass(frozen=True)
class Histories:
  """Some histories, in the order of their source.

  Attributes:
    users: their names; None where the source has none.
    numbered: their item numbers, without unknown items.
    unknown: the raw ids of unknown items of each.
  """

  users: Sequence[Id | None]
  numbered: list[np.ndarray]
  unknown: Sequence[Sequence[Id]]

  def __len__(self) -> int:
    return len(self.users)


def read_histories(path: str, trained: Trained, size: int, first: int = 0,
                   columns: dict[str, str] | None = None) -> Generator[Histories]:
  """Yields the histories of a source in pieces of `size`, from history `first` on.

  A log is read as in training: columns, bad rows, ratings and duplicates as the config of the run says, but for k-core
  and max_history, since unknown items drop out anyway and all of a history counts as seen. Its users come in ascending
  order of their raw ids. A folder that awrsr_jax.prepare made gives the histories that it holds.

  Args:
    path: a file, folder or pattern; "-" is standard input, JSON lines.
    trained: the model whose items are meant.
    size: histories of a piece.
    first: how many to leave out.
    columns: "user", "item", "time", "rating" -> the name of that column, where it is not that of the run's data.

  Raises:
    ValueError: there is no such file, it is damaged, or a line is no history.
  """
  columns = columns or {}
  try:
    yield from _read(path, trained, size, first, columns)
  except duckdb.Error as error:
    raise ValueError(f"--input={path} cannot be ordered: {logs.first_line(error)}; a log needs about its size as space "
                     f"in {tempfile.gettempdir()} (TMPDIR chooses another folder)") from error
  except ValueError as error:
    message = str(error)
    for pattern, words in WORDS:
      message = re.sub(pattern, words, message)
    raise ValueError(message) from error
  except OSError as error:
    raise ValueError(f"--input={path} cannot be read: {error.strerror or error}") from error


def check_source(path: str) -> None:
  """Raises ValueError when there is nothing of that name."""
  if path != "-" and not os.path.isdir(path) and not find_files(path):
    raise ValueError(f"no such file or folder: --input={path}, seen from {os.getcwd()}")


def find_files(path: str) -> list[str]:
  """Returns the files that a path, folder or pattern stands for, in the order of their names."""
  if os.path.isdir(path):
    found = glob.glob(os.path.join(glob.escape(path), "*"))
  else:
    found = [path] if os.path.exists(path) else glob.glob(path)  # a file may be called a[1].csv
  return sorted(file for file in found if os.path.exists(file) and not os.path.isdir(file))


def _read(path: str, trained: Trained, size: int, first: int, columns: dict[str, str]) -> Iterator[Histories]:
  """As read_histories; errors are those of the readers."""
  check_source(path)
  names = [columns["user"]] if columns.get("user") else [trained.config.data.columns.user, "user", "user_id"]
  item = columns.get("item") or trained.config.data.columns.item
  files, form = ["-"], "lines"
  if path != "-":
    tables = [file for file in find_files(path) if file == path or kind_of(file)]
    form = _form(tables[0], item) if tables and not prepared.is_prepared(path) else "log"
    files = list_files(path) if form != "log" else []
    for file in files[1:]:
      _check_whole(file)
  if form == "log":
    yield from _read_log(path, trained, size, first, columns)
    return
  rows = _read_lines(files, first, names) if form == "lines" else _read_lists(files, first, names)
  for piece in iter(lambda: list(itertools.islice(rows, size)), []):
    users, items = zip(*piece, strict=True)
    yield Histories(list(users), *trained.catalogue.number(items))


def _form(file: str, item: str) -> str:
  """Returns "lines" or "lists", with a history in each row, or "log", whose column of items may be called `item`."""
  kind = kind_of(file)
  if kind == "csv":
    return "log"
  if kind == "parquet":
    with _open_parquet(file) as opened:
      schema = opened.schema_arrow
    return "lists" if "items" in schema.names and (item != "items" or _is_list(schema)) else "log"
  _check_whole(file)
  with open_file(file) as opened:
    head = opened.read(1 << 12).decode("utf-8-sig", errors="replace").lstrip(BLANKS)[:1]
  if head != "{":
    return "lines" if head == "[" or kind == "json" else "log"
  line = next(text for _, text in read_lines(file) if text.strip(BLANKS))
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return "lines" if '"items"' in line else "log"
  return "lines" if "items" in row and (item != "items" or isinstance(row["items"], list)) else "log"


def _check_whole(file: str) -> None:
  if file.lower().endswith(".gz"):
    check_gzip(file)


def _is_list(schema: pyarrow.Schema) -> bool:
  return hasattr(schema.field("items").type, "value_field")


def _read_lines(files: list[str], first: int, names: list[str]) -> Iterator[Row]:
  """Yields user and items of each line of JSON; `names` are those that the user may have, one: must have."""
  lines = ((file, number, line) for file in files for number, line in _lines_of(file) if line.strip(BLANKS))
  for file, number, line in itertools.islice(lines, first, None):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file}:{number}: {quote(line)} is no JSON ({error}); {FORM}") from error
    user: Any = None
    items: Any = row
    if isinstance(row, dict):
      user, items = next((row[name] for name in names if name in row), None), row.get("items")
      if len(names) == 1 and names[0] not in row:
        raise ValueError(f"{file}:{number}: {quote(line)} has no {names[0]!r}, which --user_column names")
    if complaint := _complain(user, items):
      raise ValueError(f"{file}:{number}: {quote(line)} is no history: {complaint}; {FORM}")
    yield user, items


def _lines_of(file: str) -> Iterator[tuple[int, str]]:
  """Yields number and text of the lines of a file, or of standard input as they come."""
  if file != "-":
    yield from read_lines(file)
    return
  for number in itertools.count(1):
    line = sys.stdin.buffer.readline(LONGEST_LINE + 1)
    if not line:
      return
    text = line.decode(errors="backslashreplace").removeprefix(BOM if number == 1 else "").rstrip("\r\n")
    if len(line) > LONGEST_LINE:
      raise ValueError(f"-:{number}: {quote(text[:100])}: a line of more than {LONGEST_LINE} bytes")
    yield number, text


def _complain(user: Any, items: Any) -> str:
  """Returns what is wrong with a history, or ""."""
  if type(items) is not list:
    return f"its items are {quote(json.dumps(items))}, not a list"
  if not IDS.issuperset(map(type, items)):
    wrong = next(raw for raw in items if type(raw) not in IDS)
    return f"{quote(json.dumps(wrong, default=str))} is no item id"
  if user is not None and type(user) not in IDS:
    return f"{quote(json.dumps(user, default=str))} is no user id"
  if type(user) is str and not user.isascii() and re.search("[\ud800-\udfff]", user):
    return "its user is half of a UTF-16 pair, which is no text"
  return ""


def _open_parquet(file: str) -> pyarrow.parquet.ParquetFile:
  """Opens a parquet file; raises ValueError when it is none."""
  try:
    return pyarrow.parquet.ParquetFile(file)
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"cannot read {file}: {logs.first_line(error)}; is the file whole?") from error


def _read_lists(files: list[str], first: int, names: list[str]) -> Iterator[Row]:
  """Yields user and items of each row of parquet files with a list of items in each; see _read_lines for `names`."""
  for file in files:
    with _open_parquet(file) as opened:
      there = opened.schema_arrow.names
      user = next((name for name in names if name in there), None)
      if "items" not in there or (user is None and len(names) == 1):
        raise ValueError(f"{file} has no column {'items' if 'items' not in there else names[0]!r}, but {there}")
      if not _is_list(opened.schema_arrow):
        raise ValueError(f"{file}: column 'items' holds {opened.schema_arrow.field('items').type}, not lists of raw "
                         "item ids, oldest first; for a log, with an item a row, set --item_column=items")
      batches, number = opened.iter_batches(1 << 12, columns=["items", *([user] if user else [])]), 0
      while batch := _next_batch(batches, file):
        left_out = min(first, len(batch))
        first, number = first - left_out, number + left_out
        batch = batch.slice(left_out)
        users = batch.column(user).to_pylist() if user else [None] * len(batch)
        for name, items in zip(users, batch.column("items").to_pylist(), strict=True):
          number += 1
          items = [] if items is None else items
          if complaint := _complain(name, items):
            raise ValueError(f"{file}, row {number}: {complaint}; ids are text or whole numbers")
          yield name, items


def _next_batch(batches: Iterator[pyarrow.RecordBatch], file: str) -> pyarrow.RecordBatch | None:
  """Returns the next rows, or None at the end; raises ValueError where the file is damaged."""
  try:
    return next(batches, None)
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"cannot read {file}: {logs.first_line(error)}; is the file whole?") from error


def _read_log(path: str, trained: Trained, size: int, first: int, columns: dict[str, str]) -> Iterator[Histories]:
  """Yields the histories of a log, ordered out of core."""
  data = ml_collections.ConfigDict(trained.config.data.to_dict())
  data.path = path
  if prepared.is_prepared(path):
    corpus = prepared.open_corpus(data)
    codes = (corpus.items[corpus.offsets[begin]:corpus.offsets[end]]
             for begin, end in corpora.chunks_of_users(corpus.offsets))
    yield from _cut(corpus.user_ids.tolist(), corpus.lengths, corpus.item_ids.tolist(), codes, trained, size, first)
    return
  is_table = data.format == "table" and os.path.isfile(path) and readers.detect_format(path, data.header) in (
      "pairs", "sequences")  # its name does not say so, but the run does
  data.update({"name": "", "format": "table" if is_table else "auto", "k_core": 0, "max_history": 0})
  data.columns.update({"title": "", **columns})
  if data.min_rating is None:
    data.columns.rating = ""
  with tempfile.TemporaryDirectory() as folder, logs.open_database(folder, MEMORY) as database:
    corpora.read_log(database, data)
    user_codes, lengths = rules.codes(database, "user")
    item_codes, _ = rules.codes(database, "item")
    raw_of_code = np.full(item_codes[-1] + 1, None, object)
    raw_of_code[item_codes] = logs.fetch_ids(database, "items", item_codes).tolist()
    users = logs.fetch_ids(database, "users", user_codes).tolist()
    yield from _cut(users, lengths, raw_of_code.tolist(), rules.order_items(database), trained, size, first)


def _cut(users: list[Id], lengths: np.ndarray, raw_of_code: list[Id], codes: Iterable[np.ndarray], trained: Trained,
         size: int, first: int) -> Iterator[Histories]:
  """Yields histories of item codes that come in chunks, user after user; no history is cut."""
  number_of_code = np.array([trained.catalogue.numbers.get(str(raw), 0) for raw in raw_of_code], np.int32)
  number_of_code[0] = 0  # of code 0, which is none
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  chunks, held, start = iter(codes), np.zeros(0, np.int32), 0  # held: the codes from place `start` on
  for begin in range(first, len(users), size):
    ends = offsets[begin:min(begin + size, len(users)) + 1]
    while start + len(held) < ends[-1]:
      gone = min(ends[0] - start, len(held))
      held, start = np.concatenate([held[gone:], next(chunks)]), start + gone
    whole = np.split(held[ends[0] - start:ends[-1] - start], ends[1:-1] - ends[0])
    numbered, unknown = [], []
    for history in whole:
      numbers = number_of_code[history]
      known = numbers > 0
      unknown.append([] if known.all() else [raw_of_code[code] for code in history[~known]])
      numbered.append(numbers if known.all() else numbers[known])
    yield Histories(users[begin:begin + size], numbered, unknown)
