"""Owns tables -> `Log`: files of rows with named columns (CSV, TSV and JSON lines, also as .gz, and parquet), and
tables from Python (pandas, polars, pyarrow).

Which columns are user, item, time, rating and title stands in `config.data.columns`; where it does not, the names of a
known layout are looked for. Rows keep the order of their file, and files the order of their names.
"""

import csv
import glob
import gzip
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import duckdb

from awrsr_jax.data.log import Log

LOG = logging.getLogger(__name__)
KINDS = {"csv": "csv", "tsv": "csv", "inter": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
         "parquet": "parquet", "pq": "parquet"}  # by the end of a file's name, before ".gz"
KEYS = ("user", "item", "time", "rating", "title")
LAYOUTS = {  # who publishes it: the names of user, item, time, rating and title ("" where there is none)
    "generic": ("user", "item", "time", "rating", "title"),
    "generic with _id": ("user_id", "item_id", "timestamp", "rating", "title"),
    "Amazon reviews 2014 and 2018": ("reviewerID", "asin", "unixReviewTime", "overall", ""),
    "Amazon reviews 2023": ("user_id", "parent_asin", "timestamp", "rating", ""),
    "Yelp reviews": ("user_id", "business_id", "date", "stars", ""),
    "MovieLens": ("userId", "movieId", "timestamp", "rating", ""),
    "MovieLens in TFDS": ("user_id", "movie_id", "timestamp", "user_rating", "movie_title"),
    "RecBole": ("user_id:token", "item_id:token", "timestamp:float", "rating:float", ""),
}
AMAZON_USER, AMAZON_ITEM = re.compile("A[0-9A-Z]{9,20}"), re.compile("B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
SAMPLE = 1000  # lines looked at to tell what a file is
DELIMITERS = ",\t;|"
LONGEST_LINE = 1 << 24  # bytes


def kind_of(path: str) -> str | None:
  """Returns "csv", "json" or "parquet" by the name of a file, or its first bytes; None: no sort of table."""
  ending = path.lower().removesuffix(".gz").rpartition(".")[2]
  if ending in KINDS and "." in os.path.basename(path):
    return KINDS[ending]
  if os.path.isfile(path):
    with open(path, "rb") as file:
      head = file.read(4)
    if head == b"PAR1":
      return "parquet"
    if head.lstrip()[:1] == b"{":
      return "json"
  return None


def list_files(path: str) -> list[str]:
  """Returns the files of a path: itself, the tables of a folder, or what fits a pattern with *; sorted by name.

  Raises:
    ValueError: there is none, or they are not of one kind.
  """
  if os.path.isdir(path):
    files = [os.path.join(path, name) for name in os.listdir(path) if kind_of(name)]
  else:
    files = [path] if os.path.exists(path) else glob.glob(path)
  if not files:
    raise ValueError(f"{path} holds no table (a file that ends in {', '.join(KINDS)}, or that with .gz); set "
                     "--config.data.path to a file, a folder or a pattern")
  kinds = {kind_of(file) or "csv": file for file in sorted(files, reverse=True)}
  if len(kinds) > 1:
    raise ValueError(f"{path} holds tables of several kinds: {kinds}; set --config.data.path to files of one kind, as "
                     f"{path}/*.{next(iter(kinds))}")
  return sorted(files)


def read_tables(database: duckdb.DuckDBPyConnection, data: Any, path: str | None = None,
                form: tuple[str, tuple[str, ...]] | None = None) -> Log:
  """Reads table files into `raw`.

  Args:
    database: without `raw`.
    data: `config.data`; of it `path`, `columns`, `header`, `on_bad_row` and whether `min_rating` is set.
    path: instead of `data.path`.
    form: delimiter and column names of a file without header and quotes, where the caller knows them.

  Returns:
    The log; a row whose columns cannot be told apart is refused, or counted and left out.

  Raises:
    ValueError: a file is missing, damaged, no utf-8 text or unlike the others; columns are not found; a row is bad.
  """
  path = path or data.path
  files = list_files(path)
  kind = kind_of(files[0]) or "csv"
  for file in files:
    if file.lower().endswith(".gz"):
      check_gzip(file)
  try:
    if kind == "csv":
      scan, names, first_line = _scan_csv(files, data, form)
    elif kind == "json":
      scan, names, first_line = _scan_json(files, data)
    else:
      scan, names, first_line = _scan_parquet(database, files), _parquet_names(database, files), 0
    chosen = choose_columns(names, data.columns, path)
    if kind == "json":
      scan = scan.replace("$columns", ", ".join(f"{_text(name)}: 'VARCHAR'" for name in chosen.values()))
    columns = ", ".join(f'{_name(name)} AS "{key}"' for key, name in chosen.items())
    database.execute(f"CREATE TABLE raw AS SELECT {columns} FROM {scan}", {"files": [glob.escape(file) for file in files]})
  except duckdb.Error as error:
    if isinstance(error, duckdb.OutOfMemoryException) or "write" in _first_line(error):
      raise  # nothing is wrong with the files
    raise ValueError(f"cannot read {path}: {_first_line(error)}; is the file whole, and utf-8 text?") from error
  if kind == "csv":
    _settle_rejects(database, files, data.on_bad_row)
  delimiter = form[0] if form else None
  return Log(database, path, {}, lambda row: _locate(files, kind, row, first_line, delimiter))


def read_frame(database: duckdb.DuckDBPyConnection, table: Any, data: Any) -> Log:
  """Puts a pandas, polars or pyarrow table into `raw`; see `read_tables`."""
  source = f"the {type(table).__module__.partition('.')[0]} table"
  try:
    database.register("given", table)
    names = [row[0] for row in database.execute("DESCRIBE given").fetchall()]
    chosen = choose_columns(names, data.columns, source)
    columns = ", ".join(f'{_name(name)} AS "{key}"' for key, name in chosen.items())
    database.execute(f"CREATE TABLE raw AS SELECT {columns} FROM given")
    database.unregister("given")
  except duckdb.Error as error:
    raise ValueError(f"cannot read {source}: {_first_line(error)}; give a pandas, polars or pyarrow table") from error
  return Log(database, source, {}, lambda row: f"{source}, row {row + 1}")


def choose_columns(names: list[str], columns: Any, where: str) -> dict[str, str]:
  """Returns which column is "user", "item" and "time", and, where there is one, "rating" and "title".

  Args:
    names: of the columns that there are.
    columns: `config.data.columns`; what is empty there is filled in by the first layout that fits.
    where: for messages.

  Raises:
    ValueError: a column that the config names is not there, or no layout fits.
  """
  chosen = {"user": columns.user, "item": columns.item, "time": columns.time, "rating": columns.rating,
            "title": columns.title}
  chosen = {key: name for key, name in chosen.items() if name}
  for key, name in chosen.items():
    if name not in names:
      raise ValueError(f"{where} has no column {name!r}, but {names}; set --config.data.columns.{key}=NAME")
  for layout in LAYOUTS.values():
    full = {key: name for key, name in zip(KEYS, layout, strict=True) if name in names} | chosen
    if tuple(full.get(key) for key in KEYS[:3]) == layout[:3]:
      return {key: full[key] for key in KEYS if key in full}
  for layout in LAYOUTS.values():  # what the config names, and the rest of user, item and time
    full = {key: name for key, name in zip(KEYS[:3], layout[:3], strict=True) if name in names} | chosen
    if set(KEYS[:3]) <= full.keys():
      return {key: full[key] for key in KEYS if key in full}
  known = "; ".join(f"{', '.join(layout[:3])} ({name})" for name, layout in LAYOUTS.items())
  raise ValueError(f"{where}: which of the columns {names} are user, item and time? Known are {known}; for others set "
                   "--config.data.columns.user=NAME, .item=NAME and .time=NAME")


def check_gzip(path: str) -> None:
  """Reads a .gz file to its end: its own checksum tells damage that would else read as other rows.

  Raises:
    ValueError: it is truncated or damaged.
  """
  try:
    with gzip.open(path, "rb") as file:
      while file.read(1 << 20):
        pass
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or damaged: {error}; download it again, or "
                     "set --config.data.path to another file") from error


def _scan_csv(files: list[str], data: Any, form: tuple[str, tuple[str, ...]] | None) -> tuple[str, list[str], int]:
  """Returns SQL that reads the files, the names of their columns, and how many lines of a file are no rows."""
  if form:
    delimiter, names, has_header = *form, False
  else:
    heads = {file: _csv_head(file, data) for file in files}
    _check_same(heads)
    delimiter, names, has_header = heads[files[0]]
  columns = ", ".join(f"{_text(name)}: 'VARCHAR'" for name in names)
  quote = "''" if form else "'\"'"
  return (f"read_csv($files, auto_detect=false, header={has_header}, delim={_text(delimiter)}, quote={quote}, "
          f"escape={quote}, strict_mode=true, store_rejects=true, rejects_limit=0, max_line_size={LONGEST_LINE}, "
          f"columns={{{columns}}})"), list(names), int(has_header)


def _csv_head(file: str, data: Any) -> tuple[str, tuple[str, ...], bool]:
  """Returns the delimiter of a CSV file, the names of its columns, and whether they stand in its first line."""
  lines = list(itertools.islice((line for _, line in _lines(file) if line.strip()), SAMPLE))
  if not lines:
    raise ValueError(f"{file} has no lines ({os.path.getsize(file)} bytes); set --config.data.path=FILE to a file with "
                     "interactions")
  delimiter = max(DELIMITERS, key=lines[0].count)
  try:
    rows = list(csv.reader(lines, delimiter=delimiter))
  except csv.Error as error:
    raise ValueError(f"{file}: {error}; is it a CSV file whose lines end in \\n or \\r\\n?") from error
  if data.header:
    names, has_header = tuple(data.header.split(",")), False
  else:
    names, has_header = _amazon_names(rows), False
    if not names:
      names, has_header = tuple(rows[0]), True
  if len(set(names)) < len(names) or "" in names:
    raise ValueError(f"{file}:1: {list(names)} are the names of columns, each once, only in a file with a header; for "
                     "one without set --config.data.header=user,item,rating,time, in the order of its columns")
  return delimiter, names, has_header


def _amazon_names(rows: list[list[str]]) -> tuple[str, ...] | None:
  """Returns the names of Amazon's ratings without header: item first (2018) or user first (2014); None: not those."""
  for names in (("item", "user", "rating", "time"), ("user", "item", "rating", "time")):
    places = names.index("user"), names.index("item")
    if all(len(row) == 4 and AMAZON_USER.fullmatch(row[places[0]]) and AMAZON_ITEM.fullmatch(row[places[1]])
           for row in rows):
      return names
  return None


def _scan_json(files: list[str], data: Any) -> tuple[str, list[str], int]:
  """As `_scan_csv`; which columns are read is put in where `$columns` stands."""
  heads = {}
  for file in files:
    found: dict[str, None] = {}
    for number, line in itertools.islice(((number, line) for number, line in _lines(file) if line.strip()), SAMPLE):
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      if isinstance(row, dict):
        found |= dict.fromkeys(row)
      elif data.on_bad_row == "error":
        raise ValueError(f"{file}:{number}: {_short(line)} is not a JSON object; JSON lines hold one a line. Mend the "
                         "file, or leave such rows out with --config.data.on_bad_row=skip")
    if not found:
      raise ValueError(f"{file} has no lines with a JSON object ({os.path.getsize(file)} bytes); set "
                       "--config.data.path=FILE to a file with interactions")
    heads[file] = list(found)
  names = heads[files[0]]
  chosen = choose_columns(names, data.columns, files[0])
  _check_same({file: [name for name in chosen.values() if name in head] for file, head in heads.items()})
  return (f"read_json($files, format='newline_delimited', ignore_errors=true, maximum_object_size={LONGEST_LINE}, "
          "columns={$columns})"), names, 0


def _scan_parquet(database: duckdb.DuckDBPyConnection, files: list[str]) -> str:
  """Returns SQL that reads the files."""
  heads = {file: [f"{row[0]} {row[1]}" for row in database.execute(
      "DESCRIBE SELECT * FROM read_parquet($file)", {"file": glob.escape(file)}).fetchall()] for file in files}
  _check_same(heads)
  return "read_parquet($files)"


def _parquet_names(database: duckdb.DuckDBPyConnection, files: list[str]) -> list[str]:
  return [row[0] for row in database.execute("DESCRIBE SELECT * FROM read_parquet($file)",
                                             {"file": glob.escape(files[0])}).fetchall()]


def _check_same(heads: dict[str, Any]) -> None:
  """Raises ValueError unless all files have the same columns."""
  first, *others = heads
  for other in others:
    if heads[other] != heads[first]:
      raise ValueError(f"{first} and {other} do not have the same columns: {heads[first]} and {heads[other]}; read "
                       "them apart, or bring them to one form")


def _settle_rejects(database: duckdb.DuckDBPyConnection, files: list[str], on_bad_row: str) -> None:
  """Refuses lines that DuckDB could not split into columns, or counts them."""
  rejects = database.execute(
      "SELECT file_path, line, csv_line, error_type, error_message FROM reject_errors JOIN reject_scans USING "
      "(scan_id, file_id) ORDER BY list_position($files, file_path), line", {"files": files})
  found = {(file, line): rest for file, line, *rest in rejects.fetchall()}
  for (file, line), (text, kind, message) in found.items():
    # after an open quote or an endless line nobody knows where the next row starts: that is never left out
    swallowed = kind == "LINE SIZE OVER MAXIMUM" or (kind == "UNQUOTED VALUE" and "\n" in text.strip())
    if on_bad_row == "error" or swallowed:
      raise ValueError(f"{file}:{line}: {_short(text)}: {_first_line(message)} ({len(found)} lines are bad); mend the "
                       "file" + ("" if swallowed else
                                 ", or leave such rows out with --config.data.on_bad_row=skip"))
  if found:
    LOG.warning("%d lines of %s are bad and were left out (config.data.on_bad_row=skip)", len(found), ", ".join(files))
  database.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")


def _locate(files: list[str], kind: str, row: int, first_line: int, delimiter: str | None) -> str:
  """Returns "file:line: text" of a row, counted over all files from 0; no line before it was left out."""
  for file in files:
    if kind == "parquet":
      count, = duckdb.execute("SELECT count(*) FROM read_parquet($file)", {"file": glob.escape(file)}).fetchone()
      if row < count:
        return f"{file}, row {row + 1}"
    else:
      count = 0
      for number, text in itertools.islice(_records(file, kind, delimiter), first_line, None):
        if count == row:
          return f"{file}:{number}: {_short(text)}"
        count += 1
    row -= count
  return files[-1]


def _records(file: str, kind: str, delimiter: str | None) -> Iterator[tuple[int, str]]:
  """Yields number and text of the lines that rows start on; a quoted field may span lines."""
  lines = ((number, line) for number, line in _lines(file) if line.strip())
  if kind == "json" or delimiter:
    yield from lines
    return
  for number, line in lines:
    while line.count('"') % 2:
      _, more = next(lines, (0, '"'))
      line += more
    yield number, line


def _lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields number and text of the lines of a file; a byte order mark is dropped, bytes that are no text are shown."""
  opened = gzip.open(file, "rb") if file.lower().endswith(".gz") else open(file, "rb")  # noqa: SIM115
  with opened:
    for number in itertools.count(1):
      line = opened.readline(LONGEST_LINE + 1)
      if not line:
        return
      if len(line) > LONGEST_LINE:
        raise ValueError(f"{file}:{number}: {_short(line[:100].decode(errors='replace'))}: a line of more than "
                         f"{LONGEST_LINE} bytes; is this the right file?")
      text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="backslashreplace")
      yield number, text.rstrip("\r\n")


def _short(text: str) -> str:
  return repr(text.strip()[:100])


def _first_line(error: Any) -> str:
  return str(error).split("\n", 1)[0]


def _name(name: str) -> str:
  """Returns a column's name as SQL."""
  return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
  """Returns text as SQL."""
  return "'" + text.replace("'", "''") + "'"
