"""One step and whole runs: the run folder, early stopping, non-finite losses, learning."""

import hashlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from awrsr_jax.config import finalize
from awrsr_jax.engine import checkpoint, processes, ranking, run_folder
from awrsr_jax.engine import train as train_module
from awrsr_jax.engine.state import NO_STEP, Window, init_state
from awrsr_jax.engine.step import Report
from awrsr_jax.engine.train import make_job, train
from awrsr_jax.inference.trained import load


def read_lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that learns: 40 epochs on the tiny synthetic corpus."""
  import tiny_config
  config = tiny_config.get_config()
  config.train.epochs, config.eval.every_epochs = 40, 4
  config.train.learning_rate = 0.01
  workdir = tmp_path_factory.mktemp("finished")
  return train(config, workdir), workdir


def test_run_folder_holds_what_the_house_promises(finished):
  result, workdir = finished
  assert json.loads((workdir / "result.json").read_text()) == result
  keys = {"hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr"}
  assert result["test"].keys() == result["valid"].keys() == result["oracle"].keys() == keys
  assert result["device"] == "1 x cpu (cpu)" and jax.device_count() == 8  # of its mesh
  assert json.loads((workdir / "config.json").read_text())["train"]["learning_rate"] == 0.01
  assert json.loads((workdir / "corpus.json").read_text())["users"] == 60
  assert list((workdir / "tensorboard").iterdir()) and list((workdir / "checkpoints").iterdir())
  for line in read_lines(workdir):
    expected = {"loss", "grad_norm", "learning_rate", "interactions_per_sec"} if line["split"] == "train" else keys
    assert line.keys() == expected | {"step", "epoch", "split"}


def test_training_lowers_the_loss_and_the_oracle_stays_ahead(finished):
  result, workdir = finished
  steps, losses = zip(*((line["step"], line["loss"]) for line in read_lines(workdir) if line["split"] == "train"),
                      strict=True)
  assert steps[-3:] == (156, 159, 160)  # every third one, and the last
  assert losses[-1] < 0.75 * losses[0]
  assert result["valid"]["ndcg@10"] > 0.25  # chance is about 0.11
  assert result["oracle"]["ndcg@10"] > result["test"]["ndcg@10"]


def test_result_is_of_the_best_checkpoint(finished):
  result, workdir = finished
  valid = {line["step"]: line["ndcg@10"] for line in read_lines(workdir) if line["split"] == "valid"}
  assert result["best_step"] == max(valid, key=lambda step: (valid[step], -step))
  assert result["valid"]["ndcg@10"] == valid[result["best_step"]]


def test_the_rank_of_every_test_target_is_kept(finished, small_config):
  result, workdir = finished
  small_config.train.epochs, small_config.train.learning_rate = 40, 0.01
  job = make_job(small_config)
  corpus, positions = job.corpus, job.corpus.split.targets["test"]
  kept = run_folder.read_ranks(epath.Path(workdir) / "ranks.parquet")
  assert kept["user"].tolist() == corpus.user_ids.tolist()  # of leave-one-out each has one target
  assert kept["item"].tolist() == corpus.item_ids[corpus.items[positions]].tolist()
  assert kept["history"].tolist() == (corpus.lengths - 1).tolist()
  assert kept["trained"].tolist() == corpus.counts[corpus.items[positions]].tolist()
  for name, value in ranking.summarize(kept["rank"]).items():  # summed in another order
    assert abs(value - result["test"][name]) < 1e-12
  ranked = ranking.rank_users(job.rank_step, jax.device_get(load(workdir).params), job.ranking["test"], job.mesh)
  assert kept["rank"].tolist() == ranked[np.argsort(job.ranking["test"].targets)].tolist()


def test_kept_ranks_tell_no_ids_where_these_are_hashed(small_config, tmp_path):
  job = make_job(small_config)
  batches = job.ranking["test"]
  ranks = np.arange(1, len(batches.targets) + 1)
  raw, hashed = epath.Path(tmp_path) / "raw.parquet", epath.Path(tmp_path) / "hashed.parquet"
  run_folder.write_ranks(raw, batches, ranks)
  run_folder.write_ranks(hashed, batches, ranks, hash_ids=True)
  raw, hashed = run_folder.read_ranks(raw), run_folder.read_ranks(hashed)
  for name in ("rank", "history", "trained"):
    assert hashed[name].tolist() == raw[name].tolist()
  assert hashed["user"].tolist() == np.unique(raw["user"], return_inverse=True)[1].tolist()
  by_hand = [hashlib.sha256(f"{user}\n{item}".encode()).digest()[0] for user, item in zip(raw["user"], raw["item"],
                                                                                         strict=True)]
  assert hashed["item"].tolist() == by_hand and len(set(by_hand)) > 1


def test_ranks_are_kept_only_where_they_are_wanted(small_config, tmp_path):
  small_config.eval.keep_ranks, small_config.train.epochs = False, 1
  train(small_config, tmp_path)
  assert not (tmp_path / "ranks.parquet").exists()
  with pytest.raises(ValueError, match="ranks.parquet cannot be read.*config.eval.keep_ranks"):
    run_folder.read_ranks(epath.Path(tmp_path) / "ranks.parquet")


def test_a_published_stosa_learns_and_says_what_it_is(small_config, tmp_path):
  small_config.model.update({"backbone": "stosa", "refine": "stochastic", "faithful": True, "norm": "post",
                             "activation": "elu", "ffn_width": 32})
  small_config.data.buckets = 1
  small_config.loss.update({"name": "bpr", "num_negatives": 4, "pvn_weight": 0.001})
  small_config.train.epochs, small_config.eval.every_epochs, small_config.train.learning_rate = 40, 10, 0.01
  result = train(small_config, tmp_path)
  assert result["valid"]["ndcg@10"] > 0.15  # chance is about 0.11
  assert (result["backbone"], result["refine"], result["loss"]) == ("stosa", "stochastic", "bpr")


def test_patience_stops_the_run(small_config, tmp_path):
  small_config.train.epochs = 200
  small_config.train.patience = 2
  small_config.train.learning_rate = 1e-12  # nothing ever gets better
  result = train(small_config, tmp_path)
  assert result["steps"] == 3 * 4 and result["best_step"] == 4
  assert train(small_config, tmp_path) == result  # and it stays stopped


def test_a_run_that_is_told_to_stop_anywhere_ends_bit_equal(small_config, tmp_path):
  """In both epochs, in both evaluations, and in that of the test split; nothing trained is lost."""
  small_config.train.average, small_config.data.buckets = 0.9, 1
  expected = train(small_config, tmp_path / "uninterrupted")
  small_config.checkpoint.every_steps = 3
  asked, stopped = [], []

  def told_to_stop() -> bool:
    asked.append(None)
    return len(asked) >= 2 + len(stopped)  # once more every time: so it gets ahead, and is stopped everywhere

  result = None
  while result is None:
    try:
      asked.clear()
      result = train(small_config, tmp_path / "run", told_to_stop)
    except processes.Preempted as notice:
      stopped.append(str(notice))
  # 8 steps; evaluations of 2 batches after steps 4 and 8, and at the end of both splits
  assert stopped == ["at step 3 of 8", "while ranking the valid split", "at step 6 of 8",
                     "while ranking the valid split", "while ranking the test split"]
  without_clock = lambda workdir: [  # noqa: E731
      {**line, "interactions_per_sec": None} for line in read_lines(tmp_path / workdir)]
  assert without_clock("run") == without_clock("uninterrupted")
  measured = {"wall_time_s": None, "peak_memory": None, "compiled": None}
  assert result | measured == expected | measured


@pytest.mark.parametrize("start", [0, 5])
def test_the_speed_of_a_line_is_that_of_training_since_the_start_or_the_last_line(start, small_config, monkeypatch):
  """A step of 10 positions takes 2 s, a line has 3 steps, the last one fewer; ranking after every 4 takes 100 s."""
  small_config.train.epochs = 4  # 16 steps
  clock, lines = [0.0], []
  monkeypatch.setattr(train_module.time, "monotonic", lambda: clock[0])
  write = lambda step, epoch, split, values: lines.append(values)  # noqa: E731
  writer = types.SimpleNamespace(advance=lambda step: None, write=write)
  line = train_module.Line(make_job(small_config), writer, start)
  for step in range(start + 1, 17):
    clock[0] += 2
    steps = (step - 1) % 3 + 1  # of the window: where a run goes on it holds some of before
    line.put(step, Report(Window(*map(jnp.float32, (steps, 10 * steps, steps, steps))), NO_STEP, jnp.int32(0)))
    assert not line.flush()
    if step % 4 == 0:
      clock[0] += 100
      line.leave_out(100)
  assert [values["interactions_per_sec"] for values in lines] == [5.0] * {0: 6, 5: 5}[start]


def test_compiling_ranking_and_saving_are_left_out_of_the_speed(small_config, tmp_path, monkeypatch):
  clock, left_out = [0.0], []

  def taking(seconds, call):
    def longer(*arguments, **named):
      clock[0] += seconds
      return call(*arguments, **named)
    return longer

  monkeypatch.setattr(train_module, "time", types.SimpleNamespace(monotonic=taking(1, lambda: clock[0])))
  monkeypatch.setattr(train_module.Line, "leave_out", lambda line, seconds: left_out.append(seconds))
  monkeypatch.setattr(train_module.ranking, "rank_users", taking(100, train_module.ranking.rank_users))
  monkeypatch.setattr(train_module.checkpoint, "save", taking(30, train_module.checkpoint.save))
  small_config.train.epochs = 1
  result = train(small_config, tmp_path / "run")
  assert {31, 101} <= set(left_out)  # and what the clock itself takes
  assert 0 < sum({*left_out} - {31, 101}) <= result["compiled"]["seconds"]


def test_a_run_of_another_law_does_not_go_on_but_can_be_used(small_config, tmp_path, monkeypatch):
  with monkeypatch.context() as older:
    older.setattr(checkpoint, "LAW", checkpoint.LAW - 1)
    with pytest.raises(processes.Preempted):
      train(small_config, tmp_path / "run", lambda: True)
  before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
  with pytest.raises(ValueError, match="law 1 of batches and dropout, and this version has law 2"):
    train(small_config, tmp_path / "run")
  assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
  assert load(tmp_path / "run", step=2).step == 2


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(small_config, tmp_path):
  small_config.train.epochs = 3
  train(small_config, tmp_path)
  small_config.train.epochs = 30
  small_config.train.learning_rate = 1e30
  run_folder.write_json(tmp_path / "config.json", finalize(small_config).to_dict())  # the same run, and it blows up
  with pytest.raises(FloatingPointError, match=r"not finite at step 1[3-9] .*learning_rate"):
    train(small_config, tmp_path)
  job = make_job(small_config)
  template = jax.eval_shape(lambda: init_state(job.backbone, job.optimizer, 0, job.mesh))
  with checkpoint.open_checkpoints(tmp_path) as manager:
    state, record = checkpoint.restore_newest(manager, template)
  assert record["step"] == 12 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_damaged_best_checkpoint_is_named_at_the_end(small_config, tmp_path):
  small_config.train.learning_rate = 1e-12  # so that the first evaluation is the best
  assert train(small_config, tmp_path)["best_step"] == 4
  (tmp_path / "result.json").unlink()
  for path in (tmp_path / "checkpoints" / "4").rglob("*"):
    if path.is_file() and path.name != "_METADATA" and "metrics" not in path.parts:
      path.write_bytes(b"")
  with pytest.raises(ValueError, match="best checkpoint, step 4 .*cannot be read"):
    train(small_config, tmp_path)


def test_a_lower_bound_on_quality_comes_from_the_ranking_itself(small_config):
  """Before training, ranks are about uniform: the mean rank is near the middle."""
  job = make_job(small_config)
  state = init_state(job.backbone, job.optimizer, 0, job.mesh)
  ranks = ranking.rank_users(job.rank_step, state.params, job.ranking["test"], job.mesh)
  assert len(ranks) == 60 and 0.25 * 40 < jnp.mean(ranks) < 0.75 * 40
  assert jax.tree.leaves(state.params)[0].dtype == jnp.float32
