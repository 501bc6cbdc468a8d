"""The benchmark: contenders keep count, a peer is spoken to and its failure told, plans hold what they say."""

import json
import sys
import types

import pytest

from awrsr_jax.bench import __main__ as bench
from awrsr_jax.bench import contenders, measures
from awrsr_jax.config import finalize

PEER = """
import json, sys
REQUIREMENTS = []
spec = json.load(open(sys.argv[1]))
rows = [line.split() for line in open(spec["sequences"])]
print(json.dumps({"name": "echo", "version": "1", "parameters": len(rows), "note": spec["loss"]}), flush=True)
for line in sys.stdin:
  command, *rest = line.split()
  if command == "quit":
    break
  if command == "evaluate":
    sys.exit("no evaluation today")
  print(json.dumps({"interactions": sum(map(len, rows)), "steps": 1, "seconds": float(rest[0])}), flush=True)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
  """Returns the folder of a peer called echo, run by this Python."""
  (tmp_path / "peer_echo.py").write_text(PEER)
  monkeypatch.setattr(contenders, "PEERS", tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  folder = tmp_path / "cache" / "awrsr_jax" / "peers" / "echo"
  (folder / "bin").mkdir(parents=True)
  (folder / "bin" / "python").symlink_to(sys.executable)
  (folder / "requirements.txt").write_text("")
  return tmp_path


def test_a_contender_counts_real_targets_and_ranks_users(small_config):
  ours = contenders.Ours("ours", small_config)
  turns = [ours.train(0) for _ in range(8)]  # after the first step, which compiled; of 4 steps an epoch, over and over
  assert [turn["steps"] for turn in turns] == [1] * 8
  assert [turn["interactions"] for turn in turns] == [
      sum((targets > 0).sum() for targets in ours._job.batches[step % 8]["targets"]) for step in range(1, 9)]
  assert ours.compiled.programs > 0
  assert ours.evaluate(7)["users"] == 7


def test_a_peer_gets_the_data_and_its_failure_is_told(peer, small_config, make_corpus):
  corpus = make_corpus([[1, 2, 3], [3, 2, 1, 2, 3]])
  echo = contenders.Peer("echo", finalize(small_config), corpus, peer)
  assert (echo.name, echo.parameters, echo.note) == ("echo 1", 2, "softmax")
  assert echo.train(0.5) == {"interactions": 8, "steps": 1, "seconds": 0.5}
  with pytest.raises(ValueError, match="code 1; its last words:\nno evaluation today"):
    echo.evaluate(3)
  echo.close()


def test_a_peer_is_compared_only_where_it_has_the_loss(peer, small_config, make_corpus):
  small_config.loss.name = "bce"
  with pytest.raises(ValueError, match="not config.loss.name=bce with 256 negatives.*num_negatives=1"):
    contenders.Peer("echo", finalize(small_config), make_corpus([[1, 2, 3]]), peer)


def test_a_peer_that_is_not_there_names_those_that_are(peer, small_config, make_corpus):
  with pytest.raises(ValueError, match="--peer=gru: there is no .*choose from echo"):
    contenders.Peer("gru", finalize(small_config), make_corpus([[1, 2, 3]]), peer)


def test_attention_memory_is_linear_in_blocks_and_the_loss_keeps_no_matrix(small_config):
  small_config.data.max_length = 8
  small_config.model.width, small_config.model.ffn_width = 16, 16
  grows = {implementation: [measures.plan_attention(small_config, "value", implementation, n) for n in (1024, 4096)]
           for implementation in ("fused", "reference")}
  assert grows["fused"][1] / grows["fused"][0] < 6 and grows["reference"][1] / grows["reference"][0] > 12
  small_config.train.batch_size = 512  # 4,096 positions
  assert measures.plan_loss(small_config, True, 20_000) > 8 * measures.plan_loss(small_config, False, 20_000)


def test_where_blocks_are_refused_a_step_is_timed_with_whole_matrices_alone(small_config, monkeypatch):
  monkeypatch.setattr(measures, "measure_machine", lambda: (1e9, 1e9))
  small_config.model.awr.value_projection = True
  found = measures.measure_step(small_config, measures.Turns(["value"], [], 1, 0.0, 1))
  assert [row[""] for row in found["rows"]] == ["value, reference"]
  assert found["notes"][1].startswith("value, fused: config.model.attention.implementation=fused cannot do")


def test_work_grows_as_the_formula_says(small_config):
  small_config.model.refine, small_config.loss.name = "none", "softmax"
  operations, moved = measures.count_work(finalize(small_config), 40)
  # 16 x 8 positions; 4 x 8 x 8 of q, k, v, out; 2 x 8 x 16 of the block; attention over 4.5 keys; 40 items
  assert operations == 6 * 128 * (256 + 256 + 2 * 8 * 4.5 + 40 * 8)
  assert moved == 32 * measures.count_parameters(finalize(small_config), 40)


@pytest.mark.parametrize("data, model, devices", [(1, 1, 1), (2, 2, 4), (-1, 2, 8)])
def test_the_devices_that_are_named_are_those_of_the_mesh(data, model, devices, small_config):
  small_config.mesh.data, small_config.mesh.model = data, model
  assert bench.name_devices(finalize(small_config).mesh) == f"{devices} x cpu"


def test_what_is_wrong_is_one_line_that_moves_no_cursor(monkeypatch):
  for flag in ("MEASURE", "REFINE"):
    monkeypatch.setattr(bench, flag, types.SimpleNamespace(value=["\x1b[2J"]))
  with pytest.raises(SystemExit, match=r"^ValueError: --measure=\\x1b\[2J is not of throughput, step"):
    bench.main(["bench"])


def test_a_table_lines_up():
  rows = [{"": "a", "n": 1234567, "x": 0.12345, "y": None}, {"": "longer", "n": 1, "x": 1234.5, "y": 2.0}]
  assert bench.format_table(rows).splitlines() == [
      "                n      x  y", "a       1,234,567  0.123   ", "longer          1  1,234  2"]
  assert json.dumps(rows)


def test_flags_of_the_config_are_passed_on_however_they_are_written():
  words = ["--config", "a.py", "--measure", "start", "-config.seed=1", "--noconfig.model.remat",
           "--config.train.epochs", "2"]
  assert bench.config_flags_of(words) == [word for word in words if word not in ("--measure", "start")]


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
  monkeypatch.setattr(bench, "MEASURE", types.SimpleNamespace(value=["memory"]))
  monkeypatch.setattr(bench, "REFINE", types.SimpleNamespace(value=["none"]))
  monkeypatch.setattr(bench, "OUT", types.SimpleNamespace(value=str(tmp_path / "none" / "x.json")))
  with pytest.raises(SystemExit, match="^ValueError: --out="):
    bench.main(["bench"])
