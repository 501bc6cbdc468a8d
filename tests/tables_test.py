"""Tables: layouts, columns, kinds of file, what is refused and how, and the published files against pandas."""

import gzip
import json
import os

import numpy as np
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
from conftest import raw_rows

from awrsr_jax.config import default
from awrsr_jax.data import corpus, log, readers
from awrsr_jax.data.columns import choose_columns

RAW = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data", "raw")
ROWS = [("u2", "a", 30), ("u1", "b", 10), ("u1", "a", 20), ("u2", "c", 30), ("u1", "c", 5)]


def data_of(path, **values):
  """Returns `config.data` for a path, with values at dotted keys ("columns__user")."""
  config = default()
  config.data.path = str(path)
  config.data.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return config.data


def read(path, table=None, **values):
  """Returns the rows of a source in raw ids and source order, and what was left out."""
  data = data_of(path, **values)
  with log.open_database() as database:
    found = log.clean(readers.read(database, data, table), data.min_rating, data.on_bad_row)
    return raw_rows(database), found


def write(folder, name, content):
  """Writes a file, packed where its name says so; returns its path."""
  path = folder / name
  content = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  return str(path)


def lines_of(names, rows, separator=","):
  """Returns a text table."""
  return "".join(separator.join(map(str, row)) + "\n" for row in ([names] if names else []) + list(rows))


@pytest.mark.parametrize("name, content", [
    ("a.csv", lines_of(("user", "item", "time"), ROWS)),
    ("a.csv.gz", lines_of(("user", "item", "time"), ROWS)),
    ("a.tsv", lines_of(("user", "item", "time"), ROWS, "\t")),
    ("semicolons.csv", lines_of(("user", "item", "time"), ROWS, ";")),
    ("quoted.csv", '"user","item","time"\r\n' + "".join(f'"{u}","{i}",{t}\r\n\r\n' for u, i, t in ROWS)),
    ("mark.csv", "\ufeff" + lines_of(("user", "item", "time"), ROWS)),
    ("more.csv", lines_of(("x", "time", "item", "user"), [(0, t, i, u) for u, i, t in ROWS])),
    ("timestamp.csv", lines_of(("user", "item", "timestamp"), ROWS)),
    ("id_time.csv", lines_of(("user_id", "item_id", "time"), ROWS)),
    ("recbole.inter", lines_of(("user_id:token", "item_id:token", "timestamp:float"), ROWS, "\t")),
    ("a.json", "".join(json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) + "\n\n" for u, i, t in ROWS)),
    ("a.jsonl.gz", "".join(json.dumps({"user_id": u, "parent_asin": i, "timestamp": t}) + "\n" for u, i, t in ROWS)),
    ("unnamed", "".join(json.dumps({"user": u, "item": i, "time": t}) + "\n" for u, i, t in ROWS)),
])
def test_every_form_of_table_gives_the_same_rows(tmp_path, name, content):
  assert read(write(tmp_path, name, content)) == (ROWS, {"rows": 5, "bad_rows": 0, "low_ratings": 0})


@pytest.mark.parametrize("make", [pandas.DataFrame, lambda columns: pandas.DataFrame(columns).convert_dtypes(),
                                  polars.DataFrame, pyarrow.table])
def test_tables_from_python(make, tmp_path):
  users, items, times = map(list, zip(*ROWS, strict=True))
  assert read("", make({"user": users, "item": items, "time": times}))[0] == ROWS
  pyarrow.parquet.write_table(pyarrow.table({"user": users, "item": items, "time": times}), tmp_path / "a.parquet")
  assert read(tmp_path / "a.parquet")[0] == ROWS
  with pytest.raises(ValueError, match="table and --config.data.path=.* are two sources"):
    read(tmp_path / "a.parquet", make({"user": users}))
  with pytest.raises(ValueError, match=r"the \w+ table has no column 'who', but \['user'\]"):
    read("", make({"user": users}), columns__user="who")


def test_pandas_columns_whose_labels_are_numbers():
  named = {"columns__user": "0", "columns__item": "1", "columns__time": "2"}
  assert read("", pandas.DataFrame(ROWS), **named)[0] == ROWS
  with pytest.raises(ValueError, match=r"column '1' of the pandas table holds what is no utf-8 text \(.*surrogates"):
    read("", pandas.DataFrame([("u", "\ud800", 1)], dtype=object), **named)


def test_what_is_no_table_is_refused():
  with pytest.raises(ValueError, match="cannot read the builtins table.*give a pandas, polars or pyarrow table"):
    read("", 7)


def test_yelp_dates_become_microseconds_in_utc(tmp_path):
  rows = [{"user_id": "u", "business_id": "b", "stars": 3.0, "date": date}
          for date in ("1970-01-01 00:00:01", "2018-07-07 22:09:11", "2018-07-08T00:09:11+02:00", "2018-07-07")]
  path = write(tmp_path, "a.json", "".join(json.dumps(row) + "\n" for row in rows[1:]))
  assert [row[2] for row in read(path)[0]] == [1531001351000000, 1531001351000000, 1530921600000000]


def test_amazon_ratings_without_a_header_say_themselves_which_column_is_which(tmp_path):
  rows = [("B00005N7P0", "AH2IFH762VY5U", 5.0, 1005177600), ("0000000000", "AOSFI0JEYU4XM", 1.0, 1004486400)]
  item_first = read(write(tmp_path, "a.csv", lines_of(None, rows)))[0]
  user_first = read(write(tmp_path, "b.csv", lines_of(None, [(u, i, r, t) for i, u, r, t in rows])))[0]
  assert item_first == user_first == [(u, i, t) for i, u, _, t in rows]
  with pytest.raises(ValueError, match=r"which of the columns \['x1', 'y1', '7'\].*--config.data.columns.user=NAME"):
    read(write(tmp_path, "c.csv", "x1,y1,7\nx2,y2,8\n"))
  with pytest.raises(ValueError, match="c.csv:1: .*each once.*--config.data.header=user,item,rating,time"):
    read(write(tmp_path, "c.csv", "7,7,7\n1,2,8\n"))
  assert read(write(tmp_path, "c.csv", "7,7,7\n1,2,8\n"), header="item,user,time")[0] == [("7", "7", 7), ("2", "1", 8)]


def test_a_first_line_that_is_a_row_is_never_taken_for_names(tmp_path):
  path = write(tmp_path, "ratings.csv", "1,31,2.5,1260759144\n1,32,3,1260759150\n")
  with pytest.raises(ValueError, match="which of the columns.*first line is a row already set --config.data.head"):
    read(path)
  with pytest.raises(ValueError, match="ratings.csv: its first line.*numbers where names.*--config.data.header=user"):
    read(path, columns__user="1", columns__item="31", columns__time="1260759144")
  assert len(read(path, header="user,item,rating,time")[0]) == 2
  with pytest.raises(ValueError, match="named.csv:1 holds the names.*itself; leave out --config.data.header=user,item"):
    read(write(tmp_path, "named.csv", lines_of(("user", "item", "time"), ROWS)), header="user,item,time")


def test_columns_without_a_name_are_left_aside(tmp_path):
  """As `to_csv` of pandas writes its index."""
  indexed = lines_of(("", "user", "item", "time"), [(index, *row) for index, row in enumerate(ROWS)])
  assert read(write(tmp_path, "a.csv", indexed))[0] == ROWS
  headless = lines_of((), [("x", *row, "y") for row in ROWS])
  assert read(write(tmp_path, "b.csv", headless), header=",user,item,time,")[0] == ROWS


def test_columns_by_name_beat_layouts_and_only_a_whole_layout_brings_titles(tmp_path):
  names = ("user_id", "asin", "parent_asin", "timestamp", "rating", "title", "time")
  path = write(tmp_path, "a.csv", lines_of(names, [("u", "child", "parent", 100, 4.5, "a review", 7)]))
  assert read(path)[0] == [("u", "parent", 100)]
  assert read(path, columns__item="asin", columns__time="time")[0] == [("u", "child", 7)]
  chosen = choose_columns(list(names), data_of("", columns__user="user_id", columns__item="asin",
                                               columns__time="time").columns, "a")
  assert chosen == {"user": "user_id", "item": "asin", "time": "time"}
  with pytest.raises(ValueError, match="has no column 'when', but .*--config.data.columns.time=NAME"):
    read(path, columns__time="when")


@pytest.mark.parametrize("names, named, expected", [
    ("user item timestamp rating title", {}, "user item timestamp rating title"),
    ("user_id item_id time rating title", {}, "user_id item_id time rating title"),
    ("who item timestamp", {"user": "who"}, "who item timestamp"),
    ("user item timestamp time", {}, "user item time"),
    ("user_id item_id time timestamp", {}, "user_id item_id timestamp"),
    ("user item user_id parent_asin timestamp", {}, "user_id parent_asin timestamp"),
    ("user item userId movieId timestamp", {}, "userId movieId timestamp"),
    ("user_id item item_id time", {"user": "user_id"}, "user_id item time"),
    ("user item timestamp title", {"time": "timestamp"}, "user item timestamp"),
])
def test_the_later_layouts_take_nothing_from_the_others(names, named, expected):
  columns = data_of("", **{f"columns__{key}": name for key, name in named.items()}).columns
  assert list(choose_columns(names.split(), columns, "a").values()) == expected.split()


def test_columns_that_are_not_found_name_all_layouts():
  with pytest.raises(ValueError, match=r"user, item, time \(generic\);.*; user, item, timestamp \(generic with "
                     r"timestamp\); user_id, item_id, time \(generic with _id and time\); for others set"):
    choose_columns(["user", "item"], data_of("").columns, "a")


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
  for name, rows in (("b.csv", ROWS[2:]), ("a.csv", ROWS[:2]), ("notes.txt", [("x",)])):
    write(tmp_path, name, lines_of(("user", "item", "time"), rows))
  assert read(tmp_path)[0] == read(tmp_path / "*.csv")[0] == ROWS
  write(tmp_path, "c.csv", lines_of(("user", "item", "when"), ROWS))
  with pytest.raises(ValueError, match="a.csv and .*c.csv do not have the same columns: .*'time'.*'when'"):
    read(tmp_path)
  write(tmp_path, "d.json", "{}")
  with pytest.raises(ValueError, match="tables of several kinds"):
    read(tmp_path)
  with pytest.raises(ValueError, match="holds no table"):
    read(tmp_path / "*.parquet")


@pytest.mark.parametrize("name", ["a*.csv", "a[b].csv", "a?.csv", "it's.csv", "a b.csv", "ü.csv"])
def test_names_of_files_are_no_patterns(tmp_path, name):
  write(tmp_path, "ab.csv", lines_of(("user", "item", "time"), ROWS * 2))
  assert read(write(tmp_path, name, lines_of(("user", "item", "time"), ROWS)))[0] == ROWS


def test_json_files_may_differ_in_what_is_not_read_but_not_in_what_is(tmp_path):
  write(tmp_path, "a.json", '{"user": "u", "item": "i", "time": 1, "text": "x"}\n')
  write(tmp_path, "b.json", '{"user": "u", "item": "j", "time": 2}\n')
  assert read(tmp_path)[0] == [("u", "i", 1), ("u", "j", 2)]
  write(tmp_path, "c.json", '{"user": "u", "item": "j"}\n')
  with pytest.raises(ValueError, match="a.json and .*c.json do not have the same columns"):
    read(tmp_path)


@pytest.mark.parametrize("name, content, line, parts", [
    ("a.csv", "user,item,time\nu,i,1\nu,i\n", 3, ["'u,i'", "Expected Number of Columns: 3 Found: 2"]),
    ("a.csv", "user,item,time\nu,i,1\nu,i,2,3\n", 3, ["'u,i,2,3'", "Expected Number of Columns: 3 Found: 4"]),
    ("a.csv", "user,item,time\nu,i,1\n\nu,i,soon\n", 4, ["'u,i,soon'", "time='soon'", "1 of 2 rows are bad"]),
    ("a.csv", "user,item,time\nu,i,1\nu,i,nan\n", 3, ["time='nan'"]),
    ("a.csv", "user,item,time\nu,i,1\n,i,2\n", 3, ["user=none"]),
    ("a.csv", 'user,item,time\n"u\n1",i,1\nu," ",2\n', 4, ["item=' '"]),
    ("a.csv.gz", "user,item,time\nu,i,1\nu,i,\n", 3, ["time=none"]),
    ("a.csv", b"user,item,time\nu,i,1\n\xff,i,2\n", 3, ["Invalid unicode"]),
    ("a.json", '{"user": "u", "item": "i", "time": 1}\nnonsense\n', 2, ["'nonsense' is not a JSON object"]),
    ("a.json", '{"user": "u", "item": "i", "time": 1}\n\n{"user": "u", "time": 2}\n', 3, ["item=none"]),
    ("a.json", '{"user": "u", "item": "i", "time": 1}\n{"user": "u", "item": "i", "time": [2]}\n', 2, ["time='[2]'"]),
    ("a.json", '{"user": "u", "item": "i", "time": 1}\n' * 1500 + '{"user"\n', 1501, ['{"user"', "user=none"]),
])
def test_a_bad_row_is_refused_with_its_place_or_left_out(tmp_path, name, content, line, parts):
  path = write(tmp_path, name, content)
  with pytest.raises(ValueError) as error:
    read(path)
  assert str(error.value).startswith(f"{path}:{line}: "), error.value
  for part in [*parts, "on_bad_row=skip"]:
    assert part in str(error.value), error.value
  rows, _ = read(path, on_bad_row="skip")
  assert all(row[0].strip() in ("u", "u\n1") and row[1] == "i" and row[2] == 1 for row in rows) and rows


@pytest.mark.parametrize("content, words", [
    ("user,item,time\nu,i,31/12/2020\nu,j,30/12/2020\n", "a.csv:2: .*time='31/12/2020' is neither a number nor a date"),
    ("user,item,time\nu,i,1,2\nu,i,2,3\n", "a.csv:2: .*2 lines are bad"),
])
def test_to_skip_all_rows_is_not_advised(tmp_path, content, words):
  with pytest.raises(ValueError, match=f"{words}.*; mend the file$"):
    read(write(tmp_path, "a.csv", content))


def test_bad_rows_are_counted(tmp_path, caplog):
  path = write(tmp_path, "a.csv", "user,item,time\nu,i,1\nu,i\nu,i,x\nu,i,3\n")
  assert read(path, on_bad_row="skip") == ([("u", "i", 1), ("u", "i", 3)], {"rows": 3, "bad_rows": 1, "low_ratings": 0})
  assert "1 lines of" in caplog.text and "1 of 3 rows are bad" in caplog.text


def test_after_an_open_quote_nothing_is_left_out(tmp_path):
  path = write(tmp_path, "a.csv", 'user,item,time\nu,i,1\n"u,i,2\nu,i,3\nu,i,4\n')
  for on_bad_row in ("error", "skip"):
    with pytest.raises(ValueError, match=r"a.csv:3: .*a quote that is never closed"):
      read(path, on_bad_row=on_bad_row)


@pytest.mark.parametrize("row", ['"v" "x",j,2', '"v\nw"  "x",j,2', 'u, "j" "",2', 'u,j,"1" "2"',
                                 '"v" "x","j,2'])
def test_two_values_in_quotes_are_not_made_one(tmp_path, row):
  path = write(tmp_path, "a.csv", f'user,item,time\n"u\n",i,1\n{row}\nw,k,3\n')
  for on_bad_row in ("error", "skip"):
    with pytest.raises(ValueError, match=r"a.csv:4: .*two values in quotes without a ',' between them"):
      read(path, on_bad_row=on_bad_row)


@pytest.mark.parametrize("value, expected", [
    ('"a "" ""b"', 'a " "b'), ('"a, "" """', 'a, " "'), ('v "x" "y"', 'v "x" "y"'), ('"v" ', "v"), ('" "', None)])
def test_quotes_and_spaces_within_a_value_are_kept(tmp_path, value, expected):
  path = write(tmp_path, "a.csv", f'user,item,time\nu,"i" ,1\nu,{value},2\n')
  if expected is None:
    with pytest.raises(ValueError, match="a.csv:3: .*item"):
      read(path)
  else:
    assert read(path)[0] == [("u", "i", 1), ("u", expected, 2)]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "", r"a.csv has no lines \(0 bytes\)"),
    ("a.csv", "user,item,time\n", r"a.csv has no interactions \(0 rows, 0 of them bad\); set --config.data.path=FILE"),
    ("a.csv", "user,item,time\nu,i,x\n", r"a.csv:2: .*time='x'"),
    ("a.json", "\n", "no lines with a JSON object"),
    ("a.json", '[{"user": 1, "item": 2, "time": 3}]', "a.json:1: .*is not a JSON object"),
    ("a.parquet", b"PAR1", "cannot read .*a.parquet: .*is the file whole"),
    ("a.parquet", b"", "cannot read .*a.parquet"),
    ("long.csv", "user,item,time\n" + "x" * 17_000_000 + "\n", "long.csv:2: .*a line of more than"),
])
def test_files_that_hold_nothing_are_refused(tmp_path, name, content, message):
  with pytest.raises(ValueError, match=message):
    read(write(tmp_path, name, content))


def test_truncated_and_damaged_files_are_refused(tmp_path):
  rng = np.random.default_rng(0)
  content = lines_of(("user", "item", "time"), rng.integers(1, 9999, (5000, 3)))
  packed = gzip.compress(content.encode())
  at_random = rng.integers(200, len(packed) - 1, 40)
  for name, broken in [("cut", packed[:len(packed) // 2]), ("trailer", packed[:-4]),
                       *((f"bit{at}", packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1:]) for at in at_random)]:
    (tmp_path / f"{name}.csv.gz").write_bytes(broken)
    with pytest.raises(ValueError, match=rf"{name}.csv.gz \(\d+ bytes\) is truncated or damaged"):
      read(tmp_path / f"{name}.csv.gz")
  table = pyarrow.table({"user": [1, 2], "item": [1, 2], "time": [1, 2]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  whole = (tmp_path / "a.parquet").read_bytes()
  (tmp_path / "a.parquet").write_bytes(whole[:-20])
  with pytest.raises(ValueError, match="cannot read .*a.parquet.*is the file whole"):
    read(tmp_path / "a.parquet")


def shared(name):
  """Returns the path of a published file, or skips."""
  path = os.path.join(RAW, name)
  if not os.path.exists(path):
    pytest.skip(f"needs ../shared/data/raw/{name}, which is not distributed")
  return path


@pytest.mark.parametrize("name, frame, counts", [
    ("amazon-Musical_Instruments_5.json.gz",
     lambda path: pandas.read_json(path, lines=True, dtype={"asin": str})[["reviewerID", "asin", "unixReviewTime"]],
     (1429, 900, 10261, 10261)),
    ("amazon-AMAZON_FASHION_5.json.gz",
     lambda path: pandas.read_json(path, lines=True, dtype={"asin": str})[["reviewerID", "asin", "unixReviewTime"]],
     (406, 31, 3176, 3042)),
    ("amazon-Magazine_Subscriptions.csv",
     lambda path: pandas.read_csv(path, header=None, names=["i", "u", "r", "t"])[["u", "i", "t"]],
     (72098, 2428, 89689, 88318)),
    ("ml-100k.u.data",
     lambda path: pandas.read_csv(path, sep="\t", header=None)[[0, 1, 3]], (943, 1682, 100000, 100000)),
    ("ml-1m.ratings-users-1-2999.dat",
     lambda path: pandas.read_csv(path, sep="::", header=None, engine="python")[[0, 1, 3]],
     (2999, 3615, 487650, 487650)),
])
def test_published_files_agree_with_pandas(name, frame, counts):
  path = shared(name)
  expected = frame(path)
  expected.columns = ["user", "item", "time"]
  data = data_of(path)
  with log.open_database() as database:
    log.clean(readers.read(database, data), None, "error")
    rows = pandas.DataFrame(raw_rows(database), columns=["user", "item", "time"])
  assert (rows.user.nunique(), rows["item"].nunique(), len(rows), len(rows.drop_duplicates(["user", "item"]))) == counts
  for column in ("user", "item"):
    assert (rows[column].astype(str) == expected[column].astype(str)).all()
  assert (rows.time == expected.time).all()
  # histories: pandas' stable sort, its own duplicates
  data.k_core, data.duplicates = 3, "first"
  made = corpus.load(data)
  kept = expected.sort_values("time", kind="stable").drop_duplicates(["user", "item"])
  while True:
    enough = (kept.groupby("user")["time"].transform("size") >= 3) & (
        kept.groupby("item")["time"].transform("size") >= 3)
    if enough.all():
      break
    kept = kept[enough]
  histories = kept.groupby("user", sort=True)["item"].agg(list)
  assert made.user_ids.tolist() == histories.index.tolist()
  assert np.concatenate(histories.tolist()).tolist() == made.item_ids[made.items].tolist()


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "pyarrow", "pandas", "polars"])
@pytest.mark.parametrize("wanted", ["item", "Item"])
def test_names_that_differ_in_case_are_two_columns(tmp_path, name, wanted):
  rows = [{"Item": f"I{item}", "Time": -time, "user": user, "item": item, "time": time} for user, item, time in ROWS]
  table = pyarrow.Table.from_pylist(rows)
  path = tmp_path / name
  if name == "a.parquet":
    pyarrow.parquet.write_table(table, path)
  elif name == "a.csv":
    table.to_pandas().to_csv(path, index=False)
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  table = {"pyarrow": table, "pandas": table.to_pandas(), "polars": polars.from_arrow(table)}.get(name)
  found, _ = read("" if table is not None else path, table, columns__item=wanted)
  assert found == [(user, {"item": item, "Item": f"I{item}"}[wanted], time) for user, item, time in ROWS]


def test_a_user_and_an_item_whose_columns_differ_in_case(tmp_path):
  table = pyarrow.table({"ID": ["u", "u"], "id": ["a", "b"], "time": [1, 2]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  for given in ({"path": tmp_path / "a.parquet"}, {"path": "", "table": table}):
    assert read(**given, columns__user="ID", columns__item="id")[0] == [("u", "a", 1), ("u", "b", 2)]


def test_json_of_a_user_and_an_item_whose_columns_differ_in_case_is_refused(tmp_path):
  path = write(tmp_path, "a.jsonl", '{"ID": "u", "id": "a", "time": 1}\n')
  with pytest.raises(ValueError, match=r"columns \['ID', 'id', 'time'\] two differ in case alone"):
    read(path, columns__user="ID", columns__item="id")


@pytest.mark.parametrize("most, last", [("\r\n", "\n"), ("\n", "\r\n")])
def test_a_file_of_two_line_ends_is_named_with_the_way_out(tmp_path, most, last):
  lines = lines_of(("user", "item", "time"), ROWS).splitlines()
  (tmp_path / "a.csv").write_text(most.join(lines) + last, newline="")
  with pytest.raises(ValueError, match=r"lines of .*a.csv end in \\n and some in \\r\\n: .* sed -i 's/\\r\$//' FILE"):
    read(tmp_path / "a.csv")


def test_a_pattern_leaves_folders_out(tmp_path):
  write(tmp_path, "a.csv", lines_of(("user", "item", "time"), ROWS))
  (tmp_path / "archive").mkdir()
  assert read(f"{tmp_path}/*")[0] == ROWS
  with pytest.raises(ValueError, match="holds no table"):
    read(f"{tmp_path}/arch*")


def test_text_that_is_stored_as_bytes_is_text(tmp_path):
  items = ["O'B", "caf\u00e9", "a\\b", "7", "x"]
  columns = {"user": pyarrow.array(["u"] * 5, pyarrow.binary()), "item": pyarrow.array(items, pyarrow.binary()),
             "time": pyarrow.array(range(5))}
  pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
  wanted = [("u", item, time) for time, item in enumerate(items)]
  assert read(tmp_path / "a.parquet")[0] == wanted
  assert read("", pyarrow.table(columns))[0] == wanted
  assert read("", pyarrow.table(columns).to_pandas())[0] == wanted
  broken = pyarrow.table(columns | {"item": pyarrow.array([b"\xff"] * 5)})
  with pytest.raises(ValueError, match="plainer form"):
    read("", broken)


def test_lists_are_no_ids(tmp_path):
  table = pyarrow.table({"user": ["u"] * 3, "item": [["a", "b"], ["b"], ["c"]], "time": [1, 2, 3]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  for given in ({"path": tmp_path / "a.parquet"}, *({"path": "", "table": one} for one in (table, table.to_pandas()))):
    with pytest.raises(ValueError, match="an interaction a row"):
      read(**given)
  path = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
  with pytest.raises(ValueError, match=r"a.jsonl:1: .*item=none"):
    read(path)
