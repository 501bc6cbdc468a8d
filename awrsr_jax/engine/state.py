"""What training carries from step to step, and the keys it draws: all functions of (seed, purpose, step)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.engine.mesh import shardings
from awrsr_jax.model.hidden import table_rows

PURPOSES = ("init", "dropout", "negatives")
NO_STEP = np.iinfo(np.int32).max


@struct.dataclass
class Window:
  """Sums since the last line of metrics: part of the state, so that a resumed run writes the same lines."""

  loss: jax.Array  # summed over positions
  positions: jax.Array
  grad_norm: jax.Array  # summed over steps
  steps: jax.Array


@struct.dataclass
class TrainState:
  """Everything that changes while training.

  Attributes:
    step: int32, steps done; also the position in the data.
    params: float32, what is evaluated, kept and used.
    opt_state: of the optimizer; where `params` are averages it has the parameters that are trained, too.
    window: running sums for the log.
    bad_step: int32, the first step whose loss or gradient was not finite; NO_STEP if none.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  window: Window
  bad_step: jax.Array

  @property
  def trained(self) -> Any:
    """The parameters that the next gradient is of: params, unless they are averages."""
    return self.opt_state.trained if isinstance(self.opt_state, Averaged) else self.params


@struct.dataclass
class Averaged:
  """The optimizer state of a run whose `params` are running averages.

  Attributes:
    count: int32, updates done.
    trained: the parameters that are averaged.
    inner: the state of the optimizer that trains them.
  """

  count: jax.Array
  trained: Any
  inner: Any


def make_key(seed: int, purpose: str, step: int | jax.Array = 0) -> jax.Array:
  """Returns the key of a purpose at a step; nothing of it needs saving."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose)), step)


def make_schedule(train: Any, total_steps: int) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up, then constant, or down to 0 at total_steps (cosine, linear)."""
  peak, warmup = train.learning_rate, train.warmup_steps
  decay_steps = max(total_steps - warmup, 1)
  after = {
      "constant": optax.constant_schedule(peak),
      "cosine": optax.cosine_decay_schedule(peak, decay_steps),
      "linear": optax.linear_schedule(peak, 0.0, decay_steps),
  }[train.schedule]
  return optax.join_schedules([lambda step: peak * (step + 1) / (warmup + 1), after], [warmup]) if warmup else after


def make_optimizer(train: Any, total_steps: int) -> optax.GradientTransformation:
  """Returns the optimizer that a config's `train` node describes."""
  schedule = make_schedule(train, total_steps)
  adam = {"adam": optax.adam(schedule, train.beta1, train.beta2),
          "adamw": optax.adamw(schedule, train.beta1, train.beta2, weight_decay=train.weight_decay)}[train.optimizer]
  clipped = adam if train.clip_norm is None else optax.chain(optax.clip_by_global_norm(train.clip_norm), adam)
  return clipped if train.average is None else averaging(clipped, train.average)


def averaging(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
  """Returns an optimizer whose parameters are running averages of those that `optimizer` trains.

  After update t, from 0: average += (1 - min(decay, (1 + t) / (10 + t))) (trained - average); what is young forgets
  faster (TensorFlow's ExponentialMovingAverage). Its gradients are those of `TrainState.trained`.
  """
  def init(params: Any) -> Averaged:
    return Averaged(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params))

  def update(grads: Any, state: Averaged, params: Any) -> tuple[Any, Averaged]:
    updates, inner = optimizer.update(grads, state.inner, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    share = 1 - jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    moves = jax.tree.map(lambda new, old: share * (new - old), trained, params)
    return moves, Averaged(state.count + 1, trained, inner)

  return optax.GradientTransformation(init, update)


def empty_window() -> Window:
  """Returns sums of nothing."""
  return Window(*(jnp.zeros((), jnp.float32) for _ in range(4)))


def make_init(backbone: nn.Module, optimizer: optax.GradientTransformation, seed: int,
              mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted (vectors or None) -> TrainState that creates each part of the state where it will live."""
  def init(vectors: jax.Array | None) -> TrainState:
    inputs = jnp.zeros((1, backbone.max_length), jnp.int32)
    params = start_items(backbone.init(make_key(seed, "init"), inputs)["params"], vectors, backbone.vectors_path)
    return TrainState(jnp.int32(0), params, optimizer.init(params), empty_window(), jnp.int32(NO_STEP))
  return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init, None)))


def start_items(params: Any, vectors: jax.Array | None, path: str) -> Any:
  """Returns parameters whose item vectors have given directions, and the mean length of the random ones.

  Args:
    params: of a backbone.
    vectors: (V, D), of length 1, or 0 where the item keeps its random vector; None: all do.
    path: of the item vectors in the parameters, see Backbone.

  Raises:
    ValueError: nothing is there.
  """
  if vectors is None:
    return params
  flat = traverse_util.flatten_dict(params, sep="/")
  if path not in flat:
    raise ValueError(f"config.train.item_start=cooccurrence: the backbone has no parameter {path}, but "
                     f"{', '.join(sorted(flat))}; mend its vectors_path, or use item_start=random")
  table = flat[path]
  length = jnp.mean(jnp.linalg.norm(table, axis=1))
  flat[path] = jnp.where(jnp.any(vectors != 0, axis=1, keepdims=True), length * vectors, table)
  return traverse_util.unflatten_dict(flat, sep="/")


def vectors_template(backbone: nn.Module, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Returns shape (V, D), type and place of the vectors of start_items: they lie as the item table does."""
  rows = table_rows(backbone.num_items, backbone.model.table_multiple)
  return jax.ShapeDtypeStruct((rows, backbone.model.width), np.float32,
                              sharding=NamedSharding(mesh, PartitionSpec("model", None)))


def init_state(backbone: nn.Module, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh,
               vectors: np.ndarray | None = None) -> TrainState:
  """Creates the state where it will live: no parameter is ever whole on one device unless it stays so.

  Args:
    backbone, optimizer, seed, mesh: of the run.
    vectors: (up to V, D) float32 that item vectors start from, see start_items; the same on all processes.
  """
  if vectors is not None:
    place = vectors_template(backbone, mesh)
    whole = np.pad(vectors, [(0, place.shape[0] - len(vectors)), (0, 0)])
    vectors = jax.make_array_from_callback(whole.shape, place.sharding, whole.__getitem__)
  return make_init(backbone, optimizer, seed, mesh)(vectors)
