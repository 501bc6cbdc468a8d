"""The best k items of each history, exactly: each device over the rows of the catalogue that it holds, in blocks.

Of equal scores the lower item number comes first. Memory grows with the block and not with the number of items.
Shapes: B histories, L padded length, S padded excluded items, V rows of the item table, K block of items.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awrsr_jax.model.backbones import encode_newest, in_full_precision
from awrsr_jax.model.hidden import Hidden, make_block_scan

Top = tuple[jax.Array, jax.Array]  # (B, k) scores, largest first, and (B, k) item numbers


def take_top(score_rows: Callable[[Hidden, Any], jax.Array], hidden: Hidden, rows: Any, first_row: int | jax.Array,
             num_items: int, excluded_BxS: jax.Array, allowed_V: jax.Array, k: int, block_items: int) -> Top:
  """Returns the best k of some rows of the catalogue.

  Args:
    score_rows, hidden, rows, first_row, num_items, block_items: see hidden.make_block_scan.
    excluded_BxS: item numbers that a history is not given; 0 is none.
    allowed_V: bool (V',), which of the rows may be given to any.
    k: how many.

  Returns:
    Scores -inf and items 0 where fewer than k are left; scores NaN, all k, where any score was.
  """
  users = excluded_BxS.shape[0]
  user_Bx1 = jnp.arange(users)[:, None]

  def best_of_block(best: Top, scores: jax.Array, first: jax.Array, is_new: jax.Array) -> Top:
    size = scores.shape[1]
    broken = jnp.any(jnp.isnan(scores), axis=1, keepdims=True)
    wanted = jax.lax.dynamic_slice_in_dim(allowed_V, first - first_row, size) & is_new
    scores = jnp.where(jnp.broadcast_to(wanted, scores.shape), scores, -jnp.inf)
    column = excluded_BxS - first
    column = jnp.where((column >= 0) & (excluded_BxS > 0), column, size)  # a negative one would count from the end
    scores = scores.at[user_Bx1, column].set(-jnp.inf, mode="drop")
    values, columns = jax.lax.top_k(scores, min(k, size))
    found = jnp.where(values > -jnp.inf, first + columns, 0)
    return merge(best, (jnp.where(broken, jnp.nan, values), found), k)

  none = jnp.full((users, k), -jnp.inf), jnp.zeros((users, k), jnp.int32)
  return make_block_scan(score_rows, hidden, rows, first_row, num_items, block_items)(best_of_block, none)


def merge(first: Top, second: Top, k: int) -> Top:
  """Returns the best k of both; of equal scores those of the first come first, and NaN is above all."""
  scores, items = (jnp.concatenate(both, axis=1) for both in zip(first, second, strict=True))
  broken = jnp.any(jnp.isnan(scores), axis=1, keepdims=True)
  values, places = jax.lax.top_k(jnp.where(broken, -jnp.inf, scores), k)
  return jnp.where(broken, jnp.nan, values), jnp.take_along_axis(items, places, axis=1)


def make_top_step(backbone: nn.Module, mesh: Mesh, k: int, block_items: int) -> Callable[..., Top]:
  """Returns the jitted (params, inputs_BxL, excluded_BxS, allowed_V) -> Top; histories are split over "data"."""
  def top_step(params: Any, inputs_BxL: jax.Array, excluded_BxS: jax.Array, allowed_V: jax.Array) -> Top:
    hidden = encode_newest(backbone, params, inputs_BxL)
    return top_among_all(backbone, mesh, backbone.score_rows, params, hidden, excluded_BxS, allowed_V, k, block_items)
  return jax.jit(in_full_precision(top_step), out_shardings=NamedSharding(mesh, PartitionSpec()))


def make_similar_step(backbone: nn.Module, mesh: Mesh, k: int, block_items: int) -> Callable[..., Top]:
  """Returns the jitted (params, item_B, excluded_BxS, allowed_V) -> Top: the items most similar to each item."""
  def similar_step(params: Any, item_B: jax.Array, excluded_BxS: jax.Array, allowed_V: jax.Array) -> Top:
    hidden: Any = backbone.apply({"params": params}, item_B, method="items")
    return top_among_all(backbone, mesh, backbone.compare_rows, params, hidden, excluded_BxS, allowed_V, k, block_items)
  return jax.jit(in_full_precision(similar_step), out_shardings=NamedSharding(mesh, PartitionSpec()))


def top_among_all(backbone: nn.Module, mesh: Mesh, score_rows: Callable[[Hidden, Any], jax.Array], params: Any,
                  hidden: Hidden, excluded_BxS: jax.Array, allowed_V: jax.Array, k: int, block_items: int) -> Top:
  """Returns the best k of the whole catalogue; between devices travel k scores and items a history."""
  def of_device(catalogue: Any, allowed: jax.Array, hidden: Hidden, excluded: jax.Array) -> Top:
    first_row = jax.lax.axis_index("model") * len(allowed)
    best = take_top(score_rows, hidden, catalogue, first_row, backbone.num_items, excluded, allowed, k, block_items)
    gathered = jax.lax.all_gather(best, "model", axis=1, tiled=True)
    return best if mesh.shape["model"] == 1 else merge(jax.tree.map(lambda x: x[:, :0], best), gathered, k)

  users, table = PartitionSpec("data"), PartitionSpec("model")
  find = jax.shard_map(of_device, mesh=mesh, in_specs=(table, table, users, users), out_specs=users, check_vma=False)
  return find(backbone.apply({"params": params}, method="catalogue"), allowed_V, hidden, excluded_BxS)
