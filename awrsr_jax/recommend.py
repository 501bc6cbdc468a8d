"""Recommends from a run: `python -m awrsr_jax.recommend --workdir=runs/ml1m --input=histories.jsonl --output=top.csv`.

Histories are raw item ids of any users, seen in training or not; docs/recommend.md has the forms of input and output.
"""

import functools
import json
import logging
import sys
import time
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging

from awrsr_jax.command import keep_compiled
from awrsr_jax.data.lines import read_lines
from awrsr_jax.inference.files import Counts, Job, recommend_file, recommend_stream
from awrsr_jax.inference.trained import Trained, load


def main(argv: Sequence[str]) -> None:
  """Recommends, and says on standard error what became of the histories."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; flags start with --")
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("awrsr_jax").setLevel(logging.INFO)
  keep_compiled()
  try:
    run()
  except (ValueError, FloatingPointError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  except BrokenPipeError:  # whoever read standard output has enough
    sys.stderr.close()


def run() -> None:
  """Does what the flags say. Raises ValueError for what does not fit."""
  if WORKDIR.value is None:
    raise ValueError("--workdir=RUN is missing; it is the run folder that python -m awrsr_jax.main left")
  allow = read_ids(ALLOW.value, "--allow") if ALLOW.value else None
  job = Job(K.value, not INCLUDE_SEEN.value, allow, read_ids(DENY.value, "--deny") if DENY.value else (), STRICT.value,
            EXPLAIN.value)
  columns = {"user": USER_COLUMN.value, "item": ITEM_COLUMN.value, "time": TIME_COLUMN.value}
  columns = {key: name for key, name in columns.items() if name}
  if TEXT.value and (OUTPUT.value != "-" or job.explain):
    raise ValueError("--text is for standard output, without --explain")
  trained = load(WORKDIR.value, STEP.value, MODEL_DEVICES.value)
  write = functools.partial(print, end="", flush=True)
  if SIMILAR.value:
    write_similar(trained, SIMILAR.value, job)
    return
  began = time.monotonic()
  if OUTPUT.value == "-":
    counts = recommend_stream(trained, INPUT.value, job, columns, write, "text" if TEXT.value else "jsonl")
  else:
    counts = recommend_file(trained, INPUT.value, OUTPUT.value, job, columns)
  report(counts, time.monotonic() - began)


def read_ids(path: str, flag: str) -> tuple[str, ...]:
  """Returns the raw ids of a text file, one a line. Raises ValueError where there are none."""
  try:
    found = tuple(line.strip() for _, line in read_lines(path) if line.strip())
  except OSError as error:
    raise ValueError(f"{flag}={path} cannot be read ({error.strerror}); it is a file with one raw item id a "
                     "line") from error
  if not found:
    raise ValueError(f"{flag}={path} is empty; it is a file with one raw item id a line")
  return found


def write_similar(trained: Trained, items: list[str], job: Job) -> None:
  """Prints the items that are similar to each of some items, as JSON lines or text."""
  for raw, found in zip(items, trained.similar(items, job.k, allow=job.allow, deny=job.deny), strict=True):
    if TEXT.value:
      print(f"similar to {raw} {trained.titles[trained.numbers[raw] - 1]}".rstrip())
      print("\n".join(f"  {rank:3}  {item}  {score:9.4f}  {title}".rstrip()
                      for rank, (item, score, title) in enumerate(found, start=1)))
    else:
      print(json.dumps({"item": raw, "items": [one.item for one in found], "scores": [one.score for one in found],
                        "titles": [one.title for one in found]}, ensure_ascii=False))


def report(counts: Counts, seconds: float) -> None:
  """Says what became of the histories."""
  print(f"{counts.histories} histories in {seconds:.1f} s; {counts.unknown} unknown items were skipped, and "
        f"{counts.without} histories without a known item got nothing", file=sys.stderr)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
  INPUT = flags.DEFINE_string("input", "-", "Histories: JSON lines, parquet, or a log; - is standard input, as JSON "
                              "lines.")
  OUTPUT = flags.DEFINE_string("output", "-", "A file that ends in .jsonl, .csv (both also with .gz) or .parquet; - is "
                               "standard output, JSON lines.")
  K = flags.DEFINE_integer("k", 10, "How many items for each history.")
  INCLUDE_SEEN = flags.DEFINE_bool("include_seen", False, "A history may be given its own items.")
  ALLOW = flags.DEFINE_string("allow", None, "A file with one raw item id a line: only these are given.")
  DENY = flags.DEFINE_string("deny", None, "A file with one raw item id a line: these are never given.")
  SIMILAR = flags.DEFINE_multi_string("similar", None, "A raw item id: the items most similar to it. May be repeated.")
  EXPLAIN = flags.DEFINE_bool("explain", False, "Add to each line of JSON what each item of the history did.")
  TEXT = flags.DEFINE_bool("text", False, "Standard output is made to be read.")
  STRICT = flags.DEFINE_bool("strict", False, "An unknown item, or a history without a known one, is an error.")
  STEP = flags.DEFINE_integer("step", None, "Which checkpoint; not set: the best on validation.")
  MODEL_DEVICES = flags.DEFINE_integer("model_devices", None, "Devices that share the item tables; not set: as in "
                                       "training, where the devices here allow it.")
  USER_COLUMN = flags.DEFINE_string("user_column", None, "Of a log: not set: as in training.")
  ITEM_COLUMN = flags.DEFINE_string("item_column", None, "As --user_column.")
  TIME_COLUMN = flags.DEFINE_string("time_column", None, "As --user_column.")
  app.run(main)
