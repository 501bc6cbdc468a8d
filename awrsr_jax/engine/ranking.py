"""Exact ranks, streamed over blocks of items, and the metrics made of them.

rank = 1 + the number of items scored above the target + half the number of other items tied with it. Items of the
user's own history are no rivals, unless the protocol is unfiltered; the target ranks even if it is among them, padding
never does. Memory does not grow with the number of items.
Shapes: B users, S padded history, C candidates, K block of items.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.data.batches import SAMPLED, RankingBatches
from awrsr_jax.engine import processes
from awrsr_jax.engine.feed import Feed, build_rows, place_rows
from awrsr_jax.engine.mesh import stop_flags, to_global
from awrsr_jax.model.backbones import encode_newest, in_full_precision
from awrsr_jax.model.hidden import Hidden, make_block_scan

CUTOFFS = {"hr": (1, 5, 10, 20), "ndcg": (5, 10, 20)}
PROTOCOLS = {
    "full": "full ranking over all items, the user's history filtered",
    "unfiltered": "full ranking over all items, the user's history NOT filtered (not comparable with filtered ranking)",
    "uniform100": "SAMPLED: the target among 100 items drawn uniformly outside the user's history "
                  "(not comparable with full ranking)",
    "popular100": "SAMPLED: the target among 100 items drawn by popularity outside the user's history "
                  "(not comparable with full ranking)",
}
EXACT = 1 << 23  # items: so many halves are exact as float32
BATCHES_AHEAD = 4  # that devices may have waiting, so that they never do and a notice to stop is heard soon
TIE_RULE = "rank = 1 + items scored higher + half of the other items tied with the target"


def rank_among_all(backbone: nn.Module, mesh: Mesh, catalogue: Any, hidden: Hidden, target_B: jax.Array,
                   seen_BxS: jax.Array, block_items: int) -> jax.Array:
  """Ranks each target among all items but those given as seen.

  Every device of the "model" axis scores the rows of the catalogue that it holds, a block at a time, and only scores of
  targets and counts travel between devices. The same matrix product gives the target's score and those it is compared
  with, so that ties are not lost to rounding: one block is scored once, several are gone through twice, first for the
  target's score and then to compare.

  Args:
    backbone: for `score_rows` and `num_items`.
    mesh: rows of the catalogue are split over "model", users over "data".
    catalogue: tables (V, D).
    hidden: of B users.
    target_B, seen_BxS: item numbers.
    block_items: K.

  Returns:
    (B,) float32 ranks, from 1; NaN where a score was NaN.
  """
  def rank_rows(catalogue: Any, hidden: Hidden, target_B: jax.Array, seen_BxS: jax.Array) -> jax.Array:
    first_row = jax.lax.axis_index("model") * len(jax.tree.leaves(catalogue)[0])
    scan = make_block_scan(backbone.score_rows, hidden, catalogue, first_row, backbone.num_items,
                           min(block_items, EXACT))
    user = jnp.arange(len(target_B))

    def read_target(target_score_B: jax.Array, scores: jax.Array, first: jax.Array, _: jax.Array) -> jax.Array:
      size = scores.shape[1]
      here = (target_B >= first) & (target_B < first + size)
      return jnp.where(here, scores[user, jnp.clip(target_B - first, 0, size - 1)], target_score_B)

    target_score_B = jax.lax.pmax(scan(read_target, jnp.full(len(target_B), -jnp.inf)), "model")

    def halves(scores: jax.Array) -> jax.Array:
      """Returns 2 where a score is higher than the target's, 1 where it is tied, NaN where it is broken."""
      above = (scores > target_score_B[:, None]).astype(jnp.float32) + (scores >= target_score_B[:, None])
      return jnp.where(jnp.isnan(scores), jnp.nan, jnp.where(scores > -jnp.inf, above, 0))

    def compare(carry: tuple[jax.Array, jax.Array], scores: jax.Array, first: jax.Array,
                is_new: jax.Array) -> tuple[jax.Array, jax.Array]:
      total, broken = carry
      column = jnp.clip(apart - first, 0, scores.shape[1] - 1)
      here = (apart == first + column) & is_new[column]
      count = jnp.sum(jnp.where(is_new[None], halves(scores), 0), axis=1) - jnp.sum(
          jnp.where(here, halves(jnp.take_along_axis(scores, column, axis=1)), 0), axis=1)
      return total + jnp.nan_to_num(count).astype(jnp.int32), broken | jnp.isnan(count)

    apart = jnp.concatenate([target_B[:, None], once(seen_BxS, target_B)], axis=1)  # no rivals
    total, broken = scan(compare, (jnp.zeros(len(target_B), jnp.int32), jnp.zeros(len(target_B), bool)))
    total, broken = jax.lax.psum((total, broken.astype(jnp.int32)), "model")
    return jnp.where(broken > 0, jnp.nan, 1 + total / 2)

  users = PartitionSpec("data")
  ranks = jax.shard_map(rank_rows, mesh=mesh, in_specs=(PartitionSpec("model"), users, users, users), out_specs=users,
                        check_vma=False)
  return ranks(catalogue, hidden, target_B, seen_BxS)


def once(seen_BxS: jax.Array, target_B: jax.Array) -> jax.Array:
  """Returns (B, S): each item of a history once, without the target; the rest is 0."""
  seen = jnp.sort(seen_BxS, axis=1)
  repeated = jnp.concatenate([jnp.zeros_like(seen[:, :1], bool), seen[:, 1:] == seen[:, :-1]], axis=1)
  return jnp.where(repeated | (seen == target_B[:, None]), 0, seen)


def rank_among_candidates(backbone: nn.Module, params: Any, hidden: Hidden, target_B: jax.Array,
                          candidates_BxC: jax.Array) -> jax.Array:
  """Ranks each target among its own candidates. Returns (B,) float32, NaN where a score was NaN."""
  items = jnp.concatenate([target_B[:, None], candidates_BxC], axis=1)
  scores: Any = backbone.apply({"params": params}, hidden, items, method="score")
  target, others = scores[:, :1], scores[:, 1:]
  rank = 1 + jnp.sum(others > target, axis=1) + jnp.sum(others == target, axis=1) / 2
  return jnp.where(jnp.any(jnp.isnan(scores), axis=1), jnp.nan, rank)


def make_rank_step(backbone: nn.Module, mesh: Mesh, block_items: int) -> jax.stages.Wrapped:
  """Returns the jitted (params, feed, lengths=None, filtered=True) -> ((B,) ranks, whether to stop), whole everywhere.

  The feed is a ranking batch; or, where `lengths` (S, L) are given (static), row `index` of the users of a split and
  the corpus that lives on the devices, see _resident_feeds. Without `filtered` (static) items of the history rank, too.
  """
  def rank_step(params: Any, feed: Feed, lengths: tuple[int, int] | None = None,
                filtered: bool = True) -> tuple[jax.Array, jax.Array]:
    batch = feed if lengths is None else _build_batch(feed, *lengths, mesh)
    hidden = encode_newest(backbone, params, batch["inputs"])
    if "candidates" in batch:
      ranks = rank_among_candidates(backbone, params, hidden, batch["target"], batch["candidates"])
    else:
      catalogue = backbone.apply({"params": params}, method="catalogue")
      seen_BxS = batch["seen"] if filtered else batch["seen"][:, :0]
      ranks = rank_among_all(backbone, mesh, catalogue, hidden, batch["target"], seen_BxS, block_items)
    return ranks, jnp.max(batch["stop"])
  return jax.jit(in_full_precision(rank_step), static_argnames=("lengths", "filtered"),
                 out_shardings=NamedSharding(mesh, PartitionSpec()))


def _build_batch(feed: Feed, seen_length: int, length: int, mesh: Mesh) -> Feed:
  """Returns a ranking batch without candidates, made on the devices."""
  starts_B, ends_B = feed["starts"][feed["index"]], feed["ends"][feed["index"]]
  seen_BxS = build_rows(feed["items"], starts_B, ends_B, seen_length, mesh)
  return {"inputs": seen_BxS[:, -length:], "seen": seen_BxS, "stop": feed["stop"],
          "target": jnp.where(feed["mask"][feed["index"]] > 0, feed["items"][ends_B], 0)}


def _resident_feeds(mesh: Mesh, batches: RankingBatches, items: jax.Array) -> Iterator[tuple[Feed, tuple[int, int]]]:
  """Yields what the rank step takes for each batch, apart from `stop`, and its lengths."""
  starts, ends, mask, lengths = batches.bounds()
  feed = {"items": items, "starts": place_rows(mesh, starts), "ends": place_rows(mesh, ends),
          "mask": place_rows(mesh, mask)}
  for index, of_batch in enumerate(lengths):
    yield feed | {"index": np.int32(index)}, of_batch


def rank_users(rank_step: Callable, params: Any, batches: RankingBatches, mesh: Mesh,
               told_to_stop: Callable[[], bool] = lambda: False, items: jax.Array | None = None) -> np.ndarray:
  """Returns (C,) the rank of every target, in the order of `batches.targets`: every target once.

  Args:
    rank_step: from make_rank_step.
    params: of the backbone.
    batches: of one split.
    mesh: where params live.
    told_to_stop: whether this process was.
    items: the corpus, where it lives on the devices: full ranking then sends no batch.

  Raises:
    Preempted: a process was told to stop.
    FloatingPointError: a score was NaN.
  """
  ranks = []
  pending: collections.deque[tuple[jax.Array, jax.Array]] = collections.deque()

  def read_oldest() -> None:
    rank_B, stop = pending.popleft()
    if int(stop):
      raise processes.Preempted(f"while ranking the {batches.split} split")
    ranks.append(np.asarray(rank_B))

  if items is not None and batches.protocol not in SAMPLED:
    feeds = _resident_feeds(mesh, batches, items)
  else:
    feeds = ((to_global(mesh, batch), None) for batch in batches)
  for feed, lengths in feeds:
    pending.append(rank_step(params, feed | {"stop": stop_flags(mesh, told_to_stop())}, lengths=lengths,
                             filtered=batches.filtered))
    if len(pending) > BATCHES_AHEAD:
      read_oldest()
  while pending:
    read_oldest()
  ranks = np.concatenate(ranks)[:len(batches.targets)]
  if np.isnan(ranks).any():
    raise FloatingPointError(f"{np.isnan(ranks).sum()} of {len(ranks)} users of the {batches.split} split have a NaN "
                             "among their scores; the parameters are damaged")
  return ranks


def summarize(ranks: Iterable[float]) -> dict[str, float]:
  """Returns hr@k, ndcg@k and mrr (over the full list), each the mean over users, from their ranks."""
  ranks = np.asarray(ranks, np.float64)
  gain = {"hr": np.ones_like(ranks), "ndcg": 1 / np.log2(ranks + 1)}
  metrics = {f"{name}@{k}": float(np.mean(gain[name] * (ranks <= k))) for name, cutoffs in CUTOFFS.items()
             for k in cutoffs}
  return metrics | {"mrr": float(np.mean(1 / ranks))}


def rank_by(batches: RankingBatches, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """Returns (C,) the ranks of all targets under the same protocol, by scores that numpy makes: baselines, oracles.

  Args:
    batches: of one split, whole.
    score: histories (B, S) of item numbers, left-padded with 0 -> new (B, I + 1) floats, larger is better.
  """
  ranks = []
  for batch in batches:
    scores = score(batch["seen"])
    rows = np.arange(len(scores))
    target = scores[rows, batch["target"]].copy()[:, None]
    if "candidates" in batch:
      scores = np.take_along_axis(scores, batch["candidates"], axis=1)
    else:
      if batches.filtered:
        np.put_along_axis(scores, batch["seen"], -np.inf, axis=1)
      scores[rows, batch["target"]] = -np.inf
      scores[:, 0] = -np.inf
    tied = np.sum((scores == target) & (scores > -np.inf), axis=1)
    ranks.append((1 + np.sum(scores > target, axis=1) + tied / 2)[batch["mask"] > 0])
  return np.concatenate(ranks)


def describe_protocol(protocol: str, split: str) -> str:
  """Returns the protocol in words, as it is printed with every result; `split` is the split in words."""
  return f"{split}, {PROTOCOLS[protocol]}; {TIE_RULE}"
