"""A declared grid of experiments: tables of rows, which run each row and seed is, and how far each run is.

A grid is a Python file whose get_grid() returns tables (`configs/grids/results.py`). A row is a config file with
overrides, those of the table and its own; a run is a row and a seed, and lives in OUT/<table>/<row>/seed_<s>. Rows of
two tables that resolve to one config are one experiment: it is run once, in the folder of the first table that has it.
"""

import dataclasses
import json
import os
import pathlib
import re
import runpy
from collections.abc import Sequence
from typing import Any

from etils import epath

from awrsr_jax.analysis.runs import SHARED, read_config
from awrsr_jax.command import suggest
from awrsr_jax.config import default, finalize, walk
from awrsr_jax.engine.run_folder import read_json

METRICS = ("test hr@1", "test hr@10", "test ndcg@5", "test ndcg@10", "test mrr", "valid ndcg@10")  # that tables show
NOT_A_ROW = ("seed", "data.path")  # config keys that a run gets from elsewhere
COMPLETE, STARTED, MISSING, DIFFERS = "complete", "started", "missing", "differs"


@dataclasses.dataclass(frozen=True)
class Anchor:
  """Numbers that others published, shown beside ours: name, metric ("test ndcg@10") -> value, and where they stand."""

  name: str
  values: dict[str, float]
  source: str


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows that are compared with the first of them.

  Attributes:
    key: short and unique; the first part of the names of its runs.
    title: of its section.
    text: what is asked, in a few sentences.
    config: path of a config file.
    rows: name -> overrides, dotted config key -> value; the first row is the baseline.
    overrides: of all rows; a row's own go over them.
    data: name of the data file, in the folder that the command is given; "" where the config needs none.
    seeds: of every row.
    anchors: see Anchor.
  """

  key: str
  title: str
  text: str
  config: str
  rows: dict[str, dict[str, Any]]
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  data: str = ""
  seeds: Sequence[int] = (0, 1, 2, 3, 4)
  anchors: Sequence[Anchor] = ()

  @property
  def folder(self) -> str:
    """Of its runs, below OUT; its figure has the same name."""
    return slug(self.key)


@dataclasses.dataclass(frozen=True)
class Cost:
  """A table of what runs cost; they are those of the tables whose keys are in `of`, and it has none of its own."""

  key: str
  title: str
  text: str
  of: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run that the grid wants.

  Attributes:
    names: "<table key>/<row>/seed_<s>" in every table that shows it, first in the one that it is run for.
    folder: its run folder below OUT; without the seed at its end it is the folder of the row.
    config: path of the config file.
    overrides: dotted config key -> value, without the seed.
    data: name of the data file, or "".
    seed: of the run.
    values: the resolved config, dotted key -> value as JSON has it, without data.path.
  """

  names: tuple[str, ...]
  folder: str
  config: str
  overrides: dict[str, Any]
  data: str
  seed: int
  values: dict[str, Any]

  def command(self, out: str, data: str, seed: str = "", python: str = "python") -> list[str]:
    """Returns the command of the run.

    Args:
      out: the folder of all runs.
      data: the folder of the data files.
      seed: written for the seed, as "$seed" in a loop of the shell; "": the seed of this run.
      python: the interpreter.
    """
    seed = seed or str(self.seed)
    path = [f"--config.data.path={os.path.join(data, self.data)}"] if self.data else []
    flags = [f"--config.{key}={value}" for key, value in self.overrides.items()]
    workdir = os.path.join(out, f"{os.path.dirname(self.folder)}/seed_{seed}")
    return [python, "-m", "awrsr_jax.main", f"--config={self.config}", *path, "--config.eval.hash_ids=True", *flags,
            f"--config.seed={seed}", f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True)
class Grid:
  """A checked grid.

  Attributes:
    path: the file that declares it.
    tables: in its order.
    runs: every run once, by seed, then by table and row: what is done first is useful alone.
    by_row: (table key, row name) -> its runs, by seed; runs that are shared stand in several rows.
  """

  path: str
  tables: list[Table | Cost]
  runs: list[Planned]
  by_row: dict[tuple[str, str], list[Planned]]


def slug(name: str) -> str:
  """Returns a name as a folder, for any shell: letters, digits, dots and dashes, and "_" for all else."""
  return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.-")


def load_grid(path: str | os.PathLike[str]) -> Grid:
  """Reads and checks a grid file.

  Raises:
    ValueError: there is no such file, it has no get_grid(), or see make_grid.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--grid={path}: no such file, seen from {pathlib.Path.cwd()}")
  content = runpy.run_path(str(path))
  if "get_grid" not in content:
    raise ValueError(f"--grid={path} has no function get_grid(); configs/grids/results.py is an example")
  return make_grid(content["get_grid"](), str(path))


def make_grid(tables: Sequence[Table | Cost], path: str) -> Grid:
  """Checks tables and plans their runs.

  Args:
    tables: of a grid file.
    path: of it, for messages.

  Raises:
    ValueError: two tables or rows have one key, one folder or one config; an override is no config key or has a value
      that the config does not take; a config file is not there; seeds, anchors or keys of a cost table are wrong.
  """
  if not tables:
    raise ValueError(f"--grid={path}: get_grid() returned no tables")
  check_folders([table.key for table in tables], f"--grid={path}: tables")
  configs = {config: load_config(config, f"--grid={path}: table {table.key!r}")
             for table in tables if isinstance(table, Table) for config in [table.config]}
  by_config: dict[str, Planned] = {}
  rows: dict[tuple[str, str], list[str]] = {}  # (table key, row) -> which of them, seed by seed
  for table in tables:
    where = f"--grid={path}: table {table.key!r}"
    if isinstance(table, Cost):
      check_cost(table, tables, where)
      continue
    check_table(table, where)
    mine: dict[str, str] = {}
    for row, own in table.rows.items():
      overrides = {**table.overrides, **own}
      rows[table.key, row] = []
      for seed in sorted(table.seeds):
        values = resolve(configs[table.config], overrides, seed, f"{where}, row {row!r}")
        same = json.dumps([values, table.data], sort_keys=True)
        if same in mine:
          raise ValueError(f"{where}: rows {mine[same]!r} and {row!r} are one experiment, their configs are equal; "
                           "leave one out, or say what differs")
        mine[same] = row
        rows[table.key, row].append(same)
        name, folder = (f"{key}/{slug(row)}/seed_{seed}" for key in (table.key, table.folder))
        if same in by_config:
          by_config[same] = dataclasses.replace(by_config[same], names=(*by_config[same].names, name))
        else:
          by_config[same] = Planned((name,), folder, table.config, overrides, table.data, seed, values)
  runs = sorted(by_config.values(), key=lambda planned: planned.seed)  # stable: tables and rows keep their order
  return Grid(path, list(tables), runs, {place: [by_config[same] for same in found] for place, found in rows.items()})


def check_folders(names: Sequence[str], where: str) -> None:
  """Raises ValueError when a name makes no folder, or two make the same one, on any file system."""
  seen: dict[str, str] = {}
  for name in names:
    folder = slug(name).lower()
    if not folder:
      raise ValueError(f"{where}: {name!r} makes no folder; use letters or digits")
    if folder in seen:
      raise ValueError(f"{where}: {seen[folder]!r} and {name!r} make one folder, {slug(name)!r}; rename one")
    seen[folder] = name


def check_table(table: Table, where: str) -> None:
  """Raises ValueError for a table whose rows, seeds or anchors say nothing."""
  if not table.rows:
    raise ValueError(f"{where} has no rows; the first is the baseline")
  check_folders(list(table.rows), f"{where}: rows")
  if not table.seeds or len(set(table.seeds)) < len(table.seeds) or any(type(seed) is not int for seed in table.seeds):
    raise ValueError(f"{where}: seeds={table.seeds!r} must be whole numbers, one or more, each once")
  for anchor in table.anchors:
    unknown = [name for name in anchor.values if name not in METRICS]
    if unknown or not anchor.values or not anchor.source:
      raise ValueError(f"{where}: anchor {anchor.name!r} needs a source, and values of {', '.join(METRICS)}; it has "
                       f"source={anchor.source!r} and {list(anchor.values)}")


def check_cost(table: Cost, tables: Sequence[Table | Cost], where: str) -> None:
  """Raises ValueError for a cost table of tables that are not there."""
  known = [other.key for other in tables if isinstance(other, Table)]
  unknown = [key for key in table.of if key not in known]
  if unknown or not table.of:
    raise ValueError(f"{where}: of={list(table.of)} must name tables with runs, out of {known}")


def load_config(path: str, where: str) -> Any:
  """Returns what get_config() of a config file gives.

  Raises:
    ValueError: there is no such file, or it has no get_config().
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"{where}: config={path}: no such file, seen from {pathlib.Path.cwd()}")
  content = runpy.run_path(path)
  if "get_config" not in content:
    raise ValueError(f"{where}: config={path} has no function get_config()")
  return content["get_config"]()


def resolve(config: Any, overrides: dict[str, Any], seed: int, where: str) -> dict[str, Any]:
  """Returns the resolved config of a run as `Planned.values` has it.

  Args:
    config: of the config file; it is not changed.
    overrides: dotted config key -> value.
    seed: of the run.
    where: the overrides stand, for messages.

  Raises:
    ValueError: a key is unknown or not for a grid, or the config does not take a value.
  """
  known = [key for key, _ in walk(default())]
  for key, value in overrides.items():
    if key not in known:
      raise ValueError(f"{where}: the config has no key {key!r}; {suggest(key, known)}")
    if key in NOT_A_ROW:
      raise ValueError(f"{where}: {key} is no override; seeds and data of a table are fields of their own")
    if value is None:
      raise ValueError(f"{where}: {key}=None cannot be given by a flag; leave the key out")
  changed = config.copy_and_resolve_references()
  try:
    changed.update_from_flattened_dict({**overrides, "seed": seed})
    values = dict(walk(finalize(changed)))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where}, seed {seed}: {error}") from error
  values.pop("data.path")
  return json.loads(json.dumps(values))


def read_state(planned: Planned, out: str | os.PathLike[str]) -> tuple[str, str]:
  """Returns how far a run is, and why it differs.

  Returns:
    COMPLETE, STARTED (the same command goes on), MISSING, or DIFFERS with what the folder has that the grid does not
    declare. Keys that change no figure may differ.

  Raises:
    ValueError: a file of the run is damaged.
  """
  folder = epath.Path(out) / planned.folder
  if not (folder / "config.json").exists():
    return MISSING, ""
  there = read_config(folder)
  wanted, free = planned.values, (SHARED - {"seed"}) | {"train.epochs", "data.path"}
  changed = [f"config.{key}: {there.get(key)} there, {wanted.get(key)} declared"
             for key in sorted(there.keys() | wanted.keys()) if key not in free and there.get(key) != wanted.get(key)]
  if there["train.epochs"] > wanted["train.epochs"]:
    changed.append(f"config.train.epochs: {there['train.epochs']} there, {wanted['train.epochs']} declared")
  if changed:
    return DIFFERS, "; ".join(changed)
  is_complete = (folder / "result.json").exists() and (
      read_json(folder / "result.json").get("epochs") == wanted["train.epochs"])
  return (COMPLETE if is_complete else STARTED), ""


def read_states(grid: Grid, out: str | os.PathLike[str]) -> dict[str, str]:
  """Returns folder -> COMPLETE, STARTED or MISSING of all runs.

  Raises:
    ValueError: a folder holds a run of another config, or a damaged one.
  """
  states, others = {}, []
  for planned in grid.runs:
    states[planned.folder], why = read_state(planned, out)
    if why:
      others.append(f"{epath.Path(out) / planned.folder} ({why})")
  if others:
    raise ValueError(f"{len(others)} run folders are of another config than {grid.path} declares: {'; '.join(others)}. "
                     "Move them away, declare what they are, or choose another --out")
  return states
