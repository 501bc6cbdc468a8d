"""A trained model from its checkpoint alone: recommendations in raw ids, similar items, and what is refused."""

import json
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import tiny_config

import awrsr_jax
from awrsr_jax.config import default, finalize
from awrsr_jax.data import batches
from awrsr_jax.engine import checkpoint
from awrsr_jax.engine.train import make_job, train
from awrsr_jax.evaluate import evaluate
from awrsr_jax.inference.standalone import Catalogue
from awrsr_jax.inference.trained import load
from awrsr_jax.model.backbones import build_backbone
from awrsr_jax.model.gaussian import wasserstein

# Orbax leaves failed reads behind, and Python tells of them when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TITLES = {f"i{number}": f"Title, the {number}th" for number in range(1, 30)}  # some items have none


def make_config(path):
  """A tiny config on a CSV file with text ids and titles."""
  rng = np.random.default_rng(0)
  lines = ["user,item,time,title"]
  for user in range(50):
    for time, item in enumerate(rng.integers(1, 38, size=rng.integers(4, 20)).tolist()):
      lines.append(f'u{user},i{item},{time},"{TITLES.get(f"i{item}", "")}"')
  path.write_text("\n".join(lines) + "\n")
  config = tiny_config.get_config()
  config.data.name, config.data.path = "", str(path)
  config.eval.batch_size = 20  # more devices than it was trained on may not divide it
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Config and folder of a run on text ids, whose data is gone."""
  folder = tmp_path_factory.mktemp("trained")
  config = make_config(folder / "log.csv")
  config.train.epochs = 3
  train(config, folder / "run")
  return config, folder / "run"


@pytest.fixture(scope="module")
def trained(run):
  return load(run[1])


def plain_scores(trained, numbers):
  """Scores of all items for one history, without any of the machinery: (I + 1,), item 0 is -inf."""
  numbers = numbers[-trained.config.data.max_length:]
  inputs = np.zeros((1, trained.config.data.max_length), np.int32)
  inputs[0, inputs.shape[1] - len(numbers):] = numbers
  scores = np.array(trained.backbone.apply({"params": trained.params}, inputs))
  return scores[0, -1, :len(trained.catalogue.item_ids) + 1]


def test_recommendations_are_the_best_items_outside_of_the_history(trained):
  for history in (["i3"], ["i5", "i9", "i5", "i2"], [f"i{number}" for number in range(1, 30)]):
    [found] = trained.recommend([history], k=6)
    numbers = [trained.catalogue.numbers[raw] for raw in history]
    scores = plain_scores(trained, numbers)
    scores[numbers] = -np.inf
    best = np.argsort(-scores, kind="stable")[:6]
    assert [one.item for one in found] == [trained.catalogue.item_ids[number - 1] for number in best]
    np.testing.assert_allclose([one.score for one in found], scores[best], rtol=1e-5, atol=1e-6)
    assert [one.title for one in found] == [TITLES.get(one.item, "") for one in found]


def test_histories_of_any_lengths_keep_their_order(trained):
  rng = np.random.default_rng(1)
  histories = [[f"i{item}" for item in rng.integers(1, 38, size=length)] for length in rng.integers(1, 40, size=300)]
  together = trained.recommend(histories, k=3)
  assert len(together) == 300
  for at in range(0, 300, 37):
    alone = trained.recommend([histories[at]], k=3)[0]
    assert [one.item for one in together[at]] == [one.item for one in alone]
    np.testing.assert_allclose([one.score for one in together[at]], [one.score for one in alone], rtol=1e-4, atol=1e-5)


def test_the_model_is_the_best_one_on_validation(run):
  config, workdir = run
  result = json.loads((workdir / "result.json").read_text())
  trained = load(workdir)
  assert trained.step == result["best_step"]
  assert trained.record["config"]["seed"] == config.seed
  newest = load(workdir, step=result["steps"])
  assert checkpoint.hash_arrays(newest.params) == result["params_sha256"]


def test_recommended_targets_have_the_ranks_of_the_run(run):
  """Top-k and exact ranking agree: where a test target has rank r, it is recommended in place r."""
  config, workdir = run
  job, trained = make_job(config), load(workdir)
  corpus, positions = job.corpus, job.corpus.split.targets["test"]
  kept = pyarrow.parquet.read_table(workdir / "ranks.parquet").to_pydict()
  for row, position in enumerate(positions.tolist()):
    history = corpus.item_ids[corpus.items[corpus.offsets[row]:position]].tolist()
    target = str(corpus.item_ids[corpus.items[position]])
    assert (str(kept["user"][row]), str(kept["item"][row])) == (str(corpus.user_ids[row]), target)
    deny = set(history) - {target}
    [found] = trained.recommend([history], k=5, exclude_seen=False, deny=deny) if deny else [[]]
    place = [one.item for one in found].index(target) + 1 if target in [one.item for one in found] else None
    assert place == (kept["rank"][row] if kept["rank"][row] <= 5 else None)


def test_seen_items_are_left_out_unless_they_are_asked_for(trained):
  history = ["i3", "i4", "i5"]
  everything = len(trained.catalogue.item_ids)
  [without], [included] = (trained.recommend([history], k=everything, exclude_seen=seen) for seen in (True, False))
  assert {one.item for one in included} == set(trained.catalogue.item_ids)
  assert {one.item for one in without} == set(trained.catalogue.item_ids) - set(history)


def test_items_of_a_history_beyond_the_longest_input_count_as_seen(trained):
  history = [f"i{number}" for number in range(1, 21)]  # n is 8
  assert trained.config.data.max_length < len(history)
  assert not {one.item for one in trained.recommend([history], k=37)[0]} & set(history)


def test_allow_and_deny(trained):
  [found] = trained.recommend([["i1"]], k=10, allow=["i1", "i2", "i3", "i4"], deny=["i4"])
  assert {one.item for one in found} == {"i2", "i3"}
  with pytest.raises(ValueError, match="leave none of the 37 items"):
    trained.recommend([["i1"]], allow=["i4"], deny=["i4"])


def test_unknown_items_are_skipped_and_counted(trained, caplog):
  with caplog.at_level(logging.WARNING):
    found = trained.recommend([["i1", "x", "i2", "y", "x"], [], ["z"]], k=4)
  assert found[0] == trained.recommend([["i1", "i2"]], k=4)[0] and found[1:] == [[], []]
  assert "4 items of the histories are not in the catalogue" in caplog.text and "3 different ones" in caplog.text
  assert "2 of 3 histories hold no known item" in caplog.text


@pytest.mark.parametrize("histories,message", [
    ([["i1"], ["i1", "x"]], r"history 1 has unknown items, \['x'\]"), ([["i1"], []], "history 1 is empty")])
def test_strict_refuses_what_would_be_skipped(trained, histories, message):
  with pytest.raises(ValueError, match=message):
    trained.recommend(histories, strict=True)
  with pytest.raises(ValueError, match="deny holds 1 items that are not in the catalogue"):
    trained.recommend([["i1"]], deny=["nothing"], strict=True)


@pytest.mark.parametrize("histories", ["i1", ["i1", "i2"], [1], 5, [None], [{"i1", "i2"}], [{"i1": 1}]])
def test_one_history_in_place_of_a_list_of_them_is_refused(trained, histories):
  with pytest.raises(ValueError, match="list"):
    trained.recommend(histories)


@pytest.mark.parametrize("wrong, shown", [
    (["i1", "i2"], r"\['i1', 'i2'\]"), (True, "True"), (np.bool_(True), "np.True_"), (None, "None"), (1.0, "1.0"),
    (np.float32(1), r"np.float32\(1.0\)"), (b"i1", "b'i1'"), (("i1",), r"\('i1',\)"),
    (np.array([1]), r"array\(\[1\]\)")])
def test_what_is_no_id_is_refused(trained, wrong, shown, caplog):
  for ask, where in ((lambda: trained.recommend([["i1"], ["i2", wrong]], k=3), "history 1, item 1"),
                     (lambda: trained.recommend([["i1"]], k=3, deny=[wrong]), "deny, item 0"),
                     (lambda: trained.explain(["i1", wrong]), "item 1")):
    with pytest.raises(ValueError, match=rf"{where} is {shown}, not an id \(text or a whole number\)$"):
      ask()
  assert not caplog.records


@pytest.mark.parametrize("kind", [
    np.int8, np.int32, np.uint64, lambda row: np.array(row, object), jnp.array, tuple, iter])
def test_whole_numbers_of_any_kind_are_ids(kind):
  rows = [[101, 103, 102], [102, 102, 99]]
  numbered, unknown = Catalogue([101, 102, 103], [""] * 3, "here").number([kind(row) for row in rows])
  assert [found.tolist() for found in numbered] == [[1, 3, 2], [2, 2]] and unknown == [[], ["99"]]


@pytest.mark.parametrize("k", [0, -1, 38])
def test_k_lies_within_the_catalogue(trained, k):
  for ask in (lambda: trained.recommend([["i1"]], k=k), lambda: trained.similar(["i1"], k=k)):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the 37 items"):
      ask()


def test_nothing_in_nothing_out(trained):
  assert trained.recommend([]) == [] and trained.similar([]) == []


def test_any_sequence_is_a_history(trained):
  wanted = trained.recommend([["i1", "i2"]])
  assert trained.recommend([("i1", "i2")]) == trained.recommend(np.array([["i1", "i2"]])) == wanted
  assert trained.recommend([iter(["i1", "i2"])]) == wanted


def test_similar_items_are_those_of_the_closest_vectors(trained):
  [found] = trained.similar(["i7"], k=5)
  table = np.asarray(trained.params["embedding"]["item_table"], np.float64)[1:len(trained.catalogue.item_ids) + 1]
  unit = table / np.linalg.norm(table, axis=1, keepdims=True)
  cosine = unit @ unit[trained.catalogue.numbers["i7"] - 1]
  cosine[trained.catalogue.numbers["i7"] - 1] = -np.inf
  assert [one.item for one in found] == [trained.catalogue.item_ids[at] for at in np.argsort(-cosine)[:5]]
  np.testing.assert_allclose([one.score for one in found], np.sort(cosine)[::-1][:5], atol=1e-6)
  with pytest.raises(ValueError, match=r"unknown items \['x'\]"):
    trained.similar(["x"])


def test_similarity_of_gaussians_is_their_distance():
  """STOSA: the items themselves are scored as histories would be."""
  config = default()
  config.model.update({"backbone": "stosa", "width": 8, "ffn_width": 8, "layers": 1, "table_multiple": 8})
  config.data.max_length = 4
  backbone = build_backbone(finalize(config), 9)
  params = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  apply = jax.jit(lambda *args, method: backbone.apply({"params": params}, *args, method=method),
                  static_argnames="method")
  items = apply(jnp.arange(1, 4), method="items")
  found = backbone.compare_rows(items, apply(method="catalogue"))
  others = apply(jnp.arange(16), method="items")
  wanted = -wasserstein(items.mean[:, None], items.cov[:, None], others.mean[None], others.cov[None])
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("model_devices", [2, 8])
def test_devices_change_nothing(run, trained, model_devices):
  other = load(run[1], model_devices=model_devices)
  assert dict(other.mesh.shape) == {"data": 8 // model_devices, "model": model_devices}
  histories = [["i1"], ["i9", "i3", "i4"] * 5]
  for found, wanted in zip(other.recommend(histories, k=7), trained.recommend(histories, k=7), strict=True):
    assert [one.item for one in found] == [one.item for one in wanted]
    np.testing.assert_allclose([one.score for one in found], [one.score for one in wanted], rtol=1e-5, atol=1e-6)
  assert [one.item for one in other.similar(["i5"])[0]] == [one.item for one in trained.similar(["i5"])[0]]


def test_devices_that_cannot_share_the_tables_are_refused(run):
  with pytest.raises(ValueError, match="model_devices=3 must divide the 8 devices"):
    load(run[1], model_devices=3)


def test_a_fresh_process_gives_the_same(run, trained):
  """After a restart: the same items and scores to 1e-6, by the name that users know, and no training code is needed."""
  history = ["i9", "i3", "i4"]
  code = (f"import awrsr_jax, json; found, = awrsr_jax.load({str(run[1])!r}).recommend([{history!r}], k=5); "
          "print(json.dumps([[one.item, one.score] for one in found]))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  found, wanted = json.loads(done.stdout), trained.recommend([history], k=5)[0]
  assert [item for item, _ in found] == [one.item for one in wanted], done.stderr
  np.testing.assert_allclose([score for _, score in found], [one.score for one in wanted], rtol=1e-6, atol=1e-6)


def test_ids_that_were_numbers_come_back_as_numbers(tmp_path):
  config = tiny_config.get_config()
  config.train.epochs = 1
  train(config, tmp_path)
  trained = awrsr_jax.load(tmp_path)
  [found] = trained.recommend([[1, "2", 3]], k=3)
  assert all(type(one.item) is int for one in found) and found == trained.recommend([["1", 2, np.int64(3)]], k=3)[0]
  assert all(type(one.score) is float for one in found)


# --- ranking again


def test_a_run_that_is_evaluated_again_gives_its_own_numbers_and_is_left_as_it_is(run):
  before = {path: path.stat().st_mtime_ns for path in run[1].rglob("*")}
  found, result = evaluate(run[1]), json.loads((run[1] / "result.json").read_text())
  assert found == {key: result[key] for key in ("protocol", "valid", "test")} | {"step": result["best_step"]}
  assert before == {path: path.stat().st_mtime_ns for path in run[1].rglob("*")}


def test_a_run_is_evaluated_under_another_protocol(run, monkeypatch):
  monkeypatch.setattr(batches, "NUM_CANDIDATES", 5)
  found = evaluate(run[1], "popular100")
  assert found["protocol"].count("SAMPLED") == 1 and found["test"]["hr@10"] == found["valid"]["hr@10"] == 1
  assert 0 < found["test"]["hr@1"] < 1
  found, full = evaluate(run[1], "unfiltered"), evaluate(run[1], "full")
  assert "NOT filtered" in found["protocol"] and found["test"]["mrr"] < full["test"]["mrr"]


def test_the_command_that_evaluates_names_its_own_flag(run):
  command = [sys.executable, "-m", "awrsr_jax.evaluate", f"--workdir={run[1]}", "--protocol=uniform100"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and done.stderr.endswith("; use --protocol=full\n"), done.stderr


def test_a_run_is_evaluated_on_data_that_moved(run, tmp_path):
  log = run[1].parent / "log.csv"
  moved = shutil.move(log, tmp_path / "moved.csv")
  try:
    with pytest.raises(ValueError, match="log.csv cannot be read as the data of .*: no such file.*--data_path=PATH"):
      evaluate(run[1])
    result = json.loads((run[1] / "result.json").read_text())
    assert evaluate(run[1], data_path=moved)["test"] == result["test"]
  finally:
    shutil.move(moved, log)


def test_a_run_is_evaluated_on_its_own_data_alone(run, tmp_path):
  lines = (run[1].parent / "log.csv").read_text().splitlines()
  for name, words, changed in (("fewer", "corpus differ, 50 users", lines[:-1]),
                               ("renamed", "raw item ids differ", [line.replace(",i", ",x") for line in lines])):
    changed[0] = lines[0]
    (tmp_path / f"{name}.csv").write_text("\n".join(changed) + "\n")
    with pytest.raises(ValueError, match=f"{name}.csv is not the data of .*{words}.*--data_path=PATH says where"):
      evaluate(run[1], data_path=str(tmp_path / f"{name}.csv"))


# --- what is no run


@pytest.fixture
def copied(run, tmp_path):
  return shutil.copytree(run[1], tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  for folder in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(ValueError, match="is no run folder: it has neither checkpoints nor config.json"):
      load(folder)
  assert not (tmp_path / "nowhere").exists()


def test_the_checkpoints_alone_are_enough(run, trained, tmp_path):
  shutil.copytree(run[1] / "checkpoints", tmp_path / "checkpoints")
  histories = [trained.catalogue.item_ids[:4]]
  assert load(tmp_path, step=trained.step).recommend(histories, k=3) == trained.recommend(histories, k=3)


def test_a_run_without_a_finished_checkpoint_is_refused(copied):
  steps = sorted(int(path.name) for path in (copied / "checkpoints").iterdir() if path.name.isdigit())
  for step in steps:
    (copied / "checkpoints" / str(step)).rename(copied / "checkpoints" / f"{step}.orbax-checkpoint-tmp-1")
  with pytest.raises(ValueError, match="has no finished checkpoint yet"):
    load(copied)
  shutil.rmtree(copied / "checkpoints")
  with pytest.raises(ValueError, match="has no checkpoint yet"):
    load(copied)
  assert not (copied / "checkpoints").exists()


def test_a_step_that_is_not_there_is_refused(copied):
  with pytest.raises(ValueError, match=r"has no checkpoint of step 7; it has \["):
    load(copied, step=7)


def test_a_run_that_goes_on_has_a_best_so_far(copied, caplog):
  (copied / "result.json").unlink()
  with caplog.at_level(logging.WARNING):
    found = load(copied)
  newest = max(int(path.name) for path in (copied / "checkpoints").iterdir())
  with checkpoint.open_checkpoints(copied, read_only=True) as manager:
    best = checkpoint.read_record(manager, newest)["best_step"]
  assert found.step == best or (best == 0 and found.step == newest)
  assert "is not complete: step" in caplog.text


def test_a_best_checkpoint_that_is_gone_is_named(copied):
  result = json.loads((copied / "result.json").read_text())
  result["best_step"] = 777
  (copied / "result.json").write_text(json.dumps(result))
  with pytest.raises(ValueError, match="the best one, step 777, is gone.*There are others: step="):
    load(copied)


def test_a_damaged_checkpoint_is_named_and_not_moved(copied):
  step = load(copied).step
  before = sorted(path.relative_to(copied) for path in copied.rglob("*"))
  for path in (copied / "checkpoints" / str(step) / "state").rglob("*"):
    if path.is_file() and path.stat().st_size > 500 and "d" in path.parts[-2:-1]:
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 255
      path.write_bytes(bytes(content))
  with pytest.raises(ValueError, match=f"checkpoint {step} of .* cannot be loaded"):
    load(copied)
  assert sorted(path.relative_to(copied) for path in copied.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_read_now_is_named(copied, monkeypatch):
  def fail(*_, **__):
    raise PermissionError(13, "Permission denied")
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
  with pytest.raises(ValueError, match=r"cannot be loaded: checkpoints cannot be read now \(PermissionError: "):
    load(copied)


@pytest.mark.parametrize("change,message", [
    (lambda record: record.update(schema=1), "its schema is 1, this version reads 2"),
    (lambda record: record["config"]["model"].update(new_key=3), r"no config keys \['model.new_key'\]"),
    (lambda record: record["config"]["model"].update(refine="unheard"), "does not take: config.model.refine='unhe")])
def test_a_checkpoint_of_another_version_is_refused(copied, monkeypatch, change, message):
  genuine = checkpoint.check_record

  def changed(stored):
    change(stored["content"])
    return genuine({"content": stored["content"], "sha256": checkpoint.hash_json(stored["content"])})

  monkeypatch.setattr(checkpoint, "check_record", changed)
  with pytest.raises(ValueError, match=message):
    load(copied)


def test_a_checkpoint_from_before_a_key_was_added_has_its_default(copied, monkeypatch):
  genuine = checkpoint.check_record

  def changed(stored):
    record = genuine(stored)
    del record["config"]["eval"]["keep_ranks"]
    return record

  monkeypatch.setattr(checkpoint, "check_record", changed)
  assert load(copied).config.eval.keep_ranks is True


def test_loading_does_not_need_the_data_and_changes_nothing(copied, run):
  before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
  (copied.parent / "log.csv").unlink(missing_ok=True)
  load(copied).recommend([["i1"]])
  assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
