"""How much memory a run takes on each device, planned from shapes alone, and measured."""

import math
import re
import resource
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.ranking import make_rank_step
from awrsr_jax.engine.state import make_init, make_optimizer, vectors_template
from awrsr_jax.engine.step import make_train_step
from awrsr_jax.model.backbones import build_backbone

LARGEST = 3  # arrays that are named


def plan(config: Any, num_items: int, mesh: Mesh, corpus_bytes: int = 0) -> dict[str, Any]:
  """Compiles a train step and a ranking step of full length for a mesh, and reads what they take; nothing is allocated.

  The compiler of the mesh's own devices says it; simulated CPU devices stand in for ones that are not there.

  Args:
    config: finalized.
    num_items: I.
    mesh: of any devices, in this process.
    corpus_bytes: of the corpus on each device, see feed.resident_bytes.

  Returns:
    Bytes on each device: parameters, optimizer, corpus; init, train_step and rank_step (what is alive at most while
    they run, beside those three); peak (the most of all); `largest`, the largest arrays made in a train step, as text
    and bytes.
  """
  backbone = build_backbone(config, num_items)
  optimizer = make_optimizer(config.train, total_steps=1)
  init = make_init(backbone, optimizer, config.seed, mesh)
  state = meshes.template(mesh, jax.eval_shape(init, None))
  vectors = None if config.train.item_start == "random" else vectors_template(backbone, mesh)
  array = lambda *shape, split=("data",): jax.ShapeDtypeStruct(  # noqa: E731
      shape, np.int32, sharding=NamedSharding(mesh, PartitionSpec(*split)))
  length, stop = config.data.max_length, array(*mesh.devices.shape, split=("data", "model"))
  rows, users = config.train.batch_size, config.eval.batch_size
  trained = make_train_step(backbone, mesh, optimizer, config, targets_per_step=1.0).lower(
      state, {"inputs": array(rows, length), "targets": array(rows, length), "stop": stop},
      array(num_items, split=())).compile()
  ranked = make_rank_step(backbone, mesh, config.eval.block_items).lower(
      state.params, {"inputs": array(users, length), "seen": array(users, length), "target": array(users),
                     "stop": stop}).compile()
  sizes = {name: sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                     for leaf in jax.tree.leaves(tree))
           for name, tree in (("parameters", state.params), ("optimizer", state.opt_state))}
  held = sum(sizes.values())
  beside = {"init": count_bytes(init.lower(vectors).compile()) - held, "train_step": count_bytes(trained) - held,
            "rank_step": count_bytes(ranked) - sizes["parameters"]}
  return sizes | {"corpus": corpus_bytes} | beside | {
      "peak": held + corpus_bytes + max(beside.values()), "largest": largest_arrays(trained)}


def count_bytes(program: jax.stages.Compiled) -> int:
  """Returns what a compiled program takes on a device: arguments, results and everything between."""
  stats = plan_of(program)
  return (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
          + stats.temp_size_in_bytes)


def plan_of(program: jax.stages.Compiled) -> Any:
  """Returns XLA's memory plan of a compiled program. Raises ValueError where a backend does not tell it."""
  plan = program.memory_analysis()
  if plan is None:
    raise ValueError(f"XLA does not tell what memory a program takes on {jax.default_backend()}")
  return plan


def largest_arrays(program: jax.stages.Compiled) -> dict[str, int]:
  """Returns the largest arrays that a compiled program makes on a device, as type and shape, with their bytes."""
  bits = {"pred": 8, "bf16": 16, **{f"{kind}{size}": size for kind in "fsu" for size in (8, 16, 32, 64)}}
  found, fused = {}, False
  for line in (program.as_text() or "").splitlines():
    if line.endswith("{"):  # a computation begins; what is inside a fused one is never stored
      fused = "fused" in line.split("(")[0]
    made = re.search(r"= (\w+)\[([\d,]+)\]\S* (?!parameter|get-tuple-element|bitcast)", line)
    if made and not fused and made[1] in bits:
      found[f"{made[1]}[{made[2]}]"] = math.prod(map(int, made[2].split(","))) * bits[made[1]] // 8
  return dict(sorted(found.items(), key=lambda item: -item[1])[:LARGEST])


def describe(planned: dict[str, Any], mesh_shape: tuple[int, int]) -> str:
  """Returns a plan as a table for people."""
  data, model = mesh_shape
  names = {"parameters": "parameters", "optimizer": "optimizer", "corpus": "corpus", "init": "+ to create them",
           "train_step": "+ or a train step (gradients, activations)", "rank_step": "+ or a ranking step",
           "peak": "peak; the largest arrays of a train step:"}
  lines = [f"on each of {data * model} devices ({data} data x {model} model)"]
  lines += [f"  {title:42} {planned[name] / 2 ** 20:10,.1f} MiB" for name, title in names.items()]
  lines += [f"  {name:42} {size / 2 ** 20:10,.1f} MiB" for name, size in planned["largest"].items()]
  state = (planned["parameters"] + planned["optimizer"]) / 2 ** 20
  lines += [f"in the memory of each host, besides: the data, and {state:,.1f} MiB a device of it while a checkpoint is "
            "written"]
  return "\n".join(lines)


def measure_peak() -> dict[str, int]:
  """Returns the most bytes that were taken: "host", by this process, and "device", by its fullest device.

  CPU devices keep no account; their arrays are in "host".
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  device = max((stat.get("peak_bytes_in_use", 0) for stat in stats), default=0)
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
  return {"host": host} | ({"device": device} if device else {})
