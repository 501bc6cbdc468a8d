"""Who takes turns in a benchmark: this library under some config, and peers in environments of their own.

A contender has `name` and `parameters`, trains for some seconds and ranks some users, again and again.
"""

import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from awrsr_jax.command import cache_folder
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.engine import compiling, ranking
from awrsr_jax.engine import feed as feeds
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import init_state
from awrsr_jax.engine.train import make_job

PEERS = pathlib.Path(__file__).parents[2] / "launch" / "peers"


class Ours:
  """This library under one config, as a contender."""

  def __init__(self, name: str, config: Any):
    self.name = name
    with compiling.watching() as compiled:
      self._job = job = make_job(config)
      self._state = init_state(job.backbone, job.optimizer, config.seed, job.mesh)
      self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
      self._calls = self._forever()
      self._state, _ = self._call(next(self._calls)[1])  # compiles
      self.evaluate(job.corpus.num_users)
    self.compiled = compiled

  def train(self, seconds: float) -> dict[str, float]:
    """Trains for at least so long, in whole calls and at least one; returns interactions, steps and seconds."""
    begin, steps, interactions, before = time.perf_counter(), 0, 0, None
    while not steps or time.perf_counter() - begin < seconds:
      targets, call = next(self._calls)
      self._state, report = self._call(call)
      jax.block_until_ready(before)  # as the training loop does: one call ahead
      before = report
      steps += call.steps
      interactions += targets
    jax.block_until_ready(self._state)
    return {"interactions": interactions, "steps": steps, "seconds": time.perf_counter() - begin}

  def evaluate(self, users: int) -> dict[str, float]:
    """Ranks all items for the first so many users; returns users, seconds and the metrics."""
    batches = self._job.ranking["test"]
    batches = dataclasses.replace(batches, targets=batches.targets[batches.users < users])
    begin = time.perf_counter()
    ranks = ranking.rank_users(self._job.rank_step, self._state.params, batches, self._job.mesh, items=self._job.items)
    return {"users": len(ranks), "seconds": time.perf_counter() - begin, **ranking.summarize(ranks)}

  def close(self) -> None:
    """Frees what lies on the devices."""
    jax.tree.map(lambda x: x.delete(), self._state)

  def _call(self, call: feeds.Call) -> Any:
    return self._job.train_step(self._state, call.feed | {"stop": meshes.stop_flags(self._job.mesh, False)},
                                self._job.cumulative, lengths=call.lengths)

  def _forever(self) -> Iterator[tuple[int, feeds.Call]]:
    """Yields the calls of the run over and over, each with how many real targets it has."""
    job = self._job
    while True:
      step, counted = 0, None
      calls = (feeds.streamed_calls(job.mesh, job.batches, 0) if job.items is None else feeds.resident_calls(
          job.mesh, job.batches, job.items, 0, feeds.steps_per_call(job.config, job.mesh), job.steps_to_pause))
      for call in calls:
        epoch, first = divmod(step, job.batches.steps_per_epoch)
        if epoch != counted:
          counted, targets_T = epoch, sum(np.maximum(ends - starts - 1, 0).sum(axis=1)
                                      for starts, ends in job.batches.epoch_bounds(epoch))
        yield int(targets_T[first:first + call.steps].sum()), call
        step += call.steps


class Peer:
  """Another library, as a contender: a program in its own environment that answers commands, see launch/peers/."""

  def __init__(self, name: str, config: Any, corpus: Corpus, folder: pathlib.Path):
    """Starts the program of this name; files go into `folder`.

    Raises:
      ValueError: see make_environment; or the program fails; or it has no loss like the config's.
    """
    loss = config.loss
    if loss.name not in ("softmax", "bce") or (loss.name == "bce" and loss.num_negatives != 1):
      raise ValueError("--peer: peers train the full softmax, or bce with one negative, not "
                       f"config.loss.name={loss.name} with {loss.num_negatives} negatives; set "
                       "--config.loss.name=softmax, or --config.loss.name=bce --config.loss.num_negatives=1")
    program = PEERS / f"peer_{name}.py"
    spec = folder / f"{name}.json"
    spec.write_text(json.dumps({
        "sequences": str(write_sequences(corpus, folder / "sequences.txt")), "num_items": corpus.num_items,
        "max_length": config.data.max_length, "width": config.model.width, "layers": config.model.layers,
        "heads": config.model.heads, "dropout": config.model.dropout,
        "loss": config.loss.name,
        "batch_size": config.train.batch_size, "eval_batch_size": config.eval.batch_size,
        "learning_rate": config.train.learning_rate, "threads": os.cpu_count(), "seed": config.seed}))
    self._log = (folder / f"{name}.log").open("w+")
    command = [make_environment(name, program), program, spec]
    self._process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                                          text=True, cwd=folder)
    ready = self._answer()
    self.name, self.parameters = f"{ready['name']} {ready['version']}", ready["parameters"]
    self.note = ready.get("note", "")

  def train(self, seconds: float) -> dict[str, float]:
    """As Ours.train."""
    return self._ask(f"train {seconds}")

  def evaluate(self, users: int) -> dict[str, float]:
    """As Ours.evaluate."""
    return self._ask(f"evaluate {users}")

  def close(self) -> None:
    """Ends the program."""
    if self._process.poll() is None:
      self._process.communicate("quit\n")
    self._log.close()

  def _ask(self, command: str) -> dict[str, Any]:
    self._process.stdin.write(command + "\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._log.seek(0)
      raise ValueError(f"{self._process.args[1]} ended with code {self._process.returncode}; its last words:\n"
                       + "".join(self._log.readlines()[-15:]))
    return json.loads(line)


def make_environment(name: str, program: pathlib.Path) -> pathlib.Path:
  """Returns the Python of a peer's environment, made at its first use from the REQUIREMENTS of its program.

  Raises:
    ValueError: there is no such peer, or its packages cannot be installed.
  """
  if not program.exists():
    raise ValueError(f"--peer={name}: there is no {program}; choose from "
                     f"{', '.join(sorted(path.stem.removeprefix('peer_') for path in PEERS.glob('peer_*.py')))}")
  folder = cache_folder() / "peers" / name
  python, done = folder / "bin" / "python", folder / "requirements.txt"
  wanted = next("\n".join(ast.literal_eval(node.value)) for node in ast.parse(program.read_text()).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS")
  if not done.exists() or done.read_text() != wanted:
    print(f"installing {', '.join(wanted.splitlines())} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    installed = subprocess.run([python, "-m", "pip", "install", "-q", *wanted.splitlines()], capture_output=True,
                               text=True)
    if installed.returncode:
      raise ValueError(f"--peer={name}: its packages cannot be installed here:\n{installed.stderr[-2000:]}")
    done.write_text(wanted)
  return python


def write_sequences(corpus: Corpus, path: pathlib.Path) -> pathlib.Path:
  """Writes the item numbers of one user a line, oldest first."""
  rows = np.split(np.asarray(corpus.items), corpus.offsets[1:-1])
  path.write_text("".join(" ".join(map(str, row.tolist())) + "\n" for row in rows))
  return path
