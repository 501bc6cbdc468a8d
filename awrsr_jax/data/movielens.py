"""Owns MovieLens as GroupLens publishes it: ratings.dat, u.data or ratings.csv, alone, in a folder or in the zip.

Rows keep file order, which decides between equal timestamps. Titles come from the file that is published beside.
"""

import contextlib
import csv
import dataclasses
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import duckdb

from awrsr_jax.data import text
from awrsr_jax.data.from_tfds import fetch
from awrsr_jax.data.log import Log
from awrsr_jax.data.tables import read_tables

# ratings file: its separator, the file of titles beside it, that file's separator and encoding
FILES = {
    "ratings.dat": ("::", "movies.dat", "::", "latin-1"),
    "u.data": ("\t", "u.item", "|", "latin-1"),
    "ratings.csv": (",", "movies.csv", ",", "utf-8"),
}
COLUMNS = ("user", "item", "rating", "time")  # of the first two, which have no header

# name: url, bytes, sha256
DOWNLOADS = {
    "ml-1m": ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", 5917549,
              "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    "ml-100k": ("https://files.grouplens.org/datasets/movielens/ml-100k.zip", 4924029,
                "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
}

MOST_TITLES = 1 << 26  # bytes; the largest published file of titles has 4 MB
CSV_HEADER = "userid,movieid,rating,timestamp"


def download(database: duckdb.DuckDBPyConnection, data: Any) -> Log:
  """Reads the MovieLens data set `data.name`, a key of `DOWNLOADS`, from GroupLens, downloaded once.

  Raises:
    ValueError: it cannot be downloaded; the message names --config.data.path.
  """
  return read_movielens(database, data, fetch(*DOWNLOADS[data.name]))


def detect(path: str) -> str | None:
  """Returns which key of `FILES` a file is like, by its name or else its first lines; None: none of them."""
  name = os.path.basename(path)
  if name in FILES:
    return name
  head = text.read_bytes(path, 65536)
  lines = [line.strip() for line in head.decode("latin-1").split("\n") if line.strip()][:100]
  if not lines:
    return None
  if "::" in lines[0]:
    return "ratings.dat"
  if lines[0].removeprefix("\xef\xbb\xbf").replace('"', "").lower() == CSV_HEADER:
    return "ratings.csv"
  whole = lines[:-1] if len(lines) > 1 and len(head) == 65536 else lines  # the last one may be cut off
  numbers = all([part.isdigit() for part in line.split("\t")] in ([True] * 4, [True, True, False, True])
                for line in whole)
  return "u.data" if numbers else None


def read_movielens(database: duckdb.DuckDBPyConnection, data: Any, path: str) -> Log:
  """Reads MovieLens ratings, and titles where the file of titles is beside them.

  Args:
    database: without table `raw`.
    data: `config.data`, see `tables.read_tables`.
    path: a ratings file, a folder that holds one, or a zip that does.

  Returns:
    All rows in file order; titles by movie id.

  Raises:
    ValueError: no ratings there, a damaged zip, or a row that is not one (file and line).
  """
  if path.lower().endswith(".zip") and os.path.isfile(path):
    return _read_zip(database, data, path)
  kind = detect(path) if not os.path.isdir(path) else next(
      (kind for kind in FILES if os.path.isfile(os.path.join(path, kind))), None)
  if kind is None and os.path.isdir(path):
    raise ValueError(f"folder {path} holds no table and none of {', '.join(FILES)}; set --config.data.path to a file, "
                     f"to its folder or zip, or to a pattern, as {path}/*/*.parquet")
  if kind is None:
    raise ValueError(f"{path} is not MovieLens (no '::', no 4 tab-separated columns, no header {CSV_HEADER}); set "
                     "--config.data.format=sequences or pairs for plain text, table for other columns")
  path = os.path.join(path, kind) if os.path.isdir(path) else path
  separator, titles_name, titles_separator, encoding = FILES[kind]
  log = read_tables(database, data, path, None if kind == "ratings.csv" else (separator, COLUMNS))
  beside = os.path.join(os.path.dirname(path), titles_name)
  if not os.path.isfile(beside):
    return log
  if os.path.getsize(beside) > MOST_TITLES:
    raise ValueError(f"{beside} has {os.path.getsize(beside)} bytes, and titles are read up to {MOST_TITLES}; take it "
                     "away to do without titles")
  titles = text.decode(text.read_bytes(beside, None), beside, encoding)
  try:
    return dataclasses.replace(log, titles=_parse_titles(titles, titles_separator))
  except csv.Error as error:
    raise ValueError(f"{beside}: {error}; mend it, or take it away to do without titles") from error


def _read_zip(database: duckdb.DuckDBPyConnection, data: Any, path: str) -> Log:
  """As `read_movielens`, of a zip; messages name the member of the zip."""
  with _unpacked(path) as (ratings, rename):
    try:
      log = read_movielens(database, data, ratings)
    except ValueError as error:
      raise ValueError(rename(str(error))) from error

  def locate(row: int) -> str:
    """Unpacks once more: the place is asked for only when something is wrong."""
    with _unpacked(path) as (ratings, rename), duckdb.connect() as other:
      return rename(read_movielens(other, data, ratings).locate(row))

  return dataclasses.replace(log, source=path, locate=locate)


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[tuple[str, Callable[[str], str]]]:
  """Yields a ratings file from a zip, in a folder with its titles that goes again, and how to name it in messages."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        member = next((name for kind in FILES for name in names if os.path.basename(name) == kind), None)
        if member is None:
          raise ValueError(f"{path} holds none of {', '.join(FILES)}, but {names[:10]}; set --config.data.path to a "
                           "MovieLens zip")
        kind = os.path.basename(member)
        for name in {member, member.removesuffix(kind) + FILES[kind][1]} & set(names):
          unpacked = os.path.join(folder, os.path.basename(name))  # never where the archive says
          with archive.open(name) as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
      raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is truncated or damaged: {error}; download it again, "
                       "or set --config.data.path to another file") from error
    except OSError as error:
      raise ValueError(f"{path} cannot be unpacked into {folder}: {error.strerror or error}; TMPDIR names another "
                       "place") from error
    ratings = os.path.join(folder, kind)
    yield ratings, lambda message: message.replace(folder, os.path.dirname(f"{path}/{member}"))


def _parse_titles(content: str, separator: str) -> dict[str, str]:
  """Returns movie id -> title; lines that are no movie (the header of movies.csv) are skipped."""
  if separator == ",":
    rows = list(csv.reader(io.StringIO(content)))  # titles there may be quoted
  else:
    rows = [line.split(separator) for line in content.split("\n")]
  return {row[0]: row[1] for row in rows if len(row) > 1 and row[0].isdigit()}
