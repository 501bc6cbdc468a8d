"""Recommendations for the histories of a file, written to a file: whole or not at all, and resumable.

OUT.partial holds a part for every few thousand histories, each whole or not at all, and job.json, which says what job
they are of. The same command goes on behind the last part; at the end the parts become OUT and the folder goes.
"""

import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from etils import epath

from awrsr_jax.engine.run_folder import lock_folder, read_json, write_bytes, write_json
from awrsr_jax.inference.histories import Histories, read_histories
from awrsr_jax.inference.trained import Trained

LOG = logging.getLogger(__name__)
PART = 8192  # histories of a part
AT_ONCE = 256  # of standard input
FORMATS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".csv.gz": "csv",
           ".parquet": "parquet"}
COLUMNS = ("user", "rank", "item", "score", "title")
PLACES = 7  # significant digits of a score, which is float32


@dataclasses.dataclass(frozen=True)
class Job:
  """What is wanted for every history.

  Attributes:
    k, exclude_seen, strict: as of Trained.recommend.
    allow, deny: raw ids; allow None: all items.
    explain: with each line, the share of each item of the history; JSON lines only.
  """

  k: int = 10
  exclude_seen: bool = True
  allow: tuple[str, ...] | None = None
  deny: tuple[str, ...] = ()
  strict: bool = False
  explain: bool = False


@dataclasses.dataclass
class Counts:
  """What became of the histories."""

  histories: int = 0
  without: int = 0  # a known item
  unknown: int = 0  # items

  def add(self, histories: Histories) -> None:
    """Counts some more."""
    self.histories += len(histories)
    self.without += sum(not len(numbers) for numbers in histories.numbered)
    self.unknown += int(histories.unknown.sum())


def format_of(out: str) -> str:
  """Returns "jsonl", "csv" or "parquet" by the end of a file's name; raises ValueError for others."""
  for ending, form in sorted(FORMATS.items(), key=lambda item: -len(item[0])):
    if out.lower().endswith(ending):
      return form
  raise ValueError(f"--output={out} must end in one of {', '.join(FORMATS)}")


def recommend_stream(trained: Trained, source: str, job: Job, columns: dict[str, str],
                     write: Callable[[str], Any], form: str = "jsonl") -> Counts:
  """Writes recommendations as text, as soon as they are there.

  Args:
    trained: the model.
    source, columns: see read_histories.
    job: what is wanted.
    write: takes text.
    form: "jsonl" or "text", which is made to be read.

  Raises:
    ValueError, FloatingPointError: see read_histories and Trained.recommend.
  """
  counts = Counts()
  allowed = trained.allowed(job.allow, job.deny, job.strict)
  for histories in read_histories(source, trained, AT_ONCE, 0, columns):
    found = _recommend(trained, histories, counts.histories, job, allowed)
    write(_to_text(trained, histories, found, counts.histories) if form == "text" else
          _to_json(trained, histories, found, job))
    counts.add(histories)
  if not counts.histories:
    raise ValueError(f"{source} holds no histories")
  return counts


def recommend_file(trained: Trained, source: str, out: str, job: Job, columns: dict[str, str]) -> Counts:
  """Writes recommendations for all histories of a source into a file; the same call goes on where one was cut off.

  Args:
    trained: the model.
    source, columns: see read_histories.
    out: the file, which does not exist; its ending says the format.
    job: what is wanted.

  Raises:
    ValueError: also where `out` exists, cannot be written, or OUT.partial is of another job.
    FloatingPointError: a score is NaN.
  """
  form, path = format_of(out), pathlib.Path(os.path.abspath(out))
  if job.explain and form != "jsonl":
    raise ValueError(f"--explain has room in JSON lines only; --output={out} is {form}")
  if path.exists():
    raise ValueError(f"--output={out} exists; remove it, or choose another file")
  if not path.parent.is_dir():
    raise ValueError(f"--output={out} lies in no folder that exists")
  allowed = trained.allowed(job.allow, job.deny, job.strict)
  partial = path.with_name(path.name + ".partial")
  with lock_folder(epath.Path(partial), "--output"):
    first = _find_parts(partial, _describe(trained, source, out, job, columns))
    if first:
      LOG.info("going on behind %d parts of %s", first, partial)
    counts = Counts(**read_json(epath.Path(partial / "counts.json"))) if first else Counts()
    with tqdm.tqdm(initial=counts.histories, unit=" histories", disable=not sys.stderr.isatty()) as bar:
      for number, histories in enumerate(read_histories(source, trained, PART, first * PART, columns), start=first):
        found = _recommend(trained, histories, number * PART, job, allowed)
        content = _encode(trained, histories, found, number, job, form)
        if out.lower().endswith(".gz"):
          content = gzip.compress(content, mtime=0)
        write_bytes(epath.Path(_part(partial, number)), content)
        counts.add(histories)
        write_json(epath.Path(partial / "counts.json"), dataclasses.asdict(counts))
        bar.update(len(histories))
    if not counts.histories:
      shutil.rmtree(partial)
      raise ValueError(f"{source} holds no histories")
    _join(partial, path, -(-counts.histories // PART), form)
  return counts


def _recommend(trained: Trained, histories: Histories, first: int, job: Job,
               allowed: Any) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns scores and item numbers of each history, without the places that are empty."""
  if job.strict:
    trained.check_known(histories.numbered, histories.unknown.tolist(), first + 1)
  scores, items = trained.top(histories.numbered, job.k, exclude_seen=job.exclude_seen, allowed=allowed)
  ends = np.count_nonzero(items, axis=1)
  return [(scores[row, :end], items[row, :end]) for row, end in enumerate(ends)]


def _to_json(trained: Trained, histories: Histories, found: list[Any], job: Job) -> str:
  """Returns a line of JSON for each history."""
  has_titles, lines = any(trained.titles), []
  for user, numbers, unknown, (scores, items) in zip(
      histories.users, histories.numbered, histories.unknown.tolist(), found, strict=True):
    line = {} if user is None else {"user": user}
    line["items"] = [trained.item_ids[item - 1] for item in items.tolist()]
    line["scores"] = [float(f"{score:.{PLACES}g}") for score in scores.tolist()]
    if has_titles:
      line["titles"] = [trained.titles[item - 1] for item in items.tolist()]
    if unknown:
      line["unknown"] = unknown
    if job.explain and len(numbers):
      line["explanation"] = _explain(trained, numbers, scores, items)
    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
  return "".join(lines)


def _explain(trained: Trained, numbers: np.ndarray, scores: np.ndarray, items: np.ndarray) -> dict[str, Any]:
  """Returns what --explain adds: of the attention weights, those of the newest item, which the scores are made from."""
  found = trained.explain_numbers(numbers, scores, items)
  rounded = lambda x: np.round(x.astype(np.float64), 5).tolist()  # noqa: E731
  layers = [{"first_order": rounded(layer.first_order[:, -1]), "refined": rounded(layer.refined[:, -1])}
            for layer in found.layers]
  return {"history": found.history, "shares": rounded(found.shares), "effects": rounded(found.effects),
          "newest_row": layers}


def _to_text(trained: Trained, histories: Histories, found: list[Any], first: int) -> str:
  """Returns recommendations as they are read at a terminal."""
  lines = []
  for row, (user, numbers, unknown) in enumerate(zip(
      histories.users, histories.numbered, histories.unknown.tolist(), strict=True)):
    name = f"history {first + row + 1}" if user is None else f"user {user}"
    lines.append(f"{name}: {len(numbers)} items{f', {unknown} unknown ones skipped' if unknown else ''}")
    scores, items = found[row]
    named = trained.name(scores, items)
    width = max((len(str(item)) for item, _, _ in named), default=0)
    lines += [f"  {rank:3}  {item!s:>{width}}  {score:9.4f}  {title}".rstrip()
              for rank, (item, score, title) in enumerate(named, start=1)]
  return "\n".join(lines) + "\n"


def _encode(trained: Trained, histories: Histories, found: list[Any], number: int, job: Job, form: str) -> bytes:
  """Returns a part of the file."""
  if form == "jsonl":
    return _to_json(trained, histories, found, job).encode()
  users = [number * PART + row + 1 if user is None else user for row, user in enumerate(histories.users)]
  counts = [len(items) for _, items in found]
  items = np.concatenate([items for _, items in found]).tolist()
  table = {"user": np.repeat(np.array(users, object), counts).tolist(),
           "rank": np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts]),
           "item": [trained.item_ids[item - 1] for item in items],
           "score": np.concatenate([scores for scores, _ in found]),
           "title": [trained.titles[item - 1] or None for item in items]}
  buffer = io.BytesIO()
  if form == "parquet":
    as_id = pyarrow.int64() if isinstance(trained.item_ids[0], int) else pyarrow.string()
    named = pyarrow.string() if any(isinstance(user, str) for user in users) else pyarrow.int64()
    table["user"] = list(map(str, table["user"])) if named == pyarrow.string() else table["user"]
    schema = pyarrow.schema([("user", named), ("rank", pyarrow.int32()), ("item", as_id), ("score", pyarrow.float32()),
                             ("title", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table(table, schema), buffer, compression="zstd")
    return buffer.getvalue()
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  if number == 0:
    writer.writerow(COLUMNS)
  table["score"] = [f"{score:.{PLACES}g}" for score in table["score"].tolist()]
  writer.writerows(zip(*(table[name] for name in COLUMNS), strict=True))
  return text.getvalue().encode()


def _describe(trained: Trained, source: str, out: str, job: Job, columns: dict[str, str]) -> dict[str, Any]:
  """Returns what a job is, so that parts of another one are not taken for its own."""
  files = glob.glob(os.path.join(source, "*")) if os.path.isdir(source) else glob.glob(source) or [source]
  stamps = [[os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in sorted(files)
            if os.path.isfile(file)]
  content = json.dumps([dataclasses.asdict(job), columns, PART])
  return {"workdir": os.path.abspath(trained.workdir), "step": trained.step,
          "checksums": hashlib.sha256(json.dumps(trained.record["checksums"], sort_keys=True).encode()).hexdigest(),
          "options": hashlib.sha256(content.encode()).hexdigest(), "output": os.path.abspath(out), "input": stamps}


def _find_parts(partial: pathlib.Path, described: dict[str, Any]) -> int:
  """Returns how many parts of this job are there."""
  path = epath.Path(partial / "job.json")
  if not path.exists():
    write_json(path, described)
    return 0
  before = read_json(path)
  changed = [key for key in described if before.get(key) != described[key]]
  if changed:
    raise ValueError(f"{partial} is left of another job ({', '.join(changed)} differ); remove it, or choose another "
                     "--output")
  if not (partial / "counts.json").exists():
    return 0
  return -(-read_json(epath.Path(partial / "counts.json"))["histories"] // PART)  # only the last may not be full


def _part(partial: pathlib.Path, number: int) -> pathlib.Path:
  return partial / f"{number:06d}"


def _join(partial: pathlib.Path, path: pathlib.Path, parts: int, form: str) -> None:
  """Makes the file of its parts, in one atomic step."""
  whole = partial / "whole"
  files = [_part(partial, number) for number in range(parts)]
  if form == "parquet":
    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    schema = next((schema for schema in schemas if schema.field("user").type == pyarrow.string()), schemas[0])
    with pyarrow.parquet.ParquetWriter(whole, schema, compression="zstd") as writer:
      for file in files:
        writer.write_table(pyarrow.parquet.read_table(file).cast(schema))
  else:
    with whole.open("wb") as target:
      for file in files:
        with file.open("rb") as part:
          shutil.copyfileobj(part, target)
  with whole.open("rb+") as file:
    os.fsync(file.fileno())
  os.replace(whole, path)
  shutil.rmtree(partial)
