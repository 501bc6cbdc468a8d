"""The corpus: k-core, order, numbering, fingerprint, benchmarks, and what is refused."""

import dataclasses
import json
import os

import numpy as np
import pandas
import pytest

from awrsr_jax.config import default
from awrsr_jax.data import corpus, log, rules
from awrsr_jax.data.log import Interactions

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")


def interactions(rows, titles=None):
  """Returns Interactions of (user, item) or (user, item, time) rows."""
  table = list(zip(*rows, strict=True))
  times = np.array(table[2]) if len(table) == 3 else None
  return Interactions(np.array(table[0]), np.array(table[1]), times, titles or {}, "rows")


def build(found, **settings):
  """Returns the corpus of interactions, by the rules of `config.data`; histories may be shorter than a split wants."""
  data = default().data
  data.update(settings)
  with log.open_database() as database:
    made = log.put(database, found)
    read = log.clean(made, data.min_rating, data.on_bad_row)
    rules.apply_rules(database, data, found.source)
    return corpus.number(database, made, read, data)


@pytest.fixture(autouse=True)
def _allow_short_histories(request, monkeypatch):
  """Most corpora here are too small to be split, which is not what they are about."""
  if "refused" not in request.node.name:
    monkeypatch.setattr(corpus.splits, "check", lambda *_: None)


def make(rows, titles=None):
  """Returns the corpus of all rows."""
  return build(interactions(rows, titles))


def rows_of(made):
  """Returns the (user, item) rows of a corpus in raw ids, sorted."""
  return sorted((user, item) for at, user in enumerate(made.user_ids.tolist())
                for item in made.item_ids[made.history(at)].tolist())


def load_file(path, **settings):
  """Loads a file as `config.data` would."""
  data = default().data
  data.path = str(path)
  data.update(settings)
  return corpus.load(data)


def load_text(tmp_path, content, **settings):
  """Loads a sequences file with this content."""
  path = tmp_path / "a.txt"
  path.write_text(content)
  return load_file(path, **settings)


def shared_file(name):
  """Returns the path of a shared file, or skips."""
  path = os.path.join(SHARED, name)
  if not os.path.exists(path):
    pytest.skip(f"needs ../shared/data/{name}, which is not distributed")
  return path


def draw(seed, users=40, items=25, rows=400):
  """Returns random interactions with many equal times."""
  rng = np.random.default_rng(seed)
  return interactions(list(zip(rng.integers(1, users, rows) * 3, rng.integers(1, items, rows) * 7 + 1,
                               rng.integers(0, 9, rows), strict=True)))


def test_numbering_order_and_titles():
  made = make([(9, 70, 5), (4, 80, 1), (9, 30, 2), (4, 30, 1), (4, 70, 0)], {70: "Seventy", 99: "gone"})
  assert made.user_ids.tolist() == [4, 9] and made.item_ids.tolist() == [0, 30, 70, 80]
  assert made.items.tolist() == [2, 3, 1, 1, 2] and made.items.dtype == np.int32
  assert made.offsets.tolist() == [0, 3, 5] and made.offsets.dtype == np.int64
  assert made.history(1).tolist() == [1, 2] and made.lengths.tolist() == [3, 2] and made.titles == {2: "Seventy"}
  assert (made.num_users, made.num_items, made.num_interactions) == (2, 3, 5)
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.name = "x"


def test_text_ids_are_numbered_too():
  made = make([("b", "x", 1), ("a", "y", 1), ("b", "w", 0)], {"y": "Why"})
  assert made.user_ids.tolist() == ["a", "b"] and made.item_ids.tolist() == ["", "w", "x", "y"]
  assert made.items.tolist() == [3, 1, 2] and made.titles == {3: "Why"}


def test_equal_times_keep_file_order():
  found = draw(0, users=5, rows=2000)
  made = build(found)
  for user in range(made.num_users):
    rows = [n for n in range(2000) if found.users[n] == made.user_ids[user]]
    rows.sort(key=lambda n: found.times[n])  # Python's sort is stable
    assert made.item_ids[made.history(user)].tolist() == found.items[rows].tolist()


def test_without_times_file_order_is_time_order():
  made = make([(2, 5), (1, 9), (2, 4), (1, 3), (2, 5)])
  assert made.item_ids[made.items].tolist() == [9, 3, 5, 4, 5]


@pytest.mark.parametrize("k", [0, 1, 5, 7, 8])
def test_k_core_equals_removing_one_row_at_a_time(k):
  found = draw(1)
  rows = list(range(found.users.size))
  changed = True
  while changed:
    changed = False
    for row in rows:
      users = sum(found.users[other] == found.users[row] for other in rows)
      items = sum(found.items[other] == found.items[row] for other in rows)
      if users < k or items < k:
        rows.remove(row)
        changed = True
        break
  assert rows and (k < 5 or len(rows) < found.users.size)
  kept = sorted(zip(found.users[rows].tolist(), found.items[rows].tolist(), strict=True))
  assert rows_of(build(found, k_core=k)) == kept


def test_k_core_needs_more_than_one_pass():
  rows = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3), (4, 3)]  # dropping user 4 makes item 3 rare, then user 3
  assert rows_of(build(interactions(rows), k_core=2)) == rows[:4]


def test_k_core_of_nothing_names_the_counts():
  with pytest.raises(ValueError, match=r"no users left after k-core 9 \(there were 2 users, 2 items, 3 interactions\)"
                     ".*--config.data.k_core"):
    build(interactions([(1, 1), (1, 2), (2, 1)]), k_core=9)


def test_short_histories_are_refused_or_dropped(tmp_path):
  content = "1 1 2 3\n2 1 2\n3 1 2 3 4\n4 2\n5 3 2 1\n"
  with pytest.raises(ValueError, match=r"2 of 5 users have fewer than 3 interactions \(user 2 has 2\).*"
                     "--config.data.k_core=3"):
    load_text(tmp_path, content)
  with pytest.raises(ValueError, match="3 of 3 users have fewer than 3 .*; raise --config.data.max_history=2"):
    load_text(tmp_path, content, k_core=3, max_history=2)  # cut after k-core
  made = load_text(tmp_path, content, k_core=3)
  assert made.user_ids.tolist() == [1, 3, 5] and made.item_ids.tolist() == [0, 1, 2, 3]


def test_one_item_is_refused(tmp_path):
  with pytest.raises(ValueError, match="1 item cannot be ranked"):
    load_text(tmp_path, "1 5 5 5\n2 5 5 5 5\n")


def renumber(made, seed):
  """Returns the same histories with users and items numbered otherwise."""
  rng = np.random.default_rng(seed)
  items = np.concatenate([[0], rng.permutation(made.num_items) + 1]).astype(np.int32)
  users = rng.permutation(made.num_users)
  histories = [items[made.history(user)] for user in users]
  return dataclasses.replace(made, items=np.concatenate(histories),
                             offsets=np.concatenate([[0], np.cumsum(made.lengths[users])]))


def test_fingerprint_ignores_numbers_and_sees_order():
  found = draw(2)
  made = build(found)
  print_of = corpus.fingerprint(made)
  assert len(print_of) == 64 and print_of == corpus.fingerprint(dataclasses.replace(made, name="y"))
  for seed in range(3):
    assert corpus.fingerprint(renumber(made, seed)) == print_of
  for at in range(0, 399, 7):
    if made.items[at] != made.items[at + 1]:  # two neighbours, of one history or of two
      swapped = made.items.copy()
      swapped[[at, at + 1]] = swapped[[at + 1, at]]
      assert corpus.fingerprint(dataclasses.replace(made, items=swapped)) != print_of
  moved = made.offsets.copy()
  moved[3] += 1
  assert corpus.fingerprint(dataclasses.replace(made, offsets=moved)) != print_of


@pytest.mark.parametrize("name, file, settings", [
    ("ml-1m", "ml-1m.txt", {}), ("ml-1m", "ml-1m.txt", {"k_core": 5}), ("ml-100k", "ml-100k.txt", {}),
    ("ml-100k", "raw/ml-100k.u.data", {"k_core": 5}), ("beauty", "amazon-beauty.txt", {}),
    ("sports", "amazon-sports.txt", {}),
])
def test_benchmarks_are_recognised(name, file, settings):
  made = load_file(shared_file(file), name=name, **settings)
  assert (made.num_users, made.num_items, made.num_interactions) == corpus.BENCHMARKS[name][:3] and made.name == name


def test_another_corpus_is_not_taken_for_a_benchmark(tmp_path):
  with pytest.raises(ValueError) as error:
    load_text(tmp_path, "1 1 2 3\n2 3 2 1\n", name="ml-1m")
  for part in ("not the benchmark ml-1m", "2 users, 3 items, 6 interactions", "6040 users, 3416 items, 999611",
               corpus.BENCHMARKS["ml-1m"][3], "--config.data.name="):
    assert part in str(error.value)


@pytest.mark.parametrize("split", [{"name": "users"}, {"name": "time"}])
def test_a_benchmark_is_one_under_every_split(tmp_path, split):
  path = shared_file("raw/ml-100k.u.data")
  made = load_file(path, name="ml-100k", k_core=5, split=split)
  assert made.name == "ml-100k"
  assert made.description["fingerprint"] != corpus.BENCHMARKS["ml-100k"][3]  # which is of another split
  with pytest.raises(ValueError, match="not the benchmark ml-100k: found 943 users, 1682 items"):
    load_file(path, name="ml-100k", split=split)


def test_equal_counts_in_another_order_are_not_the_benchmark(tmp_path):
  with open(shared_file("ml-100k.txt")) as file:
    lines = file.read().split("\n")
  user, *items = lines[0].split()
  items[0], items[1] = items[1], items[0]
  with pytest.raises(ValueError, match="not the benchmark ml-100k: found 943 users, 1349 items, 99287 interactions"):
    load_text(tmp_path, "\n".join([" ".join([user, *items]), *lines[1:]]), name="ml-100k")


def read_map(name):
  """Returns raw id -> published id, of a shared map."""
  with open(shared_file(name), encoding="utf-8") as file:
    rows = [line.split("\t") for line in file]
  return {int(row[1]): int(row[0]) for row in rows if row[0].isdigit()}


def test_raw_ml_1m_gives_the_published_sequences():
  """On the half of the users whose ratings are at hand, through the published id maps."""
  items, users = read_map("ml-1m.items.tsv"), read_map("ml-1m.users.tsv")
  raw = load_file(shared_file("raw/ml-1m.ratings-users-1-2999.dat"))
  published = load_file(shared_file("ml-1m.txt"))
  assert raw.num_users == 2999 and raw.num_items == 3615
  position = {user: at for at, user in enumerate(published.user_ids.tolist())}
  for at, user in enumerate(raw.user_ids.tolist()):
    mapped = [items[item] for item in raw.item_ids[raw.history(at)].tolist() if item in items]
    assert mapped == published.item_ids[published.history(position[users[user]])].tolist()


def test_the_fingerprint_itself_never_changes():
  """BENCHMARKS, and every corpus.json, hold fingerprints: a new algorithm would orphan them."""
  made = make([(1, 1), (1, 2), (1, 3), (2, 3), (2, 1), (2, 2), (2, 1)])
  assert corpus.fingerprint(made) == "d19c85fdcf91e73cc45c3cb1c5bc8f923221d5737f86e67852885c9e496fec50"


def test_numbering_hash_follows_raw_ids():
  first, same, other = (make([(1, 1), (1, item), (2, 1)]) for item in (2, 2, 3))
  assert corpus.describe(first)["numbering"] == corpus.describe(same)["numbering"]
  assert corpus.describe(first)["numbering"] != corpus.describe(other)["numbering"]
  assert corpus.describe(first)["fingerprint"] == corpus.describe(other)["fingerprint"]


def test_description_is_plain_json():
  made = make([(1, 1), (1, 2), (1, 3), (2, 3), (2, 1), (2, 2), (2, 1)])
  described = json.loads(json.dumps(corpus.describe(made)))
  assert described == corpus.describe(made)
  assert described["users"] == 2 and described["items"] == 3 and described["interactions"] == 7
  assert described["mean_length"] == 3.5 and described["max_length"] == 4
  assert described["fingerprint"] == corpus.fingerprint(made)


def synthetic_data(**settings):
  """Returns `config.data` of a small synthetic corpus."""
  data = default().data
  data.name = "synthetic"
  data.synthetic.num_users, data.synthetic.num_items, data.synthetic.length = 12, 60, 8
  data.update(settings)
  return data


def test_the_oracle_speaks_in_item_numbers():
  data = synthetic_data()
  made = corpus.load(data)
  assert made.num_items < 60  # some items never occur: numbers and the law's ids differ
  histories = np.array([[0, 0], [0, 3], [made.num_items, 1]])
  scores = made.oracle(histories)
  law = corpus.synthetic.oracle_scores(data.synthetic)(made.item_ids[histories])
  assert scores.shape == (3, made.num_items + 1) and (scores[:, 0] == -np.inf).all()
  for number in range(1, made.num_items + 1):
    np.testing.assert_array_equal(scores[:, number], law[:, made.item_ids[number]])


def test_no_oracle_where_the_law_no_longer_holds(tmp_path):
  assert load_text(tmp_path, "1 1 2 3\n").oracle is None
  data = synthetic_data(k_core=4)
  data.synthetic.num_users = 40
  assert corpus.load(data).oracle is None


def test_the_format_alone_asks_for_synthetic_data_but_not_with_a_path(tmp_path):
  made = corpus.load(synthetic_data(name="", format="synthetic"))
  assert made.num_users == 12 and "seed 0" in made.name
  with pytest.raises(ValueError, match="a table and config.data.name=synthetic are two sources"):
    corpus.load(synthetic_data(), table={})
  with pytest.raises(ValueError, match="leave out --config.data.path"):
    load_text(tmp_path, "1 1 2 3\n", format="synthetic")


def test_dates_of_a_split_by_time_may_lie_before_1973():
  table = pandas.DataFrame({"user": [1] * 4 + [2] * 4, "item": list("abcd") * 2,
                            "time": ["1969-12-30", "1970-06-01", "1972-01-01", "1972-05-05"] * 2})
  data = default().data
  data.k_core = 0
  data.split.update(name="time", valid_from="1971-01-01", test_from="1972-02-01")
  found = corpus.load(data, table)
  assert "validation from 1971-01-01 00:00, test from 1972-02-01 00:00" in found.split.words
  assert {name: places.tolist() for name, places in found.split.targets.items()} == {"valid": [2, 6], "test": [3, 7]}
