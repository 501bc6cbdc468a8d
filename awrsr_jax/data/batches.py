"""Batches: left-padded, length-bucketed, each a pure function of (seed, step).

Owns the way from a `Corpus` to int32 arrays. Shapes: B rows, L padded length, S padded length of full histories,
C candidates, T batches of an epoch. A global batch is cut into equal parts, one for each device of the "data" axis; a
batch here holds the parts that this process's devices take. Position in the stream is one integer, the step.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from awrsr_jax.config import PER_POSITION
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.data.splits import HELD_OUT, users_of

Batch = dict[str, Any]
Parts = tuple[tuple[int, ...], int]  # which parts of a global batch, and how many it has; see mesh.local_parts
WHOLE: Parts = (0,), 1
ROWS = 8  # of each bucket a piece of a batch has a multiple of this, where config.train.batch_size allows it
SAMPLED = "uniform100", "popular100"  # protocols that rank among candidates
NUM_CANDIDATES = 100  # as their names say


def training_rows(corpus: Corpus, max_length: int, long_history: str) -> tuple[np.ndarray, np.ndarray]:
  """Cuts every user's training part into rows that the model can take.

  A row is a slice of `corpus.items`: all but its last item are inputs, all but its first are targets.

  Args:
    corpus: U users.
    max_length: n, the most inputs in a row.
    long_history: "newest" keeps a user's newest n inputs; "windows" cuts the whole part, from its newest end, into
      rows of n inputs (the oldest row may be shorter), so that every item but the first is a target once.

  Returns:
    starts (R,), ends (R,): int64, each row with at least two items.

  Raises:
    ValueError: no user has two training items.
  """
  first, last = corpus.offsets[:-1], corpus.split.train_ends
  windows = np.maximum(-(-(last - first - 1) // max_length), 0)
  if long_history == "newest":
    windows = np.minimum(windows, 1)
  user = np.repeat(np.arange(len(first)), windows)
  window = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)  # 0 is the newest
  ends = last[user] - window * max_length
  starts = np.maximum(first[user], ends - max_length - 1)
  if not len(starts):
    raise ValueError(f"{corpus.name or 'the corpus'}: none of {corpus.num_users} users has 2 items to train on "
                     f"({corpus.split.words}), so there is nothing to train on; bring longer histories")
  return starts, ends


def plan_buckets(lengths: np.ndarray, count: int, batches: int = 1, multiple: int = 1) -> tuple[int, ...]:
  """Chooses padded lengths that waste the least padding on these rows (exactly, by dynamic programming).

  Args:
    lengths: (R,) real lengths, from 1.
    count: the most buckets.
    batches: over how many batches the rows of each bucket are spread.
    multiple: of the rows of a bucket in a batch, filling included.

  Returns:
    Ascending bucket lengths; the last one holds the longest row.
  """
  grid = np.unique(lengths)
  rows = np.searchsorted(np.sort(lengths), grid, side="right")  # rows that fit into each grid length
  filled = lambda rows: fill_up(rows, batches, multiple) * grid[:, None]  # noqa: E731
  cost = filled(rows[:, None])[:, 0]  # cost[j]: padded positions of a batch when buckets end at grid[j]
  is_before, never = np.tri(len(grid), k=-1, dtype=bool), np.iinfo(np.int64).max // 2
  last = np.where(is_before, filled(rows[:, None] - rows[None, :]), never)
  chosen = [[j] for j in range(len(grid))]
  for _ in range(min(count, len(grid)) - 1):
    step = cost[None, :] + last  # [j, i]: i is the bucket before j
    before, least = step.argmin(axis=1), step.min(axis=1)
    chosen = [chosen[before[j]] + [j] if least[j] < cost[j] else chosen[j] for j in range(len(grid))]
    cost = np.minimum(cost, least)
  return tuple(int(grid[j]) for j in chosen[-1])


def fill_up(rows: Any, batches: int, multiple: int) -> Any:
  """Returns how many rows a batch has room for when `rows` are spread over batches, a multiple."""
  return -(-rows // (batches * multiple)) * multiple


def gather_rows(items: Any, starts: Any, ends: Any, length: int, xp: Any = np) -> Any:
  """Returns (B, length) int32: items[start:end] of each row, its newest `length`, left-padded with 0.

  `xp` is the library of the arrays: numpy on the host, jax.numpy on the devices. Items that lie in files gather
  themselves.
  """
  if hasattr(items, "gather"):
    return items.gather(starts, ends, length)
  position = ends[:, None] - length + xp.arange(length)[None]
  real = position >= starts[:, None]
  return xp.where(real, items[xp.where(real, position, 0)], 0).astype(np.int32)


def take_parts(x: np.ndarray, batch_size: int, parts: Parts) -> np.ndarray:
  """Returns some parts of x (up to batch_size, ...), one after another, after filling it up with 0."""
  chosen, count = parts
  x = np.pad(x, [(0, batch_size - len(x))] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(count, batch_size // count, *x.shape[1:])[list(chosen)].reshape(-1, *x.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)  # identity: the cache of epochs hashes it
class TrainBatches:
  """Training batches by index: `batches[step]` is this process's parts of global batch `step`.

  A batch is one array for each bucket, with rows that fit into it: the rows of every bucket are shuffled and spread
  evenly over the batches of an epoch. So every batch has rows of all lengths, as if rows were drawn from all of them,
  little padding, and the same shapes. Every row comes once an epoch.
  """

  items: Any  # of a corpus
  starts: np.ndarray
  ends: np.ndarray
  buckets: tuple[int, ...]
  batch_size: int  # real rows, on average a little fewer
  epochs: int
  seed: int
  multiple: int = 1  # of the rows of a bucket in a batch
  parts: Parts = WHOLE

  @property
  def steps_per_epoch(self) -> int:
    """Global batches of an epoch, which share its rows evenly."""
    return -(-len(self.starts) // self.batch_size)

  @property
  def targets_per_step(self) -> float:
    """Real targets of a global batch, on average over an epoch."""
    return float(np.sum(self.ends - self.starts - 1)) / self.steps_per_epoch

  @functools.cached_property
  def _bucket_of_row(self) -> np.ndarray:
    return np.searchsorted(self.buckets, self.ends - self.starts - 1)

  @functools.cached_property
  def _rows_of_bucket(self) -> np.ndarray:
    return np.bincount(self._bucket_of_row, minlength=len(self.buckets))

  @functools.cached_property
  def sizes(self) -> tuple[int, ...]:
    """How many rows of each bucket a global batch has room for."""
    return tuple(fill_up(self._rows_of_bucket, self.steps_per_epoch, self.multiple).tolist())

  @functools.lru_cache(maxsize=2)  # noqa: B019 (two epochs at most, and there is one such object a run)
  def _epoch(self, epoch: int) -> list[np.ndarray]:
    """Returns the shuffled rows of each bucket."""
    rows = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
    rows = rows[np.argsort(self._bucket_of_row[rows], kind="stable")]
    return np.split(rows, np.cumsum(self._rows_of_bucket)[:-1])

  def bounds(self, epoch: int, batches_T: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns starts and ends of the rows of global batches of an epoch: (T, B) for each bucket, 0 where filled up."""
    bounds = []
    for rows, size in zip(self._epoch(epoch), self.sizes, strict=True):
      first_T, last_T = (at * len(rows) // self.steps_per_epoch for at in (batches_T, batches_T + 1))
      places_TxB = first_T[:, None] + np.arange(size)[None]
      real_TxB, rows_TxB = places_TxB < last_T[:, None], rows[np.minimum(places_TxB, len(rows) - 1)]
      bounds.append((np.where(real_TxB, self.starts[rows_TxB], 0), np.where(real_TxB, self.ends[rows_TxB], 0)))
    return bounds

  def epoch_bounds(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the bounds of all batches of an epoch."""
    return self.bounds(epoch, np.arange(self.steps_per_epoch))

  def __len__(self) -> int:
    """Returns the number of global batches of all epochs."""
    return self.epochs * self.steps_per_epoch

  def __getitem__(self, step: int) -> Batch:
    """Returns inputs and targets: for each bucket int32 (B, L), B its size times the share of the parts."""
    epoch, batch = divmod(int(step), self.steps_per_epoch)
    inputs, targets = [], []
    for bounds, length in zip(self.bounds(epoch, np.array([batch])), self.buckets, strict=True):
      starts, ends = (take_parts(x_1xB[0], x_1xB.size, self.parts) for x_1xB in bounds)
      rows = gather_rows(self.items, starts, ends, length + 1)
      inputs.append(np.ascontiguousarray(rows[:, :-1]))
      targets.append(np.where(inputs[-1] > 0, rows[:, 1:], 0))  # the first item is no target
    return {"inputs": tuple(inputs), "targets": tuple(targets)}


def training_batches(corpus: Corpus, config: Any, parts: Parts = WHOLE) -> TrainBatches:
  """Returns the training batches of a run: all of its epochs, for one of its processes.

  Raises:
    ValueError: there is nothing to train on, or negatives cannot be drawn.
  """
  data, train = config.data, config.train
  starts, ends = training_rows(corpus, data.max_length, data.long_history)
  _check_negatives(corpus, config.loss, starts, ends)
  batches = -(-len(starts) // train.batch_size)
  # Any number of devices has the same rows in a batch; 1, 2, 4 and ROWS have the same filling too, and so train alike.
  rows = math.gcd(train.batch_size, ROWS * train.accumulate)
  buckets = plan_buckets(ends - starts - 1, data.buckets, batches, rows)
  multiple = math.lcm(rows, parts[1] * train.accumulate)
  return TrainBatches(corpus.items, starts, ends, buckets, train.batch_size, train.epochs, config.seed, multiple, parts)


def _check_negatives(corpus: Corpus, loss: Any, starts: np.ndarray, ends: np.ndarray) -> None:
  """Raises ValueError when a row leaves no item to draw, or popularity is more than the int32 that it is drawn in."""
  if loss.name in PER_POSITION:
    long = ends - starts >= corpus.num_items
    for start, end in zip(starts[long], ends[long], strict=True):
      if len(np.unique(corpus.items[start:end])) == corpus.num_items:
        raise ValueError(f"config.loss.name={loss.name} draws items that a training row does not hold, and one of "
                         f"{end - start} holds all {corpus.num_items}; use --config.loss.name=softmax, or "
                         f"config.data.max_length below {corpus.num_items - 1}")
  total, most = int(corpus.counts.sum()), np.iinfo(np.int32).max
  if loss.negatives == "popularity" and total > most:
    raise ValueError(f"config.loss.negatives=popularity draws one of up to {most} training interactions, and there are "
                     f"{total}; use --config.loss.negatives=uniform, or keep the newest by config.data.max_history")


def stream(batches: TrainBatches, start: int) -> Iterator[Batch]:
  """Yields batches[start], batches[start + 1], ... to the end, built ahead of use by background threads."""
  iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
  iterator.set_state({"next_index": start})
  return iterator


@dataclasses.dataclass(frozen=True)
class RankingBatches:
  """The targets of a split, each once, as batches for exact ranking; iterate as often as wanted.

  A batch has inputs_BxL (the newest n items before the target), target_B, seen_BxS (the whole history before the
  target), mask_B (1 for a target, 0 for filling) and, for sampled protocols, candidates_BxC. `targets` are positions in
  the items of the corpus, sorted by the length of the history before them. Of most splits a user has one target.
  Candidates are drawn once and kept, 400 bytes a target.
  """

  corpus: Corpus
  split: str
  targets: np.ndarray
  batch_size: int
  max_length: int
  buckets: tuple[int, ...]
  protocol: str
  seed: int
  parts: Parts = WHOLE
  _drawn: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  @functools.cached_property
  def users(self) -> np.ndarray:
    """The user of each target."""
    return users_of(self.corpus.offsets, self.targets)

  @property
  def filtered(self) -> bool:
    """Whether items of the history are no rivals of the target."""
    return self.protocol != "unfiltered"

  def __len__(self) -> int:
    """Returns the number of global batches."""
    return math.ceil(len(self.targets) / self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    """Yields what the parts hold of each global batch; S and L grow from batch to batch, B stays."""
    for batch in range(len(self)):
      targets = self.targets[batch * self.batch_size:(batch + 1) * self.batch_size]
      seen_length, length = self._lengths(targets)
      real = take_parts(np.ones(len(targets), bool), self.batch_size, self.parts)
      targets = take_parts(targets, self.batch_size, self.parts)
      starts = self.corpus.offsets[users_of(self.corpus.offsets, targets)]
      starts, ends = np.where(real, starts, 0), np.where(real, targets, 0)
      seen = gather_rows(self.corpus.items, starts, ends, seen_length)
      result = {"inputs": seen[:, -length:], "seen": seen, "mask": real.astype(np.float32),
                "target": gather_rows(self.corpus.items, ends, ends + real, 1)[:, 0]}
      if self.protocol in SAMPLED:
        if batch not in self._drawn:
          self._drawn[batch] = np.zeros((len(targets), NUM_CANDIDATES), np.int32)
          self._drawn[batch][real] = self._candidates(targets[real])
        result["candidates"] = self._drawn[batch]
      yield result

  def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Returns starts (T, B) and ends (T, B) of the histories of every global batch, mask (T, B), and its (S, L).

    An end is where the target stands; where a batch is filled up, start, end and mask are 0.
    """
    pad = lambda x: np.pad(x, (0, len(self) * self.batch_size - len(x))).reshape(-1, self.batch_size)  # noqa: E731
    lengths = [self._lengths(self.targets[first:first + self.batch_size])
               for first in range(0, len(self.targets), self.batch_size)]
    return (pad(self.corpus.offsets[self.users]), pad(self.targets), pad(np.ones(len(self.targets), np.int32)), lengths)

  def _lengths(self, targets: np.ndarray) -> tuple[int, int]:
    """Returns S and L of a global batch: S is its longest history's bucket; beyond n, n doubled as often as needed."""
    longest = int(history_lengths(self.corpus, targets[-1:])[0])
    if longest <= self.buckets[-1]:
      return (self.buckets[np.searchsorted(self.buckets, longest)],) * 2
    return self.max_length << int(np.ceil(np.log2(longest / self.max_length))), self.max_length

  @functools.cached_property
  def _cumulative(self) -> np.ndarray:
    """Counts of draws up to each item: all equal (uniform100) or how often it is a training item (popular100)."""
    if self.protocol == "uniform100":
      return np.arange(1, self.corpus.num_items + 1)
    return np.cumsum(self.corpus.counts[1:])

  def _candidates(self, targets: np.ndarray) -> np.ndarray:
    """Returns (B, C): for each target, distinct items outside history and target, by (seed, split, place)."""
    result = np.empty((len(targets), NUM_CANDIDATES), np.int32)
    for row, (user, target) in enumerate(zip(users_of(self.corpus.offsets, targets), targets, strict=True)):
      start = self.corpus.offsets[user]
      rng = np.random.default_rng([self.seed, HELD_OUT.index(self.split), int(user), int(target - start)])
      known = self.corpus.items[start:target + 1]
      drawn = np.empty(0, np.int64)
      while len(drawn) < NUM_CANDIDATES:
        more = np.searchsorted(self._cumulative, rng.integers(self._cumulative[-1], size=4 * NUM_CANDIDATES),
                               side="right") + 1
        drawn = np.concatenate([drawn, more[~np.isin(more, known)]])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # first come, first kept: without replacement
      result[row] = drawn[:NUM_CANDIDATES]
    return result


def ranking_batches(corpus: Corpus, config: Any, split: str, parts: Parts = WHOLE) -> RankingBatches:
  """Returns the ranking batches of a split ("valid" or "test") under the config's protocol.

  Raises:
    ValueError: too few items are left to sample candidates from.
  """
  targets = corpus.split.targets[split]
  lengths = history_lengths(corpus, targets)
  if config.eval.protocol in SAMPLED:
    _check_candidates(corpus, config.eval.protocol, int(lengths.max()) + 1)
  order = np.argsort(lengths, kind="stable")
  buckets = plan_buckets(np.clip(lengths, 1, config.data.max_length), config.data.buckets)
  return RankingBatches(corpus, split, targets[order], config.eval.batch_size, config.data.max_length, buckets,
                        config.eval.protocol, config.seed, parts)


def _check_candidates(corpus: Corpus, protocol: str, most_known: int) -> None:
  """Raises ValueError when the longest history may leave fewer items than the candidates to draw."""
  drawable = corpus.num_items if protocol == "uniform100" else int((corpus.counts > 0).sum())
  if drawable - most_known < NUM_CANDIDATES:
    raise ValueError(f"config.eval.protocol={protocol} draws {NUM_CANDIDATES} items outside a user's history, but of "
                     f"{drawable} items a user knows up to {most_known}; use --config.eval.protocol=full")


def history_lengths(corpus: Corpus, targets: np.ndarray) -> np.ndarray:
  """Returns how many items of its user come before each target."""
  return targets - corpus.offsets[users_of(corpus.offsets, targets)]
