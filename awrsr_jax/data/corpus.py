"""Owns the corpus: interactions after k-core, numbered from 1 and ordered in time, as flat items and offsets.

Leave-one-out is a convention on it, not a copy: of each user's items the last is the test item, the second last the
validation item, the rest are for training.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from awrsr_jax.data import readers, synthetic
from awrsr_jax.data.text import Interactions

LOG = logging.getLogger(__name__)
FEWEST = 3  # interactions of a user: one each for training, validation and test

# name: users, items, interactions, fingerprint
BENCHMARKS = {
    "ml-1m": (6040, 3416, 999611, "258f2f787f02f35a234314414e70dd6c5c829913ec0e06dd15bbfed26f824343"),
    "ml-100k": (943, 1349, 99287, "59460a1e5ebf6c59e3d9605753bc2c3f9be8a38acc124ac3a95a5fce15dc9716"),
    "beauty": (22363, 12101, 198502, "ad9b8df97b5f7dac02e6b904a8ae0533399c71fe859f187ba38c5fd179cab4e4"),
    "sports": (35598, 18357, 296337, "1b6a0456bf1a93d705eb81cacb508c2205b8eadf293fa580cfe36faaefaace5a"),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
  """All histories (U users, I items, N interactions).

  Args:
    items: (N,) int32 item numbers 1 .. I, user after user, each user's oldest first.
    offsets: (U + 1,) int64; user u has items[offsets[u]:offsets[u + 1]].
    user_ids: (U,) raw user ids, ascending.
    item_ids: (I + 1,) raw id of each item number, ascending from 1; entry 0 is padding: 0 or "".
    titles: item number -> title, where known.
    name: the benchmark's name or where the data came from.
    oracle: histories (B, L) of item numbers, left-padded with 0 -> (B, I + 1) float64 scores of the law that made the
      data, column 0 -inf; None where no law is known.
  """

  items: np.ndarray
  offsets: np.ndarray
  user_ids: np.ndarray
  item_ids: np.ndarray
  titles: dict[int, str]
  name: str
  oracle: Callable[[np.ndarray], np.ndarray] | None

  @property
  def num_users(self) -> int:
    """U."""
    return len(self.user_ids)

  @property
  def num_items(self) -> int:
    """I, without padding."""
    return len(self.item_ids) - 1

  @property
  def num_interactions(self) -> int:
    """N."""
    return len(self.items)

  @property
  def lengths(self) -> np.ndarray:
    """(U,) int64, interactions of each user."""
    return np.diff(self.offsets)

  def history(self, user: int) -> np.ndarray:
    """Returns the item numbers of user 0 .. U - 1, oldest first."""
    return self.items[self.offsets[user]:self.offsets[user + 1]]


def load(data: ml_collections.ConfigDict) -> Corpus:
  """Reads or generates what `config.data` names, and makes the corpus of it.

  Args:
    data: `config.data`.

  Returns:
    The corpus; where `data.name` is one of `BENCHMARKS`, it is that one exactly.

  Raises:
    ValueError: see `readers.read`; or nothing is left after k-core, a user has fewer than 3 interactions, there are
      fewer than 2 items or more than int32 holds, or a benchmark differs.
  """
  is_synthetic = not data.path and (data.format == "synthetic" or (data.name == "synthetic" and data.format == "auto"))
  found = synthetic.generate(data.synthetic) if is_synthetic else readers.read(data)
  rows = filter_core(found, data.k_core)
  corpus = number(found, rows, data.name or found.source)
  _check(corpus)
  if is_synthetic:
    corpus = _attach_oracle(corpus, found, data)
  if data.name in BENCHMARKS:
    _check_benchmark(corpus, data.name)
  return corpus


def filter_core(found: Interactions, k: int) -> np.ndarray:
  """Returns the rows of the k-core: every user and every item left has at least k interactions left.

  Args:
    found: what was read.
    k: 0 and 1 keep every row.

  Returns:
    (M,) int64 rows, ascending. The k-core is unique, so the order of removal does not matter.

  Raises:
    ValueError: no row is left, or there was none.
  """
  users = np.unique(found.users, return_inverse=True)[1]
  items = np.unique(found.items, return_inverse=True)[1]
  rows = np.arange(users.size)
  while rows.size:
    keep = (np.bincount(users[rows])[users[rows]] >= k) & (np.bincount(items[rows])[items[rows]] >= k)
    if keep.all():
      break
    rows = rows[keep]
  before = (np.unique(users).size, np.unique(items).size, users.size)
  after = (np.unique(users[rows]).size, np.unique(items[rows]).size, rows.size)
  if not rows.size:
    raise ValueError("{}: no users left after k-core {} (there were {} users, {} items, {} interactions); set a lower "
                     "--config.data.k_core".format(found.source, k, *before))
  if before != after:
    LOG.info("k-core %d of %s: %d of %d users, %d of %d items, %d of %d interactions kept", k, found.source,
                 *(count for pair in zip(after, before, strict=True) for count in pair))
  return rows


def number(found: Interactions, rows: np.ndarray, name: str) -> Corpus:
  """Orders rows by user and time, and numbers users and items in the order of their raw ids.

  Args:
    found: what was read.
    rows: (M,) the rows to keep, ascending.
    name: name of the corpus.

  Returns:
    The corpus, without an oracle. Equal times of one user keep the order of the rows.

  Raises:
    ValueError: more items than int32 can number.
  """
  user_ids, user = np.unique(found.users[rows], return_inverse=True)
  item_ids, item = np.unique(found.items[rows], return_inverse=True)
  if item_ids.size > np.iinfo(np.int32).max - 1:
    raise ValueError(f"{found.source}: {item_ids.size} items are more than int32 can number; raise "
                     "--config.data.k_core")
  keys = (user,) if found.times is None else (found.times[rows], user)
  order = np.lexsort(keys)  # stable: file order decides between equal times
  padding = np.zeros(1, item_ids.dtype)  # 0 or ""
  titles = {at: found.titles[raw] for at, raw in enumerate(item_ids.tolist(), start=1) if raw in found.titles}
  return Corpus(items=(item[order] + 1).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64), user_ids=user_ids,
                item_ids=np.concatenate([padding, item_ids]), titles=titles, name=name, oracle=None)


def fingerprint(corpus: Corpus) -> str:
  """Returns a hash of the histories that does not depend on how users and items are numbered.

  Two corpora that differ only by a renumbering of users and items have the same fingerprint; any other difference
  changes it, but for histories so symmetric that colour refinement cannot tell them apart. We define: an item's colour
  starts as its count; three times, a user's colour becomes a hash of its items' colours with their positions, and an
  item's colour a hash of its own and of the colours of its users with its positions there; then SHA-256 of the counts
  and of all users' colours, sorted. All arithmetic is modulo 2^64.

  Args:
    corpus: every user and every item number occurs at least once.

  Returns:
    64 hexadecimal digits.
  """
  items_N = corpus.items
  lengths_U = corpus.lengths
  users_N = np.repeat(np.arange(corpus.num_users), lengths_U)
  place_N = _mix((np.arange(items_N.size) - corpus.offsets[users_N]).astype(np.uint64))
  item_colour_I = _mix(np.bincount(items_N, minlength=corpus.num_items + 1).astype(np.uint64))
  for _ in range(3):
    user_colour_U = _mix(np.add.reduceat(_mix(item_colour_I[items_N] + place_N), corpus.offsets[:-1])
                         + _mix(lengths_U.astype(np.uint64)))
    sums_I = np.zeros_like(item_colour_I)
    np.add.at(sums_I, items_N, _mix(user_colour_U[users_N] ^ place_N))
    item_colour_I = _mix(_mix(item_colour_I) + sums_I)
  counts = np.array([corpus.num_users, corpus.num_items, corpus.num_interactions], np.uint64)
  return hashlib.sha256(np.concatenate([counts, np.sort(user_colour_U)]).astype("<u8").tobytes()).hexdigest()


def describe(corpus: Corpus) -> dict[str, Any]:
  """Returns what `corpus.json` holds: name, fingerprint, counts and lengths, all plain Python values.

  `numbering` is a hash of the raw id behind each item number: a checkpoint fits only a corpus that has the same.
  """
  lengths_U = corpus.lengths
  return {
      "name": corpus.name, "fingerprint": fingerprint(corpus),
      "numbering": hashlib.sha256("\n".join(map(str, corpus.item_ids.tolist())).encode()).hexdigest(),
      "users": corpus.num_users, "items": corpus.num_items, "interactions": corpus.num_interactions,
      "mean_length": float(lengths_U.mean()), "median_length": float(np.median(lengths_U)),
      "min_length": int(lengths_U.min()), "max_length": int(lengths_U.max()),
      "density": corpus.num_interactions / corpus.num_users / corpus.num_items, "titles": len(corpus.titles),
  }


def _mix(values: np.ndarray) -> np.ndarray:
  """Returns a 64-bit hash of each uint64: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def _check(corpus: Corpus) -> None:
  """Raises ValueError for a corpus that cannot be split or ranked."""
  short = np.flatnonzero(corpus.lengths < FEWEST)
  if short.size:
    raise ValueError(f"{corpus.name}: {short.size} of {corpus.num_users} users have fewer than {FEWEST} interactions "
                     f"(user {corpus.user_ids[short[0]]} has {corpus.lengths[short[0]]}), but training, validation and "
                     "test need one each; set --config.data.k_core=3 to drop them")
  if corpus.num_items < 2:
    raise ValueError(f"{corpus.name}: {corpus.num_items} item cannot be ranked, at least 2 are needed; set "
                     "--config.data.path to a file with more items, or lower --config.data.k_core")


def _attach_oracle(corpus: Corpus, found: Interactions, data: ml_collections.ConfigDict) -> Corpus:
  """Returns the corpus with the law's scores, by item number."""
  if corpus.num_interactions < found.users.size:
    LOG.warning("k-core %d took items out of synthetic histories: their law no longer gives the best possible "
                    "figures", data.k_core)
    return corpus
  score, ids = synthetic.oracle_scores(data.synthetic), corpus.item_ids
  return dataclasses.replace(corpus, oracle=lambda histories_BxL: score(ids[histories_BxL])[:, ids])


def _check_benchmark(corpus: Corpus, name: str) -> None:
  """Raises ValueError unless the corpus is the benchmark of that name."""
  expected = BENCHMARKS[name]
  found = (corpus.num_users, corpus.num_items, corpus.num_interactions, fingerprint(corpus))
  if found != expected:
    text = "{} users, {} items, {} interactions, fingerprint {}"
    raise ValueError(f"this is not the benchmark {name}: found {text.format(*found)}; expected "
                     f"{text.format(*expected)}. For a version or filter of your own set --config.data.name= (empty); "
                     "ratings files need --config.data.k_core=5, and their row order must be the published one")
