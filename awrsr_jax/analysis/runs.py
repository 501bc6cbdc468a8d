"""Owns run folders as they are read: config, metrics, result and ranks of finished runs, grouped over seeds."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from awrsr_jax.config import default, key_type, walk
from awrsr_jax.engine.run_folder import FREE_KEYS, read_json, read_ranks
from awrsr_jax.foreign import check_kinds, parse_json

LONGEST_NAME = 60  # of a group: tables and legends have a column of names
# Keys that runs of one group may differ in: they change no figure, but for the seed, which is what a group is over.
SHARED = {"seed", "eval.batch_size", "eval.block_items", "train.log_every", "checkpoint.every_steps"} | (
    FREE_KEYS - {"train.epochs"})


# What report and tables take for granted; keys that later or earlier versions have may be anything.
METRICS = {...: float}
TARGETS = {"targets": int, "new_users": int, "no_history": int, "new_items": int}
CORPUS = {"name": str, "fingerprint": str, "numbering": str, "users": int, "items": int, "interactions": int,
          "mean_length": float, "median_length": float, "min_length": int, "max_length": int, "density": float,
          "split": {"words": str, "training": int, "valid": TARGETS, "test": TARGETS}}
RESULT = {"test": METRICS, "valid": METRICS, "oracle": METRICS, "protocol": str, "epochs": int, "steps": int,
          "best_step": int, "best_epoch": int, "parameters": int, "device": str, "wall_time_s": float,
          "versions": {...: str}, "peak_memory": {...: int}, "compiled": METRICS}
LINE = {"step": int, "epoch": int, "split": str, ...: float}


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
    """Of the run: it decides initial values, batches, dropout and negatives."""
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
  corpus, result = read_json(folder / "corpus.json"), read_json(folder / "result.json")
  check_kinds(corpus, CORPUS, str(folder / "corpus.json"))
  check_kinds(result, RESULT, str(folder / "result.json"))
  return Run(str(workdir), read_config(folder), corpus, metrics, result)


def read_config(folder: epath.Path) -> dict[str, Any]:
  """Returns what config.json of a run says, dotted key -> value; a key that the run did not know has its default.

  Raises:
    ValueError: the file is damaged, or a value has another type than its key.
  """
  start = default()
  known, given = dict(walk(start)), dict(walk(read_json(folder / "config.json")))
  check_kinds({key: value for key, value in given.items() if value is not None or known.get(key) is not None},
              {key: key_type(start, key) for key in known}, str(folder / "config.json"))
  return known | given


def _parse(line: str) -> dict[str, Any]:
  """Returns the values of a line of metrics.jsonl. Raises ValueError where it is no such line."""
  values = parse_json(line, "it")
  if not (isinstance(values, dict) and {"step", "epoch", "split"} <= values.keys()):
    raise ValueError("it is no object with step, epoch and split")
  check_kinds(values, LINE, "it")
  return values


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Returns the runs by what they differ in, apart from the seed, in the order in which they were given.

  Returns:
    Name -> runs of one config. A name says what tells groups apart, as "refine=value, rank=16", or, where that is long,
    is the folder of the first run; the only group has the name of its backbone and refinement.

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
  if len(groups) == 1:
    return {f"{runs[0].config['model.backbone']}, refine={runs[0].config['model.refine']}": list(runs)}
  names = tell_apart(list(groups.values()))
  if max(map(len, names)) > LONGEST_NAME:
    names = [str(members[0].folder) + (f" and {len(members) - 1} more" if len(members) > 1 else "")
             for members in groups.values()]
  return dict(zip(names, groups.values(), strict=True))


def tell_apart(groups: Sequence[Sequence[Run]]) -> list[str]:
  """Returns what each group has that not all have, as "refine=value, rank=16"."""
  first = [members[0].config for members in groups]
  differs = lambda key: len({json.dumps(config.get(key)) for config in first}) > 1  # noqa: E731
  telling = [key for key in sorted({key for config in first for key in config} - SHARED) if differs(key)]
  leaf = lambda key: key.rpartition(".")[2]  # noqa: E731
  is_clear = len({leaf(key) for key in telling}) == len(telling)
  return [", ".join(f"{leaf(key) if is_clear else key}={config.get(key)}" for key in telling) for config in first]


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
