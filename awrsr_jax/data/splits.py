"""Owns splits: which part of each history is trained on, and which items are ranked for validation and for test.

U users; a position is a place in the flat (N,) items of a corpus. A ranked item is always preceded by its history: all
that its user did before it.
"""

import dataclasses
import hashlib
import logging
from typing import Any

import numpy as np

LOG = logging.getLogger(__name__)
FEWEST = 3  # interactions of a user under leave-one-out: one each for training, validation and test
HELD_OUT = ("valid", "test")


@dataclasses.dataclass(frozen=True)
class Split:
  """A split of a corpus.

  Args:
    name: "leave_one_out", "time" or "users".
    words: it in words, for the protocol line.
    train_ends: (U,) int64; user u trains on positions offsets[u] to train_ends[u].
    targets: "valid" and "test" -> ascending positions of the items that are ranked.
  """

  name: str
  words: str
  train_ends: np.ndarray
  targets: dict[str, np.ndarray]


def leave_one_out(offsets: np.ndarray) -> Split:
  """Of each user's items the last is for test, the one before it for validation, the rest are for training."""
  ends = offsets[1:]
  return Split("leave_one_out", "leave-one-out", ends - 2, {"valid": ends - 2, "test": ends - 1})


def by_time(offsets: np.ndarray, before_valid: np.ndarray, before_test: np.ndarray, target: str, words: str) -> Split:
  """Trains on what is older than one time, validates on what follows, and tests on what is from a later time on.

  Args:
    offsets: (U + 1,).
    before_valid: (U,) how many items of each user are older than the first time.
    before_test: (U,) than the second.
    target: which of a user's items in a period are ranked: "last", "first" or "all".
    words: the times in words.
  """
  starts, ends = offsets[:-1], offsets[1:]
  periods = {"valid": (starts + before_valid, starts + before_test), "test": (starts + before_test, ends)}
  targets = {}
  for name, (first, last) in periods.items():
    some = last > first
    match target:
      case "last":
        targets[name] = last[some] - 1
      case "first":
        targets[name] = first[some]
      case _:
        inside = np.zeros(offsets[-1] + 1, np.int8)
        np.add.at(inside, first[some], 1)
        np.add.at(inside, last[some], -1)
        targets[name] = np.flatnonzero(np.cumsum(inside[:-1], dtype=np.int8))
  return Split("time", f"{words}, {'all items' if target == 'all' else f'the {target} item'} of a user in each period",
               starts + before_valid, targets)


def by_users(offsets: np.ndarray, user_ids: np.ndarray, valid_share: float, test_share: float, seed: int) -> Split:
  """Holds whole users out: their last item is ranked, and nothing of theirs is trained on.

  Who is held out follows from the seed and the raw id alone, so it stays when a log grows.
  """
  place = np.array([hash_user(user, seed) for user in user_ids.tolist()])
  held = {"test": place < test_share, "valid": (place >= test_share) & (place < test_share + valid_share)}
  ends = offsets[1:]
  train_ends = np.where(held["test"] | held["valid"], offsets[:-1], ends)
  return Split("users", f"users held out ({valid_share:g} for validation, {test_share:g} for test, seed {seed}), their "
               "last item", train_ends, {name: ends[held[name]] - 1 for name in HELD_OUT})


def hash_user(user: int | str, seed: int) -> float:
  """Returns a number in [0, 1) for a raw user id: the first 8 bytes of the BLAKE2b hash of "seed:id"."""
  text = f"{seed}:{user}".encode(errors="surrogatepass")
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) / 2**64


def users_of(offsets: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """Returns the user that each position belongs to."""
  return np.searchsorted(offsets, positions, side="right") - 1


def check(split: Split, offsets: np.ndarray, user_ids: np.ndarray, name: str, max_history: int = 0) -> None:
  """Refuses a split that cannot be trained on or evaluated; `max_history` is the rule that cut histories last.

  Raises:
    ValueError: a user is too short for it; or a part is empty.
  """
  lengths = np.diff(offsets)
  fewest = {"leave_one_out": FEWEST, "users": 2}.get(split.name, 1)
  short = np.flatnonzero(lengths < fewest)
  if short.size:
    needs = "training, validation and test" if fewest == FEWEST else "a history and an item to rank"
    way = (f"raise --config.data.max_history={max_history}, which cuts all users" if 0 < max_history < fewest else
           f"set --config.data.k_core={fewest} to drop them")
    raise ValueError(f"{name}: {short.size} of {lengths.size} users have fewer than {fewest} interactions "
                     f"(user {user_ids[short[0]]} has {lengths[short[0]]}), but {needs} need one each; {way}")
  for part in HELD_OUT:
    if not split.targets[part].size:
      raise ValueError(f"{name}: the split ({split.words}) leaves nothing to rank for {part}; change config.data.split")


def report(split: Split, offsets: np.ndarray, counts: np.ndarray, target_items: dict[str, np.ndarray],
           name: str) -> dict[str, Any]:
  """Returns what a split made, and logs what of it was never trained on.

  Args:
    split: of the corpus.
    offsets: (U + 1,).
    counts: (I + 1,) how often each item is trained on.
    target_items: "valid" and "test" -> the item numbers at its targets.
    name: of the corpus.

  Returns:
    "name", "words", "training" (interactions); for "valid" and "test": how many targets, and how many of them are of
    users that nothing was trained on, have no history at all, or are items that were never trained on.
  """
  result: dict[str, Any] = {"name": split.name, "words": split.words,
                            "training": int(np.sum(split.train_ends - offsets[:-1]))}
  for part in HELD_OUT:
    users = users_of(offsets, split.targets[part])
    found = {"targets": users.size, "new_users": int(np.sum(split.train_ends[users] == offsets[users])),
             "no_history": int(np.sum(split.targets[part] == offsets[users])),
             "new_items": int(np.sum(counts[target_items[part]] == 0))}
    result[part] = found
    if found["new_items"] or found["new_users"]:
      LOG.info("%s, %s: of %d items to rank %d were never trained on; %d are of users that were not (%d without any "
               "history); all are ranked", name, part, users.size, found["new_items"], found["new_users"],
               found["no_history"])
  return result
