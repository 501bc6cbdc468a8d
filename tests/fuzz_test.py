"""Readers against odd and damaged sources: they give the rows that plain Python finds, or refuse with one ValueError.

Whatever the bytes, reading raises nothing but ValueError, and that names its source. Where it succeeds, the rows are
those of the oracles below, which share no code with the package. A few files of each kind are tried here, always the
same; AWRSR_FUZZ=20000 in the environment tries so many, each time others.
"""

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import os
import re
import unicodedata
import zipfile
import zlib
from unittest import mock

import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
from conftest import raw_rows
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from awrsr_jax.config import default
from awrsr_jax.data import log, readers, tables, text

MANY = int(os.environ.get("AWRSR_FUZZ", "0"))
SPACES, BLANKS = " \t\n\r", " \t\n\r\v\f"  # around ids; around times and lines of JSON
# what may be wrong with a source as a whole, and not with a row of it
WHOLE = re.compile("differ only in spaces|mixed time units|lies in the future|has no interactions")
ANYHOW = "."  # a file of which nobody knows where its lines end
ODD_IDS = [
    "007", "7", "-0", "0", "1e5", " nan ", "NaN", "NULL", "null", "None", "true", "", " ", "\t", "\\N", "''", '"', '""',
    'a"b', "a,b", "a;b", "a\nb", "a\r\nb", "a\rb", "a\tb", "é", "e\u0301", "\u00a0", "\ufeff", "\u2028", "\x1c",
    "a\0b", "\0", "#x", "::", "a::b", "-1", "18446744073709551616", "9223372036854775808", "a'b", "{}", "%s",
    "$x", "\U0001f600"]
TIMES = ["0", "1", "2", "5", "17", "99", "1234567", "-3", "0.5", "1e3", "7.0", " 8 ", "+4"]
BAD_TIMES = ["", " ", "soon", "nan", "inf", "-Infinity", "1e400", "NULL", "None", "true", "1 2", "1,5", "٣", "12:30"]
PIECES = [
    b'"', b'""', b",", b"\t", b";", b"|", b"\n", b"\r\n", b"\r", b"\n\n", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf",
    b" ", b"'", b"\\", b"::", b":", b"{", b"}", b"[", b"]", b"{}", b"null", b"NaN", b"-", b".", b"e5", b"_", b"\\ud800",
    b"0", b"9" * 20, "é".encode(), "\u2028".encode(), b"\x1c", b"\x0b", b"#", b"//", b"true", b"PAR1", b"[" * 3000]

ids = st.one_of(st.sampled_from(["u", "v", "w", "x1", "12"]), st.sampled_from(ODD_IDS),
                st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
good_times = st.one_of(st.sampled_from(TIMES), st.integers(-10**6, 9 * 10**7).map(str))
times = st.one_of(good_times, good_times, good_times, st.sampled_from(BAD_TIMES))


def tries(count):
  """Returns the settings of a property that is checked so many times in a run of all tests."""
  return settings(max_examples=MANY or count, derandomize=not MANY, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder that all files of this module are written to, one after another."""
  return tmp_path_factory.mktemp("fuzz")


@st.composite
def damaged(draw, content, most=3):
  """Draws bytes with up to `most` of them flipped, left out, doubled or put in."""
  found = draw(content)
  for _ in range(draw(st.integers(0, most))):
    at = draw(st.integers(0, len(found)))
    length = draw(st.integers(1, 12))
    match draw(st.sampled_from(["insert", "insert", "flip", "cut", "delete", "double"])):
      case "insert":
        found = found[:at] + draw(st.sampled_from(PIECES)) + found[at:]
      case "flip" if at < len(found):
        found = found[:at] + bytes([found[at] ^ 1 << draw(st.integers(0, 7))]) + found[at + 1:]
      case "cut":
        found = found[:at]
      case "delete":
        found = found[:at] + found[at + length:]
      case "double":
        found = found[:at] + found[at:at + length] + found[at:]
  return found


def read(path, table=None, on_bad_row="error", **values):
  """Reads a source.

  Returns:
    Its rows and how many were left out before they were rows and after, or None and why it was refused.
  """
  data = default().data
  data.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  data.path, data.on_bad_row = str(path), on_bad_row
  try:
    with (log.open_database() as database, mock.patch.object(tables.LOG, "warning") as warned,
          mock.patch.object(text.LOG, "warning"), mock.patch.object(log.LOG, "warning")):
      counts = log.clean(readers.read(database, data, table), data.min_rating, data.on_bad_row)
      rejected = sum(call.args[1] for call in warned.call_args_list)
      rows = raw_rows(database)
  except ValueError as error:
    message = str(error)
    assert len(message) > 20 and (str(path) if table is None else "table") in message, message
    return None, message
  assert counts["rows"] == len(rows) + counts["bad_rows"] and not counts["low_ratings"]
  return rows, rejected + counts["bad_rows"]


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content)
  return path


def number(value):
  """Returns a number as a text has it, or None: digits with a sign, a point and an exponent, and spaces around."""
  value = value.strip(BLANKS)
  if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.ASCII | re.IGNORECASE):
    return None
  if re.fullmatch(r"[+-]?\d+", value, re.ASCII):
    return int(value)
  return float(value) if abs(float(value)) != float("inf") else None


def settle(rows):
  """Returns what is to be read of (user, item, time) as texts or None, None standing for a row that is none.

  Returns:
    The good rows; how many others there are; and whether two ids look the same, which is refused.
  """
  kept = [(row[0], row[1], number(row[2])) for row in rows if row and None not in row]
  good = [row for row in kept if row[0].strip(SPACES) and row[1].strip(SPACES) and row[2] is not None]
  found = [{row[place] for row in good} for place in (0, 1)]
  alike = any(len({unicodedata.normalize("NFC", name.strip(SPACES)) for name in names}) < len(names) for names in found)
  return good, len(rows) - len(good), alike


def agree(path, rows, table=None, may_refuse=None, **values):
  """Checks both ways to treat bad rows against the oracle's rows.

  Args:
    path: the source, "" for a table.
    rows: see `settle`.
    table: the source, where it is no file.
    may_refuse: why the source as a whole may be refused, a pattern; None: for nothing beyond `WHOLE`.
  """
  good, bad, alike = settle(rows)
  for on_bad_row in ("error", "skip"):
    found, told = read(path, table, on_bad_row, **values)
    if found is None:
      event("refused")
      assert (bad and on_bad_row == "error") or alike or not good or WHOLE.search(told) or (
          may_refuse and re.search(may_refuse, told)), told
    else:
      event("read")
      assert (found, told) == (good, bad), on_bad_row
      assert not alike and not (bad and on_bad_row == "error")


def csv_records(content, delimiter, quote='"'):
  """Returns the records of a text: a list of values, or None where something stands after a value in quotes.

  Spaces beside a value in quotes are no part of it. Lines end in \\n, \\r\\n or \\r, and empty ones are left out.

  Returns:
    The records, which line ends there are, and whether a quote stays open over more than the last line.
  """
  quoted = re.compile(r' *"((?:[^"]|"")*)(" *)?' if quote else "(?!)")
  plain, line_end = re.compile(rf"(?:(?!{re.escape(delimiter)})[^\r\n])*"), re.compile(r"\r\n|\n|\r")
  records, ends, at, end = [], set(), 0, True
  while end:
    start, record, is_whole, is_quoted = at, [], True, False
    while True:
      match = quoted.match(content, at)
      if match:
        is_quoted = True
        if match[2] is None:
          ends.add("amid a record that is none")
          return [*records, None], ends, bool(line_end.search(content[start:].strip("\r\n")))
        record.append(match[1].replace('""', '"'))
        rest = plain.match(content, match.end())
        is_whole, at = is_whole and not rest[0], rest.end()
      else:
        match = plain.match(content, at)
        record.append(match[0])
        at = match.end()
      if not content.startswith(delimiter, at):
        break
      at += len(delimiter)
    if record != [""] or is_quoted:
      records.append(record if is_whole else None)
    if not is_whole and (line_end.search(content, start, at) or "\r" in content):
      ends.add("amid a record that is none")
    end = line_end.match(content, at)
    if end:
      ends.add(end[0])
      at = end.end()
  return records, ends, False


def csv_rows(content, delimiter, names=None, quote='"'):
  """Returns the oracle's (user, item, time) of a file; None: its first line does not name them, or a quote stays open.

  A row has as many values as there are names, or one more that is empty.
  """
  content = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
  records, ends, is_open = csv_records(content, delimiter, quote)
  if is_open:
    return None, ends
  if names is None:
    names, *records = records or [None]
  if names is None or not {"user", "item", "time"} <= set(names) or len(set(names)) < len(names) or "" in names:
    return None, ends
  places = [names.index(name) for name in ("user", "item", "time")]
  rows = []
  for record in records:
    fits = record is not None and (len(record) == len(names) or (len(record) == len(names) + 1 and not record[-1]))
    is_text = fits and not re.search("[\udc80-\udcff]", "".join(record))
    rows.append(tuple(record[place] for place in places) if is_text else None)
  return rows, ends


def or_ends_of(content):
  """Returns a pattern that joins another: lines that end in two ways, one of them within quotes, may be refused."""
  return "|some lines of" if b"\r\n" in content and re.search(rb"(?<!\r)\n", content) else ""


@st.composite
def csv_files(draw, delimiter, times=times):
  """Draws rows of (user, item, time) and a CSV file of them."""
  rows = draw(st.lists(st.tuples(ids, ids, times), min_size=1, max_size=8))
  end = draw(st.sampled_from(["\n", "\r\n"]))
  order = draw(st.permutations(["user", "item", "time"]))
  buffer = io.StringIO()
  has_returns = any("\r" in value for row in rows for value in row)  # Python's writer does not put these in quotes
  writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL if has_returns else draw(
      st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
  writer.writerow(order)
  for row in rows:
    writer.writerow([dict(zip(("user", "item", "time"), row, strict=True))[name] for name in order])
    buffer.write(draw(st.sampled_from(["", "", "", end])))
  content = buffer.getvalue()
  if draw(st.booleans()):
    content = content.removesuffix(end)
  return rows, draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content.encode()


@tries(20)
@given(st.data(), st.sampled_from(",\t;|"), st.booleans())
def test_rows_written_as_csv_come_back(folder, data, delimiter, packed):
  rows, content = data.draw(csv_files(delimiter))
  name = "whole.csv.gz" if packed else "whole.csv"
  agree(write(folder, name, gzip.compress(content) if packed else content), rows)


@tries(30)
@given(st.data(), st.sampled_from(",\t;|"), st.sampled_from([1, 1000]))
def test_damaged_csv_gives_the_rows_that_it_holds_or_is_refused(folder, data, delimiter, sample):
  content = data.draw(damaged(csv_files(delimiter, good_times).map(lambda drawn: drawn[1])))
  path = write(folder, "damaged.csv", content)
  rows, ends = csv_rows(content, delimiter)
  with mock.patch.object(tables, "SAMPLE", sample):  # what is behind the sample only the database sees
    if rows is None:
      assert read(path)[0] is None and read(path, None, "skip")[0] is None
    else:
      may_refuse = ANYHOW if len(ends) > 1 or "\r" in ends else f"blank line{or_ends_of(content)}"
      if re.search(rb' "|" ', content):
        may_refuse += "|which of the columns|two values"  # of a header, spaces beside quotes are a part
      agree(path, rows, may_refuse=may_refuse)


@tries(12)
@given(st.data())
def test_a_csv_without_a_header(folder, data):
  _, content = data.draw(csv_files(","))
  content = data.draw(damaged(st.just(content), 1))
  names = data.draw(st.permutations(["user", "item", "time"]))
  rows, ends = csv_rows(content, ",", names)
  path = write(folder, "headless.csv", content)
  if rows is None:
    assert read(path, header=",".join(names))[0] is None
  else:
    may_refuse = ANYHOW if len(ends) > 1 or "\r" in ends else f"two values{or_ends_of(content)}"
    agree(path, rows, may_refuse=may_refuse, header=",".join(names))


def json_id(value):
  """Returns an id of JSON as text, None where there is none; lists and objects are none."""
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, (list, dict)):
    return None
  return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def first_of_each(pairs):
  """Returns the object of JSON pairs; of a key that repeats, the first counts."""
  return dict(reversed(pairs))


def no_number(name):
  raise ValueError(f"{name} is no JSON")


def json_rows(content):
  """Returns the oracle's (user, item, time) of JSON lines; None: no line holds an object."""
  rows, some = [], False
  for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
    line = line.strip(BLANKS.encode())
    if not line:
      continue
    try:
      found = json.loads(line.decode(), object_pairs_hook=first_of_each, parse_constant=no_number)
      json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
      found = None
    some = some or isinstance(found, dict)
    rows.append(tuple(json_id(found.get(key)) for key in ("user", "item", "time")) if isinstance(found, dict) else None)
  return rows if some else None


json_values = st.one_of(ids, ids, st.integers(-5, 5), st.sampled_from([
    None, True, False, 5.0, 0.5, -1.5, 10**15, 2**53 + 1, 2**64, 10**30, [], {}, [1, "a"], {"a": {"b": None}}]))
json_times = st.one_of(good_times, st.integers(0, 9 * 10**7), st.sampled_from(
    [1.5, 7.0, -3, 1e3, None, True, "", "soon", [1], {"a": 1}, "nan"]))


@st.composite
def json_files(draw):
  """Draws JSON lines with keys user, item and time, and sometimes others."""
  objects = draw(st.lists(st.fixed_dictionaries({"user": json_values, "item": json_values, "time": json_times},
                                                optional={"note": json_values}), min_size=1, max_size=8))
  for at in draw(st.sets(st.integers(0, len(objects) - 1), max_size=1)):
    objects[at].pop(draw(st.sampled_from(["user", "item", "time"])), None)
  end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
  is_ascii, separators = draw(st.booleans()), draw(st.sampled_from([(", ", ": "), (",", ":")]))
  lines = [json.dumps(found, ensure_ascii=is_ascii, separators=separators) for found in objects]
  first = json.dumps({"user": "u", "item": "i", "time": 3})  # all keys are found
  return (end.join([first, *lines]) + draw(st.sampled_from([end, ""]))).encode()


@tries(30)
@given(st.data(), st.sampled_from([1, 1000]), st.integers(0, 2), st.booleans())
def test_json_lines_give_the_rows_that_they_hold_or_are_refused(folder, data, sample, most, packed):
  content = data.draw(damaged(json_files(), most))
  rows = json_rows(content)
  name = "a.jsonl.gz" if packed else "a.jsonl"
  path = write(folder, name, gzip.compress(content) if packed else content)
  with mock.patch.object(tables, "SAMPLE", sample):  # what is behind the sample only the database sees
    if rows is None:
      assert read(path)[0] is None
    else:
      agree(path, rows, may_refuse="which of the columns|with a JSON object|is not a JSON object")


@tries(20)
@given(st.data(), st.sampled_from(["a.csv.gz", "a.jsonl.gz"]))
def test_a_damaged_gz_is_read_as_python_unpacks_it_or_refused(folder, data, name):
  if name.startswith("a.csv"):
    content = data.draw(csv_files(",", good_times))[1]
  else:
    content = data.draw(json_files())
  packed = data.draw(damaged(st.just(gzip.compress(content, data.draw(st.integers(0, 9)), mtime=0))))
  path = write(folder, name, packed)
  try:
    content = gzip.decompress(packed)
  except (OSError, EOFError, zlib.error):
    content = None
  found, told = read(path, None, "skip")
  if found is not None:
    assert content is not None, told
    rows = csv_rows(content, ",")[0] if name.startswith("a.csv") else json_rows(content)
    assert (found, told) == settle(rows)[:2]


@tries(20)
@given(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join)),
       st.sampled_from(["r.csv", "r.tsv", "r.json", "r.parquet", "r.csv.gz", "r.json.gz", "r", "r.txt", "ratings.dat",
                        "u.data", "ratings.csv", "r.zip", "r.inter"]),
       st.sampled_from(["auto", "table", "movielens", "sequences", "pairs"]))
def test_random_bytes_raise_nothing_else(folder, content, name, form):
  path = write(folder, name, content)
  try:
    for on_bad_row in ("error", "skip"):
      read(path, None, on_bad_row, format=form)
      read(path, None, on_bad_row, format=form, header="user,item,time")
  finally:
    path.unlink()


MOVIELENS = {"ratings.dat": "::", "u.data": "\t", "ratings.csv": ","}


@st.composite
def movielens_files(draw, name):
  """Draws a file of ratings."""
  values = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["5", "3.5"]), st.integers(0, 9 * 10**7))
  rows = draw(st.lists(values, min_size=1, max_size=8))
  end = draw(st.sampled_from(["\n", "\r\n"]))
  lines = ["userId,movieId,rating,timestamp"] if name == "ratings.csv" else []
  return end.join(lines + [MOVIELENS[name].join(map(str, row)) for row in rows] + [""]).encode()


def movielens_rows(content, name):
  """Returns the oracle's rows of ratings, and line ends."""
  if name == "ratings.csv":
    first, _, rest = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    if first.rstrip(b"\r") != b"userId,movieId,rating,timestamp":
      return None, set()
    return csv_rows(b"user,item,rating,time" + first[31:] + b"\n" + rest, ",")
  return csv_rows(content, MOVIELENS[name], ["user", "item", "rating", "time"], None)


@tries(20)
@given(st.data(), st.sampled_from(sorted(MOVIELENS)))
def test_damaged_movielens_gives_the_rows_that_it_holds_or_is_refused(folder, data, name):
  content = data.draw(damaged(movielens_files(name)))
  path = write(folder, name, content)
  rows, ends = movielens_rows(content, name)
  try:
    if rows is None:
      read(path)
    else:
      agree(path, rows, may_refuse=ANYHOW if len(ends) > 1 or "\r" in ends else "is not MovieLens|has no lines|blank")
  finally:
    path.unlink()


@tries(20)
@given(st.data(), st.sampled_from(sorted(MOVIELENS)), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_a_damaged_zip_is_read_as_python_unpacks_it_or_refused(folder, data, name, method):
  content = data.draw(movielens_files(name))
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", method) as archive:
    for member, found in (("ml/README", b"readme"), (f"ml/{name}", content), ("ml/movies.dat", b"1::One::x\n")):
      archive.writestr(zipfile.ZipInfo(member), found, method)
  path = write(folder, "ml.zip", data.draw(damaged(st.just(buffer.getvalue()))))
  found, told = read(path, None, "skip")
  if found is not None:
    assert (found, told) == settle(movielens_rows(content, name)[0])[:2]


@st.composite
def plain_files(draw, pairs):
  """Draws a file of sequences or of pairs."""
  token = st.one_of(st.integers(1, 30).map(str), st.integers(1, 30).map(str), st.sampled_from(
      ["0", "-1", "x", "1.0", "+5", "007", "9223372036854775807", "9223372036854775808", "²", "\ufeff1", "1e3"]))
  line = st.lists(token, min_size=2, max_size=2) if pairs else st.lists(token, min_size=1, max_size=5)
  lines = draw(st.lists(line, min_size=1, max_size=6))
  end = draw(st.sampled_from(["\n", "\r\n"]))
  return end.join([draw(st.sampled_from([" ", "\t", "  "])).join(line) for line in lines] + [""]).encode()


@tries(30)
@given(st.data(), st.booleans())
def test_plain_text_gives_the_rows_that_it_holds_or_is_refused(folder, data, pairs):
  content = data.draw(damaged(plain_files(pairs)))
  path = write(folder, "a.txt", content)
  try:
    lines = [line.split() for line in re.split("\r\n|\r|\n", content.decode("utf-8-sig"))]
    lines = [line for line in lines if line]
  except UnicodeDecodeError:
    lines = []
  fits = [all(re.fullmatch(r"\+?[0-9]{1,19}", token) and 0 < int(token) < 2**63 for token in line)
          and (len(line) == 2 if pairs else len(line) > 1) for line in lines]
  good = [[int(token) for token in line] for line, fit in zip(lines, fits, strict=True) if fit]
  rows = [(line[0], item, 0) for line in good for item in line[1:]]
  repeats = not pairs and len({line[0] for line in good}) < len(good)
  for on_bad_row in ("error", "skip"):
    found, told = read(path, None, on_bad_row, format="pairs" if pairs else "sequences")
    if found is None:
      assert not all(fits) or repeats or not good, told
      assert on_bad_row == "error" or repeats or not good, told
    else:
      assert found == rows and not repeats and (all(fits) or on_bad_row == "skip")


SCALES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def arrow_columns():
  """Returns strategies for the values of an Arrow array, by its kind; of dates, seconds since 1970."""
  whole = {kind: st.integers(*bounds) for kind, bounds in {
      "int8": (-5, 100), "int16": (-5, 1000), "int32": (-5, 10**6), "int64": (-2**62, 2**62), "uint8": (0, 100),
      "uint16": (0, 1000), "uint32": (0, 10**6), "uint64": (0, 2**64 - 1)}.items()}
  ages = st.integers(0, 10**9)
  return {
      **whole, "float32": st.integers(-100, 100).map(float), "float64": st.integers(-2**40, 2**40).map(float),
      "string": ids, "large_string": ids, "dictionary": ids, "bool_": st.booleans(), "null": st.none(),
      "decimal": st.integers(-10**6, 10**6).map(lambda value: decimal.Decimal(value).scaleb(-2)),
      **{f"{unit} {zone}": ages for unit in SCALES for zone in ("", "UTC", "Europe/Berlin")}, "date": ages}


ARROW = arrow_columns()
ARROW_IDS = [name for name in ARROW if name not in ("date",) and " " not in name]
ARROW_TIMES = [name for name in ARROW if name not in ("bool_", "null")]


def arrow_array(kind, values):
  if kind == "dictionary":
    return pyarrow.array(values, pyarrow.string()).dictionary_encode()
  if kind == "decimal":
    return pyarrow.array(values, pyarrow.decimal128(12, 2))
  if kind == "date":
    return pyarrow.array([None if value is None else value // 86400 for value in values], pyarrow.int32()).cast(
        pyarrow.date32())
  unit, _, zone = kind.partition(" ")
  if unit in SCALES:
    values = [None if value is None else value * SCALES[unit] for value in values]
    return pyarrow.array(values, pyarrow.timestamp(unit, zone or None))
  return pyarrow.array(values, getattr(pyarrow, kind)())


def arrow_id(kind, value):
  """Returns an id as it is to be read, None where there is none."""
  if value is None or kind == "null" or (isinstance(value, str) and not value.strip(SPACES)):
    return None
  if isinstance(value, bool):
    return str(value).lower()
  return str(value) if kind in ("uint64", "decimal", "string", "large_string", "dictionary") else int(value)


def arrow_time(kind, value):
  """Returns a time as it is to be read, None where there is none."""
  if value is None:
    return None
  if kind == "date":
    return value // 86400 * 86400 * 10**6
  return value * 10**6 if " " in kind else number(str(value))


@st.composite
def arrow_tables(draw):
  """Draws an Arrow table and its rows as they are to be read, None for those that are none."""
  kinds = [draw(st.sampled_from(choices)) for choices in (ARROW_IDS, ARROW_IDS, ARROW_TIMES)]
  count = draw(st.integers(1, 6))
  choices = [st.one_of(*[ARROW[kind]] * 3, st.none()) if draw(st.booleans()) else ARROW[kind] for kind in kinds]
  columns = [draw(st.lists(choice, min_size=count, max_size=count)) for choice in choices]
  table = pyarrow.table({name: arrow_array(kind, values) for name, kind, values in
                         zip(("user", "item", "time"), kinds, columns, strict=True)})
  rows = [(arrow_id(kinds[0], user), arrow_id(kinds[1], item), arrow_time(kinds[2], time))
          for user, item, time in zip(*columns, strict=True)]
  return table, [row for row in rows if None not in row], len(rows)


def agree_with_arrow(source, good, count, table=None):
  for on_bad_row in ("error", "skip"):
    found, told = read(source, table, on_bad_row)
    if found is None:
      assert not good or WHOLE.search(told) or (on_bad_row == "error" and len(good) < count), told
    else:
      assert (found, told) == (good, count - len(good))


@tries(20)
@given(arrow_tables(), st.sampled_from(["parquet", "pyarrow", "pandas", "polars"]))
def test_columns_of_all_types_come_back(folder, drawn, kind):
  table, good, count = drawn
  if kind == "parquet":
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    agree_with_arrow(folder / "a.parquet", good, count)
  elif kind == "pyarrow":
    agree_with_arrow("", good, count, table)
  else:
    # neither keeps every type, so that they are asked for what they made of it
    frame = table.to_pandas(types_mapper=pandas.ArrowDtype) if kind == "pandas" else polars.from_arrow(table)
    agree_with_arrow("", good, count, frame)


@tries(20)
@given(st.data(), arrow_tables(), st.sampled_from(["none", "snappy", "gzip"]))
def test_a_damaged_parquet_file_is_read_as_pyarrow_reads_it_or_refused(folder, data, drawn, compression):
  table, good, count = drawn
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer, compression=compression)
  path = write(folder, "damaged.parquet", data.draw(damaged(st.just(buffer.getvalue()))))
  found, told = read(path, None, "skip")
  if found is None or (found, told) == (good, count - len(good)):
    return
  other = pyarrow.parquet.read_table(path)  # no checksum protects a page: values may change, for all alike
  assert other.num_rows == len(found) + told


mixed = st.one_of(ids, st.integers(-100, 100), st.sampled_from(
    [7.0, 7.5, 2**40, 2**63, 2**70, None, float("nan"), pandas.NA]))
mixed_times = st.one_of(good_times, st.integers(-10, 10**7), st.sampled_from([7.5, 1e6, None, "soon", "007"]))


def texts_of(column):
  """Returns the values of a column as texts, None where there is none."""
  return [None if value is None or value is pandas.NA or value != value else str(value) for value in column]


@tries(12)
@given(st.lists(st.tuples(mixed, mixed, mixed_times), min_size=1, max_size=8), st.sampled_from([1, 2400]),
       st.tuples(st.sampled_from(["u", 1, 1.0, "7"]), st.sampled_from(["i", 2]), st.sampled_from([3, "3", 3.0])))
def test_columns_of_mixed_python_values_come_back(rows, count, common):
  rows = [common, *rows, *[common] * count]
  table = pandas.DataFrame({name: pandas.Series(column, dtype=object) for name, column in zip(
      ("user", "item", "time"), zip(*rows, strict=True), strict=True)}).set_axis([5] * len(rows))
  good, bad, alike = settle(list(zip(*map(texts_of, zip(*rows, strict=True)), strict=True)))
  for on_bad_row in ("error", "skip"):
    found, told = read("", table, on_bad_row)
    if found is None:
      assert alike or WHOLE.search(told) or (bad and on_bad_row == "error"), told
    else:
      assert ([(str(user), str(item), time) for user, item, time in found], told) == (good, bad)


YEARS = ["2019", "1970", "1969", "2000", "19", "5", "12020", "0019", "-2019", "+2019", "２０１９"]
STAMPS = st.builds(
    lambda year, month, day, between, clock, zone: between.join([year, month, day]) + clock + zone,
    st.sampled_from(YEARS), st.sampled_from(["01", "12", "7", "02", "13", "00"]),
    st.sampled_from(["01", "29", "31", "3", "32", "2019", "05"]), st.sampled_from(["-", "-", "-", "/", ".", " "]),
    st.sampled_from(["", "", " 22:09:11", "T22:09:11", " 22:09", " 24:00:00", " 25:00:00", " 22:09:11.5", " 22:09:61"]),
    st.sampled_from(["", "", "Z", "+02:00", "-0530", "+02", " UTC", " Europe/Berlin", " (BC)", " x", " PM"]))
DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[ T](\d{2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?))?"
                  r"(Z|[+-]\d{2}(?::?\d{2})?)?", re.ASCII)


def microseconds(value):
  """Returns a date of four digits, a month and a day, with or without a time of day and a zone; None: it is none."""
  match = DATE.fullmatch(value.strip(BLANKS))
  if not match or (match[5] and not match[4]):
    return None
  year, month, day, clock, zone = match.groups()
  with contextlib.suppress(ValueError):
    zone = "+00:00" if zone in (None, "Z") else zone
    moment = datetime.datetime.fromisoformat(f"{year}-{month:0>2}-{day:0>2}T{clock or '00:00'}{zone}")
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
  return None


@tries(25)
@given(st.lists(STAMPS, min_size=1, max_size=5))
def test_dates_of_text_are_read_as_python_reads_them_or_are_bad(stamps):
  # whether these are dates is not laid down
  assume(not any(re.match("[0-9]{4}[/ ]", stamp) or stamp.endswith(("UTC", "Berlin")) or "24:00" in stamp
                 for stamp in stamps))
  table = pandas.DataFrame({"user": "u", "item": "i", "time": stamps})
  expected = [microseconds(stamp) for stamp in stamps]
  for on_bad_row in ("error", "skip"):
    found, told = read("", table, on_bad_row)
    if found is None:
      assert None in expected or WHOLE.search(told), told
    else:
      assert [row[2] for row in found] == [value for value in expected if value is not None]


def parquet(table):
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer)
  return buffer.getvalue()


def test_another_line_end_within_quotes_of_the_first_row_is_told(tmp_path):
  path = write(tmp_path, "a.csv", b'"\r\nu","i","1"\n"v","i","2"\n')
  for on_bad_row in ("error", "skip"):
    assert "some lines of" in read(path, None, on_bad_row, header="user,item,time")[1]


def test_a_row_behind_a_broken_quote_and_another_line_end_is_not_made_up(tmp_path):
  for broken in (b'u,i,"1"x\nv,j,2\r\n', b'"u"x\n"v",j,2\r\n'):
    found, _ = read(write(tmp_path, "a.csv", b"user,item,time\r\nu,i,1\r\n" + broken + b"w,k,3\r\n"), None, "skip")
    assert found is None or set(found) <= {("u", "i", 1), ("v", "j", 2), ("w", "k", 3)}


HEAD, JSON = b"user,item,time\n", b'{"user": "u", "item": "i", "time": 1}\n'
FAR = pyarrow.array([0, 2**30, -2**31], pyarrow.int32()).cast(pyarrow.date32())


@pytest.mark.parametrize("name, content", [
    ("returns.csv", b"user,item,time\ru,i,1\rv,j,2\r"),
    ("return.csv", HEAD + b"u\rx,i,1\n"),
    ("field.csv", HEAD + b"u," + b"x" * 140_000 + b",1\n"),
    ("quote.csv", HEAD + b'u,"' + b"x\n" * 140_000),
    ("deep.json", JSON + b"[" * 100_000 + b"\n"),
    ("deep_id.json", JSON + b'{"user": ' + b"[" * 100_000 + b"\n"),
    ("days.parquet", parquet(pyarrow.table({"user": [1, 2, 3], "item": [1, 2, 3], "time": FAR}))),
    ("write.parquet", b"PAR1xxxxxxxxPAR1"),
])
def test_files_that_no_parser_likes_raise_nothing_else(tmp_path, name, content):
  path = write(tmp_path, name, content)
  for on_bad_row in ("error", "skip"):
    read(path, None, on_bad_row)


def test_a_large_file_of_texts_with_lines_like_rows_holds_no_other_rows(tmp_path):
  """A reader that starts in the middle, for speed, may start inside of quotes."""
  with open(tmp_path / "a.csv", "w") as file:
    file.write("user,item,time,review\n")
    file.writelines(f'1,1,{row},"{"x" * 600}\n12,13,14,15"\n' for row in range(120_000))
  for on_bad_row in ("error", "skip"):
    found, told = read(tmp_path / "a.csv", None, on_bad_row)
    assert told == 0 and found == [("1", "1", row) for row in range(120_000)]
  os.remove(tmp_path / "a.csv")


@pytest.mark.parametrize("row", [b' "v,j,2', b'v, "j,2', b'"v" "x,j,2'])
def test_what_follows_an_open_quote_behind_a_space_is_not_lost(tmp_path, row):
  path = write(tmp_path, "a.csv", HEAD + b"u,i,1\n" + row + b"\nw,k,3\nx,l,4\n")
  assert read(path)[0] is None and read(path, None, "skip")[0] is None


def test_a_value_in_quotes_behind_a_space_may_span_lines(tmp_path):
  path = write(tmp_path, "a.csv", HEAD + b'u,i,1\n "v\n",j,2\nw,k,3\n')
  assert read(path) == ([("u", "i", 1), ("v\n", "j", 2), ("w", "k", 3)], 0)


def test_a_long_text_beside_the_ids_is_read(tmp_path):
  content = b"user,item,time,review\nu,i,1," + b"x" * 140_000 + b"\nv,j,2,y\n"
  assert read(write(tmp_path, "a.csv", content)) == ([("u", "i", 1), ("v", "j", 2)], 0)


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_times_that_no_date_reaches_raise_nothing_else(unit):
  far = pyarrow.array([2**55, 1, -2**63], pyarrow.int64()).cast(pyarrow.timestamp(unit))
  read("", pyarrow.table({"user": [1, 2, 3], "item": [1, 2, 3], "time": far}), "skip")


@pytest.mark.parametrize("make", [
    lambda folder: (folder / "2019.csv").mkdir(),  # as Spark names a folder of parts
    lambda folder: (folder / "2019.json").mkdir(),
    lambda folder: os.symlink("nowhere", folder / "2019.csv"),
])
def test_what_only_looks_like_a_file_is_refused(tmp_path, make):
  make(tmp_path)
  assert read(tmp_path)[0] is None
  os.mkdir(tmp_path / "ml.zip")
  assert read(tmp_path / "ml.zip")[0] is None


@pytest.mark.parametrize("titles", [
    b"movieId,title\n1,A\rB\n", b"movieId,title\n1," + b"x" * 140_000, b"movieId,title\n1,\xff\n"])
def test_titles_that_no_parser_likes_raise_nothing_else(tmp_path, titles):
  with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
    archive.writestr("ml/ratings.csv", "userId,movieId,rating,timestamp\n1,1,3.5,4\n")
    archive.writestr("ml/movies.csv", titles)
  read(tmp_path / "ml.zip")


@pytest.mark.parametrize("name, content", [
    ("a.csv", HEAD + b"u,i,1\n"), ("a.json", JSON), ("a.parquet", parquet(pyarrow.table({"user": ["u"], "item": ["i"],
                                                                                         "time": [1]})))])
def test_names_of_folders_are_no_columns(tmp_path, name, content):
  folder = tmp_path / "user=x" / "time=7"
  folder.mkdir(parents=True)
  path = write(folder, name, content)
  assert read(path) == read(folder) == ([("u", "i", 1)], 0)


@pytest.mark.parametrize("start", [b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n"])
def test_lines_that_are_blank_before_the_header_are_no_rows(tmp_path, start):
  for name, first in (("a.csv", HEAD), ("ratings.csv", b"userId,movieId,timestamp\n")):
    path = write(tmp_path, name, start + first.replace(b"\n", b"\r\n" if b"\r" in start else b"\n") + b"u,i,1")
    found, told = read(path, None, "skip")
    assert (found, told) == ([("u", "i", 1)], 0) or (found is None and "blank" in told), told


@pytest.mark.parametrize("form, content, rows", [
    ("sequences", b"1 2 3\r2 4 5\r", [(1, 2, 0), (1, 3, 0), (2, 4, 0), (2, 5, 0)]),
    ("auto", b"1 2\r3 4\r", [(1, 2, 0), (3, 4, 0)]),
    ("pairs", b"1 2\r3 4\r", [(1, 2, 0), (3, 4, 0)]),
])
def test_lines_that_end_in_a_return_alone_are_lines(tmp_path, form, content, rows):
  assert read(write(tmp_path, "a.txt", content), format=form)[0] in (rows, None)


@pytest.mark.parametrize("token", [b"1_0", "٣".encode()])
def test_only_digits_are_numbers_of_plain_text(tmp_path, token):
  assert read(write(tmp_path, "a.txt", b"1 2\n3 " + token + b"\n"))[0] is None


@pytest.mark.parametrize("name, content", [("a.tsv", b"1\t2\t3\t4\n"), ("a.csv", b"1::2::3::4\n")])
def test_a_header_that_is_given_counts_also_where_the_file_looks_like_movielens(tmp_path, name, content):
  assert read(write(tmp_path, name, content), header="item,user,time,rating")[0] in ([("2", "1", 3)], None)


@pytest.mark.parametrize("times", [
    ["25-12-05", "01-01-06"], ["5-3-19", "6-3-19"],  # read as years of two digits, days would be years
    ["2020-01-01 (BC)"], ["epoch"], ["0x1F", "0x2F"]])
def test_what_is_no_date_and_no_number_is_no_time(tmp_path, times):
  content = HEAD + "".join(f"u,i,{time}\n" for time in times).encode()
  found, told = read(write(tmp_path, "a.csv", content))
  assert found is None and f"time='{times[0]}'" in told


def test_a_date_of_the_far_future_is_not_taken_for_another_unit(tmp_path):
  found, told = read(write(tmp_path, "a.csv", HEAD + b"u,i,2020-01-01\nu,i,6020-01-01\n"))
  assert found is None and "lies in the future" in told


def long_column(usual, other):
  """Returns a column of 5000 Python objects, one of them unlike the others."""
  return pandas.Series([usual] * 3 + [other] + [usual] * 4996, dtype=object)


@pytest.mark.parametrize("usual, other, expected", [
    (1, "007", "007"), (1, "7.9", "7.9"), (1, 7.9, "7.9"), (1.0, "007", "007"), (True, 7, "7"), ("u", 7, "7"),
    (decimal.Decimal("1.5"), decimal.Decimal("1.23456789"), "1.23456789")])
def test_one_id_unlike_the_others_is_kept_as_it_stands_or_refused(usual, other, expected):
  found, _ = read("", pandas.DataFrame({"user": long_column(usual, other), "item": 1, "time": 1}))
  assert found is None or found[3][0] == expected


MIDNIGHT, EAST = 999_993_600 * 10**6, datetime.timezone(datetime.timedelta(hours=5))  # of 2001-09-09


@pytest.mark.parametrize("usual, other, expected", [
    (1, 7.9, 7.9), (1, "7.9", 7.9), (1, 2**26, 2**26), ("1", 7.9, 7.9),
    (datetime.date(2001, 9, 9), datetime.datetime(2001, 9, 9, 5), MIDNIGHT + 5 * 3600 * 10**6),
    (datetime.datetime(2001, 9, 9), datetime.datetime(2001, 9, 9, tzinfo=EAST), MIDNIGHT - 5 * 3600 * 10**6)])
def test_one_time_unlike_the_others_is_kept_as_it_stands_or_refused(usual, other, expected):
  found, _ = read("", pandas.DataFrame({"user": 1, "item": 1, "time": long_column(usual, other)}))
  assert found is None or found[3][2] == expected


@pytest.mark.parametrize("ids", [[2.0**53, 2.0**53 + 2], [1e300, 1.0]])
def test_real_ids_too_large_to_tell_apart_are_refused(ids):
  column = pandas.Series(ids, dtype=float)
  assert read("", pandas.DataFrame({"user": column, "item": 1, "time": 1}))[0] is None


@pytest.mark.parametrize("make", [lambda columns: pandas.DataFrame([["u", "i", 1, "v"]], columns=columns),
                                  lambda columns: pyarrow.table([["u"], ["i"], [1], ["v"]], names=columns)])
def test_two_columns_of_one_name_are_refused(make):
  found, told = read("", make(["user", "item", "time", "user"]))
  assert found is None and "user" in told


@pytest.mark.parametrize("name, content, line", [
    ("a.csv", HEAD + b'"u\n\n1",i,1\nu,i\n', 5),  # what cannot be split
    ("a.csv", HEAD + b'u"x,i,1\nv,j,2\nw,k,soon\n', 4),  # a quote inside of a value
    ("a.csv", HEAD + b"v,j,2\nw,k,2\"\n", 3),
    ("a.tsv", b"user\titem\ttime\n\t\t\nu\ti\tsoon\n", 2),  # white, but no blank line
    ("a.json", JSON + "\u00a0\n".encode() + JSON, 2),
    ("ratings.dat", b"1::2::3::4\r\n1::2::3::soon\r\n", 2),
])
def test_a_bad_row_is_found_at_its_place(tmp_path, name, content, line):
  path = write(tmp_path, name, content)
  found, told = read(path)
  assert found is None and told.startswith(f"{path}:{line}: "), told


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_no_number_is_no_id_of_json(tmp_path, word):
  path = write(tmp_path, "a.json", JSON + JSON.replace(b'"u"', word.encode()))
  assert read(path)[0] is None and read(path, None, "skip") == ([("u", "i", 1)], 1)


def test_lines_of_json_are_judged_alike_wherever_they_stand(tmp_path):
  path = write(tmp_path, "a.json", JSON + JSON.replace(b"}", b",}"))
  first = read(path, None, "skip")
  with mock.patch.object(tables, "SAMPLE", 1):
    assert read(path, None, "skip") == first and (read(path)[0] is None) == (first[1] == 1)
