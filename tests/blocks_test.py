"""The parts of a backbone against loops in float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_test import attend_by_loops, mask_by_loops, scores_by_loops
from refine_test import HEADS, N, model_of, random_params, refine_by_loops

from awrsr_jax.model.blocks import Block, Embedding, FeedForward, SelfAttention
from awrsr_jax.model.refine import build_refinement

WIDTH, FFN = 8, 6
INPUTS = np.array([[3, 1, 4, 1, 5], [0, 0, 2, 6, 5], [0, 0, 0, 0, 0]], np.int32)
REAL = INPUTS > 0


# Oracles of one sequence, float64; D in, O out.


def dense_by_loops(params: Mapping[str, Any], x_LxD: np.ndarray) -> np.ndarray:
  kernel, bias = np.float64(params["kernel"]), np.float64(params["bias"])
  out = np.zeros((len(x_LxD), len(bias)))
  for i, o in np.ndindex(out.shape):
    out[i, o] = bias[o] + sum(x_LxD[i, d] * kernel[d, o] for d in range(x_LxD.shape[1]))
  return out


def norm_by_loops(params: Mapping[str, Any], x_LxD: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
  out = np.zeros(x_LxD.shape)
  for i, row in enumerate(x_LxD):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    for d, value in enumerate(row):
      out[i, d] = (value - mean) / (variance + epsilon) ** 0.5 * params["scale"][d] + params["bias"][d]
  return out


def feed_forward_by_loops(params: Mapping[str, Any], x_LxD: np.ndarray, activation: str) -> np.ndarray:
  hidden = dense_by_loops(params["in"], x_LxD)
  if activation == "swiglu":
    return dense_by_loops(params["out"], hidden / (1 + np.exp(-hidden)) * dense_by_loops(params["gate"], x_LxD))
  for index, x in np.ndenumerate(hidden):
    cube = 0.79788456080 * (x + 0.044715 * x ** 3)  # sqrt(2 / pi)
    hidden[index] = {"relu": max(x, 0), "gelu": 0.5 * x * (1 + np.tanh(cube)), "elu": x if x > 0 else np.exp(x) - 1}[
        activation]
  return dense_by_loops(params["out"], hidden)


def attention_by_loops(params: Mapping[str, Any], model: Any, query_LxD: np.ndarray, x_LxD: np.ndarray,
                       real_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (L, D) and the refined weights (H, L, L)."""
  split = lambda x: x.reshape(len(x), model.heads, -1)  # noqa: E731
  q, k, v = (split(dense_by_loops(params[name], x)) for name, x in (
      ("query", query_LxD), ("key", x_LxD), ("value", x_LxD)))
  mask = mask_by_loops(real_L)
  weights = np.stack([refine_by_loops(model, params.get("refinement", {}), h, scores, mask)
                      for h, scores in enumerate(scores_by_loops(q, k))])
  return dense_by_loops(params["out"], attend_by_loops(weights, v).reshape(x_LxD.shape)), weights


def block_by_loops(params: Mapping[str, Any], model: Any, x: np.ndarray,
                   real_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (L, D) and the refined weights (H, L, L)."""
  norm_1, norm_2 = (lambda x, name=name: norm_by_loops(params[name], x) for name in (
      "norm_attention", "norm_feed_forward"))
  attend = lambda query, x: attention_by_loops(params["attention"], model, query, x, real_L)  # noqa: E731
  feed = lambda x: feed_forward_by_loops(params["feed_forward"], x, model.activation)  # noqa: E731

  def add(to, branch, name):
    return to + branch * (1 / (1 + np.exp(-dense_by_loops(params[f"gate_{name}"], to))) if model.branch_gates else 1)

  if model.norm == "pre":
    out, weights = attend(norm_1(x), norm_1(x))
    x = add(x, out, "attention")
    x = add(x, feed(norm_2(x)), "feed_forward")
  elif model.norm == "post":
    out, weights = attend(x, x)
    x = norm_1(add(x, out, "attention"))
    x = norm_2(add(x, feed(x), "feed_forward"))
  else:
    out, weights = attend(norm_1(x), x)
    x = add(norm_1(x), out, "attention")
    x = add(norm_2(x), feed(norm_2(x)), "feed_forward")
  return x * real_L[:, None], weights


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("length", [5, 3])
def test_embedding_is_scaled_items_plus_positions_from_the_end_and_zero_where_padded(length):
  inputs = INPUTS[:, -length:]
  embedding = Embedding(rows=8, max_length=N, width=WIDTH, dropout=0.5, dtype=jnp.float32, scale=3.0)
  params = random_params(lambda key, x: embedding.init(key, x, False), inputs)
  found = embedding.apply({"params": params}, inputs, False)
  for b, column in np.ndindex(inputs.shape):
    item, from_end = inputs[b, column], length - column
    wanted = params["item_table"][item] * 3 + params["position_table"][N - from_end]
    np.testing.assert_allclose(found[b, column], wanted * (item > 0), atol=1e-6)


def test_embedding_drops_entries_in_training_only():
  embedding = Embedding(rows=8, max_length=N, width=WIDTH, dropout=0.5, dtype=jnp.bfloat16, scale=3.0)
  params = random_params(lambda key, x: embedding.init(key, x, False), INPUTS)
  out = np.asarray(embedding.apply({"params": params}, INPUTS, True, rngs={"dropout": jax.random.key(0)}))
  assert out.dtype == jnp.bfloat16
  assert 0.2 < np.mean(out[REAL] == 0) < 0.8 and not np.any(out[~REAL])
  assert np.all(np.asarray(embedding.apply({"params": params}, INPUTS, False))[REAL] != 0)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("variant", ["none", "value"])
def test_self_attention_agrees_with_loops_and_takes_queries_from_the_first_input(variant, implementation):
  model = model_of(variant)
  attention = SelfAttention(HEADS, 0.5, jnp.float32, build_refinement(model, N), implementation)
  query, x = draw(3, 3, 5, WIDTH), draw(4, 3, 5, WIDTH)
  params = random_params(lambda key, *args: attention.init(key, *args, False), query, x, REAL, scale=0.5)
  found = attention.apply({"params": params}, query, x, REAL, False)
  for b in range(3):
    wanted, _ = attention_by_loops(params, model, query[b], x[b], REAL[b])
    np.testing.assert_allclose(found[b], wanted, atol=1e-5)


def test_self_attention_drops_weights_and_not_values():
  """With one real key and values of one, the output is 0 or 1 / (1 - rate) in a whole head, never a part of it."""
  attention = SelfAttention(HEADS, 0.5, jnp.float32, build_refinement(model_of("none"), N), "auto")
  x, one_key = draw(5, 64, 1, WIDTH), np.ones((64, 1), bool)
  params = random_params(lambda key, *args: attention.init(key, *args, False), x, x, one_key)
  eye, zero = np.eye(WIDTH, dtype=np.float32), np.zeros(WIDTH, np.float32)
  params = {**params, "value": {"kernel": 0 * eye, "bias": zero + 1}, "out": {"kernel": eye, "bias": zero}}
  out = np.asarray(attention.apply({"params": params}, x, x, one_key, True, rngs={"dropout": jax.random.key(0)}))
  heads = out.reshape(64, HEADS, -1)
  np.testing.assert_array_equal(heads, np.broadcast_to(heads[..., :1], heads.shape))
  assert set(np.unique(heads)) == {0, 2} and 0.3 < np.mean(heads == 0) < 0.7


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu", "swiglu"])
def test_feed_forward_agrees_with_loops(activation):
  feed_forward = FeedForward(FFN, activation, 0.5, jnp.float32)
  x = draw(6, 3, 5, WIDTH)
  params = random_params(lambda key, x: feed_forward.init(key, x, False), x)
  found = feed_forward.apply({"params": params}, x, False)
  for b in range(3):
    np.testing.assert_allclose(found[b], feed_forward_by_loops(params, x[b], activation), atol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_feed_forward_drops_at_its_end_and_inside_where_it_is_told_to(inside):
  """With both layers the identity, what is dropped inside stays 0 at the end."""
  feed_forward = FeedForward(WIDTH, "relu", 0.5, jnp.float32, dropout_inside=inside)
  eye = {"kernel": np.eye(WIDTH, dtype=np.float32), "bias": np.zeros(WIDTH, np.float32)}
  out = np.asarray(feed_forward.apply({"params": {"in": eye, "out": eye}}, np.ones((64, 8, WIDTH), np.float32), True,
                                      rngs={"dropout": jax.random.key(0)}))
  np.testing.assert_allclose(np.mean(out == 0), 0.75 if inside else 0.5, atol=0.05)
  assert set(np.unique(out)) == ({0, 4} if inside else {0, 2})


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post", "query"])
def test_block_agrees_with_loops_and_is_zero_where_padded(norm, gates):
  model = model_of("value", norm=norm, branch_gates=gates)
  block = Block(SelfAttention(HEADS, 0.5, jnp.float32, build_refinement(model, N), "auto"),
                FeedForward(FFN, "relu", 0.5, jnp.float32), norm, gates)
  x = draw(7, 3, 5, WIDTH)
  params = random_params(lambda key, *args: block.init(key, *args, False), x, REAL, scale=0.5)
  found = np.asarray(block.apply({"params": params}, x, REAL, False))
  for b in range(3):
    np.testing.assert_allclose(found[b], block_by_loops(params, model, x[b], REAL[b])[0], atol=1e-5)
  assert not np.any(found[~REAL])


@pytest.mark.parametrize("norm", ["pre", "post", "query"])
def test_block_keeps_bfloat16_and_its_parameters_float32(norm):
  block = Block(SelfAttention(HEADS, 0.0, jnp.bfloat16, build_refinement(model_of("none"), N), "auto"),
                FeedForward(FFN, "swiglu", 0.0, jnp.bfloat16), norm, True)
  x = jnp.asarray(draw(8, 3, 5, WIDTH), jnp.bfloat16)
  init = lambda key, x, real: block.init(key, x, real, False)  # noqa: E731
  params = random_params(init, x, REAL, scale=0.5)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
  assert jax.eval_shape(lambda x: block.apply({"params": params}, x, REAL, False), x).dtype == jnp.bfloat16
