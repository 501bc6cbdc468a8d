"""How batches reach the devices: built there from a corpus that lives on them, or built on the host and sent.

Both give the same batches, functions of (seed, step). Shapes: N interactions, T steps of an epoch, B rows, L length.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.data import batches as data_batches
from awrsr_jax.engine import mesh as meshes

RESIDENT_BYTES = 1 << 30  # the largest corpus that goes onto every device by itself
STEPS_PER_CALL = 16  # on accelerators, where a step may take less than calling it

Feed = dict[str, Any]  # of arrays, or tuples with one a bucket


@dataclasses.dataclass(frozen=True)
class Call:
  """The next call of the train step.

  Attributes:
    lengths: of the buckets, a static argument; () where the feed is the batch itself.
    feed: what it takes, apart from `stop`.
    steps: how many steps it makes.
  """

  lengths: tuple[int, ...]
  feed: Feed
  steps: int


def is_resident(config: Any, batches: data_batches.TrainBatches) -> bool:
  """Whether the corpus lives on the devices, in memory or in files before; by itself where it is small enough.

  Raises:
    ValueError: it is to live there and is too large to be indexed.
  """
  if config.data.feed == "device" and len(batches.items) > np.iinfo(np.int32).max:
    raise ValueError(f"config.data.feed=device: {len(batches.items)} interactions are more than int32 can index; use "
                     "auto or host")
  return {"device": True, "host": False, "auto": resident_bytes(batches) <= RESIDENT_BYTES}[config.data.feed]


def resident_bytes(batches: data_batches.TrainBatches, devices: int = 1) -> int:
  """Returns what a corpus takes on each device where it lives there: items whole, an epoch's bounds split over some."""
  return 4 * (len(batches.items) + 2 * len(batches.starts) // devices)


def steps_per_call(config: Any, mesh: Mesh) -> int:
  """Returns the most steps of one call."""
  if config.train.steps_per_call is not None:
    return config.train.steps_per_call
  return 1 if mesh.devices.flat[0].platform == "cpu" else STEPS_PER_CALL


def build_rows(items: jax.Array, starts_B: jax.Array, ends_B: jax.Array, length: int, mesh: Mesh) -> jax.Array:
  """Returns rows_BxL as gather_rows does, made where they are wanted."""
  rows = data_batches.gather_rows(items, starts_B, ends_B, length, jnp)
  return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec("data")))


def build_batch(feed: Feed, index: jax.Array, lengths: tuple[int, ...], mesh: Mesh) -> Feed:
  """Returns inputs and targets, (B, L) for each bucket, of one step of an epoch that lives on the devices."""
  rows = lambda first, last: tuple(  # noqa: E731
      build_rows(feed["items"], starts_TxB[index] + first, ends_TxB[index] - 1 + last, length, mesh)
      for (starts_TxB, ends_TxB), length in zip(feed["bounds"], lengths, strict=True))
  return {"inputs": rows(0, 0), "targets": rows(1, 1)}


def place_rows(mesh: Mesh, rows_TxB: np.ndarray) -> jax.Array:
  """Returns (T, B) int32 on the devices, B split as in a batch; every process has all of it."""
  split = NamedSharding(mesh, PartitionSpec(None, "data"))
  rows_TxB = rows_TxB.astype(np.int32)
  return jax.make_array_from_callback(rows_TxB.shape, split, lambda index: rows_TxB[index])


def resident_calls(mesh: Mesh, batches: data_batches.TrainBatches, items: jax.Array, start: int, most: int,
                   steps_to_pause: Callable[[int], int]) -> Iterator[Call]:
  """Yields the calls from step `start` to the end: the rows of an epoch are sent once, then only an index.

  Args:
    mesh: of the devices.
    batches: of the run.
    items: the corpus, whole on every device.
    start: steps done.
    most: steps of one call, at most.
    steps_to_pause: steps done -> how many may follow before the host has something to do.
  """
  step = start
  while step < len(batches):
    epoch, first = divmod(step, batches.steps_per_epoch)
    feed = {"items": items, "bounds": jax.tree.map(functools.partial(place_rows, mesh), batches.epoch_bounds(epoch))}
    while first < batches.steps_per_epoch:
      count = min(most, steps_to_pause(step), batches.steps_per_epoch - first)
      several = {"count": np.int32(count)} if most > 1 else {}
      yield Call(batches.buckets, feed | {"first": np.int32(first)} | several, count)
      first, step = first + count, step + count


def streamed_calls(mesh: Mesh, batches: data_batches.TrainBatches, start: int) -> Iterator[Call]:
  """Yields the calls from step `start` to the end: batches that background threads build ahead."""
  for batch in data_batches.stream(batches, start):
    yield Call((), meshes.to_global(mesh, batch), 1)
