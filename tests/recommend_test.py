"""The command line of recommend: what it says, and that every bad input is one clear line."""

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pandas
import pytest
from absl import flags
from files_test import train_run

from awrsr_jax.inference import trained as trained_module

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return train_run(tmp_path_factory.mktemp("recommend"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
  """A run whose ids are numbers."""
  return train_run(tmp_path_factory.mktemp("numbers"), are_numbers=True)


@pytest.fixture(scope="module")
def loaded():
  """Models that were loaded before, by their arguments."""
  return {}


@pytest.fixture
def command(loaded, monkeypatch, capfd, tmp_path):
  """Returns a function: flags -> exit code, standard output, standard error; in this process."""
  load = trained_module.load

  def load_once(*args):
    if not os.path.exists(args[0]) or args not in loaded:
      loaded[args] = load(*args)
    return loaded[args]

  def call(*given, stdin=""):
    (tmp_path / ".stdin").write_text(stdin)
    capfd.readouterr()
    with monkeypatch.context() as patch, open(tmp_path / ".stdin") as file:
      patch.setattr(trained_module, "load", load_once)
      patch.setattr(sys, "argv", ["recommend", *map(str, given)])
      patch.setattr(sys, "stdin", file)
      try:
        runpy.run_module("awrsr_jax.recommend", run_name="__main__")
        code = 0
      except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int | None) else 1
        if isinstance(ended.code, str):
          print(ended.code, file=sys.stderr)
      finally:
        for flag in list(flags.FLAGS.flags_by_module_dict()["recommend"]):  # so that the next call may define them anew
          delattr(flags.FLAGS, flag.name)
    (tmp_path / ".stdin").unlink()
    return (code or 0, *capfd.readouterr())

  return call


def refuse(command, message, *given, stdin=""):
  """Asserts that flags end in one clear line and write nothing."""
  code, out, errors = command(*given, stdin=stdin)
  assert code in (1, 2) and message in errors and "Traceback" not in errors, errors
  assert out == "" and len([line for line in errors.splitlines() if "Error: " in line]) == 1, errors


def test_standard_input_to_standard_output(run, command):
  code, out, errors = command(f"--workdir={run}", "--k=3", stdin='["i1", "i2"]\n{"user": "me", "items": ["x"]}\n')
  first, second = map(json.loads, out.splitlines())
  expected = trained_module.load(run).recommend([["i1", "i2"]], k=3)[0]
  assert code == 0 and first["items"] == [one.item for one in expected] and "user" not in first
  assert first["titles"] == [one.title for one in expected]
  assert second == {"user": "me", "items": [], "scores": [], "titles": [], "unknown": 1}
  assert "2 histories in" in errors and "1 unknown items were skipped, and 1 histories without" in errors


def test_flags_reach_the_job(run, command, tmp_path):
  (tmp_path / "allow.txt").write_text("\ufeffi1\r\n\r\n i3 \r\ni4\r\n")
  (tmp_path / "deny").write_text("i3\n")
  given = (f"--workdir={run}", f"--allow={tmp_path / 'allow.txt'}", f"--deny={tmp_path / 'deny'}", "--k=5")
  _, out, _ = command(*given, stdin='["i1", "i2"]\n')
  assert json.loads(out)["items"] == ["i4"]
  _, out, _ = command(*given, "--include_seen", "--explain", stdin='["i1", "i2"]\n')
  assert sorted(json.loads(out)["items"]) == ["i1", "i4"] and json.loads(out)["explanation"]["history"] == ["i1", "i2"]
  code, out, _ = command(f"--workdir={run}", "--text", "--k=2", stdin='["i1", "x"]\n')
  assert code == 0 and out.startswith("history 1: 1 items, 1 unknown ones skipped\n    1  i")


def test_file_to_file_with_columns(run, command, tmp_path):
  (tmp_path / "log.csv").write_text("who,what,when\nb,i2,1\na,i5,2\nb,i1,0\n")
  code, out, errors = command(f"--workdir={run}", f"--input={tmp_path / 'log.csv'}", f"--output={tmp_path / 'o.csv'}",
                              "--user_column=who", "--item_column=what", "--time_column=when", "--k=1")
  assert (code, out) == (0, ""), errors
  expected = trained_module.load(run).recommend([["i5"], ["i1", "i2"]], k=1)
  found = pandas.read_csv(tmp_path / "o.csv")
  assert found.user.tolist() == ["a", "b"] and found.item.tolist() == [rows[0].item for rows in expected]


def test_similar(run, numbers, command):
  code, out, _ = command(f"--workdir={run}", "--similar=i1", "--similar=i2", "--k=2")
  expected = trained_module.load(run).similar(["i1", "i2"], k=2)
  assert code == 0 and [json.loads(line)["items"] for line in out.splitlines()] == [[one.item for one in row]
                                                                                    for row in expected]
  assert json.loads(out.splitlines()[0])["item"] == "i1"
  _, out, _ = command(f"--workdir={numbers}", "--similar=7", "--k=1")
  assert json.loads(out)["item"] == 7 and type(json.loads(out)["items"][0]) is int
  code, out, _ = command(f"--workdir={numbers}", "--similar=7", "--k=1", "--text")
  assert code == 0 and out.startswith("similar to 7\n    1  ")
  refuse(command, "unknown items ['x']", f"--workdir={run}", "--similar=x")
  refuse(command, "--similar writes to standard output", f"--workdir={run}", "--similar=i1", "--output=o.csv")


@pytest.mark.parametrize("given, stdin, message", [
    (["--k=0"], '["i1"]\n', "k=0 must lie between 1 and the 30 items"),
    (["--k=31"], '["i1"]\n', "k=31 must lie"), ([], "", "--input=- holds no histories"),
    ([], '["i1"\n', "-:1: "), ([], '"i1"\n', "-:1: "), ([], '["i1", 1.5]\n', "'1.5' is no item id"),
    (["--strict"], '["i1"]\n["x"]\n', "history 2 has 1 unknown items, such as ['x']"),
    (["--input=nowhere.jsonl"], "", "no such file or folder: --input=nowhere.jsonl"),
    (["--input=awrsr_jax"], "", "--input"), (["--allow=nowhere"], "", "--allow=nowhere cannot be read (No such file"),
    (["--deny=awrsr_jax"], "", "--deny=awrsr_jax cannot be read (Is a directory"),
    (["--allow=/dev/null"], "", "--allow=/dev/null is empty"), (["--output=o.txt"], "", "must end in one of"),
    (["--output=o.csv", "--explain"], "", "--explain has room in JSON lines only"),
    (["--output=o.csv", "--text"], "", "--text is for standard output"), (["--text", "--explain"], "", "--text is for"),
    (["--model_devices=3"], "", "model_devices=3 must divide"), (["--step=77"], "", "no checkpoint of step 77"),
])
def test_bad_flags_and_input_are_one_clear_line(given, stdin, message, run, command, monkeypatch):
  monkeypatch.chdir(ROOT)
  refuse(command, message, f"--workdir={run}", *given, stdin=stdin)


def test_bad_runs(run, command, tmp_path, monkeypatch):
  refuse(command, "--workdir=RUN is missing")
  refuse(command, f"{tmp_path} is no run folder", f"--workdir={tmp_path}")
  refuse(command, "is no run folder", f"--workdir={tmp_path / 'nowhere'}")
  empty = tmp_path / "empty"
  empty.mkdir()
  shutil.copy(run / "config.json", empty)
  refuse(command, "has no checkpoint yet", f"--workdir={empty}")
  (empty / "checkpoints").mkdir()
  refuse(command, "has no finished checkpoint yet", f"--workdir={empty}")
  monkeypatch.setattr("awrsr_jax.engine.checkpoint.SCHEMA", 10_000)
  refuse(command, "cannot be loaded", f"--workdir={shutil.copytree(run, tmp_path / 'other')}")


def test_what_can_be_refused_early_is_refused_before_the_model_is_loaded(run, command, tmp_path, monkeypatch):
  (tmp_path / "o.csv").touch()
  for given in ([f"--output={tmp_path / 'o.csv'}"], ["--output=o.txt"], [f"--input={tmp_path / 'nowhere'}"]):
    refuse(command, "ValueError: ", "--workdir=nowhere", *given)
    _, _, errors = command("--workdir=nowhere", *given)
    assert "no run folder" not in errors


def start(*given, **options):
  return subprocess.Popen([sys.executable, "-m", "awrsr_jax.recommend", *map(str, given)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_unknown_flags_and_a_reader_that_has_enough(run, tmp_path):
  (tmp_path / "h.jsonl").write_text('["i1", "i2", "i3"]\n' * 20_000)  # more text than a pipe holds
  reads_one = start(f"--workdir={run}", f"--input={tmp_path / 'h.jsonl'}")
  misspelt = start(f"--workdir={run}", "--modell_devices=2")
  no_disk = start(f"--workdir={run}", f"--input={tmp_path / 'h.jsonl'}", "--k=1", stdin=subprocess.DEVNULL)
  assert json.loads(reads_one.stdout.readline())["items"]
  reads_one.stdout.close()
  errors = reads_one.stderr.read()
  assert reads_one.wait(60) == 1 and "Error" not in errors and "Traceback" not in errors, errors
  out, errors = misspelt.communicate(timeout=60)
  assert misspelt.returncode == 1 and "Unknown command line flag 'modell_devices'" in errors and not out
  assert "Traceback" not in errors
  out, errors = no_disk.communicate(timeout=60)
  assert no_disk.returncode == 0 and out.count("\n") == 20_000 and "20000 histories in" in errors


def test_a_full_standard_output_is_one_clear_line(run, tmp_path):
  (tmp_path / "h.jsonl").write_text('["i1"]\n')
  with open("/dev/full", "w") as full:
    done = subprocess.run([sys.executable, "-m", "awrsr_jax.recommend", f"--workdir={run}",
                           f"--input={tmp_path / 'h.jsonl'}"], cwd=ROOT, text=True, stdout=full,
                          stderr=subprocess.PIPE, timeout=60)
  assert done.returncode == 1 and "standard output cannot be written: No space left" in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


