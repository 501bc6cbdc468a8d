"""Why a history gets its recommendations: attention weights before and after refinement, and the share of each item.

Shapes: H heads, L items of the history, k recommendations, C histories at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from awrsr_jax.model.backbones import attention_maps, encode_newest, in_full_precision

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


def make_layers_step(backbone: nn.Module) -> Callable:
  """Returns the jitted (params, inputs_1xL) -> the attention maps of all layers."""
  return jax.jit(in_full_precision(functools.partial(attention_maps, backbone)))


def make_log_p_step(backbone: nn.Module) -> Callable:
  """Returns the jitted (params, inputs_CxL, items_k) -> (C, k) log p(item | history), over the whole catalogue."""
  def log_p(params: Any, inputs_CxL: jax.Array, items_k: jax.Array) -> jax.Array:
    hidden = encode_newest(backbone, params, inputs_CxL)
    scores: Any = backbone.apply({"params": params}, hidden, method="score_all")
    return jax.nn.log_softmax(scores)[:, items_k]
  return jax.jit(in_full_precision(log_p))


def read_layers(step: Callable, params: Any, numbers_L: np.ndarray, padded: int) -> list[Layer]:
  """Returns the attention weights of all layers for one history.

  Args:
    step: from make_layers_step.
    params: of the backbone.
    numbers_L: item numbers.
    padded: the length that the step is compiled for.
  """
  length = len(numbers_L)
  maps = jax.device_get(step(params, np.pad(numbers_L, (padded - length, 0))[None]))
  return [Layer(*(layer[name][0, :, -length:, -length:] for name in ("first_order", "refined"))) for layer in maps]


def measure_effects(step: Callable, params: Any, numbers_L: np.ndarray, items_k: np.ndarray, num_items: int,
                    padded: int) -> np.ndarray:
  """Returns (k, L) float32: what each item of a history did for each recommended item.

  We define: log p(item | history) - log p(item | history without that one), p the softmax of the scores over the
  catalogue. An empty history knows nothing: there p = 1 / I. Positive: the recommendation would be weaker without it.

  Args:
    step: from make_log_p_step.
    params: of the backbone.
    numbers_L, items_k: item numbers of the history and of the recommendations.
    num_items: I.
    padded: the length that the step is compiled for.
  """
  length = len(numbers_L)
  histories = [numbers_L, *(np.delete(numbers_L, at) for at in range(length))]
  rows = np.stack([np.pad(numbers, (padded - len(numbers), 0)) for numbers in histories])
  rows = np.pad(rows, ((0, -len(rows) % CHUNK), (0, 0)))
  found = np.concatenate([step(params, rows[first:first + CHUNK], items_k) for first in range(0, len(rows), CHUNK)])
  without = found[1:1 + length] if length > 1 else np.full((1, len(items_k)), -np.log(num_items), np.float32)
  return (found[0] - without).T


def share(effects_kxL: np.ndarray) -> np.ndarray:
  """Returns (k, L) float32: the positive part of the effects, each row divided by its sum; 0 where there is none."""
  positive = np.maximum(effects_kxL, 0)
  return positive / np.maximum(positive.sum(axis=1, keepdims=True), 1e-12)
