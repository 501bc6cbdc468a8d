"""Owns the choice of reader: `config.data` -> `Log` (users, items, times in raw ids, in the order of their source)."""

import os
from typing import Any

import duckdb
import ml_collections

from awrsr_jax.data.from_tfds import read_tfds
from awrsr_jax.data.log import Log, put
from awrsr_jax.data.movielens import DOWNLOADS, FILES, detect, download, read_movielens
from awrsr_jax.data.tables import kind_of, read_frame, read_tables
from awrsr_jax.data.text import has_pairs, read_pairs, read_sequences


def read(database: duckdb.DuckDBPyConnection, data: ml_collections.ConfigDict, table: Any = None) -> Log:
  """Reads what `config.data` names: a local path first, else TFDS, else a download.

  Args:
    database: without table `raw`.
    data: `config.data`; of it `path`, `format`, `name`, `columns`, `header`, `tfds` and `on_bad_row` are used.
    table: a pandas, polars or pyarrow table, instead of all that.

  Returns:
    The log, in the order of its source.

  Raises:
    ValueError: the source is missing, unreachable or malformed; or nothing says what to read.
  """
  if table is not None:
    if data.path:
      raise ValueError(f"a table and --config.data.path={data.path} are two sources; leave one out")
    return read_frame(database, table, data)
  if data.format == "synthetic":
    raise ValueError(f"config.data.format=synthetic generates its data and reads none; leave out --config.data.path="
                     f"{data.path}")
  if data.path:
    if not os.path.exists(data.path) and not any(mark in data.path for mark in "*?["):
      raise ValueError(f"no such file or folder: {data.path} (--config.data.path={data.path}, seen from {os.getcwd()})")
    match detect_format(data.path, data.header) if data.format == "auto" else data.format:
      case "tfds":
        return put(database, read_tfds(data))
      case "movielens":
        return read_movielens(database, data, data.path)
      case "table":
        return read_tables(database, data)
      case "pairs":
        return put(database, read_pairs(data.path, data.on_bad_row))
      case "sequences":
        return put(database, read_sequences(data.path, data.on_bad_row))
      case form:
        raise ValueError(f"{data.path} is not a folder that awrsr_jax.prepare made (it has no prepared.json), so it "
                         f"cannot be read as config.data.format={form}")
  if data.format == "tfds" or data.tfds.name:
    return put(database, read_tfds(data))
  if data.name in DOWNLOADS and data.format in ("auto", "movielens"):
    return download(database, data)
  raise ValueError(f"nothing to read for config.data.name={data.name!r}, format={data.format!r}: set "
                   f"--config.data.path=FILE (or --config.data.name to a download: {', '.join(DOWNLOADS)})")


def detect_format(path: str, header: str = "") -> str:
  """Returns the format of a file, folder or pattern, by its name and content.

  Args:
    path: an existing file or folder, or a pattern with *.
    header: `config.data.header`; only a table has one.

  Returns:
    "movielens", "tfds" (a folder with dataset_info.json), "table" (by its ending, or JSON or parquet inside), "pairs"
    (two columns in every line) or else "sequences".

  Raises:
    ValueError: it is a text file that cannot be read as utf-8.
  """
  if os.path.isdir(path):
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
      return "tfds"
    is_movielens = any(os.path.isfile(os.path.join(path, name)) for name in FILES)
    return "table" if not is_movielens and any(map(kind_of, os.listdir(path))) else "movielens"
  if header or not os.path.isfile(path):
    return "table"
  if path.lower().endswith(".zip"):
    return "movielens"
  if path.lower().endswith(".gz") or kind_of(path) in ("json", "parquet"):
    return "table"
  if detect(path):
    return "movielens"
  if kind_of(path):
    return "table"
  return "pairs" if has_pairs(path) else "sequences"
