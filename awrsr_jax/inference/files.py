"""Recommendations for the histories of a file, written to a file: whole or not at all, and resumable.

OUT.partial holds a part for every few thousand histories, each whole or not at all, and job.json, which says what job
they are of and what became of their histories. The same command goes on behind the last part; at the end the parts
become OUT and the folder goes.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from etils import epath

import awrsr_jax
from awrsr_jax.engine.run_folder import lock_folder, read_json, write_bytes, write_json
from awrsr_jax.foreign import INT64, shorten
from awrsr_jax.inference.histories import Histories, find_files, read_histories
from awrsr_jax.inference.standalone import NAMED, encode
from awrsr_jax.inference.trained import Trained

LOG = logging.getLogger(__name__)
PART = 8192  # histories of a part
AT_ONCE = 256  # of standard output
FORMATS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".ndjson": "jsonl", ".ndjson.gz": "jsonl", ".csv": "csv",
           ".csv.gz": "csv", ".parquet": "parquet"}
COLUMNS = ("user", "rank", "item", "score", "title")
SHOWN = 200  # letters of an id or a title, in text that is made to be read


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
    self.unknown += sum(map(len, histories.unknown))


def format_of(out: str) -> str:
  """Returns "jsonl", "csv" or "parquet" by the end of a file's name; raises ValueError for others."""
  form = next((form for ending, form in FORMATS.items() if out.lower().endswith(ending)), None)
  if form is None:
    raise ValueError(f"--output={out} must end in one of {', '.join(FORMATS)}")
  return form


def check_output(out: str, explain: bool) -> None:
  """Raises ValueError where a file cannot become the output; it is quick, and writes nothing."""
  if explain and format_of(out) != "jsonl":
    raise ValueError(f"--explain has room in JSON lines only; --output={out} is {format_of(out)}")
  format_of(out)
  folder = os.path.dirname(os.path.abspath(out))
  if os.path.lexists(out):
    raise ValueError(f"--output={out} exists; remove it, or choose another file")
  if not os.path.isdir(folder):
    raise ValueError(f"--output={out} lies in no folder that exists")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise ValueError(f"--output={out} cannot be written: no permission in {folder}")


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
  allowed = _allowed(trained, job)
  at_once = 1 if source == "-" and sys.stdin.isatty() else AT_ONCE  # who types wants an answer to each line
  for histories in read_histories(source, trained, at_once, 0, columns):
    found = _recommend(trained, histories, counts.histories, job, allowed, source)
    write(_to_text(trained, histories, found, counts.histories) if form == "text" else
          _to_json(trained, histories, found, job))
    counts.add(histories)
  if not counts.histories:
    raise ValueError(f"--input={source} holds no histories")
  return counts


def recommend_file(trained: Trained, source: str, out: str, job: Job, columns: dict[str, str]) -> Counts:
  """Writes recommendations for all histories of a source into a file; the same call goes on where one was cut off.

  Standard input cannot be read again: there the work starts over.

  Args:
    trained: the model.
    source, columns: see read_histories.
    out: the file, which does not exist; its ending says the format.
    job: what is wanted.

  Raises:
    ValueError: also where `out` exists, cannot be written, or OUT.partial is of another job or in use.
    FloatingPointError: a score is NaN.
  """
  check_output(out, job.explain)
  path, allowed = pathlib.Path(os.path.abspath(out)), _allowed(trained, job)
  partial = path.with_name(path.name + ".partial")
  with lock_folder(epath.Path(partial), "--output"):
    state = partial / "job.json"
    try:
      check_output(out, job.explain)  # another process may have made it while this one waited for its model
      described = _describe(trained, source, job, columns)
      counts = _find_parts(state, described) if source != "-" else Counts()
      write_json(epath.Path(state), {"job": described, "counts": dataclasses.asdict(counts)})
      if counts.histories:
        LOG.info("going on behind %d histories of %s", counts.histories, partial)
      with contextlib.closing(_make_parts(trained, source, out, job, columns, allowed, counts)) as parts:
        for number, histories, content in parts:
          write_bytes(epath.Path(_part(partial, number)), content)
          counts.add(histories)
          write_json(epath.Path(state), {"job": described, "counts": dataclasses.asdict(counts)})
      if not counts.histories:
        raise ValueError(f"--input={source} holds no histories")
      _join(partial, path, -(-counts.histories // PART), format_of(out))
    except OSError as error:
      stays = source != "-" and _has_parts(state)
      raise ValueError(f"--output={out} cannot be written: {error.strerror or error}" + (
          f". What is done stays in {partial}, and the same command goes on there" if stays else "")) from error
    finally:
      if source == "-" or not _has_parts(state):
        shutil.rmtree(partial, ignore_errors=True)
  return counts


def _make_parts(trained: Trained, source: str, out: str, job: Job, columns: dict[str, str], allowed: Any,
                counts: Counts) -> Generator[tuple[int, Histories, bytes], None, None]:
  """Yields number, histories and content of the parts that are missing.

  While devices work on a part, one thread reads the next one, and another makes text of the one before.
  """
  first = -(-counts.histories // PART)  # only the last part may not be full
  pieces = read_histories(source, trained, PART, first * PART, columns)
  bar = tqdm.tqdm(initial=counts.histories, unit=" histories", disable=not sys.stderr.isatty())
  with bar, contextlib.closing(pieces), concurrent.futures.ThreadPoolExecutor(2) as pool:
    before = None
    for number, histories in enumerate(_read_ahead(pieces, pool), start=first):
      found = _recommend(trained, histories, number * PART, job, allowed, source)
      if before:
        yield *before[:2], before[2].result()
      before = number, histories, pool.submit(_encode, trained, histories, found, number, job, out)
      if job.explain:  # needs the devices too, and programs of two threads that meet on several devices may hang
        before[2].result()
      bar.update(len(histories))
    if before:
      yield *before[:2], before[2].result()


def _read_ahead(pieces: Iterator[Histories], pool: concurrent.futures.Executor) -> Iterator[Histories]:
  """Yields pieces; the next one is read meanwhile."""
  waiting = pool.submit(next, pieces, None)
  while (piece := waiting.result()) is not None:
    waiting = pool.submit(next, pieces, None)
    yield piece


def _allowed(trained: Trained, job: Job) -> Any:
  """Returns which items may be given; raises ValueError at once for what else would be found after the first part."""
  allowed = trained.allowed(job.allow, job.deny, job.strict)
  trained.top([], job.k, allowed=allowed)
  return allowed


def _recommend(trained: Trained, histories: Histories, first: int, job: Job, allowed: Any,
               source: str) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns scores and item numbers of each history, without the places that are empty."""
  if job.strict:
    _check_known(trained, histories, first, source)
  scores, items = trained.top(histories.numbered, job.k, exclude_seen=job.exclude_seen, allowed=allowed)
  ends = np.count_nonzero(items, axis=1)
  return [(scores[row, :end], items[row, :end]) for row, end in enumerate(ends)]


def _check_known(trained: Trained, histories: Histories, first: int, source: str) -> None:
  """Raises ValueError for the first history with an unknown item, or with none."""
  for row, (user, numbers, unknown) in enumerate(
      zip(histories.users, histories.numbered, histories.unknown, strict=True), start=first + 1):
    if unknown or not len(numbers):
      what = f"has {len(unknown)} unknown items, such as {unknown[:NAMED]}" if unknown else "is empty"
      raise ValueError(f"--input={source}: history {row}{'' if user is None else f' (user {user!r})'} {what}; raw ids "
                       f"look like {trained.catalogue.item_ids[:3]}. Mend it, or leave out --strict to have such items "
                       "skipped")


def _to_json(trained: Trained, histories: Histories, found: list[Any], job: Job) -> str:
  """Returns a line of JSON for each history."""
  item_ids, titles, lines = trained.catalogue.item_ids, trained.catalogue.titles, []
  has_titles = any(titles)
  for user, numbers, unknown, (scores, items) in zip(
      histories.users, histories.numbered, histories.unknown, found, strict=True):
    line: dict[str, Any] = {} if user is None else {"user": user}
    places = (items - 1).tolist()
    line["items"] = [item_ids[at] for at in places]
    line["scores"] = _digits(scores).astype(np.float64).tolist()
    if has_titles:
      line["titles"] = [titles[at] for at in places]
    if unknown:
      line["unknown"] = len(unknown)
    if job.explain and len(numbers):
      line["explanation"] = _explain(trained, numbers, scores, items)
    lines.append(encode(line) + "\n")
  return "".join(lines)


def _digits(scores: np.ndarray) -> np.ndarray:
  """Returns float32 numbers as text, each with the fewest digits that give it back."""
  return scores.astype("U16")


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
      histories.users, histories.numbered, histories.unknown, strict=True)):
    name = f"history {first + row + 1}" if user is None else f"user {shorten(user, SHOWN)}"
    lines.append(f"{name}: {len(numbers)} items{f', {len(unknown)} unknown ones skipped' if unknown else ''}")
    scores, items = found[row]
    named = [(shorten(item, SHOWN), score, shorten(title, SHOWN))
             for item, score, title in trained.catalogue.name(scores, items)]
    width = max((len(item) for item, _, _ in named), default=0)
    lines += [f"  {rank:3}  {item:>{width}}  {score:9.4f}  {title}".rstrip()
              for rank, (item, score, title) in enumerate(named, start=1)]
  return "\n".join(lines) + "\n"


def _encode(trained: Trained, histories: Histories, found: list[Any], number: int, job: Job, out: str) -> bytes:
  """Returns a part of the file."""
  form = format_of(out)
  content = (_to_json(trained, histories, found, job).encode() if form == "jsonl" else
             _to_table(trained, histories, found, number, form))
  return gzip.compress(content, mtime=0) if out.lower().endswith(".gz") else content


def _to_table(trained: Trained, histories: Histories, found: list[Any], number: int, form: str) -> bytes:
  """Returns a part of a CSV or parquet file; a row is a recommendation."""
  users = [number * PART + row if user is None else user for row, user in enumerate(histories.users, start=1)]
  scores, items = (np.concatenate(column) for column in zip(*found, strict=True))
  item_ids, titles, places = trained.catalogue.item_ids, trained.catalogue.titles, (items - 1).tolist()
  table: dict[str, Any] = {"user": [user for user, (_, given) in zip(users, found, strict=True) for _ in given],
           "rank": np.concatenate([np.arange(1, len(given) + 1, dtype=np.int32) for _, given in found]),
           "item": [item_ids[at] for at in places],
           "score": scores if form == "parquet" else _digits(scores),
           "title": [titles[at] or None for at in places]}
  if form == "parquet":
    buffer = io.BytesIO()
    as_id = pyarrow.int64() if isinstance(item_ids[0], int) else pyarrow.string()
    are_numbers = all(isinstance(user, int) and user in INT64 for user in users)
    table["user"] = table["user"] if are_numbers else list(map(str, table["user"]))
    schema = pyarrow.schema([("user", pyarrow.int64() if are_numbers else pyarrow.string()), ("rank", pyarrow.int32()),
                             ("item", as_id), ("score", pyarrow.float32()), ("title", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table(table, schema), buffer, compression="zstd")
    return buffer.getvalue()
  rows = list(zip(*(table[name] for name in COLUMNS), strict=True))
  rows = [COLUMNS, *rows] if number == 0 else rows
  text = _write_csv(rows, csv.QUOTE_MINIMAL)
  return (_write_csv(rows, csv.QUOTE_ALL) if "\r" in text else text).encode()  # minimal: Python sees no line end in it


def _write_csv(rows: list[Any], quoting: Any) -> str:
  text = io.StringIO(newline="")
  csv.writer(text, lineterminator="\n", quoting=quoting).writerows(rows)
  return text.getvalue()


def _describe(trained: Trained, source: str, job: Job, columns: dict[str, str]) -> dict[str, Any]:
  """Returns what a job is, by what its user knows of it, so that parts of another one are not taken for its own."""
  stamp = lambda content: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()  # noqa: E731
  stats = [(os.path.abspath(file), os.stat(file)) for file in find_files(source)]
  options = {f"--{name}": stamp(value) if name in ("allow", "deny") else value
             for name, value in dataclasses.asdict(job).items()}
  return {"checkpoint": [trained.step, stamp(trained.record["checksums"])], **options, "columns": columns,
          "--input": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats], "histories of a part": PART,
          "version of awrsr_jax": awrsr_jax.__version__}


def _find_parts(state: pathlib.Path, described: dict[str, Any]) -> Counts:
  """Returns what became of the histories of the parts that are there; raises ValueError when another job made them."""
  if not _has_parts(state):
    return Counts()
  before = read_json(epath.Path(state))
  changed = [key for key in described if before["job"].get(key) != described[key]]
  if changed:
    raise ValueError(f"{state.parent} is left of another job ({', '.join(changed)} differ); remove it, or choose "
                     "another --output")
  return Counts(**before["counts"])


def _has_parts(state: pathlib.Path) -> bool:
  """Whether there is anything to go on from."""
  return state.exists() and read_json(epath.Path(state))["counts"]["histories"] > 0


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
  (partial / "job.json").unlink()  # first, so that no half of the parts is ever taken for all of them
  shutil.rmtree(partial)
