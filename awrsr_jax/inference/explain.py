"""Why a history gets its recommendations: attention weights before and after refinement, and the share of each item.

Shapes: H heads, L items of the history, k recommendations, C histories at a time.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from awrsr_jax.model.backbones import attention_maps

CHUNK = 16  # histories scored against the whole catalogue at a time


@dataclasses.dataclass(frozen=True)
class Layer:
  """Attention weights of one layer; row = query, column = key, both oldest item first.

  Attributes:
    first_order: (H, L, L) float32, the weights before refinement.
    refined: (H, L, L) float32, the weights that the layer uses.
  """

  first_order: np.ndarray
  refined: np.ndarray

  @property
  def change(self) -> np.ndarray:
    """(H, L, L): what refinement added to each weight."""
    return self.refined - self.first_order


def read_layers(backbone: nn.Module, params: Any, numbers_L: np.ndarray) -> list[Layer]:
  """Returns the attention weights of all layers for one history of item numbers."""
  maps = jax.jit(lambda params, inputs: attention_maps(backbone, params, inputs))(params, numbers_L[None])
  return [Layer(np.asarray(layer["first_order"][0]), np.asarray(layer["refined"][0])) for layer in maps]


def measure_effects(backbone: nn.Module, params: Any, numbers_L: np.ndarray, items_k: np.ndarray) -> np.ndarray:
  """Returns (k, L) float32: what each item of a history did for each recommended item.

  We define: log p(item | history) - log p(item | history without that one), p the softmax of the scores over the
  catalogue. An empty history knows nothing: there p = 1 / I. Positive: the recommendation would be weaker without it.
  """
  length = len(numbers_L)
  kept_LxL = ~np.eye(length, dtype=bool)
  without = [numbers_L[kept] for kept in kept_LxL] if length > 1 else []
  rows = np.stack([np.pad(row, (length - len(row), 0)) for row in [numbers_L, *without]])

  @jax.jit
  def log_p(params: Any, inputs_CxL: jax.Array) -> jax.Array:
    hidden = backbone.apply({"params": params}, inputs_CxL, newest=True, method="encode").newest()
    scores = backbone.apply({"params": params}, hidden, method="score_all")
    return jax.nn.log_softmax(scores)[:, items_k]

  padded = np.pad(rows, ((0, -len(rows) % CHUNK if len(rows) > CHUNK else 0), (0, 0)))
  found = np.concatenate([np.asarray(log_p(params, padded[first:first + CHUNK]))
                          for first in range(0, len(padded), CHUNK)])[:len(rows)]
  without_k = found[1:] if length > 1 else np.full((1, len(items_k)), -np.log(backbone.num_items), np.float32)
  return (found[0] - without_k).T


def share(effects_kxL: np.ndarray) -> np.ndarray:
  """Returns (k, L) float32: the positive part of the effects, each row divided by its sum; 0 where there is none."""
  positive = np.maximum(effects_kxL, 0)
  return positive / np.maximum(positive.sum(axis=1, keepdims=True), 1e-12)
