"""Owns the choice of reader: `config.data` -> `Interactions` (users, items, times, raw ids kept)."""

import os

import ml_collections

from awrsr_jax.data.from_tfds import read_tfds
from awrsr_jax.data.movielens import DOWNLOADS, detect, download, read_movielens
from awrsr_jax.data.text import Interactions, has_pairs, read_pairs, read_sequences

READERS = {"sequences": read_sequences, "pairs": read_pairs, "movielens": read_movielens}


def read(data: ml_collections.ConfigDict) -> Interactions:
  """Reads what `config.data` names: a local path first, else TFDS, else a download.

  Args:
    data: `config.data`; of it `path`, `format`, `name` and `tfds` are used.

  Returns:
    The interactions, in the order of their source.

  Raises:
    ValueError: the source is missing, unreachable or malformed; or nothing says what to read.
  """
  if data.format == "synthetic":
    raise ValueError(f"config.data.format=synthetic generates its data and reads none; leave out --config.data.path="
                     f"{data.path}")
  if data.path:
    if not os.path.exists(data.path):
      raise ValueError(f"no such file or folder: {data.path} (--config.data.path={data.path}, seen from {os.getcwd()})")
    form = detect_format(data.path) if data.format == "auto" else data.format
    return read_tfds(data) if form == "tfds" else READERS[form](data.path)
  if data.format == "tfds" or data.tfds.name:
    return read_tfds(data)
  if data.name in DOWNLOADS and data.format in ("auto", "movielens"):
    return download(data.name)
  raise ValueError(f"nothing to read for config.data.name={data.name!r}, format={data.format!r}: set "
                   f"--config.data.path=FILE (or --config.data.name to a download: {', '.join(DOWNLOADS)})")


def detect_format(path: str) -> str:
  """Returns the format of a file or folder, by its name and content.

  Args:
    path: an existing file or folder.

  Returns:
    "movielens", "tfds" (a folder with dataset_info.json), "pairs" (two columns in every line) or else "sequences".

  Raises:
    ValueError: it is a text file that cannot be read as utf-8.
  """
  if os.path.isdir(path):
    return "tfds" if os.path.isfile(os.path.join(path, "dataset_info.json")) else "movielens"
  if path.lower().endswith(".zip") or detect(path):
    return "movielens"
  return "pairs" if has_pairs(path) else "sequences"
