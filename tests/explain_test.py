"""Explanations: weights are those of the model, effects are what they are said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from awrsr_jax.engine.train import train
from awrsr_jax.inference import explain
from awrsr_jax.inference.trained import load
from awrsr_jax.model.backbones import attention_maps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train(tiny_config.get_config(), workdir)
  return load(workdir)


def log_p(trained, numbers):
  """log softmax of all scores, in float64; no padding anywhere."""
  scores = jax.jit(trained.backbone.apply)({"params": trained.params}, jnp.int32([numbers]))
  scores = np.asarray(scores, np.float64)[0, -1]
  real = scores[1:len(trained.catalogue.item_ids) + 1]
  return np.concatenate([[np.nan], real - np.log(np.sum(np.exp(real)))])


def test_recommendations_are_those_of_recommend(trained):
  assert trained.explain([1, 2, 3], k=4).recommendations == trained.recommend([[1, 2, 3]], k=4)[0]
  assert len(trained.explain([1, 2, 3], k=2, allow=[7]).recommendations) == 1


def test_an_effect_is_what_the_score_loses_without_the_item(trained):
  history = [5, 9, 5, 12]
  found = trained.explain(history, k=3)
  numbers = [trained.catalogue.numbers[str(raw)] for raw in history]
  items = [trained.catalogue.numbers[str(one.item)] for one in found.recommendations]
  for at in range(4):
    without = numbers[:at] + numbers[at + 1:]
    wanted = log_p(trained, numbers)[items] - log_p(trained, without)[items]
    np.testing.assert_allclose(found.effects[:, at], wanted, atol=1e-4)


def test_shares_are_of_what_speaks_for_the_item():
  shares = explain.share(np.float32([[1, -2, 3], [-1, -1, 0]]))
  np.testing.assert_allclose(shares, [[0.25, 0, 0.75], [0, 0, 0]])


def test_the_only_item_has_the_whole_share(trained):
  found = trained.explain([5], k=2)
  np.testing.assert_allclose(found.shares, 1)
  items = [trained.catalogue.numbers[str(one.item)] for one in found.recommendations]
  wanted = log_p(trained, [trained.catalogue.numbers["5"]])[items] + np.log(len(trained.catalogue.item_ids))
  np.testing.assert_allclose(found.effects[:, 0], wanted, atol=1e-4)


def test_weights_are_those_of_the_model(trained):
  history = [5, 9, 7, 12]
  found = trained.explain(history)
  numbers = [trained.catalogue.numbers[str(raw)] for raw in history]
  maps = attention_maps(trained.backbone, trained.params, jnp.int32([numbers]))
  assert len(found.layers) == trained.config.model.layers == len(maps)
  for layer, weights in zip(found.layers, maps, strict=True):
    np.testing.assert_allclose(layer.first_order, weights["first_order"][0], atol=1e-6)
    np.testing.assert_allclose(layer.refined, weights["refined"][0], atol=1e-6)
    np.testing.assert_allclose(layer.change, layer.refined - layer.first_order)
    np.testing.assert_allclose(layer.refined.sum(-1), 1, atol=1e-5)
  assert np.abs(found.layers[0].change).max() > 1e-4  # the preset refines


def test_maps_and_effects_are_of_products_in_full_precision_on_every_device(trained):
  inputs = jnp.ones((1, 8), jnp.int32)
  for step, *arguments in ((explain.make_layers_step(trained.backbone), inputs),
                           (explain.make_log_p_step(trained.backbone), inputs, jnp.int32([3, 4]))):
    program = step.lower(trained.params, *arguments).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") > 0


def test_only_the_newest_known_items_are_explained(trained):
  history = list(range(1, 21))
  found = trained.explain([*history, "unknown"], k=2)
  assert found.history == history[-trained.config.data.max_length:] and len(found.titles) == len(found.history)
  assert found.effects.shape == found.shares.shape == (2, len(found.history))


def test_padding_and_chunks_change_nothing(trained, monkeypatch):
  numbers, items = np.arange(1, 6, dtype=np.int32), np.int32([20, 30])
  step = explain.make_log_p_step(trained.backbone)
  measure = lambda padded: explain.measure_effects(step, trained.params, numbers, items, 40, padded)  # noqa: E731
  whole = measure(8)
  monkeypatch.setattr(explain, "CHUNK", 4)
  np.testing.assert_allclose(measure(5), whole, atol=1e-5)


def test_a_history_without_a_known_item_cannot_be_explained(trained, caplog):
  with pytest.raises(ValueError, match="there is nothing to explain"):
    trained.explain(["unknown"])
  assert "1 items of the histories are not in the catalogue" in caplog.text and "recommendations" not in caplog.text


@pytest.mark.parametrize("histories", [[[1, 2]], [(1, 2)], np.array([[1, 2]])])
def test_a_list_of_histories_in_place_of_one_is_refused(trained, histories, caplog):
  with pytest.raises(ValueError, match="explain takes one history, not a list of them: item 0 is .*1, 2.*, not an id"):
    trained.explain(histories)
  assert not caplog.records
