"""Histories from files of every form: what training reads from the same log, cut nowhere, and what is refused."""

import gzip
import io
import json
import sys
import types

import ml_collections
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import tiny_config

from awrsr_jax.config import finalize
from awrsr_jax.data import prepared, rules
from awrsr_jax.inference import histories as reading
from awrsr_jax.inference.histories import find_files, read_histories
from awrsr_jax.inference.standalone import Catalogue


def make_trained(item_ids, **values):
  """What the readers need of a trained model: its config and its catalogue."""
  config = tiny_config.get_config()
  config.data.name = ""
  config.data.path = "log.csv"
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return types.SimpleNamespace(config=ml_collections.FrozenConfigDict(config),
                               catalogue=Catalogue(item_ids, [""] * len(item_ids), "nowhere"))


@pytest.fixture
def trained():
  return make_trained([f"i{number}" for number in range(1, 31)])


def flatten(pieces):
  """All histories as (user, item numbers, unknown raw ids)."""
  return [(user, numbers.tolist(), unknown) for piece in pieces
          for user, numbers, unknown in zip(piece.users, piece.numbered, piece.unknown, strict=True)]


def read(path, trained, size=3, first=0, **columns):
  return flatten(read_histories(str(path), trained, size, first, columns))


LISTED = [["i1", "i2"], [], ["i3", "nowhere", "i1", "i3"], ["no"], ["i30"], ["i4", "i5"], ["i9"] * 40]
NUMBERED = [[1, 2], [], [3, 1, 3], [], [30], [4, 5], [9] * 40]
UNKNOWN = [[], [], ["nowhere"], ["no"], [], [], []]
USERS = ["a", 7, None, "ü", "d\n", "7", 0]


def write(path, text, newline="\n"):
  content = text.replace("\n", newline).encode()
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  return path


def lines_of(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


NAMED = [{"user": user, "items": items} if user is not None else {"items": items}
         for user, items in zip(USERS, LISTED, strict=True)]


@pytest.mark.parametrize("name", ["h.jsonl", "h.json.gz", "h.ndjson", "h", "h.txt", "h.gz"])
@pytest.mark.parametrize("rows, users", [(LISTED, [None] * 7), (NAMED, USERS)])
def test_json_lines(name, rows, users, trained, tmp_path):
  path = write(tmp_path / name, lines_of(rows))
  whole = list(zip(users, NUMBERED, UNKNOWN, strict=True))
  for size in (1, 3, 100):
    for first in range(9):
      assert read(path, trained, size, first) == whole[first:]
  pieces = list(read_histories(str(path), trained, 3, 1))
  assert [len(piece) for piece in pieces] == [3, 3] and pieces[0].numbered[0].dtype == np.int32


@pytest.mark.parametrize("before, newline", [("\ufeff", "\n"), ("\n \n", "\n"), ("", "\r\n"),
                                             ("\ufeff\n\t", "\r\n\r\n")])
def test_marks_blank_lines_and_line_ends(before, newline, trained, tmp_path, monkeypatch):
  path = write(tmp_path / "h.jsonl", before + lines_of(NAMED), newline)
  assert read(path, trained) == list(zip(USERS, NUMBERED, UNKNOWN, strict=True))
  monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
  assert read("-", trained, first=2) == list(zip(USERS, NUMBERED, UNKNOWN, strict=True))[2:]


def test_whole_numbers_are_ids(tmp_path):
  trained = make_trained([3, 5, 7])
  assert read(write(tmp_path / "h.jsonl", '[3, "5", 8, "07"]\n'), trained) == [(None, [1, 2], ["8", "07"])]


def list_table(kind, value, user=None):
  numbers = {f"i{number}": number for number in range(1, 31)} | {"nowhere": 77, "no": 88}
  rows = [[numbers[raw] for raw in row] if pyarrow.types.is_integer(value) else row for row in LISTED]
  table = {"items": pyarrow.array([rows[0], None, *rows[2:]], kind(value))}
  return pyarrow.table(table if user is None else {user: pyarrow.array(list(map(str, USERS))), **table})


@pytest.mark.parametrize("kind, value, user", [
    (pyarrow.list_, pyarrow.string(), None), (pyarrow.large_list, pyarrow.large_string(), "user"),
    (pyarrow.list_, pyarrow.int64(), "user_id"), (pyarrow.large_list, pyarrow.uint8(), None),
    (pyarrow.list_, pyarrow.string(), "reviewer"), (pyarrow.list_, pyarrow.string_view(), None)])
def test_parquet_with_a_list_in_each_row(kind, value, user, tmp_path, monkeypatch):
  trained = make_trained(list(range(1, 31)) if pyarrow.types.is_integer(value) else [f"i{n}" for n in range(1, 31)],
                         data__columns__user="reviewer")
  pyarrow.parquet.write_table(list_table(kind, value, user), tmp_path / "h.parquet", row_group_size=2)
  users = list(map(str, USERS)) if user else [None] * 7
  for first in range(9):
    found = read(tmp_path / "h.parquet", trained, 2, first)
    assert [(name, numbers) for name, numbers, _ in found] == list(zip(users, NUMBERED, strict=True))[first:]
    assert [len(unknown) for *_, unknown in found] == list(map(len, UNKNOWN))[first:]


def test_a_column_of_lists_is_read_even_where_the_run_calls_its_items_so(tmp_path):
  trained = make_trained([f"i{number}" for number in range(1, 31)], data__columns__item="items")
  pyarrow.parquet.write_table(list_table(pyarrow.list_, pyarrow.string()), tmp_path / "h.parquet")
  assert [numbers for _, numbers, _ in read(tmp_path / "h.parquet", trained)] == NUMBERED
  assert [numbers for _, numbers, _ in read(write(tmp_path / "h.jsonl", lines_of(NAMED)), trained)] == NUMBERED
  rows = '{"user": "u", "items": "i2", "time": 2}\n{"user": "u", "items": "i1", "time": 1}\n'
  assert read(write(tmp_path / "log.jsonl", rows), trained) == [("u", [1, 2], [])]


def test_folders_and_patterns_of_histories(trained, tmp_path):
  folder = tmp_path / "parts"
  folder.mkdir()
  for number in range(7):
    write(folder / f"part-{number}.jsonl", lines_of(NAMED[number:number + 1]))
  write(folder / "_SUCCESS", "")
  whole = list(zip(USERS, NUMBERED, UNKNOWN, strict=True))
  for path in (folder, folder / "part-*.jsonl"):
    for first in (0, 2, 7):
      assert read(path, trained, 3, first) == whole[first:]
  for number in range(7):
    table = list_table(pyarrow.list_, pyarrow.string(), "user").slice(number, 1)
    pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet")
  assert [numbers for _, numbers, _ in read(folder / "*.parquet", trained, 3, 2)] == NUMBERED[2:]
  with pytest.raises(ValueError, match="tables of several kinds"):
    read(folder, trained)


def test_a_name_with_brackets_is_a_file(trained, tmp_path):
  write(tmp_path / "a[1].jsonl", '["i1"]\n')
  write(tmp_path / "a1.jsonl", '["i2"]\n')
  assert read(tmp_path / "a[1].jsonl", trained) == [(None, [1], [])]
  assert find_files(str(tmp_path / "a[1].jsonl")) == [str(tmp_path / "a[1].jsonl")]


# Logs ----------------------------------------------------------------------------------------------------------------


def make_frame(rows=600, users=40, seed=0, names=("user", "item", "time"), number=False):
  """Clicks with many equal times; some items are not in the catalogue, and some users have only such."""
  rng = np.random.default_rng(seed)
  user, item = rng.integers(0, users, rows) * 7 % 101, rng.integers(1, 41, rows)
  item[user == user[0]] = 40
  frame = pandas.DataFrame({"u": user, "i": item, "t": rng.integers(0, 30, rows)})
  if not number:
    frame = frame.assign(u="u" + frame.u.astype(str), i="i" + frame.i.astype(str))
  return frame.set_axis(list(names), axis=1)


def expect(path, trained, **values):
  """What training reads from the same log, as `flatten` has it."""
  config = ml_collections.ConfigDict(trained.config.to_dict())
  config.update_from_flattened_dict({"data.path": str(path), "data.k_core": 0, "data.max_history": 0, "data.name": "",
                                     **values})
  corpus = prepared.load(finalize(config).data)
  raw = [[corpus.item_ids[number] for number in corpus.history(user)] for user in range(corpus.num_users)]
  known = trained.catalogue.numbers
  return [(user, [known[str(item)] for item in items if str(item) in known],
           [item for item in items if str(item) not in known])
          for user, items in zip(corpus.user_ids.tolist(), raw, strict=True)]


def write_log(folder, form, frame):
  path = folder / form
  match form:
    case "log.csv" | "log.csv.gz":
      frame.to_csv(path, index=False)
    case "log.tsv":
      frame.to_csv(path, index=False, sep="\t")
    case "log.jsonl" | "log.json.gz":
      frame.to_json(path, orient="records", lines=True)
    case "log.parquet":
      frame.to_parquet(path, index=False)
    case "folder" | "p*.csv":
      (folder / "parts").mkdir()
      for part in range(3):
        frame[part * 200:(part + 1) * 200].to_csv(folder / "parts" / f"p{part}.csv", index=False)
      path = folder / "parts" if form == "folder" else folder / "parts" / form
    case "ratings.dat":
      lines = [f"{user}::{item}::4::{time}" for user, item, time in frame.itertuples(index=False)]
      path.write_text("\n".join(lines) + "\n")
    case "ml-1m":
      path.mkdir()
      write_log(path, "ratings.dat", frame)
    case "movielens":
      path.mkdir()
      frame.assign(rating=5)[["userId", "movieId", "rating", "timestamp"]].to_csv(path / "ratings.csv", index=False)
    case "pairs.txt":
      path.write_text("".join(f"{user} {item}\n" for user, item, _ in frame.itertuples(index=False) if user))
    case "sequences.txt":
      text = "".join(f"{user} {' '.join(map(str, part))}\n" for user, part in frame.groupby("user").item if user)
      path.write_text(text)
  return path


FORMS = ["log.csv", "log.csv.gz", "log.tsv", "log.jsonl", "log.json.gz", "log.parquet", "folder", "p*.csv",
         "ratings.dat", "ml-1m", "movielens", "pairs.txt", "sequences.txt"]


@pytest.mark.parametrize("form", FORMS)
def test_a_log_gives_the_histories_that_training_reads(form, tmp_path):
  is_number = form in FORMS[8:]
  trained = make_trained(list(range(1, 31)) if is_number else [f"i{number}" for number in range(1, 31)],
                         data__k_core=5, data__max_history=3)
  names = ("userId", "movieId", "timestamp") if form == "movielens" else ("user", "item", "time")
  path = write_log(tmp_path, form, make_frame(number=is_number, names=names))
  whole = expect(path, trained)
  assert len(whole) > 30 and sum(len(numbers) for _, numbers, _ in whole) > 300
  assert any(not numbers for _, numbers, _ in whole) and any(unknown for *_, unknown in whole)
  for size, first in ((7, 0), (7, 5), (1000, 14), (3, 39), (7, 500)):
    assert read(path, trained, size, first) == whole[first:]


def test_no_history_is_cut_where_a_log_comes_in_chunks(trained, tmp_path, monkeypatch):
  path = write_log(tmp_path, "log.csv", make_frame())
  whole, ordered = expect(path, trained), rules.order_items

  def in_chunks(database):
    items = np.concatenate(list(ordered(database)))
    yield from np.split(items, range(11, len(items), 11))

  monkeypatch.setattr(rules, "order_items", in_chunks)
  for size in (1, 3, 16):
    for first in (0, 1, 20):
      pieces = list(read_histories(str(path), trained, size, first))
      assert flatten(pieces) == whole[first:] and {len(piece) for piece in pieces[:-1]} <= {size}


def test_rules_of_the_run_hold_but_for_k_core_and_max_history(tmp_path):
  frame = make_frame().assign(rating=lambda frame: np.arange(len(frame)) % 5)
  frame.to_csv(tmp_path / "log.csv", index=False)
  for values in ({"data__duplicates": "last"}, {"data__min_rating": 2.0}, {"data__duplicates": "consecutive"}):
    trained = make_trained([f"i{number}" for number in range(1, 31)], data__k_core=9, data__max_history=2, **values)
    whole = expect(tmp_path / "log.csv", trained, **{"data.split.name": "time"})  # which takes histories of one item
    assert read(tmp_path / "log.csv", trained) == whole
    assert whole != expect(tmp_path / "log.csv", make_trained(trained.catalogue.item_ids))


def test_columns_of_the_run_and_those_of_flags(tmp_path):
  trained = make_trained([f"i{number}" for number in range(1, 31)], data__columns__user="who",
                         data__columns__item="what", data__columns__time="when", data__columns__title="called",
                         data__columns__rating="stars")  # of the last two, this log has none, and none is needed
  path = write_log(tmp_path, "log.csv", make_frame(names=("who", "what", "when")))
  expected = expect(path, trained, **{"data.columns.title": "", "data.columns.rating": ""})
  assert read(path, trained) == expected
  frame = make_frame(names=("a", "b", "c")).assign(who="x", what="y", when=1)
  other = write_log(tmp_path, "log.parquet", frame)
  assert read(other, trained, user="a", item="b", time="c") == expected
  assert read(other, trained, user="a", item="b") != expected
  with pytest.raises(ValueError, match="no column 'z'.* set --user_column=NAME"):
    read(other, trained, user="z")


def test_a_run_of_tables_says_what_a_file_is_whose_name_does_not(tmp_path):
  trained = make_trained([f"i{number}" for number in range(1, 31)], data__format="table")
  path = write(tmp_path / "clicks.txt", "user item time\nu 4 1\n".replace(" ", "\t"))
  assert read(path, trained) == [("u", [], [4])]
  path = write(tmp_path / "ratings.dat", "1::4::5::1\n")  # of MovieLens as before
  assert read(path, trained) == [(1, [], [4])]


def test_bad_rows_follow_the_run(tmp_path):
  path = write(tmp_path / "log.csv", "user,item,time\nu1,i2,5\nu1,,6\nu1,i3,x\nu2,i1,1\n")
  items = [f"i{number}" for number in range(1, 31)]
  with pytest.raises(ValueError, match=r"log.csv:3.*2 of 4 rows are bad\); mend the file$"):
    read(path, make_trained(items))
  assert read(path, make_trained(items, data__on_bad_row="skip")) == [("u1", [2], []), ("u2", [1], [])]


def test_a_prepared_corpus_gives_its_histories(tmp_path):
  make_frame().to_csv(tmp_path / "log.csv", index=False)
  trained = make_trained([f"i{number}" for number in range(1, 31)], data__k_core=5, data__max_history=9,
                         data__path=str(tmp_path / "log.csv"))
  config = finalize(ml_collections.ConfigDict(trained.config.to_dict()))
  prepared.prepare(config.data, tmp_path / "prepared", 2**28)
  whole = expect(tmp_path / "log.csv", trained, **{"data.k_core": 5, "data.max_history": 9})
  for first in (0, 3):
    assert read(tmp_path / "prepared", trained, 4, first) == whole[first:]


@pytest.mark.parametrize("name, text, message", [
    ("h.jsonl", '["i1"]\n["i2"\n', r"h.jsonl:2: '\[\"i2\"' is no JSON"),
    ("h.jsonl", '{"user": "a", "items": ["i1"\n', "h.jsonl:1: .* is no JSON"),
    ("h.jsonl", '["i1"]\n\n["i1", 2.0]\n', r"h.jsonl:3: .*'2.0' is no item id"),
    ("h.jsonl", '["i1", null]\n', "h.jsonl:1: .*'null' is no item id"),
    ("h.jsonl", '["i1", true]\n', "h.jsonl:1: .*'true' is no item id"),
    ("h.jsonl", '["i1", ["i2"]]\n', "h.jsonl:1: .* is no item id"),
    ("h.jsonl", '[NaN]\n', "h.jsonl:1: .*'NaN' is no item id"),
    ("h.jsonl", '["i1"]\n"i1"\n', "h.jsonl:2: .* not a list; a line is a list of raw item ids"),
    ("h.jsonl", '"i1"\n', "h.jsonl:1: .* not a list"),
    ("h.jsonl", '{"user": "a", "items": "i1"}\n', "h.jsonl:1: .* not a list"),
    ("h.jsonl", '{"user": "a", "items": null}\n', "h.jsonl:1: .* not a list"),
    ("h.jsonl", '["i1"]\n{"user": "a", "item": "i1"}\n', "h.jsonl:2: .* not a list"),
    ("h.jsonl", '{"user": 1.5, "items": []}\n', "h.jsonl:1: .*'1.5' is no user id"),
    ("h.jsonl", '{"user": false, "items": []}\n', "h.jsonl:1: .*'false' is no user id"),
    ("h.jsonl", '{"user": "\\ud800", "items": []}\n', "h.jsonl:1: .* half of a UTF-16 pair"),
    ("h.jsonl", "[" * 100_000 + "\n", "h.jsonl:1: .* is no JSON"),
    ("h.jsonl", "[" + "1" * 5000 + "]\n", "h.jsonl:1: .* is no JSON"),
    ("h.jsonl", '{"who": "a", "items": []}\n{"user": "a", "items": []}\n', "h.jsonl:2: .* has no 'who'"),
    ("log.csv", "user,item\na,i1\n", "--time_column=NAME; or give a history a line: a line is a list"),
    ("log.csv", "user,thing,time\na,i1,1\n", "are user, item and time.* --item_column=NAME"),
    ("log.csv", "", "log.csv has no lines .* set --input=FILE"),
    ("log.csv", "user,item,time\n", "log.csv has no interactions .*--input=FILE"),
    ("log.jsonl", '{"user": "a", "item": "i1", "time": 1}\n{"user": \n', "log.jsonl:2"),
])
def test_bad_text_names_file_and_line(name, text, message, trained, tmp_path):
  columns = {"user": "who"} if "who" in text else {}
  with pytest.raises(ValueError, match=message) as caught:
    read(write(tmp_path / name, text), trained, **columns)
  assert "config.data.columns" not in str(caught.value) and len(str(caught.value)) < 1200


@pytest.mark.parametrize("line", ['["i1", "\xff"]'.encode("latin-1"), b'["i1", "' + b"x" * 300 + b'"]'])
def test_lines_that_are_no_text_or_too_long(line, trained, tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "LONGEST_LINE", 200)
  monkeypatch.setattr("awrsr_jax.data.lines.LONGEST_LINE", 200)
  (tmp_path / "h.jsonl").write_bytes(b'["i1"]\n' + line + b"\n")
  message = r":2: .*(is no JSON|a line of more than 200 bytes)"
  with pytest.raises(ValueError, match="h.jsonl" + message):
    read(tmp_path / "h.jsonl", trained)
  monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b'["i1"]\n' + line + b"\n")))
  with pytest.raises(ValueError, match="-" + message):
    read("-", trained)


@pytest.mark.parametrize("table, message", [
    ({"items": pyarrow.array([["i1"], ["i1", None]])}, "row 2: 'null' is no item id"),
    ({"items": pyarrow.array([[1.0], [2.0]])}, "row 1: '1.0' is no item id"),
    ({"items": pyarrow.array([[True]])}, "row 1: 'true' is no item id"),
    ({"items": pyarrow.array([[["i1"]]])}, "row 1: .* is no item id"),
    ({"items": pyarrow.array(["i1", "i2"])}, "column 'items' holds string, not lists"),
    ({"items": pyarrow.array([["i1"]]), "user": pyarrow.array([1.5])}, "row 1: '1.5' is no user id"),
    ({"things": pyarrow.array([["i1"]])}, "are user, item and time"),
])
def test_bad_parquet(table, message, trained, tmp_path):
  pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "h.parquet")
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "h.parquet", trained)


def test_a_user_column_that_is_not_there(trained, tmp_path):
  pyarrow.parquet.write_table(list_table(pyarrow.list_, pyarrow.string(), "user"), tmp_path / "h.parquet")
  with pytest.raises(ValueError, match="has no column 'who', but"):
    read(tmp_path / "h.parquet", trained, user="who")


def test_damaged_and_missing_files(trained, tmp_path):
  with pytest.raises(ValueError, match="no such file or folder: --input=.*nowhere.csv"):
    read(tmp_path / "nowhere.csv", trained)
  with pytest.raises(ValueError, match="no such file"):
    read(tmp_path / "nowhere*.csv", trained)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty holds no table and none of"):
    read(tmp_path / "empty", trained)
  whole = write(tmp_path / "h.jsonl.gz", lines_of([["i1", str(number)] for number in range(9999)])).read_bytes()
  (tmp_path / "h.jsonl.gz").write_bytes(whole[:-20])
  with pytest.raises(ValueError, match="h.jsonl.gz .* truncated or damaged.* --input"):
    read(tmp_path / "h.jsonl.gz", trained)
  pyarrow.parquet.write_table(list_table(pyarrow.list_, pyarrow.string()), tmp_path / "h.parquet", compression="none")
  content = (tmp_path / "h.parquet").read_bytes()
  (tmp_path / "h.parquet").write_bytes(content[:-9])
  with pytest.raises(ValueError, match="cannot read .*h.parquet.* is the file whole"):
    read(tmp_path / "h.parquet", trained)
  (tmp_path / "h.parquet").write_bytes(content[:4] + b"\xff" * 60 + content[64:])
  with pytest.raises(ValueError, match="cannot read .*h.parquet.* is the file whole"):
    read(tmp_path / "h.parquet", trained)
  for name in ("h.jsonl", "h.csv", "h.parquet"):
    (tmp_path / "folder" / name).mkdir(parents=True)
    with pytest.raises(ValueError):
      read(tmp_path / "folder" / name, trained)


def test_a_full_disk_while_a_log_is_ordered_is_one_clear_error(trained, tmp_path, monkeypatch):
  path = write_log(tmp_path, "log.csv", make_frame())

  def full(*args):
    raise reading.duckdb.IOException("IO Error: Could not write file: No space left on device\nStack")

  monkeypatch.setattr(reading.corpora, "read_log", full)
  with pytest.raises(ValueError, match="cannot be ordered: .*No space left on device; a log needs .*TMPDIR"):
    read(path, trained)
