"""The mesh: which devices, where each array lives, and how a batch gets onto them (8 simulated devices)."""

import dataclasses
import types

import jax
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from awrsr_jax.config import default
from awrsr_jax.engine import mesh as meshes


def make(data, model):
  """Returns the mesh of a config with these values."""
  return meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))


@pytest.mark.parametrize("data,model,shape", [
    (-1, 1, (8, 1)), (-1, 2, (4, 2)), (-1, 8, (1, 8)), (2, 4, (2, 4)), (1, 1, (1, 1)), (3, 2, (3, 2)), (1, 5, (1, 5))])
def test_a_mesh_has_the_shape_asked_for_and_takes_the_first_devices(data, model, shape):
  mesh = make(data, model)
  assert mesh.axis_names == ("data", "model") and mesh.devices.shape == shape
  assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()[:np.prod(shape)]}


@pytest.mark.parametrize("data,model", [(-1, 3), (-1, 16), (3, 3), (9, 1), (1, 9)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(data, model):
  with pytest.raises(ValueError, match=rf"config.mesh.data={data} x config.mesh.model={model} does not fit 8 devices"):
    make(data, model)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What of a TPU device its place in a mesh depends on."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str
  platform: str = "tpu"
  process_index: int = 0
  core_on_chip: int = 0


def chips(x, y, kind):
  """Returns the devices of a slice, in JAX's order."""
  return [Chip(number, (number % x, number // x, 0), kind) for number in range(x * y)]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("topology, shape", [((4, 4), (8, 2)), ((8, 8), (4, 16))])
def test_a_mesh_may_split_an_axis_of_a_tpu_topology(topology, shape, kind, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: chips(*topology, kind))
  mesh = make(*shape)
  assert mesh.devices.shape == shape and mesh.axis_types == (AxisType.Auto,) * 2
  assert sorted(chip.id for chip in mesh.devices.flat) == list(range(np.prod(topology)))


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_tpu_chips_that_are_no_block_are_refused(kind, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: chips(2, 2, kind))
  with pytest.raises(ValueError, match=r"data=3 x config.mesh.model=1: the first 3 of 4 devices are no full block"):
    make(3, 1)


def test_a_batch_that_does_not_split_is_an_error_that_names_the_key_and_a_size_that_does():
  config = default()
  config.train.batch_size, config.eval.batch_size = 8, 4
  meshes.check_config(4, 2, config)
  config.eval.batch_size = 10
  with pytest.raises(ValueError, match=r"config.eval.batch_size=10 must be a multiple of the 4 devices .* take 12"):
    meshes.check_config(4, 2, config)
  config.eval.batch_size, config.train.accumulate = 4, 3
  with pytest.raises(ValueError, match=r"train.batch_size=8 must .* axis x config.train.accumulate=3; take 12 or"):
    meshes.check_config(4, 2, config)
  with pytest.raises(ValueError, match=r"=8 must be a multiple of config.train.accumulate=3; take 9 or lower train.a"):
    meshes.check_config(1, 8, config)  # there is no fewer devices to take
  config.train.batch_size = 21
  meshes.check_config(1, 8, config)  # the model axis does not split batches
  config.model.table_multiple = 20
  with pytest.raises(ValueError, match=r"config.model.table_multiple=20 must be a multiple of config.mesh.model=8"):
    meshes.check_config(1, 8, config)


def test_the_item_table_and_what_mirrors_it_is_split_and_nothing_else():
  shape = jax.ShapeDtypeStruct((16, 4), np.float32)
  params = {"embedding": {"item_table": shape, "position_table": shape}, "out": {"kernel": shape}}
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
  tree = {"params": params, "opt_state": optax.adamw(1e-3).init(zeros)}
  mesh = make(2, 4)
  placed = {jax.tree_util.keystr(path, simple=True, separator="/"): sharding for path, sharding in
            jax.tree_util.tree_flatten_with_path(meshes.shardings(mesh, tree))[0]}
  split = {name for name, sharding in placed.items() if sharding == NamedSharding(mesh, PartitionSpec("model", None))}
  assert len(split) == 3 and all(name.endswith("embedding/item_table") for name in split)
  assert {name.split("/item_table")[0].split("/")[-2] for name in split} == {"params", "mu", "nu"}
  whole = {name for name, sharding in placed.items() if sharding == NamedSharding(mesh, PartitionSpec())}
  assert split | whole == placed.keys() and any(name.endswith("count") for name in whole)


@pytest.mark.parametrize("data,model", [(1, 1), (8, 1), (4, 2), (2, 1)])
def test_to_global_gives_each_data_device_its_own_rows(data, model):
  batch = {"inputs": np.arange(24, dtype=np.int32).reshape(8, 3), "mask": np.arange(8, dtype=np.float32)}
  mesh = make(data, model)
  placed = meshes.to_global(mesh, batch)
  assert placed.keys() == {*batch, "stop"} and placed["stop"].shape == (data, model) and not placed["stop"].any()
  assert meshes.stop_flags(mesh, True).all()
  for name, rows in batch.items():
    assert placed[name].shape == rows.shape and placed[name].dtype == rows.dtype
    assert len(placed[name].addressable_shards) == data * model
    for shard in placed[name].addressable_shards:
      at = np.argwhere(mesh.device_ids == shard.device.id)[0][0]  # the device's place on the data axis
      np.testing.assert_array_equal(shard.data, np.split(rows, data)[at])


def test_replicate_puts_the_whole_on_every_device():
  whole = meshes.replicate(make(4, 2), np.arange(8))
  assert len(whole.addressable_shards) == 8
  assert all(np.array_equal(shard.data, np.arange(8)) for shard in whole.addressable_shards)


@pytest.mark.parametrize("owners, parts", [
    ([[0, 0], [0, 0], [1, 1], [1, 1]], (0, 1)),  # process 0 has two places of the data axis
    ([[1, 1], [0, 0], [1, 1], [0, 0]], (1, 3)),  # as a topology may lay devices out
    ([[0, 1], [0, 1], [0, 1], [0, 1]], (0, 1, 2, 3)),  # the model axis spans processes: both take every part
])
def test_a_process_takes_the_parts_of_its_devices(owners, parts):
  device = lambda process: types.SimpleNamespace(process_index=process)  # noqa: E731
  mesh = types.SimpleNamespace(devices=np.array([[device(owner) for owner in row] for row in owners]),
                               shape={"data": 4, "model": 2})
  assert meshes.local_parts.__wrapped__(mesh) == (parts, 4)


def test_pieces_put_together_are_the_array_and_cross_processes_bit_for_bit(monkeypatch):
  mesh = make(2, 4)
  x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  x[0] = -0.0
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("model", None)))
  assert [piece.shape for piece in meshes.pieces(split)] == [(8, 3)]
  monkeypatch.setattr(type(split), "is_fully_addressable", False)  # as if other hosts held a part
  found = list(meshes.pieces(split))
  assert [piece.shape for piece in found] == [(2, 3)] * 4 and np.concatenate(found).tobytes() == x.tobytes()
