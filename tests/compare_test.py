"""The command that compares runs: what it prints and writes, and what it refuses before any work."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from runs_test import PROTOCOL, write_run

from awrsr_jax import compare
from awrsr_jax.analysis import runs, significance

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = ["ndcg@10", "hr@3"], 50, 0, 0.9


def write_runs(folder, *settings):
  """Writes runs of (refine, seed) with ranks of their own, and returns their folders."""
  return [write_run(folder / f"{refine}{seed}", np.random.default_rng(place).geometric(0.1, size=40),
                    model__refine=refine, seed=seed)
          for place, (refine, seed) in enumerate(settings)]


@pytest.fixture
def folders(tmp_path):
  return write_runs(tmp_path, ("none", 0), ("value", 0), ("none", 1), ("simple", 5))


def test_the_command_prints_a_table_a_metric_and_writes_all_numbers(folders, tmp_path, capsys):
  out = tmp_path / "found.json"
  compare.run(folders, *SETTINGS, str(out))
  expected = significance.compare(runs.group(list(map(runs.read_run, folders))), *SETTINGS)
  assert json.loads(out.read_text()) == json.loads(json.dumps(expected))
  assert [path.name for path in tmp_path.iterdir() if "found" in path.name] == ["found.json"]
  head, *tables = capsys.readouterr().out.rstrip("\n").split("\n\n")
  protocol, counts, settings = head.splitlines()
  assert protocol == PROTOCOL and counts.startswith("by hand: 4 users, 9 items, 30 interactions; 40 test targets of 40")
  assert "refine=none" in settings and "50 resamples" in settings and "means are over" not in counts
  for table, metric in zip(tables, SETTINGS[0], strict=True):
    title, *lines = table.splitlines()
    assert title.split("  ")[0] == metric and "90 % interval" in title and "users and seeds" not in title
    assert [line.split()[0] for line in lines] == ["refine=none", "refine=value", "refine=simple"]
    base, value, _ = (expected["metrics"][metric][line.split()[0]] for line in lines)
    assert lines[0].split()[1:] == ["2", f"{base['mean']:.4f}", f"{base['deviation']:.4f}"]
    (low, high), (least, most) = value["interval"], value["relative_interval"]
    assert lines[1].split()[1:] == (
        f"1 {value['mean']:.4f} - {value['difference']:+.4f} [{low:+.4f}, {high:+.4f}] {value['relative']:+.1f} % "
        f"[{least:+.1f}, {most:+.1f}] {value['p']:.4f} {value['p_holm']:.4f}").split()
    assert len({len(line) for line in (title, *lines[1:])}) == 1


def test_the_first_run_is_of_the_baseline(folders, capsys):
  compare.run(folders[1:], *SETTINGS, None)
  assert "compared with refine=value" in capsys.readouterr().out


def test_groups_that_differ_in_many_keys_have_the_names_of_their_folders(tmp_path, capsys):
  many = {"model__width": 32, "model__ffn_width": 128, "train__learning_rate": 0.01, "train__batch_size": 64,
          "model__layers": 3}
  ranks = np.arange(1, 41)
  folders = [write_run(tmp_path / "a", ranks), write_run(tmp_path / "b", ranks, **many),
             write_run(tmp_path / "c", ranks, **many, seed=1)]
  compare.run(folders, *SETTINGS, None)
  base, other, *rest = capsys.readouterr().out.splitlines()
  assert base.startswith(f"{folders[0]}: ") and "width=64" in base
  assert other.startswith(f"{folders[1]} and 1 more: ") and all(f"{key.split('__')[1]}={value}" in other
                                                                for key, value in many.items())
  assert f"compared with {folders[0]}; " in rest[2] and rest[5].split()[0] == str(folders[0])


def test_three_seeds_of_both_show_users_and_seeds(tmp_path, capsys):
  settings = [(refine, seed) for refine in ("none", "value") for seed in range(3)]
  folders = write_runs(tmp_path, *settings, ("simple", 0))
  compare.run(folders, ["mrr"], 50, 0, 0.95, None)
  title, _, value, simple = capsys.readouterr().out.rstrip("\n").split("\n\n")[1].splitlines()
  ends = [found.end() for found in re.finditer("users and seeds", title)]
  for end, intervals in zip(ends, (2, 4), strict=True):  # of the difference, then of the relative one
    assert value[:end].count("]") == intervals and value[end - 1] == "]"
    assert simple[:end].count("]") == intervals / 2 and simple[end - 1] == "-"
  found = significance.compare(runs.group(list(map(runs.read_run, folders))), ["mrr"], 50)["metrics"]["mrr"]
  low, high = found["refine=value"]["relative_users_and_seeds"]
  assert value[:ends[1]].endswith(f" [{low:+.1f}, {high:+.1f}]")


def test_users_of_several_targets_are_told(tmp_path, capsys):
  compare.run([write_run(tmp_path / refine, users=[3, 3, 4, 5], model__refine=refine) for refine in ("none", "value")],
              *SETTINGS, None)
  assert "4 test targets of 3 users; means are over each user's targets" in capsys.readouterr().out


def test_seeds_of_one_config_are_described(folders, capsys):
  compare.run(folders[::2], *SETTINGS, None)
  head, table, _ = capsys.readouterr().out.split("\n\n")
  assert "all runs have one config, with 2 seeds (0, 1)" in head
  assert table.splitlines()[0].split() == ["ndcg@10", "seeds", "mean", "deviation"] and len(table.splitlines()) == 2


@pytest.mark.parametrize("out, words", [("", "exists; choose another"), ("old.json", "exists; choose another"),
                                        ("nowhere/new.json", "lies in no folder")])
def test_where_nothing_can_be_written_nothing_is_read(out, words, folders, tmp_path, monkeypatch):
  (tmp_path / "old.json").write_text("kept")
  monkeypatch.setattr(runs, "read_run", None)
  with pytest.raises(ValueError, match=f"--out=.*{words}"):
    compare.run(folders, *SETTINGS, str(tmp_path / out))
  assert (tmp_path / "old.json").read_text() == "kept"


def test_wrong_settings_are_refused_before_runs_are_read(folders, monkeypatch):
  monkeypatch.setattr(runs, "read_run", None)
  with pytest.raises(ValueError, match="--resamples=0"):
    compare.run(folders, ["mrr"], 0, 0, 0.95, None)


@pytest.mark.parametrize("count", [0, 1])
def test_one_run_is_nothing_to_compare(count, folders):
  with pytest.raises(ValueError, match=f"{count} run folders were given; name two or more"):
    compare.run(folders[:count], *SETTINGS, None)


def test_the_same_folder_twice_is_refused(folders):
  with pytest.raises(ValueError, match="same config and the same seed 0"):
    compare.run([*folders, folders[0]], *SETTINGS, None)


@pytest.mark.parametrize("flags, words", [
    (["--metrics=hr@2,mrr", "--resamples=20", "--seed=3", "--level=0.5"], "50 % interval"),
    (["--resamples=0"], "ValueError: --resamples=0"), (["--level=2"], "ValueError: --level=2"),
    (["--metrics=hr"], "ValueError: --metrics: 'hr'"), (["nowhere"], "ValueError: nowhere is no run folder")])
def test_flags_reach_the_command(flags, words, folders, tmp_path):
  out = tmp_path / "found.json"
  done = subprocess.run([sys.executable, "-m", "awrsr_jax.compare", *folders, f"--out={out}", *flags], cwd=ROOT,
                        capture_output=True, text=True, timeout=120)
  assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
  is_fine = len(flags) == 4
  assert (done.returncode == 0) == out.exists() == is_fine
  if is_fine:
    found = json.loads(out.read_text())
    assert list(found["metrics"]) == ["hr@2", "mrr"]
    assert (found["resamples"], found["seed"], found["level"]) == (20, 3, 0.5)
