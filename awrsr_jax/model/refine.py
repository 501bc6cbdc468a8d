"""Attention weight refinement (AWR): the rows of an attention matrix attend to each other.

Liu, Liu and Liu, "Pay Attention to Attention for Sequential Recommendation", RecSys 2024. The paper says that
attention weights are themselves attended to, a digest of it names the refinements simple, value-weighted, additive
and stochastic; the equations below are our definition (docs/method.md).

Shapes: B batch, H heads, L length of this batch, n the longest length, r rank. A slot table has n rows, row j
belongs to the column n-1-j steps before the END (or before each row, see `slots`), so a batch of length L < n uses the
last L rows, and the amount of left padding never matters.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from awrsr_jax.model.attention import attend_in_blocks, masked_softmax
from awrsr_jax.model.dropout import Drop, number_rows
from awrsr_jax.model.gaussian import covariance, pairwise_wasserstein, wasserstein_as_dot

# preset -> how rows are compared, how the comparison becomes weights
PRESETS = {
    "none": (None, None),
    "simple": ("dot", "simple"),
    "value": ("dot", "value"),
    "additive": ("dot", "additive"),
    "stochastic": ("wasserstein", "simple"),
}

# correlation -> the slot tables of one order
ROLES: dict[str | None, tuple[str, ...]] = {
    "dot": ("query", "key"), "wasserstein": ("query_mean", "query_cov", "key_mean", "key_cov")}


def shift_rows(x: jax.Array) -> jax.Array:
  """Returns (..., b, K + b - 1): the last of the rows of x (..., b, K) in front, each before it one column further."""
  rows, keys = x.shape[-2:]
  width = rows + keys - 1
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(rows - 1, 0)]).reshape(*x.shape[:-2], rows * width)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)])  # read with one more column, row i moves left by i
  return x.reshape(*x.shape[:-1], rows, width + 1)[..., :-1]


def sum_by(weights_HxBxbxK: jax.Array, x_HxBxLxd: jax.Array) -> jax.Array:
  """Returns (H, B, b, d): the first K rows of x summed by weights, in the dtype of x."""
  keys = weights_HxBxbxK.shape[-1]
  return jnp.einsum("hbij,hbjd->hbid", weights_HxBxbxK.astype(x_HxBxLxd.dtype), x_HxBxLxd[:, :, :keys])


def newest_row(x_HxBxLxd: jax.Array) -> jax.Array:
  """Returns (H, B, 1, d)."""
  return x_HxBxLxd[:, :, -1:]


class Refinement(nn.Module):
  """First-order scores -> refined attention; `combine=None` is plain attention.

  Two ways to the same numbers: `weights` keeps L x L matrices, for every option and for maps; `attend` is two passes of
  attention in blocks, because A W is attention with a slot table as values, and (P A) V = P (A V).

  Attributes:
    combine: None, "simple", "value" or "additive".
    correlation: "dot" or "wasserstein".
    heads: H. max_length: n. rank: r.
    order: how often weights are refined; each time with its own tables. Order k reaches (k+1)-hop relations.
    share_heads: one slot table for all heads.
    additive_on: "scores" or "weights".
    value_projection: multiply A by a learned [H, n, n] matrix, the identity at first, before it is mixed.
    gate: where g, the share of refined weights that is learned a head, starts; None: additive on weights .5, value
      has none and keeps nothing of A.
    sink: where the score of a sink starts that is learned a head for every softmax; None: there are none.
    slots: what row j of a table belongs to: "end", the column n-1-j steps before the end, or "lag", the column n-1-j
      steps before the row whose features they are.
  """

  combine: str | None
  correlation: str | None
  heads: int
  max_length: int
  rank: int
  order: int
  share_heads: bool
  additive_on: str
  value_projection: bool
  gate: float | None
  sink: float | None
  slots: str

  def setup(self) -> None:
    orders = range(1, self.order + 1) if self.combine else ()
    table = nn.initializers.xavier_normal(batch_axis=0)
    shape = (1 if self.share_heads else self.heads, self.max_length, self.rank)
    self.tables = [[self.param(f"order{order}_{role}", table, shape) for role in ROLES[self.correlation]]
                   for order in orders]
    if self.sink is not None:
      start = nn.initializers.constant(self.sink)
      self.sinks = [self.param(f"order{order}_sink", start, (self.heads, 1, 1)) for order in range(len(orders) + 1)]
    if self._is_gated:
      start = 0.5 if self.gate is None else self.gate
      logit = nn.initializers.constant(math.log(start / (1 - start)))
      self.gates = [self.param(f"order{order}_gate", logit, (1, self.heads, 1, 1)) for order in orders]
    if self.value_projection:
      identity = lambda key, shape: jnp.broadcast_to(jnp.eye(shape[-1]), shape)  # noqa: E731
      self.projections = [self.param(f"order{order}_value", identity, (self.heads, self.max_length, self.max_length))
                          for order in orders]

  @property
  def _mixes(self) -> bool:
    """Whether refined weights are sums of products of softmaxes, and not one softmax."""
    return self.combine == "value" or (self.combine == "additive" and self.additive_on == "weights")

  @property
  def _is_gated(self) -> bool:
    """Whether a part of the weights before refinement is kept."""
    return self._mixes and (self.combine == "additive" or self.gate is not None)

  @property
  def _correlation_precision(self) -> str | None:
    """The precision of the products that are S', as in _correlate."""
    return "highest" if self.correlation == "wasserstein" else None

  def refuses_blocks(self, squares: bool) -> str:
    """Returns why `attend` cannot stand for `weights`, or "". `squares`: values are summed by squared weights too."""
    if self.value_projection:
      return "a value projection needs the whole matrix"
    if self.slots == "lag" and self.combine == "value" and self.order > 1:
      return "slots that each row counts by itself do not factor out of a second mixing"
    return "the square of a sum of products does not factor" if squares and self._mixes else ""

  def __call__(self, scores_BxHxLxL: jax.Array, mask_Bx1xLxL: jax.Array) -> jax.Array:
    """Returns weights_BxHxLxL, float32, exactly 0 outside the mask."""
    return self.weights(scores_BxHxLxL, mask_Bx1xLxL, None)[0]

  def weights(self, scores_BxHxLxL: jax.Array, mask_Bx1xLxL: jax.Array,
              drop: Drop | None) -> tuple[jax.Array, jax.Array]:
    """Refines weights in memory.

    Sows "first_order" and "refined" weights into the collection "intermediates".

    Args:
      scores_BxHxLxL: first order.
      mask_Bx1xLxL: see causal_mask.
      drop: falls on every softmax that values pass through, each with a key of its own.

    Returns:
      The refined weights with and without what is dropped, float32, exactly 0 outside the mask.
    """
    scores, mask = scores_BxHxLxL.astype(jnp.float32), mask_Bx1xLxL
    batch, heads, length, _ = scores.shape
    rows = number_rows((heads, batch, length)).swapaxes(0, 1)
    dropped = lambda weights, order: weights if drop is None else drop.again(order)(weights, rows)  # noqa: E731
    weights = masked_softmax(scores, mask, self._sink(0))
    kept = dropped(weights, 0)
    self.sow("intermediates", "first_order", weights)
    for order, tables in enumerate(self.tables):
      sink = self._sink(order + 1)
      features = self._sum_slots(weights.swapaxes(0, 1), tables, 0)
      correlation = self._correlate(*(x_HxBxLxr.swapaxes(0, 1) for x_HxBxLxr in features))
      if not self._mixes:
        scores = scores + correlation if self.combine == "additive" else correlation
        weights = masked_softmax(scores, mask, sink)
        kept = dropped(weights, order + 1)
        continue
      before, mixing = (weights, kept), masked_softmax(correlation, mask, sink)
      weights, kept = mixing, dropped(mixing, order + 1)
      if self.combine == "value":
        weights, kept = (mix @ self._project(old, mask, order)
                         for mix, old in zip((weights, kept), before, strict=True))
      if self._is_gated:
        gate = nn.sigmoid(self.gates[order])
        weights, kept = ((1 - gate) * old + gate * new for old, new in zip(before, (weights, kept), strict=True))
    self.sow("intermediates", "refined", weights)
    return kept, weights

  def attend(self, q_HxBxLxE: jax.Array, k_HxBxLxE: jax.Array, real_BxL: jax.Array, values: tuple[jax.Array, ...],
             drop: Drop | None, square: Callable | None = None, precision: str | None = None,
             newest: bool = False) -> tuple[jax.Array, ...]:
    """Sums values by refined weights, in memory that grows with L.

    Args:
      q_HxBxLxE, k_HxBxLxE: whose products are the first-order scores.
      real_BxL: which positions are real.
      values: (H, B, L, .) each; the first is summed by the weights.
      drop: as in `weights`.
      square: (kept weights, weights) -> what the second of the values is summed by.
      precision: of first-order scores.
      newest: only the last row is wanted; plain attention then needs no more queries either.

    Returns:
      The sums, in the shapes and dtypes of the values; L is 1 where only the newest are wanted.
    """
    heads, batch, length, _ = k_HxBxLxE.shape
    first_rows = number_rows((heads, batch, 1)) * jnp.uint32(length)  # in the numbering of `weights`

    def dropped(weights: jax.Array, rows: jax.Array, order: int) -> jax.Array:
      return weights if drop is None else drop.again(order)(weights, first_rows + rows.astype(jnp.uint32)[None, None])

    def read(order: int, query: jax.Array, key: jax.Array, precision: str | None, wanted: Callable) -> Any:
      sink = self._sink(order)
      return attend_in_blocks(query, key, real_BxL, wanted, precision, None if sink is None else sink.swapaxes(0, 1))

    if self._mixes:
      return (self._mix_sums(read, dropped, q_HxBxLxE, k_HxBxLxE, values[0], precision, newest),)

    def sum_values(weights: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
      kept = dropped(weights, rows, len(self.tables))
      return tuple(map(sum_by, (kept, square(kept, weights)) if square else (kept,), values))

    query, key, last_precision = self._refine_scores(read, q_HxBxLxE, k_HxBxLxE, precision)
    return read(len(self.tables), newest_row(query) if newest else query, key, last_precision, sum_values)

  def _refine_scores(self, read: Callable, q_HxBxLxE: jax.Array, k_HxBxLxE: jax.Array,
                     first_precision: str | None) -> tuple[jax.Array, jax.Array, str | None]:
    """Refines where each order is one softmax of new scores, and leaves the last softmax to the caller.

    Args:
      read: (order, queries, keys, precision, wanted) -> what is wanted of the weights; see attend_in_blocks.
      q_HxBxLxE, k_HxBxLxE, first_precision: as of `attend`.

    Returns:
      Queries and keys, (H, B, L, .), whose products are the scores of the last softmax, and the precision of these.
    """
    query, key, precision = q_HxBxLxE, k_HxBxLxE, first_precision
    for order in range(len(self.tables)):
      features, = read(order, query, key, precision,
                       functools.partial(self._sum_tables, slice(order, order + 1), key.shape[2]))
      new_query, new_key = self._as_dot(*features)
      if self.combine == "additive":
        query, key = jnp.concatenate([query, new_query], axis=-1), jnp.concatenate([key, new_key], axis=-1)
        precision = self._correlation_precision or precision
      else:
        query, key, precision = new_query, new_key, self._correlation_precision
    return query, key, precision

  def _mix_sums(self, read: Callable, dropped: Callable, q_HxBxLxE: jax.Array, k_HxBxLxE: jax.Array,
                values_HxBxLxh: jax.Array, first_precision: str | None, newest: bool) -> jax.Array:
    """Sums values by weights that are sums of products of softmaxes; never are two of them multiplied.

    What is carried from order to order is A [V, W]: the values as they reach the output, with what is dropped, and the
    slot tables W of the orders to come, side by side.

    Args:
      read: as of _refine_scores.
      dropped: (weights, rows, order) -> the weights with what is dropped.
      q_HxBxLxE, k_HxBxLxE, first_precision, newest: as of `attend`.
      values_HxBxLxh: V.

    Returns:
      (H, B, L, h); L is 1 where only the newest are wanted.
    """
    def sum_new(order: int, weights: jax.Array, rows: jax.Array) -> dict[str, Any]:  # P [V, W]
      return {"values": sum_by(dropped(weights, rows, order), values_HxBxLxh),
              "tables": self._sum_tables(slice(order, None), k_HxBxLxE.shape[2], weights, rows)}

    def sum_again(order: int, before: dict[str, Any], weights: jax.Array, rows: jax.Array) -> dict[str, Any]:
      return {"values": sum_by(dropped(weights, rows, order), before["values"]),  # (P A) [V, W] = P (A [V, W])
              "tables": jax.tree.map(functools.partial(sum_by, weights), before["tables"])}

    def mix_gate(gate: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
      return ((1 - gate) * old + gate * new).astype(old.dtype)

    sums = read(0, q_HxBxLxE, k_HxBxLxE, first_precision, functools.partial(sum_new, 0))
    for order in range(1, len(self.tables) + 1):
      features, *tables = sums["tables"]
      query, key = self._as_dot(*features)
      before = {"values": sums["values"], "tables": tables}
      wanted = (functools.partial(sum_again, order, before) if self.combine == "value" else
                functools.partial(sum_new, order))
      is_cut = newest and order == len(self.tables)
      sums = read(order, newest_row(query) if is_cut else query, key, self._correlation_precision, wanted)
      if self._is_gated:
        old = jax.tree.map(newest_row, before) if is_cut else before
        gate = nn.sigmoid(self.gates[order - 1]).swapaxes(0, 1)
        sums = jax.tree.map(functools.partial(mix_gate, gate), old, sums)
    return sums["values"]

  def _sum_tables(self, orders: slice, length: int, weights_HxBxbxK: jax.Array,
                  rows_b: jax.Array) -> list[list[jax.Array]]:
    """Returns A W for the slot tables of some orders, for each a list of (H, B, b, r); see _sum_slots."""
    tables = [table for of_order in self.tables[orders] for table in of_order]
    sums = self._sum_slots(weights_HxBxbxK, tables, rows_b[0], length) if tables else []
    roles = len(self.tables[0])
    return [sums[first:first + roles] for first in range(0, len(sums), roles)]

  def _sink(self, order: int) -> jax.Array | None:
    """Returns the score of the sink of a softmax, (1, H, 1, 1): 0 the first order's, k that of refinement k."""
    return None if self.sink is None else self.sinks[order][None]

  def _correlate(self, *features: jax.Array) -> jax.Array:
    """Returns S'_BxHxLxL: how alike the rows of an attention matrix are in the learned correlation space."""
    if self.correlation == "dot":
      return jnp.einsum("bhir,bhjr->bhij", *features) * self.rank ** -0.5
    mean_q, cov_q, mean_k, cov_k = features
    return -pairwise_wasserstein(mean_q, covariance(cov_q), mean_k, covariance(cov_k)) * self.rank ** -0.5

  def _as_dot(self, *features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns queries and keys whose products are S'."""
    if self.correlation == "dot":
      query, key = features
    else:
      mean_q, cov_q, mean_k, cov_k = features
      query, key = wasserstein_as_dot(mean_q, covariance(cov_q), mean_k, covariance(cov_k))
    return query * self.rank ** -0.5, key

  def _sum_slots(self, weights_HxBxbxK: jax.Array, tables: Sequence[jax.Array], row: int | jax.Array,
                 length: int | None = None) -> list[jax.Array]:
    """Returns A W for each slot table, (H, B, b, r): the features of b rows, one after another from `row` on.

    The batch has this length, K unless it is given; keys beyond the first K have no weight.
    """
    rows, keys = weights_HxBxbxK.shape[-2:]
    table = jnp.concatenate(tables, axis=-1)
    table = jnp.broadcast_to(table, (self.heads, *table.shape[1:]))
    if self.slots == "end":
      first = self.max_length - (length or keys)
      weights, table = weights_HxBxbxK, table[:, first:first + keys]
    else:  # shifted so that a column holds one lag in every row; lags below 0 and above n - 1 have no weight
      weights = shift_rows(weights_HxBxbxK)
      table = jnp.pad(table, [(0, 0), (rows, keys), (0, 0)])
      table = jax.lax.dynamic_slice_in_dim(table, self.max_length - row, rows + keys - 1, axis=1)
    return jnp.split(jnp.einsum("hbij,hjr->hbir", weights, table), len(tables), axis=-1)

  def _project(self, weights: jax.Array, mask: jax.Array, order: int) -> jax.Array:
    """Returns A Wv within the mask, or A where there is no value projection."""
    if not self.value_projection:
      return weights
    unused = self.max_length - weights.shape[-1]
    table = self.projections[order][:, unused:, unused:]
    return jnp.where(mask, jnp.einsum("bhij,hjk->bhik", weights, table), 0.0)


def build_refinement(model: Any, max_length: int) -> Refinement:
  """Returns the refinement that a config's `model` node describes, for sequences up to max_length (n)."""
  correlation, combine = PRESETS[model.refine]
  return Refinement(
      combine=combine, correlation=model.awr.correlation or correlation, heads=model.heads, max_length=max_length,
      rank=model.awr.rank, order=model.awr.order, share_heads=model.awr.share_heads, additive_on=model.awr.additive_on,
      value_projection=model.awr.value_projection, gate=model.awr.gate, sink=model.attention.sink,
      slots=model.awr.slots)
