"""The memory plan: sizes by hand, what makes them smaller, and --dry_run, which leaves nothing behind."""

import functools
import os
import pathlib
import subprocess
import sys
import types

import ml_collections
import pytest
import tiny_config

from awrsr_jax.config import default, finalize
from awrsr_jax.data import prepared
from awrsr_jax.data.batches import training_batches
from awrsr_jax.engine import feed, memory
from awrsr_jax.engine import mesh as meshes

ROOT = pathlib.Path(__file__).parent.parent


@functools.cache
def plan(items=4000, data=1, model=1, corpus_bytes=0, **values):
  config = default()
  config.data.max_length, config.model.width, config.model.refine, config.model.ffn_width = 32, 16, "none", 16
  config.model.layers, config.train.batch_size, config.eval.batch_size, config.eval.block_items = 1, 64, 8, 64
  config.model.table_multiple = 32
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  mesh = meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))
  return memory.plan(finalize(config), items, mesh, corpus_bytes)


def test_parameters_and_optimizer_are_counted_by_hand():
  table, positions, norm = 4032 * 16, 32 * 16, 2 * 16  # 4,001 rows, rounded up to a multiple of 32
  block = 4 * (16 * 16 + 16) + 2 * (16 * 16 + 16) + 2 * norm  # query, key, value, out; two dense layers; two norms
  whole = plan()
  assert whole["parameters"] == 4 * (table + positions + block + norm)
  assert whole["optimizer"] == 2 * whole["parameters"] + 2 * 4  # two moments, and two counts of steps
  split = plan(data=2, model=4)
  assert split["parameters"] == whole["parameters"] - 4 * table * 3 // 4
  assert split["optimizer"] == whole["optimizer"] - 2 * 4 * table * 3 // 4


def test_a_step_takes_the_gradients_and_no_scores_of_all_positions():
  found = plan()
  assert found["parameters"] < found["train_step"] < 4 * 64 * 32 * 4000  # no float32 for each position and item
  large = plan(items=100_000, loss__name="sampled_softmax", loss__num_negatives=4)
  assert large["parameters"] < large["train_step"] < 3 * large["parameters"]  # the state itself is updated in place
  assert found["peak"] == found["parameters"] + found["optimizer"] + max(
      found[name] for name in ("init", "train_step", "rank_step"))
  assert "f32[256,4032]" in found["largest"] and found["largest"]["f32[256,4032]"] == 4 * 256 * 4032  # a chunk of them


def test_parameters_and_the_vectors_that_items_start_from_are_counted_as_float32():
  options = {"items": 100_000, "loss__name": "sampled_softmax", "loss__num_negatives": 4}
  random, given = plan(**options), plan(train__item_start="cooccurrence", model__dtype="bfloat16", **options)
  assert given["init"] - random["init"] >= 4 * 100_000 * 16 and given["parameters"] == random["parameters"]


def test_more_devices_shorter_pieces_and_remat_take_less():
  deep = {"items": 100, "loss__name": "sampled_softmax", "loss__num_negatives": 4, "model__layers": 2}
  plain = plan(**deep)["train_step"]
  assert plan(data=8, **deep)["train_step"] < 0.3 * plain
  assert plan(train__accumulate=8, **deep)["train_step"] < 0.5 * plain
  assert plan(model__remat=True, **deep)["train_step"] < 0.7 * plain
  assert plan(data=2, model=4)["peak"] < 0.5 * plan()["peak"]  # 0.9 by the rows alone


@pytest.mark.parametrize("platform, size", [("linux", 5 * 1024), ("darwin", 5)])
def test_the_peak_of_the_host_is_in_bytes(platform, size, monkeypatch):
  monkeypatch.setattr(memory.sys, "platform", platform)
  monkeypatch.setattr(memory.resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=5))
  assert memory.measure_peak()["host"] == size


def read_mib(done, row: str) -> str:
  """Returns what a dry run printed in a row."""
  [line] = [line for line in done.stdout.splitlines() if line.startswith(f"  {row}  ")]
  return line.split()[1]


def dry_run(tmp_path, *flags):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  return subprocess.run([sys.executable, "-m", "awrsr_jax.main", f"--config={ROOT}/tests/tiny_config.py", *flags],
                        cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                        timeout=300)


def test_a_dry_run_prints_the_plan_for_devices_and_items_that_are_not_here_and_writes_nothing(tmp_path):
  done = dry_run(tmp_path, "--dry_run", "--items=100000", "--devices=16", "--config.mesh.data=2",
                 "--config.mesh.model=8", "--workdir=run")
  assert done.returncode == 0 and "100000 items, on each of 16 devices (2 data x 8 model)" in done.stdout, done.stderr
  assert "f32[256,12501]" not in done.stdout and "f32[12501,8]" in done.stdout
  assert os.listdir(tmp_path) == []
  assert read_mib(done, "corpus") == "0.0"  # nothing is known of it


def test_a_dry_run_counts_a_corpus_that_lives_on_the_devices(tmp_path):
  done = dry_run(tmp_path, "--dry_run", "--config.data.synthetic.num_users=20000")
  assert done.stdout.startswith("40 items, on each of 1 devices"), done.stderr  # of the corpus
  config = tiny_config.get_config()
  config.data.synthetic.num_users = 20_000
  batches = training_batches(prepared.load(config.data), finalize(config))
  whole = 4 * (len(batches.items) + 2 * 20_000)
  assert read_mib(done, "corpus") == f"{whole / 2 ** 20:.1f}" != "0.0"
  assert feed.resident_bytes(batches, 4) == 4 * (len(batches.items) + 2 * 5_000)
  assert plan(corpus_bytes=whole)["peak"] == plan()["peak"] + whole
  streamed = dry_run(tmp_path, "--dry_run", "--config.data.synthetic.num_users=20000", "--config.data.feed=host")
  assert read_mib(streamed, "corpus") == "0.0"
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags, message", [
    ([], "--workdir=FOLDER is missing"),
    (["--workdir=run", "--items=5"], "--devices and --items are for --dry_run"),
    (["--dry_run", "--devices=3", "--config.mesh.data=-1", "--config.mesh.model=2"], "does not fit 3 devices"),
    (["--dry_run", "--devices=3", "--config.mesh.model=3"], "table_multiple=8 must be a multiple"),
    (["--dry_run", "--config.model.attention.implementation=fused", "--config.model.backbone=stosa"], "fused cannot"),
])
def test_a_dry_run_that_does_not_fit_is_one_line(tmp_path, flags, message):
  done = dry_run(tmp_path, *flags)
  assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
  assert os.listdir(tmp_path) == []
