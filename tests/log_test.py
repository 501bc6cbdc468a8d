"""The log and its rules: ids, times, ratings, duplicates, k-core, longest history, against loops in Python."""

import collections
import decimal
import time
import uuid

import numpy as np
import pandas
import pytest
from conftest import raw_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from awrsr_jax.config import default
from awrsr_jax.data import log, readers, rules


def clean(columns, min_rating=None, on_bad_row="error", **values):
  """Returns the database of a table given as columns, after `values` of config.data."""
  data = default().data
  data.update(values)
  database = log.open_database()
  counts = log.clean(readers.read(database, data, pandas.DataFrame(columns)), min_rating, on_bad_row)
  return database, counts


def table(users, items=None, times=None, **more):
  count = len(users)
  return {"user": users, "item": items or ["i"] * count, "time": times or list(range(count)), **more}


@pytest.mark.parametrize("ids, ordered", [
    ([10, 9, 2**62, -3], [-3, 9, 10, 2**62]),
    (["10", "9", "100"], [9, 10, 100]),  # whole numbers, all of them: in the order of numbers
    (["10", "09", "9"], ["09", "10", "9"]),  # as numbers two would be one
    (["b", "a", "B", "é", "一"], ["B", "a", "b", "é", "一"]),
    (["1", "1.0", "1e0"], ["1", "1.0", "1e0"]),
    ([3.0, 1.0, 2.0], [1, 2, 3]),
    ([uuid.UUID(int=5), uuid.UUID(int=3)], [str(uuid.UUID(int=3)), str(uuid.UUID(int=5))]),
    ([str(2**64), "5"], [str(2**64), "5"]),
])
def test_ids_of_any_type_are_numbered_in_order_and_come_back(ids, ordered):
  database, _ = clean(table(ids))
  codes = database.execute("SELECT code FROM users ORDER BY code").fetchnumpy()["code"]
  assert codes.tolist() == list(range(1, len(ids) + 1))
  assert log.fetch_ids(database, "users", codes).tolist() == ordered


@pytest.mark.parametrize("ids", [["a", " a"], ["a", "a\t"], ["é", "e\u0301"]])
def test_ids_that_look_alike_are_refused(ids):
  with pytest.raises(ValueError, match="two user ids, .* and .*, differ only in spaces .* Unicode form"):
    clean(table(ids))


def test_fractions_are_no_ids():
  with pytest.raises(ValueError, match="table, row 2: the user ids are real numbers .DOUBLE., and not all are whole"):
    clean(table([1.0, 2.5]))


def test_missing_values_of_python_tables_are_bad_rows():
  rows = table([1.0, np.nan, 3.0], ["x", "y", None], [1, 2, 3])
  with pytest.raises(ValueError, match=r"row 2: user=none, item='y', time='2': a row needs .*2 of 3 rows are bad"):
    clean(rows)
  database, counts = clean(rows, on_bad_row="skip")
  assert raw_rows(database) == [(1, "x", 1)] and counts == {"rows": 3, "bad_rows": 2, "low_ratings": 0}


@pytest.mark.parametrize("times, row, words", [
    (["31/12/2020", "30/12/2020"], 1, "time='31/12/2020' is neither a number nor a date of a form that is read "
     "(2020-12-31 or 2020/12/31, each also with a time of day, as 2020-12-31 23:59:59+01:00) (2 of 2 rows are bad)"),
    (["2020-12-31", "31/12/2020"], 2, "time='31/12/2020' is neither a number nor a date of a form that is read"),
    ([1.5, np.inf], 2, "time='inf' is neither a number nor"),
    (["2020-12-31", "2020-12-30", "7"], 3, "time='7' is a number, and the times of this log are read as dates"),
    (["8", "9", "2020-12-31"], 3, "time='2020-12-31' is a date, and the times of this log are read as numbers"),
    (["8", " "], 2, "time=' ': a row needs a user, an item and a time (1 of 2"),
])
def test_a_time_that_is_not_read_is_not_called_a_missing_one(times, row, words):
  with pytest.raises(ValueError, match=f"row {row}: .*") as error:
    clean(table([1] * len(times), times=times))
  assert words in str(error.value) and ("needs a user" in words) == ("needs a user" in str(error.value))


@pytest.mark.parametrize("form", ["2020-12-31", "2020/12/31", "2020-12-31 23:59:59+01:00"])
def test_the_forms_of_dates_that_an_error_names_are_read(form):
  assert form in log.DATES and raw_rows(clean(table([1], times=[form]))[0])[0][2] > 1.6e15


@pytest.mark.parametrize("times, is_advised", [(["x", "y"], False), (["x", "5"], True)])
def test_to_skip_bad_rows_is_advised_where_others_are_left(times, is_advised):
  with pytest.raises(ValueError, match="rows are bad.; mend the table") as error:
    clean(table([1, 2], times=times))
  assert str(error.value).endswith(", or leave such rows out with --config.data.on_bad_row=skip") == is_advised
  with pytest.raises(ValueError, match="mend the table$"):  # those that are good are rated too low
    clean(table([1, 2], times=["5", "x"], rating=[1, 5]), 3.0)


def test_ratings_below_the_floor_are_left_out_and_are_not_bad():
  rows = table([1, 2, 3, 4], rating=["5", "3", "3.5", "x"])
  database, counts = clean(rows, 3.5, "skip")
  assert [row[0] for row in raw_rows(database)] == [1, 3] and counts == {"rows": 4, "bad_rows": 1, "low_ratings": 1}
  with pytest.raises(ValueError, match="row 4: .*rating='x', time='3': the rating is no number"):
    clean(rows, 3.5)
  with pytest.raises(ValueError, match="row 2: .*rating=none.* a row needs .* and a rating"):
    clean(table([1, 2], rating=["5", None]), 3.5)
  assert clean(rows)[1]["bad_rows"] == 0  # nobody asks for ratings
  with pytest.raises(ValueError, match="has no ratings; leave min_rating out, or .*columns.rating"):
    clean(table([1]), 3.5)
  with pytest.raises(ValueError, match="has no interactions .*4 rated below 9"):
    clean(table([1, 2, 3, 4], rating=[1, 2, 3, 4]), 9.0)


def test_a_table_without_rows_is_refused_in_words_for_a_table():
  with pytest.raises(ValueError, match=r"^the pandas table has no interactions \(0 rows, 0 of them bad\); give a"):
    clean(table([]))
  with pytest.raises(ValueError, match=r"\(2 rows, 1 of them bad, 1 rated below 3.0\); give a table that has some$"):
    clean(table([1, 2], rating=["1", "x"]), 3.0, "skip")


@pytest.mark.parametrize("times, expected", [
    (["5", "7"], [5, 7]), (["5", "7.5"], [5.0, 7.5]), ([5.0, 7.5], [5.0, 7.5]),
    (["1e9", "1500000000.5"], [1e9, 1500000000.5]),
    ([decimal.Decimal("1.5"), decimal.Decimal("2")], [1.5, 2.0]),
    ([1700000000123456789, 1700000000123456790], [1700000000123456789, 1700000000123456790]),
    (["1700000000123456789", "1700000000123456790"], [1700000000123456789, 1700000000123456790]),
    ([pandas.Timestamp("2020-01-01"), pandas.Timestamp("2020-01-02T00:00:01")], [1577836800000000, 1577923201000000]),
    ([pandas.Timestamp("2020-01-01T02:00+02:00")] * 2, [1577836800000000] * 2),
    ([0, -5], [0, -5]),
])
def test_times_are_numbers_or_dates(times, expected):
  found = [row[2] for row in raw_rows(clean(table([1, 2], times=times))[0])]
  assert found == expected and [type(value) for value in found] == [type(value) for value in expected]


@pytest.mark.parametrize("times, row, words", [
    ([1700000000, 1700000001, 1700000002000], 3, "1 of 3 times lie between 1700000002000 and 1700000002000"),
    ([1700000000000, 1700000001, 1700000002000], 2, "mixed time units"),
    ([1700000000, 0, 1700000002], 2, "stand-in for a missing time"),
    ([1700000000, int(time.time()) + 10**6], 2, "lies in the future, read as seconds since 1970"),
    ([1700000000000, int(time.time() + 10**6) * 1000], 2, "lies in the future, read as milliseconds"),
    (["2020-01-01", "2999-01-01"], 2, "lies in the future, read as microseconds since 1970"),
])
def test_times_of_several_units_and_of_the_future_are_refused(times, row, words):
  with pytest.raises(ValueError, match=f"row {row}: .*{words}"):
    clean(table(list(range(len(times))), times=times))


def test_counters_and_times_of_today_are_accepted():
  for times in ([1, 2, 10**8 + 5, 5 * 10**6], [int(time.time()), 10**9], list(range(50)), [-10**9, 10**8, 10**9]):
    clean(table(list(range(len(times))), times=times))


def apply_in_python(rows, duplicates, k, longest):
  """Returns the histories that the rules leave, from (user, item, time) rows in source order."""
  rows = [(*row, place) for place, row in enumerate(rows)]
  rows.sort(key=lambda row: (row[0], row[2], row[3]))
  if duplicates == "consecutive":
    rows = [row for at, row in enumerate(rows) if at == 0 or rows[at - 1][:2] != row[:2]]
  elif duplicates != "keep":
    pick = {}
    for row in rows if duplicates == "last" else reversed(rows):
      pick[row[:2]] = row
    rows = [row for row in rows if pick[row[:2]] == row]
  while k > 1:
    users, items = (collections.Counter(row[at] for row in rows) for at in (0, 1))
    kept = [row for row in rows if users[row[0]] >= k and items[row[1]] >= k]
    if len(kept) == len(rows):
      break
    rows = kept
  histories = collections.defaultdict(list)
  for row in rows:
    histories[row[0]].append(row[1])
  return {user: items[-longest:] for user, items in histories.items()}


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=60),
       duplicates=st.sampled_from(["keep", "first", "last", "consecutive"]), k=st.integers(0, 4),
       longest=st.integers(0, 5))
def test_rules_agree_with_loops(rows, duplicates, k, longest):
  data = default().data
  data.update(duplicates=duplicates, k_core=k, max_history=longest)
  expected = apply_in_python(rows, duplicates, k, longest)
  with log.open_database() as database:
    columns = map(np.array, zip(*rows, strict=True))
    log.clean(log.put(database, log.Interactions(*columns, {}, "rows")), None, "error")
    if not expected:
      with pytest.raises(ValueError, match=f"no users left after k-core {k}"):
        rules.apply_rules(database, data, "rows")
      return
    rules.apply_rules(database, data, "rows")
    raw = {name: dict(database.execute(f"SELECT code, raw FROM {name}").fetchall()) for name in ("users", "items")}
    users, counts = rules.codes(database, "user")
    items = np.concatenate(list(rules.order_items(database)))
  found = {raw["users"][user]: [raw["items"][item] for item in part] for user, part in
           zip(users.tolist(), np.split(items, np.cumsum(counts)[:-1]), strict=True)}
  assert found == expected


def test_what_a_rule_takes_is_told(caplog):
  caplog.set_level("INFO")
  data = default().data
  data.update(duplicates="first", max_history=1)
  database, _ = clean(table([1, 1, 1], ["a", "a", "b"]))
  rules.apply_rules(database, data, "clicks")
  assert "duplicates=first of clicks: 1 of 1 users, 2 of 2 items, 2 of 3 interactions kept" in caplog.text
  assert "max_history=1 of clicks: 1 of 1 users, 1 of 2 items, 1 of 2 interactions kept" in caplog.text


@pytest.mark.parametrize("number, unit, words", [
    (5, 0, "5"), (2.5, 0, "2.5"), (1700000000, 1, "2023-11-14 22:13"), (1700000000000, 2, "2023-11-14 22:13"),
    (1700000000000000, 3, "2023-11-14 22:13"), (-7, 0, "-7"), (63072000000000, 3, "1972-01-01 00:00"),
    (-86400000, 2, "1969-12-31 00:00"), (10**18, 1, "1000000000000000000")])
def test_times_are_shown_as_dates_where_they_are_some(number, unit, words):
  assert log.describe_time(number, unit) == words


@pytest.mark.parametrize("times, unit", [
    (["1969-12-31", "1970-06-01", "1972-05-05"], 3), (["1971-01-01", "2012-05-05", "2013-05-05"], 3),
    ([9 * 10**10, 12 * 10**10, 13 * 10**10], 2), ([10**8 - 1, 10**8, 10**8 + 1], 1), ([1, 2, 3], 0)])
def test_the_unit_of_times_is_that_of_the_whole_log(times, unit):
  database, _ = clean(pandas.DataFrame({"user": 1, "item": ["a", "b", "c"], "time": times}))
  assert log.find_unit(database) == unit
