"""The training objective of a batch: draws negatives where the loss wants them, scores, applies the loss.

Shapes: B batch, L length, K negatives, I items. Only real targets (> 0) count.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model import losses
from awrsr_jax.model.hidden import hide_other_rows

CHUNK_POSITIONS = 256  # of the full softmax at a time: [chunk, items] scores stay in a CPU's cache, no memory on others


def objective(backbone: nn.Module, params: Any, batch: dict[str, jax.Array], cumulative: jax.Array, loss: Any,
              keys: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of the loss over real targets, number of real targets), both float32 scalars.

  Args:
    backbone: any backbone of the contract.
    params: its parameters.
    batch: inputs_BxL, targets_BxL.
    cumulative: (I,) int32, training interactions with items 1 to i; read by popularity negatives only.
    loss: the `loss` node of a config.
    keys: "dropout" and "negatives".
  """
  inputs_BxL, targets_BxL = batch["inputs"], batch["targets"]
  bound = lambda method, *args: backbone.apply({"params": params}, *args, method=method)  # noqa: E731
  hidden = backbone.apply({"params": params}, inputs_BxL, True, method="encode", rngs={"dropout": keys["dropout"]})
  num_items = backbone.num_items
  match loss.name:
    case "softmax":
      def chunk_loss(catalogue: Any, hidden: Any, targets: jax.Array) -> jax.Array:
        scores = hide_other_rows(backbone.score_rows(hidden, catalogue), 0, num_items)
        return jnp.sum(jnp.where(targets > 0, losses.softmax(scores, targets), 0))
      return sum_in_chunks(chunk_loss, bound("catalogue"), hidden, targets_BxL), count_real(targets_BxL)
    case "sampled_softmax":
      negatives_K, log_expected_K = draw_shared(keys["negatives"], loss, num_items, cumulative)
      loss_BxL = losses.sampled_softmax(
          bound("score", hidden, targets_BxL[..., None])[..., 0], bound("score", hidden, negatives_K), log_expected_K,
          collides=negatives_K[None, None] == targets_BxL[..., None])
    case _:
      negatives_BxLxK = draw_unseen(keys["negatives"], inputs_BxL, targets_BxL, loss.num_negatives, num_items)
      positive = bound("score", hidden, targets_BxL[..., None])[..., 0]
      negatives = bound("score", hidden, negatives_BxLxK)
      loss_BxL = {"bce": losses.bce, "bpr": losses.bpr,
                  "gbce": lambda p, n: losses.gbce(p, n, num_items, loss.gbce_t)}[loss.name](positive, negatives)
      if loss.pvn_weight:
        between = bound("score", bound("items", targets_BxL), negatives_BxLxK)
        loss_BxL += loss.pvn_weight * losses.positive_vs_negative(positive, between)
  return jnp.sum(jnp.where(targets_BxL > 0, loss_BxL, 0)), count_real(targets_BxL)


def count_real(targets_BxL: jax.Array) -> jax.Array:
  """Returns the number of real targets, float32."""
  return jnp.sum(targets_BxL > 0, dtype=jnp.float32)


def sum_in_chunks(chunk_loss: Callable[[Any, Any, jax.Array], jax.Array], params: Any, hidden: Any,
                  targets_BxL: jax.Array) -> jax.Array:
  """Sums a loss over chunks of columns; values and gradients are made in the same pass over the chunks.

  So the [positions, items] scores never exist as a whole, neither forward nor backward, and nothing is computed twice.

  Args:
    chunk_loss: (params, hidden of a chunk, targets_Bxc) -> summed loss; a pure function.
    hidden: tree of (B, L, ...).
    targets_BxL: int32, 0 where there is none.
  """
  rows, length = targets_BxL.shape
  columns = min(max(CHUNK_POSITIONS // rows, 1), length)
  def cut(x: jax.Array) -> jax.Array:  # (B, L, ...) -> (chunks, B, columns, ...), filled up with padding
    x = jnp.pad(x, [(0, 0), (0, -length % columns)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, -1, columns, *x.shape[2:]), 1, 0)
  return _sum_chunks(chunk_loss, params, jax.tree.map(cut, hidden), cut(targets_BxL))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(chunk_loss: Callable, params: Any, hidden: Any, targets: jax.Array) -> jax.Array:
  return _sum_chunks_forward(chunk_loss, params, hidden, targets)[0]


def _sum_chunks_forward(chunk_loss: Callable, params: Any, hidden: Any, targets: jax.Array) -> tuple[jax.Array, Any]:
  def add(carry: Any, chunk: Any) -> tuple[Any, Any]:
    loss, (grad_params, grad_hidden) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(params, *chunk)
    return jax.tree.map(jnp.add, carry, (loss, grad_params)), grad_hidden
  zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
  (loss, grad_params), grad_hidden = jax.lax.scan(add, zero, (hidden, targets))
  return loss, (grad_params, grad_hidden)


def _sum_chunks_backward(chunk_loss: Callable, grads: Any, cotangent: jax.Array) -> Any:
  return *jax.tree.map(lambda grad: grad * cotangent, grads), None


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward)


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
  u = jax.random.randint(key, (*targets_BxL.shape, count), 1, jnp.maximum(unseen_B, 1)[:, None, None] + 1)
  before = jax.vmap(lambda gaps, u: jnp.searchsorted(gaps, u, side="left"))(gaps, u)
  return jnp.minimum(u + before, num_items)
