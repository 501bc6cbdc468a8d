"""Run folders as they are read: complete runs, groups over seeds, and runs that cannot be compared."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from awrsr_jax.analysis import runs
from awrsr_jax.config import default
from awrsr_jax.engine import ranking, run_folder

PROTOCOL = ranking.describe_protocol("full", "leave-one-out")
CORPUS = {"name": "by hand", "fingerprint": "f1", "numbering": "n1", "users": 4, "items": 9, "interactions": 30}
LINES = [{"step": 3, "epoch": 1, "split": "train", "loss": 2.5}, {"step": 6, "epoch": 2, "split": "train", "loss": 1.5},
         {"step": 6, "epoch": 2, "split": "valid", "ndcg@10": 0.25}]


def write_run(folder, ranks=(1, 2.5, 11, 4), users=None, protocol=PROTOCOL, corpus=None, items=None, **values):
  """Writes what a complete run leaves, apart from checkpoints, with config values at dotted keys ("model__refine").

  Returns:
    The folder, as text.
  """
  folder.mkdir(parents=True, exist_ok=True)
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  (folder / "corpus.json").write_text(json.dumps(CORPUS | (corpus or {})))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
  ranks = np.asarray(ranks, np.float32)
  (folder / "result.json").write_text(json.dumps({"test": ranking.summarize(ranks), "protocol": protocol}))
  everyone = np.arange(len(ranks))
  pyarrow.parquet.write_table(pyarrow.table({
      "user": everyone if users is None else users, "item": everyone % 9 if items is None else items, "rank": ranks,
      "history": np.full(len(ranks), 5, np.int32), "trained": everyone}), folder / "ranks.parquet")
  return str(folder)


# --- one run


def test_a_run_is_what_its_folder_says(tmp_path):
  run = runs.read_run(write_run(tmp_path / "a", seed=3, model__refine="none"))
  assert run.folder == str(tmp_path / "a") and run.seed == 3
  assert run.config["model.refine"] == "none" and run.config["model.awr.rank"] == default().model.awr.rank
  assert run.corpus == CORPUS and run.metrics == LINES and run.result["protocol"] == PROTOCOL
  assert run.ranks["rank"].tolist() == [1, 2.5, 11, 4] and run.ranks["user"].tolist() == [0, 1, 2, 3]


def test_a_curve_is_of_one_split_and_one_name(tmp_path):
  run = runs.read_run(write_run(tmp_path / "a"))
  assert [values.tolist() for values in run.curve("train", "loss")] == [[3, 6], [1, 2], [2.5, 1.5]]
  assert [values.tolist() for values in run.curve("valid", "ndcg@10")] == [[6], [2], [0.25]]
  assert [values.tolist() for values in run.curve("valid", "loss")] == [[], [], []]


def test_a_key_that_a_run_did_not_know_has_its_default(tmp_path):
  new = write_run(tmp_path / "new", seed=1)
  old = write_run(tmp_path / "old", seed=0)
  config = json.loads((tmp_path / "old/config.json").read_text())
  del config["train"]["clip_norm"], config["model"]["awr"]
  (tmp_path / "old/config.json").write_text(json.dumps(config))
  assert list(map(len, runs.group([runs.read_run(old), runs.read_run(new)]).values())) == [2]


@pytest.mark.parametrize("name, content, words", [
    ("config.json", None, "is no run folder.*--workdir"), ("result.json", None, "not complete, it has no result.json"),
    ("corpus.json", None, "corpus.json cannot be read"), ("metrics.jsonl", None, "metrics.jsonl cannot be read"),
    ("config.json", "{", "config.json cannot be read"), ("result.json", "", "result.json cannot be read"),
    ("metrics.jsonl", json.dumps(LINES[0]) + '\n{"st', "metrics.jsonl:2 is damaged"),
    ("metrics.jsonl", json.dumps(LINES[0]) + "\n5\n", "metrics.jsonl:2 is damaged .*no object.*take the line out"),
    ("metrics.jsonl", '["step", "epoch", "split"]', "metrics.jsonl:1 is damaged"),
    ("metrics.jsonl", '{"step": 1, "split": "train"}', "metrics.jsonl:1 is damaged")])
def test_what_is_missing_or_damaged_is_named(name, content, words, tmp_path):
  folder = write_run(tmp_path / "a")
  runs.read_run(folder)
  (tmp_path / "a" / name).unlink()
  if content is not None:
    (tmp_path / "a" / name).write_text(content)
  with pytest.raises(ValueError, match=words):
    runs.read_run(folder)


@pytest.mark.parametrize("content", [None, b"PAR1 and no more"])
def test_a_run_without_ranks_says_so_when_they_are_asked_for(content, tmp_path):
  folder = write_run(tmp_path / "a")
  (tmp_path / "a/ranks.parquet").unlink()
  if content:
    (tmp_path / "a/ranks.parquet").write_bytes(content)
  run = runs.read_run(folder)
  with pytest.raises(ValueError, match="ranks.parquet cannot be read .*keep_ranks"):
    _ = run.ranks


# --- groups


def read_all(folder, *settings):
  """Returns runs of seeds 0, 1, .. with config values at dotted keys."""
  return [runs.read_run(write_run(folder / str(place), **{"seed": place} | values))
          for place, values in enumerate(settings)]


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path):
  read = read_all(tmp_path, {"model__refine": "none"}, {}, {"model__refine": "none"}, {})
  groups = runs.group(read)
  assert list(groups) == ["refine=none", "refine=value"]  # the order of the runs, not of the alphabet
  assert [[run.seed for run in members] for members in groups.values()] == [[0, 2], [1, 3]]
  assert list(runs.group(read[::-1])) == ["refine=value", "refine=none"]


def test_what_changes_no_figure_makes_no_group(tmp_path):
  read = read_all(tmp_path, {}, {"data__path": "elsewhere"}, {"mesh__data": 4}, {"eval__keep_ranks": False},
                  {"data__feed": "host"})
  assert list(runs.group(read)) == ["sasrec, refine=value"] and "eval.keep_ranks" in run_folder.FREE_KEYS


def test_runs_of_more_epochs_are_another_group(tmp_path):
  assert list(runs.group(read_all(tmp_path, {"train__epochs": 5}, {"train__epochs": 7}))) == ["epochs=5", "epochs=7"]


def test_a_group_is_named_by_all_that_tells_it_apart(tmp_path):
  read = read_all(tmp_path, {"model__refine": "none"}, {"model__awr__rank": 4}, {"model__awr__rank": 8})
  rank = default().model.awr.rank
  assert list(runs.group(read)) == [f"rank={rank}, refine=none", "rank=4, refine=value", "rank=8, refine=value"]


def test_names_that_would_be_unclear_are_whole_keys(tmp_path):
  read = read_all(tmp_path, {}, {"model__dropout": 0.5}, {"model__attention__dropout": 0.5})
  assert list(runs.group(read))[1:] == ["model.attention.dropout=None, model.dropout=0.5",
                                        "model.attention.dropout=0.5, model.dropout=0.2"]


def test_a_key_that_only_a_later_run_has_still_tells_apart(tmp_path):
  read = read_all(tmp_path, {}, {})
  read[1].config["model.of_the_future"] = 1
  assert list(runs.group(read)) == ["of_the_future=None", "of_the_future=1"]


def test_the_same_run_twice_is_no_second_sample(tmp_path):
  read = read_all(tmp_path, {}, {"seed": 0, "data__feed": "host"}, {"seed": 0, "model__refine": "none"})
  runs.group(read[::2])
  with pytest.raises(ValueError, match=r"/0 and .*/1 have the same config and the same seed 0; leave one out"):
    runs.group(read[:2])


# --- what may be compared


@pytest.mark.parametrize("values, words", [
    ({"protocol": ranking.describe_protocol("popular100", "leave-one-out")}, "protocol differ: .*full.* and .*SAMPLED"),
    ({"corpus": {"fingerprint": "f2"}}, "corpus .fingerprint. differ: f1 and f2"),
    ({"corpus": {"numbering": "n2"}}, "raw item ids differ: n1 and n2")])
def test_runs_that_rank_other_things_are_refused(values, words, tmp_path):
  first, same = runs.read_run(write_run(tmp_path / "a")), runs.read_run(write_run(tmp_path / "b"))
  other = runs.read_run(write_run(tmp_path / "c", **values))
  runs.check_comparable([first, same])
  with pytest.raises(ValueError, match=f"/a and .*/c cannot be compared, their {words}"):
    runs.check_comparable([first, same, other])


def test_another_name_of_a_corpus_does_not_matter(tmp_path):
  runs.check_comparable([runs.read_run(write_run(tmp_path / name, corpus={"name": name})) for name in "ab"])
