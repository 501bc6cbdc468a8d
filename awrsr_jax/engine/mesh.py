"""Devices: the ("data", "model") mesh, where each array lives on it, and local rows -> global arrays."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The path of a parameter, or of optimizer state that mirrors it -> how it is split. First match wins.
RULES = (
    (r"item_table", PartitionSpec("model", None)),
    (r"", PartitionSpec()),
)


def make_mesh(mesh: Any) -> Mesh:
  """Lays devices out as (data, model).

  Args:
    mesh: the `mesh` node of a config; data = -1 takes all devices that model leaves, data = 1 and model = 1 the first.

  Raises:
    ValueError: there are fewer than data x model devices, or data = -1 leaves some over.
  """
  devices = jax.devices()
  data = len(devices) // mesh.model if mesh.data == -1 else mesh.data
  used = data * mesh.model
  if not 1 <= used <= len(devices) or (mesh.data == -1 and used != len(devices)):
    raise ValueError(f"config.mesh.data={mesh.data} x config.mesh.model={mesh.model} does not fit {len(devices)} "
                     "devices; set mesh.data=-1 and mesh.model to a divisor of the devices")
  return jax.make_mesh((data, mesh.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[:used])


def check_config(mesh: Mesh, config: Any) -> None:
  """Raises ValueError when batches or the item table do not split evenly over the mesh."""
  data, model = mesh.shape["data"], mesh.shape["model"]
  for name in ("train", "eval"):
    size = config[name].batch_size
    if size % data:
      raise ValueError(f"config.{name}.batch_size={size} must be a multiple of the {data} devices of the data axis; "
                       f"take {-(-size // data) * data} or lower mesh.data")
  if config.model.table_multiple % model:
    raise ValueError(f"config.model.table_multiple={config.model.table_multiple} must be a multiple of "
                     f"config.mesh.model={model}, the devices that share the item table")


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Returns a tree of NamedShardings for a tree of arrays or shapes, by RULES."""
  def place(path: Any, _: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, next(spec for pattern, spec in RULES if re.search(pattern, name)))
  return jax.tree_util.tree_map_with_path(place, tree)


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Returns a batch as global arrays, split over "data"; each process brings its own rows."""
  split = NamedSharding(mesh, PartitionSpec("data"))
  return {name: jax.make_array_from_process_local_data(split, rows) for name, rows in batch.items()}


def replicate(mesh: Mesh, x: Any) -> Any:
  """Returns a tree of arrays, whole on every device."""
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
