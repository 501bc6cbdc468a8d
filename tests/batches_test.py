"""Batches: rows, buckets and streams against loops; every batch is a function of (seed, step) for any processes."""

import contextlib
import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from conftest import from_arrays

from awrsr_jax.config import default
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import splits

LENGTHS = (3, 4, 5, 6, 7, 9, 12, 3, 17, 4, 10, 8, 3, 24, 5, 4)


def histories_of(lengths):
  """Histories of these lengths; every item number occurs once, so that an item names its user and place."""
  return [list(range(end - length + 1, end + 1)) for end, length in zip(np.cumsum(lengths), lengths, strict=True)]


@pytest.fixture
def corpus(make_corpus):
  """16 users."""
  return make_corpus(histories_of(LENGTHS))


@pytest.fixture
def many(make_corpus):
  """128 users: a batch of 40 rows has several buckets."""
  return make_corpus(histories_of(8 * LENGTHS))


def make_config(**values):
  """Returns a config with values at dotted keys ("train__batch_size" is train.batch_size)."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in {
      "data__max_length": 6, "data__buckets": 3, "train__batch_size": 40, "train__epochs": 3, "eval__batch_size": 4,
      **values}.items()})
  return config


def loop_rows(corpus, n, windows):
  """The rows of training_rows as a set of tuples of items, by a loop over users."""
  rows = []
  for user in range(corpus.num_users):
    part = corpus.history(user).tolist()[:-2]
    while len(part) >= 2:
      rows.append(tuple(part[-n - 1:]))
      if not windows:
        break
      part = part[:-n]
  return rows


def read_rows(batch):
  """The rows of a training batch as (length, inputs, targets), padding taken off and checked."""
  rows = []
  for inputs_BxL, targets_BxL in zip(batch["inputs"], batch["targets"], strict=True):
    for inputs, targets in zip(inputs_BxL, targets_BxL, strict=True):
      real = inputs > 0
      np.testing.assert_array_equal(real, targets > 0)
      np.testing.assert_array_equal(real, np.arange(len(real)) >= len(real) - real.sum())
      if real.any():
        rows.append((len(real), tuple(inputs[real].tolist()), tuple(targets[real].tolist())))
  return rows


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype


def concatenate(parts):
  """The parts of a batch, one after another, of each bucket."""
  return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


# --- rows


@pytest.mark.parametrize("n", [1, 2, 3, 6, 21, 22, 50])
@pytest.mark.parametrize("long_history", ["newest", "windows"])
def test_training_rows_equal_a_loop_over_users(corpus, n, long_history):
  starts, ends = data_batches.training_rows(corpus, n, long_history)
  found = [tuple(corpus.items[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]
  assert sorted(found) == sorted(loop_rows(corpus, n, long_history == "windows"))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_windows_use_every_training_target_once(corpus, n):
  starts, ends = data_batches.training_rows(corpus, n, "windows")
  pairs = [(corpus.items[at - 1], corpus.items[at]) for start, end in zip(starts, ends, strict=True)
           for at in range(start + 1, end)]
  expected = [(a, b) for user in range(corpus.num_users) for a, b in itertools.pairwise(corpus.history(user)[:-2])]
  assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize("long_history", ["newest", "windows"])
def test_rows_hold_no_validation_or_test_item(corpus, long_history):
  starts, ends = data_batches.training_rows(corpus, 4, long_history)
  held_out = {item for user in range(corpus.num_users) for item in corpus.history(user)[-2:]}
  assert not held_out & {item for start, end in zip(starts, ends, strict=True) for item in corpus.items[start:end]}


def test_nothing_to_train_on_is_an_error(make_corpus):
  with pytest.raises(ValueError, match="none of 2 users has 2 items to train on"):
    data_batches.training_rows(make_corpus([[1, 2, 3], [3, 2, 1]]), 5, "newest")


def test_gather_rows_takes_the_newest_and_pads_on_the_left():
  items = np.array([5, 6, 7, 8, 9], np.int64)
  got = data_batches.gather_rows(items, np.array([0, 3, 2, 0]), np.array([5, 5, 2, 2]), 4)
  np.testing.assert_array_equal(got, [[6, 7, 8, 9], [0, 0, 8, 9], [0, 0, 0, 0], [0, 0, 5, 6]])
  assert got.dtype == np.int32


# --- buckets


def padded(lengths, buckets, batches, multiple):
  """Padded positions of a batch, its filling rows included, with every row in the smallest bucket that holds it."""
  rows = dict.fromkeys(buckets, 0)
  for length in lengths:
    rows[min(bucket for bucket in buckets if bucket >= length)] += 1
  return sum(math.ceil(math.ceil(count / batches) / multiple) * multiple * bucket for bucket, count in rows.items())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("batches, multiple", [(1, 1), (4, 1), (1, 4), (3, 2)])
def test_buckets_waste_the_least_of_all_choices(seed, count, batches, multiple):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 10, size=rng.integers(1, 30)) ** rng.integers(1, 3)
  buckets = data_batches.plan_buckets(lengths, count, batches, multiple)
  grid = sorted(set(lengths.tolist()))
  least = min(padded(lengths, (*few, grid[-1]), batches, multiple) for size in range(min(count, len(grid)))
              for few in itertools.combinations(grid[:-1], size))
  assert padded(lengths, buckets, batches, multiple) == least
  assert list(buckets) == sorted(set(buckets)) and len(buckets) <= count and buckets[-1] == grid[-1]
  assert all(isinstance(bucket, int) for bucket in buckets)


# --- training batches


@pytest.mark.parametrize("name", ["bce", "bpr", "gbce"])
def test_a_row_of_all_items_leaves_no_negatives_and_is_refused(make_corpus, name):
  histories = [[1, 2, 3, 4, 1, 5, 5], [5, 2, 1, 2, 1, 5, 3, 1], [5, 4, 3, 2, 1, 5, 4, 3]]
  corpus = make_corpus(histories)
  config = make_config(loss__name=name)
  with pytest.raises(ValueError, match=f"config.loss.name={name} draws .* one of 6 holds all 5; use"):
    data_batches.training_batches(corpus, config)
  for other in (make_config(loss__name="softmax"), make_config(loss__name=name, data__max_length=3)):
    assert len(data_batches.training_batches(corpus, other)) == 3
  assert len(data_batches.training_batches(make_corpus(histories[:2]), config)) == 3  # as long, and it leaves some


def test_more_training_interactions_than_popularity_counts_are_refused(make_corpus):
  corpus = make_corpus([[1, 2, 3, 4]])
  config = make_config(loss__name="sampled_softmax", loss__negatives="popularity")
  for more, refused in ((0, False), (1, True)):
    many = dataclasses.replace(corpus, counts=np.array([0, 2**31 - 3, 1, 1, more]))
    assert len(data_batches.training_batches(many, make_config())) == 3
    with pytest.raises(ValueError, match="and there are 2147483648; use") if refused else contextlib.nullcontext():
      data_batches.training_batches(many, config)


@pytest.mark.parametrize("long_history", ["newest", "windows"])
@pytest.mark.parametrize("batch_size", [1, 4, 40, 64, 500])
def test_every_row_comes_once_an_epoch_shifted_by_one_in_the_smallest_bucket_that_holds_it(
    many, long_history, batch_size):
  config = make_config(data__long_history=long_history, train__batch_size=batch_size)
  batches = data_batches.training_batches(many, config)
  expected = sorted(loop_rows(many, 6, long_history == "windows"))
  assert batches.steps_per_epoch == -(-len(expected) // batch_size) and len(batches) == 3 * batches.steps_per_epoch
  for epoch in range(3):
    rows = []
    for step in range(batches.steps_per_epoch):
      found = read_rows(batches[epoch * batches.steps_per_epoch + step])
      assert all(length == min(bucket for bucket in batches.buckets if bucket >= len(inputs))
                 for length, inputs, _ in found)
      assert all(inputs[1:] == targets[:-1] for _, inputs, targets in found)
      rows += [(*inputs, targets[-1]) for _, inputs, targets in found]
    assert sorted(rows) == expected


@pytest.mark.parametrize("batch_size, multiple", [(1, 1), (9, 1), (20, 4), (38, 2), (40, 8)])
def test_every_batch_has_its_share_of_every_bucket_in_the_same_shapes(many, batch_size, multiple):
  config = make_config(data__long_history="windows", train__batch_size=batch_size)
  batches = data_batches.training_batches(many, config)
  rows = loop_rows(many, 6, windows=True)
  smallest = lambda length: min(bucket for bucket in batches.buckets if bucket >= length)  # noqa: E731
  shares = [sum(smallest(len(row) - 1) == bucket for row in rows) / batches.steps_per_epoch
            for bucket in batches.buckets]
  assert len(shares) > (batch_size > 1) and batches.multiple == multiple
  assert list(batches.sizes) == [math.ceil(math.ceil(share) / multiple) * multiple for share in shares]
  shapes = list(zip(batches.sizes, batches.buckets, strict=True))
  for step in range(len(batches)):
    batch = batches[step]
    for name in ("inputs", "targets"):
      assert [x.shape for x in batch[name]] == shapes and {x.dtype for x in batch[name]} == {np.dtype(np.int32)}
    counts = [(x > 0).any(axis=1).sum() for x in batch["inputs"]]
    assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))


def test_rows_of_all_lengths_share_every_batch(make_corpus):
  histories = [[1] * (3 + length) for length in np.repeat([1, 5], 40)]
  batches = data_batches.training_batches(make_corpus(histories), make_config(train__batch_size=16, train__epochs=1))
  assert batches.buckets == (1, 5) and len(batches) == 5
  for step in range(len(batches)):
    assert [(x > 0).any(axis=1).sum() for x in batches[step]["inputs"]] == [8, 8]


@pytest.mark.parametrize("processes", [1, 2])
def test_targets_per_step_is_the_mean_over_an_epoch_of_the_global_batch(many, processes):
  whole = data_batches.training_batches(many, make_config(data__long_history="windows"))
  part = data_batches.training_batches(many, make_config(data__long_history="windows"),
                                       ((0,), processes))
  counts = [sum((x > 0).sum() for x in whole[step]["targets"]) for step in range(whole.steps_per_epoch)]
  assert part.targets_per_step == pytest.approx(np.mean(counts), rel=1e-12) and len(set(counts)) > 1


def test_bucketing_loses_nothing(many):
  def rows_of(buckets):
    batches = data_batches.training_batches(many, make_config(data__buckets=buckets))
    return [(inputs, targets) for step in range(batches.steps_per_epoch)
            for _, inputs, targets in read_rows(batches[step])], batches
  bucketed, batches = rows_of(3)
  whole, one_length = rows_of(1)
  assert len(batches.buckets) == 3 and one_length.buckets == (6,)
  assert sorted(bucketed) == sorted(whole)


@pytest.mark.parametrize("batch_size", [1, 40, 500])
def test_the_bounds_of_an_epoch_are_those_of_its_batches(many, batch_size):
  batches = data_batches.training_batches(many, make_config(train__batch_size=batch_size))
  for epoch in range(2):
    bounds = batches.epoch_bounds(epoch)
    assert [x.shape for pair in bounds for x in pair] == [
        (batches.steps_per_epoch, size) for size in batches.sizes for _ in range(2)]
    for step in range(batches.steps_per_epoch):
      rows = [data_batches.gather_rows(many.items, starts[step], ends[step], length + 1)
              for (starts, ends), length in zip(bounds, batches.buckets, strict=True)]
      expected = batches[epoch * batches.steps_per_epoch + step]
      for found, inputs, targets in zip(rows, expected["inputs"], expected["targets"], strict=True):
        np.testing.assert_array_equal(found[:, :-1], inputs)
        np.testing.assert_array_equal(np.where(inputs > 0, found[:, 1:], 0), targets)


def test_a_batch_is_a_pure_function_of_seed_and_step(many):
  batches = data_batches.training_batches(many, make_config())
  forward = [batches[step] for step in range(len(batches))]
  again = {step: batches[step] for step in reversed(range(len(batches)))}  # other order, same instance
  for step in np.random.default_rng(0).permutation(len(batches)):  # other order, another instance, numpy integers
    fresh = data_batches.training_batches(many, make_config())
    assert_same(fresh[step], forward[step])
    assert_same(again[int(step)], forward[step])


def test_more_epochs_do_not_change_the_first_ones(many):
  few, many = (data_batches.training_batches(many, make_config(train__epochs=epochs)) for epochs in (2, 5))
  for step in range(len(few)):
    assert_same(many[step], few[step])


def test_epochs_and_seeds_differ(many):
  def epoch_of(batches, epoch):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [[x.tolist() for x in batches[step]["targets"]] for step in steps]
  batches = data_batches.training_batches(many, make_config())
  other = data_batches.training_batches(many, make_config(seed=1))
  orders = [epoch_of(batches, 0), epoch_of(batches, 1), epoch_of(batches, 2), epoch_of(other, 0), epoch_of(other, 1)]
  assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_split_the_same_global_training_batch(many, processes):
  whole = data_batches.training_batches(many, make_config())
  parts = [data_batches.training_batches(many, make_config(), ((process,), processes))
           for process in range(processes)]
  assert {len(part) for part in parts} == {len(whole)} and len(whole.buckets) > 1
  for step in range(len(whole)):
    split = [part[step] for part in parts]
    assert {tuple(map(len, rows["inputs"])) for rows in split} == {tuple(size // processes for size in whole.sizes)}
    assert_same(concatenate(split), whole[step])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_1_2_4_and_8_devices_have_the_same_global_batches_with_equal_pieces(many, accumulate):
  config = make_config(data__long_history="windows", train__batch_size=80, train__accumulate=accumulate)
  whole = data_batches.training_batches(many, config)
  assert len(whole.buckets) > 1 and whole.steps_per_epoch == 2
  assert all(size % (8 * accumulate) == 0 for size in whole.sizes)
  for count in (2, 4, 8):
    parts = [data_batches.training_batches(many, config, ((part,), count)) for part in range(count)]
    for step in range(whole.steps_per_epoch + 1):
      assert_same(concatenate([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("count", [3, 16])
def test_other_numbers_of_devices_have_the_same_rows_in_a_batch_and_their_own_filling(many, count):
  config = make_config(train__batch_size=48)
  whole = data_batches.training_batches(many, config)
  parts = [data_batches.training_batches(many, config, ((part,), count)) for part in range(count)]
  assert len(whole.buckets) > 1 and len(whole) == 9
  assert all(part.buckets == whole.buckets and part.multiple == math.lcm(8, count) for part in parts)
  for step in range(len(whole)):
    split = [part[step] for part in parts]
    assert all([len(x) for x in part["inputs"]] == [size // count for size in parts[0].sizes] for part in split)
    assert read_rows(concatenate(split)) == read_rows(whole[step])


@pytest.mark.parametrize("start", [0, 1, 5, 7])
def test_a_stream_goes_on_from_any_step(many, start):
  batches = data_batches.training_batches(many, make_config(data__long_history="windows", train__epochs=2))
  streamed = list(data_batches.stream(batches, start))
  assert len(batches) == 8 and len(batches.buckets) > 1 and len(streamed) == len(batches) - start
  for step, batch in enumerate(streamed, start):
    assert_same(batch, batches[step])


def test_a_stream_from_the_end_is_empty(many):
  batches = data_batches.training_batches(many, make_config())
  assert list(data_batches.stream(batches, len(batches))) == []


def test_a_process_may_take_any_parts_in_ascending_order(corpus, many):
  whole = data_batches.training_batches(many, make_config())
  some = data_batches.training_batches(many, make_config(), ((1, 3), 4))
  for step in range(len(whole)):
    assert_same(some[step], jax.tree.map(lambda x: x.reshape(4, -1, x.shape[1])[[1, 3]].reshape(-1, x.shape[1]),
                                         whole[step]))
  everyone = list(data_batches.ranking_batches(corpus, make_config(eval__batch_size=8), "test"))
  for batch, parts in zip(everyone, data_batches.ranking_batches(
      corpus, make_config(eval__batch_size=8), "test", ((0, 3), 4)), strict=True):
    assert_same(parts, {name: rows[[0, 1, 6, 7]] for name, rows in batch.items()})


# --- ranking batches


@pytest.mark.parametrize("split,back", [("valid", 2), ("test", 1)])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_ranking_batches_hold_every_user_once_with_history_and_target(corpus, split, back, batch_size):
  batches = data_batches.ranking_batches(corpus, make_config(eval__batch_size=batch_size), split)
  assert sorted(batches.users.tolist()) == list(range(corpus.num_users))
  users = iter(batches.users.tolist())
  count = 0
  for batch in batches:
    count += 1
    assert batch.keys() == {"inputs", "seen", "target", "mask"}
    assert len({len(rows) for rows in batch.values()} | {batch_size}) == 1
    assert [batch[name].dtype for name in ("inputs", "seen", "target", "mask")] == [np.int32] * 3 + [np.float32]
    for inputs, seen, target, mask in zip(batch["inputs"], batch["seen"], batch["target"], batch["mask"], strict=True):
      if not mask:
        assert target == 0 and not inputs.any() and not seen.any()
        continue
      history = corpus.history(next(users))
      known = history[:-back]
      assert mask == 1 and target == history[-back]
      np.testing.assert_array_equal(seen, [0] * (len(seen) - len(known)) + known.tolist())
      newest = known[-6:]
      np.testing.assert_array_equal(inputs, [0] * (len(inputs) - len(newest)) + newest.tolist())
  assert next(users, None) is None and count == len(batches)


def test_ranking_batches_can_be_read_again(corpus):
  batches = data_batches.ranking_batches(corpus, make_config(eval__protocol="uniform100"), "test")
  for first, second in zip(batches, batches, strict=True):
    assert_same(first, second)


def test_seen_is_as_wide_as_a_bucket_or_n_doubled(corpus):
  batches = data_batches.ranking_batches(corpus, make_config(eval__batch_size=1), "test")
  for batch in batches:
    known = (batch["seen"] > 0).sum()
    if known > 6:
      expected = next(6 * 2 ** doubling for doubling in range(1, 5) if 6 * 2 ** doubling >= known)
    else:
      expected = min(bucket for bucket in batches.buckets if bucket >= known)
    assert batch["seen"].shape == (1, expected) and batch["inputs"].shape == (1, min(expected, 6))
  assert {batch["seen"].shape[1] for batch in batches} == {*batches.buckets, 12, 24}


@pytest.mark.parametrize("protocol", ["full", "uniform100"])
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_split_the_same_global_ranking_batch(corpus, protocol, split, processes):
  config = make_config(eval__protocol=protocol, eval__batch_size=12)  # of 16 users: the last batch has 4
  whole = list(data_batches.ranking_batches(corpus, config, split))
  parts = [list(data_batches.ranking_batches(corpus, config, split, ((process,), processes)))
           for process in range(processes)]
  assert len(whole) == 2
  for step, batch in enumerate(whole):
    split_batch = [part[step] for part in parts]
    assert {len(rows["target"]) for rows in split_batch} == {12 // processes}
    assert_same(concatenate(split_batch), batch)


# --- sampled candidates


def skewed_corpus():
  """600 users of 5 items out of 900; items 601 to 900 are three times as frequent in training; 1000 only held out."""
  rng = np.random.default_rng(0)
  weights = np.r_[np.ones(600), 3 * np.ones(300)]
  items = np.stack([rng.choice(900, 5, replace=False, p=weights / weights.sum()) + 1 for _ in range(600)])
  items[:, 3] = 1000  # validation item of everyone
  items[:, 0] = np.arange(600) % 900 + 1
  offsets = np.arange(601) * 5
  return from_arrays(items.ravel().astype(np.int32), offsets, splits.leave_one_out(offsets), 1000)


@pytest.mark.parametrize("protocol", ["uniform100", "popular100"])
@pytest.mark.parametrize("split,back", [("valid", 2), ("test", 1)])
def test_candidates_are_distinct_and_outside_history_and_target(protocol, split, back):
  corpus = skewed_corpus()
  batches = data_batches.ranking_batches(corpus, make_config(eval__protocol=protocol, eval__batch_size=128), split)
  found = np.concatenate([batch["candidates"][batch["mask"] > 0] for batch in batches])
  assert found.shape == (600, 100) and found.dtype == np.int32
  for user, candidates in zip(batches.users, found, strict=True):
    assert len(set(candidates.tolist())) == 100
    history = corpus.history(user)
    assert not set(candidates.tolist()) & set(history[:len(history) - back + 1].tolist())
    assert candidates.min() >= 1 and candidates.max() <= corpus.num_items


def candidates_of(corpus, split="test", **values):
  batches = data_batches.ranking_batches(corpus, make_config(**values), split)
  found = np.concatenate([batch["candidates"][batch["mask"] > 0] for batch in batches])
  return found[np.argsort(batches.users)]


def test_candidates_are_drawn_once(monkeypatch):
  batches = data_batches.ranking_batches(skewed_corpus(), make_config(eval__protocol="uniform100"), "valid")
  first = [batch["candidates"].copy() for batch in batches]
  monkeypatch.delattr(data_batches.RankingBatches, "_candidates")
  jax.tree.map(np.testing.assert_array_equal, first, [batch["candidates"] for batch in batches])


def test_candidates_are_a_function_of_seed_split_and_user_only():
  corpus, protocol = skewed_corpus(), {"eval__protocol": "popular100"}
  found = candidates_of(corpus, eval__batch_size=128, **protocol)
  np.testing.assert_array_equal(candidates_of(corpus, eval__batch_size=7, data__max_length=3, **protocol), found)
  assert (candidates_of(corpus, seed=1, **protocol) != found).any(axis=1).all()
  assert (candidates_of(corpus, split="valid", **protocol) != found).any(axis=1).all()
  assert (found[0] != found[1]).any()


def test_uniform_candidates_are_uniform():
  counts = np.bincount(candidates_of(skewed_corpus(), eval__protocol="uniform100").ravel(), minlength=1001)[1:]
  expected = 600 * 100 / 1000
  assert abs(counts - expected)[:999].max() < 5 * expected ** 0.5  # of 999 items, each about Poisson
  assert abs(counts[:600].mean() / counts[600:999].mean() - 1) < 0.03
  assert counts[999] == 0  # in everyone's history


def test_popular_candidates_follow_the_training_counts():
  corpus = skewed_corpus()
  popularity = corpus.counts[1:]
  counts = np.bincount(candidates_of(corpus, eval__protocol="popular100").ravel(), minlength=1001)[1:]
  assert counts[popularity == 0].sum() == 0
  # Drawing without replacement flattens a little: P(drawn) is about 1 - exp(-draws * share).
  for times in (1, 2, 4):
    assert (popularity == times).sum() > 50
    chance = 1 - np.exp(-100 * times / popularity.sum())
    assert abs(counts[popularity == times].mean() / 600 / chance - 1) < 0.1


def test_training_counts_leave_out_held_out_items(make_corpus):
  counts = make_corpus([[1, 2, 1, 3, 1], [2, 2, 4, 5]]).counts
  np.testing.assert_array_equal(counts, [0, 2, 3, 0, 0, 0])


@pytest.mark.parametrize("protocol,items", [("uniform100", 106), ("popular100", 106)])
def test_too_few_items_to_draw_from_are_an_error(make_corpus, protocol, items):
  def ask(count):  # the longest history knows 5 items with its target
    histories = [[1, 2, 3, 4, 5]] + [[item, item, 1, 2] for item in range(1, count + 1)]
    return data_batches.ranking_batches(make_corpus(histories), make_config(eval__protocol=protocol), "test")
  with pytest.raises(ValueError, match=f"config.eval.protocol={protocol} draws 100 items .* of 104 items"):
    ask(104)
  assert next(iter(ask(105)))["candidates"].shape == (4, 100)
