"""Splits: what is trained on and what is ranked, against loops; reports of what was never trained on; fingerprints."""

import dataclasses

import numpy as np
import pandas
import pytest

from awrsr_jax.config import default, finalize
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import splits


def draw(seed=0, users=30, items=20, rows=500):
  """Returns a table of random interactions."""
  rng = np.random.default_rng(seed)
  return pandas.DataFrame({"user": rng.integers(0, users, rows), "item": rng.integers(0, items, rows),
                           "time": rng.integers(0, 100, rows)})


def load(table, **values):
  """Returns the corpus of a table under values of config.data.split."""
  config = default()
  config.data.update_from_flattened_dict({f"split.{key}": value for key, value in values.items()})
  return corpora.load(finalize(config).data, table)


def cases_of(made, part):
  """Returns (user, history, target) in raw ids for each ranked item."""
  cases = []
  for position in made.split.targets[part]:
    user = splits.users_of(made.offsets, np.array([position]))[0]
    history = made.items[made.offsets[user]:position]
    cases.append((made.user_ids[user], made.item_ids[history].tolist(), made.item_ids[made.items[position]]))
  return cases


def test_a_share_of_all_rows_is_not_one_less_for_rounding():
  table = pandas.DataFrame({"user": [1] * 100, "item": range(100), "time": range(1, 101)})
  made = load(table, name="time", valid_from="29%", test_from="57%", target="first")  # 100 * .29 is below 29
  assert cases_of(made, "valid") == [(1, list(range(29)), 29)] and cases_of(made, "test") == [(1, list(range(57)), 57)]


@pytest.mark.parametrize("target", ["last", "first", "all"])
@pytest.mark.parametrize("valid_from, test_from, low, high", [("60", "80", 60, 80), ("50%", "90%", None, None)])
def test_a_split_by_time_equals_a_loop(target, valid_from, test_from, low, high):
  table = draw()
  made = load(table, name="time", valid_from=valid_from, test_from=test_from, target=target)
  if low is None:
    ordered = sorted(table.time)
    low, high = ordered[250], ordered[450]
  rows = table.sort_values("time", kind="stable")
  for part, first, end in (("valid", low, high), ("test", high, 10**9)):
    expected = []
    for user in sorted(set(table.user)):
      history = rows[rows.user == user]
      places = [at for at, moment in enumerate(history.time) if first <= moment < end]
      places = {"last": places[-1:], "first": places[:1], "all": places}[target]
      items = history["item"].tolist()
      expected += [(user, items[:at], items[at]) for at in places]
    assert cases_of(made, part) == expected and expected
  trained = sorted(zip(rows.user[rows.time < low], rows["item"][rows.time < low], strict=True))
  assert trained == sorted((made.user_ids[user], made.item_ids[item]) for user in range(made.num_users)
                           for item in made.items[made.offsets[user]:made.split.train_ends[user]])
  np.testing.assert_array_equal(made.counts[1:], [np.sum(rows["item"][rows.time < low] == item)
                                                  for item in made.item_ids[1:]])


def test_dates_split_times_of_any_unit():
  days = pandas.date_range("2020-01-01", periods=10).tolist() * 5
  table = pandas.DataFrame({"user": np.repeat(range(5), 10), "item": np.arange(50) % 7, "time": days})
  wanted = {"name": "time", "valid_from": "2020-01-06", "test_from": "2020-01-08T12:00"}
  of_dates = load(table, **wanted)
  assert "validation from 2020-01-06 00:00, test from 2020-01-08 12:00" in of_dates.split.words
  for unit in (10**9, 10**6):
    numbers = table.assign(time=[int(day.timestamp() * 10**9) // unit for day in days])
    made = load(numbers, **wanted)
    np.testing.assert_array_equal(made.split.train_ends, of_dates.split.train_ends)
    assert made.description["fingerprint"] == of_dates.description["fingerprint"]
  with pytest.raises(ValueError, match=r"valid_from=2020-01-06 is a date, but the log's times \(0 to 99\) are none"):
    load(draw(), **wanted)


def test_a_split_by_users_holds_whole_users_out():
  table = draw(users=400, rows=4000)
  made = load(table, name="users", valid_share=0.2, test_share=0.3, seed=4)
  held = {part: set(splits.users_of(made.offsets, made.split.targets[part]).tolist()) for part in splits.HELD_OUT}
  assert not held["valid"] & held["test"] and 50 < len(held["valid"]) < 110 and 90 < len(held["test"]) < 150
  for user in range(made.num_users):
    trained = made.split.train_ends[user] - made.offsets[user]
    assert trained == (0 if user in held["valid"] | held["test"] else made.lengths[user])
  for part in splits.HELD_OUT:
    assert (made.split.targets[part] + 1 == made.offsets[1:][sorted(held[part])]).all()
  less = load(table[table.user % 2 == 0], name="users", valid_share=0.2, test_share=0.3, seed=4)
  still = less.user_ids[splits.users_of(less.offsets, less.split.targets["test"])].tolist()
  before = made.user_ids[sorted(held["test"])].tolist()
  assert still == [user for user in before if user % 2 == 0]  # who is held out does not hang on who else is there
  other = load(table, name="users", valid_share=0.2, test_share=0.3, seed=5)
  assert other.split.targets["test"].tolist() != made.split.targets["test"].tolist()


def test_what_was_never_trained_on_is_reported(caplog):
  caplog.set_level("INFO")
  rows = [(1, "a", 1), (1, "b", 2), (1, "c", 5), (2, "a", 1), (2, "b", 2), (2, "new", 8), (3, "b", 8), (3, "a", 9)]
  made = load(pandas.DataFrame(rows, columns=["user", "item", "time"]), name="time", valid_from="4", test_from="7",
              target="all")
  found = made.description["split"]
  assert found["training"] == 4
  assert found["valid"] == {"targets": 1, "new_users": 0, "no_history": 0, "new_items": 1}
  assert found["test"] == {"targets": 3, "new_users": 2, "no_history": 1, "new_items": 1}
  assert "test: of 3 items to rank 1 were never trained on; 2 are of users that were not (1 without any" in caplog.text


def test_a_user_without_history_is_ranked_with_empty_inputs():
  rows = [(1, "a", 1), (1, "b", 2), (1, "c", 5), (2, "a", 1), (2, "b", 2), (3, "b", 8), (3, "a", 9)]
  made = load(pandas.DataFrame(rows, columns=["user", "item", "time"]), name="time", valid_from="4", test_from="7",
              target="first")
  batch, = data_batches.ranking_batches(made, default(), "test")
  assert batch["mask"].sum() == 1 and not batch["seen"].any() and batch["target"].tolist()[0] == 2
  assert batch["target"][1:].sum() == 0


@pytest.mark.parametrize("values, message", [
    ({"name": "time", "valid_from": "80", "test_from": "60"}, r"valid_from=80 \(80\) is not before test_from=60"),
    ({"name": "time", "valid_from": "5000", "test_from": "6000"}, "leaves nothing to rank for valid"),
    ({"name": "users", "valid_share": 1e-9, "test_share": 0.5}, "leaves nothing to rank for valid"),
])
def test_splits_that_leave_nothing_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    load(draw(), **values)


def test_a_log_without_times_has_no_split_by_time(tmp_path):
  (tmp_path / "a.txt").write_text("1 1 2 3\n2 3 2 1\n")
  config = default()
  config.data.path, config.data.split.name = str(tmp_path / "a.txt"), "time"
  with pytest.raises(ValueError, match="the log has no times, or only one; use leave_one_out or users"):
    corpora.load(config.data)


def test_users_of_one_interaction_cannot_be_held_out():
  table = pandas.concat([draw(), pandas.DataFrame({"user": [99], "item": [1], "time": [5]})])
  with pytest.raises(ValueError, match=r"1 of 31 users have fewer than 2 .*\(user 99 has 1\).*k_core=2"):
    load(table, name="users")


def test_the_fingerprint_knows_the_split():
  table = draw()
  prints = [load(table, **values).description["fingerprint"] for values in (
      {}, {"name": "users"}, {"name": "users", "seed": 1}, {"name": "time", "valid_from": "60", "test_from": "80"},
      {"name": "time", "valid_from": "60", "test_from": "81"}, {"name": "time", "valid_from": "61", "test_from": "81"},
      {"name": "time", "valid_from": "60", "test_from": "80", "target": "all"})]
  assert len(set(prints)) == len(prints)
  renamed = table.assign(user=99 - table.user, item=table["item"].map(lambda item: (item * 7) % 20))
  again = load(renamed, name="time", valid_from="60", test_from="80")
  assert again.description["fingerprint"] == prints[3]


def test_a_position_belongs_to_its_user():
  offsets = np.array([0, 3, 4, 9])
  assert splits.users_of(offsets, np.arange(9)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_ranked_items_are_never_trained_on():
  for values in ({}, {"name": "users"}, {"name": "time"}):
    made = load(draw(), **values)
    for positions in made.split.targets.values():
      assert (positions >= made.split.train_ends[splits.users_of(made.offsets, positions)]).all()
    swapped = dataclasses.replace(made.split, words="x")
    assert dataclasses.asdict(swapped).keys() == dataclasses.asdict(made.split).keys()
