"""The cost model of docs/scaling.md beside what the compiled programs do, on 1 to 8 simulated devices.

  PYTHONPATH=. python docs/scaling.py

Prints one line for each loss and mesh: floating-point operations and bytes sent, each device, each train step, as the
model says and as the program has them; and the time of a step on this machine against one device. At the end, how many
rows of a batch one core builds in a second.
"""

import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from awrsr_jax.config import default, finalize
from awrsr_jax.data.batches import TrainBatches
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.objective import CHUNK_POSITIONS
from awrsr_jax.engine.state import init_state, make_optimizer
from awrsr_jax.engine.step import make_train_step
from awrsr_jax.model.backbones import build_backbone
from awrsr_jax.model.hidden import table_rows

ITEMS = 32_000
MESHES = ((1, 1), (2, 1), (8, 1), (4, 2), (2, 4), (1, 8))
LOSSES = ("softmax", "sampled_softmax", "bce")


def make_config(loss: str) -> Any:
  """Returns a SASRec of 2 layers, width 64, n = 32, batch 64, without refinement."""
  config = default()
  config.model.update({"refine": "none", "dropout": 0.0})
  config.data.max_length, config.train.batch_size, config.loss.name = 32, 64, loss
  config.loss.num_negatives = 4 if loss == "bce" else 256
  return finalize(config)


def predict(config: Any, data: int, model: int) -> tuple[float, float]:
  """Returns (operations, bytes sent) of a train step on each device; the formulas of docs/scaling.md."""
  d, f, n, layers = (config.model.width, config.model.ffn_width, config.data.max_length, config.model.layers)
  k, rows = config.loss.num_negatives, table_rows(ITEMS, config.model.table_multiple) / model
  p = config.train.batch_size * n / data  # positions of a device
  blocks = layers * p * 2 * (4 * d * d + 2 * d * f + 2 * n * d)
  scores = {"softmax": p * rows, "sampled_softmax": p * (k + 1), "bce": p * (k + 1)}[config.loss.name] * 2 * d
  operations = 3 * (blocks + scores)
  dense = layers * (4 * d * (d + 1) + d * (f + 1) + f * (d + 1) + 4 * d) + n * d + 2 * d
  shared = k * d if config.loss.name == "sampled_softmax" else 0
  over_data = (2 * rows * d + dense + shared) if data > 1 else 0  # the table as looked up, and as scored
  looked_up = {"softmax": p * (d + 3), "sampled_softmax": (p + k) * d, "bce": p * (k + 1) * d}[config.loss.name]
  over_model = (p * d + looked_up) if model > 1 else 0
  return operations, 4 * (over_data + over_model)


def walk(program: str, chunks: int) -> Iterator[tuple[str, int]]:
  """Yields (line, how often it runs) of a compiled program, through its loops and calls.

  The one loop whose count depends on the data, over chunks of real positions in the full softmax, runs `chunks` times.
  """
  bodies: dict[str, list[str]] = {}
  name = entry = ""
  for line in program.splitlines():
    if line.endswith("{") and " -> " in line:
      name = re.search(r"%?([\w.\-]+) \(", line)[1]
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith(" "):
      bodies[name].append(line)

  def visit(name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in bodies[name]:
      yield line, times
      trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      for called in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
        if " all-reduce" not in line and " reduce(" not in line and " scatter(" not in line:
          yield from visit(called, times * (int(trips[1]) if trips else chunks if "body=" in line else 1))

  yield from visit(entry, 1)


def read(program: str, chunks: int) -> tuple[float, float]:
  """Returns (operations of matrix products, bytes sent) of a compiled program on each device."""
  operations = sent = 0
  shapes = dict(re.findall(r"%([\w.\-]+) = \w+\[([\d,]*)\]", program))
  size = lambda shape: math.prod(int(n) for n in shape.split(",") if n)  # noqa: E731
  for line, times in walk(program, chunks):
    dot = re.search(r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}", line)
    if dot:
      sides = shapes[dot[2]].split(",")
      operations += times * 2 * size(dot[1]) * math.prod(int(sides[int(axis)]) for axis in dot[3].split(","))
    collective = re.search(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line)
    if collective and not re.search(r"replica_groups=(\{\{\d\}|\[\d,1\])", line):  # of one device: nothing is sent
      made = line.partition(" = ")[2].partition("(%")[0]
      sent += times * 4 * sum(map(size, re.findall(r"\w\d+\[([\d,]*)\]", made)))
  return operations, sent


def time_rows() -> float:
  """Returns rows a second of a sixteenth of batches of 8,192 rows of n = 50, from 1 M histories of 60 items."""
  starts = np.arange(0, 60_000_000, 60)
  items = np.random.default_rng(0).integers(1, 10_000_001, starts[-1] + 60, dtype=np.int32)
  batches = TrainBatches(items, starts, starts + 51, (50,), batch_size=8192, epochs=1, seed=0, multiple=16,
                         parts=((3,), 16))
  batches[0]  # shuffles the epoch
  began = time.monotonic()
  for step in range(1, 101):
    batches[step]
  return 100 * batches.sizes[0] / 16 / (time.monotonic() - began)


def main() -> None:
  """Prints the table."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  print("| loss | data x model | MFLOP: model | program | MB sent: model | program | time of a step |")
  print("|---|---|---|---|---|---|---|")
  for loss in LOSSES:
    config = make_config(loss)
    backbone, optimizer = build_backbone(config, ITEMS), make_optimizer(config.train, 1)
    alone = None
    for data, model in MESHES:
      mesh = meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))
      state = init_state(backbone, optimizer, 0, mesh)
      rows = np.random.default_rng(0).integers(1, ITEMS + 1, (2, 64, 32)).astype(np.int32)
      batch = meshes.to_global(mesh, {"inputs": rows[0], "targets": rows[1]})
      popularity = meshes.replicate(mesh, np.arange(1, ITEMS + 1, dtype=np.int32))
      step = make_train_step(backbone, mesh, optimizer, config, 1.0).lower(state, batch, popularity).compile()
      times = []
      for _ in range(6):
        began = time.monotonic()
        state, _ = jax.block_until_ready(step(state, batch, popularity))
        times.append(time.monotonic() - began)
      alone = alone or min(times)
      positions = rows[0].size // data  # of a device; all are real
      chunks = -(-positions // min(positions, CHUNK_POSITIONS))
      (flop, sent), (real_flop, real_sent) = predict(config, data, model), read(step.as_text(), chunks)
      print(f"| {loss} | {data} x {model} | {flop / 1e6:,.0f} | {real_flop / 1e6:,.0f} | {sent / 1e6:.2f} | "
            f"{real_sent / 1e6:.2f} | {min(times) / alone:.2f} |", flush=True)
  print(f"{time_rows():,.0f} rows a second")


if __name__ == "__main__":
  main()
