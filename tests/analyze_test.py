"""The command `analyze`: what it writes, what it leaves out and says so, and what it refuses."""

import pathlib
import shutil
import subprocess
import sys

import pytest
from figures_test import write_run
from maps_test import own_config, write_log
from report_test import check

from awrsr_jax import analyze as command
from awrsr_jax.engine.train import train

ROOT = pathlib.Path(__file__).parent.parent
FROM_RUNS = {"ndcg_by_cutoff", "validation_ndcg_5", "training_loss", "gradient_norm", "ndcg_by_history",
             "ndcg_by_popularity"}
FROM_MODELS = {"attention_layer1", "attention_by_distance", "attention_entropy", "attention_entropy_relative"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with a log, and runs "none" and "value" of it, of one layer."""
  folder = tmp_path_factory.mktemp("analyze")
  write_log(folder / "log.csv")
  for refine in ("none", "value"):
    config = own_config(folder / "log.csv")
    config.model.refine, config.model.layers, config.data.buckets, config.train.log_every = refine, 1, 1, 1
    train(config, folder / refine)
  return folder


def names(folder: pathlib.Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


def both(keys) -> set[str]:
  return {f"{key}.{form}" for key in keys for form in ("png", "svg")}


def test_one_run_is_analyzed_into_its_own_folder(trained, tmp_path, capsys):
  folder = tmp_path / "run"
  shutil.copytree(trained / "value", folder)
  out = folder / "analysis"
  out.mkdir()
  for name in ("report.html", "training_loss.svg"):  # what is there is its own, and is replaced
    (out / name).write_text("of an older analysis")
  assert command.analyze([str(folder)], users=20) == []
  assert names(out) == both(FROM_RUNS | FROM_MODELS) | {"report.html"}
  assert capsys.readouterr().out == f"{out}/report.html\n"
  page = check((out / "report.html").read_text())
  assert len(page.find("svg")) == len(FROM_RUNS | FROM_MODELS)
  texts = {element["text"] for element in page.find("text")}
  assert any(text.startswith("<script>alert(1)") for text in texts)  # a title, as text
  assert "<svg" in (out / "training_loss.svg").read_text()


def test_several_runs_are_compared(trained, tmp_path):
  out = tmp_path / "out" / "deep"
  left_out = command.analyze([str(trained / "none"), str(trained / "value")], str(out), "who13", 10, None, ["svg"])
  assert left_out == []
  found = {path.removesuffix(".svg") for path in names(out) - {"report.html"}}
  assert found == FROM_RUNS | {f"{key}_{number}_refine_{refine}" for key in FROM_MODELS
                               for number, refine in ((1, "none"), (2, "value"))}
  page = check((out / "report.html").read_text())
  captions = [element["text"] for element in page.find("caption")]
  assert "Test NDCG@10, compared with refine=none" in captions
  assert any("User who13" in element["text"] for element in page.find("figcaption"))


def test_data_that_moved_are_found(trained, tmp_path, monkeypatch):
  moved = tmp_path / "moved.csv"
  shutil.move(trained / "log.csv", moved)
  try:
    folders, out = [str(trained / "value")], str(tmp_path / "out")
    [words] = command.analyze(folders, out, formats=["svg"])
    assert words.startswith("attention: ") and "--data_path=PATH" in words
    assert "log.csv cannot be read as the data of" in words
    assert names(tmp_path / "out") == {f"{key}.svg" for key in FROM_RUNS} | {"report.html"}
    page = check((tmp_path / "out" / "report.html").read_text())
    assert any(words in element["text"] for element in page.find("li"))
    assert command.analyze(folders, out, data_path=str(moved), formats=["svg"]) == []
  finally:
    shutil.move(moved, trained / "log.csv")


def test_a_run_without_ranks_or_checkpoints_has_the_rest(trained, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(trained / "value", folder, ignore=shutil.ignore_patterns("ranks.parquet", "checkpoints"))
  left_out = command.analyze([str(folder)], formats=["svg"])
  assert [words.split(":")[0] for words in left_out] == [
      "ndcg by cutoff", "ndcg by history", "ndcg by popularity", "attention of sasrec, refine=value"]
  assert names(folder / "analysis") == {"report.html", "validation_ndcg_5.svg", "training_loss.svg",
                                        "gradient_norm.svg"}
  check((folder / "analysis" / "report.html").read_text())


def test_runs_without_ranks_are_not_compared_and_the_report_says_why(tmp_path):
  folders = [write_run(tmp_path / refine, 0, {"model.refine": refine}, ranks=False) for refine in ("none", "value")]
  left_out = command.analyze(folders, str(tmp_path / "out"), with_maps=False)
  assert "significance: " in left_out[-1] and "ranks.parquet cannot be read" in left_out[-1]
  assert "attention: --no_maps was given" in left_out
  page = check((tmp_path / "out" / "report.html").read_text())
  assert any("could not be compared" in element["text"] for element in page.find("p"))


@pytest.mark.parametrize("change, message", [
    ({"folders": []}, "no run folder was given"),
    ({"out": None}, "2 run folders were given; say with --out=DIR"),
    ({"formats": ["pdf"]}, "--format=pdf: choose from png, svg"),
    ({"formats": []}, "--format=: choose"),
    ({"users": 0}, "--users=0 must be at least 1"),
    ({"out": "FILE"}, "--out=.*file is a file"),
    ({"out": "FILE/deeper"}, "--out=.*file/deeper cannot be made"),
    ({"folders": ["nowhere"]}, "nowhere is no run folder"),
    ({"folders": ["a", "a"]}, "have the same config and the same seed"),
    ({"folders": ["a", "other"]}, "cannot be compared, their corpus"),
    ({"folders": ["a", "sampled"]}, "cannot be compared, their protocol"),
])
def test_bad_input_is_one_clear_error_and_writes_nothing(change, message, tmp_path):
  (tmp_path / "file").write_text("mine")
  for name in ("a", "b", "other", "sampled"):
    write_run(tmp_path / name, 0, {"model.refine": "none"} if name == "b" else {})
  for name, file, before, after in (("other", "corpus.json", "ffff", "abcd"),
                                    ("sampled", "result.json", "full ranking", "SAMPLED")):
    path = tmp_path / name / file
    path.write_text(path.read_text().replace(before, after))
  arguments = {"folders": ["a", "b"], "out": str(tmp_path / "out"), "with_maps": False} | change
  arguments["folders"] = [str(tmp_path / name) for name in arguments["folders"]]
  if arguments["out"]:
    arguments["out"] = arguments["out"].replace("FILE", str(tmp_path / "file"))
  with pytest.raises(ValueError, match=message):
    command.analyze(**arguments)
  assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_an_unknown_user_is_an_error(trained, tmp_path):
  with pytest.raises(ValueError, match="--user=nobody: .* has no such user"):
    command.analyze([str(trained / "value")], str(tmp_path / "out"), user="nobody")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
  (tmp_path / "out" / "report.html").mkdir(parents=True)
  with pytest.raises(ValueError, match="--out=.*out cannot be written: "):
    command.analyze([write_run(tmp_path / "run")], str(tmp_path / "out"), with_maps=False)


def test_names_of_files_tell_groups_apart():
  drawings = [command.Drawing("attention_layer1", "", "", None, (), [])]
  found = [command.name_files(drawings, group, at)[0].key for at, group in enumerate(("a/b=../c", "a b=c", "<x>"))]
  assert found == ["attention_layer1_1_a_b_c", "attention_layer1_2_a_b_c", "attention_layer1_3_x"]


def call(*arguments):
  """Calls the command in a process of its own."""
  return subprocess.run([sys.executable, "-m", "awrsr_jax.analyze", *map(str, arguments)], cwd=ROOT,
                        capture_output=True, text=True, timeout=300)


def test_the_command_line(tmp_path):
  run = write_run(tmp_path / "run", ranks=False)
  done = call(run, f"--out={tmp_path / 'out'}", "--no_maps", "--format=svg")
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"{tmp_path / 'out'}/report.html\n"
  assert "left out: ndcg by cutoff: " in done.stderr and "left out: attention: --no_maps" in done.stderr
  assert names(tmp_path / "out") == {"report.html", "validation_ndcg_5.svg", "training_loss.svg", "gradient_norm.svg"}
  done = call(tmp_path / "nowhere")
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.splitlines()[-1].startswith(f"ValueError: {tmp_path}/nowhere is no run folder")
  assert "Traceback" not in done.stderr
