"""Attention in blocks against attention with its weights in memory: the same values and gradients, in linear memory."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refine_test import VARIANTS, model_of, random_params

from awrsr_jax.config import default, finalize
from awrsr_jax.model import attention
from awrsr_jax.model.backbones import build_backbone, param_shapes
from awrsr_jax.model.blocks import SelfAttention
from awrsr_jax.model.refine import build_refinement
from awrsr_jax.model.stosa import GaussianSelfAttention

BATCH, LENGTH, N, WIDTH = 3, 19, 21, 8
REAL = np.arange(LENGTH)[None] >= np.array([0, 12, LENGTH])[:, None]  # the last row is all padding
MIXES = {"value", "value_shared", "value_gated", "value_wasserstein", "additive_on_weights",
         "additive_on_weights_wasserstein", "value_gated_sink", "additive_on_weights_sink", "value_lag",
         "additive_on_weights_lag", "value_gated_lag_sink"}
# Each once, in the second order where that runs more than the first: what each order does, and what it hands on.
SECOND = ("simple", "value", "value_gated", "additive_on_scores", "additive_on_weights", "value_gated_sink",
          "additive_on_scores_sink", "simple_lag", "additive_on_weights_lag")
CASES = [("sasrec", variant, 2 if variant in SECOND else 1) for variant in VARIANTS if variant != "value_projection"]
CASES += [("stosa", variant, 1) for variant in ("none", "simple", "additive_on_scores", "stochastic_lag_shared")]
CASES += [("stosa", "stochastic", 2), ("stosa", "stochastic_sink", 2)]
CASES += [("published", "none", 1), ("published", "simple", 1)]
BLOCKS = [(7, 1), (10, 8), (4, 2), (64, 8)]  # rows a block, programs: scanned, unrolled, both, a single block
OTHER_BLOCKS = {("sasrec", "value", 2): BLOCKS[1], ("sasrec", "additive_on_weights_lag", 2): BLOCKS[1],
                ("stosa", "stochastic", 2): BLOCKS[1], ("sasrec", "value_gated_lag_sink", 1): BLOCKS[2]}


def attend(kind: str, variant: str, order: int, implementation: str, dtype: Any, length: int = LENGTH,
           n: int = N) -> Any:
  """Returns (params, inputs) -> outputs of one attention in training, and how to initialise it."""
  refinement = build_refinement(model_of(variant, order), n)
  if kind == "sasrec":
    module = SelfAttention(2, 0.3, dtype, refinement, implementation)
    call = lambda x, real, train: module_call(x[0], x[0], real, train)  # noqa: E731
  else:
    module = GaussianSelfAttention(2, 0.3, 0.0, dtype, refinement, implementation, faithful=kind == "published")
    call = lambda x, real, train: module_call(x, x, real, train)  # noqa: E731
  real = REAL if length == LENGTH else np.ones((BATCH, length), bool)
  def module_call(*args: Any) -> Any:
    return module, args
  def apply(params: Any, x: Any) -> list[jax.Array]:
    bound, args = call(x, real, True)
    return jax.tree.leaves(bound.apply({"params": params}, *args, rngs={"dropout": jax.random.key(5)}))
  def init(key: jax.Array) -> Any:
    bound, args = call(tuple(jnp.zeros((BATCH, length, WIDTH), dtype) for _ in range(2)), real, False)
    return bound.init(key, *args)
  return apply, init


def value_and_grad(kind: str, variant: str, order: int, implementation: str,
                   dtype: Any = jnp.float32) -> tuple[Any, Any]:
  apply, init = attend(kind, variant, order, implementation, dtype)
  params = random_params(init, scale=0.7)
  rng = np.random.default_rng(1)
  x = tuple(jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype) for _ in range(2))
  def loss(params: Any, x: Any) -> tuple[jax.Array, Any]:
    outs = apply(params, x)
    real = REAL[..., None]
    return sum(jnp.sum(jnp.where(real, jnp.sin(out.astype(jnp.float32)), 0)) for out in outs), outs
  grads, outs = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
  return outs, grads


def largest_difference(found: Any, wanted: Any) -> float:
  """Returns the largest difference, as a part of the largest entry of all."""
  found, wanted = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (found, wanted))
  assert len(found) == len(wanted)
  size = max(np.max(np.abs(leaf)) for leaf in wanted)
  return max(np.max(np.abs(a - b)) for a, b in zip(found, wanted, strict=True)) / size


@pytest.mark.parametrize("kind, variant", [("sasrec", "value"), ("sasrec", "value_wasserstein"),
                                           ("sasrec", "stochastic"), ("stosa", "simple"), ("stosa", "stochastic")])
def test_scores_have_the_precision_of_the_reference(kind, variant):
  """No accelerator takes several passes for a product of which the reference asks for one, or the other way round."""
  found = []
  for implementation in ("reference", "fused"):
    apply, init = attend(kind, variant, 1, implementation, jnp.float32)
    x = tuple(jnp.zeros((BATCH, LENGTH, WIDTH)) for _ in range(2))
    found.append(jax.jit(apply).lower(random_params(init), x).as_text().count("precision = [HIGHEST, HIGHEST]"))
  assert found[0] == found[1] == (kind == "stosa") + (variant in ("value_wasserstein", "stochastic"))


@pytest.mark.parametrize("kind, variant, order", CASES)
def test_blocks_give_the_values_and_gradients_of_the_reference(kind, variant, order, monkeypatch):
  block, stairs = OTHER_BLOCKS.get((kind, variant, order), BLOCKS[0])
  monkeypatch.setattr(attention, "BLOCK", block)
  monkeypatch.setattr(attention, "STAIRS", stairs)
  wanted = value_and_grad(kind, variant, order, "reference")
  found = value_and_grad(kind, variant, order, "fused")
  assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(wanted[1]))
  assert largest_difference(found[0], wanted[0]) < 1e-5
  assert largest_difference(found[1], wanted[1]) < 1e-5
  if kind == "sasrec":  # without any key the values add up to 0
    dense = found[0][0][2]
    np.testing.assert_array_equal(dense, np.broadcast_to(dense[:1], dense.shape))


@pytest.mark.parametrize("kind", ["sasrec", "stosa"])
def test_blocks_give_the_reference_in_bfloat16_to_a_hundredth(kind, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", 8)
  wanted, found = (value_and_grad(kind, "simple", 1, implementation, jnp.bfloat16)
                   for implementation in ("reference", "fused"))
  assert largest_difference(found[0], wanted[0]) < 0.01
  assert largest_difference(found[1], wanted[1]) < 0.02


@pytest.mark.parametrize("block, stairs", BLOCKS)
def test_blocks_of_any_size_give_plain_attention(block, stairs, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK", block)
  monkeypatch.setattr(attention, "STAIRS", stairs)
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(2, BATCH, LENGTH, 4)), jnp.float32) for _ in range(2))
  seen = lambda weights, rows: jnp.pad(weights, [(0, 0)] * 3 + [(0, LENGTH - weights.shape[-1])])  # noqa: E731
  weights = attention.attend_in_blocks(q, k, REAL, seen)
  scores = jnp.einsum("hbid,hbjd->bhij", q, k)
  wanted = attention.masked_softmax(scores, attention.causal_mask(jnp.asarray(REAL)))
  np.testing.assert_allclose(np.moveaxis(np.asarray(weights), 0, 1), wanted, atol=1e-6)
  assert np.all(np.asarray(weights)[np.broadcast_to(np.moveaxis(np.asarray(wanted), 0, 1) == 0, weights.shape)] == 0)


def test_the_memory_of_blocks_grows_with_the_length_and_that_of_the_reference_with_its_square():
  def temporaries(implementation: str, length: int) -> int:
    apply, init = attend("sasrec", "value", 1, implementation, jnp.float32, length, length)
    params = jax.eval_shape(init, jax.random.key(0))["params"]
    x = (jax.ShapeDtypeStruct((BATCH, length, WIDTH), jnp.float32),) * 2
    grad = jax.jit(jax.grad(lambda params, x: sum(jnp.sum(out) for out in apply(params, x))))
    return grad.lower(params, x).compile().memory_analysis().temp_size_in_bytes
  fused, reference = (temporaries(implementation, 2048) / temporaries(implementation, 1024)
                      for implementation in ("fused", "reference"))
  assert fused < 2.4 and reference > 3.5


@pytest.mark.parametrize("backbone", ["sasrec", "stosa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", [1, 2])
def test_blocks_are_refused_where_they_cannot_be(variant, backbone, order):
  assert bool(build_refinement(model_of(variant, order), N).refuses_blocks(squares=backbone == "stosa")) == (
      variant == "value_projection" or (backbone == "stosa" and variant in MIXES)
      or (order == 2 and variant in ("value_lag", "value_gated_lag_sink")))


@pytest.mark.parametrize("backbone, variant, order, reason", [
    ("sasrec", "value_projection", 1, "a value projection"), ("sasrec", "value_lag", 2, "slots that each row"),
    ("stosa", "value", 1, "the square"), ("stosa", "additive_on_weights", 1, "the square"),
    ("sasrec", "value", 2, ""), ("sasrec", "value_lag", 1, ""), ("stosa", "additive_on_scores", 2, "")])
def test_a_backbone_refuses_to_be_fused_where_it_cannot_and_auto_takes_the_reference(backbone, variant, order, reason):
  config = default()
  config.model.update({"backbone": backbone, **VARIANTS[variant]})
  config.model.attention.implementation, config.model.awr.order = "fused", order
  refused = pytest.raises(ValueError, match=f"implementation=fused cannot .* say: {reason}.*; use auto or reference")
  with refused if reason else contextlib.nullcontext():
    build_backbone(finalize(config), 10)
  config.model.attention.implementation = "auto"
  backbone = build_backbone(finalize(config), 10)
  param_shapes(backbone)
