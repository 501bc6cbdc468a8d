"""A trained model, ready for use: raw item ids in, recommendations out.

  trained = awrsr_jax.load("runs/ml1m")
  trained.recommend([["2571", "1270"]], k=10)

Nothing but the checkpoint is read: it holds config, parameters, raw ids and titles. Users need not be known.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
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
from awrsr_jax.inference.standalone import BATCH, NAMED, Catalogue, Id, Recommendation, check_list, round_up
from awrsr_jax.inference.top import make_similar_step, make_top_step
from awrsr_jax.model.backbones import build_backbone, param_shapes
from awrsr_jax.model.hidden import table_rows

LOG = logging.getLogger(__name__)
SHORTEST = 8  # the shortest padded length
AHEAD = 4  # batches that devices may have waiting


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
    catalogue: its items.
  """

  workdir: str
  step: int
  record: dict[str, Any]
  config: Any
  backbone: nn.Module
  params: Any
  mesh: Mesh
  catalogue: Catalogue

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
      ValueError: k is out of range, an input is no list, an item is no id, nothing is allowed, or `strict` found
        something.
      FloatingPointError: a score is NaN.
    """
    numbered, _ = self.catalogue.admit(histories, strict)
    scores, items = self.top(numbered, k, exclude_seen=exclude_seen, allowed=self.allowed(allow, deny, strict))
    return [self.catalogue.name(*both) for both in zip(scores, items, strict=True)]

  def similar(self, items: Sequence[Id], k: int = 10, *, allow: Iterable[Id] | None = None,
              deny: Iterable[Id] = ()) -> list[list[Recommendation]]:
    """Returns the k items that are most similar to each item, the item itself left out.

    Similarity is the cosine of item vectors (SASRec) or minus the squared Wasserstein distance (STOSA), as `score`.

    Raises:
      ValueError: an item is not in the catalogue, k is out of range, an input is no list, or nothing is allowed.
    """
    self._check_k(k)
    check_list(items, "items")
    known, item_ids = self.catalogue.numbers, self.catalogue.item_ids
    missing = [raw for raw in items if str(raw) not in known]
    if missing:
      raise ValueError(f"unknown items {missing[:NAMED]}: the catalogue of {self.workdir} has {len(item_ids)} others, "
                       f"such as {item_ids[:3]}")
    numbers = np.array([known[str(raw)] for raw in items], np.int32)
    step = self._step(make_similar_step, self.mesh, k, self.config.eval.block_items)
    allowed = self.allowed(allow, deny)
    found = []
    for first in range(0, len(numbers), BATCH):
      part = numbers[first:first + BATCH]
      padded = np.pad(part, (0, self._batch_size(len(part)) - len(part)))
      scores, best = step(self.params, self._place(padded), self._place(padded[:, None]), allowed)
      rows = zip(np.asarray(scores)[:len(part)], np.asarray(best)[:len(part)], strict=True)
      found += [self.catalogue.name(*both) for both in rows]
    return found

  def explain(self, history: Iterable[Id], k: int = 10, *, exclude_seen: bool = True,
              allow: Iterable[Id] | None = None, deny: Iterable[Id] = (), strict: bool = False) -> Explanation:
    """Explains the best k items of one history; arguments and errors as of recommend.

    Raises:
      ValueError: also for a list of histories, and where no item of the history is known.
    """
    check_list(history, "history")
    raws: list[Any] = list(history)
    for at, raw in enumerate(raws):
      if isinstance(raw, (list, tuple)) or getattr(raw, "ndim", False):
        raise ValueError(f"explain takes one history, not a list of them: item {at} is {reprlib.repr(raw)}, not an id "
                         "(text or a whole number)")
    [numbers], _ = self.catalogue.look_up([raws], strict)
    if not len(numbers):
      raise ValueError(f"no item of this history is in the catalogue of {self.workdir}; there is nothing to explain")
    scores, items = self.top([numbers], k, exclude_seen=exclude_seen, allowed=self.allowed(allow, deny, strict))
    return self.explain_numbers(numbers, scores[0], items[0])

  def explain_numbers(self, numbers: np.ndarray, scores_k: np.ndarray, items_k: np.ndarray) -> Explanation:
    """Explains one row of `top`; `numbers` are those of its history, at least one."""
    items_k, numbers = items_k[items_k > 0], numbers[-self.config.data.max_length:]
    _, padded = self._padded_lengths(len(numbers))
    item_ids, titles = self.catalogue.item_ids, self.catalogue.titles
    effects = explaining.measure_effects(self._step(explaining.make_log_p_step), self.params, numbers, items_k,
                                         len(item_ids), padded)
    return Explanation([item_ids[number - 1] for number in numbers.tolist()],
                       [titles[number - 1] for number in numbers.tolist()], self.read_layers(numbers),
                       self.catalogue.name(scores_k[:len(items_k)], items_k), effects, explaining.share(effects))

  def read_layers(self, numbers: np.ndarray) -> list[explaining.Layer]:
    """Returns the attention weights of each layer over the newest n items of a history, at least one."""
    numbers = numbers[-self.config.data.max_length:]
    _, padded = self._padded_lengths(len(numbers))
    return explaining.read_layers(self._step(explaining.make_layers_step), self.params, numbers, padded)

  def allowed(self, allow: Iterable[Id] | None = None, deny: Iterable[Id] = (), strict: bool = False) -> jax.Array:
    """Returns bool (V,), which rows of the item table may be given, placed as the table is; `deny` wins.

    Raises:
      ValueError: nothing is allowed, an input is no list, or an item is no id; or, with `strict`, an item is unknown.
    """
    rows = table_rows(self.backbone.num_items, self.config.model.table_multiple)
    chosen = self.catalogue.allowed(rows, allow, deny, strict)
    place = NamedSharding(self.mesh, PartitionSpec("model"))
    return jax.make_array_from_callback(chosen.shape, place, lambda index: chosen[index])

  def top(self, numbered: Sequence[np.ndarray], k: int, *, exclude_seen: bool = True,
          allowed: jax.Array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best k items of each history by number.

    Histories are sorted by length and run in batches of few padded lengths; the order of the result is that of the
    input.

    Args:
      numbered: U arrays of item numbers, from `catalogue.number`.
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
    pending: collections.deque[tuple[np.ndarray, Any]] = collections.deque()

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

  def _check_k(self, k: int) -> None:
    if not 1 <= k <= len(self.catalogue.item_ids):
      raise ValueError(f"k={k} must lie between 1 and the {len(self.catalogue.item_ids)} items of the catalogue")

  @functools.cache  # noqa: B019 (a model lives as long as its process)
  def _step(self, make: Callable[..., Callable], *more: Any) -> Callable:
    return make(self.backbone, *more)

  def _place(self, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec("data")))

  def _batch_size(self, rows: int) -> int:
    """Returns the next power of two, or what of it every device of the "data" axis can take a part of."""
    data = self.mesh.shape["data"]
    return -(-round_up(rows) // data) * data

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
    ValueError: the folder is no run, has no (such) checkpoint, the checkpoint is damaged, of another version or
      cannot be read now, or the devices do not fit.
  """
  folder = epath.Path(workdir)
  if not (folder / "checkpoints").exists():
    raise ValueError(f"{workdir} has no checkpoint yet; wait for the run's first one" if
                     (folder / "config.json").exists() else f"{workdir} is no run folder: it has neither checkpoints "
                     "nor config.json; give the --workdir of a run of python -m awrsr_jax.main")
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
      items = record["corpus"]["items"]
      if not 0 < items < np.iinfo(np.int32).max:
        raise ValueError(f"it is said to have {items} items")
      backbone = build_backbone(config, items)
      mesh = _make_mesh(config, model_devices)
      with checkpoint.reading():
        shapes = param_shapes(backbone)
      params = checkpoint.restore_params(manager, chosen, meshes.template(mesh, shapes), record)
      item_ids, titles = checkpoint.restore_ids(manager, chosen, record)
      if not len(item_ids) == len(titles) == items:
        raise ValueError(f"it has {len(item_ids)} ids and {len(titles)} titles of {items} items")
    except (ValueError, checkpoint.Unreachable) as error:
      others = [other for other in steps if other != chosen]
      raise ValueError(f"checkpoint {chosen} of {workdir} cannot be loaded: {error}"
                       f"{f'. There are others: step={others}' if others else ''}") from error
  catalogue = Catalogue(item_ids.tolist(), titles, str(workdir))
  return Trained(str(workdir), chosen, record, config, backbone, params, mesh, catalogue)


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
