"""Recommends from a run: `python -m awrsr_jax.recommend --workdir=runs/ml1m --input=histories.jsonl --output=top.csv`.

Histories are raw item ids of any users, seen in training or not; docs/recommend.md has the forms of input and output.
"""

import functools
import json
import logging
import os
import sys
import time
import zlib
from collections.abc import Sequence

from absl import app, flags

from awrsr_jax.command import begin, refuse
from awrsr_jax.data.lines import read_lines
from awrsr_jax.foreign import shorten
from awrsr_jax.inference.files import SHOWN, Counts, Job, check_output, recommend_file, recommend_stream
from awrsr_jax.inference.histories import check_source
from awrsr_jax.inference.standalone import encode
from awrsr_jax.inference.trained import Trained, load

LOG = logging.getLogger("awrsr_jax.recommend")  # __name__ is "__main__"


def main(argv: Sequence[str]) -> None:
  """Recommends, and says on standard error what became of the histories."""
  begin(argv)
  try:
    run()
  except (ValueError, FloatingPointError) as error:
    refuse(error)
  except BrokenPipeError:  # whoever read standard output has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
    sys.exit(1)
  except OSError as error:
    sys.exit(f"OSError: standard output cannot be written: {error.strerror or error}")
  except KeyboardInterrupt:
    sys.exit("interrupted; with --output=FILE the same command goes on behind the last part")


def run() -> None:
  """Does what the flags say. Raises ValueError for what does not fit."""
  if not WORKDIR.value:
    raise ValueError("--workdir=RUN is missing; it is the run folder that python -m awrsr_jax.main left")
  allow = read_ids(ALLOW.value, "--allow") if ALLOW.value else None
  job = Job(K.value, not INCLUDE_SEEN.value, allow, read_ids(DENY.value, "--deny") if DENY.value else (), STRICT.value,
            EXPLAIN.value)
  columns = {"user": USER_COLUMN.value, "item": ITEM_COLUMN.value, "time": TIME_COLUMN.value,
             "rating": RATING_COLUMN.value}
  columns = {key: name for key, name in columns.items() if name}
  check_flags(job)
  trained = load(WORKDIR.value, STEP.value, MODEL_DEVICES.value)
  if SIMILAR.value:
    write_similar(trained, SIMILAR.value, job)
    return
  if INPUT.value == "-" and sys.stdin.isatty():
    LOG.info("reading histories from the terminal, a line each, such as %s", json.dumps(trained.catalogue.item_ids[:3]))
  began = time.monotonic()
  if OUTPUT.value == "-":
    write = functools.partial(print, end="", flush=True)
    counts = recommend_stream(trained, INPUT.value, job, columns, write, "text" if TEXT.value else "jsonl")
  else:
    counts = recommend_file(trained, INPUT.value, OUTPUT.value, job, columns)
  report(counts, time.monotonic() - began)


def check_flags(job: Job) -> None:
  """Raises ValueError for what can be refused before the model is loaded."""
  if TEXT.value and (OUTPUT.value != "-" or job.explain):
    raise ValueError("--text is for standard output, without --explain")
  if SIMILAR.value and (INPUT.value != "-" or OUTPUT.value != "-" or job.explain or job.strict):
    raise ValueError("--similar writes to standard output and reads no histories; leave out --input, --output, "
                     "--explain and --strict")
  if OUTPUT.value != "-":
    check_output(OUTPUT.value, job.explain)
  check_source(INPUT.value)


def read_ids(path: str, flag: str) -> tuple[str, ...]:
  """Returns the raw ids of a text file, one a line. Raises ValueError where there are none."""
  try:
    found = tuple(line.strip() for _, line in read_lines(path) if line.strip())
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{flag}={path} cannot be read ({getattr(error, 'strerror', None) or error}); it is a file with "
                     "one raw item id a line") from error
  if not found:
    raise ValueError(f"{flag}={path} is empty; it is a file with one raw item id a line")
  return found


def write_similar(trained: Trained, items: list[str], job: Job) -> None:
  """Prints the items that are similar to each of some items, as JSON lines or text."""
  for raw, found in zip(items, trained.similar(items, job.k, allow=job.allow, deny=job.deny), strict=True):
    at = trained.catalogue.numbers[raw] - 1
    if TEXT.value:
      print(f"similar to {raw} {shorten(trained.catalogue.titles[at], SHOWN)}".rstrip())
      print("\n".join(f"  {rank:3}  {shorten(item, SHOWN)}  {score:9.4f}  {shorten(title, SHOWN)}".rstrip()
                      for rank, (item, score, title) in enumerate(found, start=1)))
    else:
      print(encode({"item": trained.catalogue.item_ids[at], "items": [one.item for one in found],
                    "scores": [one.score for one in found], "titles": [one.title for one in found]}))
  sys.stdout.flush()


def report(counts: Counts, seconds: float) -> None:
  """Says what became of the histories."""
  print(f"{counts.histories} histories in {seconds:.1f} s; {counts.unknown} unknown items were skipped, and "
        f"{counts.without} histories without a known item got nothing", file=sys.stderr)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
  INPUT = flags.DEFINE_string("input", "-", "Histories: JSON lines, parquet, or a log; - is standard input, as JSON "
                              "lines.")
  OUTPUT = flags.DEFINE_string("output", "-", "A file that ends in .jsonl, .ndjson, .csv (each also with .gz) or "
                               ".parquet; - is standard output, JSON lines.")
  K = flags.DEFINE_integer("k", 10, "How many items for each history.")
  INCLUDE_SEEN = flags.DEFINE_bool("include_seen", False, "A history may be given its own items.")
  ALLOW = flags.DEFINE_string("allow", None, "A file with one raw item id a line, spaces around it aside: only "
                              "these are given.")
  DENY = flags.DEFINE_string("deny", None, "A file of such ids, which are never given.")
  SIMILAR = flags.DEFINE_multi_string("similar", None, "A raw item id: the items most similar to it. May be repeated.")
  EXPLAIN = flags.DEFINE_bool("explain", False, "Add to each line of JSON what each item of the history did.")
  TEXT = flags.DEFINE_bool("text", False, "Standard output is made to be read.")
  STRICT = flags.DEFINE_bool("strict", False, "An unknown item, or a history without a known one, is an error.")
  STEP = flags.DEFINE_integer("step", None, "Which checkpoint; not set: the best on validation.")
  MODEL_DEVICES = flags.DEFINE_integer("model_devices", None, "Devices that share the item tables; not set: as in "
                                       "training, where the devices here allow it.")
  USER_COLUMN = flags.DEFINE_string("user_column", None, "The name of a column; not set: as in training, or user.")
  ITEM_COLUMN = flags.DEFINE_string("item_column", None, "As --user_column.")
  TIME_COLUMN = flags.DEFINE_string("time_column", None, "As --user_column.")
  RATING_COLUMN = flags.DEFINE_string("rating_column", None, "As --user_column.")
  app.run(main)
