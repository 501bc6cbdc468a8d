"""The train step: one pure function of (state, batch), compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.engine.feed import Feed, build_batch
from awrsr_jax.engine.objective import objective
from awrsr_jax.engine.state import TrainState, Window, make_key


@struct.dataclass
class Report:
  """What the host reads of a step, while the next one runs: copies of window and bad_step, and whether to stop."""

  window: Window
  bad_step: jax.Array
  stop: jax.Array  # > 0: one of the processes was told to


def train_step(state: TrainState, batch: dict[str, jax.Array], cumulative: jax.Array, *, backbone: nn.Module,
               mesh: Mesh, optimizer: optax.GradientTransformation, config: Any,
               targets_per_step: float) -> tuple[TrainState, Report]:
  """One update; pure.

  The loss of a batch is its sum over real targets, divided by what batches have on average: so every target weighs the
  same, whatever the length of its row, and bucketing by length changes no expected gradient.

  Args:
    state: before the step.
    batch: inputs and targets, (B, L) for each bucket, and stop; see mesh.to_global.
    cumulative: (I,) int32 popularity, see objective.
    backbone, mesh, optimizer, config: static.
    targets_per_step: see TrainBatches.
  """
  keys = {purpose: make_key(config.seed, purpose, state.step) for purpose in ("dropout", "negatives")}

  def scaled_loss(params: Any, batch: Any, keys: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    total, positions = objective(backbone, mesh, params, batch, cumulative, config.loss, keys)
    return total / targets_per_step, (total, positions)

  rows = {name: batch[name] for name in ("inputs", "targets")}
  grads, (total, positions) = accumulate(jax.grad(scaled_loss, has_aux=True), state.trained, rows, keys,
                                         config.train.accumulate, mesh)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  fresh = state.step % config.train.log_every == 0  # the last step wrote a line
  window = jax.tree.map(lambda old, new: jnp.where(fresh, 0, old) + new, state.window,
                        Window(total, positions, grad_norm, jnp.float32(1)))
  good = jnp.isfinite(total) & jnp.isfinite(grad_norm)
  bad_step = jnp.where(good, state.bad_step, jnp.minimum(state.bad_step, state.step + 1))
  new_state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, window, bad_step)
  return new_state, Report(window, bad_step, jnp.max(batch["stop"]))


def accumulate(grad: Callable, params: Any, batch: dict[str, jax.Array], keys: dict[str, jax.Array], pieces: int,
               mesh: Mesh) -> tuple[Any, Any]:
  """Returns the sum of grad(params, piece, keys) over equal pieces of a batch, of which one is in memory at a time.

  Piece k holds the rows k, k + pieces, ...: so every device has an equal share of every piece, where it already lies.
  Every piece draws with keys of its own.
  """
  if pieces == 1:
    return grad(params, batch, keys)
  split = NamedSharding(mesh, PartitionSpec(None, "data"))
  cut = lambda x: jax.lax.with_sharding_constraint(  # noqa: E731
      jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0), split)

  def add(total: Any, piece: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, None]:
    rows, index = piece
    return jax.tree.map(jnp.add, total, grad(params, rows, {
        purpose: jax.random.fold_in(key, index) for purpose, key in keys.items()})), None

  zeros = jax.tree.map(jnp.zeros_like, params), (jnp.float32(0), jnp.float32(0))
  return jax.lax.scan(add, zeros, (jax.tree.map(cut, batch), jnp.arange(pieces)))[0]


def make_train_step(backbone: nn.Module, mesh: Mesh, optimizer: optax.GradientTransformation, config: Any,
                    targets_per_step: float) -> jax.stages.Wrapped:
  """Returns the jitted (state, feed, cumulative, lengths=()) -> (state, Report); the old state is given up.

  The feed is a batch; or, where the `lengths` of buckets are given (static), an epoch that lives on the devices, see
  feed.resident_calls: its step `first`, or, where the feed has a `count`, so many steps from there.
  """
  one_step = functools.partial(train_step, backbone=backbone, mesh=mesh, optimizer=optimizer, config=config,
                               targets_per_step=targets_per_step)

  def step(state: TrainState, feed: Feed, cumulative: jax.Array,
           lengths: tuple[int, ...] = ()) -> tuple[TrainState, Report]:
    def from_epoch(index: jax.Array, carry: tuple[TrainState, Report]) -> tuple[TrainState, Report]:
      batch = jax.lax.optimization_barrier(build_batch(feed, index, lengths, mesh))  # else rounding would depend on it
      return one_step(carry[0], batch | {"stop": feed["stop"]}, cumulative)

    if not lengths:
      return one_step(state, feed, cumulative)
    start = state, Report(state.window, state.bad_step, jnp.int32(0))
    if "count" not in feed:
      return from_epoch(feed["first"], start)
    return jax.lax.fori_loop(feed["first"], feed["first"] + feed["count"], from_epoch, start)

  # XLA for the CPU would otherwise find what is made twice, and keep it the first time.
  options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
  is_undone = config.model.remat and mesh.devices.flat[0].platform == "cpu"
  return jax.jit(step, donate_argnums=0, static_argnames="lengths", compiler_options=options if is_undone else None)
