"""Backbones: item ids -> hidden states -> item scores. A larger score is always better.

The contract, which is all that the rest of the package knows of a backbone:
  encode(inputs_BxL, train) -> Hidden        items(numbers) -> Hidden, the items themselves
  score(hidden, items) -> candidate scores   score_all(hidden, first, count) -> scores of consecutive item numbers
  num_items, num_rows: I, and the rows of the item table, V
Shapes: B batch, L length, D width, K candidates, V rows of the item table, I items (numbers 1 to I; 0 is padding).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct, traverse_util

from awrsr_jax.config import default, finalize
from awrsr_jax.model.blocks import (Block, Embedding, FeedForward, GaussianBlock, GaussianSelfAttention, SelfAttention,
                                    dropout, gaussian_norm, xavier)
from awrsr_jax.model.gaussian import covariance, pairwise_wasserstein, wasserstein
from awrsr_jax.model.refine import build_refinement


@struct.dataclass
class Hidden:
  """What a backbone knows after each position: mean (..., D), and a diagonal covariance where it has one."""

  mean: jax.Array
  cov: jax.Array | None = None

  def newest(self) -> "Hidden":
    """Returns the hidden state of the last column: (B, L, D) -> (B, D)."""
    return jax.tree.map(lambda x_BxLxD: x_BxLxD[:, -1], self)


class SASRec(nn.Module):
  """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), with refined attention.

  Attributes:
    model: the `model` node of a finalized config.
    max_length: n.
    num_items: I.
  """

  model: Any
  max_length: int
  num_items: int

  @property
  def num_rows(self) -> int:
    """V."""
    return table_rows(self.num_items, self.model.table_multiple)

  def setup(self) -> None:
    model, dtype = self.model, jnp.dtype(self.model.dtype)
    self.embedding = Embedding(self.num_rows, self.max_length, model.width, model.dropout, dtype)
    self.blocks = [
        Block(attention=SelfAttention(model.heads, attention_dropout(model), dtype,
                                      build_refinement(model, self.max_length)),
              feed_forward=FeedForward(model.ffn_width, model.activation, model.dropout, dtype), norm=model.norm)
        for _ in range(model.layers)]
    self.norm_out = nn.LayerNorm() if model.norm != "post" else lambda x: x  # post-norm blocks end normalised

  def __call__(self, inputs_BxL: jax.Array) -> jax.Array:
    """Touches every parameter (for initialisation). Returns (B, L, V)."""
    return self.score_all(self.encode(inputs_BxL))

  def encode(self, inputs_BxL: jax.Array, train: bool = False) -> Hidden:
    """Encodes left-padded histories.

    Args:
      inputs_BxL: int32 item numbers, L <= n, 0 is padding.
      train: True applies dropout and needs a key for "dropout".

    Returns:
      Hidden with mean (B, L, D) float32: position t knows items up to t. Padded positions hold no information.
    """
    real_BxL = inputs_BxL > 0
    x_BxLxD = self.embedding(inputs_BxL, train)
    for block in self.blocks:
      x_BxLxD = block(x_BxLxD, real_BxL, train)
    return Hidden(mean=self.norm_out(x_BxLxD).astype(jnp.float32))

  def items(self, numbers: jax.Array) -> Hidden:
    """Returns the items (...) themselves as a hidden state, mean (..., D): their vectors."""
    return Hidden(mean=self.embedding.item_table[numbers])

  def score(self, hidden: Hidden, items: jax.Array) -> jax.Array:
    """Scores chosen items: the dot product of hidden state and item vector.

    Args:
      hidden: mean (..., D).
      items: int32, (K,) the same candidates for every hidden state, or (..., K) for each its own.

    Returns:
      (..., K) float32.
    """
    table = self.embedding.item_table[items]
    if items.ndim == 1:
      return jnp.einsum("...d,kd->...k", hidden.mean, table)
    return jnp.einsum("...d,...kd->...k", hidden.mean, table)

  def score_all(self, hidden: Hidden, first: int | jax.Array = 0, count: int | None = None) -> jax.Array:
    """Scores `count` consecutive table rows from row `first` on (None: the whole table).

    Args:
      hidden: mean (..., D).
      first: row of the first score; may be traced.
      count: static.

    Returns:
      (..., count) float32; -inf for row 0 and for rows that only fill the table.
    """
    table = slice_rows(self.embedding.item_table, first, count)
    return hide_other_rows(jnp.einsum("...d,kd->...k", hidden.mean, table), first, self.num_items)


class STOSA(nn.Module):
  """Stochastic self-attention (Fan et al., WWW 2022), with refined attention: histories and items are Gaussians.

  A stream of means and one of covariances run side by side, each like a SASRec of its own, and meet in attention by
  Wasserstein distance. An item's score is minus its distance to the hidden state.

  `model.faithful` is the published network, defects and all (zfan20/STOSA at 1f00ecb): both streams start as
  ELU(dropout(LayerNorm(item + position))), plus 1 for the covariance; they share that norm and the one after the
  attention; the covariance passes ELU + 1 after each block; weights start with mean .01 and deviation .02. And the mean
  that a block computes is lost (a misspelt variable): the mean of the FIRST input goes into every block and comes out
  at the end, so attention, and its refinement, reach the covariance only.

  Attributes:
    model: the `model` node of a finalized config.
    max_length: n.
    num_items: I.
  """

  model: Any
  max_length: int
  num_items: int

  @property
  def num_rows(self) -> int:
    """V."""
    return table_rows(self.num_items, self.model.table_multiple)

  def setup(self) -> None:
    model, dtype = self.model, jnp.dtype(self.model.dtype)
    init = published_init if model.faithful else xavier
    embedding = lambda: Embedding(self.num_rows, self.max_length, model.width, model.dropout, dtype, init)  # noqa: E731
    feed_forward = lambda: FeedForward(  # noqa: E731
        model.ffn_width, model.activation, model.dropout, dtype, init, dropout_inside=not model.faithful)
    self.embedding_mean, self.embedding_cov = embedding(), embedding()
    self.blocks = [
        GaussianBlock(
            attention=GaussianSelfAttention(model.heads, attention_dropout(model), model.dropout, dtype,
                                            build_refinement(model, self.max_length), init, model.faithful),
            feed_forward_mean=feed_forward(), feed_forward_cov=feed_forward(), norm=model.norm,
            faithful=model.faithful)
        for _ in range(model.layers)]
    if model.faithful:
      self.norm_in = gaussian_norm(faithful=True)
    elif model.norm != "post":
      self.norm_out_mean, self.norm_out_cov = gaussian_norm(faithful=False), gaussian_norm(faithful=False)

  def __call__(self, inputs_BxL: jax.Array) -> jax.Array:
    """Touches every parameter (for initialisation). Returns (B, L, V)."""
    return self.score_all(self.encode(inputs_BxL))

  def encode(self, inputs_BxL: jax.Array, train: bool = False) -> Hidden:
    """Encodes left-padded histories.

    Args:
      inputs_BxL: int32 item numbers, L <= n, 0 is padding.
      train: True applies dropout and needs a key for "dropout".

    Returns:
      Hidden with mean and cov (B, L, D) float32: position t knows items up to t. Padded positions are mean 0, cov 1.
    """
    mean, cov = self._encode_as_published(inputs_BxL, train) if self.model.faithful else self._encode(inputs_BxL, train)
    real = (inputs_BxL > 0)[..., None]
    return Hidden(mean=jnp.where(real, mean.astype(jnp.float32), 0), cov=jnp.where(real, cov, 1))

  def _encode(self, inputs_BxL: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    streams = self.embedding_mean(inputs_BxL, train), self.embedding_cov(inputs_BxL, train)
    for block in self.blocks:
      streams = block(streams, inputs_BxL > 0, train)
    mean, cov = streams
    if self.model.norm == "post":
      return mean, covariance(cov)
    return self.norm_out_mean(mean), covariance(self.norm_out_cov(cov))

  def _encode_as_published(self, inputs_BxL: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    def embed(embedding: Embedding) -> jax.Array:
      x_BxLxD = self.norm_in(embedding.add_positions(inputs_BxL, scale=1.0))
      return dropout(self, x_BxLxD, self.model.dropout, train)
    dtype = jnp.dtype(self.model.dtype)
    mean, cov = nn.elu(embed(self.embedding_mean)), covariance(embed(self.embedding_cov))
    for block in self.blocks:
      _, cov = block((mean.astype(dtype), cov.astype(dtype)), inputs_BxL > 0, train)
      cov = covariance(cov)
    return mean, cov

  def items(self, numbers: jax.Array) -> Hidden:
    """Returns the items (...) themselves as a hidden state: mean and cov (..., D)."""
    return Hidden(mean=self.embedding_mean.item_table[numbers],
                  cov=covariance(self.embedding_cov.item_table[numbers]))

  def score(self, hidden: Hidden, items: jax.Array) -> jax.Array:
    """Scores chosen items: minus the squared Wasserstein distance of hidden state and item.

    Args:
      hidden: mean and cov (..., D).
      items: int32, (K,) the same candidates for every hidden state, or (..., K) for each its own.

    Returns:
      (..., K) float32, never positive.
    """
    candidates = self.items(items)
    if items.ndim == 1:
      return minus_distances(hidden, candidates.mean, candidates.cov)
    return -wasserstein(hidden.mean[..., None, :], hidden.cov[..., None, :], candidates.mean, candidates.cov)

  def score_all(self, hidden: Hidden, first: int | jax.Array = 0, count: int | None = None) -> jax.Array:
    """Scores `count` consecutive table rows from row `first` on (None: the whole table).

    Args:
      hidden: mean and cov (..., D).
      first: row of the first score; may be traced.
      count: static.

    Returns:
      (..., count) float32, never positive; -inf for row 0 and for rows that only fill the table.
    """
    mean, cov = (slice_rows(table, first, count)
                 for table in (self.embedding_mean.item_table, self.embedding_cov.item_table))
    return hide_other_rows(minus_distances(hidden, mean, covariance(cov)), first, self.num_items)


BACKBONES = {"sasrec": SASRec, "stosa": STOSA}


def build_backbone(config: Any, num_items: int) -> nn.Module:
  """Returns the backbone that a finalized config names, for items 1 to num_items."""
  return BACKBONES[config.model.backbone](config.model, config.data.max_length, num_items)


def attention_dropout(model: Any) -> float:
  """Returns the rate that attention weights are dropped at."""
  return model.dropout if model.attention_dropout is None else model.attention_dropout


def published_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Draws weights as the published STOSA does: normal with mean .01 and deviation .02."""
  return 0.01 + 0.02 * jax.random.normal(key, shape, dtype)


def minus_distances(hidden: Hidden, mean_KxD: jax.Array, cov_KxD: jax.Array) -> jax.Array:
  """Returns (..., K): minus the squared Wasserstein distance of every hidden state (..., D) to K Gaussians."""
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), hidden)
  distances = pairwise_wasserstein(flat.mean, flat.cov, mean_KxD, cov_KxD)
  return -distances.reshape(*hidden.mean.shape[:-1], len(mean_KxD))


def slice_rows(table: jax.Array, first: int | jax.Array, count: int | None) -> jax.Array:
  """Returns `count` rows of a table from row `first` on; all of it where count is None."""
  return table if count is None else jax.lax.dynamic_slice_in_dim(table, first, count)


def hide_other_rows(scores: jax.Array, first: int | jax.Array, num_items: int) -> jax.Array:
  """Sets scores (..., K) of table rows `first` to first + K - 1 to -inf where the row is no item."""
  row = first + jnp.arange(scores.shape[-1])
  return jnp.where(jnp.broadcast_to((row >= 1) & (row <= num_items), scores.shape), scores, -jnp.inf)


# Our names, and those of the published STOSA; Linear weights are (out, in) there, kernels (in, out) here.
TORCH_NETWORK = {
    "embedding_mean/item_table": "item_mean_embeddings.weight",
    "embedding_cov/item_table": "item_cov_embeddings.weight",
    "embedding_mean/position_table": "position_mean_embeddings.weight",
    "embedding_cov/position_table": "position_cov_embeddings.weight",
    "norm_in": "LayerNorm",
}
TORCH_BLOCK = {
    **{f"attention/{role}_{stream}": f"attention.{stream}_{'dense' if role == 'out' else role}"
       for role in ("query", "key", "value", "out") for stream in ("mean", "cov")},
    **{f"feed_forward_{stream}/{ours}": f"{stream}_intermediate.{theirs}"
       for stream in ("mean", "cov") for ours, theirs in (("in", "dense_1"), ("out", "dense_2"))},
    **{f"norm_feed_forward_{stream}": f"{stream}_intermediate.LayerNorm" for stream in ("mean", "cov")},
    "norm_attention": "attention.LayerNorm",
}


def from_torch_stosa(arrays: Mapping[str, np.ndarray], heads: int) -> tuple[STOSA, Any]:
  """Turns the weights of a published STOSA (`DistSAModel` of zfan20/STOSA) into a backbone and its parameters.

  `backbone.apply({"params": params}, inputs_BxL, method="encode")` gives `.mean` and `.cov`, (B, L, D).
  The published trainer adds a last row to the item tables, for a mask that is never trained: cut it off, or it is ranked
  as an item, as it is there. Positions are counted from the end, which is the same for histories padded to the full
  length, as all are there. Dropout is not among the weights: the backbone has none.

  Args:
    arrays: torch's state dict as numpy arrays; width, length, items and layers are read from their shapes.
      `user_margins.weight` is ignored: the published network reads it and does not use it.
    heads: H, which no shape tells.

  Returns:
    backbone: STOSA with `model.faithful`, its item table not padded (`table_multiple` 1).
    params: float32 numpy arrays.

  Raises:
    ValueError: an array is missing, unknown, or of a shape that does not fit the others; heads do not divide the width.
  """
  layers = len({name.split(".")[2] for name in arrays if name.startswith("item_encoder.layer.")})
  names = TORCH_NETWORK | {f"blocks_{i}/{ours}": f"item_encoder.layer.{i}.{theirs}"
                           for i in range(layers) for ours, theirs in TORCH_BLOCK.items()}
  theirs = {}
  for ours, name in names.items():
    match ours.split("/")[-1]:
      case "item_table" | "position_table":
        theirs[ours] = name
      case leaf:
        theirs[f"{ours}/{'scale' if 'norm' in leaf else 'kernel'}"] = f"{name}.weight"
        theirs[f"{ours}/bias"] = f"{name}.bias"
  missing, unknown = set(theirs.values()) - arrays.keys(), arrays.keys() - set(theirs.values()) - {"user_margins.weight"}
  if missing or unknown or not layers:
    raise ValueError(f"these are not the weights of a STOSA (DistSAModel) with {layers} layers: missing "
                     f"{sorted(missing)}, unknown {sorted(unknown)}; names are torch's, item_mean_embeddings.weight")
  rows, width = np.shape(arrays["item_mean_embeddings.weight"])
  config = default()
  config.model.update({"backbone": "stosa", "faithful": True, "refine": "none", "width": width, "heads": heads,
                       "layers": layers, "ffn_width": 4 * width, "activation": "elu", "norm": "post", "dropout": 0.0,
                       "table_multiple": 1})
  config.data.max_length = len(arrays["position_mean_embeddings.weight"])
  backbone = STOSA(finalize(config).model, config.data.max_length, rows - 1)
  params = traverse_util.unflatten_dict({
      ours: np.asarray(arrays[name], np.float32).T if ours.endswith("kernel") else np.asarray(arrays[name], np.float32)
      for ours, name in theirs.items()}, sep="/")
  shapes = jax.eval_shape(backbone.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
  for path, shape in traverse_util.flatten_dict(shapes, sep="/").items():
    found, wanted = np.shape(arrays[theirs[path]]), shape.shape[::-1] if path.endswith("kernel") else shape.shape
    if found != wanted:
      raise ValueError(f"{theirs[path]} is {found}, but a STOSA of {rows} item rows and width {width} has {wanted}")
  return backbone, params


def table_rows(num_items: int, multiple: int) -> int:
  """Returns V: rows for all items and padding, rounded up to a multiple."""
  return -(-(num_items + 1) // multiple) * multiple


def attention_maps(backbone: nn.Module, params: Any, inputs_BxL: jax.Array) -> list[dict[str, jax.Array]]:
  """Reads the attention weights out of a forward pass; nothing is stored in a pass that does not ask for them.

  Returns:
    One dict a layer: "first_order" and "refined", both (B, H, L, L) float32, row = query, column = key.
  """
  _, sown = backbone.apply({"params": params}, inputs_BxL, method="encode", mutable=["intermediates"])
  layers = sown["intermediates"]
  return [{name: maps[0] for name, maps in layers[f"blocks_{layer}"]["attention"]["refinement"].items()}
          for layer in range(len(layers))]
