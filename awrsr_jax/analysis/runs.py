"""Owns run folders as they are read: config, metrics, result and ranks of finished runs, grouped over seeds."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from awrsr_jax.config import default, walk
from awrsr_jax.engine.run_folder import FREE_KEYS, read_json, read_ranks

# Keys that runs of one group may differ in: they change no figure, but for the seed, which is what a group is over.
SHARED = {"seed", "eval.batch_size", "eval.block_items", "train.log_every", "checkpoint.every_steps"} | (
    FREE_KEYS - {"train.epochs"})


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run folder says, apart from its checkpoints.

  Attributes:
    folder: the path that it was read from.
    config: dotted key -> value; a key that the run did not know has its default, which means what was done before.
    corpus: see corpus.describe.
    metrics: the lines of metrics.jsonl.
    result: see train.conclude.
  """

  folder: str
  config: dict[str, Any]
  corpus: dict[str, Any]
  metrics: list[dict[str, Any]]
  result: dict[str, Any]

  @functools.cached_property
  def ranks(self) -> dict[str, np.ndarray]:
    """Columns of ranks.parquet; see run_folder.write_ranks. Raises ValueError where the run kept none."""
    return read_ranks(epath.Path(self.folder) / "ranks.parquet")

  @property
  def seed(self) -> int:
    return self.config["seed"]

  def curve(self, split: str, name: str) -> tuple[np.ndarray, ...]:
    """Returns steps, epochs and values of what metrics.jsonl says of a split ("train", "valid") under a name."""
    lines = [line for line in self.metrics if line["split"] == split and name in line]
    return tuple(np.array([line[key] for line in lines]) for key in ("step", "epoch", name))


def read_run(workdir: str | os.PathLike[str]) -> Run:
  """Reads a complete run.

  Raises:
    ValueError: the folder is no run, the run is not complete, or a file is damaged.
  """
  folder = epath.Path(workdir)
  if not (folder / "config.json").exists():
    raise ValueError(f"{workdir} is no run folder: it has no config.json; give a --workdir of python -m awrsr_jax.main")
  if not (folder / "result.json").exists():
    raise ValueError(f"{workdir}: the run is not complete, it has no result.json; start its command again to go on")
  try:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
  except (OSError, ValueError) as error:
    raise ValueError(f"{folder / 'metrics.jsonl'} cannot be read ({error}); restore it, or train again in another "
                     "--workdir") from error
  metrics = []
  for number, line in enumerate(lines, start=1):
    try:
      metrics.append(_parse(line))
    except ValueError as error:
      raise ValueError(f"{folder / 'metrics.jsonl'}:{number} is damaged ({error}); take the line out") from error
  config = dict(walk(default())) | dict(walk(read_json(folder / "config.json")))
  return Run(str(workdir), config, read_json(folder / "corpus.json"), metrics, read_json(folder / "result.json"))


def _parse(line: str) -> dict[str, Any]:
  """Returns the values of a line of metrics.jsonl. Raises ValueError where it is no such line."""
  values = json.loads(line)
  if not (isinstance(values, dict) and {"step", "epoch", "split"} <= values.keys()):
    raise ValueError("it is no object with step, epoch and split")
  return values


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Returns the runs by what they differ in, apart from the seed, in the order in which they were given.

  Returns:
    Name -> runs of one config. A name says what tells groups apart, as "refine=value, rank=16"; the only group has the
    name of its backbone and refinement.

  Raises:
    ValueError: two runs have the same config and the same seed: one of them twice is no second sample.
  """
  groups: dict[str, list[Run]] = {}
  for run in runs:
    key = json.dumps({key: value for key, value in run.config.items() if key not in SHARED}, sort_keys=True)
    for other in groups.setdefault(key, []):
      if other.seed == run.seed:
        raise ValueError(f"{other.folder} and {run.folder} have the same config and the same seed {run.seed}; leave "
                         "one out, or train it with another --config.seed")
    groups[key].append(run)
  first = [members[0].config for members in groups.values()]
  differs = lambda key: len({json.dumps(config.get(key)) for config in first}) > 1  # noqa: E731
  telling = [key for key in sorted({key for config in first for key in config} - SHARED) if differs(key)]
  leaf = lambda key: key.rpartition(".")[2]  # noqa: E731
  is_clear = len({leaf(key) for key in telling}) == len(telling)
  name = lambda config: ", ".join(f"{leaf(key) if is_clear else key}={config.get(key)}" for key in telling)  # noqa: E731
  if not telling:
    return {f"{first[0]['model.backbone']}, refine={first[0]['model.refine']}": list(runs)}
  return {name(members[0].config): members for members in groups.values()}


def check_comparable(runs: Sequence[Run]) -> None:
  """Raises ValueError, with the difference, unless all runs rank the same targets under the same protocol."""
  first = runs[0]
  for run in runs[1:]:
    for what, of_first, here in (
        ("protocol", first.result["protocol"], run.result["protocol"]),
        ("corpus (fingerprint)", first.corpus["fingerprint"], run.corpus["fingerprint"]),
        ("raw item ids", first.corpus["numbering"], run.corpus["numbering"])):
      if of_first != here:
        raise ValueError(f"{first.folder} and {run.folder} cannot be compared, their {what} differ: {of_first} and "
                         f"{here}; compare runs of one corpus under one protocol")
