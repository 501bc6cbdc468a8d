"""STOSA against loops in float64, against the published network, and what its covariances promise.

Shapes: B batch, L length, n longest length, D width, H heads, V rows of the item table.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_test import attend_by_loops, mask_by_loops
from backbones_test import EVERY, IN_EVERY_NORM, INPUTS, ITEMS, REAL, ROWS, WIDTH, N, build, join, scored
from blocks_test import dense_by_loops, feed_forward_by_loops, norm_by_loops
from refine_test import refine_by_loops

from awrsr_jax.model import losses
from awrsr_jax.model.backbones import attention_maps, from_torch_stosa
from awrsr_jax.model.hidden import Hidden
from awrsr_jax.model.stosa import STOSA

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "golden", "stosa_one_layer.npz")
Streams = tuple[np.ndarray, np.ndarray]  # of one sequence: means, covariances, both (L, D), float64


def elu_by_loops(x: np.ndarray) -> np.ndarray:
  out = np.array(x, np.float64)
  for index, value in np.ndenumerate(out):
    out[index] = value if value > 0 else np.exp(value) - 1
  return out


def distance_by_loops(mean_p: np.ndarray, cov_p: np.ndarray, mean_q: np.ndarray, cov_q: np.ndarray) -> float:
  total = 0.0
  for d in range(len(mean_p)):
    total += (np.float64(mean_p[d]) - mean_q[d]) ** 2 + (np.float64(cov_p[d]) ** 0.5 - np.float64(cov_q[d]) ** 0.5) ** 2
  return total


def attention_by_loops(params: Mapping[str, Any], model: Any, query: Streams, x: Streams,
                       real_L: np.ndarray) -> tuple[Streams, np.ndarray]:
  """Returns both streams and the refined weights (H, L, L)."""
  length, heads = len(real_L), model.heads
  split = lambda x: x.reshape(length, heads, -1)  # noqa: E731
  means = {role: split(dense_by_loops(params[f"{role}_mean"], y[0]))
           for role, y in (("query", query), ("key", x), ("value", x))}
  covs = {role: split(elu_by_loops(dense_by_loops(params[f"{role}_cov"], y[1])) + 1)
          for role, y in (("query", query), ("key", x), ("value", x))}
  scores = np.zeros((heads, length, length))
  for h, i, j in np.ndindex(scores.shape):
    distance = distance_by_loops(means["query"][i, h], covs["query"][i, h], means["key"][j, h], covs["key"][j, h])
    scores[h, i, j] = -distance / (WIDTH // heads) ** 0.5
  weights = np.stack([refine_by_loops(model, params.get("refinement", {}), h, scores[h], mask_by_loops(real_L))
                      for h in range(heads)])
  return (dense_by_loops(params["out_mean"], attend_by_loops(weights, means["value"]).reshape(length, -1)),
          dense_by_loops(params["out_cov"], attend_by_loops(weights ** 2, covs["value"]).reshape(length, -1))), weights


def block_by_loops(params: Mapping[str, Any], model: Any, x: Streams,
                   real_L: np.ndarray) -> tuple[Streams, np.ndarray]:
  """Returns both streams and the refined weights (H, L, L)."""
  epsilon = 1e-12 if model.faithful else 1e-6
  def norm(name: str, x: Streams) -> Streams:
    return tuple(norm_by_loops(params[name if name in params else f"{name}_{stream}"], value, epsilon)
                 for stream, value in zip(("mean", "cov"), x, strict=True))
  feed = lambda x: tuple(feed_forward_by_loops(params[f"feed_forward_{stream}"], value, model.activation)  # noqa: E731
                         for stream, value in zip(("mean", "cov"), x, strict=True))
  add = lambda x, y: (x[0] + y[0], x[1] + y[1])  # noqa: E731
  attend = lambda query, x: attention_by_loops(params["attention"], model, query, x, real_L)  # noqa: E731
  first, second = functools.partial(norm, "norm_attention"), functools.partial(norm, "norm_feed_forward")
  if model.norm == "pre":
    out, weights = attend(first(x), first(x))
    x = add(x, out)
    return add(x, feed(second(x))), weights
  if model.norm == "post":
    out, weights = attend(x, x)
    x = first(add(x, out))
    return second(add(x, feed(x))), weights
  out, weights = attend(first(x), x)
  x = add(first(x), out)
  return add(second(x), feed(second(x))), weights


def encode_by_loops(backbone: STOSA, params: Any, inputs_L: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns mean and covariance (L, 2 D) of one history, and the refined weights (H, L, L) of every layer."""
  model, length, real_L, maps = backbone.model, len(inputs_L), inputs_L > 0, []
  def embed(stream: str) -> np.ndarray:
    tables, x = params[f"embedding_{stream}"], np.zeros((length, WIDTH))
    for column, item in enumerate(inputs_L):
      x[column] = np.float64(tables["item_table"][item]) + tables["position_table"][N - length + column]
    norm, epsilon = (params["norm_in"], 1e-12) if model.faithful else (tables["norm"], 1e-6)
    x = norm_by_loops(norm, x, epsilon) * real_L[:, None]
    return elu_by_loops(x) if model.faithful else x
  x = embed("mean"), embed("cov") + (1 if model.faithful else 0)
  for layer in range(model.layers):
    out, weights = block_by_loops(params[f"blocks_{layer}"], model, x, real_L)
    x = (x[0], elu_by_loops(out[1]) + 1) if model.faithful else out
    maps.append(weights)
  if not model.faithful and model.norm != "post":
    x = norm_by_loops(params["norm_out_mean"], x[0]), norm_by_loops(params["norm_out_cov"], x[1])
  return np.concatenate([x[0], x[1] if model.faithful else elu_by_loops(x[1]) + 1], axis=1), maps


def encode(backbone: STOSA, params: Any, inputs: np.ndarray, **options: Any) -> Hidden:
  return backbone.apply({"params": params}, inputs, method="encode", **options)


@pytest.mark.parametrize("variant, order, norm, kind", [
    *(case for case in sorted({*EVERY, *IN_EVERY_NORM}) if case[-1] != "sasrec"),
    ("stochastic_sink", 2, "pre", "stosa"), ("stochastic_lag_shared", 2, "post", "published")])
def test_forward_pass_agrees_with_loops(variant, order, norm, kind):
  backbone, params = build(variant, order, norm, kind, layers=2)
  found, maps = np.asarray(join(encode(backbone, params, INPUTS))), attention_maps(backbone, params, INPUTS)
  for b in range(2):
    wanted, wanted_maps = encode_by_loops(backbone, params, INPUTS[b])
    np.testing.assert_allclose(found[b][REAL[b]], wanted[REAL[b]], atol=1e-5)
    for layer in range(2):
      np.testing.assert_allclose(maps[layer]["refined"][b][:, REAL[b]], wanted_maps[layer][:, REAL[b]], atol=1e-5)


@pytest.mark.parametrize("kind", ["stosa", "published"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_are_float32_gaussians_and_standard_ones_where_padded(kind, dtype):
  backbone, params = build("value", 1, "pre", kind, dtype=dtype)
  hidden = encode(backbone, params, INPUTS)
  assert hidden.mean.dtype == hidden.cov.dtype == jnp.float32
  assert np.min(hidden.cov) > 0 and np.ptp(np.asarray(hidden.cov)[REAL]) > 0.1
  assert not np.any(hidden.mean[~REAL]) and np.all(np.asarray(hidden.cov)[~REAL] == 1)


def test_the_published_network_loses_the_mean_of_every_block_and_ours_does_not():
  for kind, moves in (("published", False), ("stosa", True)):
    backbone, params = build("none", 1, "post", kind)
    feed_forward = jax.tree.map(lambda x: x + 1, params["blocks_1"]["feed_forward_mean"])
    block = params["blocks_1"] | {"feed_forward_mean": feed_forward}
    before, after = encode(backbone, params, INPUTS), encode(backbone, params | {"blocks_1": block}, INPUTS)
    assert np.any(before.mean != after.mean) == moves


@pytest.mark.parametrize("kind", ["stosa", "published"])
def test_weights_start_with_mean_01_and_deviation_02(kind):
  backbone, _ = build("none", 1, "post", kind, width=64, ffn_width=256)
  params = backbone.init(jax.random.key(0), INPUTS)["params"]
  kernels = np.concatenate([np.ravel(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
                            if path[-1].key in ("kernel", "item_table", "position_table")])
  assert len(kernels) > 1e5
  np.testing.assert_allclose([np.mean(kernels), np.std(kernels)], [0.01, 0.02], rtol=0.02)


@pytest.mark.parametrize("kind, scale", [("stosa", 1.0), ("published", 2.0)])
def test_dropped_weights_keep_the_mean_of_the_covariance_and_published_ones_do_not(kind, scale):
  """One head, one key a row: the weight is 1, and its square is summed over the values' covariance."""
  backbone, params = build("none", 1, "post", kind, layers=1, heads=1, dropout=0.0, attention__dropout=0.5)
  inputs = np.tile(np.array([[0, 0, 0, 0, 3]], np.int32), (4096, 1))
  _, kept = backbone.apply({"params": params}, inputs, True, method="encode", rngs={"dropout": jax.random.key(0)},
                           capture_intermediates=True)
  read = lambda tree: np.asarray(tree["intermediates"]["blocks_0"]["attention"]["out_cov"]["__call__"][0])  # noqa: E731
  _, plain = backbone.apply({"params": params}, inputs[:1], method="encode", capture_intermediates=True)
  bias = params["blocks_0"]["attention"]["out_cov"]["bias"]
  found, wanted = np.mean(read(kept)[:, -1], axis=0) - bias, read(plain)[0, -1] - bias
  np.testing.assert_allclose(found, wanted * scale, rtol=0.1)


@pytest.mark.parametrize("kind", ["stosa", "published"])
def test_dropout_acts_on_inputs_and_on_what_attention_and_feed_forward_give_and_nowhere_else(kind):
  backbone, params = build("none", 1, "post", kind, layers=1, dropout=0.5, attention__dropout=0.0)
  inputs = np.tile(INPUTS[:1], (64, 1))
  _, kept = backbone.apply({"params": params}, inputs, True, method="encode", rngs={"dropout": jax.random.key(0)},
                           capture_intermediates=True)
  block = kept["intermediates"]["blocks_0"]
  outputs = [kept["intermediates"][f"embedding_{stream}"] for stream in ("mean", "cov")]
  outputs += [block["attention"], block["feed_forward_mean"], block["feed_forward_cov"]]
  for out in jax.tree.leaves([output["__call__"] for output in outputs]):
    np.testing.assert_allclose(np.mean(np.asarray(out) == 0), 0.5, atol=0.05)
  assert not backbone.bind({"params": params}).blocks[0].feed_forward_mean.dropout_inside


def test_streams_share_the_dropout_of_weights():
  backbone, params = build("none", 1, "post", "stosa", layers=1, heads=1, dropout=0.0, attention__dropout=0.5)
  inputs = np.tile(np.array([[0, 0, 0, 0, 3]], np.int32), (256, 1))
  _, kept = backbone.apply({"params": params}, inputs, True, method="encode", rngs={"dropout": jax.random.key(0)},
                           capture_intermediates=True)
  attention = kept["intermediates"]["blocks_0"]["attention"]
  dropped = [np.all(np.asarray(attention[f"out_{stream}"]["__call__"][0])[:, -1]
                    == params["blocks_0"]["attention"][f"out_{stream}"]["bias"], axis=1) for stream in ("mean", "cov")]
  np.testing.assert_array_equal(*dropped)
  assert 0.3 < np.mean(dropped[0]) < 0.7


def test_score_all_is_minus_the_distance_and_minus_infinity_for_padding_and_fill_rows():
  _, params, hidden, scores = scored("stosa")
  mean, cov = (params[f"embedding_{stream}"]["item_table"] for stream in ("mean", "cov"))
  assert scores.shape == (2, 3, ROWS) and scores.dtype == np.float32
  for index in np.ndindex(2, 3, ROWS):
    item = index[-1]
    if 1 <= item <= ITEMS:
      wanted = -distance_by_loops(hidden.mean[index[:2]], hidden.cov[index[:2]],
                                  mean[item], elu_by_loops(cov[item]) + 1)
      assert scores[index] == pytest.approx(wanted, abs=1e-5)
    else:
      assert scores[index] == -np.inf


def test_an_item_is_nearest_to_itself_and_its_own_gradient_is_zero():
  backbone, params, _, _ = scored("stosa")
  numbers = np.arange(1, ITEMS + 1)
  def of_items(params: Any) -> jax.Array:
    return backbone.apply({"params": params}, backbone.apply({"params": params}, numbers, method="items"),
                          numbers[:, None], method="score")
  assert np.all(np.asarray(of_items(params)) == 0)
  grads = jax.grad(lambda params: jnp.sum(of_items(params)))(params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))  # NaN counts as any
  hidden = backbone.apply({"params": params}, numbers, method="items")
  scores = np.asarray(backbone.apply({"params": params}, hidden, numbers, method="score"))
  np.testing.assert_array_equal(np.argmax(scores, axis=1), numbers - 1)


# The published network.


def golden() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns (torch's arrays, what they gave), or skips."""
  if not os.path.exists(GOLDEN):
    pytest.skip("needs ../shared/golden/stosa_one_layer.npz, which is not distributed")
  with np.load(GOLDEN) as file:
    values = dict(file)
  arrays = {name.removeprefix("param/"): value for name, value in values.items() if name.startswith("param/")}
  return arrays, values


def test_published_weights_give_the_published_values():
  arrays, wanted = golden()
  backbone, params = from_torch_stosa(arrays, heads=int(wanted["heads"]))
  inputs, targets = wanted["input_ids"], wanted["positives"]
  call = lambda method, *args: backbone.apply({"params": params}, *args, method=method)  # noqa: E731
  real, hidden = inputs > 0, call("encode", inputs)
  np.testing.assert_allclose(hidden.mean[real], wanted["mean"][real], atol=1e-5)
  np.testing.assert_allclose(hidden.cov[real], wanted["cov"][real], atol=1e-5)
  of_real_queries = lambda weights: np.moveaxis(np.asarray(weights), 2, 1)[real]  # noqa: E731
  np.testing.assert_allclose(of_real_queries(attention_maps(backbone, params, inputs)[-1]["refined"]),
                             of_real_queries(wanted["attention_last_layer"]), atol=1e-5)
  np.testing.assert_allclose(-call("score_all", hidden.newest())[:, 1:], wanted["distances_last"][:, 1:], rtol=1e-5)
  negatives = wanted["negatives"][..., None]
  positive = call("score", hidden, targets[..., None])[..., 0]
  bpr = losses.bpr(positive, call("score", hidden, negatives))[real]
  np.testing.assert_allclose(np.mean(bpr), wanted["bpr_loss"], atol=1e-5)
  pvn = losses.positive_vs_negative(positive, call("score", call("items", targets), negatives))[real]
  np.testing.assert_allclose(wanted["pvn_weight"] * np.mean(pvn), wanted["pvn_loss"], atol=1e-5)


def to_torch(params: Any) -> dict[str, np.ndarray]:
  """Returns parameters of a published STOSA of two layers under torch's names."""
  arrays = {"user_margins.weight": np.zeros((5, 1)), "LayerNorm.weight": params["norm_in"]["scale"],
            "LayerNorm.bias": params["norm_in"]["bias"]}
  for stream in ("mean", "cov"):
    arrays[f"item_{stream}_embeddings.weight"] = params[f"embedding_{stream}"]["item_table"]
    arrays[f"position_{stream}_embeddings.weight"] = params[f"embedding_{stream}"]["position_table"]
  for layer in range(2):
    block, prefix = params[f"blocks_{layer}"], f"item_encoder.layer.{layer}"
    def linear(name: str, dense: Any, prefix: str = prefix) -> None:
      arrays[f"{prefix}.{name}.weight"], arrays[f"{prefix}.{name}.bias"] = np.transpose(dense["kernel"]), dense["bias"]
    arrays[f"{prefix}.attention.LayerNorm.weight"] = block["norm_attention"]["scale"]
    arrays[f"{prefix}.attention.LayerNorm.bias"] = block["norm_attention"]["bias"]
    for stream in ("mean", "cov"):
      for role in ("query", "key", "value"):
        linear(f"attention.{stream}_{role}", block["attention"][f"{role}_{stream}"])
      linear(f"attention.{stream}_dense", block["attention"][f"out_{stream}"])
      linear(f"{stream}_intermediate.dense_1", block[f"feed_forward_{stream}"]["in"])
      linear(f"{stream}_intermediate.dense_2", block[f"feed_forward_{stream}"]["out"])
      arrays[f"{prefix}.{stream}_intermediate.LayerNorm.weight"] = block[f"norm_feed_forward_{stream}"]["scale"]
      arrays[f"{prefix}.{stream}_intermediate.LayerNorm.bias"] = block[f"norm_feed_forward_{stream}"]["bias"]
  return arrays


@functools.cache
def exported() -> tuple[STOSA, Any, dict[str, np.ndarray]]:
  backbone, params = build("none", 1, "post", "published", table_multiple=1)
  return backbone, params, to_torch(params)


def test_an_imported_network_of_two_layers_has_the_parameters_and_the_outputs_it_was_written_from():
  backbone, params, arrays = exported()
  found, found_params = from_torch_stosa(arrays, heads=2)
  jax.tree.map(np.testing.assert_array_equal, found_params, params)
  assert (found.num_items, found.max_length, found.model.layers) == (ITEMS, N, 2)
  np.testing.assert_array_equal(join(encode(found, found_params, INPUTS)), join(encode(backbone, params, INPUTS)))


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("LayerNorm.bias"), r"missing \['LayerNorm.bias'\]"),
    (lambda arrays: arrays.pop("item_encoder.layer.1.attention.cov_dense.bias"), "attention.cov_dense.bias"),
    (lambda arrays: arrays.update({"item_embeddings.weight": 0}), r"unknown \['item_embeddings.weight'\]"),
    (lambda arrays: arrays.clear(), "with 0 layers"),
    (lambda arrays: arrays.update({"LayerNorm.bias": np.zeros(9)}), r"LayerNorm.bias is \(9,\), but .* has \(8,\)"),
    (lambda arrays: arrays.update({"item_cov_embeddings.weight": np.zeros((3, 8))}), r"item_cov_embeddings.weight is"),
    (lambda arrays: arrays.update({"item_mean_embeddings.weight": np.zeros(8)}), r"is \(8,\), not \(items, width\)"),
])
def test_weights_that_are_no_stosa_are_refused_by_name(change, message):
  arrays = dict(exported()[2])
  change(arrays)
  with pytest.raises(ValueError, match=message):
    from_torch_stosa(arrays, heads=2)


def test_heads_that_do_not_divide_the_width_are_refused():
  with pytest.raises(ValueError, match="heads=3 does not divide"):
    from_torch_stosa(exported()[2], heads=3)
