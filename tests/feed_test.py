"""How batches reach the devices: a run is the same, bit for bit, whoever builds them; as a loop, to rounding."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from awrsr_jax.data import prepared
from awrsr_jax.engine import compiling
from awrsr_jax.engine import feed as feeds
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import init_state
from awrsr_jax.engine.train import make_job

TESTS = pathlib.Path(__file__).parent


# The compiler of the other tests rounds differently where it fuses differently; this is the one that users have.
RUNS = """
import pathlib, sys, jax, numpy, pytest
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import tiny_config
from faults.runs import read_lines, read_result
from awrsr_jax.data import prepared
from awrsr_jax.engine import processes
from awrsr_jax.engine.train import train
from awrsr_jax.inference.trained import load
folder, found = pathlib.Path(sys.argv[1]), []
prepared.prepare(tiny_config.get_config().data, folder / "prepared", 2 ** 28)
# All but the first are stopped within an epoch of 8 steps, and go on.
for name, *feeds in (("host", ("host", None)), ("calls of 3", ("device", 3), ("device", 3)),
                     ("memory, files and then the devices", ("auto", None), ("host", None), ("auto", 1))):
  config = tiny_config.get_config()
  config.mesh.data, config.data.long_history, config.data.buckets = -1, "windows", 1
  config.train.batch_size, config.model.refine = 8, "none"
  for turn, (config.data.feed, config.train.steps_per_call) in enumerate(feeds, 1):
    config.data.path = str(folder / "prepared") if "files" in name and turn > 1 else ""
    try:
      train(config, folder / name, lambda: turn < len(feeds))
    except processes.Preempted as notice:
      print(notice)
  result, lines = read_result(folder / name), read_lines(folder / name)
  result.pop("oracle", None)  # a prepared corpus has forgotten its law
  if any(steps and steps > 1 for _, steps in feeds):  # a loop is another program, and may round its last bits otherwise
    wanted = jax.tree.leaves(load(folder / "host").params)
    for (path, x), y in zip(jax.tree.leaves_with_path(load(folder / name).params), wanted, strict=True):
      # attention does not depend on the bias of its keys: the gradient there is rounding, which Adam makes a step of
      if "['key']['bias']" not in jax.tree_util.keystr(path):
        numpy.testing.assert_allclose(x, y, rtol=0, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    result["params_sha256"] = found[0][0]["params_sha256"]
    for line, like in zip(lines, found[0][1], strict=True):
      assert line.pop("split") == like["split"]
      assert line == pytest.approx({key: like[key] for key in like if key != "split"}, rel=1e-6), name
    lines = found[0][1]
  found.append((result, lines))
assert all(one == found[0] for one in found), found
print("equal", len(found))
"""


def test_device_and_host_and_files_and_several_steps_a_call_train_alike(tmp_path):
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
  done = subprocess.run([sys.executable, "-c", RUNS, tmp_path], env=environment, capture_output=True,
                        text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "equal 3" and done.stdout.count("at step") == 3


def test_what_lies_in_files_lives_on_the_devices_where_it_is_small_enough(small_config, tmp_path, monkeypatch):
  prepared.prepare(small_config.data, tmp_path / "prepared", 2 ** 28)
  whole, small_config.data.path = make_job(small_config), str(tmp_path / "prepared")
  np.testing.assert_array_equal(make_job(small_config).items, whole.items)
  monkeypatch.setattr(feeds, "RESIDENT_BYTES", feeds.resident_bytes(whole.batches) - 1)
  assert make_job(small_config).items is None


def test_an_epoch_on_the_devices_has_the_batches_of_the_host(small_config):
  small_config.data.feed = "device"
  job = make_job(small_config)
  build = jax.jit(lambda feed, index, lengths: feeds.build_batch(feed, index, lengths, job.mesh), static_argnums=2)
  calls = feeds.resident_calls(job.mesh, job.batches, job.items, 0, 1, job.steps_to_pause)
  for step, call in enumerate(calls):
    made = build(call.feed, call.feed["first"], call.lengths)
    jax.tree.map(np.testing.assert_array_equal, made, job.batches[step])
  assert step + 1 == len(job.batches) and build._cache_size() == 1 and len(job.batches.buckets) == 2


@pytest.mark.parametrize("feed", ["device", "host"])
def test_a_run_has_one_train_program_whatever_the_lengths_of_its_rows(feed, small_config):
  small_config.data.feed = feed
  job = make_job(small_config)
  assert len(job.batches.buckets) == 2
  calls = (feeds.streamed_calls(job.mesh, job.batches, 0) if feed == "host" else
           feeds.resident_calls(job.mesh, job.batches, job.items, 0, 1, job.steps_to_pause))
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  programs = []
  for call in calls:
    assert call.lengths == (() if feed == "host" else job.batches.buckets)
    with compiling.watching() as compiled:
      state, _ = job.train_step(state, call.feed | {"stop": meshes.stop_flags(job.mesh, False)}, job.cumulative,
                                lengths=call.lengths)
    programs.append(compiled.programs)
  assert programs == [1] + [0] * (len(job.batches) - 1)


def test_calls_end_where_the_host_has_something_to_do(small_config):
  small_config.data.feed, small_config.checkpoint.every_steps = "device", 5  # a line every 3 steps, epochs of 4
  job = make_job(small_config)
  calls = feeds.resident_calls(job.mesh, job.batches, job.items, 1, 16, job.steps_to_pause)
  assert [call.steps for call in calls] == [2, 1, 1, 1, 2]  # to 3, 4, 5, 6, 8
  assert all(call.lengths == job.batches.buckets for call in calls)


@pytest.mark.parametrize("buckets", [1, 2])
def test_a_call_makes_as_many_steps_as_it_says(buckets, small_config):
  small_config.data.feed, small_config.data.buckets = "device", buckets
  job = make_job(small_config)
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  call = next(feeds.resident_calls(job.mesh, job.batches, job.items, 0, 16, job.steps_to_pause))
  state, report = job.train_step(state, call.feed | {"stop": meshes.stop_flags(job.mesh, False)}, job.cumulative,
                                 lengths=call.lengths)
  assert call.steps == 3 == int(state.step) == int(report.window.steps)


def test_where_a_corpus_lives(small_config, monkeypatch):
  assert make_job(small_config).items is not None
  monkeypatch.setattr(feeds, "RESIDENT_BYTES", 100)
  assert make_job(small_config).items is None
  small_config.data.feed = "device"
  assert make_job(small_config).items is not None
