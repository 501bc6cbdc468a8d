"""What a benchmark measures. Each returns {"rows": a table, "notes": lines, and what they were made of}."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from awrsr_jax.bench.contenders import Ours, Peer
from awrsr_jax.engine import memory, objective
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import init_state
from awrsr_jax.engine.train import Job, make_job
from awrsr_jax.model.backbones import build_backbone, param_shapes
from awrsr_jax.model.blocks import SelfAttention
from awrsr_jax.model.hidden import hide_other_rows
from awrsr_jax.model.refine import build_refinement

LENGTHS = (200, 400, 800, 1600, 3200)  # n, of attention memory
CATALOGUES = (10_000, 100_000)  # items, of loss memory


@dataclasses.dataclass(frozen=True)
class Turns:
  """Who takes turns, and how long: `rounds` of training for `seconds` and of ranking `users`, each."""

  refinements: list[str]
  peers: list[str]
  rounds: int
  seconds: float
  users: int


def measure_throughput(config: ml_collections.ConfigDict, turns: Turns) -> dict[str, Any]:
  """Trains and ranks in turns. Returns what each contender did in each round."""
  ours: list[Ours] = []
  peers: list[Peer] = []
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in turns.peers:  # first: nothing is compiled where one is not to be had
      peers.append(Peer(name, config, make_job(config).corpus, folder))
      stack.callback(peers[-1].close)
    for refine in turns.refinements:
      ours.append(Ours(f"awrsr_jax {refine}", with_values(config, {"model.refine": refine})))
      stack.callback(ours[-1].close)
    contenders: list[Ours | Peer] = [*ours, *peers]
    rounds: dict[str, dict[str, list[Any]]] = {one.name: {"train": [], "evaluate": []} for one in contenders}
    for _ in range(turns.rounds):
      for one in contenders:
        rounds[one.name]["train"].append(one.train(turns.seconds))
    for _ in range(turns.rounds):
      for one in contenders:
        rounds[one.name]["evaluate"].append(one.evaluate(turns.users))
    rows = []
    for one in contenders:
      speed = lambda what, count: statistics.median(  # noqa: E731
          turn[count] / turn["seconds"] for turn in rounds[one.name][what])  # noqa: B023 (called at once)
      rows.append({"": one.name, "parameters": one.parameters, "interactions/s": speed("train", "interactions"),
                   "steps/s": speed("train", "steps"), "users/s": speed("evaluate", "users"),
                   "compile s": one.compiled.seconds if isinstance(one, Ours) else None})
    notes = [f"{one.name}: {one.note}" for one in peers if one.note]
  for row in rows:
    for unit in ("interactions/s", "users/s") if peers else ():
      row[f"{unit} over the fastest peer's"] = row[unit] / max(peer[unit] for peer in rows[len(ours):])
  return {"rows": rows, "notes": notes, "rounds": rounds}


def measure_step(config: ml_collections.ConfigDict, turns: Turns) -> dict[str, Any]:
  """Times one train step of full length in turns: each refinement, in both implementations, and what floor it has."""
  peak, bandwidth = measure_machine()
  contenders, refused = [], []
  for refine in turns.refinements:
    for implementation in ("fused", "reference"):
      changed = with_values(config, {"model.refine": refine, "model.attention.implementation": implementation})
      try:
        contenders.append((f"{refine}, {implementation}", *prepare_step(changed)))
      except ValueError as error:
        if implementation == "reference":
          raise
        refused.append(f"{refine}, fused: {error}")
  times: dict[str, list[float]] = {name: [] for name, *_ in contenders}
  for _ in range(turns.rounds):
    for name, step, *_ in contenders:
      begin, count = time.perf_counter(), 0
      while count < 2 or time.perf_counter() - begin < turns.seconds / 2:
        step()
        count += 1
      times[name].append((time.perf_counter() - begin) / count)
  rows, first = [], statistics.median(times[contenders[0][0]])
  for name, _, compiled, job in contenders:
    seconds = statistics.median(times[name])
    row = {"": name, "ms": seconds * 1e3, f"over {contenders[0][0]}": seconds / first,
           "plan MiB": memory.count_bytes(compiled) / 2 ** 20}
    if job.config.model.backbone == "sasrec":
      operations, moved = count_work(job.config, job.corpus.num_items)
      floor = max(operations / peak, moved / bandwidth)
      row |= {"GFLOP": operations / 1e9, "floor ms": floor * 1e3, "over floor": seconds / floor}
    rows.append(row)
  return {"rows": rows, "notes": [f"floor: {peak / 1e9:.0f} GFLOP/s of a large matrix product in float32, "
                                  f"{bandwidth / 1e9:.1f} GB/s of a large copy, both measured here", *refused],
          "times": times}


def prepare_step(config: Any) -> tuple[Callable[[], None], jax.stages.Compiled, Job]:
  """Returns a train step on a batch where every position is real, the program behind it, and its job."""
  job = make_job(config)
  config, mesh = job.config, job.mesh
  rng = np.random.default_rng(0)
  rows = rng.integers(1, job.corpus.num_items + 1, (config.train.batch_size, config.data.max_length + 1), np.int32)
  batch = meshes.to_global(mesh, {"inputs": rows[:, :-1], "targets": rows[:, 1:]})
  state = init_state(job.backbone, job.optimizer, config.seed, mesh)
  compiled = job.train_step.lower(state, batch, job.cumulative).compile()

  def step() -> None:
    nonlocal state
    state, _ = compiled(state, batch, job.cumulative)
    jax.block_until_ready(state)

  step()
  return step, compiled, job


def count_work(config: Any, items: int) -> tuple[float, float]:
  """Returns (operations, bytes) that a SASRec train step of full length cannot do without; see docs/performance.md.

  Products of the blocks, of attention over the keys that a query may look at, and of the loss, three times each: once
  forward, twice backward. Bytes: parameters, gradients and the two moments, read and written once by the optimizer.
  """
  model, length = config.model, config.data.max_length
  positions, width, rank = config.train.batch_size * length, model.width, model.awr.rank
  features = {"none": 2 * width, "simple": 2 * width + 3 * rank * model.heads,
              "value": 3 * width + 3 * rank * model.heads, "additive": 3 * width + 3 * rank * model.heads,
              "stochastic": 2 * width + 6 * rank * model.heads}[model.refine]  # widths of the products with weights
  attention = features * (length + 1) / 2
  scored = items if config.loss.name == "softmax" else config.loss.num_negatives + 1
  blocks = model.layers * (4 * width ** 2 + 2 * width * model.ffn_width + attention)
  return 3 * 2 * positions * (blocks + scored * width), 8 * 4 * count_parameters(config, items)


def count_parameters(config: Any, items: int) -> int:
  """Returns the number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(build_backbone(config, items))))


def measure_machine() -> tuple[float, float]:
  """Returns the best of a few tries: operations/s of a large float32 matrix product, bytes/s of a large copy."""
  square, long = jnp.ones((2048, 2048)), jnp.ones(1 << 26)

  def best(function: Callable, x: jax.Array) -> float:
    run = jax.jit(function)
    jax.block_until_ready(run(x))
    times = []
    for _ in range(7):
      begin = time.perf_counter()
      jax.block_until_ready(run(x))
      times.append(time.perf_counter() - begin)
    return min(times)

  return 2 * 2048 ** 3 / best(lambda x: x @ x, square), 2 * long.nbytes / best(lambda x: x + 1, long)


def measure_memory(config: ml_collections.ConfigDict, turns: Turns) -> dict[str, Any]:
  """Returns what the compiler plans for the gradient of attention as n grows, and of the loss as the catalogue does."""
  rows: list[dict[str, Any]] = [{"": f"attention, {refine}, {implementation}", "unit": "MiB"} | {
      f"n={n}": plan_attention(config, refine, implementation, n) / 2 ** 20 for n in LENGTHS}
      for refine in turns.refinements for implementation in ("fused", "reference")]
  for row in rows:
    row["growth"] = row[f"n={LENGTHS[-1]}"] / row[f"n={LENGTHS[0]}"]
  losses: list[dict[str, Any]] = [{"": f"full softmax, {name}", "unit": "MiB"} | {
      f"{items:,} items": plan_loss(config, dense, items) / 2 ** 20 for items in CATALOGUES}
      for name, dense in (("in chunks", False), ("dense", True))]
  largest = f"{CATALOGUES[-1]:,} items"
  return {"rows": rows, "loss rows": losses, "notes": [
      f"attention: one layer, batch 8, its values and gradients; {LENGTHS[-1] // LENGTHS[0]} x in n",
      f"full softmax: batch {config.train.batch_size} of {config.data.max_length} positions, with gradients; dense "
      f"over chunks at {largest}: {losses[1][largest] / losses[0][largest]:.1f}"]}


def plan_attention(config: ml_collections.ConfigDict, refine: str, implementation: str, length: int) -> int:
  """Returns the bytes of an attention layer's value and gradient, beside arguments and results."""
  changed = with_values(config, {"model.refine": refine, "data.max_length": length})
  model = changed.model
  layer: Any = SelfAttention(heads=model.heads, dropout=model.dropout, dtype=jnp.float32,
                             refinement=build_refinement(model, length), implementation=implementation)
  x, real = jax.ShapeDtypeStruct((8, length, model.width), jnp.float32), jax.ShapeDtypeStruct((8, length), bool)
  key = jax.random.key(0)
  params = jax.eval_shape(lambda x, real: layer.init(key, x, x, real, False), x, real)
  loss = lambda params, x, real: jnp.sum(layer.apply(params, x, x, real, True, rngs={"dropout": key}))  # noqa: E731
  program = jax.jit(jax.grad(loss, (0, 1)))
  return memory.plan_of(program.lower(params, x, real).compile()).temp_size_in_bytes


def plan_loss(config: ml_collections.ConfigDict, dense: bool, items: int) -> int:
  """Returns the bytes of the full softmax's value and gradient, beside arguments and results."""
  backbone = build_backbone(config, items)
  mesh = meshes.make_mesh(ml_collections.ConfigDict({"data": 1, "model": 1}))
  rows, length = config.train.batch_size, config.data.max_length
  inputs = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  params = {"params": param_shapes(backbone)}
  catalogue = jax.eval_shape(lambda params: backbone.apply(params, method="catalogue"), params)
  hidden = jax.eval_shape(lambda params, inputs: backbone.apply(params, inputs, method="encode"), params, inputs)

  def whole(catalogue: Any, hidden: Any, targets_BxL: jax.Array) -> jax.Array:
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), hidden)
    scores = hide_other_rows(backbone.score_rows(flat, catalogue), 0, items)
    positive = jnp.take_along_axis(scores, targets_BxL.reshape(-1, 1), axis=1)[:, 0]
    return jnp.sum(jnp.where(targets_BxL.reshape(-1) > 0, jax.nn.logsumexp(scores, axis=1) - positive, 0))

  chunked = lambda catalogue, hidden, targets: objective.full_softmax(  # noqa: E731
      backbone, mesh, catalogue, hidden, targets)
  program = jax.jit(jax.value_and_grad(whole if dense else chunked, (0, 1)))
  return memory.plan_of(program.lower(catalogue, hidden, inputs).compile()).temp_size_in_bytes


def measure_start(command: list[str]) -> dict[str, Any]:
  """Times a command of awrsr_jax.main from its start to its first train step, twice with one cache of programs."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for name in ("first", "second"):
      environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
      begin = time.perf_counter()
      process = subprocess.Popen([sys.executable, "-m", "awrsr_jax.main", *command, f"--workdir={folder}/{name}"],
                                 stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
      lines = []
      for line in process.stderr or ():
        lines.append(line)
        if "first step" in line:
          rows.append({"": f"{name} start", "s to the first step": time.perf_counter() - begin})
          process.send_signal(signal.SIGTERM)
      process.wait()
      if len(rows) == 0 or rows[-1][""] != f"{name} start":
        raise ValueError(f"python -m awrsr_jax.main {' '.join(command)} made no step:\n{''.join(lines[-15:])}")
  return {"rows": rows}


def with_values(config: ml_collections.ConfigDict, values: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns a copy of a config with some dotted keys changed."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(values)
  return config
