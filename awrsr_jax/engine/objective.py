"""The training objective of a batch: draws negatives where the loss wants them, scores, applies the loss.

Shapes: B batch, L length, K negatives, I items. Only real targets (> 0) count.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.config import PER_POSITION
from awrsr_jax.model import losses
from awrsr_jax.model.hidden import hide_other_rows

CHUNK_POSITIONS = 256  # of the full softmax at a time: [chunk, items] scores stay in a CPU's cache, no memory on others
CHUNK_SCORES = 1 << 27  # the most scores of a chunk on a device: 512 MiB


def objective(backbone: nn.Module, mesh: Mesh, params: Any, batch: dict[str, Any], cumulative: jax.Array,
              loss: Any, keys: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of the loss over real targets, number of real targets), both float32 scalars.

  Args:
    backbone: any backbone of the contract.
    mesh: where parameters and batch live.
    params: its parameters.
    batch: inputs and targets, (B, L) for each bucket.
    cumulative: (I,) int32, training interactions with items 1 to i; read by popularity negatives only.
    loss: the `loss` node of a config.
    keys: "dropout" and "negatives".
  """
  inputs, targets = (jax.tree.leaves(batch[name]) for name in ("inputs", "targets"))
  of_bucket = lambda purpose, index: jax.random.fold_in(keys[purpose], index)  # noqa: E731
  bound: Callable[..., Any] = lambda method, *args: backbone.apply({"params": params}, *args, method=method)  # noqa: E731
  hidden = [backbone.apply({"params": params}, inputs_BxL, True, method="encode",
                           rngs={"dropout": of_bucket("dropout", index)}) for index, inputs_BxL in enumerate(inputs)]
  if loss.name in PER_POSITION:
    total = sum(jnp.sum(contrast(bound, loss, backbone.num_items, of_bucket("negatives", index), *rows))
                for index, rows in enumerate(zip(inputs, targets, hidden, strict=True)))
    return total, sum(map(count_real, targets))  # type: ignore[return-value]
  hidden_BxL, targets_BxL = join(mesh, hidden), join(mesh, targets)  # all meet the same items
  if loss.name == "softmax":
    return full_softmax(backbone, mesh, bound("catalogue"), hidden_BxL, targets_BxL), count_real(targets_BxL)
  negatives_K, log_expected_K = draw_shared(keys["negatives"], loss, backbone.num_items, cumulative)
  loss_BxL = losses.sampled_softmax(
      bound("score", hidden_BxL, targets_BxL[..., None])[..., 0], bound("score", hidden_BxL, negatives_K),
      log_expected_K, collides=negatives_K[None, None] == targets_BxL[..., None])
  return jnp.sum(jnp.where(targets_BxL > 0, loss_BxL, 0)), count_real(targets_BxL)


def contrast(bound: Callable, loss: Any, num_items: int, key: jax.Array, inputs_BxL: jax.Array, targets_BxL: jax.Array,
             hidden: Any) -> jax.Array:
  """Returns (B, L), the loss of every position beside negatives of its own, 0 where there is no target.

  `bound` calls a method of the backbone; the other arguments are those of objective, of one bucket.
  """
  negatives_BxLxK = draw_unseen(key, inputs_BxL, targets_BxL, loss.num_negatives, num_items)
  candidates = jnp.concatenate([targets_BxL[..., None], negatives_BxLxK], axis=-1)
  scores = bound("score", hidden, candidates)  # all at once: one gradient of the table to sum over devices
  positive, negatives = scores[..., 0], scores[..., 1:]
  loss_BxL = {"bce": losses.bce, "bpr": losses.bpr,
              "gbce": lambda p, n: losses.gbce(p, n, num_items, loss.gbce_t)}[loss.name](positive, negatives)
  if loss.pvn_weight:
    between = bound("score", bound("items", targets_BxL), negatives_BxLxK)
    loss_BxL += loss.pvn_weight * losses.positive_vs_negative(positive, between)
  return jnp.where(targets_BxL > 0, loss_BxL, 0)


def join(mesh: Mesh, buckets: list[Any]) -> Any:
  """Returns trees of (B, L, ...), one a bucket, as a tree of (data, positions, ...): each device keeps what it has."""
  if len(buckets) == 1:
    return buckets[0]
  data, split = mesh.shape["data"], NamedSharding(mesh, PartitionSpec("data"))
  flat = lambda x: x.reshape(data, -1, *x.shape[2:])  # noqa: E731
  return jax.lax.with_sharding_constraint(
      jax.tree.map(lambda *xs: jnp.concatenate(list(map(flat, xs)), axis=1), *buckets), split)


def count_real(targets_BxL: jax.Array) -> jax.Array:
  """Returns the number of real targets, float32."""
  return jnp.sum(targets_BxL > 0, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def full_softmax(backbone: nn.Module, mesh: Mesh, catalogue: Any, hidden: Any, targets_BxL: jax.Array) -> jax.Array:
  """Sums the cross entropy over all items, log sum exp(scores) - scores[target], over real targets.

  Every device gathers its own real positions and scores them by its own rows of the catalogue, a chunk of positions at
  a time. What travels: the maximum and the sums of each chunk over "model", and once a step the gradients, of hidden
  states over "model", of rows over "data". Value and gradients are made in the same pass over the chunks, so that the
  [positions, items] scores never exist as a whole, neither forward nor backward, and nothing is computed twice.

  Args:
    backbone: for `score_rows` and `num_items`.
    mesh: rows of the catalogue are split over "model", sequences over "data".
    catalogue: tables (V, D).
    hidden: tree of (B, L, D).
    targets_BxL: int32, 0 where there is none.

  Returns:
    float32 scalar.
  """
  return _full_softmax_forward(backbone, mesh, catalogue, hidden, targets_BxL)[0]


def _full_softmax_forward(backbone: nn.Module, mesh: Mesh, catalogue: Any, hidden: Any,
                          targets_BxL: jax.Array) -> tuple[jax.Array, Any]:
  def over(axis: str, collective: Callable, x: Any) -> Any:
    return collective(x, axis) if mesh.shape[axis] > 1 else x

  def on_a_device(catalogue: Any, hidden: Any, targets_BxL: jax.Array) -> tuple[jax.Array, Any, Any]:
    rows = len(jax.tree.leaves(catalogue)[0])
    first = jax.lax.axis_index("model") * rows
    positions = targets_BxL.size
    size = min(positions, CHUNK_POSITIONS, max(CHUNK_SCORES // rows, 1))
    chunks = -(-positions // size)
    real_P, = jnp.nonzero(targets_BxL.reshape(-1), size=chunks * size, fill_value=positions)
    targets_P = jnp.take(targets_BxL, real_P, mode="fill", fill_value=0)
    hidden_P = jax.tree.map(lambda x: jnp.take(x.reshape(positions, -1), real_P, axis=0, mode="fill", fill_value=0),
                            hidden)
    wanted = -(-jnp.sum(targets_P > 0) // size)
    if mesh.shape["model"] > 1:  # the chunks hold collectives: all devices go through as many
      wanted = over("data", jax.lax.pmax, wanted)

    def add_chunk(chunk: jax.Array, carry: Any) -> Any:
      loss, grad_catalogue, grad_hidden_P = carry
      hidden, targets = jax.tree.map(
          lambda x: jax.lax.dynamic_slice_in_dim(x, chunk * size, size), (hidden_P, targets_P))
      scores, pull = jax.vjp(lambda hidden, rows: hide_other_rows(backbone.score_rows(hidden, rows), first,
                                                                  backbone.num_items), hidden, catalogue)
      top = over("model", jax.lax.pmax, jnp.max(scores, axis=1))
      exps = jnp.exp(scores - top[:, None])
      target_row = targets - first
      positive = jnp.take_along_axis(scores, jnp.clip(target_row, 0, rows - 1)[:, None], axis=1)[:, 0]
      here = (target_row >= 0) & (target_row < rows)
      total, positive = over("model", jax.lax.psum, (jnp.sum(exps, axis=1), jnp.where(here, positive, 0)))
      real = targets > 0
      loss += jnp.sum(jnp.where(real, jnp.log(total) + top - positive, 0))
      is_target = jnp.arange(rows)[None] == target_row[:, None]
      slope = jnp.where(real[:, None], exps / total[:, None] - is_target, 0)  # d loss / d scores
      grad_hidden, grad_rows = pull(slope)
      put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, chunk * size, 0)  # noqa: E731
      return loss, jax.tree.map(jnp.add, grad_catalogue, grad_rows), jax.tree.map(put, grad_hidden_P, grad_hidden)

    zero = jnp.float32(0), *jax.tree.map(jnp.zeros_like, (catalogue, hidden_P))
    loss, grad_catalogue, grad_hidden_P = jax.lax.fori_loop(0, wanted, add_chunk, zero)
    grad_hidden = jax.tree.map(lambda grad, x: jnp.zeros((positions, x.shape[-1]), grad.dtype).at[real_P].set(
        grad, mode="drop").reshape(x.shape), grad_hidden_P, hidden)
    return (*over("data", jax.lax.psum, (loss, grad_catalogue)), over("model", jax.lax.psum, grad_hidden))

  model, data = PartitionSpec("model"), PartitionSpec("data")
  on_all = jax.shard_map(on_a_device, mesh=mesh, in_specs=(model, data, data), out_specs=(PartitionSpec(), model, data),
                         check_vma=False)
  loss, *grads = on_all(catalogue, hidden, targets_BxL)
  return loss, grads


def _full_softmax_backward(backbone: nn.Module, mesh: Mesh, grads: Any, cotangent: jax.Array) -> Any:
  return *jax.tree.map(lambda grad: grad * cotangent, grads), None


full_softmax.defvjp(_full_softmax_forward, _full_softmax_backward)


def draw_shared(key: jax.Array, loss: Any, num_items: int, cumulative: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws K negatives with replacement for the whole batch.

  Returns:
    negatives_K: int32 item numbers, uniform or in proportion to their training counts.
    log_expected_K: float32, log of how often K draws are expected to give each of them.
  """
  if loss.negatives == "uniform":
    negatives_K = jax.random.randint(key, (loss.num_negatives,), 1, num_items + 1)
    return negatives_K, jnp.full(loss.num_negatives, jnp.log(loss.num_negatives / num_items))
  draws = jax.random.randint(key, (loss.num_negatives,), 0, cumulative[-1])  # one training interaction each
  index = jnp.searchsorted(cumulative, draws, side="right")
  count = cumulative[index] - jnp.where(index > 0, cumulative[index - 1], 0)
  return index + 1, jnp.log(loss.num_negatives * (count / cumulative[-1]))


def draw_unseen(key: jax.Array, inputs_BxL: jax.Array, targets_BxL: jax.Array, count: int,
                num_items: int) -> jax.Array:
  """Draws negatives for every position, uniform over the items that its row does not contain; no rejection.

  A row leaves at least one (data/batches.py refuses others).

  The u-th unseen item is u plus the number of seen items before it: with the row's distinct items s_1 < s_2 < ...,
  that is the number of k with s_k - k < u (u counts from 1).

  Returns:
    (B, L, K) int32.
  """
  row = jnp.sort(jnp.concatenate([inputs_BxL, targets_BxL[:, -1:]], axis=1), axis=1)  # other targets are inputs too
  repeated = jnp.concatenate([jnp.zeros_like(row[:, :1], bool), row[:, 1:] == row[:, :-1]], axis=1)
  seen = jnp.sort(jnp.where(repeated | (row == 0), num_items + 1 + row.shape[1], row), axis=1)
  gaps = seen - jnp.arange(1, row.shape[1] + 1)[None]
  unseen_B = num_items - jnp.sum(seen <= num_items, axis=1)
  u = jax.random.randint(key, (*targets_BxL.shape, count), 1, unseen_B[:, None, None] + 1)
  return u + jax.vmap(lambda gaps, u: jnp.searchsorted(gaps, u, side="left"))(gaps, u)
