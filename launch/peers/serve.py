"""What the programs of this folder share: the specification, the sequences, and the commands.

A program runs as `python launch/peers/peer_X.py SPEC.json` and speaks JSON, one line at a time, on standard output;
what its library prints goes to standard error. First comes {"ready": true, ...}, then one answer to each line of
standard input: `train SECONDS`, `evaluate USERS` and `quit`.
"""

import json
import os
import sys
import time
import types
from typing import Protocol

import numpy as np

TOP = 10  # of the metrics

# Standard output becomes a second standard error, for the libraries; only the answers go where it went.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Peer(Protocol):
  """A model with its data, of one library."""

  name: str
  version: str
  note: str
  parameters: int

  def train(self, seconds: float) -> dict:
    """Trains on, in whole batches and at least one, until `seconds` have passed.

    Returns:
      "interactions" (targets that are no padding), "steps" and "seconds".
    """

  def evaluate(self, users: int) -> dict:
    """Ranks all items that each of the first `users` test users has not seen.

    Returns:
      "users", "seconds", "hit@10" and "ndcg@10".
    """


class Clock:
  """Counts what one call of `train` does."""

  def __init__(self, seconds: float):
    self.limit = seconds
    self.interactions = self.steps = 0
    self.start = time.perf_counter()
    self.seconds = 0.0

  def step(self, interactions: int) -> bool:
    """Notes a step done; returns whether the time is over."""
    self.interactions += interactions
    self.steps += 1
    self.seconds = time.perf_counter() - self.start
    return self.seconds >= self.limit

  def answer(self) -> dict:
    """Returns what `train` answers."""
    return {"interactions": self.interactions, "steps": self.steps, "seconds": self.seconds}


def read_spec() -> types.SimpleNamespace:
  """Returns the specification that the command line names."""
  if len(sys.argv) != 2:
    sys.exit(f"Usage: python {sys.argv[0]} SPEC.json")
  with open(sys.argv[1], encoding="utf-8") as file:
    spec = types.SimpleNamespace(**json.load(file))
  if spec.loss not in ("bce", "softmax"):
    sys.exit(f"loss must be bce or softmax, not {spec.loss!r}.")
  return spec


def read_sequences(path: str) -> list[np.ndarray]:
  """Returns the items of each user, oldest first."""
  with open(path, encoding="utf-8") as file:
    return [np.array(line.split(), np.int64) for line in file]


def train_part(sequence: np.ndarray) -> np.ndarray:
  """Returns what a user is trained on: all but the last two items, or all of fewer than three."""
  return sequence[:-2] if len(sequence) > 2 else sequence


def test_users(sequences: list[np.ndarray]) -> np.ndarray:
  """Returns the rows of the users that have a test target."""
  return np.array([row for row, sequence in enumerate(sequences) if len(sequence) > 2], np.int64)


def metrics(hits: np.ndarray) -> dict:
  """Returns the means of hit rate and NDCG.

  Args:
    hits: (users, TOP), whether the item at that rank is the user's target.
  """
  discounts = 1 / np.log2(np.arange(TOP) + 2)
  return {f"hit@{TOP}": float(hits.sum(1).mean()), f"ndcg@{TOP}": float((hits @ discounts).mean())}


def serve(peer: Peer, warm_users: int) -> None:
  """Warms the peer up, then answers commands until `quit` or the end of the input."""

  def say(answer: dict) -> None:
    print(json.dumps(answer), file=_answers, flush=True)

  peer.train(0.5)
  peer.evaluate(warm_users)
  say({"ready": True, "name": peer.name, "version": peer.version, "parameters": peer.parameters, "note": peer.note})
  for line in sys.stdin:
    match line.split():
      case ["train", seconds]:
        say(peer.train(float(seconds)))
      case ["evaluate", users]:
        say(peer.evaluate(int(users)))
      case ["quit"]:
        return
      case _:
        say({"error": f"No such command: {line.strip()!r}"})
