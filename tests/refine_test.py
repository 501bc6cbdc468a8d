"""Attention weight refinement: every preset and order against loops in float64, and the properties of its weights.

Shapes: B batch, H heads, L length, n longest length, r rank.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_test import weights_by_loops

from awrsr_jax.config import default, finalize
from awrsr_jax.model.attention import causal_mask, masked_softmax
from awrsr_jax.model.dropout import Drop
from awrsr_jax.model.refine import Refinement, build_refinement

N, HEADS, RANK = 7, 2, 3

VARIANTS = {
    "none": {"refine": "none"},
    "simple": {"refine": "simple"},
    "value": {"refine": "value"},
    "value_gated": {"refine": "value", "awr": {"gate": 0.3}},
    "additive_on_scores": {"refine": "additive", "awr": {"additive_on": "scores"}},
    "additive_on_weights": {"refine": "additive", "awr": {"additive_on": "weights"}},
    "stochastic": {"refine": "stochastic"},
    "value_wasserstein": {"refine": "value", "awr": {"correlation": "wasserstein"}},
    "additive_on_scores_wasserstein": {"refine": "additive", "awr": {"correlation": "wasserstein"}},
    "additive_on_weights_wasserstein": {"refine": "additive", "awr": {"correlation": "wasserstein",
                                                                      "additive_on": "weights"}},
    "value_projection": {"refine": "value", "awr": {"value_projection": True}},
    "value_shared": {"refine": "value", "awr": {"share_heads": True}},
    "stochastic_shared": {"refine": "stochastic", "awr": {"share_heads": True}},
    "none_sink": {"refine": "none", "attention": {"sink": 0.5}},
    "simple_sink": {"refine": "simple", "attention": {"sink": 0.5}},
    "value_gated_sink": {"refine": "value", "awr": {"gate": 0.3}, "attention": {"sink": 0.5}},
    "additive_on_scores_sink": {"refine": "additive", "attention": {"sink": 0.5}},
    "additive_on_weights_sink": {"refine": "additive", "awr": {"additive_on": "weights"}, "attention": {"sink": 0.5}},
    "stochastic_sink": {"refine": "stochastic", "attention": {"sink": 0.5}},
    "simple_lag": {"refine": "simple", "awr": {"slots": "lag"}},
    "value_lag": {"refine": "value", "awr": {"slots": "lag"}},
    "additive_on_scores_lag": {"refine": "additive", "awr": {"slots": "lag"}},
    "additive_on_weights_lag": {"refine": "additive", "awr": {"slots": "lag", "additive_on": "weights"}},
    "stochastic_lag_shared": {"refine": "stochastic", "awr": {"slots": "lag", "share_heads": True}},
    "value_gated_lag_sink": {"refine": "value", "awr": {"slots": "lag", "gate": 0.3}, "attention": {"sink": 0.5}},
}
CASES = [(variant, order) for variant in VARIANTS for order in (1, 2)
         if (VARIANTS[variant]["refine"], order) != ("none", 2)]
HIGHEST = list(dict(CASES).items())  # the second order goes through the first


def model_of(variant: str, order: int = 1, **changes: Any) -> Any:
  """Returns the `model` node of a config that names this variant: two heads, rank 3."""
  config = default()
  config.model.update({"heads": HEADS, **VARIANTS[variant]})
  config.model.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  config.model.awr.update({"rank": RANK, "order": order})
  return finalize(config).model


def random_params(init: Any, *inputs: Any, seed: int = 0, scale: float = 1.0) -> Any:
  """Returns parameters of the shapes that `init` would make, all of them random; a layer norm's scale is near 1."""
  shapes = jax.eval_shape(init, jax.random.key(0), *inputs).get("params", {})
  rng = np.random.default_rng(seed)
  draw = lambda path, leaf: (rng.normal(size=leaf.shape, scale=scale)  # noqa: E731
                             + (path[-1].key == "scale")).astype(leaf.dtype)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def build(variant: str, order: int) -> tuple[Refinement, Any]:
  """Returns the refinement and random parameters for it."""
  refinement = build_refinement(model_of(variant, order), N)
  scores = jnp.zeros((1, HEADS, 2, 2))
  return refinement, random_params(refinement.init, scores, scores[:, :1] == 0)


def refine(variant: str, order: int, scores: Any, mask: Any) -> jax.Array:
  refinement, params = build(variant, order)
  return refinement.apply({"params": params}, scores, mask)


def draw_scores(seed: int, batch: int, length: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(batch, HEADS, length, length), scale=2).astype(np.float32)


def mask_of(*padding: int, length: int) -> np.ndarray:
  """Returns mask_Bx1xLxL of rows with so many padded columns on the left."""
  return np.asarray(causal_mask(jnp.arange(length)[None] >= jnp.array(padding)[:, None]))


# Oracle: one matrix at a time, float64, loops.


def features_by_loops(weights: np.ndarray, table: np.ndarray, slots: str) -> np.ndarray:
  """Returns A W (L, r); row j of the table belongs to the column n - 1 - j steps before the end, or before the row."""
  length, n = len(weights), len(table)
  out = np.zeros((length, table.shape[1]))
  for i in range(length):
    for column in range(length if slots == "end" else i + 1):
      steps = (length - 1 if slots == "end" else i) - column
      for r in range(table.shape[1]):
        out[i, r] += weights[i, column] * table[n - 1 - steps, r]
  return out


def correlation_by_loops(weights: np.ndarray, read: Any, correlation: str, slots: str) -> np.ndarray:
  """Returns S' (L, L); `read(role)` gives a slot table of this order and head."""
  length = len(weights)
  out = np.zeros((length, length))
  if correlation == "dot":
    query, key = (features_by_loops(weights, read(role), slots) for role in ("query", "key"))
    for i, j in np.ndindex(length, length):
      out[i, j] = sum(query[i, r] * key[j, r] for r in range(query.shape[1])) / query.shape[1] ** 0.5
    return out
  elu_plus_one = lambda x: x + 1 if x > 0 else np.exp(x)  # noqa: E731
  mean_q, cov_q, mean_k, cov_k = (
      features_by_loops(weights, read(role), slots) for role in ("query_mean", "query_cov", "key_mean", "key_cov"))
  for i, j in np.ndindex(length, length):
    for r in range(mean_q.shape[1]):
      out[i, j] -= (mean_q[i, r] - mean_k[j, r]) ** 2
      out[i, j] -= (elu_plus_one(cov_q[i, r]) ** 0.5 - elu_plus_one(cov_k[j, r]) ** 0.5) ** 2
  return out / mean_q.shape[1] ** 0.5


def mix_by_loops(mixing: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Returns rows mixed by weights: row i is the sum over j of mixing[i, j] rows[j]."""
  return np.stack([sum(mixing[i, j] * rows[j] for j in range(len(rows))) for i in range(len(mixing))])


def project_by_loops(weights: np.ndarray, table: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns A Wv within the mask; rows and columns of Wv are counted from the end."""
  length, skip = len(weights), len(table) - len(weights)
  out = np.zeros((length, length))
  for i, k in np.ndindex(length, length):
    if mask[i, k]:
      out[i, k] = sum(weights[i, j] * table[skip + j, skip + k] for j in range(length))
  return out


def refine_by_loops(model: Any, params: Mapping[str, Any], head: int, scores: np.ndarray,
                    mask: np.ndarray) -> np.ndarray:
  """Returns A* (L, L) of one sequence and head, float64, as docs/method.md states it."""
  scores = scores.astype(np.float64)
  sink = lambda order: (None if model.attention.sink is None else  # noqa: E731
                        float(np.ravel(params[f"order{order}_sink"])[head]))
  weights = weights_by_loops(scores, mask, sink(0))
  for order in range(1, 1 + (model.awr.order if model.refine != "none" else 0)):
    def read(role: str, order: int = order) -> np.ndarray:
      table = np.asarray(params[f"order{order}_{role}"], np.float64)
      assert len(table) == (1 if model.awr.share_heads and role != "value" else model.heads)
      return table[head % len(table)]
    correlation = model.awr.correlation or ("wasserstein" if model.refine == "stochastic" else "dot")
    correlations = correlation_by_loops(weights, read, correlation, model.awr.slots)
    compared = weights_by_loops(correlations, mask, sink(order))
    if model.refine in ("simple", "stochastic"):
      weights = compared
    elif model.refine == "value":
      mixed = project_by_loops(weights, read("value"), mask) if model.awr.value_projection else weights
      compared = mix_by_loops(compared, mixed)
      gate = 1 / (1 + np.exp(-float(np.ravel(params[f"order{order}_gate"])[head]))) if model.awr.gate else 1
      weights = (1 - gate) * weights + gate * compared
    elif model.awr.additive_on == "scores":
      scores = scores + correlations  # of this order: the scores whose softmax the new weights are
      weights = weights_by_loops(scores, mask, sink(order))
    else:
      gate = 1 / (1 + np.exp(-float(np.ravel(params[f"order{order}_gate"])[head])))
      weights = (1 - gate) * weights + gate * compared
  return weights


@pytest.mark.parametrize("variant, order", CASES)
@pytest.mark.parametrize("length", [5, N])
def test_refinement_agrees_with_loops(variant, order, length):
  scores, mask = draw_scores(0, 3, length), mask_of(0, 2, length - 1, length=length)
  model, (_, params) = model_of(variant, order), build(variant, order)
  found = refine(variant, order, scores, mask)
  assert found.shape == scores.shape and found.dtype == jnp.float32
  for b, h in np.ndindex(3, HEADS):
    wanted = refine_by_loops(model, params, h, scores[b, h], mask[b, 0])
    np.testing.assert_allclose(found[b, h], wanted, atol=1e-5, err_msg=f"sequence {b}, head {h}")


@pytest.mark.parametrize("variant, order", HIGHEST)
def test_rows_sum_to_one_and_are_exactly_zero_outside_the_mask(variant, order):
  scores, mask = draw_scores(1, 3, 5), mask_of(0, 2, 5, length=5)
  weights = np.asarray(refine(variant, order, scores, mask))
  assert np.all(weights[~np.broadcast_to(mask, weights.shape)] == 0)
  if variant != "value_projection":  # its rows go through a free matrix
    sums, has_key = weights.sum(axis=-1), np.broadcast_to(mask.any(axis=-1), (3, HEADS, 5))
    if variant.endswith("sink"):  # it takes the rest
      assert np.all(sums[has_key] < 0.999) and np.all(sums[has_key] > 0) and not np.any(sums[~has_key])
    else:
      np.testing.assert_allclose(sums, has_key, atol=1e-6)
    assert weights.min() >= 0


@pytest.mark.parametrize("variant, order", HIGHEST)
def test_more_left_padding_and_what_it_holds_change_no_weight(variant, order):
  short = refine(variant, order, draw_scores(2, 3, 5), mask_of(0, 1, 5, length=5))
  scores = draw_scores(3, 3, N) * 1e3
  scores[:, :, -5:, -5:] = draw_scores(2, 3, 5)
  long = refine(variant, order, scores, mask_of(N - 5, N - 4, N, length=N))
  np.testing.assert_allclose(long[:, :, -5:, -5:], short, atol=1e-6)


@pytest.mark.parametrize("variant, order", HIGHEST)
def test_a_row_of_weights_reads_no_later_row_no_masked_score_and_no_other_head(variant, order):
  scores, mask = draw_scores(4, 1, 5)[0], mask_of(1, length=5)
  probe = np.random.default_rng(5).normal(size=5).astype(np.float32)
  jacobian = np.asarray(jax.jacrev(lambda s: refine(variant, order, s[None], mask)[0] @ probe)(scores))  # HxL, HxLxL
  later = np.arange(5)[None, :, None] > np.arange(5)[:, None, None]  # row of weights, row and column of scores
  hidden = ~np.broadcast_to(mask[0], (5, 5, 5))
  for h in range(HEADS):
    assert np.all(jacobian[h, :, h][later | hidden] == 0) and np.all(jacobian[h, :, 1 - h] == 0)
    assert np.all(jacobian[h, 4, h, 4, 1:] != 0)
    if not variant.startswith("none"):
      assert np.all(jacobian[h, 4, h, 3, 1:4] != 0)


@pytest.mark.parametrize("variant, order", HIGHEST)
def test_gradients_are_finite_where_rows_have_no_key(variant, order):
  refinement, params = build(variant, order)
  scores, mask = draw_scores(6, 3, 5), mask_of(0, 3, 5, length=5)
  loss = lambda params, scores: jnp.sum(jnp.square(refinement.apply({"params": params}, scores, mask)))  # noqa: E731
  grads, grad_scores = jax.grad(loss, argnums=(0, 1))(params, scores)
  assert all(np.all(np.isfinite(grad)) and np.any(grad) for grad in jax.tree.leaves(grads))
  assert np.all(np.isfinite(grad_scores)) and np.any(grad_scores[:2]) and not np.any(grad_scores[2])


def test_none_is_bit_identical_to_plain_softmax_and_has_no_parameters():
  scores, mask = draw_scores(7, 3, 5), mask_of(0, 2, 5, length=5)
  plain = np.asarray(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1))
  found = np.asarray(refine("none", 1, scores, mask))
  has_key = np.broadcast_to(mask.any(axis=-1), found.shape[:-1])
  np.testing.assert_array_equal(found[has_key], plain[has_key])
  assert not np.any(found[~has_key]) and build("none", 1)[1] == {}


@pytest.mark.parametrize("variant, order", [("simple", 1), ("simple", 2), ("value", 1)])
def test_zero_slot_tables_make_causal_means(variant, order):
  refinement, params = build(variant, order)
  scores, mask = draw_scores(8, 3, 5), mask_of(0, 2, 4, length=5)
  found = refinement.apply({"params": jax.tree.map(np.zeros_like, params)}, scores, mask)
  first_order = np.asarray(masked_softmax(scores, mask), np.float64)
  for b, padded in enumerate((0, 2, 4)):
    for i in range(padded, 5):
      visible = np.arange(padded, i + 1)
      for h in range(HEADS):
        mean = np.isin(np.arange(5), visible) / len(visible)
        wanted = mean if variant == "simple" else sum(first_order[b, h, j] for j in visible) / len(visible)
        np.testing.assert_allclose(found[b, h, i], wanted, atol=1e-6)


@pytest.mark.parametrize("variant, other", [("additive_on_weights", "simple"), ("value_gated", "value")])
def test_gate_goes_from_first_order_to_refined(variant, other):
  refinement, params = build(variant, 1)
  scores, mask = draw_scores(9, 3, 5), mask_of(0, 2, 4, length=5)
  tables = {name: table for name, table in params.items() if name != "order1_gate"}
  for bias, wanted in ((-100.0, masked_softmax(scores, mask)),
                       (100.0, build(other, 1)[0].apply({"params": tables}, scores, mask))):
    gate = np.full_like(params["order1_gate"], bias)
    gated = refinement.apply({"params": {**params, "order1_gate": gate}}, scores, mask)
    np.testing.assert_allclose(gated, wanted, atol=1e-6)


@pytest.mark.parametrize("variant, start", [("additive_on_weights", 0.5), ("value_gated", 0.3)])
def test_gates_start_where_the_config_says(variant, start):
  scores = jnp.zeros((1, HEADS, 2, 2))
  params = build_refinement(model_of(variant), N).init(jax.random.key(0), scores, scores[:, :1] == 0)["params"]
  np.testing.assert_allclose(jax.nn.sigmoid(params["order1_gate"]), np.full((1, HEADS, 1, 1), start), rtol=1e-6)


def test_sinks_start_where_the_config_says_and_take_their_share():
  scores, mask = jnp.zeros((1, HEADS, 3, 3)), jnp.tri(3, dtype=bool)[None, None]
  refinement = build_refinement(model_of("none", attention__sink=-0.7), N)
  params = refinement.init(jax.random.key(0), scores, mask)["params"]
  np.testing.assert_allclose(params["order0_sink"], np.full((HEADS, 1, 1), -0.7), rtol=1e-6)
  weights = np.asarray(refinement.apply({"params": params}, scores, mask))
  for row in range(3):  # row + 1 keys of score 0
    np.testing.assert_allclose(weights[..., row, :].sum(axis=-1), (row + 1) / (row + 1 + np.exp(-0.7)), rtol=1e-6)


def test_a_sink_and_slots_by_lag_are_reached_by_gradients():
  refinement, params = build("value_gated_lag_sink", 2)
  scores, mask = draw_scores(6, 2, N), mask_of(0, 3, length=N)
  probe = np.random.default_rng(0).normal(size=scores.shape).astype(np.float32)
  grads = jax.grad(lambda params: jnp.sum(refinement.apply({"params": params}, scores, mask) * probe))(params)
  assert {f"order{k}_sink" for k in (0, 1, 2)} < grads.keys()
  assert all(np.all(grad != 0) for grad in grads.values())  # of the whole tables, as histories are of full length


@pytest.mark.parametrize("variant, order, reason", [
    ("value_lag", 1, ""), ("additive_on_weights_lag", 2, ""), ("simple_lag", 2, ""), ("value", 2, ""),
    ("value_lag", 2, "slots that each row counts by itself do not factor"), ("value_gated_lag_sink", 2, "slots"),
])
def test_blocks_are_refused_with_a_reason_where_lags_are_mixed_twice(variant, order, reason):
  found = build(variant, order)[0].refuses_blocks(squares=False)
  assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("variant, dropped", [("value_gated", 1), ("additive_on_weights", 1), ("value", 0)])
def test_what_a_gate_keeps_is_dropped_as_plain_attention_is(variant, dropped):
  """With the gate shut a refinement is plain attention in training too, its dropout included."""
  refinement, params = build(variant, 1)
  scores, mask = draw_scores(9, 3, 5), mask_of(0, 0, 0, length=5)
  odd = (jnp.arange(5) % 2)[None, None, None]

  class OddColumns:
    """Those stay, in every softmax."""
    again = lambda self, number: self  # noqa: E731
    __call__ = lambda self, weights, rows: weights * odd  # noqa: E731

  shut = {name: np.full_like(x, -100.0) if name == "order1_gate" else x for name, x in params.items()}
  kept, _ = refinement.apply({"params": shut}, scores, mask, OddColumns(), method="weights")
  plain = masked_softmax(scores, mask) * odd
  assert np.allclose(kept, plain, atol=1e-6) == bool(dropped)


@pytest.mark.parametrize("variant, order", [
    ("none", 1), ("simple", 1), ("value", 1), ("value", 2), ("value_gated", 1), ("additive_on_weights", 2)])
def test_dropped_weights_have_the_refined_ones_as_their_mean(variant, order):
  """Also where values pass through several softmaxes, whose keys are therefore independent."""
  refinement, params = build(variant, order)
  scores, mask = draw_scores(9, 1, 5), mask_of(1, length=5)
  weights_of = lambda drop: refinement.apply({"params": params}, scores, mask, drop, method="weights")  # noqa: E731
  keys = jax.random.bits(jax.random.key(0), (20_000, 2), jnp.uint32)
  kept, weights = jax.jit(jax.vmap(lambda words: weights_of(Drop(words, 0.4))))(keys)
  deviation = jnp.std(kept, axis=0) / len(keys) ** 0.5
  assert jnp.all(jnp.abs(jnp.mean(kept, axis=0) - weights[0]) <= 5 * deviation + 1e-6)
  assert jnp.any(deviation > 0)


@pytest.mark.parametrize("order", [1, 2])
def test_value_drops_the_first_order_weights_too(order):
  """Whoever is dropped in every first-order row has no way left to the output, whatever the mixing keeps."""
  refinement, params = build("value", order)
  scores, mask = draw_scores(9, 3, 5), mask_of(0, 0, 0, length=5)

  class FirstOrderOnly:
    """Drops the even columns of the first-order softmax."""
    again = lambda self, number: (lambda weights, rows: weights) if number else self  # noqa: E731
    __call__ = lambda self, weights, rows: weights * (jnp.arange(5) % 2)[None, None, None]  # noqa: E731

  kept, weights = refinement.apply({"params": params}, scores, mask, FirstOrderOnly(), method="weights")
  assert np.all(kept[..., ::2] == 0) and np.any(weights[..., ::2] > 0)
  np.testing.assert_allclose(kept[..., 1::2], weights[..., 1::2], rtol=1e-6)


def test_initial_values_are_identity_projections_and_xavier_tables_per_head():
  scores, mask = jnp.zeros((1, 4, 2, 2)), jnp.ones((1, 1, 2, 2), bool)
  refinement = build_refinement(model_of("value_projection", heads=4), 100).clone(rank=50)
  params = refinement.init(jax.random.key(0), scores, mask)["params"]
  np.testing.assert_array_equal(params["order1_value"], np.broadcast_to(np.eye(100), (4, 100, 100)))
  for role in ("query", "key"):
    np.testing.assert_allclose(np.std(params[f"order1_{role}"], axis=(1, 2)), (2 / 150) ** 0.5, rtol=0.05)
  assert not np.allclose(params["order1_query"], params["order1_key"])


def test_maps_sown_are_the_first_order_and_the_refined_weights():
  refinement, params = build("value", 2)
  scores, mask = draw_scores(10, 3, 5), mask_of(0, 2, 4, length=5)
  weights, sown = refinement.apply({"params": params}, scores, mask, mutable=["intermediates"])
  np.testing.assert_array_equal(sown["intermediates"]["first_order"][0], masked_softmax(scores, mask))
  np.testing.assert_array_equal(sown["intermediates"]["refined"][0], weights)


@pytest.mark.parametrize("variant, order, shapes", [
    ("none", 1, {}),
    ("simple", 2, {f"order{k}_{role}": (HEADS, N, RANK) for k in (1, 2) for role in ("query", "key")}),
    ("value_shared", 1, {f"order1_{role}": (1, N, RANK) for role in ("query", "key")}),
    ("stochastic", 1, {f"order1_{role}": (HEADS, N, RANK)
                       for role in ("query_mean", "query_cov", "key_mean", "key_cov")}),
    ("value_projection", 1, {"order1_query": (HEADS, N, RANK), "order1_key": (HEADS, N, RANK),
                             "order1_value": (HEADS, N, N)}),
    ("none_sink", 1, {"order0_sink": (HEADS, 1, 1)}),
    ("simple_sink", 2, {f"order{k}_{role}": (HEADS, N, RANK) for k in (1, 2) for role in ("query", "key")}
     | {f"order{k}_sink": (HEADS, 1, 1) for k in (0, 1, 2)}),
    ("value_lag", 1, {f"order1_{role}": (HEADS, N, RANK) for role in ("query", "key")}),
])
def test_config_reaches_the_shapes_of_the_parameters(variant, order, shapes):
  assert jax.tree.map(np.shape, build(variant, order)[1], is_leaf=lambda x: isinstance(x, np.ndarray)) == shapes
