"""A declared grid: what is refused, which runs are made and in which order, what stops them, and the results page."""

import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from runs_test import write_run

from awrsr_jax import reproduce
from awrsr_jax.analysis import grid as grids
from awrsr_jax.analysis import results, runs, significance
from awrsr_jax.analysis.grid import COMPLETE, DIFFERS, MISSING, STARTED, Anchor, Cost, Table, make_grid, read_state
from awrsr_jax.analysis.text import show_metric
from awrsr_jax.config import walk
from awrsr_jax.engine import processes, ranking
from awrsr_jax.engine.run_folder import check_same_config, lock_folder, nest, read_ranks

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "tests/tiny_config.py")
ROWS = {"none": {"model.refine": "none"}, "value": {"model.refine": "value"}}
RANKS = np.array([1, 2.5, 11, 4, 30, 7, 2, 15], np.float32)


def table(key="T one", rows=None, **fields):
  """Returns a table of two rows and two seeds."""
  return Table(key, "A title", "What is asked.", TINY, ROWS if rows is None else rows,
               **{"seeds": (0, 1), "overrides": {"train.epochs": 2}} | fields)


def plan(*tables):
  return make_grid(tables or [table()], "grid.py")


def finish(planned, out, ranks=RANKS, epochs=None, **result):
  """Writes what a run leaves when it is complete."""
  folder = pathlib.Path(out) / planned.folder
  write_run(folder, ranks)
  (folder / "config.json").write_text(json.dumps(nest(planned.values | {"data.path": "/elsewhere"})))
  path = folder / "result.json"
  found = json.loads(path.read_text())
  path.write_text(json.dumps(found | {
      "valid": found["test"], "epochs": epochs or planned.values["train.epochs"], "parameters": 1234,
      "wall_time_s": 90.0 + planned.seed * 60, "device": "1 x test (cpu)", "versions": {"jax": "0.1"},
      "peak_memory": {"host": 3 * 2**20}} | result))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [
      *({"step": step, "epoch": 1, "split": "train", "loss": 1.0, "interactions_per_sec": 10.0}
        for step in (1, 2, 30)), {"step": 3, "epoch": 1, "split": "valid", "ndcg@10": 0.25}]))


class Fake:
  """Processes that are none: each run does what `acts` says, once a start; others complete at once."""

  def __init__(self, grid, out, acts=None):
    self.by_folder = {planned.folder: planned for planned in grid.runs}
    self.out, self.acts, self.started, self.most = out, acts or {}, [], 0
    self.alive = []

  def __call__(self, command, log, share):
    planned = self.by_folder[str(log.parent.relative_to(self.out))]
    self.started.append(planned.names[0])
    log.parent.parent.mkdir(parents=True, exist_ok=True)
    act = self.acts.get(planned.names[0], [])
    process = FakeProcess(act.pop(0) if act else 0, lambda: finish(planned, self.out))
    process.cores = share.cores
    assert not any(other.left > 0 and other.cores & share.cores for other in self.alive)
    self.alive.append(process)
    self.most = max(self.most, sum(other.left > 0 for other in self.alive))
    return process


class FakeProcess:
  """Ends with a code at the second look; code None: when it is told to."""

  def __init__(self, code, complete):
    self.code, self.complete, self.left, self.told = code, complete, 2, False

  def poll(self):
    self.left -= self.left > 0 and (self.code is not None or self.told)
    if self.left:
      return None
    if self.code == 0 and self.complete:
      self.complete()
      self.complete = None
    return processes.TRY_AGAIN if self.told else self.code

  def terminate(self):
    self.told = True

  def wait(self):
    self.left = 0

  kill = terminate


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
  monkeypatch.setattr(reproduce, "PAUSE_S", 0)


def go(grid, out, acts=None, jobs=1, told_to_stop=lambda: False, only=None):
  """Runs a grid with fake processes. Returns them and the runs that failed."""
  fake, after = Fake(grid, out, acts), []
  failed = reproduce.run_all(reproduce.select(grid, only), str(out), None, jobs, lambda: after.append(1), told_to_stop,
                             fake)
  fake.after = len(after)
  return fake, failed


# --- what is declared


def test_the_declared_grid_is_valid(monkeypatch):
  monkeypatch.chdir(ROOT)
  grid = grids.load_grid("configs/grids/results.py")
  assert {table.key[0] for table in grid.tables} == set("ABCD")
  assert all("model.refine" in planned.overrides for planned in grid.runs)  # none is what a config file happens to have
  assert {planned.seed for planned in grid.by_row["B beauty", "value"]} == {0, 1, 2, 3, 4}
  baselines = [grid.by_row[table.key, next(iter(table.rows))] for table in grid.tables if isinstance(table, Table)]
  assert {planned.values["model.refine"] for row in baselines for planned in row} == {"none"}
  # said twice, and the same
  assert grid.by_row["C start sports", "co-occurrence"] == grid.by_row["B sports", "none"][:2]
  newest = grid.by_row["B ml1m newest", "none"]
  assert grid.by_row["C start ml1m", "random item vectors"] == newest == grid.by_row["C windows", "the newest n items"]
  assert grid.by_row["C windows", "all, in windows of n"] == grid.by_row["B ml1m", "none"][:2]
  assert grid.by_row["C recipe", "the recipe, width 128"] == grid.by_row["B beauty 128", "none"]
  assert grid.by_row["C recipe", "width 256"] == grid.by_row["B beauty", "none"][:2]


@pytest.mark.parametrize("tables, words", [
    ([], "no tables"),
    ([table(), table()], "'T one' and 'T one' make one folder"),
    ([table("T one"), table("t_ONE")], "make one folder"),
    ([table("?!")], "'\\?!' makes no folder"),
    ([table(rows={})], "has no rows"),
    ([table(rows={"a b": {}, "a_b": {"model.layers": 2}})], "'a b' and 'a_b' make one folder"),
    ([table(rows={"a": {}, "b": {"train.epochs": 2}})], "rows 'a' and 'b' are one experiment"),
    ([table(rows={"a": {"model.refin": "none"}})],
     "row 'a': the config has no key 'model.refin'; did you mean model.refine"),
    ([table(rows={"a": {"model.refine": "non"}})], "row 'a', seed 0: config.model.refine='non' is not one of none"),
    ([table(rows={"a": {"model.layers": "two"}})], "row 'a', seed 0"),
    ([table(rows={"a": {"model.heads": 3}})], "heads=3 does not divide"),
    ([table(rows={"a": {"seed": 3}})], "seed is no override"),
    ([table(rows={"a": {"data.path": "x"}})], "data.path is no override"),
    ([table(rows={"a": {"train.patience": None}})], "cannot be given by a flag"),
    ([table(seeds=())], "seeds=\\(\\)"), ([table(seeds=(0, 0))], "each once"), ([table(seeds=(0.5,))], "whole numbers"),
    ([table(anchors=[Anchor("x", {"test ndcg@9": 0.1}, "y")])], "anchor 'x' needs"),
    ([table(anchors=[Anchor("x", {"test mrr": 0.1}, "")])], "needs a source"),
    ([table(), Cost("D", "t", "t", ("T two",))], "'T two'.* must name tables with runs"),
    ([Table("T", "t", "t", "nowhere.py", ROWS)], "config=nowhere.py: no such file"),
    ([Table("T", "t", "t", __file__, ROWS)], "has no function get_config")])
def test_what_says_nothing_is_refused(tables, words):
  with pytest.raises(ValueError, match=f"grid.py.*{words}"):
    make_grid(tables, "grid.py")


def test_a_grid_file_that_is_none_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such file"):
    grids.load_grid(tmp_path / "none.py")
  (tmp_path / "empty.py").write_text("")
  with pytest.raises(ValueError, match="has no function get_grid"):
    grids.load_grid(tmp_path / "empty.py")


def test_runs_go_by_seed_then_table_then_row():
  grid = plan(table(), table("T two", {"deep": {"model.layers": 3}}, seeds=(2, 0)))
  assert [planned.names[0] for planned in grid.runs] == [
      "T one/none/seed_0", "T one/value/seed_0", "T two/deep/seed_0", "T one/none/seed_1", "T one/value/seed_1",
      "T two/deep/seed_2"]


def test_equal_experiments_are_one_run_in_the_folder_of_the_first_table():
  rows = {"plain": {"model.refine": "none", "model.layers": 1}, "rank": {"model.awr.rank": 9}}  # 1 is the config's own
  grid = plan(table(), table("T two", rows, seeds=(1, 2)))
  shared, own = grid.by_row["T two", "plain"]
  assert shared is grid.by_row["T one", "none"][1] and shared.folder == "T_one/none/seed_1"
  assert shared.names == ("T one/none/seed_1", "T two/plain/seed_1") and own.folder == "T_two/plain/seed_2"
  assert len(grid.runs) == 7
  assert reproduce.select(grid, "T two/plain/seed_1") == [shared]
  assert len(plan(table(data="a"), table("T two", data="b")).runs) == 8  # other data, another experiment


def test_a_command_says_all_that_differs():
  planned = plan(table(data="log.txt", rows={"a": {"model.awr.gate": 0.1, "model.faithful": False}})).runs[1]
  assert planned.command("OUT", "DATA") == [
      "python", "-m", "awrsr_jax.main", f"--config={TINY}", "--config.data.path=DATA/log.txt",
      "--config.eval.hash_ids=True", "--config.train.epochs=2", "--config.model.awr.gate=0.1",
      "--config.model.faithful=False", "--config.seed=1", "--workdir=OUT/T_one/a/seed_1"]
  assert planned.command("OUT", "DATA", seed="$seed")[-2:] == [
      "--config.seed=$seed", "--workdir=OUT/T_one/a/seed_$seed"]


# --- how far a run is


def test_states(tmp_path):
  planned = plan().runs[0]
  assert read_state(planned, tmp_path) == (MISSING, "")
  (tmp_path / planned.folder).mkdir(parents=True)
  (tmp_path / planned.folder / "log.txt").write_text("failed before it began")
  assert read_state(planned, tmp_path) == (MISSING, "")
  (tmp_path / planned.folder / "log.txt").unlink()
  (tmp_path / planned.folder).rmdir()
  finish(planned, tmp_path)
  assert read_state(planned, tmp_path) == (COMPLETE, "")
  (tmp_path / planned.folder / "result.json").rename(tmp_path / "result.json")
  assert read_state(planned, tmp_path) == (STARTED, "")


@pytest.mark.parametrize("change, state, words", [
    ({"mesh.data": 4, "train.log_every": 7, "data.feed": "host"}, COMPLETE, ""),  # changes no figure
    ({"train.epochs": 1}, STARTED, ""), ({"train.epochs": 3}, DIFFERS, "epochs: 3 there, 2 declared"),
    ({"model.layers": 2}, DIFFERS, "config.model.layers: 2 there, 1 declared"),
    ({"seed": 1}, DIFFERS, "config.seed: 1 there, 0 declared"),
    ({"of.the_future": 1}, DIFFERS, "of.the_future: 1 there, None declared")])
def test_a_folder_of_another_config_is_not_the_run(change, state, words, tmp_path):
  grid = plan()
  planned = grid.runs[0]
  finish(planned, tmp_path, epochs=change.get("train.epochs"))
  (tmp_path / planned.folder / "config.json").write_text(json.dumps(nest(planned.values | change)))
  found, why = read_state(planned, tmp_path)
  assert found == state and words in why
  if state == DIFFERS:
    with pytest.raises(ValueError, match="T_one/none/seed_0.*Move them away"):
      grids.read_states(grid, tmp_path)


def test_a_key_that_the_run_did_not_know_has_its_default(tmp_path):
  planned = plan().runs[0]
  finish(planned, tmp_path)
  values = {key: value for key, value in planned.values.items() if key != "train.clip_norm"}
  (tmp_path / planned.folder / "config.json").write_text(json.dumps(nest(values)))
  assert read_state(planned, tmp_path) == (COMPLETE, "")


# --- running


def test_complete_runs_are_skipped_and_each_new_one_is_reported(tmp_path, capsys):
  grid = plan()
  finish(grid.runs[1], tmp_path)
  fake, failed = go(grid, tmp_path)
  assert fake.started == ["T one/none/seed_0", "T one/none/seed_1", "T one/value/seed_1"] and failed == []
  assert fake.after == 3 and fake.most == 1
  ndcg = show_metric(ranking.summarize(RANKS)["ndcg@10"])
  assert f"T one/none/seed_1: test NDCG@10 {ndcg}, 0.0 minutes" in capsys.readouterr().out
  assert go(grid, tmp_path)[0].started == []


def test_a_run_that_fails_stops_no_other(tmp_path, capsys):
  grid = plan()
  fake, failed = go(grid, tmp_path, {"T one/none/seed_0": [1], "T one/value/seed_1": [-9]})
  assert len(fake.started) == 4 and fake.after == 2
  assert failed == ["T one/none/seed_0 (code 1: it wrote nothing)",
                    "T one/value/seed_1 (killed by signal 9: it wrote nothing)"]
  assert go(grid, tmp_path)[0].started == ["T one/none/seed_0", "T one/value/seed_1"]
  assert "T one/none/seed_0: FAILED, code 1" in capsys.readouterr().out


def test_code_75_starts_again_three_times_and_no_more(tmp_path):
  name = "T one/none/seed_0"
  fake, failed = go(plan(), tmp_path / "a", {name: [75, 75, 75, 0]}, only=name)
  assert fake.started == [name] * 4 and not failed and fake.after == 1
  fake, failed = go(plan(), tmp_path / "b", {name: [75] * 9}, only=name)
  assert fake.started == [name] * 4 and failed == [f"{name} (code 75: it wrote nothing)"]


def test_a_run_that_another_process_has_waits_and_is_no_failure(tmp_path, capsys):
  grid, locks = plan(), []
  fake = Fake(grid, tmp_path, {"T one/value/seed_0": [1]})

  def take(planned):
    locks.append(lock_folder(epath.Path(tmp_path) / planned.folder))

  def start(command, log, share):  # the other one is faster with value/seed_0
    process = fake(command, log, share)
    if fake.started == ["T one/value/seed_0"]:
      take(grid.runs[1])
    return process

  take(grid.runs[0])
  free = lambda: [lock.close() for lock in locks]  # noqa: E731
  assert reproduce.run_all(grid.runs, str(tmp_path), None, 1, free, start=start) == []
  assert fake.started == [f"T one/{run}" for run in (
      "value/seed_0", "none/seed_1", "value/seed_1", "none/seed_0", "value/seed_0")]
  assert capsys.readouterr().out.count("in use by another process") == 1


def test_code_0_without_a_result_is_a_failure(tmp_path, monkeypatch):
  monkeypatch.setattr(reproduce, "read_state", lambda planned, out: (STARTED, ""))
  assert go(plan(), tmp_path, only="none/seed_0")[1] == [
      "T one/none/seed_0 (it ended with code 0 and is not complete)"]


@pytest.mark.parametrize("jobs", [2, 3])
def test_so_many_runs_at_a_time(jobs, tmp_path):
  fake, failed = go(plan(), tmp_path, jobs=jobs)
  assert fake.most == jobs and len(fake.started) == 4 and not failed


@pytest.mark.parametrize("cores, jobs, shares", [
    ({0, 1}, 1, [{0, 1}]), ({4, 2, 7}, 2, [{2}, {4, 7}]), ({3, 5}, 2, [{3}, {5}]), ({1}, 2, [set(), set()])])
def test_runs_at_a_time_share_the_cores(cores, jobs, shares, monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
  assert [share.cores for share in reproduce.share_machine(jobs)] == shares


@pytest.mark.parametrize("jobs, said, wanted", [
    (1, {}, {}), (2, {}, {"XLA_CLIENT_MEM_FRACTION": "0.450"}), (3, {}, {"XLA_CLIENT_MEM_FRACTION": "0.300"}),
    (2, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}, {}), (2, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {})])
def test_runs_at_a_time_share_the_memory_of_an_accelerator(jobs, said, wanted, monkeypatch):
  for name in reproduce.MEMORY:
    monkeypatch.delenv(name, raising=False)
  for name, value in said.items():
    monkeypatch.setenv(name, value)
  assert [share.environment for share in reproduce.share_machine(jobs)] == [wanted] * jobs


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores here")
def test_a_run_has_its_share(tmp_path):
  core = min(os.sched_getaffinity(0))
  show = "import os, time; time.sleep(.2); print(os.sched_getaffinity(0), os.environ['A'])"  # it is bound when it runs
  share = reproduce.Share(frozenset({core}), {"A": "as told"})
  assert reproduce.launch([sys.executable, "-c", show], tmp_path / "log.txt", share).wait() == 0
  assert (tmp_path / "log.txt").read_text().endswith(f"{{{core}}} as told\n")


def test_told_to_stop_ends_all_runs_and_starts_no_more(tmp_path):
  grid, looks = plan(), []
  acts = {"T one/none/seed_0": [None], "T one/value/seed_0": [None]}
  fake = Fake(grid, tmp_path, acts)
  with pytest.raises(processes.Preempted, match="2 runs were stopped and 2 not started"):
    reproduce.run_all(grid.runs, str(tmp_path), None, 2, lambda: None, lambda: looks.append(1) or len(looks) > 5, fake)
  assert len(fake.started) == 2 and all(process.told for process in fake.alive)


def test_an_error_leaves_no_run_behind(tmp_path):
  fake = Fake(plan(), tmp_path, {"T one/value/seed_0": [None]})

  def break_off():
    raise RuntimeError

  with pytest.raises(RuntimeError):
    reproduce.run_all(plan().runs, str(tmp_path), None, 2, break_off, start=fake)
  assert fake.alive[1].told and fake.alive[1].left == 0


def test_only_selects_by_any_name(tmp_path):
  grid = plan(table(), table("T two", {"plain": {"model.refine": "none"}}))
  names = lambda only: [planned.names[0] for planned in reproduce.select(grid, only)]  # noqa: E731
  assert names("T one/(none|value)/seed_0") == ["T one/none/seed_0", "T one/value/seed_0"]
  assert names("two") == ["T one/none/seed_0", "T one/none/seed_1"]
  assert names("T_one/value") == ["T one/value/seed_0", "T one/value/seed_1"] and len(names(None)) == 4
  for only, words in (("(", "no regular expression"), ("three", "none of the 4 runs of grid.py is named so")):
    with pytest.raises(ValueError, match=words):
      names(only)


def test_hosts_share_the_runs():
  grid = plan()
  parts = [reproduce.select(grid, part=f"{host}/3") for host in (1, 2, 3)]
  assert [len(part) for part in parts] == [2, 1, 1]
  assert sorted((planned for part in parts for planned in part), key=grid.runs.index) == grid.runs
  assert reproduce.select(grid, "value", "2/2") == [grid.runs[3]]
  for part, words in (("0/2", "must be K/N"), ("2", "must be K/N"), ("-1/2", "must be K/N"), ("5/5", "only 4 runs")):
    with pytest.raises(ValueError, match=words):
      reproduce.select(grid, part=part)


def test_data_that_is_not_there_is_named_before_anything_runs(tmp_path):
  wanted = plan(table(data="log.txt")).runs
  with pytest.raises(ValueError, match="--data=FOLDER is missing; it is where log.txt"):
    reproduce.check_data(wanted, None)
  with pytest.raises(ValueError, match="has no log.txt"):
    reproduce.check_data(wanted, str(tmp_path))
  (tmp_path / "log.txt").touch()
  reproduce.check_data(wanted, str(tmp_path))
  reproduce.check_data(plan().runs, None)


def test_a_list_has_state_and_command_of_every_run(tmp_path, capsys):
  grid = plan()
  finish(grid.runs[0], tmp_path)
  finish(grid.runs[1], tmp_path)
  (tmp_path / grid.runs[1].folder / "result.json").unlink()
  reproduce.print_list(grid.runs, str(tmp_path), None)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "complete  T one/none/seed_0" and lines[2] == "started   T one/value/seed_0"
  assert lines[4] == "missing   T one/none/seed_1" and "--config.model.refine=none" in lines[5]
  assert lines[-1] == "4 runs: 1 complete, 1 started, 2 missing"


# --- the page


def write_page(grid, out, page):
  """Writes the page. Returns its text and row name -> cells by title, of its first table."""
  results.write_results(grid, out, page)
  text = page.read_text()
  lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
           for line in text.splitlines() if line.startswith("|")]
  first = lines[:next((k for k, line in enumerate(lines) if k and line[0] == "table"), len(lines))]
  return text, {line[0]: dict(zip(lines[0], line, strict=True)) for line in first[2:]}


@pytest.fixture
def seeds_of_three(tmp_path):
  """Two rows of three seeds, with ranks of their own. Returns grid, OUT and ranks by (row, seed)."""
  rng = np.random.default_rng(0)
  grid = plan(table(seeds=(0, 1, 2), anchors=[Anchor("Other|s", {"test ndcg@10": 0.0597}, "a log")]),
              Cost("D", "Cost", "What it costs.", ("T one",)))
  ranks = {}
  for row in ROWS:
    for planned in grid.by_row["T one", row]:
      ranks[row, planned.seed] = rng.integers(1, 40 if row == "none" else 12, 60).astype(np.float32)
      finish(planned, tmp_path / "out", ranks[row, planned.seed])
  return grid, tmp_path / "out", ranks


def test_the_numbers_of_the_page(seeds_of_three, tmp_path):
  grid, out, ranks = seeds_of_three
  text, cells = write_page(grid, out, tmp_path / "results.md")
  four = lambda value: f"{value:.4f}".removeprefix("0")  # noqa: E731
  for row in ROWS:
    hits = [np.mean(ranks[row, seed] <= 10) for seed in range(3)]
    gains = [np.mean((ranks[row, seed] <= 10) / np.log2(1 + ranks[row, seed])) for seed in range(3)]
    assert cells[row]["test HR@10"] == f"{four(np.mean(hits))} ± {four(statistics.stdev(hits))}"
    for column in ("test NDCG@10", "validation NDCG@10"):
      assert cells[row][column] == f"{four(np.mean(gains))} ± {four(statistics.stdev(gains))}"
    assert cells[row]["seeds"] == "3/3" and cells[row]["parameters"] == "1,234" and "minutes" not in cells[row]
  read = {row: [runs.read_run(out / planned.folder) for planned in grid.by_row["T one", row]] for row in ROWS}
  values = significance.compare(read)["metrics"]["ndcg@10"]["value"]
  low, high = values["relative_users_and_seeds"]
  assert cells["value"]["against none"] == f"{values['relative']:+.1f} % [{low:+.1f}, {high:+.1f}]"
  assert cells["value"]["over seeds"] == "3" and cells["value"]["p (Holm)"] == four(values["p_holm"])
  assert cells["none"]["against none"] == cells["none"]["p (Holm)"] == ""
  other = cells[r"*Other\|s (others: a log)*"]
  assert other["test NDCG@10"] == "*.0597*" and other["test HR@10"] == other["seeds"] == ""
  assert "6 of the 6 runs" in text and "Not complete" not in text
  assert "| T one | none | 3 | 1,234 | 2.5 ± 1.0 | host 3 MiB | 1 x test (cpu) |" in text  # 90, 150 and 210 s
  assert "Trained: 6 runs on 1 x test (cpu), jax 0.1." in text
  assert "for seed in 0 1 2; do" in text and text.count("--config.seed=$seed") == 2


def test_the_page_has_the_best_that_is_possible_where_the_law_of_the_data_is_known(tmp_path):
  grid, law = plan(), dict.fromkeys(("hr@1", "hr@10", "ndcg@5", "ndcg@10"), 0.75) | {"mrr": 0.625}
  for out, more in ((tmp_path / "data", {}), (tmp_path / "law", {"oracle": law})):
    for planned in grid.runs:
      finish(planned, out, **more)
  assert "best possible" not in write_page(grid, tmp_path / "data", tmp_path / "results.md")[0]
  best = write_page(grid, tmp_path / "law", tmp_path / "results.md")[1]["best possible, by the law of the data"]
  assert best["test NDCG@10"] == ".7500" and best["test MRR"] == ".6250"
  assert best["validation NDCG@10"] == best["seeds"] == ""


def test_missing_seeds_are_named_and_rows_are_compared_over_what_both_have(seeds_of_three, tmp_path):
  grid, out, ranks = seeds_of_three
  (out / "T_one/value/seed_1/result.json").unlink()
  for file in ("config.json", "result.json"):
    (out / "T_one/none/seed_2" / file).unlink()
  text, cells = write_page(grid, out, tmp_path / "results.md")
  assert "Not complete: none: seed 2 missing; value: seed 1 started." in text
  assert cells["none"]["seeds"] == cells["value"]["seeds"] == "2/3" and cells["value"]["over seeds"] == "1"
  base, other = (np.mean(significance.gains(ranks[row, 0], "ndcg@10")) for row in ROWS)
  shown = re.fullmatch(r"([+-][\d.]+) % \*\[.*\]\*", cells["value"]["against none"])  # in italics: users alone
  assert float(shown[1]) == round(100 * (other - base) / base, 1)


def test_p_values_are_corrected_for_all_rows_also_over_other_seeds(tmp_path):
  grid, rng = plan(table(rows=ROWS | {"deep": {"model.layers": 3}})), np.random.default_rng(1)
  for planned in grid.runs:
    if planned.names[0] != "T one/deep/seed_1":
      finish(planned, tmp_path / "out", rng.integers(1, 20, 40))
  _, cells = write_page(grid, tmp_path / "out", tmp_path / "results.md")
  assert [cells[row]["over seeds"] for row in ("value", "deep")] == ["2", "1"]
  p = []
  for row, seeds in (("value", 2), ("deep", 1)):
    read = {name: [runs.read_run(tmp_path / "out" / planned.folder) for planned in grid.by_row["T one", name][:seeds]]
            for name in ("none", row)}
    p.append(significance.compare(read)["metrics"]["ndcg@10"][row]["p"])
  assert [cells[row]["p (Holm)"] for row in ("value", "deep")] == list(
      map(show_metric, significance.correct_holm(p)))


def test_rows_without_a_common_seed_or_without_ranks_are_not_compared(tmp_path):
  grid = plan()
  finish(grid.by_row["T one", "none"][0], tmp_path / "out")
  finish(grid.by_row["T one", "value"][1], tmp_path / "out")
  text, cells = write_page(grid, tmp_path / "out", tmp_path / "results.md")
  assert "value is not compared: it has no complete seed that none has" in text and cells["value"]["over seeds"] == ""
  finish(grid.by_row["T one", "none"][1], tmp_path / "out")
  (tmp_path / "out/T_one/value/seed_1/ranks.parquet").unlink()
  assert re.search("value: not compared, .*ranks.parquet cannot be read",
                   write_page(grid, tmp_path / "out", tmp_path / "results.md")[0].replace("\\", ""))


def test_what_was_not_run_has_no_command_on_the_page(tmp_path, monkeypatch):
  grid = plan(table(), table("T two", {"deep": {"model.layers": 3}}))
  finish(grid.by_row["T one", "value"][1], tmp_path / "out")
  text, _ = write_page(grid, tmp_path / "out", tmp_path / "results.md")
  assert text.count("awrsr_jax.main") == 1 and "for seed in 0 1; do" in text
  assert "--config.seed=$seed --workdir=OUT/T_one/value/seed_$seed\n" in text  # and no path of this machine
  monkeypatch.chdir(tmp_path)
  assert "--workdir=out/T_one/value/seed_$seed\n" in write_page(grid, "out", tmp_path / "results.md")[0]
  assert "## T two" not in text and text.endswith("prints their commands.\n\n- T two: A title\n")


def test_the_same_folders_give_the_same_bytes(seeds_of_three, tmp_path):
  grid, out, _ = seeds_of_three
  found = []
  for name in "ab":
    results._compare.cache_clear()
    write_page(grid, out, tmp_path / name / "results.md")
    found.append({str(path.relative_to(tmp_path / name)): path.read_bytes()
                  for path in (tmp_path / name).rglob("*") if path.is_file()})
  assert found[0] == found[1] and found[0].keys() == {"results.md", "results/T_one.svg", "results/.lock"}
  assert str(tmp_path) not in found[0]["results.md"].decode()


def test_the_page_is_well_formed(seeds_of_three, tmp_path):
  grid, out, _ = seeds_of_three
  text, _ = write_page(grid, out, tmp_path / "results.md")
  assert text.startswith("# Results\n\n") and text.endswith("|\n") and "\n\n\n" not in text
  assert text.count("```") % 2 == 0
  for block in text.split("\n\n"):
    if block.startswith("|"):
      assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
      assert set(block.splitlines()[1]) == set("|- ")
  for link in re.findall(r"\]\(([^)]*)\)", text):
    assert (tmp_path / link).exists()


@pytest.mark.parametrize("file, key, words", [
    ("result.json", "protocol", "their protocol differ"), ("corpus.json", "fingerprint", "their corpus")])
def test_runs_that_do_not_belong_together_are_refused(file, key, words, seeds_of_three, tmp_path):
  grid, out, _ = seeds_of_three
  path = out / "T_one/value/seed_2" / file
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: "another"}))
  os.utime(out / "T_one/value/seed_2/result.json", (1, 1))
  with pytest.raises(ValueError, match=f"table 'T one': .*{words}"):
    results.write_results(grid, out, tmp_path / "results.md")
  assert not (tmp_path / "results.md").exists()


def test_the_published_page_says_what_the_published_runs_do():
  text, _ = results.render(grids.load_grid("configs/grids/results.py"), reproduce.RUNS, "results")
  assert text == (ROOT / "docs/results.md").read_text()


def test_the_commands_of_the_published_runs_go_on_with_them():
  folder, complete = ROOT / "docs/results/runs", 0
  for planned in grids.load_grid("configs/grids/results.py").runs:
    if grids.read_state(planned, folder)[0] == grids.COMPLETE:
      found = dict(walk(json.loads((folder / planned.folder / "config.json").read_text())))
      now = planned.values | {"seed": planned.seed, "data.path": found["data.path"]}
      check_same_config(folder, nest(found), now)
      complete += 1
  assert complete > 80


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_of_a_run_that_is_published_only_what_the_page_is_made_of_is_tracked():
  git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout  # noqa: E731
  kept = {"config.json", "corpus.json", "metrics.jsonl", "ranks.parquet", "result.json"}
  others = {"log.txt", ".lock", "config.json.tmp", "checkpoints/7/_METADATA", "tensorboard/events"}
  folder = "docs/results/runs/T/row/seed_0"
  ignored = git("check-ignore", "docs/results/.lock", *(f"{folder}/{name}" for name in kept | others)).splitlines()
  assert set(ignored) == {"docs/results/.lock", *(f"{folder}/{name}" for name in others)}
  files = [ROOT / name for name in git("ls-files", "-z", "docs/results/runs").split("\0")[:-1]]
  assert {path.name for path in files} == kept
  for path in files:  # no data, and no machine
    if path.name == "ranks.parquet":
      ranks = read_ranks(epath.Path(path))
      assert ranks["user"].tolist() == list(range(len(ranks["user"]))) and max(ranks["item"]) < 256
    elif path.name == "config.json":
      assert not pathlib.Path(json.loads(path.read_text())["data"]["path"]).is_absolute()


def test_hosts_read_and_write_one_after_the_other(tmp_path, monkeypatch):
  grid, render = plan(), results.render
  finish(grid.runs[0], tmp_path / "out")

  def look(*arguments):
    with pytest.raises(ValueError, match=f"--workdir={tmp_path / 'results'} is in use"):
      lock_folder(epath.Path(tmp_path / "results"))
    return render(*arguments)

  monkeypatch.setattr(results, "render", look)
  results.write_results(grid, tmp_path / "out", tmp_path / "results.md")
  lock_folder(epath.Path(tmp_path / "results")).close()


def test_the_page_has_what_others_ran_meanwhile(tmp_path, monkeypatch):
  (tmp_path / "grid.py").write_text(GRID)
  grid = grids.load_grid(tmp_path / "grid.py")
  monkeypatch.setattr(reproduce, "run_all", lambda *_: [finish(planned, tmp_path / "out") for planned in grid.runs][:0])
  reproduce.reproduce(str(tmp_path / "grid.py"), str(tmp_path / "out"), None, None, 1, str(tmp_path / "results.md"))
  assert "2 of the 2 runs" in (tmp_path / "results.md").read_text()


def test_no_run_no_page(tmp_path):
  with pytest.raises(ValueError, match="none of the 4 runs of grid.py is complete"):
    results.write_results(plan(), tmp_path / "out", tmp_path / "results.md")
  assert not (tmp_path / "results.md").exists()


# --- the command


GRID = f"""
from awrsr_jax.analysis.grid import Table
def get_grid():
  rows = {ROWS!r}
  return [Table("T one", "Tiny", "Does it run?", {TINY!r}, rows,
                {{"train.epochs": 2, "checkpoint.every_steps": 3, "data.buckets": 1}}, seeds=(0,))]
"""


def start(tmp_path, *flags):
  (tmp_path / "grid.py").write_text(GRID)
  return subprocess.Popen([sys.executable, "-m", "awrsr_jax.reproduce", f"--grid={tmp_path / 'grid.py'}",
                           f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results.md'}", *flags], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log, text: str, count: int = 1):
  """Waits until a log has a text so many times."""
  deadline = time.monotonic() + 300
  while not log.exists() or log.read_text().count(text) < count:
    assert time.monotonic() < deadline, log.exists() and log.read_text()
    time.sleep(0.01)


def test_stopped_killed_and_ended_by_the_same_command(tmp_path, record, capsys):
  process = start(tmp_path)
  folder = tmp_path / "out/T_one/none/seed_0"
  wait_for(folder / "log.txt", "parameters; ")
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == processes.TRY_AGAIN and "the same command goes on" in errors
  assert not (folder / "result.json").exists() and "all steps are saved" in (folder / "log.txt").read_text()

  told = 1
  if reproduce.tied_to_this():
    record("kill -9 of a grid of runs (reproduce)", "its run is told, saves and ends; the same command goes on with it")
    process, told = start(tmp_path), 2
    wait_for(folder / "log.txt", "resumed at step")
    process.kill()
    wait_for(folder / "log.txt", "all steps are saved", 2)
    process.communicate()

  process = start(tmp_path, "--jobs=2")
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, output + errors
  assert (folder / "log.txt").read_text().count("$ ") == told + 1 and "T one/value/seed_0: test NDCG@10 ." in output
  stored = dict(walk(json.loads((folder / "config.json").read_text())))
  planned = grids.load_grid(tmp_path / "grid.py").runs[0]
  assert stored == planned.values | {"data.path": "", "eval.hash_ids": True}  # flags say what the grid does
  ranks = read_ranks(epath.Path(folder) / "ranks.parquet")
  assert ranks["user"].tolist() == list(range(len(ranks["user"]))) and max(ranks["item"]) < 256
  page = (tmp_path / "results.md").read_bytes()
  said = json.loads((folder / "result.json").read_text())["test"]["ndcg@10"]
  line = next(line for line in page.decode().splitlines() if line.startswith("| none | 1/1 |"))
  assert line.split(" | ")[5] == show_metric(said)

  reproduce.reproduce(str(tmp_path / "grid.py"), str(tmp_path / "out"), None, None, 1, str(tmp_path / "results.md"))
  assert "2 complete, 0 to run" in capsys.readouterr().out and (tmp_path / "results.md").read_bytes() == page


def test_a_wrong_command_line_is_one_line(tmp_path):
  for flags, words in ((("--only=value", "--part=2/2"), "--part=2/2: there are only 1 runs"),
                       (("--report_only",), "none of the 2 runs")):
    process = start(tmp_path, *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors.startswith("ValueError: ") and words in errors
    assert len(errors.splitlines()) == 1
  with pytest.raises(ValueError, match="--jobs=0 must be at least 1"):
    reproduce.reproduce(str(tmp_path / "grid.py"), str(tmp_path / "out"), None, None, 0, str(tmp_path / "results.md"))
