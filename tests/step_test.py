"""The train step: downhill by every loss, sums for the log, a batch in pieces, and a notice to stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import init_state
from awrsr_jax.engine.step import accumulate
from awrsr_jax.engine.train import make_job


@pytest.mark.parametrize("name, backbone", [
    *((name, "sasrec") for name in ("softmax", "sampled_softmax", "bce", "bpr", "gbce")), ("softmax", "stosa"),
    ("bpr", "stosa")])
def test_every_loss_takes_a_step_downhill(name, backbone, small_config):
  small_config.loss.name = name
  small_config.model.backbone = backbone
  small_config.loss.pvn_weight = 0.001 if (name, backbone) == ("bpr", "stosa") else 0.0
  small_config.loss.num_negatives, small_config.data.buckets = 8, 1
  small_config.train.learning_rate = 0.02
  small_config.model.dropout = 0.0
  job = make_job(small_config)
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  batch = meshes.to_global(job.mesh, job.batches[0])
  popularity = meshes.replicate(job.mesh, np.arange(1, job.corpus.num_items + 1, dtype=np.int32))
  losses = []
  for _ in range(12):
    state, report = job.train_step(state, batch, popularity)
    losses.append(float(report.window.loss))
  steps = np.diff([0, *losses[:3]])  # a window of log_every=3 steps
  assert losses[0] == steps[0] and losses[3] < losses[0]
  assert losses[9] < 0.98 * losses[0]


def test_the_window_restarts_after_a_line(small_config):
  small_config.data.buckets = 1
  job = make_job(small_config)
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  popularity = meshes.replicate(job.mesh, np.arange(1, job.corpus.num_items + 1, dtype=np.int32))
  counts = []
  for step in range(5):
    state, report = job.train_step(state, meshes.to_global(job.mesh, job.batches[step]), popularity)
    counts.append(int(report.window.steps))
  assert counts == [1, 2, 3, 1, 2]


def test_averaging_trains_as_without_and_keeps_the_averages(small_config):
  small_config.data.buckets = 1
  jobs = [make_job(small_config)]
  small_config.train.average = 0.9
  jobs.append(make_job(small_config))
  popularity = meshes.replicate(jobs[0].mesh, np.arange(1, jobs[0].corpus.num_items + 1, dtype=np.int32))
  plain, averaged = (init_state(job.backbone, job.optimizer, 0, job.mesh) for job in jobs)
  table = lambda params: np.array(params["embedding"]["item_table"])  # noqa: E731
  np.testing.assert_array_equal(table(averaged.trained), table(averaged.params))
  for step in range(3):
    wanted, keep = table(averaged.params), (1 + step) / (10 + step)
    batch = meshes.to_global(jobs[0].mesh, jobs[0].batches[step])
    (plain, _), (averaged, _) = (job.train_step(state, batch, popularity)
                                 for job, state in zip(jobs, (plain, averaged), strict=True))
    np.testing.assert_allclose(table(averaged.trained), table(plain.params), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(table(averaged.params), keep * wanted + (1 - keep) * table(plain.params), rtol=1e-4,
                               atol=1e-7)
    assert plain.trained is plain.params


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_have_every_row_once_interleaved_and_keys_of_their_own(pieces, small_config):
  mesh = meshes.make_mesh(small_config.mesh)
  inputs = jnp.arange(24).reshape(8, 3), jnp.arange(100, 108).reshape(4, 2)  # two buckets
  batch = {"inputs": inputs, "targets": tuple(x + 1000 for x in inputs)}
  seen = []

  def grad(params, rows, keys):
    jax.debug.callback(lambda *args: seen.append(args), rows["inputs"], jax.random.key_data(keys["dropout"]))
    inputs, targets = (sum(x.sum() for x in rows[name]) for name in ("inputs", "targets"))
    return {"w": params["w"] * inputs}, (jnp.float32(targets), jnp.float32(len(rows)))

  grads, (total, _) = jax.jit(lambda batch: accumulate(
      grad, {"w": jnp.ones(2)}, batch, {"dropout": jax.random.key(3)}, pieces, mesh))(batch)
  jax.effects_barrier()
  assert grads["w"].tolist() == [1104.0, 1104.0] and total == 1104 + 32000
  found = sorted([rows[:, 0].tolist() for rows in buckets] for buckets, _ in seen)
  assert found == [[[3 * row for row in range(piece, 8, pieces)], [100 + 2 * row for row in range(piece, 4, pieces)]]
                   for piece in range(pieces)]
  assert len({tuple(key.tolist()) for _, key in seen}) == pieces


def test_a_notice_to_stop_comes_back_with_its_step(small_config):
  small_config.mesh.data, small_config.data.buckets = 2, 1
  job = make_job(small_config)
  popularity = meshes.replicate(job.mesh, np.arange(1, job.corpus.num_items + 1, dtype=np.int32))
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  stops = []
  for step, told in enumerate((False, True, False)):
    batch = meshes.to_global(job.mesh, job.batches[step])
    one_of_many = np.zeros((2, 1), np.int32)
    one_of_many[1] = told  # the process of one device was told to
    batch["stop"] = jax.device_put(one_of_many, batch["stop"].sharding)
    state, report = job.train_step(state, batch, popularity)
    stops.append(bool(report.stop))
  assert stops == [False, True, False]
