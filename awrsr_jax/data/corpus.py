"""Owns the corpus: interactions after the rules, numbered from 1 and ordered in time, as flat items and offsets."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import ml_collections
import numpy as np

from awrsr_jax.config import parse_moment
from awrsr_jax.data import log as logs
from awrsr_jax.data import readers, rules, splits, synthetic

LOG = logging.getLogger(__name__)
Store = Callable[[Iterator[np.ndarray], np.ndarray, np.ndarray], Any]  # (chunks of items, offsets, user_ids) -> items
CHUNK = 1 << 21  # interactions looked at together where a corpus may be larger than memory

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
    items: (N,) int32 item numbers 1 .. I, user after user, each user's oldest first: an array, or what reads like one
      (data/records.py).
    offsets: (U + 1,) int64; user u has items[offsets[u]:offsets[u + 1]].
    split: what is trained on and what is ranked.
    user_ids: (U,) raw user ids, ascending.
    item_ids: (I + 1,) raw id of each item number, ascending from 1; entry 0 is padding: 0 or "".
    titles: item number -> title, where known.
    name: the benchmark's name or where the data came from.
    oracle: histories (B, L) of item numbers, left-padded with 0 -> (B, I + 1) float64 scores of the law that made the
      data, column 0 -inf; None where no law is known.
    counts: (I + 1,) int64, how often each item is trained on; 0 for padding.
    description: what `describe` says, where it is known already.
  """

  items: Any
  offsets: np.ndarray
  split: splits.Split
  user_ids: np.ndarray
  item_ids: np.ndarray
  titles: dict[int, str]
  name: str
  oracle: Callable[[np.ndarray], np.ndarray] | None
  counts: np.ndarray
  description: dict[str, Any] | None = None

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
    return int(self.offsets[-1])

  @property
  def lengths(self) -> np.ndarray:
    """(U,) int64, interactions of each user."""
    return np.diff(self.offsets)

  def history(self, user: int) -> np.ndarray:
    """Returns the item numbers of user 0 .. U - 1, oldest first."""
    return self.items[self.offsets[user]:self.offsets[user + 1]]


def load(data: ml_collections.ConfigDict, table: Any = None) -> Corpus:
  """Reads or generates what `config.data` names, and makes the corpus of it.

  Args:
    data: `config.data`.
    table: a pandas, polars or pyarrow table to read instead of what `data` names.

  Returns:
    The corpus; where `data.name` is one of `BENCHMARKS`, it is that one exactly.

  Raises:
    ValueError: see `readers.read`, `log.clean` and `rules.apply_rules`; or the split does not fit, there are fewer than
      2 items, or a benchmark differs.
  """
  with logs.open_database() as database, in_memory(data):
    return check(number(database, *read_log(database, data, table), data), data)


@contextlib.contextmanager
def in_memory(data: ml_collections.ConfigDict) -> Iterator[None]:
  """Raises ValueError, with the way out, where what is done within takes more memory than there is."""
  try:
    yield
  except (duckdb.OutOfMemoryException, MemoryError) as error:
    raise ValueError(f"{data.path or data.name}: the log does not fit into memory ({type(error).__name__}); make a "
                     "prepared corpus of it: python -m awrsr_jax.prepare --config=... --out=FOLDER, then "
                     "--config.data.path=FOLDER") from error


def read_log(database: duckdb.DuckDBPyConnection, data: ml_collections.ConfigDict,
             table: Any = None) -> tuple[logs.Log, dict[str, int]]:
  """Reads or generates what `config.data` names into `users`, `items` and `coded`, and applies its rules.

  Returns:
    The log, and how many rows were read and left out; see `log.clean`.
  """
  if is_synthetic(data):
    if table is not None:
      raise ValueError("a table and config.data.name=synthetic are two sources; leave one out")
    log = logs.put(database, synthetic.generate(data.synthetic))
  else:
    log = readers.read(database, data, table)
  read = logs.clean(log, data.min_rating, data.on_bad_row)
  rules.apply_rules(database, data, log.source)
  return log, read


def is_synthetic(data: ml_collections.ConfigDict) -> bool:
  """Whether `config.data` generates its data."""
  return not data.path and (data.format == "synthetic" or (data.name == "synthetic" and data.format == "auto"))


def number(database: duckdb.DuckDBPyConnection, log: logs.Log, read: dict[str, int], data: ml_collections.ConfigDict,
           store: Store | None = None) -> Corpus:
  """Orders what the rules left by user and time, and numbers users and items in the order of their raw ids.

  Args:
    database: with `users`, `items` and `coded`.
    log: its source and titles.
    read: see `log.clean`.
    data: `config.data`; of it `name` and `split`.
    store: takes the items where they are not to be kept in memory.

  Returns:
    The corpus.
  """
  user_codes, lengths = rules.codes(database, "user")
  item_codes, _ = rules.codes(database, "item")
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  user_ids = logs.fetch_ids(database, "users", user_codes)
  item_ids = logs.fetch_ids(database, "items", item_codes)
  split = _make_split(database, offsets, user_ids, data.split)
  splits.check(split, offsets, user_ids, data.name or log.source, data.max_history)
  numbers = np.zeros(item_codes[-1] + 1, np.int32)
  numbers[item_codes] = np.arange(1, len(item_codes) + 1)
  chunks = (numbers[chunk] for chunk in rules.order_items(database))
  items = np.concatenate(list(chunks)) if store is None else store(chunks, offsets, user_ids)
  item_ids = np.concatenate([np.zeros(1, item_ids.dtype), item_ids])  # 0 or ""
  titles = {at: log.titles[str(raw)] for at, raw in enumerate(item_ids.tolist()) if at and str(raw) in log.titles}
  counts = count_trained(items, offsets, split, len(item_codes))
  return Corpus(items, offsets, split, user_ids, item_ids, titles, data.name or log.source, _find_oracle(
      item_ids, int(offsets[-1]) == read["rows"], data), counts)


def chunks_of_users(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
  """Yields (first, last) ranges of users who have about `CHUNK` interactions together; one user is never cut."""
  first = 0
  while first < len(offsets) - 1:
    last = max(int(np.searchsorted(offsets, offsets[first] + CHUNK, side="right")) - 1, first + 1)
    yield first, last
    first = last


def training_parts(items: Any, offsets: np.ndarray, split: splits.Split) -> Iterator[np.ndarray]:
  """Yields the items that are trained on, user after user, in pieces."""
  for first, last in chunks_of_users(offsets):
    ends_N = np.repeat(split.train_ends[first:last], np.diff(offsets[first:last + 1]))
    is_trained = np.arange(offsets[first], offsets[last]) < ends_N
    yield items[offsets[first]:offsets[last]][is_trained]


def count_trained(items: Any, offsets: np.ndarray, split: splits.Split, num_items: int) -> np.ndarray:
  """Returns (I + 1,) int64 how often each item is trained on."""
  parts = training_parts(items, offsets, split)
  return sum((np.bincount(part, minlength=num_items + 1) for part in parts), np.zeros(num_items + 1, np.int64))


def _make_split(database: duckdb.DuckDBPyConnection, offsets: np.ndarray, user_ids: np.ndarray,
                wanted: Any) -> splits.Split:
  """Returns the split that `config.data.split` asks for."""
  match wanted.name:
    case "leave_one_out":
      return splits.leave_one_out(offsets)
    case "users":
      return splits.by_users(offsets, user_ids, wanted.valid_share, wanted.test_share, wanted.seed)
  valid_from = _find_moment(database, wanted.valid_from, "valid_from")
  test_from = _find_moment(database, wanted.test_from, "test_from")
  tell = functools.partial(logs.describe_time, unit=logs.find_unit(database))
  if valid_from >= test_from:
    raise ValueError(f"config.data.split.valid_from={wanted.valid_from} ({tell(valid_from)}) is not "
                     f"before test_from={wanted.test_from} ({tell(test_from)})")
  words = f"split by time (validation from {tell(valid_from)}, test from {tell(test_from)})"
  return splits.by_time(offsets, rules.count_before(database, valid_from), rules.count_before(database, test_from),
                        wanted.target, words)


def _find_moment(database: duckdb.DuckDBPyConnection, text: str, key: str) -> float:
  """Returns a time of `config.data.split` in the unit of the log."""
  kind, value = parse_moment(text, f"config.data.split.{key}")
  oldest, newest = database.execute("SELECT min(time), max(time) FROM coded").fetchone()
  if oldest == newest:
    raise ValueError("config.data.split.name=time: the log has no times, or only one; use leave_one_out or users")
  if kind == "share":
    return rules.find_share(database, value)
  if kind == "time":
    return value
  unit = logs.find_unit(database)
  if not unit:
    raise ValueError(f"config.data.split.{key}={text} is a date, but the log's times ({oldest} to {newest}) are none; "
                     "give a number in their unit, or a share as 90%")
  return value * 1e3 ** (unit - 1)


def _find_oracle(item_ids: np.ndarray, is_whole: bool,
                 data: ml_collections.ConfigDict) -> Callable[[np.ndarray], np.ndarray] | None:
  """Returns the law's scores by item number, where a law made the data and no rule changed it."""
  if not is_synthetic(data):
    return None
  if not is_whole:
    LOG.warning("rules of config.data took items out of synthetic histories: their law no longer gives the best "
                "possible figures")
    return None
  score = synthetic.oracle_scores(data.synthetic)
  return lambda histories_BxL: score(item_ids[histories_BxL])[:, item_ids]


def fingerprint(corpus: Corpus, of_split: bool = True) -> str:
  """Returns a hash of the histories and their split that does not depend on how users and items are numbered.

  Two corpora that differ only by a renumbering of users and items have the same fingerprint; any other difference
  changes it, but for histories so symmetric that colour refinement cannot tell them apart. We define: an item's colour
  starts as its count; three times, a user's colour becomes a hash of its items' colours with their positions, and an
  item's colour a hash of its own and of the colours of its users with its positions there; then SHA-256 of the counts
  and of all users' colours, sorted. All arithmetic is modulo 2^64.

  Args:
    corpus: every user and every item number occurs at least once.
    of_split: False: of the histories alone, as under leave-one-out, which follows from them.

  Returns:
    64 hexadecimal digits.
  """
  offsets, users_U = corpus.offsets, np.arange(corpus.num_users)
  item_colour_I = np.zeros(corpus.num_items + 1, np.uint64)
  for first, last in chunks_of_users(offsets):
    item_colour_I += np.bincount(corpus.items[offsets[first]:offsets[last]], minlength=len(item_colour_I)
                                 ).astype(np.uint64)
  item_colour_I = _mix(item_colour_I)
  user_colour_U = np.zeros(corpus.num_users, np.uint64)
  for _ in range(3):
    sums_I = np.zeros_like(item_colour_I)
    for first, last in chunks_of_users(offsets):
      items_N = corpus.items[offsets[first]:offsets[last]]
      lengths_U = np.diff(offsets[first:last + 1])
      users_N = np.repeat(users_U[first:last], lengths_U)
      place_N = _mix((np.arange(offsets[first], offsets[last]) - offsets[users_N]).astype(np.uint64))
      user_colour_U[first:last] = _mix(np.add.reduceat(_mix(item_colour_I[items_N] + place_N),
                                                       offsets[first:last] - offsets[first])
                                       + _mix(lengths_U.astype(np.uint64)))
      np.add.at(sums_I, items_N, _mix(user_colour_U[users_N] ^ place_N))
    item_colour_I = _mix(_mix(item_colour_I) + sums_I)
  counts = np.array([corpus.num_users, corpus.num_items, corpus.num_interactions], np.uint64)
  if of_split and corpus.split.name != "leave_one_out":
    user_colour_U = _colour_split(corpus, user_colour_U)
  return hashlib.sha256(np.concatenate([counts, np.sort(user_colour_U)]).astype("<u8").tobytes()).hexdigest()


def _colour_split(corpus: Corpus, user_colour_U: np.ndarray) -> np.ndarray:
  """Mixes into each user's colour what of the history is trained on and ranked."""
  split, starts = corpus.split, corpus.offsets[:-1]
  colour_U = _mix(user_colour_U ^ _mix((split.train_ends - starts).astype(np.uint64)))
  for salt, positions in enumerate(split.targets.values()):
    users = splits.users_of(corpus.offsets, positions)
    np.add.at(colour_U, users, _mix((positions - starts[users]).astype(np.uint64) * np.uint64(2) + np.uint64(salt)))
  return colour_U


def describe(corpus: Corpus) -> dict[str, Any]:
  """Returns what `corpus.json` holds: name, fingerprint, counts and lengths, all plain Python values.

  `numbering` is a hash of the raw id behind each item number: a checkpoint fits only a corpus that has the same.
  `split` says what is ranked and how much of that was never trained on, see `splits.report`.
  """
  if corpus.description is not None:
    return corpus.description
  targets = {name: np.asarray(corpus.items[positions]) for name, positions in corpus.split.targets.items()}
  lengths_U = corpus.lengths
  return {
      "name": corpus.name, "fingerprint": fingerprint(corpus),
      "numbering": hashlib.sha256("\n".join(map(str, corpus.item_ids.tolist())).encode()).hexdigest(),
      "users": corpus.num_users, "items": corpus.num_items, "interactions": corpus.num_interactions,
      "mean_length": float(lengths_U.mean()), "median_length": float(np.median(lengths_U)),
      "min_length": int(lengths_U.min()), "max_length": int(lengths_U.max()),
      "density": corpus.num_interactions / corpus.num_users / corpus.num_items, "titles": len(corpus.titles),
      "split": splits.report(corpus.split, corpus.offsets, corpus.counts, targets, corpus.name),
  }


def _mix(values: np.ndarray) -> np.ndarray:
  """Returns a 64-bit hash of each uint64: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def check(corpus: Corpus, data: ml_collections.ConfigDict) -> Corpus:
  """Returns the corpus with its description.

  Raises:
    ValueError: it cannot be ranked, or is not the benchmark whose name it has.
  """
  if corpus.num_items < 2:
    raise ValueError(f"{corpus.name}: {corpus.num_items} item cannot be ranked, at least 2 are needed; set "
                     "--config.data.path to a file with more items, or lower --config.data.k_core")
  description = describe(corpus)
  if data.name in BENCHMARKS:
    is_plain = data.split.name == "leave_one_out"
    _check_benchmark(corpus, description["fingerprint"] if is_plain else fingerprint(corpus, of_split=False), data.name)
  return dataclasses.replace(corpus, description=description)


def _check_benchmark(corpus: Corpus, histories: str, name: str) -> None:
  """Raises ValueError unless the corpus, with this fingerprint of its histories, is the benchmark of that name."""
  expected = BENCHMARKS[name]
  found = (corpus.num_users, corpus.num_items, corpus.num_interactions, histories)
  if found != expected:
    text = "{} users, {} items, {} interactions, fingerprint {}"
    raise ValueError(f"this is not the benchmark {name}: found {text.format(*found)}; expected "
                     f"{text.format(*expected)}. For a version or filter of your own set --config.data.name= (empty); "
                     "ratings files need --config.data.k_core=5, and their row order must be the published one")
