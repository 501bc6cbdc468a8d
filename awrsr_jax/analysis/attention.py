"""Attention of a trained model over the histories of its test split: which histories, and where attention looks.

The histories are those that the test split is ranked from: what came before a user's last test target, of it the newest
n items, as the model sees them. Shapes: B histories, H heads, L padded length, n the longest length, N layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awrsr_jax.analysis.runs import Run
from awrsr_jax.config import restore
from awrsr_jax.data.batches import gather_rows, history_lengths
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.data.splits import users_of
from awrsr_jax.engine.run_folder import read_data
from awrsr_jax.inference.standalone import round_up
from awrsr_jax.inference.trained import Trained
from awrsr_jax.model.backbones import attention_maps, in_full_precision

NAMES = {"first_order": "first order", "refined": "refined"}
LONG = 10  # items of a history that the default user has at least
MOST_BYTES = 1 << 27  # attention weights of a batch: 128 MiB
MOST_USERS = 64  # of a batch


@dataclasses.dataclass(frozen=True)
class Histories:
  """The histories of the test split: user (U,) numbers from 0, and the place (U,) in `corpus.items` where each ends."""

  corpus: Corpus
  users: np.ndarray
  ends: np.ndarray

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """(U,) how many items each has, from 1."""
    return history_lengths(self.corpus, self.ends)

  def newest(self, rows: np.ndarray, length: int) -> np.ndarray:
    """Returns (B, length) int32 item numbers: the newest of each history, left-padded with 0."""
    return gather_rows(self.corpus.items, self.corpus.offsets[self.users[rows]], self.ends[rows], length)


@dataclasses.dataclass(frozen=True)
class Profile:
  """Where attention looks, averaged over the queries of a sample of histories: every real position is a query.

  The keys of a query are the real positions up to itself. Of "first_order" and "refined" weights each (N layers):

  Attributes:
    users: how many histories.
    queries: (n,) how many queries have k = 1 .. n keys.
    attention: (N, H, n) the mean weight at distance d = 0 .. n - 1, query position - key position. A query without a
      key at d counts with 0, so that a profile sums to 1 (with a sink: to what queries do not leave to it).
    entropy: (N, H, n) the mean entropy, in bits, of queries with k = 1 .. n keys, of each weight's share in its row;
      NaN where there is none. Even weights have log2(k).
  """

  users: int
  queries: np.ndarray
  attention: dict[str, np.ndarray]
  entropy: dict[str, np.ndarray]

  def relative(self, name: str) -> np.ndarray:
    """Returns (N, H, n) entropy / log2(k): 1 where weights are even; NaN for one key, which leaves no choice."""
    most = np.log2(np.arange(1, len(self.queries) + 1))
    most[0] = np.nan  # the entropy of one key is 0 but for rounding
    return self.entropy[name] / most


def read_histories(run: Run, data_path: str | None = None) -> Histories:
  """Reads the histories of a run's test split from its data.

  Args:
    run: whose config names the data.
    data_path: where the data lie now, instead of `config.data.path`.

  Raises:
    ValueError: see `run_folder.read_data`; or no test target has a history.
  """
  data = restore(run.config, f"{run.folder}/config.json").data
  corpus = read_data(data, run.corpus, run.folder, data_path)
  ends = np.sort(corpus.split.targets["test"])
  ends = ends[history_lengths(corpus, ends) > 0]
  if not len(ends):
    raise ValueError(f"{run.folder}: no test target has a history, so there is no attention to look at")
  users = users_of(corpus.offsets, ends)
  newest = np.append(users[1:] != users[:-1], True)
  return Histories(corpus, users[newest], ends[newest])


def choose(histories: Histories, user: str | None = None) -> int:
  """Returns the row of one history.

  Args:
    histories: of a test split.
    user: a raw user id as text. None: of the histories with at least 10 items the one of median length (the lower
      median; of equal lengths users are in the order of their raw ids). Where none has 10, the longest.

  Raises:
    ValueError: there is no such user, or none with a history in the test split.
  """
  corpus, lengths = histories.corpus, histories.lengths
  if user is not None:
    known = [number for number, raw in enumerate(corpus.user_ids.tolist()) if str(raw) == user]
    if not known:
      raise ValueError(f"--user={user}: {corpus.name} has no such user; its {corpus.num_users} raw ids are like "
                       f"{', '.join(map(str, corpus.user_ids[:3].tolist()))}")
    row = np.flatnonzero(histories.users == known[0])
    if not len(row):
      raise ValueError(f"--user={user} has no history before a test target ({corpus.split.words}); users that have are "
                       f"like {', '.join(map(str, corpus.user_ids[histories.users[:3]].tolist()))}")
    return int(row[0])
  order = np.argsort(lengths, kind="stable")
  long = order[lengths[order] >= LONG]
  return int(long[(len(long) - 1) // 2] if len(long) else order[-1])


def measure_profile(trained: Trained, histories: Histories, users: int, seed: int = 0) -> Profile:
  """Measures where attention looks, over a sample of histories, in batches of bounded memory.

  Args:
    trained: the model.
    histories: to draw from.
    users: how many to draw, without replacement; all where there are fewer.
    seed: of the draw.
  """
  longest, model = trained.config.data.max_length, trained.config.model
  rows = np.random.default_rng(seed).permutation(len(histories.ends))[:users]
  rows = rows[np.argsort(histories.lengths[rows], kind="stable")]
  attention = {name: np.zeros((model.layers, model.heads, longest)) for name in NAMES}
  entropy = {name: np.zeros((model.layers, model.heads, longest)) for name in NAMES}
  queries = np.zeros(longest, np.int64)
  step = _make_step(trained.backbone)
  done = 0
  while done < len(rows):
    size = min(MOST_USERS, len(rows) - done)
    length = padded(min(int(histories.lengths[rows[done + size - 1]]), longest), longest)
    fit = max(1, MOST_BYTES // (2 * model.layers * model.heads * length ** 2 * 4))
    size = min(size, 1 << (fit.bit_length() - 1))  # a power of two, so that filling up does not exceed it
    inputs = histories.newest(rows[done:done + size], length)
    inputs = np.pad(inputs, ((0, padded(size, MOST_USERS) - size), (0, 0)))  # a row of padding has no query
    counts, layers = jax.device_get(step(trained.params, inputs))
    queries[:length] += counts
    for layer, found in enumerate(layers):
      for name, (sums_HxLxL, entropy_HxL) in found.items():
        for distance in range(length):
          attention[name][layer, :, distance] += np.trace(sums_HxLxL, -distance, 1, 2, np.float64)
        entropy[name][layer, :, :length] += entropy_HxL
    done += size
  with np.errstate(invalid="ignore"):
    return Profile(len(rows), queries, {name: sums / queries.sum() for name, sums in attention.items()},
                   {name: sums / queries for name, sums in entropy.items()})


def entropy_bits(weights: jax.Array) -> jax.Array:
  """Returns the entropy in bits of the shares that the weights of the last axis have in their sum.

  Beside a sink they sum to less than 1. What is not positive has no share; nothing but that has the entropy 0.
  """
  weights = jnp.maximum(weights, 0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  shares = weights / jnp.where(total > 0, total, 1)
  return -jnp.sum(jnp.where(shares > 0, shares * jnp.log2(jnp.where(shares > 0, shares, 1)), 0), axis=-1)


def _make_step(backbone: Any) -> Any:
  """Returns a compiled function: params, inputs (B, L) -> queries by number of keys (L,), and for each layer, of each
  kind of weights, their sum over B (H, L, L) and the sum of entropies by number of keys (H, L)."""
  def step(params: Any, inputs_BxL: jax.Array) -> tuple[jax.Array, list[dict[str, tuple[jax.Array, jax.Array]]]]:
    real_BxL, length = inputs_BxL > 0, inputs_BxL.shape[1]
    keys_BxL = jnp.where(real_BxL, jnp.cumsum(real_BxL, axis=1), 0)
    by_keys = functools.partial(jax.ops.segment_sum, segment_ids=keys_BxL.reshape(-1), num_segments=length + 1)
    found = []
    for layer in attention_maps(backbone, params, inputs_BxL):
      of_layer = {}
      for name, weights_BxHxLxL in layer.items():
        kept = jnp.where(real_BxL[:, None, :, None], weights_BxHxLxL, 0)
        bits_NxH = jnp.moveaxis(entropy_bits(kept), 1, -1).reshape(-1, kept.shape[1])
        of_layer[name] = kept.sum(axis=0), by_keys(bits_NxH)[1:].T
      found.append(of_layer)
    return by_keys(jnp.ones(real_BxL.size, jnp.int32))[1:], found
  return jax.jit(in_full_precision(step))


def padded(size: int, most: int) -> int:
  """Returns the next power of two, or `most` where that is less: few sizes are compiled."""
  return min(round_up(size), most)
