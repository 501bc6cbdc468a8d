"""Batches: rows, buckets and streams against loops; every batch is a function of (seed, step) for any processes."""

import itertools

import numpy as np
import pytest
from conftest import from_arrays

from awrsr_jax.config import default
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import splits

LENGTHS = (3, 4, 5, 6, 7, 9, 12, 3, 17, 4, 10, 8, 3, 24, 5, 4)


@pytest.fixture
def corpus(make_corpus):
  """16 users; every item number occurs once, so that an item names its user and place."""
  ends = np.cumsum(LENGTHS)
  return make_corpus([list(range(end - length + 1, end + 1)) for end, length in zip(ends, LENGTHS, strict=True)])


def make_config(**values):
  """Returns a config with values at dotted keys ("train__batch_size" is train.batch_size)."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in {
      "data__max_length": 6, "data__buckets": 3, "train__batch_size": 4, "train__epochs": 3, "eval__batch_size": 4,
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
  for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
    real = inputs > 0
    np.testing.assert_array_equal(real, targets > 0)
    np.testing.assert_array_equal(real, np.arange(len(real)) >= len(real) - real.sum())
    if real.any():
      rows.append((len(real), tuple(inputs[real].tolist()), tuple(targets[real].tolist())))
  return rows


def assert_same(got, expected):
  assert got.keys() == expected.keys()
  for name in got:
    np.testing.assert_array_equal(got[name], expected[name])
    assert got[name].dtype == expected[name].dtype


def concatenate(parts):
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


def padded(lengths, buckets):
  """Padded positions of rows in the smallest bucket that holds each."""
  return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_buckets_waste_the_least_of_all_choices(seed, count):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 10, size=rng.integers(1, 30)) ** rng.integers(1, 3)
  buckets = data_batches.plan_buckets(lengths, count)
  grid = sorted(set(lengths.tolist()))
  least = min(padded(lengths, (*few, grid[-1])) for size in range(min(count, len(grid)))
              for few in itertools.combinations(grid[:-1], size))
  assert padded(lengths, buckets) == least
  assert list(buckets) == sorted(set(buckets)) and len(buckets) <= count and buckets[-1] == grid[-1]
  assert all(isinstance(bucket, int) for bucket in buckets)


# --- training batches


@pytest.mark.parametrize("long_history", ["newest", "windows"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_row_comes_once_an_epoch_shifted_by_one_in_its_own_bucket_or_a_later_one(
    corpus, long_history, batch_size):
  config = make_config(data__long_history=long_history, train__batch_size=batch_size)
  batches = data_batches.training_batches(corpus, config)
  expected = sorted(loop_rows(corpus, 6, long_history == "windows"))
  assert batches.steps_per_epoch == -(-len(expected) // batch_size) and len(batches) == 3 * batches.steps_per_epoch
  for epoch in range(3):
    rows, not_full = [], 0
    for step in range(batches.steps_per_epoch):
      batch = batches[epoch * batches.steps_per_epoch + step]
      assert batch["inputs"].shape == batch["targets"].shape and batch["inputs"].dtype == np.int32
      assert batch["inputs"].shape[0] == batch_size
      found = read_rows(batch)
      longest = max(len(inputs) for _, inputs, _ in found)
      assert found[0][0] == min(bucket for bucket in batches.buckets if bucket >= longest)
      assert all(inputs[1:] == targets[:-1] for _, inputs, targets in found)
      rows += [(*inputs, targets[-1]) for _, inputs, targets in found]
      not_full += len(found) < batch_size
    assert sorted(rows) == expected
    assert not_full == (len(expected) % batch_size > 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_targets_per_step_is_the_mean_over_an_epoch_of_the_global_batch(corpus, processes):
  whole = data_batches.training_batches(corpus, make_config(data__long_history="windows"))
  part = data_batches.training_batches(corpus, make_config(data__long_history="windows"),
                                       ((0,), processes))
  counts = [(whole[step]["targets"] > 0).sum() for step in range(whole.steps_per_epoch)]
  assert part.targets_per_step == pytest.approx(np.mean(counts), rel=1e-12) and len(set(counts)) > 1


def test_bucketing_loses_nothing(corpus):
  def rows_of(buckets):
    batches = data_batches.training_batches(corpus, make_config(data__buckets=buckets))
    return [(inputs, targets) for step in range(batches.steps_per_epoch)
            for _, inputs, targets in read_rows(batches[step])], batches
  bucketed, batches = rows_of(3)
  whole, one_length = rows_of(1)
  assert len(batches.buckets) == 3 and one_length.buckets == (6,)
  assert sorted(bucketed) == sorted(whole)


def test_every_bucket_is_used(corpus):
  batches = data_batches.training_batches(corpus, make_config(train__batch_size=1))
  assert {batches[step]["inputs"].shape[1] for step in range(batches.steps_per_epoch)} == set(batches.buckets)


def test_a_batch_is_a_pure_function_of_seed_and_step(corpus):
  batches = data_batches.training_batches(corpus, make_config())
  forward = [batches[step] for step in range(len(batches))]
  again = {step: batches[step] for step in reversed(range(len(batches)))}  # other order, same instance
  for step in np.random.default_rng(0).permutation(len(batches)):  # other order, another instance, numpy integers
    fresh = data_batches.training_batches(corpus, make_config())
    assert_same(fresh[step], forward[step])
    assert_same(again[int(step)], forward[step])


def test_more_epochs_do_not_change_the_first_ones(corpus):
  few, many = (data_batches.training_batches(corpus, make_config(train__epochs=epochs)) for epochs in (2, 5))
  for step in range(len(few)):
    assert_same(many[step], few[step])


def test_epochs_and_seeds_differ(corpus):
  def epoch_of(batches, epoch):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [batches[step]["targets"].tolist() for step in steps]
  batches = data_batches.training_batches(corpus, make_config())
  other = data_batches.training_batches(corpus, make_config(seed=1))
  orders = [epoch_of(batches, 0), epoch_of(batches, 1), epoch_of(batches, 2), epoch_of(other, 0), epoch_of(other, 1)]
  assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_the_order_of_lengths_is_shuffled_too(make_corpus):
  histories = [[1] * (3 + length) for length in np.repeat([1, 5], 40)]
  batches = data_batches.training_batches(make_corpus(histories), make_config(train__epochs=1))
  lengths = [batches[step]["inputs"].shape[1] for step in range(len(batches))]
  assert sorted(lengths) == [1] * 10 + [5] * 10 and lengths not in (sorted(lengths), sorted(lengths)[::-1])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_split_the_same_global_training_batch(corpus, processes):
  whole = data_batches.training_batches(corpus, make_config())
  parts = [data_batches.training_batches(corpus, make_config(), ((process,), processes))
           for process in range(processes)]
  assert {len(part) for part in parts} == {len(whole)}
  for step in range(len(whole)):
    split = [part[step] for part in parts]
    assert {len(rows["inputs"]) for rows in split} == {4 // processes}
    assert_same(concatenate(split), whole[step])


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_a_stream_goes_on_from_any_step(corpus, start):
  batches = data_batches.training_batches(corpus, make_config(data__long_history="windows", train__epochs=2))
  streamed = list(data_batches.stream(batches, start))
  assert len(batches) == 10 and len(streamed) == len(batches) - start
  for step, batch in enumerate(streamed, start):
    assert_same(batch, batches[step])


def test_a_stream_from_the_end_is_empty(corpus):
  batches = data_batches.training_batches(corpus, make_config())
  assert list(data_batches.stream(batches, len(batches))) == []


def test_a_process_may_take_any_parts_in_ascending_order(corpus):
  whole = data_batches.training_batches(corpus, make_config())
  some = data_batches.training_batches(corpus, make_config(), ((1, 3), 4))
  for step in range(len(whole)):
    assert_same(some[step], {name: rows[[1, 3]] for name, rows in whole[step].items()})
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
