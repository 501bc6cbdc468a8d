"""Owns the log: interactions as a source gives them, in a database that may be larger than memory.

`Log` holds table `raw`, untouched: user and item, and time, rating and title where the source has them; `rowid` is the
order of the source. `clean` makes three tables of it, which everything after reads:

  users (raw, code), items (raw, code)   every id that occurs, numbered from 1 in ascending order
  coded (user, item, time, row)          the rows, in codes; time is a whole or real number, larger is later
"""

import dataclasses
import datetime
import itertools
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import pyarrow

LOG = logging.getLogger(__name__)
WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
REAL = ("FLOAT", "DOUBLE")
SPACES = "' ' || chr(9) || chr(10) || chr(13)"
UNITS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}  # 1973 in each of them
NUMBER = r"[\s\x0b]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[\s\x0b]*"
DATE = r"\s*[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([ T][^(]*)?"
DATES = "2020-12-31 or 2020/12/31, each also with a time of day, as 2020-12-31 23:59:59+01:00"  # DATE in words
FAR = 100  # times so many times apart, with none between, were not counted in one unit


@dataclasses.dataclass(frozen=True)
class Interactions:
  """What a small source holds, in its own ids and its own row order (N rows).

  Args:
    users: (N,) raw user ids, int64 or numpy str.
    items: (N,) raw item ids, int64 or numpy str.
    times: (N,) int64 or float64, any unit, larger is later; None: a user's rows are in time order.
    titles: raw item id (int or str) -> title; may be empty or miss items.
    source: where it came from, for messages.
    ratings: (N,) numbers; None: the source has none.
  """

  users: np.ndarray
  items: np.ndarray
  times: np.ndarray | None
  titles: dict[int | str, str]
  source: str
  ratings: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Log:
  """A source as table `raw` of a database.

  Args:
    database: holds the table.
    source: where it came from, for messages.
    titles: raw item id, as text -> title, where they do not stand in the table.
    locate: row (from 0) -> where that is, for messages.
    is_file: it is named by `config.data`, and is no table from Python; for messages.
  """

  database: duckdb.DuckDBPyConnection
  source: str
  titles: dict[str, str]
  locate: Callable[[int], str]
  is_file: bool = True

  def columns(self) -> dict[str, str]:
    """Returns name -> type of the columns of `raw`."""
    return {row[0]: row[1] for row in self.database.execute("DESCRIBE raw").fetchall()}


def open_database(folder: str | os.PathLike[str] | None = None, memory: int | None = None) -> duckdb.DuckDBPyConnection:
  """Opens an empty database.

  Args:
    folder: an existing folder for what does not fit into memory; None: everything stays in memory.
    memory: bytes that it may take; None: as many as DuckDB sees fit.
  """
  database = duckdb.connect(":memory:" if folder is None else os.path.join(folder, "log.duckdb"), config={
      "autoinstall_known_extensions": "false", "preserve_insertion_order": "true"})
  database.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
  spilled = "" if folder is None else os.path.join(folder, "spilled")  # "": nowhere, rather than in the current folder
  database.execute("SET temp_directory = $folder", {"folder": spilled})
  if memory is not None:
    database.execute("SET memory_limit = $bytes", {"bytes": f"{memory // 2 ** 20}MiB"})
  return database


def put(database: duckdb.DuckDBPyConnection, found: Interactions) -> Log:
  """Puts what is in memory into a database."""
  columns = {"user": found.users, "item": found.items, "time": found.times, "rating": found.ratings}
  table = pyarrow.table({name: pyarrow.array(column.tolist() if column.dtype.kind in "UT" else column)
                         for name, column in columns.items() if column is not None})
  database.register("given", table)
  database.execute("CREATE TABLE raw AS SELECT * FROM given")
  database.unregister("given")
  titles = {str(item): title for item, title in found.titles.items()}
  return Log(database, found.source, titles, lambda row: f"{found.source}, row {row + 1}")


def first_line(error: Any) -> str:
  """Returns the first line of an error, which says what it is."""
  return str(error).split("\n", 1)[0]


def is_about_space(error: duckdb.Error) -> bool:
  """Whether memory or disk are full, and not a source at fault."""
  return isinstance(error, duckdb.OutOfMemoryException) or bool(
      re.search("Could not write file|No space left|failed to offload", str(error)))


def clean(log: Log, min_rating: float | None, on_bad_row: str) -> dict[str, int]:
  """Makes `users`, `items` and `coded` of `raw`, and drops `raw`.

  A row is good when it has a user, an item and a finite time; where a least rating is asked for, also a rating. A time
  is a number, or a date with or without a time of day (in UTC unless it says otherwise), which becomes microseconds.
  Ids are kept as they stand: as whole numbers where all are written as such, else as text.

  Args:
    log: with rows.
    min_rating: rows below it are left out; None: ratings are not read.
    on_bad_row: "error", or "skip": they are counted and left out.

  Returns:
    How many rows were read, and left out as bad and as rated too low: "rows", "bad_rows", "low_ratings".

  Raises:
    ValueError: no good row; a bad one (with its place); no ratings; two ids that look the same; times of several units
      or in the future; more users or items than int32 holds.
  """
  try:
    return _clean(log, min_rating, on_bad_row)
  except duckdb.Error as error:
    if is_about_space(error):
      raise
    raise ValueError(f"{log.source}: {first_line(error)}; bring its users, items and times into a plainer form, as "
                     "whole numbers or text") from error


def _clean(log: Log, min_rating: float | None, on_bad_row: str) -> dict[str, int]:
  """As `clean`; what DuckDB makes nothing of is its own error."""
  database = log.database
  for name, kind in log.columns().items():
    if kind == "BLOB":  # text of parquet that is not said to be text; a cast would write it in escapes
      database.execute(f'ALTER TABLE raw ALTER "{name}" TYPE VARCHAR USING decode("{name}")')
  types = log.columns()
  if min_rating is not None and "rating" not in types:
    raise ValueError(f"config.data.min_rating={min_rating}: {log.source} has no ratings; leave min_rating out, or name "
                     "their column with --config.data.columns.rating=NAME")
  values = {"user": _id_value(log, "user", types["user"]), "item": _id_value(log, "item", types["item"]),
            "time": _time_value(database, types["time"]) if "time" in types else "0"}
  parts = {"user": f"{values['user']} IS NOT NULL", "item": f"{values['item']} IS NOT NULL"}
  enough = "true"
  if min_rating is not None:
    parts["rating"] = "NOT coalesce(isnan(TRY_CAST(rating AS DOUBLE)), true)"
    enough = f"TRY_CAST(rating AS DOUBLE) >= {float(min_rating)!r}"
  if "time" in types:
    parts["time"] = f"{values['time']} IS NOT NULL AND isfinite(({values['time']})::DOUBLE)"
  good = f"coalesce({' AND '.join(parts.values())}, false)"
  rows, bad, low, first_bad = database.execute(
      f"SELECT count(*), count(*) FILTER (NOT {good}), count(*) FILTER ({good} AND NOT {enough}), "
      f"min(rowid) FILTER (NOT {good}) FROM raw").fetchone()
  if bad and on_bad_row == "error":
    skip = ", or leave such rows out with --config.data.on_bad_row=skip" if rows > bad + low else ""
    raise ValueError(f"{log.locate(first_bad)}: {_complain(log, first_bad, parts)} ({bad} of {rows} rows are bad); "
                     f"mend the {'file' if log.is_file else 'table'}{skip}")
  if rows == bad + low:
    rated = "" if min_rating is None else f", {low} rated below {min_rating}"
    way_out = "set --config.data.path=FILE to a file that has some" if log.is_file else "give a table that has some"
    raise ValueError(f"{log.source} has no interactions ({rows} rows, {bad} of them bad{rated}); {way_out}")
  kept = f"{good} AND {enough}"
  if not bad:  # as nearly always: the rest of the queries need not ask again
    kept = enough
    values |= {name: f'"{name}"::{"BIGINT" if types[name] in WHOLE + REAL else "VARCHAR"}' for name in ("user", "item")}
  for name in ("user", "item"):
    _number_ids(log, name, values[name], kept)
  database.execute(
      "CREATE TABLE coded AS SELECT users.code AS user, items.code AS item, found.time AS time, found.row AS row FROM "
      f"(SELECT {values['user']} AS user, {values['item']} AS item, {values['time']} AS time, rowid AS row FROM raw "
      f"WHERE {kept}) AS found JOIN users ON found.user = users.raw JOIN items ON found.item = items.raw")
  if "time" in types:
    _check_times(log, is_date="epoch_us" in values["time"])
  if "title" in types:
    rows_of_titles = database.execute(
        f"SELECT ({values['item']})::VARCHAR, min(title::VARCHAR) FROM raw WHERE {kept} AND title IS NOT NULL "
        "GROUP BY 1")
    log.titles.update(rows_of_titles.fetchall())
  database.execute("DROP TABLE raw")
  if bad:
    LOG.warning("%s: %d of %d rows are bad and were left out (config.data.on_bad_row=skip)", log.source, bad, rows)
  return {"rows": rows, "bad_rows": bad, "low_ratings": low}


def _id_value(log: Log, name: str, kind: str) -> str:
  """Returns SQL for an id of `raw`: BIGINT or VARCHAR, NULL where there is none."""
  if kind in WHOLE:
    return f'"{name}"::BIGINT'
  if kind in REAL:
    exact = 2**24 if kind == "FLOAT" else 2**53
    broken = log.database.execute(f'SELECT min(rowid) FROM raw WHERE isfinite("{name}") AND (abs("{name}") >= {exact} '
                                  f'OR "{name}" != TRY_CAST("{name}" AS BIGINT))').fetchone()[0]
    if broken is not None:
      raise ValueError(f"{log.locate(broken)}: the {name} ids are real numbers ({kind}), and not all are whole and "
                       f"below {exact}; store them as whole numbers or as text")
    return f'TRY_CAST("{name}" AS BIGINT)'
  if kind.endswith("]") or kind.startswith(("STRUCT(", "MAP(", "UNION(")):
    raise ValueError(f"{log.source}: the {name} ids are of type {kind}; give an interaction a row, with ids that are "
                     "text or whole numbers")
  return f"CASE WHEN trim(\"{name}\"::VARCHAR, {SPACES}) != '' THEN \"{name}\"::VARCHAR END"


def _time_value(database: duckdb.DuckDBPyConnection, kind: str) -> str:
  """Returns SQL for a time of `raw`: BIGINT or DOUBLE, NULL where it is none."""
  if kind in WHOLE or kind in REAL:
    return "time"
  if kind.startswith(("TIMESTAMP", "DATE")):
    stamp = "time" if kind == "TIMESTAMP WITH TIME ZONE" else "TRY_CAST(TRY_CAST(time AS TIMESTAMP) AS TIMESTAMPTZ)"
    return f"CASE WHEN isfinite({stamp}) THEN epoch_us({stamp}) END"
  number, whole, stamp = _time_forms()
  numbers, whole_numbers, stamps = database.execute(
      f"SELECT count(*) FILTER (isfinite({number})), count(*) FILTER ({number} = {whole}), "
      f"count(*) FILTER (isfinite({stamp})) FROM raw").fetchone()
  if stamps > numbers:
    return f"CASE WHEN isfinite({stamp}) THEN epoch_us({stamp}) END"
  return whole if whole_numbers == numbers else number


def _time_forms() -> tuple[str, ...]:
  """Returns SQL for a time of text as a number, as a whole one, and as a date; each NULL where it is none."""
  # DuckDB also takes 0x1F, 1_000, years of two figures and years before Christ
  return tuple(f"CASE WHEN regexp_full_match(time::VARCHAR, '{form}') THEN TRY_CAST(time::VARCHAR AS {kind}) END"
               for form, kind in ((NUMBER, "DOUBLE"), (NUMBER, "BIGINT"), (DATE, "TIMESTAMPTZ")))


def _complain(log: Log, row: int, parts: dict[str, str]) -> str:
  """Returns what is wrong with a bad row; `parts` is SQL for whether each of its values is good, the time last."""
  number, _, stamp = _time_forms() if "time" in parts else ("NULL",) * 3
  shown = ", ".join(f'"{name}"::VARCHAR, coalesce({part}, false)' for name, part in parts.items())
  *values, is_number, is_date = log.database.execute(
      f"SELECT {shown}, coalesce(isfinite({number}), false), coalesce(isfinite({stamp}), false) FROM raw "
      "WHERE rowid = $row", {"row": row}).fetchone()
  texts = dict(zip(parts, values[::2], strict=True))
  found = ", ".join(f"{name}={'none' if text is None else repr(text[:60])}" for name, text in texts.items())
  wrong = [name for name, fine in zip(parts, values[1::2], strict=True) if not fine]
  if wrong == ["time"] and (texts["time"] or "").strip():
    if is_number or is_date:
      kinds = ("number", "dates") if is_number else ("date", "numbers")
      return f"{found} is a {kinds[0]}, and the times of this log are read as {kinds[1]}"
    return f"{found} is neither a number nor a date of a form that is read ({DATES})"
  if wrong == ["rating"] and (texts["rating"] or "").strip():
    return f"{found}: the rating is no number"
  return f"{found}: a row needs a user, an item and a time{' and a rating' if 'rating' in parts else ''}"


def _number_ids(log: Log, name: str, value: str, kept: str) -> None:
  """Makes `users` or `items`; ids of text become whole numbers where that loses nothing."""
  database, table = log.database, f"{name}s"
  database.execute(f"CREATE TABLE ids AS SELECT DISTINCT {value} AS raw FROM raw WHERE {kept}")
  count, = database.execute("SELECT count(*) FROM ids").fetchone()
  if count > np.iinfo(np.int32).max - 1:
    raise ValueError(f"{log.source}: {count} {table} are more than int32 can number; raise --config.data.k_core or "
                     "take a part of the log")
  order = "raw"
  if database.execute("SELECT typeof(raw) FROM ids LIMIT 1").fetchone()[0] == "VARCHAR":
    alike = database.execute(f"SELECT min(raw), max(raw) FROM ids GROUP BY nfc_normalize(trim(raw, {SPACES})) "
                             "HAVING count(*) > 1 LIMIT 1").fetchone()
    if alike:
      raise ValueError(f"{log.source}: two {name} ids, {alike[0]!r} and {alike[1]!r}, differ only in spaces around "
                       "them or in their Unicode form; write each id in one way")
    if database.execute("SELECT bool_and(coalesce(TRY_CAST(raw AS BIGINT)::VARCHAR = raw, false)) FROM ids"
                        ).fetchone()[0]:
      order = "raw::BIGINT"
  database.execute(f"CREATE TABLE {table} AS SELECT raw, (row_number() OVER (ORDER BY {order}))::INTEGER AS code "
                   f"FROM ids ORDER BY {order}")
  database.execute("DROP TABLE ids")


def _check_times(log: Log, is_date: bool) -> None:
  """Notes the unit of times, see `find_unit`. Raises ValueError for numbers in several, and for times in the future."""
  bounds = list(UNITS.values())
  group = " + ".join(f"(time >= {bound:.0f})::INTEGER" for bound in bounds)
  groups = log.database.execute(f"SELECT {group} AS unit, count(*), min(time), max(time), arg_min(row, time) "
                                "FROM coded GROUP BY unit ORDER BY unit").fetchall()
  total = sum(count for _, count, *_ in groups)
  for before, after in itertools.pairwise(groups):
    if not is_date and after[2] > FAR * max(abs(before[2]), abs(before[3])):
      rare = min(before, after, key=lambda found: found[1])
      raise ValueError(f"{log.locate(rare[4])}: {rare[1]} of {total} times lie between {rare[2]} and {rare[3]}, far "
                       f"from the others ({before[2]} to {before[3]}, then {after[2]} to {after[3]}): mixed time "
                       "units, or a stand-in for a missing time; bring all to one unit, or take those rows out")
  unit, _, _, newest, _ = groups[-1]
  unit = list(UNITS).index("microseconds") + 1 if is_date else unit
  log.database.execute(f"SET VARIABLE unit = {unit}")
  if unit:
    scale = 1e3 ** (unit - 1)
    now = datetime.datetime.now(datetime.UTC).timestamp()
    if newest / scale > now + 86400:
      row, = log.database.execute("SELECT arg_max(row, time) FROM coded").fetchone()
      name = list(UNITS)[unit - 1]
      raise ValueError(f"{log.locate(row)}: time {newest} lies in the future, read as {name} since 1970; "
                       "correct or remove such rows")


def find_unit(database: duckdb.DuckDBPyConnection) -> int:
  """Returns the unit of the times of a clean log, as its place in `UNITS`, from 1; 0: they are no moments, or none."""
  [(unit,)] = database.execute("SELECT getvariable('unit')").fetchall()
  return unit or 0


def describe_time(time: float, unit: int) -> str:
  """Returns a time as a date in UTC, of a unit as `find_unit` has it; else as the number that it is."""
  seconds = time / 1e3 ** (unit - 1)
  if not unit or not -6.2e10 < seconds < 2.5e11:  # of the years 5 to 9999
    return f"{time:g}" if math.isfinite(time) and time != int(time) else f"{int(time)}"
  return f"{datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds):%Y-%m-%d %H:%M}"


def fetch_ids(database: duckdb.DuckDBPyConnection, table: str, codes: np.ndarray) -> np.ndarray:
  """Returns the raw ids of codes (ascending, from 1) of `users` or `items`: int64, or text of any length."""
  number = database.execute(f"SELECT bool_and(typeof(raw) = 'BIGINT' OR coalesce(TRY_CAST(raw AS BIGINT)::VARCHAR = "
                            f"raw::VARCHAR, false)) FROM {table}").fetchone()[0]
  kind: Any = np.int64 if number else np.dtypes.StringDType()
  found = database.execute(f"SELECT raw{'::BIGINT' if number else ''} AS raw FROM {table} ORDER BY code").fetchnumpy()
  return np.asarray(np.ma.getdata(found["raw"]))[codes - 1].astype(kind)
