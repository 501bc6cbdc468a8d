"""A trained model, ready for use: raw item ids in, recommendations out.

  trained = awrsr_jax.load("runs/ml1m")
  trained.recommend([["2571", "1270"]], k=10)

Nothing but the checkpoint is read: it holds config, parameters, raw ids and titles. Users need not be known.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.config import restore
from awrsr_jax.engine import checkpoint
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.run_folder import read_json
from awrsr_jax.inference import explain as explaining
from awrsr_jax.inference.top import make_similar_step, make_top_step
from awrsr_jax.model.backbones import build_backbone
from awrsr_jax.model.hidden import table_rows

LOG = logging.getLogger(__name__)
BATCH = 256  # histories of one call, at most
SHORTEST = 8  # the shortest padded length
NAMED = 5  # unknown items named in a message, at most
AHEAD = 4  # batches that devices may have waiting

Id = int | str


class Recommendation(NamedTuple):
  """An item for a history: its raw id, its score (larger is better), and its title ("" where unknown)."""

  item: Id
  score: float
  title: str


@dataclasses.dataclass(frozen=True)
class Explanation:
  """Why a history gets its recommendations; see inference/explain.py for what is measured.

  Attributes:
    history: L raw ids, oldest first: the newest n known ones, which are all that the model looks at.
    titles: L titles.
    layers: the attention weights of each layer.
    recommendations: k of them.
    effects: (k, L) float32, what each item of the history did for the log-probability of each recommendation.
    shares: (k, L) float32, the same as shares of all positive effects.
  """

  history: list[Id]
  titles: list[str]
  layers: list[explaining.Layer]
  recommendations: list[Recommendation]
  effects: np.ndarray
  shares: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)  # identity: the cache of compiled steps hashes it
class Trained:
  """A trained model; `load` makes one.

  Attributes:
    workdir: the run folder.
    step: of the checkpoint.
    record: what the checkpoint says of itself: "corpus", "best", ...
    config: finalized.
    backbone, params: the model.
    mesh: the devices that it lives on.
    item_ids: I raw ids of items 1 to I, numbers or text as they were in the data.
    titles: I titles, "" where unknown.
  """

  workdir: str
  step: int
  record: dict[str, Any]
  config: Any
  backbone: nn.Module
  params: Any
  mesh: Mesh
  item_ids: list[Id]
  titles: list[str]

  @functools.cached_property
  def numbers(self) -> dict[str, int]:
    """Raw id, as text -> item number, from 1."""
    return {raw: number for number, raw in enumerate(map(str, self.item_ids), start=1)}

  def recommend(self, histories: Sequence[Iterable[Id]], k: int = 10, *, exclude_seen: bool = True,
                allow: Iterable[Id] | None = None, deny: Iterable[Id] = (),
                strict: bool = False) -> list[list[Recommendation]]:
    """Returns the best k items for each history, best first; of equal scores the lower item number first.

    Args:
      histories: raw item ids, oldest first, of any users. The model looks at the newest n known ones.
      k: how many, up to the number of items.
      exclude_seen: a history is not given its own items.
      allow: only these items are given, where it is not None.
      deny: these items are never given.
      strict: an item that is not in the catalogue, or a history without any that is, is an error.

    Returns:
      A list a history; shorter than k where fewer items are left, and empty for a history without a known item, of
      which the model knows nothing. Unknown items are skipped, counted and logged.

    Raises:
      ValueError: k is out of range, an input is no list of histories, or `strict` found something.
      FloatingPointError: a score is NaN.
    """
    numbered = self._admit(histories, strict)
    scores, items = self.top(numbered, k, exclude_seen=exclude_seen, allowed=self.allowed(allow, deny, strict))
    return [self.name(*both) for both in zip(scores, items, strict=True)]

  def similar(self, items: Sequence[Id], k: int = 10, *, allow: Iterable[Id] | None = None,
              deny: Iterable[Id] = ()) -> list[list[Recommendation]]:
    """Returns the k items that are most similar to each item, the item itself left out.

    Similarity is the cosine of item vectors (SASRec) or minus the squared Wasserstein distance (STOSA), as `score`.

    Raises:
      ValueError: an item is not in the catalogue, or k is out of range.
    """
    self._check_k(k)
    self._check_list(items, "items")
    missing = [raw for raw in items if str(raw) not in self.numbers]
    if missing:
      raise ValueError(f"unknown items {missing[:NAMED]}: the catalogue of {self.workdir} has {len(self.item_ids)} "
                       f"others, such as {self.item_ids[:3]}")
    numbers = np.array([self.numbers[str(raw)] for raw in items], np.int32)
    step = self._step(make_similar_step, self.mesh, k, self.config.eval.block_items)
    allowed = self.allowed(allow, deny)
    found = []
    for first in range(0, len(numbers), BATCH):
      part = numbers[first:first + BATCH]
      padded = np.pad(part, (0, self._batch_size(len(part)) - len(part)))
      scores, best = step(self.params, self._place(padded), self._place(padded[:, None]), allowed)
      found += [self.name(*both) for both in zip(np.asarray(scores), np.asarray(best), strict=True)][:len(part)]
    return found

  def explain(self, history: Iterable[Id], k: int = 10, *, exclude_seen: bool = True,
              allow: Iterable[Id] | None = None, deny: Iterable[Id] = (), strict: bool = False) -> Explanation:
    """Explains the best k items of one history; arguments and errors as of recommend.

    Raises:
      ValueError: also where no item of the history is known.
    """
    [numbers] = self._admit([history], strict)
    if not len(numbers):
      raise ValueError(f"no item of this history is in the catalogue of {self.workdir}; there is nothing to explain")
    scores, items = self.top([numbers], k, exclude_seen=exclude_seen, allowed=self.allowed(allow, deny, strict))
    return self.explain_numbers(numbers, scores[0], items[0])

  def explain_numbers(self, numbers: np.ndarray, scores_k: np.ndarray, items_k: np.ndarray) -> Explanation:
    """Explains one row of `top`; `numbers` are those of its history, at least one."""
    items_k, numbers = items_k[items_k > 0], numbers[-self.config.data.max_length:]
    _, padded = self._padded_lengths(len(numbers))
    effects = explaining.measure_effects(self._step(explaining.make_log_p_step), self.params, numbers, items_k,
                                         len(self.item_ids), padded)
    layers = explaining.read_layers(self._step(explaining.make_layers_step), self.params, numbers, padded)
    return Explanation([self.item_ids[number - 1] for number in numbers.tolist()],
                       [self.titles[number - 1] for number in numbers.tolist()], layers,
                       self.name(scores_k[:len(items_k)], items_k), effects, explaining.share(effects))

  def number(self, histories: Sequence[Iterable[Id]]) -> tuple[list[np.ndarray], list[list[str]]]:
    """Returns the item numbers of each history, and which of its items are not in the catalogue.

    Raises:
      ValueError: an input is no list of histories.
    """
    self._check_list(histories, "histories")
    known = self.numbers
    numbered, unknown = [], []
    for row, history in enumerate(histories):
      if isinstance(history, (str, bytes)) or not isinstance(history, Iterable):
        raise ValueError(f"history {row} is {history!r}, not a list of items; one history is recommend([[...]])")
      raws = [raw if type(raw) is str else str(raw) for raw in history]
      found = [known.get(raw, 0) for raw in raws]
      unknown.append([raw for raw, number in zip(raws, found, strict=True) if not number] if 0 in found else [])
      numbered.append(np.array([number for number in found if number] if 0 in found else found, np.int32))
    return numbered, unknown

  def _admit(self, histories: Sequence[Iterable[Id]], strict: bool) -> list[np.ndarray]:
    """Returns the item numbers of each history; what is left out is logged, or refused."""
    numbered, unknown = self.number(histories)
    for row, (numbers, missing) in enumerate(zip(numbered, unknown, strict=True)):
      if strict and (missing or not len(numbers)):
        raise ValueError(f"history {row} {f'has unknown items, {missing[:NAMED]}' if missing else 'is empty'}, and "
                         "strict is set; leave it out, or do without strict to have such items skipped")
    missing = collections.Counter(itertools.chain.from_iterable(unknown))
    if missing:
      LOG.warning("%d items of the histories are not in the catalogue of %s and were skipped, %d different ones, such "
                  "as %s", missing.total(), self.workdir, len(missing), [raw for raw, _ in missing.most_common(NAMED)])
    empty = sum(not len(numbers) for numbers in numbered)
    if empty:
      LOG.warning("%d of %d histories hold no known item and get no recommendations", empty, len(numbered))
    return numbered

  def allowed(self, allow: Iterable[Id] | None = None, deny: Iterable[Id] = (), strict: bool = False) -> jax.Array:
    """Returns bool (V,), which rows of the item table may be given, placed as the table is; `deny` wins.

    Raises:
      ValueError: nothing is allowed; or, with `strict`, an item is unknown.
    """
    rows = table_rows(self.backbone.num_items, self.config.model.table_multiple)
    chosen = np.full(rows, allow is None)
    for name, listed, value in (("allow", allow, True), ("deny", deny, False)):
      if listed is None:
        continue
      self._check_list(listed, name)
      listed = list(map(str, listed))
      unknown = [raw for raw in listed if raw not in self.numbers]
      if unknown and strict:
        raise ValueError(f"{name} holds {len(unknown)} items that are not in the catalogue, such as {unknown[:NAMED]}")
      if unknown:
        LOG.warning("%d of %d items to %s are not in the catalogue of %s, such as %s", len(unknown), len(listed), name,
                    self.workdir, unknown[:NAMED])
      chosen[[self.numbers[raw] for raw in listed if raw in self.numbers]] = value
    if not chosen[1:len(self.item_ids) + 1].any():
      raise ValueError(f"allow and deny leave none of the {len(self.item_ids)} items to recommend; raw ids look like "
                       f"{self.item_ids[:3]}")
    place = NamedSharding(self.mesh, PartitionSpec("model"))
    return jax.make_array_from_callback(chosen.shape, place, lambda index: chosen[index])

  def top(self, numbered: Sequence[np.ndarray], k: int, *, exclude_seen: bool = True,
          allowed: jax.Array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best k items of each history by number.

    Histories are sorted by length and run in batches of few padded lengths; the order of the result is that of the
    input.

    Args:
      numbered: U arrays of item numbers, from `number`.
      k: how many, up to I.
      exclude_seen: a history is not given its own items.
      allowed: from `allowed`; None: all.

    Returns:
      (U, k) float32 scores, best first, and (U, k) int32 item numbers: 0 where fewer are left.

    Raises:
      ValueError: k is out of range.
      FloatingPointError: a score is NaN.
    """
    self._check_k(k)
    allowed = self.allowed() if allowed is None else allowed
    step = self._step(make_top_step, self.mesh, k, self.config.eval.block_items)
    scores, items = np.full((len(numbered), k), -np.inf, np.float32), np.zeros((len(numbered), k), np.int32)
    lengths = np.array([len(numbers) for numbers in numbered], np.int64)
    order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0):]
    pending = collections.deque()

    def read_oldest() -> None:
      rows, found = pending.popleft()
      scores[rows], items[rows] = (np.asarray(x)[:len(rows)] for x in found)

    for first in range(0, len(order), BATCH):
      rows = order[first:first + BATCH]
      seen_length, length = self._padded_lengths(int(lengths[rows[-1]]))
      seen = np.zeros((self._batch_size(len(rows)), seen_length), np.int32)
      for at, row in enumerate(rows):
        seen[at, seen_length - lengths[row]:] = numbered[row]
      excluded = seen if exclude_seen else seen[:, :0]
      pending.append((rows, step(self.params, self._place(seen[:, -length:]), self._place(excluded), allowed)))
      if len(pending) > AHEAD:
        read_oldest()
    while pending:
      read_oldest()
    if np.isnan(scores).any():
      raise FloatingPointError(f"{np.isnan(scores).any(axis=1).sum()} of {len(scores)} histories have a NaN among "
                               f"their scores; the parameters of step {self.step} in {self.workdir} are damaged")
    return scores, items

  def name(self, scores_k: np.ndarray, items_k: np.ndarray) -> list[Recommendation]:
    """Returns one row of `top` in raw ids."""
    return [Recommendation(self.item_ids[number - 1], score, self.titles[number - 1])
            for score, number in zip(scores_k.tolist(), items_k.tolist(), strict=True) if number]

  def _check_k(self, k: int) -> None:
    if not 1 <= k <= len(self.item_ids):
      raise ValueError(f"k={k} must lie between 1 and the {len(self.item_ids)} items of the catalogue")

  @staticmethod
  def _check_list(values: Any, what: str) -> None:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
      raise ValueError(f"{what} must be a list, not {values!r}")

  @functools.cache  # noqa: B019 (a model lives as long as its process)
  def _step(self, make: Callable[..., Callable], *more: Any) -> Callable:
    return make(self.backbone, *more)

  def _place(self, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("data")))

  def _batch_size(self, rows: int) -> int:
    """Returns the next power of two, or what of it every device of the "data" axis can take a part of."""
    data = self.mesh.shape["data"]
    return -(-(1 << (rows - 1).bit_length()) // data) * data

  def _padded_lengths(self, longest: int) -> tuple[int, int]:
    """Returns S and L: the smallest of n, n / 2, n / 4, ... that holds a history; beyond n, S is doubled."""
    length = seen = self.config.data.max_length
    while longest <= -(-length // 2) and length > SHORTEST:
      length = -(-length // 2)
    while seen < longest:
      seen *= 2
    return (length, length) if longest <= length else (seen, length)


def load(workdir: str | os.PathLike[str], step: int | None = None, model_devices: int | None = None) -> Trained:
  """Loads the model of a run; the run may still be going on, and nothing of it is changed.

  Args:
    workdir: the run folder.
    step: of the checkpoint; None: the best on validation, or the newest where none was evaluated yet.
    model_devices: devices that share the item tables; None: as in training where the devices here allow it, else 1.

  Raises:
    ValueError: the folder is no run, has no (such) checkpoint, the checkpoint is damaged or of another version, or the
      devices do not fit.
  """
  folder = epath.Path(workdir)
  if not (folder / "config.json").exists():
    raise ValueError(f"{workdir} is no run folder: it has no config.json; give the --workdir of a run of python -m "
                     "awrsr_jax.main")
  if not (folder / "checkpoints").exists():
    raise ValueError(f"{workdir} has no checkpoint yet; wait for the run's first one")
  with _quiet(), checkpoint.open_checkpoints(workdir, read_only=True) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise ValueError(f"{workdir} has no finished checkpoint yet; wait for the run's first one")
    if step is not None and step not in steps:
      raise ValueError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    chosen = steps[-1] if step is None else step
    try:
      if step is None:
        chosen = _choose_step(folder, manager, steps)
      record = checkpoint.read_record(manager, chosen)
      config = restore(record["config"], f"checkpoint {chosen} of {workdir}")
      backbone = build_backbone(config, record["corpus"]["items"])
      mesh = _make_mesh(config, model_devices)
      inputs = jax.ShapeDtypeStruct((1, config.data.max_length), jnp.int32)
      shapes = jax.eval_shape(backbone.init, jax.random.key(0), inputs)["params"]
      params = checkpoint.restore_params(manager, chosen, meshes.template(mesh, shapes), record)
      item_ids, titles = checkpoint.restore_ids(manager, chosen, record)
    except ValueError as error:
      others = [other for other in steps if other != chosen]
      raise ValueError(f"checkpoint {chosen} of {workdir} cannot be loaded: {error}"
                       f"{f'. There are others: step={others}' if others else ''}") from error
  return Trained(str(workdir), chosen, record, config, backbone, params, mesh, item_ids.tolist(), titles)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Orbax warns that what is opened to be read is opened to be read."""
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    yield
  finally:
    absl_logging.set_verbosity(before)


def _choose_step(folder: epath.Path, manager: Any, steps: list[int]) -> int:
  """Returns the best step on validation, as result.json or else the newest checkpoint knows it."""
  if (folder / "result.json").exists():
    best = read_json(folder / "result.json")["best_step"]
  else:
    best = checkpoint.read_record(manager, steps[-1])["best_step"]
    LOG.warning("%s is not complete: step %d is the best so far", folder, best if best in steps else steps[-1])
  if best not in steps and best:
    raise ValueError(f"the best one, step {best}, is gone")
  return best or steps[-1]


def _make_mesh(config: Any, model_devices: int | None) -> Mesh:
  """Lays all devices of this process out as (data, model)."""
  devices = jax.device_count()
  fits = lambda model: devices % model == 0 and config.model.table_multiple % model == 0  # noqa: E731
  if model_devices is not None and not (model_devices >= 1 and fits(model_devices)):
    raise ValueError(f"model_devices={model_devices} must divide the {devices} devices here and "
                     f"config.model.table_multiple={config.model.table_multiple}")
  model = model_devices or (config.mesh.model if fits(config.mesh.model) else 1)
  return meshes.make_mesh(types.SimpleNamespace(data=-1, model=model))
