"""Backbones: causality, padding and finite gradients of every backbone x refinement x order; SASRec against loops in
float64, and its scores. STOSA's own tests are in stosa_test."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks_test import block_by_loops, norm_by_loops
from refine_test import CASES, VARIANTS, model_of, random_params

from awrsr_jax.config import default, finalize
from awrsr_jax.model import sasrec, stosa
from awrsr_jax.model.backbones import BACKBONES, attention_maps, build_backbone
from awrsr_jax.model.hidden import Hidden, table_rows
from awrsr_jax.model.sasrec import SASRec

WIDTH, N, ITEMS, ROWS = 8, 7, 13, 16
NORMS = ("pre", "post", "query")
PUBLISHED = {"backbone": "stosa", "faithful": True, "norm": "post", "activation": "elu", "ffn_width": 4 * WIDTH}
KINDS = {"sasrec": {}, "stosa": {"backbone": "stosa"}, "published": PUBLISHED}  # of backbones
TWO_LAYERS = {("sasrec", "value"), *((kind, "none") for kind in KINDS)}
# Every item is in one place only, so that the gradient of an item's vector is the gradient of one input. Tests share
# their few shapes: without jit, each operation is compiled once a shape.
INPUTS = np.array([[3, 1, 4, 13, 5], [0, 0, 2, 6, 8], [0, 0, 0, 0, 0]], np.int32)
REAL = INPUTS > 0


@functools.cache
def build(variant: str, order: int = 1, norm: str = "pre", kind: str = "sasrec", **changes: Any) -> tuple[Any, Any]:
  """Returns a backbone and random parameters for it: two layers where the variant is a common one, for speed."""
  model = model_of(variant, order, **{
      "norm": norm, "width": WIDTH, "ffn_width": 6, "layers": 2 if (kind, variant) in TWO_LAYERS else 1,
      "table_multiple": 4, "dropout": 0.0, **KINDS[kind], **changes})
  backbone = BACKBONES[model.backbone](model, N, ITEMS)
  return backbone, random_params(backbone.init, INPUTS, scale=0.4)


def encode(backbone: Any, params: Any, inputs: np.ndarray, **options: Any) -> np.ndarray:
  """Returns all that a hidden state holds, (B, L, D) or mean and covariance (B, L, 2 D)."""
  return np.asarray(join(backbone.apply({"params": params}, inputs, method="encode", **options)))


@functools.cache
def encoded(*case: Any, **changes: Any) -> np.ndarray:
  """Returns INPUTS as the backbone that build makes of a case encodes them."""
  return encode(*build(*case, **changes), INPUTS)


def join(hidden: Hidden) -> jax.Array:
  return hidden.mean if hidden.cov is None else jnp.concatenate([hidden.mean, hidden.cov], axis=-1)


def embeddings(params: Any) -> dict[str, Any]:
  """Returns the tables of SASRec's embedding, or of both of STOSA's."""
  return {name: tables for name, tables in params.items() if name.startswith("embedding")}


def encode_by_loops(backbone: SASRec, params: Any, inputs_L: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns (L, D) of one history, float64, and the refined weights (H, L, L) of every layer."""
  length = len(inputs_L)
  x, maps = np.zeros((length, WIDTH)), []
  for column, item in enumerate(inputs_L):
    if item > 0:
      x[column] = (params["item_table"][item].astype(np.float64) * WIDTH ** 0.5
                   + params["position_table"][N - length + column])
  for layer in range(backbone.model.layers):
    x, weights = block_by_loops(params[f"blocks_{layer}"], backbone.model, x, inputs_L > 0)
    maps.append(weights)
  return x if backbone.model.norm == "post" else norm_by_loops(params["norm_out"], x), maps


def flatten(params: Any) -> Any:
  """Returns parameters with the embedding's tables beside the rest."""
  return {**params, **params["embedding"]}


@pytest.mark.parametrize("variant, order, norm, activation", [
    ("none", 1, "pre", "swiglu"), ("none", 1, "post", "gelu"), ("none", 1, "query", "relu"),
    ("value", 2, "pre", "gelu"), ("stochastic", 1, "post", "relu"), ("additive_on_weights", 1, "query", "gelu")])
def test_forward_pass_agrees_with_loops(variant, order, norm, activation):
  backbone, params = build(variant, order, norm, activation=activation, layers=2, branch_gates=activation == "swiglu")
  found = encode(backbone, params, INPUTS)
  for b in range(2):
    wanted, _ = encode_by_loops(backbone, flatten(params), INPUTS[b])
    np.testing.assert_allclose(found[b][REAL[b]], wanted[REAL[b]], atol=1e-5)


# A refinement sees scores, not the backbone that made them: SASRec has every variant, the others one of each kind. What
# makes the second order makes the first; both are here where it does not, and where a variant is a plain one.
PLAIN = ("none", "simple", "value", "additive_on_scores", "additive_on_weights", "stochastic", "value_projection")
BOTH = (*PLAIN, "none_sink", "value_lag", "value_gated_lag_sink")  # the last two have blocks in order 1 only
EVERY = [(variant, order, NORMS[i % 3], "sasrec") for i, (variant, order) in enumerate(CASES)
         if variant in BOTH or order == 2]
EVERY += [(variant, 1 + i % 2, NORMS[i % 3], "stosa") for i, variant in enumerate(PLAIN)]
EVERY += [(variant, 2 - i % 2, "post", "published") for i, variant in enumerate(PLAIN)]
IN_EVERY_NORM = [(variant, 1, norm, kind) for kind in ("sasrec", "stosa") for variant in ("none", "value")
                 for norm in NORMS]
# What refine_test and fused_test show of the weights of every variant is shown of backbones for some.
SOME = [case for case in EVERY if case[0] in (*BOTH, "value_gated", "stochastic_sink", "simple_lag")]


@pytest.mark.parametrize("case", sorted({*EVERY, *IN_EVERY_NORM}), ids=str)
def test_gradient_reaches_every_earlier_input_and_no_later_one_no_padding_and_no_neighbour(case):
  backbone, params = build(*case)
  probe = np.random.default_rng(0).normal(size=2 * WIDTH).astype(np.float32)
  def project(tables: dict[str, jax.Array]) -> jax.Array:
    hidden = join(backbone.apply({"params": {**params, **tables}}, INPUTS, method="encode"))
    return jnp.where(REAL, hidden @ probe[:hidden.shape[-1]], 0)  # (B, L)
  jacobians = jax.jacrev(project)(embeddings(params)).values()
  reached = lambda name: sum(  # noqa: E731  # (B, L, V) or (B, L, n)
      np.any(np.asarray(jacobian[name]) != 0, axis=-1) for jacobian in jacobians) > 0
  by_item, by_position = reached("item_table"), reached("position_table")
  for b, t in np.argwhere(REAL):
    earlier = REAL[b] & (np.arange(5) <= t)
    assert set(np.flatnonzero(by_item[b, t])) == set(INPUTS[b][earlier])
    assert set(np.flatnonzero(by_position[b, t])) == set(N - 5 + np.flatnonzero(earlier))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_left_padding_changes_no_real_output(case):
  padded = encode(*build(*case), np.pad(INPUTS, [(0, 0), (N - 5, 0)]))[:, -5:]
  np.testing.assert_allclose(padded[REAL], encoded(*case)[REAL], atol=4e-6)  # rounding: entries reach 3


@pytest.mark.parametrize("case", SOME, ids=str)
def test_padded_rows_and_batch_neighbours_never_matter(case):
  backbone, params = build(*case)
  found = encoded(*case)
  poisoned = params | {name: tables | {"item_table": np.concatenate([np.full((1, WIDTH), 1e3, np.float32),
                                                                     tables["item_table"][1:]])}
                       for name, tables in embeddings(params).items()}
  np.testing.assert_array_equal(encode(backbone, poisoned, INPUTS)[REAL], found[REAL])
  beside_others = encode(backbone, params, np.stack([np.array([0, 0, 0, 0, 9]), INPUTS[1], np.array([7, 9, 7, 9, 7])]))
  np.testing.assert_allclose(beside_others[1][REAL[1]], found[1][REAL[1]], atol=1e-6)


# In float32 such a row is among the inputs above. What has a dtype are the values that weights sum.
@pytest.mark.parametrize("kind, variant, dtype", [
    *(("sasrec", variant, "bfloat16") for variant in (*PLAIN, "value_gated")),
    *(("stosa", variant, "bfloat16") for variant in ("none", "simple", "value", "stochastic")),
    *(("published", variant, "bfloat16") for variant in ("none", "value")),
    *((kind, "value", "float32") for kind in KINDS)])
def test_rows_that_are_all_padding_have_finite_outputs_and_gradients(kind, variant, dtype):
  norm = NORMS[list(VARIANTS).index(variant) % 3]
  backbone, params = build(variant, 2, norm, kind, dtype=dtype)
  def loss(params: Any) -> tuple[jax.Array, jax.Array]:
    hidden = join(backbone.apply({"params": params}, INPUTS, method="encode"))
    return jnp.sum(jnp.square(hidden)), hidden
  grads, hidden = jax.grad(loss, has_aux=True)(params)
  assert hidden.dtype == jnp.float32 and np.all(np.isfinite(hidden))
  assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(grads))
  for tables in embeddings(grads).values():
    assert np.any(tables["item_table"]) and not np.any(tables["item_table"][0])


@pytest.mark.parametrize("kind, norm", [*(("sasrec", norm) for norm in NORMS), ("stosa", "pre"), ("published", "post")])
def test_none_is_bit_identical_to_the_plain_backbone(kind, norm, monkeypatch):
  backbone, params = build("none", 1, norm, kind, attention__implementation="reference")
  again = lambda: encode(type(backbone)(backbone.model, N, ITEMS), params, INPUTS)  # noqa: E731
  def replace(refinement: Any) -> None:
    for module in (sasrec, stosa):
      monkeypatch.setattr(module, "build_refinement", lambda model, max_length: refinement)
  class Plain:
    """Takes the place of a Refinement, and is no module."""

    def __init__(self, sign: int) -> None:
      self._sign = sign

    def refuses_blocks(self, squares: bool) -> str:
      return "it keeps its weights in memory"

    def weights(self, scores: jax.Array, mask: jax.Array, drop: None) -> tuple[jax.Array, jax.Array]:
      weights = jax.nn.softmax(jnp.where(mask, self._sign * scores, -jnp.inf), axis=-1)
      return (jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0),) * 2
  found = encode(backbone, params, INPUTS)
  replace(Plain(1))
  np.testing.assert_array_equal(found, again())
  replace(Plain(-1))
  assert np.any(found != again())  # weights do matter here


@pytest.mark.parametrize("dropout, attention_dropout, random", [
    (0.0, None, False), (0.5, 0.0, True), (0.0, 0.5, True), (0.5, None, True)])
def test_dropout_rates_are_those_of_the_config(dropout, attention_dropout, random):
  backbone, params = build("value", dropout=dropout, attention__dropout=attention_dropout)
  runs = [encode(backbone, params, INPUTS, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)]
  assert np.any(runs[0] != runs[1]) == random
  assert np.any(runs[0] != encode(backbone, params, INPUTS)) == random


def test_attention_dropout_is_the_models_where_it_is_not_set():
  unset, params = build("value", dropout=0.5)
  of = lambda backbone: backbone.bind({"params": params}).blocks[0].attention.dropout  # noqa: E731
  assert of(unset) == 0.5 and of(build("value", dropout=0.5, attention__dropout=0.25)[0]) == 0.25


@functools.cache
def scored(kind: str = "sasrec") -> tuple[Any, Any, Hidden, np.ndarray]:
  """Returns a backbone, its parameters, hidden states (2, 3, D), and all their scores (2, 3, V)."""
  backbone, params = build("none", 1, "pre", kind)
  rng = np.random.default_rng(1)
  mean = jnp.asarray(rng.normal(size=(2, 3, WIDTH)), jnp.float32)
  cov = None if kind == "sasrec" else jnp.asarray(rng.uniform(0.1, 3, (2, 3, WIDTH)), jnp.float32)
  hidden = Hidden(mean, cov)
  return backbone, params, hidden, np.asarray(backbone.apply({"params": params}, hidden, method="score_all"))


def test_score_all_is_the_dot_product_and_minus_infinity_for_padding_and_fill_rows():
  _, params, hidden, scores = scored()
  assert scores.shape == (2, 3, ROWS) and scores.dtype == np.float32
  for index in np.ndindex(2, 3, ROWS):
    item = index[-1]
    if 1 <= item <= ITEMS:
      wanted = float(np.float64(hidden.mean[index[:2]]) @ params["embedding"]["item_table"][item])
      assert scores[index] == pytest.approx(wanted, abs=1e-5)
    else:
      assert scores[index] == -np.inf


def test_cosine_scores_are_cosines_of_what_dot_products_are_of():
  plain, params = build("none")
  cosine, _ = build("none", cosine=5.0)
  apply = lambda backbone, *args, **kwargs: backbone.apply({"params": params}, *args, **kwargs)  # noqa: E731
  hidden = np.float64(apply(plain, INPUTS, method="encode").mean)
  table = np.float64(params["embedding"]["item_table"])
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  wanted = 5 * unit(hidden[REAL]) @ unit(table).T
  encoded = apply(cosine, INPUTS, method="encode")
  np.testing.assert_allclose(apply(cosine, encoded, method="score_all")[REAL][:, 1:ITEMS + 1], wanted[:, 1:ITEMS + 1],
                             atol=1e-5)
  items = np.arange(1, ITEMS + 1)
  np.testing.assert_allclose(apply(cosine, encoded, items, method="score")[REAL], wanted[:, items], atol=1e-5)
  itself = apply(cosine, apply(cosine, items, method="items"), items, method="score")
  np.testing.assert_allclose(np.diag(itself), 1, atol=1e-5)


def test_vectors_of_length_0_have_cosine_0_and_finite_gradients():
  grad = jax.grad(lambda x: jnp.sum(sasrec.unit(x) @ jnp.arange(3.0)))(jnp.zeros((2, 3)))
  assert not np.any(sasrec.unit(jnp.zeros((2, 3)))) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("kind", ["sasrec", "stosa"])
def test_score_agrees_with_score_all_for_shared_and_for_own_candidates(kind):
  backbone, params, hidden, scores = scored(kind)
  score = lambda hidden, items: backbone.apply({"params": params}, hidden, items, method="score")  # noqa: E731
  shared = np.array([13, 2, 2, 7])
  np.testing.assert_allclose(score(hidden, shared), scores[..., shared], atol=1e-5)
  own = np.random.default_rng(2).integers(1, ITEMS + 1, (2, 3, 5))
  np.testing.assert_allclose(score(hidden, own), np.take_along_axis(scores, own, axis=-1), atol=1e-5)
  newest = score(hidden.newest(), own[:, -1])  # (B, K)
  np.testing.assert_allclose(newest, np.take_along_axis(scores[:, -1], own[:, -1], axis=-1), atol=1e-5)


@pytest.mark.parametrize("kind", ["sasrec", "stosa"])
def test_rows_of_the_catalogue_score_as_they_do_among_all(kind):
  backbone, params, hidden, scores = scored(kind)
  rows = jax.tree.map(lambda table: table[3:9], backbone.apply({"params": params}, method="catalogue"))
  np.testing.assert_allclose(backbone.score_rows(hidden, rows), scores[..., 3:9], atol=1e-5)


def test_newest_is_the_last_column_of_mean_and_covariance():
  x = jnp.arange(24.0).reshape(2, 3, 4)
  hidden = Hidden(mean=x, cov=x + 100).newest()
  np.testing.assert_array_equal(hidden.mean, x[:, -1])
  np.testing.assert_array_equal(hidden.cov, x[:, -1] + 100)
  assert Hidden(mean=x).newest().cov is None


# What the last column leaves out depends on how weights are refined, not on how rows are compared.
@pytest.mark.parametrize("case, changes", [
    *((case, {}) for case in EVERY if not case[0].endswith(("wasserstein", "shared"))),
    *((case, {"attention__implementation": "reference"}) for case in EVERY if case[0] in ("none", "simple")),
    (("value", 2, "post", "sasrec"), {"branch_gates": True}), (("none", 1, "pre", "sasrec"), {"branch_gates": True}),
], ids=str)
def test_the_newest_column_alone_is_that_of_all(case, changes):
  newest = encode(*build(*case, **changes), INPUTS, newest=True)
  assert newest.shape[1] == 1
  np.testing.assert_allclose(newest, encoded(*case, **changes)[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_items, multiple, rows", [(40, 8, 48), (39, 8, 40), (12, 1, 13), (7, 8, 8), (8, 8, 16)])
def test_table_rows_hold_padding_and_all_items_in_a_multiple(num_items, multiple, rows):
  assert table_rows(num_items, multiple) == rows


def test_config_reaches_the_parameters(small_config):
  small_config.model.update({"layers": 2, "ffn_width": 12})
  small_config.model.awr.update({"rank": 5, "order": 2, "share_heads": True, "value_projection": True})
  backbone = build_backbone(finalize(small_config), num_items=40)
  params = jax.tree.map(np.shape, random_params(backbone.init, INPUTS), is_leaf=lambda x: isinstance(x, np.ndarray))
  slots = {f"order{k}_{role}": shape for k in (1, 2)
           for role, shape in (("query", (1, 8, 5)), ("key", (1, 8, 5)), ("value", (2, 8, 8)))}
  dense = lambda width, out: {"kernel": (width, out), "bias": (out,)}  # noqa: E731
  norm = {"scale": (8,), "bias": (8,)}
  block = {"attention": {"query": dense(8, 8), "key": dense(8, 8), "value": dense(8, 8), "out": dense(8, 8),
                         "refinement": slots},
           "feed_forward": {"in": dense(8, 12), "out": dense(12, 8)}, "norm_attention": norm, "norm_feed_forward": norm}
  assert params == {"embedding": {"item_table": (48, 8), "position_table": (8, 8)}, "blocks_0": block,
                    "blocks_1": block, "norm_out": norm}


def test_parameters_counted_by_hand(small_config):
  backbone = build_backbone(finalize(small_config), num_items=40)
  params = random_params(backbone.init, INPUTS)
  tables = 48 * 8 + 8 * 8  # 41 rows filled up to a multiple of 8; 8 positions
  attention = 4 * (8 * 8 + 8) + 2 * (2 * 8 * 4)  # query, key, value, out; two slot tables, two heads, rank 4
  feed_forward = 8 * 16 + 16 + 16 * 8 + 8
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == tables + attention + feed_forward + 3 * 2 * 8 == 1192


def test_post_norm_has_no_last_norm():
  assert "norm_out" not in build("none", norm="post")[1] and "norm_out" in build("none", norm="pre")[1]


@pytest.mark.parametrize("variant", ["none", "value"])
def test_attention_maps_are_the_weights_of_every_layer(variant):
  backbone, params = build(variant)
  layers = attention_maps(backbone, params, INPUTS)
  assert [set(layer) for layer in layers] == [{"first_order", "refined"}] * 2
  for layer, maps in enumerate(layers):
    assert all(weights.shape == (3, 2, 5, 5) and weights.dtype == jnp.float32 for weights in maps.values())
    assert np.array_equal(maps["first_order"], maps["refined"]) == (variant == "none")
    for b in range(3):
      wanted = encode_by_loops(backbone, flatten(params), INPUTS[b])[1][layer]
      np.testing.assert_allclose(maps["refined"][b], wanted, atol=1e-5)


def test_encode_alone_returns_no_maps():
  backbone, params = build("value")
  out = jax.eval_shape(lambda params: backbone.apply({"params": params}, INPUTS, method="encode"), params)
  assert [leaf.shape for leaf in jax.tree.leaves(out)] == [(3, 5, WIDTH)]


def test_64_bits_are_refused_before_a_good_checkpoint_looks_damaged():
  jax.config.update("jax_enable_x64", True)
  try:
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
      build_backbone(finalize(default()), 5)
  finally:
    jax.config.update("jax_enable_x64", False)
