"""Owns the lines of text files, plain or packed: where rows start, and what is wrong with a file as a whole.

Tables are split into rows by DuckDB; this is for their first lines, for the places in messages, and for what DuckDB
would pass over in silence.
"""

import csv
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 1 << 24  # bytes
BLANKS = " \t\r\n"  # of JSON
QUOTED = ' *"(?:[^"]|"")*+"'  # a value of CSV
csv.field_size_limit(LONGEST_LINE)  # Python's own is 128 KiB


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


def read_raw_lines(opened: Any, file: str) -> Iterator[bytes]:
  """Yields the lines of a file that is open for its bytes, with their ends.

  Raises:
    ValueError: one has more than LONGEST_LINE bytes.
  """
  for number in itertools.count(1):
    line = opened.readline(LONGEST_LINE + 1)
    if not line:
      return
    if len(line) > LONGEST_LINE:
      raise ValueError(f"{file}:{number}: {quote(line[:100].decode(errors='replace'))}: a line of more than "
                       f"{LONGEST_LINE} bytes; is this the right file?")
    yield line


def read_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields number and text of the lines of a file; a byte order mark is dropped, bytes that are no text are shown."""
  with open_file(file) as opened:
    for number, line in enumerate(read_raw_lines(opened, file), start=1):
      text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="backslashreplace")
      yield number, text.rstrip("\r\n")


def find_records(file: str, delimiter: str, has_quotes: bool) -> Iterator[tuple[int, str]]:
  """Yields number and text of the lines that rows start on; a quoted value of CSV may span lines."""
  if not has_quotes:
    yield from ((number, line) for number, line in read_lines(file) if (line if delimiter else line.strip(BLANKS)))
    return
  read: list[tuple[int, str]] = []

  def feed() -> Iterator[str]:
    for number, line in read_lines(file):
      read.append((number, line))
      yield line + "\n"

  for record in csv.reader(feed(), delimiter=delimiter, skipinitialspace=True):
    first, read[:] = read[0], []
    if record:
      yield first


def count_lines(file: str, place: int) -> int:
  """Returns the number of the line that a byte of a file (unpacked) lies in."""
  lines = 1
  with open_file(file) as opened:
    while place > 0 and (piece := opened.read(min(place, 1 << 20))):
      lines, place = lines + piece.count(b"\n"), place - len(piece)
  return lines


def count_records(file: str, delimiter: str) -> int:
  """Returns how many rows a CSV file with quotes has, its header among them.

  Raises:
    ValueError: a quote is never closed: DuckDB would drop what follows, with one thread silently; or two values in
      quotes have only spaces between them: DuckDB would make one value of them.
  """
  between = re.escape(delimiter)
  joined = re.compile(rf'(?:(?>{QUOTED} *|(?! *")[^{between}]*){between})*{QUOTED} +"')
  end, read = ["\0end\0"], []

  def feed() -> Iterator[str]:
    for _, line in read_lines(file):
      read.append(line + "\n")
      yield read[-1]
    yield from end

  count, first, record = -1, 1, None
  try:
    for record in csv.reader(feed(), delimiter=delimiter, skipinitialspace=True):
      text = "".join(read)
      if '" ' in text and joined.match(text):
        raise ValueError(f"{file}:{first}: {quote(text)}: two values in quotes without a {delimiter!r} between them; "
                         "mend the file")
      first += len(read)
      read.clear()
      count += bool(record)
    if record == end:
      return count
    *_, (number, text) = find_records(file, delimiter, has_quotes=True)
  except csv.Error as error:
    raise ValueError(f"{file}: {error}; a line ends in \\n or \\r\\n, and a quote is closed again") from error
  raise ValueError(f"{file}:{number}: {quote(text)}: a quote that is never closed; mend the file")


def holds(file: str, byte: bytes) -> bool:
  """Whether a byte occurs in a file."""
  with open_file(file) as opened:
    return any(byte in piece for piece in iter(lambda: opened.read(1 << 20), b""))


def mixes_line_ends(file: str) -> bool:
  """Whether some lines end in \\n and some in \\r\\n."""
  with open_file(file) as opened:
    lines = iter(lambda: opened.readline(LONGEST_LINE), b"")
    return len({line.endswith(b"\r\n") for line in lines if line.endswith(b"\n")}) > 1


def open_file(file: str) -> Any:
  """Returns a file opened for its bytes, unpacked."""
  return gzip.open(file, "rb") if file.lower().endswith(".gz") else open(file, "rb")


def quote(text: str) -> str:
  """Returns the first 100 characters of a text, quoted."""
  return repr(text.strip()[:100])
