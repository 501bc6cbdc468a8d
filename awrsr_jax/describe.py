"""Describes a log, or a prepared folder: `python -m awrsr_jax.describe DATA --config.data.k_core=5`.

DATA stands for --config.data.path; without it the config says what to read. A log that training refuses is described
too, with the reason among the warnings. Logs larger than memory: prepare them, and describe the folder.
"""

import copy
import json
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from awrsr_jax.command import parse_flags_or_defaults, refuse
from awrsr_jax.config import default, finalize, walk
from awrsr_jax.data import batches, prepared, statistics
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import log as logs
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.foreign import printable

BUCKETS = (1, 2, 4, 8)


def describe(config: ml_collections.ConfigDict, path: str | None = None) -> dict[str, Any]:
  """Describes what `config.data` names.

  Args:
    config: not finalized; it stays as it is.
    path: instead of `config.data.path`.

  Returns:
    "rules", see `prepared.rules_of`; "description", see `corpus.describe`, and "padding", see `plan_padding`, None
    where training refuses the log; "statistics", see `statistics.measure`; "warnings".

  Raises:
    ValueError: the log cannot be read, or a rule leaves nothing of it. Of a prepared folder: it is damaged, or was made
      by other rules than the config has besides defaults.
  """
  config = copy.deepcopy(config)
  if path is not None:
    config.data.path = path
  folder = pathlib.Path(config.data.path)
  if config.data.path and config.data.format in ("auto", "prepared") and prepared.is_prepared(config.data.path):
    made = prepared.read_manifest(folder)
    prepared.check_files(folder, made, whole=True)
    start, given = dict(walk(default().data)), dict(walk(config.data))
    rules = {key: value for key, value in made["rules"].items() if key in start and given[key] == start[key]}
    try:
      config.data.update_from_flattened_dict(rules)
      data = finalize(config).data
    except (TypeError, ValueError) as error:
      raise ValueError(f"{folder}/prepared.json: {error}; prepare the corpus again") from error
    corpus = prepared.open_corpus(data)
    found = made["statistics"] | {"beyond_max_length": statistics.count_beyond(corpus, data)}
    return _join(data, found, corpus, plan_padding(corpus, data), [])
  data = finalize(config).data
  with logs.open_database() as database, corpora.in_memory(data):
    log, read = corpora.read_log(database, data)
    corpus, padding, refused = None, None, []
    try:
      corpus = corpora.check(corpora.number(database, log, read, data), data)
      padding = plan_padding(corpus, data)
    except ValueError as error:
      refused = [f"training refuses this log: {error}"]
    return _join(data, statistics.measure(database, corpus, data, read), corpus, padding, refused)


def plan_padding(corpus: Corpus, data: Any) -> list[dict[str, Any]]:
  """Returns how much of an epoch's training positions is padding, by the number of batch lengths.

  Each row counts as padded to its own bucket; rows that only fill a batch up are not counted.

  Args:
    corpus: with offsets and split.
    data: `config.data`; of it `max_length` and `long_history`.

  Returns:
    For each of `BUCKETS`: "buckets" (the most there may be), their "lengths", and the "share" of padding.

  Raises:
    ValueError: there is nothing to train on.
  """
  starts, ends = batches.training_rows(corpus, data.max_length, data.long_history)
  lengths_R, plan = ends - starts - 1, []
  for count in BUCKETS:
    buckets = np.array(batches.plan_buckets(lengths_R, count))
    padded = int(buckets[np.searchsorted(buckets, lengths_R)].sum())
    plan.append({"buckets": count, "lengths": buckets.tolist(), "share": 1 - int(lengths_R.sum()) / padded})
  return plan


def _join(data: Any, found: dict[str, Any], corpus: Corpus | None, padding: list[dict[str, Any]] | None,
          refused: list[str]) -> dict[str, Any]:
  """Returns what `describe` returns."""
  return {"rules": prepared.rules_of(data), "description": corpora.describe(corpus) if corpus else None,
          "statistics": found, "padding": padding, "warnings": refused + statistics.warn(found)}


def render(found: dict[str, Any]) -> str:
  """Returns what `describe` returned as a text of up to 100 columns."""
  wrap = textwrap.TextWrapper(100, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                              break_on_hyphens=False)
  return "\n".join([statistics.render(found["statistics"], found), "", f"warnings: {len(found['warnings'])}",
                    *map(wrap.fill, found["warnings"])])


def main(argv: Sequence[str]) -> None:
  """Describes, and prints."""
  if len(argv) > 2:
    raise app.UsageError(f"unknown arguments {argv[2:]}; one log at a time, and flags start with --")
  try:
    found = describe(CONFIG.value, *argv[1:])
  except ValueError as error:
    refuse(error)
  print(json.dumps(found, indent=2, allow_nan=False) if JSON.value else printable(render(found)))


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, "A config file; config.data says what to read, and by which "
                                           "rules.", lock_config=True)
  JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a report.")
  app.run(main, flags_parser=parse_flags_or_defaults)
