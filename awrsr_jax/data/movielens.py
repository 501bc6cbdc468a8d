"""Owns MovieLens as GroupLens publishes it: ratings.dat, u.data or ratings.csv, alone, in a folder or in the zip.

Ratings are not used: a rating is an interaction. Rows keep file order, which decides between equal timestamps.
"""

import csv
import io
import os
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from awrsr_jax.data import text
from awrsr_jax.data.from_tfds import fetch
from awrsr_jax.data.text import Interactions

# ratings file: its separator, the file of titles beside it, that file's separator and encoding
FILES = {
    "ratings.dat": ("::", "movies.dat", "::", "latin-1"),
    "u.data": ("\t", "u.item", "|", "latin-1"),
    "ratings.csv": (",", "movies.csv", ",", "utf-8"),
}

# name: url, bytes, sha256
DOWNLOADS = {
    "ml-1m": ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", 5917549,
              "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    "ml-100k": ("https://files.grouplens.org/datasets/movielens/ml-100k.zip", 4924029,
                "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
}

CSV_HEADER = "userid,movieid,rating,timestamp"


def download(name: str) -> Interactions:
  """Reads a MovieLens data set from GroupLens, downloaded once.

  Args:
    name: a key of `DOWNLOADS`.

  Returns:
    See `read_movielens`.

  Raises:
    ValueError: it cannot be downloaded; the message names --config.data.path.
  """
  return read_movielens(fetch(*DOWNLOADS[name]))


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
  return "u.data" if all(line.count("\t") == 3 for line in whole) else None


def read_movielens(path: str) -> Interactions:
  """Reads MovieLens ratings, and titles where the file of titles is beside them.

  Args:
    path: a ratings file, a folder that holds one, or a zip that does.

  Returns:
    All rows in file order; ids and times int64; titles by movie id.

  Raises:
    ValueError: no ratings there, a damaged zip, or a row that is not one (file and line).
  """
  kind, where, content, beside = _open(path)
  separator, titles_name, titles_separator, encoding = FILES[kind]
  rows_Nx3 = _parse(text.decode(content, where, "utf-8"), separator, kind == "ratings.csv", where)
  titles = beside(titles_name)
  parsed = {} if titles is None else _parse_titles(text.decode(titles, titles_name, encoding), titles_separator)
  return Interactions(rows_Nx3[:, 0].copy(), rows_Nx3[:, 1].copy(), rows_Nx3[:, 2].copy(), parsed, path)


def _open(path: str) -> tuple[str, str, bytes, Callable[[str], bytes | None]]:
  """Returns the kind of ratings, their name for messages, their bytes, and how to read a file beside them."""
  if os.path.isdir(path):
    kind = next((kind for kind in FILES if os.path.isfile(os.path.join(path, kind))), None)
    if kind is None:
      raise ValueError(f"folder {path} holds none of {', '.join(FILES)}; set --config.data.path to a ratings file, its "
                       "folder or the zip")
    path = os.path.join(path, kind)
  elif path.lower().endswith(".zip"):
    return _open_zip(path)
  content = text.read_bytes(path, None)
  kind = detect(path)
  if kind is None:
    raise ValueError(f"{path} is not MovieLens (no '::', no 4 tab-separated columns, no header {CSV_HEADER}); set "
                     "--config.data.format=sequences or pairs for plain text")

  def beside(name: str) -> bytes | None:
    other = os.path.join(os.path.dirname(path), name)
    return text.read_bytes(other, None) if os.path.isfile(other) else None

  return kind, path, content, beside


def _open_zip(path: str) -> tuple[str, str, bytes, Callable[[str], bytes | None]]:
  """As `_open`, in a zip; all is read here, so that damage shows here."""
  content = text.read_bytes(path, None)
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      names = archive.namelist()
      member = next((name for kind in FILES for name in names if os.path.basename(name) == kind), None)
      if member is None:
        raise ValueError(f"{path} holds none of {', '.join(FILES)}, but {names[:10]}; set --config.data.path to a "
                         "MovieLens zip")
      kind = os.path.basename(member)
      titles_member = member.removesuffix(kind) + FILES[kind][1]
      ratings = archive.read(member)
      titles = archive.read(titles_member) if titles_member in names else None
  except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
    raise ValueError(f"{path} ({len(content)} bytes) is truncated or damaged: {error}; download it again, or set "
                     "--config.data.path to another file") from error
  return kind, f"{path}/{member}", ratings, lambda name: titles


def _parse(content: str, separator: str, has_header: bool, where: str) -> np.ndarray:
  """Returns (N, 3) int64: user, item, time."""
  lines = content.split("\n")
  first = 1 if has_header else 0
  body = [line for line in lines[first:] if line.strip()]
  if not body:
    raise ValueError(f"{where} has no ratings; set --config.data.path=FILE")
  columns = "\n".join(body).replace(separator, "\t")  # loadtxt takes one character
  try:
    if columns.count("\t") != 3 * len(body):
      raise ValueError
    rows_Nx3 = np.loadtxt(io.StringIO(columns), np.int64, delimiter="\t", usecols=(0, 1, 3), comments=None, ndmin=2)
  except ValueError as error:
    at = next(at for at, line in enumerate(lines[first:], start=first + 1) if line.strip()
              and not _is_row(line.split(separator)))
    raise ValueError(f"{where}:{at}: {lines[at - 1][:100]!r} is not a row of user{separator}movie{separator}rating"
                     f"{separator}timestamp; is the file cut off or damaged?") from error
  if (rows_Nx3[:, :2] < 1).any():
    numbers = [number for number, line in enumerate(lines[first:], start=first + 1) if line.strip()]
    text.check_ids(rows_Nx3[:, 0], "user", numbers, where)
    text.check_ids(rows_Nx3[:, 1], "item", numbers, where)
  return rows_Nx3


def _is_row(columns: list[str]) -> bool:
  """Returns whether a row has user, movie, rating and timestamp."""
  try:
    return len(columns) == 4 and all(-2**63 <= int(columns[at]) < 2**63 and "_" not in columns[at] for at in (0, 1, 3))
  except ValueError:
    return False


def _parse_titles(content: str, separator: str) -> dict[int | str, str]:
  """Returns movie id -> title; lines that are no movie (the header of movies.csv) are skipped."""
  if separator == ",":
    rows = list(csv.reader(io.StringIO(content)))  # titles there may be quoted
  else:
    rows = [line.split(separator) for line in content.split("\n")]
  return {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdigit()}
