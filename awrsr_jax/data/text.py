"""Owns the two plain text forms of interactions.

- sequences: `user item_1 item_2 ...`, one line per user, oldest first
- pairs: `user item`, one line per interaction, a user's oldest first; users may be interleaved

Ids are whole numbers from 1 (0 is padding everywhere in this package), separated by spaces or tabs.
"""

import itertools
import logging
import os
from collections.abc import Callable

import numpy as np

from awrsr_jax.data.lines import quote, read_raw_lines
from awrsr_jax.data.log import Interactions

LOG = logging.getLogger(__name__)
TABLE = ("a table of named columns (CSV) is read with --config.data.format=table, and one without names with "
         "--config.data.header=user,item,rating,time")  # the way out for those who come with another kind of file


def read_bytes(path: str, limit: int | None) -> bytes:
  """Returns a file's content.

  Args:
    path: the file.
    limit: at most so many bytes; None: all.

  Returns:
    Its bytes.

  Raises:
    ValueError: there is no such file or it cannot be read; or all of it is wanted, and a line is endless.
  """
  try:
    with open(path, "rb") as file:
      return b"".join(read_raw_lines(file, path)) if limit is None else file.read(limit)
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}; set --config.data.path=FILE to one that can be") from error


def decode(content: bytes, where: str, encoding: str) -> str:
  """Returns a file's text.

  Args:
    content: the file's bytes.
    where: its name, for messages.
    encoding: "utf-8" (a byte order mark is dropped) or "latin-1".

  Returns:
    The text; lines end in \\n alone.

  Raises:
    ValueError: the bytes are not text in that encoding, with the line.
  """
  try:
    text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{where}:{line}: byte {content[error.start]:#04x} is not {encoding} text; is this the right "
                     "file? Set --config.data.path=FILE to a text file") from error
  return text.replace("\r\n", "\n").replace("\r", "\n")


def read_sequences(path: str, on_bad_row: str = "error") -> Interactions:
  """Reads lines of `user item_1 item_2 ...`, oldest first.

  Args:
    path: a utf-8 text file; blank lines are skipped.
    on_bad_row: "error", or "skip": lines with a token that is no number from 1, or without items, are left out.

  Returns:
    One row per (user, item), in file order; no times and no titles.

  Raises:
    ValueError: no such file, no lines, a token that is no number from 1, a user without items or on two lines.
  """
  tokens, lines = _split(path)
  if on_bad_row == "skip":
    tokens, lines = _skip_bad(tokens, lines, path, lambda row: len(row) > 1)
  counts = np.array([len(row) for row in tokens], dtype=np.int64)
  values = _parse(tokens, counts, lines, path)
  starts = np.cumsum(counts) - counts
  users = values[starts]
  if (counts < 2).any():
    at = int(np.argmax(counts < 2))
    raise ValueError(f"{path}:{lines[at]}: user {users[at]} has no items; remove the line "
                     "(a line is 'user item_1 item_2 ...')")
  distinct, first = np.unique(users, return_index=True)
  if distinct.size < users.size:
    at = int(np.setdiff1d(np.arange(users.size), first)[0])
    other = int(np.argmax(users == users[at]))
    raise ValueError(f"{path}:{lines[at]}: user {users[at]} is already on line {lines[other]}; give each user one "
                     f"line, or set --config.data.format=pairs if every line is one 'user item'; {TABLE}")
  is_item = np.ones(values.size, dtype=bool)
  is_item[starts] = False
  return Interactions(np.repeat(users, counts - 1), values[is_item], None, {}, path)


def read_pairs(path: str, on_bad_row: str = "error") -> Interactions:
  """Reads lines of `user item`, where a user's lines are oldest first.

  Args:
    path: a utf-8 text file; blank lines are skipped.
    on_bad_row: "error", or "skip": lines that are not two numbers from 1 are left out.

  Returns:
    One row per line, in file order; no times and no titles.

  Raises:
    ValueError: no such file, no lines, a line that is not two numbers from 1.
  """
  tokens, lines = _split(path)
  if on_bad_row == "skip":
    tokens, lines = _skip_bad(tokens, lines, path, lambda row: len(row) == 2)
  counts = np.array([len(row) for row in tokens], dtype=np.int64)
  if (counts != 2).any():
    at = int(np.argmax(counts != 2))
    raise ValueError(f"{path}:{lines[at]}: {counts[at]} columns where 'user item' has 2; for lines of "
                     f"'user item_1 item_2 ...' set --config.data.format=sequences; {TABLE}")
  values = _parse(tokens, counts, lines, path).reshape(-1, 2)
  return Interactions(values[:, 0].copy(), values[:, 1].copy(), None, {}, path)


def has_pairs(path: str) -> bool:
  """Returns whether every line that is not blank has exactly two columns: `user item` rows."""
  return all(len(line.split()) in (0, 2) for line in decode(read_bytes(path, None), path, "utf-8").split("\n"))


def check_ids(ids: np.ndarray, what: str, locate: list[int] | np.ndarray, where: str) -> None:
  """Refuses ids below 1.

  Args:
    ids: (N,) int64.
    what: "user" or "item", for the message.
    locate: (N,) line number of each.
    where: file name, for the message.

  Raises:
    ValueError: the first id that is 0 or negative, with file and line.
  """
  if (ids < 1).any():
    at = int(np.argmax(ids < 1))
    raise ValueError(f"{where}:{locate[at]}: {what} id {ids[at]} is below 1; number users and items from 1 "
                     "(0 is padding)")


def _split(path: str) -> tuple[list[list[str]], list[int]]:
  """Returns the tokens of each line that is not blank, and that line's number from 1."""
  rows = [line.split() for line in decode(read_bytes(path, None), path, "utf-8").split("\n")]
  lines = [number for number, row in enumerate(rows, start=1) if row]
  if not lines:
    raise ValueError(f"{path} has no lines ({os.path.getsize(path)} bytes); set --config.data.path=FILE to a file "
                     "with interactions")
  return [row for row in rows if row], lines


def _skip_bad(tokens: list[list[str]], lines: list[int], path: str,
              fits: Callable[[list[str]], bool]) -> tuple[list[list[str]], list[int]]:
  """Leaves out the lines that do not fit or hold anything but numbers from 1, and says how many."""
  good = [fits(row) and all(_is_int64(token) and int(token) > 0 for token in row) for row in tokens]
  if not any(good):
    raise ValueError(f"{path}: none of {len(lines)} lines is good; set --config.data.path=FILE to a file with "
                     "interactions")
  if not all(good):
    LOG.warning("%s: %d of %d lines are bad and were left out (config.data.on_bad_row=skip)", path,
                len(good) - sum(good), len(good))
  return list(itertools.compress(tokens, good)), list(itertools.compress(lines, good))


def _parse(tokens: list[list[str]], counts: np.ndarray, lines: list[int], path: str) -> np.ndarray:
  """Returns all tokens as (T,) int64 ids from 1; the first of each line is a user."""
  flat = [token for row in tokens for token in row]
  together = "".join(flat)
  try:
    if "_" in together or not together.isascii():
      raise ValueError("Python takes 1_000, and the digits of any script, for numbers")
    values = np.array(flat, dtype=np.int64)  # one call for all; which token is bad is asked only when one is
  except (ValueError, OverflowError) as error:
    line, token = next((line, token) for row, line in zip(tokens, lines, strict=True) for token in row
                       if not _is_int64(token))
    is_number = token.lstrip("+-").isdigit()
    raise ValueError(f"{path}:{line}: {quote(token)} is {'too large for 64 bits' if is_number else 'not a number'}; "
                     f"ids are whole numbers, separated by spaces or tabs; {TABLE}") from error
  line_of_token = np.repeat(np.array(lines), counts)
  is_user = np.zeros(values.size, dtype=bool)
  is_user[np.cumsum(counts) - counts] = True
  check_ids(values[is_user], "user", line_of_token[is_user], path)
  check_ids(values[~is_user], "item", line_of_token[~is_user], path)
  return values


def _is_int64(token: str) -> bool:
  """Returns whether a token is a whole number of 64 bits."""
  try:
    return -2**63 <= int(token) < 2**63 and token.isascii() and "_" not in token
  except ValueError:
    return False
