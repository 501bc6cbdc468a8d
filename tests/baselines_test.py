"""Baselines: scores by hand and against loops; they learn from training parts alone, and rank as every model does."""

import dataclasses
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from awrsr_jax import baselines
from awrsr_jax.config import default, finalize
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import prepared, splits
from awrsr_jax.engine import ranking

ROOT = pathlib.Path(__file__).parent.parent
ITEMS = 24
# Trained on are 1 2 3, 1 2 2 and 3 1 2.
BY_HAND = [[1, 2, 3, 4, 5], [1, 2, 2, 5, 1], [3, 1, 2, 3, 6]]
TEXT = "".join(f"{user} {' '.join(str(1 + (user * user + k * k) % 11) for k in range(5 + user % 3))}\n"
               for user in range(1, 30))


def make_config(**values):
  """Returns a finalized config, with values at dotted keys ("eval__batch_size")."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in {
      "data__max_length": 6, "data__buckets": 2, "eval__batch_size": 16, **values}.items()})
  return finalize(config)


def draw_histories():
  """Histories with repeats, popular items and an item that nobody has; the first one has the last item early."""
  rng = np.random.default_rng(3)
  drawn = [np.minimum(rng.geometric(0.15, size=rng.integers(4, 15)), ITEMS - 2).tolist() for _ in range(40)]
  return [[5, ITEMS, 5, ITEMS, 1], *drawn]


@pytest.fixture
def corpus(make_corpus):
  return make_corpus(draw_histories())


@pytest.fixture(params=[1, 60, 1 << 22])
def chunk(request, monkeypatch):
  """Users, and items, a few at a time or all at once."""
  monkeypatch.setattr(corpora, "CHUNK", request.param)
  return request.param


def left_pad(histories):
  """Histories as an array (B, S)."""
  length = max(map(len, histories))
  return np.array([[0] * (length - len(history)) + list(history) for history in histories], np.int32)


def training_parts(corpus):
  """The training part of every user."""
  return [corpus.items[start:end].tolist() for start, end in zip(corpus.offsets, corpus.split.train_ends, strict=False)]


def loop_popularity(corpus, _):
  """popularity by its definition: (history -> I + 1 scores)."""
  trained = [item for part in training_parts(corpus) for item in part]
  return lambda history: [trained.count(item) for item in range(corpus.num_items + 1)]


def loop_last_item(corpus, _):
  """last item by its definition."""
  pairs = [pair for part in training_parts(corpus) for pair in itertools.pairwise(part)]
  popularity = loop_popularity(corpus, _)([])
  return lambda history: [pairs.count((history[-1] if history else 0, item)) + popularity[item] / (1 + sum(popularity))
                          for item in range(corpus.num_items + 1)]


def loop_neighbours(corpus, neighbours):
  """item-kNN by its definition; sums are correctly rounded."""
  parts, numbers = [set(part) for part in training_parts(corpus)], range(corpus.num_items + 1)
  users = [{user for user, part in enumerate(parts) if item in part} for item in numbers]
  cosine = lambda a, b: float(np.float32(len(users[a] & users[b]) / math.sqrt(len(users[a]) * len(users[b]))))  # noqa: E731
  lists = []
  for item in numbers:
    others = {other: cosine(item, other) for other in numbers if other != item and users[other] & users[item]}
    nearest = sorted(others, key=lambda other: (-others[other], other))[:neighbours]
    lists.append({other: others[other] for other in nearest})
  popularity = loop_popularity(corpus, neighbours)([])

  def score(history):
    sums = [math.fsum(lists[item].get(other, 0) for other in set(history)) for item in numbers]
    return [total or popularity[item] / (1 + sum(popularity)) - 1 for item, total in enumerate(sums)]
  return score


LOOPS = {"popularity": loop_popularity, "last item": loop_last_item, "item-kNN": loop_neighbours}


def loop_rank(scores, target, seen):
  """The rank by its definition."""
  rivals = [scores[item] for item in range(1, len(scores)) if item != target and item not in set(seen)]
  return 1 + sum(score > scores[target] for score in rivals) + sum(score == scores[target] for score in rivals) / 2


def make_histories(num_items):
  """Histories of many kinds: empty, repeated items, padding."""
  rng = np.random.default_rng(9)
  return [[], [3], [3, 3, 1], [num_items], *(rng.integers(1, num_items + 1, size=n).tolist() for n in range(1, 20))]


# --- scores


def test_popularity_by_hand(make_corpus):
  score = baselines.learn_popularity(make_corpus(BY_HAND))
  np.testing.assert_array_equal(score(left_pad([[1, 2], [6]])), [[0, 3, 4, 2, 0, 0, 0]] * 2)


def test_the_last_item_by_hand(make_corpus):
  score = baselines.learn_transitions(make_corpus(BY_HAND))
  np.testing.assert_allclose(score(left_pad([[3, 1], [1, 2], [2, 3], [4], []])), [
      [0, 0.3, 3.4, 0.2, 0, 0, 0],  # 1 2 three times
      [0, 0.3, 1.4, 1.2, 0, 0, 0],  # 2 2 and 2 3; not 3 3, which no user has
      [0, 1.3, 0.4, 0.2, 0, 0, 0],  # 3 1; not 3 4, which is held out
      [0, 0.3, 0.4, 0.2, 0, 0, 0], [0, 0.3, 0.4, 0.2, 0, 0, 0]], rtol=1e-15)


def test_item_knn_by_hand(make_corpus):
  corpus = make_corpus(BY_HAND)
  near = 2 / math.sqrt(3 * 2)  # 3 with 1, and with 2; 1 and 2 have the same users
  score = baselines.learn_neighbours(corpus, 100)
  np.testing.assert_allclose(score(left_pad([[3, 3, 1], [1], [4], []])), [
      [-1, near, 1 + near, near, -1, -1, -1],  # 3 counts once
      [-1, -0.7, 1, near, -1, -1, -1],
      [-1, -0.7, -0.6, -0.8, -1, -1, -1], [-1, -0.7, -0.6, -0.8, -1, -1, -1]], rtol=1e-7)
  # One neighbour: 1 has 2, 2 has 1, and 3 has 1 (as near as 2), so that it follows 1 and nothing follows 3.
  np.testing.assert_allclose(baselines.learn_neighbours(corpus, 1)(left_pad([[3], [1], [2]])), [
      [-1, -0.7, -0.6, -0.8, -1, -1, -1], [-1, -0.7, 1, near, -1, -1, -1], [-1, 1, -0.6, -0.8, -1, -1, -1]], rtol=1e-7)


@pytest.mark.parametrize("neighbours", [1, 4, 100])
@pytest.mark.parametrize("name", LOOPS)
def test_scores_equal_loops_for_any_chunks(name, neighbours, corpus, chunk):
  histories = make_histories(corpus.num_items)
  padded = left_pad(histories)
  before = padded.copy()
  got = baselines.BASELINES[name](corpus, neighbours)(padded)
  np.testing.assert_array_equal(padded, before)
  expected = LOOPS[name](corpus, neighbours)
  np.testing.assert_array_equal(got, [expected(history) for history in histories])  # to the last bit
  assert got.dtype == np.float64 and len(np.unique(got)) > 15


@pytest.mark.parametrize("name", LOOPS)
def test_scores_are_new_each_time(name, corpus):
  score = baselines.BASELINES[name](corpus, 4)
  histories = left_pad(make_histories(corpus.num_items))
  first = score(histories)
  kept = first.copy()
  first[:] = -np.inf  # as who ranks does to items of the history
  np.testing.assert_array_equal(score(histories), kept)


def test_popularity_never_outweighs_a_transition_or_a_neighbour(make_corpus):
  corpus = make_corpus([[1, 2, 9, 9], *[[3, 9, 9]] * 500])
  histories = left_pad([[1]])
  for name in ("last item", "item-kNN"):
    scores = baselines.BASELINES[name](corpus, 5)(histories)[0]
    assert scores[2] > scores[3] > scores[1] > scores[4] and scores[2] == pytest.approx(1, rel=0.01)


# --- what is learnt from


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("make_split", [
    splits.leave_one_out,
    lambda offsets: splits.by_users(offsets, np.arange(len(offsets) - 1), 0.3, 0.3, 0),
    lambda offsets: splits.by_time(offsets, np.diff(offsets) // 2, np.diff(offsets) - 2, "first", "split by time"),
], ids=["leave_one_out", "users", "time"])
def test_held_out_items_change_no_score(name, make_split, make_corpus):
  corpus = make_corpus(draw_histories(), make_split)
  assert corpus.split.train_ends[0] >= 2  # both corpora have ITEMS in it
  position = np.arange(len(corpus.items))
  held_out = position >= corpus.split.train_ends[splits.users_of(corpus.offsets, position)]
  items = np.where(held_out, 1 + (corpus.items + 6) % ITEMS, corpus.items).astype(np.int32)
  other = make_corpus(np.split(items, corpus.offsets[1:-1]), make_split)
  assert corpus.num_items == other.num_items == ITEMS and held_out.sum() > 40
  histories = left_pad(make_histories(ITEMS))
  scores = [baselines.BASELINES[name](each, 4)(histories) for each in (corpus, other)]
  np.testing.assert_array_equal(*scores)


class Files:
  """Items that can only be read in slices, as those of a prepared corpus; knows the longest."""

  def __init__(self, items):
    self._items, self.longest = items, 0

  def __getitem__(self, place):
    self.longest = max(self.longest, place.stop - place.start)
    return self._items[place]


@pytest.mark.parametrize("name", ["last item", "item-kNN"])
def test_items_in_files_are_read_a_part_at_a_time(name, corpus, monkeypatch):
  monkeypatch.setattr(corpora, "CHUNK", 60)
  histories = left_pad(make_histories(corpus.num_items))
  expected = baselines.BASELINES[name](corpus, 4)(histories)
  files = Files(corpus.items)
  got = baselines.BASELINES[name](dataclasses.replace(corpus, items=files), 4)(histories)
  np.testing.assert_array_equal(got, expected)
  assert 40 < files.longest <= 60 < len(corpus.items)


def test_similarities_are_computed_a_part_at_a_time(corpus, monkeypatch):
  blocks, stack = [], baselines.sparse.vstack
  monkeypatch.setattr(baselines.sparse, "vstack", lambda parts, **kw: blocks.extend(parts) or stack(parts, **kw))
  monkeypatch.setattr(corpora, "CHUNK", 60)
  baselines.compare_items(corpus, ITEMS)  # all are kept, so that blocks show what was computed
  assert len(blocks) > 3 and sum(block.shape[0] for block in blocks) == ITEMS + 1
  assert all(block.nnz <= 60 for block in blocks) and max(block.nnz for block in blocks) > 20


# --- ranks


@pytest.mark.parametrize("split, back", [("valid", 2), ("test", 1)])
@pytest.mark.parametrize("name", LOOPS)
def test_ranks_equal_a_loop_over_users(name, split, back, corpus):
  batches = data_batches.ranking_batches(corpus, make_config(), split)
  got = ranking.rank_by(batches, baselines.BASELINES[name](corpus, 4))
  score = LOOPS[name](corpus, 4)
  expected = []
  for user in batches.users.tolist():
    known, target = corpus.history(user)[:-back].tolist(), corpus.history(user)[-back]
    expected.append(loop_rank(score(known), target, known))
  np.testing.assert_array_equal(got, expected)
  assert len(set(expected)) > 10


def test_what_is_measured_is_both_splits_of_every_baseline(corpus, monkeypatch):
  monkeypatch.setattr(baselines, "MOST_SCORES", 3 * (ITEMS + 1))
  sizes, popularity = set(), baselines.BASELINES["popularity"](corpus, 4)
  monkeypatch.setitem(baselines.BASELINES, "popularity",
                      lambda *_: lambda histories: sizes.add(len(histories)) or popularity(histories))
  config = make_config()
  got = baselines.measure(corpus, config, 4)
  assert sizes == {3}  # whatever the number of items, memory is bounded
  assert got["protocol"] == ranking.describe_protocol("full", "leave-one-out") and got["neighbours"] == 4
  assert got["corpus"]["users"] == 41 and list(got["baselines"]) == list(LOOPS)
  for name, found in got["baselines"].items():
    assert list(found) == ["valid", "test", "seconds"] and found["seconds"] > 0
    for split in ("valid", "test"):
      batches = data_batches.ranking_batches(corpus, config, split)
      ranks = ranking.rank_by(batches, baselines.BASELINES[name](corpus, 4))
      assert found[split] == pytest.approx(ranking.summarize(ranks), rel=1e-12)
  assert len({found[split]["mrr"] for found in got["baselines"].values() for split in ("valid", "test")}) == 6


def test_a_known_law_is_the_last_row():
  config = make_config(data__name="synthetic", data__synthetic__num_users=200, data__synthetic__num_items=60,
                       data__synthetic__length=12)
  corpus = corpora.load(config.data)
  found = baselines.measure(corpus, config, 20)["baselines"]
  assert list(found) == [*LOOPS, "best possible"]
  ranks = ranking.rank_by(data_batches.ranking_batches(corpus, config, "test"), corpus.oracle)
  assert found["best possible"]["test"] == ranking.summarize(ranks)
  assert all(found["best possible"]["test"]["ndcg@10"] > found[name]["test"]["ndcg@10"] for name in LOOPS)


# --- the command


@pytest.fixture
def sequences(tmp_path):
  path = tmp_path / "data.txt"
  path.write_text(TEXT)
  return str(path)


def test_the_command_prints_both_splits_and_writes_all_metrics(sequences, tmp_path, capsys):
  config = make_config(data__path=sequences)
  baselines.run(config, 7, str(tmp_path / "found.json"))
  found = json.loads((tmp_path / "found.json").read_text())
  expected = baselines.measure(prepared.load(config.data), config, 7)
  for each in (*found["baselines"].values(), *expected["baselines"].values()):
    assert each.pop("seconds") > 0
  assert found == json.loads(json.dumps(expected))
  counts, protocol, *table = capsys.readouterr().out.splitlines()
  assert "29 users, 11 items" in counts and protocol == expected["protocol"]
  assert table[0].split() == "test hr@10 test ndcg@5 test ndcg@10 test mrr valid ndcg@10 seconds".split()
  assert len({len(line) for line in table}) == 1 and len(table) == 4
  for line, (name, values) in zip(table[1:], expected["baselines"].items(), strict=True):
    shown = [values[split][metric] for split, metric in baselines.SHOWN]
    assert line.startswith(name) and line.split()[-6:-1] == [f"{value:.4f}" for value in shown]
  assert [path.name for path in tmp_path.iterdir() if "found" in path.name] == ["found.json"]


@pytest.mark.parametrize("out", ["", "nowhere/found.json"])
def test_where_nothing_can_be_written_nothing_is_measured(out, sequences, tmp_path, monkeypatch):
  monkeypatch.setattr(baselines, "measure", None)
  with pytest.raises(ValueError, match="--out=.*name a file in a folder"):
    baselines.run(make_config(data__path=sequences), 7, str(tmp_path / out))


@pytest.mark.parametrize("flag, words", [("--neighbours=3", "item-kNN"), ("--neighbours=0", "--neighbours=0"),
                                         ("--config.eval.protocol=uniform100", "ValueError: config.eval.protocol")])
def test_flags_reach_the_command(flag, words, sequences, tmp_path):
  out = tmp_path / "found.json"
  command = [sys.executable, "-m", "awrsr_jax.baselines", f"--config.data.path={sequences}", f"--out={out}", flag]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
  assert (done.returncode == 0) == out.exists() == (flag == "--neighbours=3")
  assert not out.exists() or json.loads(out.read_text())["neighbours"] == 3
