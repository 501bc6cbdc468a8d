"""What others may have made: JSON of files, names of files in it, and texts on their way to a page or a terminal.

Whatever the bytes, nothing here raises anything but ValueError; docs/security.md says what is trusted and what is not.
"""

import json
import os
import unicodedata
from reprlib import repr as show  # short, whatever the value
from typing import Any

DEEPEST = 50  # lists and objects within each other; what this package writes has 6
LONGEST = 10_000  # characters of a message
INT64 = range(-2**63, 2**63)


class Said(dict):
  """An object of JSON; a key that it does not have is a ValueError."""

  def __init__(self, values: dict[str, Any], where: str):
    super().__init__(values)
    self._where = where

  def __missing__(self, key: str) -> Any:
    raise ValueError(f"{self._where} has no {key!r}")


def parse_json(text: str | bytes, where: str) -> Any:
  """Returns the value of a JSON text, its objects as `Said`.

  Args:
    text: of a file.
    where: it stood, for messages about keys.

  Raises:
    ValueError: it is none, or deeper than DEEPEST.
  """
  too_deep = f"lists and objects lie more than {DEEPEST} deep within each other"
  try:
    found = json.loads(text, object_hook=lambda values: Said(values, where))
  except RecursionError as error:
    raise ValueError(too_deep) from error
  if _is_deep(found, DEEPEST):
    raise ValueError(too_deep)
  return found


def _is_deep(value: Any, most: int) -> bool:
  inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
  return most < 0 or any(_is_deep(one, most - 1) for one in inside)


def check_kinds(found: Any, kinds: dict[Any, Any], where: str) -> None:
  """Refuses a value of JSON that is no object, or has a value of another kind.

  Args:
    found: from parse_json.
    kinds: key -> str, bool, int, float (also whole), list, dict, or kinds of an object; `...`: of all other keys. A key
      without a kind may be anything, and one that is not there is found missing when it is asked for.
    where: it stood, for the message.

  Raises:
    ValueError: it is another, or a whole number does not fit into 64 bits.
  """
  if not isinstance(found, dict):
    raise ValueError(f"{where} is {show(found)}, not a JSON object")
  for key, value in found.items():
    kind = kinds.get(key, kinds.get(...))
    if isinstance(kind, dict):
      check_kinds(value, kind, f"{where}: {show(key)}")
    elif kind and not _fits(value, kind):
      raise ValueError(f"{where}: {show(key)} is {show(value)}, and should be {kind.__name__}")


def _fits(value: Any, kind: type) -> bool:
  """Whether a value is of a kind; a bool is no number, and what is whole fits into 64 bits."""
  if type(value) is int and kind in (int, float):
    return value in INT64
  return type(value) is kind or (kind is dict and isinstance(value, dict))


def check_names(names: Any, where: str) -> None:
  """Raises ValueError unless all names are those of files in a folder: no path leads out of it."""
  for name in names:
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name:
      raise ValueError(f"{where} names {show(name)}, which is no file in its folder")


def plain(text: Any) -> str:
  """Returns a text on one line, without characters that print nothing (an SVG file may not hold some of them)."""
  text = "".join(" " if char.isspace() else char for char in str(text))
  return " ".join("".join(char for char in text if unicodedata.category(char)[0] != "C").split())


def shorten(text: Any, most: int) -> str:
  """Returns a plain text of at most so many characters; an ellipsis says that more was there."""
  text = plain(text)
  return text if len(text) <= most else text[:most - 1].rstrip() + "…"


def printable(text: str) -> str:
  """Returns a text for a terminal: what prints nothing, and could move the cursor, is shown as its escape."""
  return "".join(char if char in "\n\t" or unicodedata.category(char)[0] != "C" else
                 char.encode("unicode_escape").decode() for char in text)
