"""Devices: the ("data", "model") mesh, where each array lives on it, and local rows -> global arrays."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from awrsr_jax.data.batches import Parts

# The path of a parameter, or of optimizer state that mirrors it -> how it is split. First match wins.
RULES = (
    (r"item_table", PartitionSpec("model", None)),
    (r"", PartitionSpec()),
)


def mesh_sizes(mesh: Any, devices: int) -> tuple[int, int]:
  """Returns (data, model), the devices along each axis.

  Args:
    mesh: the `mesh` node of a config; data = -1 takes all devices that model leaves, data = 1 and model = 1 the first.
    devices: how many there are.

  Raises:
    ValueError: there are fewer than data x model devices, or data = -1 leaves some over.
  """
  data = devices // mesh.model if mesh.data == -1 else mesh.data
  used = data * mesh.model
  if not 1 <= used <= devices or (mesh.data == -1 and used != devices):
    raise ValueError(f"config.mesh.data={mesh.data} x config.mesh.model={mesh.model} does not fit {devices} "
                     "devices; set mesh.data=-1 and mesh.model to a divisor of the devices")
  return data, mesh.model


def make_mesh(mesh: Any) -> Mesh:
  """Lays the devices of all processes out as (data, model).

  Raises:
    ValueError: see mesh_sizes; or a process would have no device; or the TPU chips are no full block.
  """
  devices = jax.devices()
  data, model = mesh_sizes(mesh, len(devices))
  idle = set(range(jax.process_count())) - {device.process_index for device in devices[:data * model]}
  if idle:
    raise ValueError(f"config.mesh.data={data} x config.mesh.model={model} leaves processes {sorted(idle)} of "
                     f"{jax.process_count()} without a device; use all {len(devices)} devices (mesh.data=-1), or start "
                     "fewer processes")
  try:  # jax.make_mesh splits an axis of the topology for TPU v5e alone
    placed = mesh_utils.create_device_mesh((data, model), devices[:data * model], allow_split_physical_axes=True)
  except AssertionError as error:
    raise ValueError(f"config.mesh.data={data} x config.mesh.model={model}: the first {data * model} of {len(devices)} "
                     "devices are no full block of one TPU slice; use all devices of a slice (mesh.data=-1)") from error
  return Mesh(placed, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check_config(data: int, model: int, config: Any) -> None:
  """Raises ValueError when batches or the item table do not split evenly over `data` x `model` devices."""
  for name, pieces in ("train", config.train.accumulate), ("eval", 1):
    size, multiple = config[name].batch_size, data * pieces
    if size % multiple:
      factors = [(f"the {data} devices of the data axis", "mesh.data")] * (data > 1)
      factors += [(f"config.train.accumulate={pieces}", "train.accumulate")] * (pieces > 1)
      what, lower = zip(*factors, strict=True)
      raise ValueError(f"config.{name}.batch_size={size} must be a multiple of {' x '.join(what)}; take "
                       f"{-(-size // multiple) * multiple} or lower {' or '.join(lower)}")
  if config.model.table_multiple % model:
    raise ValueError(f"config.model.table_multiple={config.model.table_multiple} must be a multiple of "
                     f"config.mesh.model={model}, the devices that share the item table")


def split_of(path: Any) -> PartitionSpec:
  """Returns how the array at a path of a state is split, by RULES."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return next(spec for pattern, spec in RULES if re.search(pattern, name))


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Returns a tree of NamedShardings for a tree of arrays or shapes, by RULES."""
  return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, split_of(path)), tree)


def template(mesh: Mesh, tree: Any) -> Any:
  """Returns a tree of shapes and types, each with its place, for a tree of arrays or shapes."""
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree,
                      shardings(mesh, tree))


@functools.cache
def local_parts(mesh: Mesh) -> Parts:
  """Returns which parts of a global batch this process's devices take, in ascending order, and how many there are.

  A part is what one place of the "data" axis takes. Where the "model" axis spans processes, several take the same part.
  """
  here = np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)
  return tuple(np.flatnonzero(here.any(axis=1)).tolist()), mesh.shape["data"]


def to_global(mesh: Mesh, batch: dict[str, Any]) -> dict[str, Any]:
  """Returns a batch as global arrays, split over "data"; each process brings its own parts (see local_parts).

  With it goes `stop`, of a process that was not told to; see stop_flags.
  """
  split = NamedSharding(mesh, PartitionSpec("data"))
  parts, count = local_parts(mesh)

  def place(rows: np.ndarray) -> jax.Array:
    size = len(rows) // len(parts)

    def take(index: Any) -> np.ndarray:
      at = parts.index((index[0].start or 0) // size)
      return rows[at * size:(at + 1) * size]

    return jax.make_array_from_callback((size * count, *rows.shape[1:]), split, take)

  return jax.tree.map(place, batch) | {"stop": stop_flags(mesh, False)}


@functools.cache
def stop_flags(mesh: Mesh, stop: bool) -> jax.Array:
  """Returns (data, model) int32: for each device, whether its process was told to stop."""
  value = int(stop)
  place = NamedSharding(mesh, PartitionSpec("data", "model"))
  return jax.make_array_from_callback(mesh.devices.shape, place, lambda _: np.full((1, 1), value, np.int32))


def replicate(mesh: Mesh, x: np.ndarray) -> jax.Array:
  """Returns an array that every process has, whole on every device."""
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec()), lambda index: x[index])


def pieces(x: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
  """Yields an array on this host, in the order of its rows.

  Where other hosts hold rows of it, it comes in one piece a device of the "model" axis, and no device ever holds more
  than two of them.
  """
  if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
    yield np.asarray(x)
    return
  mesh, words = x.sharding.mesh, PartitionSpec("model")  # type: ignore[attr-defined]

  def send(rows: jax.Array, owner: jax.Array) -> jax.Array:  # as integers: adding 0 must not change -0.0
    rows = jax.lax.bitcast_convert_type(rows, jnp.int32)
    return jax.lax.psum(jnp.where(jax.lax.axis_index("model") == owner, rows, 0), "model")

  from_owner = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=(words, PartitionSpec()), out_specs=PartitionSpec(),
                                     check_vma=False))
  for owner in range(mesh.shape["model"]):
    yield np.asarray(from_owner(x, owner)).view(x.dtype)
