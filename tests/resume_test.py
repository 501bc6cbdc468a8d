"""A run that is complete, grows, or is given another config; tests/faults/ has those that are cut off."""

import pathlib

import pytest
from faults.runs import assert_equal, run

FLAGS = ("--config.train.epochs=30", "--config.checkpoint.every_steps=7", "--config.eval.every_epochs=2",
         "--config.train.learning_rate=0.01")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("uninterrupted")
  done = run(workdir, *FLAGS)
  assert done.returncode == 0, done.stderr
  return workdir


def test_complete_run_says_so_and_epochs_may_grow(uninterrupted, tmp_path):
  short = tmp_path / "grown"
  assert run(short, *FLAGS, "--config.train.epochs=10").returncode == 0
  again = run(short, *FLAGS, "--config.train.epochs=10")
  assert again.returncode == 0 and "is complete" in again.stderr
  assert "resumed" not in again.stderr
  grown = run(short, *FLAGS)
  assert grown.returncode == 0 and "resumed at step" in grown.stderr, grown.stderr
  assert_equal(short, uninterrupted)


def test_another_config_is_refused_with_the_difference(uninterrupted):
  before = sorted(path.name for path in uninterrupted.rglob("*"))
  refused = run(uninterrupted, *FLAGS, "--config.model.width=16")
  assert refused.returncode != 0
  assert "config.model.width: 8 there, 16 now" in refused.stderr and "Traceback" not in refused.stderr
  assert sorted(path.name for path in uninterrupted.rglob("*")) == before
