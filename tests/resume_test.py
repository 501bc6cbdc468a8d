"""A run that is complete, grows, or is given another config; tests/faults/ has those that are cut off."""

import logging

import pytest
import tiny_config
from faults.runs import assert_equal

from awrsr_jax.engine.train import train


def make_config(epochs: int):
  config = tiny_config.get_config()
  config.train.epochs, config.checkpoint.every_steps, config.eval.every_epochs = epochs, 7, 3
  config.data.buckets = 1
  return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  train(make_config(5), workdir)
  return workdir


def test_complete_run_says_so_and_epochs_may_grow(uninterrupted, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  result = train(make_config(3), tmp_path)  # where lines and an evaluation of the longer run are due, too
  assert train(make_config(3), tmp_path) == result
  assert "is complete" in caplog.text and "resumed" not in caplog.text
  train(make_config(5), tmp_path)
  assert "resumed at step 12 of 20" in caplog.text
  assert_equal(tmp_path, uninterrupted)


def test_another_config_is_refused_with_the_difference(uninterrupted):
  before = sorted(path.name for path in uninterrupted.rglob("*"))
  config = make_config(5)
  config.model.width = 16
  with pytest.raises(ValueError, match="config.model.width: 8 there, 16 now"):
    train(config, uninterrupted)
  assert sorted(path.name for path in uninterrupted.rglob("*")) == before
