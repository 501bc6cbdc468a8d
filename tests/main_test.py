"""The command line: every bad input is one clear error, before the first compile."""

import pathlib
import subprocess
import sys

import jax
import pytest

from awrsr_jax import command
from awrsr_jax.engine import processes
from awrsr_jax.engine import train as train_module

ROOT = pathlib.Path(__file__).parent.parent
GOOD_TEXT = "".join(f"{user} {' '.join(str(1 + (user + k) % 9) for k in range(5))}\n" for user in range(1, 9))


@pytest.fixture
def no_compile(monkeypatch):
  """Any compilation is a failure."""
  def refuse(*args, **kwargs):
    raise AssertionError("compiled before the error")
  monkeypatch.setattr(train_module, "init_state", refuse)
  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


def own_data(small_config, tmp_path, text: str):
  path = tmp_path / "data.txt"
  path.write_text(text)
  small_config.data.name = ""
  small_config.data.path = str(path)
  return small_config


@pytest.mark.parametrize("text, message", [
    ("1 2 3 4 5\n2 3 x 4 5\n", "data.txt:2: 'x'"),
    ("1 2 3 4 5\n2 3 0 4 5\n", "data.txt:2"),
    ("1 2 3 4 5\n2 3 -4 4 5\n", "data.txt:2"),
    ("1 2 3 4 5\n2\n", "data.txt:2"),  # an empty history
    ("1 2 3 4 5\n2 3\n", "k_core=3"),  # a history of one item
    ("", "no lines"),
])
def test_bad_text_names_file_and_line(text, message, small_config, tmp_path, no_compile):
  with pytest.raises(ValueError, match=message):
    train_module.train(own_data(small_config, tmp_path, text), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_good_text_passes_the_same_checks(small_config, tmp_path, no_compile):
  with pytest.raises(AssertionError, match="compiled before"):
    train_module.train(own_data(small_config, tmp_path, GOOD_TEXT), tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    ({"data.k_core": 50}, "no users left after k-core 50"),
    ({"model.heads": 3}, "heads=3 does not divide config.model.width=8"),
    ({"mesh.data": 64}, "mesh.data=64"),
    ({"mesh.data": 8, "train.batch_size": 12}, "train.batch_size=12 must be a multiple of the 8"),
    ({"eval.protocol": "uniform100"}, "uniform100"),
    ({"data.path": "nowhere.txt"}, "nowhere.txt"),
    ({"train.learning_rate": float("nan")}, "learning_rate"),
    ({"model.attention.implementation": "fused", "model.awr.value_projection": True}, "implementation=fused cannot"),
])
def test_bad_config_is_refused(change, message, small_config, tmp_path, no_compile):
  small_config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    train_module.train(small_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused(small_config, tmp_path, no_compile):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="--workdir=.*cannot be written"):
    train_module.train(small_config, tmp_path / "file" / "run")


def test_what_a_run_cannot_go_on_from_is_refused_by_all_its_processes(small_config, tmp_path, monkeypatch):
  def refuse(*_):
    raise ValueError("is beyond the last step")
  monkeypatch.setattr(train_module, "start_or_resume", refuse)
  monkeypatch.setattr(processes, "gather", lambda text: [text, text])
  with pytest.raises(ValueError, match="beyond the last step") as caught:
    train_module.train(small_config, tmp_path / "run")
  assert processes.ON_ALL in caught.value.__notes__


@pytest.mark.parametrize("flags, message", [
    (["--config=configs/synthetic.py", "--config.model.rfine=value"], "did you mean model.refine"),
    (["--config=configs/nowhere.py"], "configs/nowhere.py: no such file"),
])
def test_a_misspelt_flag_is_one_line(flags, message, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit, match=message):
    command.parse_flags([sys.argv[0], *flags])


@pytest.mark.parametrize("said", [None, "5"])
def test_programs_are_kept_however_soon_they_are_compiled_unless_the_user_says_else(said, monkeypatch):
  key, told = "jax_persistent_cache_min_compile_time_secs", {}
  monkeypatch.delenv(key.upper(), raising=False)
  if said:
    monkeypatch.setenv(key.upper(), said)
  monkeypatch.setattr(command.jax.config, "update", told.__setitem__)
  command.keep_compiled()
  assert told.get(key) == (None if said else 0)


def test_what_is_no_flag_may_begin_like_a_config_key(monkeypatch):
  monkeypatch.setattr(command.app, "parse_flags_with_usage", lambda argv: argv)
  argv = ["describe", "config.parquet", "--config.model.width=8"]
  assert command.parse_flags(argv) == argv


def test_a_command_line_without_a_config_file_is_told_to_name_one():
  done = subprocess.run([sys.executable, "-m", "awrsr_jax.main", "--workdir=runs/none"], cwd=ROOT, capture_output=True,
                        text=True, timeout=300)
  assert done.returncode == 1 and "--config=FILE is missing; configs/ has some" in done.stderr


def test_a_process_that_fails_alone_does_not_wait_for_those_that_wait_for_it(tmp_path):
  code = ("import atexit, jax\nfrom absl import app\nfrom awrsr_jax import main\n"
          "def train(*_): raise ValueError('a shard is damaged')\n"
          "main.train, main.processes.start = train, lambda *_: None\n"
          "jax.process_count, jax.distributed.is_initialized = lambda: 2, lambda: True\n"
          "atexit.register(print, 'a regular exit')\napp.run(main.main, flags_parser=main.parse_flags)")
  given = ["--config=tests/tiny_config.py", f"--workdir={tmp_path}"]
  done = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert (done.returncode, done.stdout, done.stderr) == (1, "", "ValueError: a shard is damaged\n")
