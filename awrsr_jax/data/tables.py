"""Owns tables -> `Log`: files of rows with named columns (CSV, TSV and JSON lines, also as .gz, and parquet), and
tables from Python (pandas, polars, pyarrow).

Which columns are user, item, time, rating and title stands in `config.data.columns`; where it does not, the names of a
known layout are looked for. Rows keep the order of their file, and files the order of their names.
"""

import csv
import glob
import itertools
import json
import logging
import os
import re
from typing import Any

import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet

from awrsr_jax.data.columns import HEADER, KEYS, choose_columns, is_number
from awrsr_jax.data.lines import (
  BLANKS,
  LONGEST_LINE,
  check_gzip,
  count_lines,
  count_records,
  find_records,
  holds,
  mixes_line_ends,
  quote,
  read_lines,
)
from awrsr_jax.data.log import Log, first_line, is_about_space

LOG = logging.getLogger(__name__)
KINDS = {"csv": "csv", "tsv": "csv", "inter": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
         "parquet": "parquet", "pq": "parquet"}  # by the end of a file's name, before ".gz"
AMAZON_USER, AMAZON_ITEM = re.compile("A[0-9A-Z]{9,20}"), re.compile("B[0-9A-Z]{9}|[0-9]{9}[0-9X]")
SAMPLE = 1000  # lines looked at to tell what a file is
DELIMITERS = ",\t;|"
NESTED = {dict, list, set, tuple, np.ndarray}


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
    files = [file for file in files if os.path.isfile(file)]  # Spark calls folders of parts x.csv
  else:
    files = [path] if os.path.exists(path) else [file for file in glob.glob(path) if os.path.isfile(file)]
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
    data: `config.data`; of it `path`, `columns`, `header` and `on_bad_row`.
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
      scan, names, delimiter, has_header = _scan_csv(files, data, form)
    else:
      scan, names = _scan_json(files, data) if kind == "json" else _scan_parquet(database, files)
      delimiter, has_header = "", False
    chosen = choose_columns(names, data.columns, path)
    if has_header and any(map(is_number, chosen.values())):
      raise ValueError(f"{files[0]}: its first line, {names}, holds numbers where names of columns would stand, and "
                       f"would not be read; for a file without a header set {HEADER}")
    columns = _columns(names, chosen)
    if kind == "json":
      if len({name.lower() for name in chosen.values()}) < len(set(chosen.values())):
        raise ValueError(f"{path}: of the columns {list(chosen.values())} two differ in case alone, which cannot be "
                         "read from JSON; rename one")
      scan = scan.replace("$columns", ", ".join(f"{_text(name)}: 'JSON'" for name in chosen.values()))
      columns = ", ".join(f'{_json_value(_name(name), key in KEYS[:2])} AS "{key}"' for key, name in chosen.items())
    else:
      scan += _by_place(len(names))
    as_they_stand = [glob.escape(file) for file in files]  # to DuckDB a name is a pattern
    database.execute(f"CREATE TABLE raw AS SELECT {columns} FROM {scan}", {"files": as_they_stand})
  except duckdb.Error as error:
    if is_about_space(error):
      raise  # nothing is wrong with the files
    way_out = (kind == "csv" and _mend_line_ends(files)) or "is the file whole, and utf-8 text?"
    raise ValueError(f"cannot read {path}: {first_line(error)}; {way_out}") from error
  has_quotes = kind == "csv" and not form
  if kind == "csv":
    rejected = _settle_rejects(database, files, data.on_bad_row)
    if has_quotes and any(holds(file, b'"') for file in files):
      expected = sum(count_records(file, delimiter) - has_header for file in files)
      found = database.execute("SELECT count(*) FROM raw").fetchone()[0] + rejected
      if found != expected:
        way_out = _mend_line_ends(files) or ("quotes stand where none should: mend the file, or write it anew with all "
                                             "values in quotes")
        raise ValueError(f"{path}: {found} rows are found by one reader and {expected} by another; {way_out}")
  return Log(database, path, {}, lambda row: _locate(files, kind, row, has_header, delimiter, has_quotes))


def read_frame(database: duckdb.DuckDBPyConnection, table: Any, data: Any) -> Log:
  """Puts a pandas, polars or pyarrow table into `raw`; see `read_tables`."""
  source = f"the {type(table).__module__.partition('.')[0]} table"
  try:
    names = [str(name) for name in (table.column_names if isinstance(table, pyarrow.Table) else table.columns)]
    chosen = choose_columns(names, data.columns, source)
    places = {name: names.index(name) for name in chosen.values()}
    database.register("given", _take_columns(table, places))
    database.execute(f"CREATE TABLE raw AS SELECT {_columns(list(places), chosen)} FROM given{_by_place(len(places))}")
    database.unregister("given")
  except (duckdb.Error, pyarrow.ArrowException, AttributeError, TypeError) as error:
    if isinstance(error, duckdb.Error) and is_about_space(error):
      raise
    raise ValueError(f"cannot read {source}: {first_line(error)}; give a pandas, polars or pyarrow table") from error
  return Log(database, source, {}, lambda row: f"{source}, row {row + 1}", is_file=False)


def _take_columns(table: Any, places: dict[str, int]) -> Any:
  """Returns some columns of a table; those of pandas that hold any Python objects as text, each as it stands."""
  if not type(table).__module__.startswith("pandas"):
    return table.select(list(places))
  columns = {}
  for name, place in places.items():  # by its place: labels of pandas need not be texts
    column = table.iloc[:, place]
    if column.dtype == object:  # DuckDB would look at a sample, and bend the others to its type
      if nested := NESTED & set(map(type, column)):
        raise ValueError(f"column {name!r} of the pandas table holds values of type {nested.pop().__name__}; give an "
                         "interaction a row, of texts and numbers")
      missing = column.isna()
      try:
        column = pyarrow.array([None if gone else value.decode() if isinstance(value, bytes) else str(value)
                                for gone, value in zip(missing, column, strict=True)], pyarrow.large_string())
      except UnicodeError as error:
        raise ValueError(f"column {name!r} of the pandas table holds what is no utf-8 text ({error}); mend it, as with "
                         "table[column].str.encode('utf-8', 'replace').str.decode('utf-8')") from error
    columns[name] = column
  return pyarrow.table(columns)


def _scan_csv(files: list[str], data: Any,
              form: tuple[str, tuple[str, ...]] | None) -> tuple[str, list[str], str, bool]:
  """Returns SQL that reads the files, the names of their columns, what stands between, and if names come first."""
  if form:
    delimiter, names, skipped = *form, 0
  else:
    heads = {file: _csv_head(file, data) for file in files}
    _check_same(heads)
    delimiter, names, skipped = heads[files[0]]
  columns = ", ".join(f"column{place}: 'VARCHAR'" for place in range(len(names)))
  quote = "''" if form else "'\"'"
  quoting = not form and any(holds(file, b'"') for file in files)
  return (f"read_csv($files, auto_detect=false, header=false, skip={skipped}, delim={_text(delimiter)}, quote={quote}, "
          f"escape={quote}, strict_mode=true, store_rejects=true, rejects_limit=0, max_line_size={LONGEST_LINE}, "
          f"parallel={not quoting}, "  # several threads start amid a file, where none knows whether a quote is open
          f"hive_partitioning=false, columns={{{columns}}})"), list(names), delimiter, skipped > 0


def _csv_head(file: str, data: Any) -> tuple[str, tuple[str, ...], int]:
  """Returns the delimiter of a CSV file, the names of its columns, and how many lines there are up to its header."""
  numbered = list(itertools.islice(((number, line) for number, line in read_lines(file) if line), SAMPLE))
  lines = [line for _, line in numbered]
  if not lines:
    raise ValueError(f"{file} has no lines ({os.path.getsize(file)} bytes); set --config.data.path=FILE to a file with "
                     "interactions")
  delimiter = max(DELIMITERS, key=lines[0].count)
  try:
    rows = list(csv.reader(lines, delimiter=delimiter))
  except csv.Error as error:
    raise ValueError(f"{file}: {error}; a line ends in \\n or \\r\\n") from error
  names, skipped = tuple(data.header.split(",")) if data.header else _amazon_names(rows), 0
  if not names:
    names, skipped = tuple(rows[0]), numbered[0][0]
  elif data.header and data.on_bad_row == "error" and rows[0] == list(names):
    raise ValueError(f"{file}:{numbered[0][0]} holds the names of its columns itself; leave out --config.data.header="
                     f"{data.header}, which is for files without them")
  names = tuple(name or f"column {place}" for place, name in enumerate(names, start=1))  # pandas writes its index so
  if len(set(names)) < len(names):
    raise ValueError(f"{file}:1: {list(names)} are the names of columns, each once, only in a file with a header; for "
                     f"one without set {HEADER}")
  return delimiter, names, skipped


def _amazon_names(rows: list[list[str]]) -> tuple[str, ...] | None:
  """Returns the names of Amazon's ratings without header: item first (2018) or user first (2014); None: not those."""
  for names in (("item", "user", "rating", "time"), ("user", "item", "rating", "time")):
    places = names.index("user"), names.index("item")
    if all(len(row) == 4 and AMAZON_USER.fullmatch(row[places[0]]) and AMAZON_ITEM.fullmatch(row[places[1]])
           for row in rows):
      return names
  return None


def _json_value(name: str, is_id: bool) -> str:
  """Returns SQL for the text of a JSON value; NaN and its like are none, and lists and objects are no ids."""
  none = "'NULL', 'ARRAY', 'OBJECT'" if is_id else "'NULL'"
  return (f"CASE WHEN json_type({name}) = 'VARCHAR' THEN {name} ->> '$' WHEN json_type({name}) NOT IN ({none}) AND "
          f"{name}::VARCHAR NOT IN ('NaN', 'Infinity', '-Infinity') THEN {name}::VARCHAR END")


def _scan_json(files: list[str], data: Any) -> tuple[str, list[str]]:
  """As `_scan_parquet`; which columns are read is put in where `$columns` stands."""
  heads = {}
  for file in files:
    found: dict[str, None] = {}
    for number, line in itertools.islice(((number, line) for number, line in read_lines(file) if line.strip(BLANKS)),
                                         SAMPLE):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if isinstance(row, dict):
        found |= dict.fromkeys(row)
      elif data.on_bad_row == "error":
        raise ValueError(f"{file}:{number}: {quote(line)} is not a JSON object; JSON lines hold one a line. Mend the "
                         "file, or leave such rows out with --config.data.on_bad_row=skip")
    if not found:
      raise ValueError(f"{file} has no lines with a JSON object ({os.path.getsize(file)} bytes); set "
                       "--config.data.path=FILE to a file with interactions")
    heads[file] = list(found)
  names = heads[files[0]]
  chosen = choose_columns(names, data.columns, files[0])
  _check_same({file: [name for name in chosen.values() if name in head] for file, head in heads.items()})
  return (f"read_json($files, format='newline_delimited', ignore_errors=true, maximum_object_size={LONGEST_LINE}, "
          "hive_partitioning=false, columns={$columns})"), names


def _scan_parquet(database: duckdb.DuckDBPyConnection, files: list[str]) -> tuple[str, list[str]]:
  """Returns SQL that reads the files, and the names of their columns."""
  describe = "DESCRIBE SELECT * FROM read_parquet($file, hive_partitioning=false)"
  heads = {file: [f"{row[0]} {row[1]}" for row in database.execute(describe, {"file": glob.escape(file)}).fetchall()]
           for file in files}
  _check_same(heads)
  try:
    names = pyarrow.parquet.read_schema(files[0]).names  # as they are; DuckDB renames those that come twice
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"cannot read {files[0]}: {first_line(error)}; is the file whole?") from error
  return "read_parquet($files, hive_partitioning=false)", names


def _check_same(heads: dict[str, Any]) -> None:
  """Raises ValueError unless all files have the same columns."""
  first, *others = heads
  for other in others:
    if heads[other] != heads[first]:
      raise ValueError(f"{first} and {other} do not have the same columns: {heads[first]} and {heads[other]}; read "
                       "them apart, or bring them to one form")


def _settle_rejects(database: duckdb.DuckDBPyConnection, files: list[str], on_bad_row: str) -> int:
  """Refuses lines that DuckDB could not split into columns, or returns how many there are."""
  rejects = database.execute(
      "SELECT file_path, line_byte_position, csv_line, error_type, error_message FROM reject_errors JOIN reject_scans "
      "USING (scan_id, file_id) ORDER BY list_position($files, file_path), line_byte_position", {"files": files})
  found = {(file, place): rest for file, place, *rest in rejects.fetchall()}
  are_all = not database.execute("SELECT count(*) FROM raw").fetchone()[0]
  for (file, place), (text, kind, message) in found.items():
    # after an open quote or an endless line nobody knows where the next row starts: that is never left out
    swallowed = kind == "LINE SIZE OVER MAXIMUM" or (
        kind == "UNQUOTED VALUE" and ("\n" in text.strip() or mixes_line_ends(file)))
    if on_bad_row == "error" or swallowed:
      way_out = "" if swallowed or are_all else ", or leave such rows out with --config.data.on_bad_row=skip"
      way_out += f"; {mixed}" if (mixed := _mend_line_ends([file])) else ""
      raise ValueError(f"{file}:{count_lines(file, place)}: {quote(text)}: {first_line(message)} ({len(found)} lines "
                       f"are bad); mend the file{way_out}")
  if found:
    LOG.warning("%d lines of %s are bad and were left out (config.data.on_bad_row=skip)", len(found), ", ".join(files))
  database.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
  return len(found)


def _mend_line_ends(files: list[str]) -> str:
  """Returns what is to be done where lines of a file end in two ways, within quotes or not; "" where none do."""
  for file in filter(mixes_line_ends, files):
    return f"some lines of {file} end in \\n and some in \\r\\n: bring them to one form, as with sed -i 's/\\r$//' FILE"
  return ""


def _locate(files: list[str], kind: str, row: int, has_header: bool, delimiter: str, has_quotes: bool) -> str:
  """Returns "file:line: text" of a row, counted over all files from 0; no line before it was left out."""
  for file in files:
    if kind == "parquet":
      count, = duckdb.execute("SELECT count(*) FROM read_parquet($file)", {"file": glob.escape(file)}).fetchone()
      if row < count:
        return f"{file}, row {row + 1}"
    else:
      count = 0
      for number, text in itertools.islice(find_records(file, delimiter, has_quotes), has_header, None):
        if count == row:
          return f"{file}:{number}: {quote(text)}"
        count += 1
    row -= count
  return files[-1]


def _by_place(count: int) -> str:
  """Returns SQL that names the columns of a source by their places: to DuckDB, Item and item are one name."""
  return f" AS source({', '.join(f'column{place}' for place in range(count))})"


def _columns(names: list[str], chosen: dict[str, str]) -> str:
  """Returns SQL that selects the chosen ones of the columns that `_by_place` named."""
  return ", ".join(f'column{names.index(name)} AS "{key}"' for key, name in chosen.items())


def _name(name: str) -> str:
  """Returns a column's name as SQL."""
  return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
  """Returns text as SQL."""
  return "'" + text.replace("'", "''") + "'"
