"""Backbones: item ids -> hidden states -> item scores. A larger score is always better.

The contract, which is all that the rest of the package knows of a backbone:
  encode(inputs_BxL, train, newest) -> Hidden  items(numbers) -> Hidden, the items themselves
  score(hidden, items) -> candidate scores     score_all(hidden) -> scores of all table rows
  catalogue() -> tree of item tables (V, D)    score_rows(hidden, rows) -> scores of any rows, without parameters
  compare_rows(items, rows) -> similarities    num_items: I    vectors_path: of the item vectors in the parameters
Shapes: B batch, L length, D width, H heads.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from awrsr_jax.config import default, finalize
from awrsr_jax.model.hidden import Hidden
from awrsr_jax.model.sasrec import SASRec
from awrsr_jax.model.stosa import STOSA

BACKBONES = {"sasrec": SASRec, "stosa": STOSA}


def build_backbone(config: Any, num_items: int) -> nn.Module:
  """Returns the backbone that a finalized config names, for items 1 to num_items.

  Raises:
    ValueError: fused attention is asked for, and cannot do what the config wants of it; or JAX is set to 64 bits.
  """
  # parameters would be float64, and every good checkpoint would look damaged
  if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError("JAX_ENABLE_X64 (jax_enable_x64) is set, and models and checkpoints here are of 32 bits; unset it")
  backbone = BACKBONES[config.model.backbone](config.model, config.data.max_length, num_items)
  if config.model.attention.implementation == "fused":  # what it cannot do is raised here, before anything is written
    param_shapes(backbone)
  return backbone


def param_shapes(backbone: nn.Module) -> Any:
  """Returns the tree of a backbone's parameters as ShapeDtypeStructs; none of them is made."""
  return jax.eval_shape(backbone.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def in_full_precision(function: Callable) -> Callable:
  """Returns a function to be traced whose products of float32 are float32 on every device.

  What is not said, JAX leaves to the device: GPUs multiply in TF32 and TPUs in bfloat16, both fast and good enough to
  train by, while ranks of close scores would differ from device to device.
  """
  @functools.wraps(function)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    with jax.default_matmul_precision("highest"):
      return function(*args, **kwargs)

  return wrapped


def encode_newest(backbone: nn.Module, params: Any, inputs_BxL: jax.Array) -> Hidden:
  """Returns what the backbone knows after whole histories, (B, D)."""
  hidden: Any = backbone.apply({"params": params}, inputs_BxL, newest=True, method="encode")
  return hidden.newest()


def attention_maps(backbone: nn.Module, params: Any, inputs_BxL: jax.Array) -> list[dict[str, jax.Array]]:
  """Reads the attention weights out of a forward pass; nothing is stored in a pass that does not ask for them.

  Returns:
    One dict a layer: "first_order" and "refined", both (B, H, L, L) float32, row = query, column = key.
  """
  _, sown = backbone.apply({"params": params}, inputs_BxL, method="encode", mutable=["intermediates"])
  layers = sown["intermediates"]
  return [{name: maps[0] for name, maps in layers[f"blocks_{layer}"]["attention"]["refinement"].items()}
          for layer in range(len(layers))]


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
  The published trainer adds a last row to the item tables, for a mask that is never trained: cut it off, or it is
  ranked as an item, as it is there. Positions are counted from the end, which is the same for histories padded to the
  full length, as all are there. Dropout is not among the weights: the backbone has none.

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
  known = set(theirs.values())
  missing, unknown = known - arrays.keys(), arrays.keys() - known - {"user_margins.weight"}
  if missing or unknown or not layers:
    raise ValueError(f"these are not the weights of a STOSA (DistSAModel) with {layers} layers: missing "
                     f"{sorted(missing)}, unknown {sorted(unknown)}; names are torch's, item_mean_embeddings.weight")
  match np.shape(arrays["item_mean_embeddings.weight"]):
    case rows, width:
      pass
    case shape:
      raise ValueError(f"item_mean_embeddings.weight is {shape}, not (items, width)")
  config = default()
  config.model.update({"backbone": "stosa", "faithful": True, "refine": "none", "width": width, "heads": heads,
                       "layers": layers, "ffn_width": 4 * width, "activation": "elu", "norm": "post", "dropout": 0.0,
                       "table_multiple": 1})
  config.data.max_length = len(arrays["position_mean_embeddings.weight"])
  backbone = STOSA(finalize(config).model, config.data.max_length, rows - 1)
  params = traverse_util.unflatten_dict({
      ours: np.asarray(arrays[name], np.float32).T if ours.endswith("kernel") else np.asarray(arrays[name], np.float32)
      for ours, name in theirs.items()}, sep="/")
  for path, shape in traverse_util.flatten_dict(param_shapes(backbone), sep="/").items():
    found, wanted = np.shape(arrays[theirs[path]]), shape.shape[::-1] if path.endswith("kernel") else shape.shape
    if found != wanted:
      raise ValueError(f"{theirs[path]} is {found}, but a STOSA of {rows} item rows and width {width} has {wanted}")
  return backbone, params
