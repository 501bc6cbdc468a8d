"""Recommends from an artefact: a folder that `python -m awrsr_jax.export` made, in which a copy of this file lies.

  from recommender import Recommender          # or: python recommender.py HISTORIES.jsonl [K]
  recommender = Recommender("FOLDER")
  recommender.recommend([["2571", "1270"]], k=10)

It needs jax, numpy and flatbuffers, which jax.export reads with. It needs neither the package that trained the model
nor the data. Shapes: U histories, B of one call, S padded excluded items, n longest input, k best items, V rows of the
item table, I items (numbers 1 to I; 0 is none).
"""

import collections
import hashlib
import itertools
import json
import logging
import operator
import pathlib
import re
import reprlib
import sys
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export as jax_export

LOG = logging.getLogger(__name__)
SCHEMA = 1  # of manifest.json
SAID = {"bytes", "sha256"}  # of each file
READ = {"model.stablehlo", "params.npz", "items.json"}  # beside it
BATCH = 256  # histories of one call, at most
NAMED = 5  # unknown items named in a message, at most
PLAIN = {str, int, np.str_, np.int32, np.int64}  # types of ids; True is none, though bool is a kind of int
CONTROL = re.compile("[\x7f-\x9f]")  # JSON may hold them as they are, and terminals obey
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
AGAIN = "copy the artefact again, or export it again from its run"

Id = int | str


class Recommendation(NamedTuple):
  """An item for a history: its raw id, its score (larger is better), and its title ("" where unknown)."""

  item: Id
  score: float
  title: str


class Catalogue:
  """The items of a model, by raw id and by number.

  Attributes:
    item_ids: I raw ids of items 1 to I, numbers or text as they were in the data.
    titles: I titles, "" where unknown.
    numbers: raw id, as text -> item number, from 1.
    source: where they are from, for messages.
  """

  def __init__(self, item_ids: list[Id], titles: list[str], source: str):
    self.item_ids, self.titles, self.source = item_ids, titles, source
    self.numbers = {raw: number for number, raw in enumerate(map(str, item_ids), start=1)}

  def number(self, histories: Sequence[Iterable[Id]]) -> tuple[list[np.ndarray], list[list[str]]]:
    """Returns the item numbers (int32) of each history, and which of its items are not in the catalogue.

    Raises:
      ValueError: an input is no list of histories, or an item is neither text nor a whole number.
    """
    check_list(histories, "histories")
    known = self.numbers
    numbered, unknown = [], []
    for row, history in enumerate(histories):
      if isinstance(history, (str, bytes, set, frozenset, dict)) or not isinstance(history, Iterable):
        raise ValueError(f"history {row} is {history!r}, not a list of items; one history is recommend([[...]])")
      raws = to_text(history, "history", row)
      found = [known.get(raw, 0) for raw in raws]
      unknown.append([raw for raw, number in zip(raws, found, strict=True) if not number] if 0 in found else [])
      numbered.append(np.array([number for number in found if number] if 0 in found else found, np.int32))
    return numbered, unknown

  def admit(self, histories: Sequence[Iterable[Id]], strict: bool = False) -> tuple[list[np.ndarray], int]:
    """Returns the item numbers of each history, and how many items were left out: logged, or refused.

    Raises:
      ValueError: see `look_up`.
    """
    numbered, unknown = self.look_up(histories, strict)
    empty = sum(not len(numbers) for numbers in numbered)
    if empty:
      LOG.warning("%d of %d histories hold no known item and get no recommendations", empty, len(numbered))
    return numbered, unknown

  def look_up(self, histories: Sequence[Iterable[Id]], strict: bool = False) -> tuple[list[np.ndarray], int]:
    """As `admit`, but nothing is said of histories without a known item.

    Raises:
      ValueError: see `number`; or, with `strict`, an item is unknown or a history has none that is known.
    """
    numbered, unknown = self.number(histories)
    for row, (numbers, missing) in enumerate(zip(numbered, unknown, strict=True)):
      if strict and (missing or not len(numbers)):
        raise ValueError(f"history {row} {f'has unknown items, {missing[:NAMED]}' if missing else 'is empty'}, and "
                         "strict is set; leave it out, or do without strict to have such items skipped")
    missing = collections.Counter(itertools.chain.from_iterable(unknown))
    if missing:
      LOG.warning("%d items of the histories are not in the catalogue of %s and were skipped, %d different ones, such "
                  "as %s", missing.total(), self.source, len(missing), [raw for raw, _ in missing.most_common(NAMED)])
    return numbered, missing.total()

  def allowed(self, rows: int, allow: Iterable[Id] | None, deny: Iterable[Id], strict: bool = False) -> np.ndarray:
    """Returns bool (rows,), which rows of the item table may be given; `deny` wins.

    Raises:
      ValueError: nothing is allowed, an input is no list, or an item is neither text nor a whole number; or, with
        `strict`, an item is unknown.
    """
    chosen = np.full(rows, allow is None)
    for name, listed, value in (("allow", allow, True), ("deny", deny, False)):
      if listed is None:
        continue
      check_list(listed, name)
      listed = to_text(listed, name)
      unknown = [raw for raw in listed if raw not in self.numbers]
      if unknown and strict:
        raise ValueError(f"{name} holds {len(unknown)} items that are not in the catalogue, such as {unknown[:NAMED]}")
      if unknown:
        LOG.warning("%d of %d items to %s are not in the catalogue of %s, such as %s", len(unknown), len(listed), name,
                    self.source, unknown[:NAMED])
      chosen[[self.numbers[raw] for raw in listed if raw in self.numbers]] = value
    if not chosen[1:len(self.item_ids) + 1].any():
      raise ValueError(f"allow and deny leave none of the {len(self.item_ids)} items to recommend; raw ids look like "
                       f"{self.item_ids[:3]}")
    return chosen

  def name(self, scores_k: np.ndarray, items_k: np.ndarray) -> list[Recommendation]:
    """Returns scores and item numbers in raw ids, without the places that are empty."""
    return [Recommendation(self.item_ids[number - 1], score, self.titles[number - 1])
            for score, number in zip(scores_k.tolist(), items_k.tolist(), strict=True) if number]


class Recommender:
  """A model in use.

  Attributes:
    folder: where it was read from.
    manifest: what it says of itself: "corpus", "config", "step", "protocol", ...
    catalogue: its items.
    k: the most items that a call can give.
    length: n, how many items of a history the model looks at.
    unknown: how many items of histories were not in the catalogue and were skipped, since this was made.
  """

  def __init__(self, folder: str | pathlib.Path):
    """Reads a folder, and places the parameters on the default device.

    Raises:
      ValueError: a file is missing, changed or of another version, or this JAX cannot run the model.
    """
    self.folder = pathlib.Path(folder)
    self.manifest = read_manifest(self.folder)
    check_files(self.folder, self.manifest)
    self.k, self.length = self.manifest["k"], self.manifest["length"]
    self.unknown = 0
    self.catalogue = read_catalogue(self.folder, self.manifest["items"])
    self.exported = read_model(self.folder, self.manifest)
    try:
      with np.load(self.folder / "params.npz", allow_pickle=False) as arrays:
        self._params = {name: jax.device_put(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
      raise ValueError(f"{self.folder / 'params.npz'} cannot be read ({error}); {AGAIN}") from error
    self._all = jax.device_put(np.ones(self.manifest["rows"], bool))
    self._call = jax.jit(self.exported.call)

  def recommend(self, histories: Sequence[Iterable[Id]], k: int = 10, *, exclude_seen: bool = True,
                allow: Iterable[Id] | None = None, deny: Iterable[Id] = ()) -> list[list[Recommendation]]:
    """Returns the best k items for each history, best first; of equal scores the lower item number first.

    Args:
      histories: raw item ids, oldest first, of any users. The model looks at the newest n known ones.
      k: how many, up to what was exported.
      exclude_seen: a history is not given its own items.
      allow: only these items are given, where it is not None.
      deny: these items are never given.

    Returns:
      A list a history; shorter than k where fewer items are left, and empty for a history without a known item, of
      which the model knows nothing. Unknown items are skipped, counted and logged.

    Raises:
      ValueError: k is out of range, an input is no list, an item is no id, or nothing is allowed.
      FloatingPointError: a score is NaN.
    """
    if not 1 <= k <= self.k:
      raise ValueError(f"k={k} must lie between 1 and {self.k}, which {self.folder} was exported for; export again "
                       f"with a larger --k (up to the {len(self.catalogue.item_ids)} items)")
    numbered, unknown = self.catalogue.admit(histories)
    self.unknown += unknown
    is_limited = allow is not None or not isinstance(deny, Sequence) or len(deny)
    allowed = self.catalogue.allowed(len(self._all), allow, deny) if is_limited else self._all  # stays on the device
    order = sorted((row for row, numbers in enumerate(numbered) if len(numbers)), key=lambda row: len(numbered[row]))
    found: list[list[Recommendation]] = [[] for _ in numbered]
    for first in range(0, len(order), BATCH):
      rows = order[first:first + BATCH]
      longest = max(self.length, len(numbered[rows[-1]]))
      seen = np.zeros((round_up(len(rows)), round_up(longest)), np.int32)
      for at, row in enumerate(rows):
        seen[at, seen.shape[1] - len(numbered[row]):] = numbered[row]
      inputs = seen[:, seen.shape[1] - self.length:]
      scores, items = self.run(inputs, seen if exclude_seen else np.zeros_like(seen), allowed)
      broken = np.isnan(scores[:len(rows)]).any(axis=1)
      if broken.any():
        raise FloatingPointError(f"{broken.sum()} of {len(rows)} histories have a NaN among their scores; the "
                                 f"parameters in {self.folder} are damaged")
      for at, row in enumerate(rows):
        found[row] = self.catalogue.name(scores[at, :k], items[at, :k])
    return found

  def run(self, inputs_Bxn: np.ndarray, excluded_BxS: np.ndarray,
          allowed_V: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Runs the model on item numbers; a new B or S compiles once.

    Args:
      inputs_Bxn: int32, histories of exactly n items, oldest first, padded with 0 on the left. B is at least 1.
      excluded_BxS: int32, items that a history is not given; 0 is none. S is at least 1: give a column of 0 for none.
      allowed_V: bool, which rows of the item table may be given to any.

    Returns:
      (B, k) float32 scores, best first, and (B, k) int32 item numbers: -inf and 0 where fewer than k are left.

    Raises:
      ValueError: a shape or type is another.
    """
    given = (inputs_Bxn, excluded_BxS, allowed_V)
    batch = max(np.shape(inputs_Bxn)[0] if np.ndim(inputs_Bxn) else 0, 1)
    width = max(np.shape(excluded_BxS)[1] if np.ndim(excluded_BxS) == 2 else 0, 1)
    wanted = {"inputs": (np.int32, (batch, self.length)), "excluded": (np.int32, (batch, width)),
              "allowed": (np.bool_, self._all.shape)}
    for array, (name, (kind, shape)) in zip(given, wanted.items(), strict=True):
      found = getattr(array, "dtype", type(array).__name__)
      if np.shape(array) != shape or found != kind:
        raise ValueError(f"{name} is {found} of shape {np.shape(array)}, and the model of "
                         f"{self.folder} takes {np.dtype(kind)} of shape {shape}: inputs have exactly n={self.length} "
                         "columns (pad with 0 on the left), excluded has as many rows and at least one column (0 is "
                         f"none), allowed has {len(self._all)} entries")
    scores, items = self._call(self._params, *given)
    return np.asarray(scores), np.asarray(items)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of manifest.json.

  Raises:
    ValueError: it is missing, damaged or of another schema.
  """
  path = folder / "manifest.json"
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(f"{folder} is no artefact: it has no manifest.json; give a folder that python -m awrsr_jax.export "
                     "made") from error
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read ({error}); {AGAIN}") from error
  schema = manifest.get("schema") if isinstance(manifest, dict) else None
  if schema != SCHEMA:
    raise ValueError(f"{path} has schema {schema!r}, and this recommender.py reads schema {SCHEMA}; use the "
                     "recommender.py that lies in the artefact, or export it again")
  lacking = {"files", "k", "length", "rows", "items", "jax_version", "platforms"} - manifest.keys()
  if lacking:
    raise ValueError(f"{path} has no {', '.join(sorted(lacking))}; {AGAIN}")
  files = manifest["files"]
  if not (isinstance(files, dict) and files.keys() >= READ and all(
      pathlib.PurePath(name).name == name != ".." and isinstance(expected, dict) and {*expected} >= SAID
      for name, expected in files.items())):
    raise ValueError(f"{path}: its files are not size and hash of {', '.join(sorted(READ))} and others of its folder; "
                     f"{AGAIN}")
  return manifest


def check_files(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
  """Compares the files of an artefact with what its manifest says of them.

  Raises:
    ValueError: a file is missing, or has another size or content.
  """
  for name, expected in manifest["files"].items():
    path = folder / name
    if not path.is_file():
      raise ValueError(f"{path} is missing; {AGAIN}")
    if path.stat().st_size != expected["bytes"]:
      raise ValueError(f"{path} has {path.stat().st_size} bytes, and had {expected['bytes']} when it was exported; "
                       f"{AGAIN}")
    with path.open("rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected["sha256"]:
      raise ValueError(f"{path} is not what it was when it was exported: its SHA-256 is {found}, and was "
                       f"{expected['sha256']}; {AGAIN}")


def read_catalogue(folder: pathlib.Path, count: Any) -> Catalogue:
  """Returns the items of an artefact.

  Raises:
    ValueError: items.json is damaged, or does not have so many.
  """
  path = folder / "items.json"
  try:
    items = json.loads(path.read_text(encoding="utf-8"))
    ids, titles = items["ids"], items["titles"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
  titles = [""] * count if titles is None and type(count) is int else titles
  if not (type(ids) is type(titles) is list and len(ids) == len(titles) == count
          and {int, str} >= set(map(type, ids)) and {str} >= set(map(type, titles))):
    raise ValueError(f"{path} does not hold {count} ids with a title each; {AGAIN}")
  return Catalogue(ids, titles, str(folder))


def read_model(folder: pathlib.Path, manifest: dict[str, Any]) -> jax_export.Exported:
  """Returns the program, without compiling it.

  Raises:
    ValueError: this JAX cannot read it, or it is for other platforms.
  """
  path = folder / "model.stablehlo"
  try:
    exported = jax_export.deserialize(bytearray(path.read_bytes()))
  except ImportError as error:
    raise ValueError(f"{path} cannot be read: {error} (pip install flatbuffers)") from error
  except Exception as error:  # whatever the reader of another version stumbles over
    raise ValueError(f"{path} was written by JAX {manifest['jax_version']} and cannot be read by JAX "
                     f"{jax.__version__}: {error}. Exported programs are read by JAX of up to 6 months later: use an "
                     "older JAX, or export again from the run with a newer one") from error
  try:
    found = exported.in_avals[-3].shape[1], exported.in_avals[-1].shape[0], exported.out_avals[0].shape[1]
  except IndexError as error:
    raise ValueError(f"{path} is another program, with {len(exported.in_avals)} inputs; {AGAIN}") from error
  if found != (manifest["length"], manifest["rows"], manifest["k"]):
    raise ValueError(f"{folder / 'manifest.json'} says length {manifest['length']}, rows {manifest['rows']} and "
                     f"k {manifest['k']}, and the program has {found}; {AGAIN}")
  here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
  if here not in exported.platforms:
    raise ValueError(f"{folder} was exported for {', '.join(exported.platforms)}, and the default device here is "
                     f"{here}; export again with --platforms={here}, or set JAX_PLATFORMS")
  return exported


def check_list(values: Any, what: str) -> None:
  """Raises ValueError when values are no list."""
  if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
    raise ValueError(f"{what} must be a list, not {values!r}")


def to_text(ids: Iterable[Id], *where: str | int) -> list[str]:
  """Returns ids as text.

  Args:
    ids: text or whole numbers, also those of numpy.
    where: they stand, in words for messages.

  Raises:
    ValueError: one is something else.
  """
  listed: list[Any] = ids if type(ids) is list else list(ids)
  kinds = set(map(type, listed))  # few, and quicker asked than each id
  if kinds == {str}:
    return listed
  if not kinds <= PLAIN:
    for at, raw in enumerate(listed):
      if not is_id(raw):
        raise ValueError(f"{' '.join(map(str, where))}, item {at} is {reprlib.repr(raw)}, not an id (text or a whole "
                         "number)")
  return [str(raw) for raw in listed]


def is_id(raw: Any) -> bool:
  """Returns whether a value is text or a whole number; those of arrays are."""
  if isinstance(raw, bool):
    return False
  try:
    return isinstance(raw, str) or operator.index(raw) is not None
  except TypeError:
    return False


def round_up(size: int) -> int:
  """Returns the next power of two: few shapes, so few compilations."""
  return 1 << (size - 1).bit_length()


def read_histories(path: str) -> list[list[Id]]:
  """Returns the histories of a file of JSON lines, each a list of raw ids; empty lines are none.

  Raises:
    ValueError: a line is something else, or the file cannot be read.
  """
  histories = []
  try:
    with open(path, encoding="utf-8-sig") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          history = json.loads(line)
          if not isinstance(history, list):
            raise ValueError(f"line {number} is {line.strip()[:80]!r}, not a list of raw item ids")
          histories.append(history)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  return histories


def to_json(found: list[list[Recommendation]], unknown: list[list[str]], has_titles: bool) -> str:
  """Returns a line of JSON for each history, as python -m awrsr_jax.recommend does.

  Args:
    found: best first.
    unknown: the items of each history that are not in the catalogue.
    has_titles: any item has one.
  """
  lines = []
  for row, missing in zip(found, unknown, strict=True):
    scores = np.array([best.score for best in row], np.float32).astype("U16")  # the fewest digits that give them back
    line = {"items": [best.item for best in row], "scores": scores.astype(np.float64).tolist()}
    line |= {"titles": [best.title for best in row]} if has_titles else {}
    line |= {"unknown": len(missing)} if missing else {}
    lines.append(encode(line) + "\n")
  return "".join(lines)


def encode(line: dict[str, Any]) -> str:
  """Returns a line of JSON; control characters that JSON may hold as they are, and terminals obey, are escaped too."""
  text = ENCODE(line)
  return text if text.isascii() else CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def main(arguments: list[str]) -> None:
  """Prints a JSON line a history: {"items": [...], "scores": [...]}, best first; see `to_json`."""
  if len(arguments) not in (1, 2) or (len(arguments) == 2 and not arguments[1].isdecimal()):
    sys.exit("python recommender.py HISTORIES.jsonl [K]: a line a history, a list of raw ids, oldest first; K is 10")
  logging.basicConfig(level=logging.WARNING, format="%(message)s")
  try:
    histories = read_histories(arguments[0])
    recommender = Recommender(pathlib.Path(__file__).resolve().parent)
    k = int(arguments[1]) if len(arguments) == 2 else min(10, recommender.k)
    found = recommender.recommend(histories, k)
  except ValueError as error:
    sys.exit(f"ValueError: {error}")
  _, unknown = recommender.catalogue.number(histories)
  print(to_json(found, unknown, any(recommender.catalogue.titles)), end="")


if __name__ == "__main__":
  main(sys.argv[1:])
