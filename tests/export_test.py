"""Artefacts: in a fresh process, with jax and numpy alone, they recommend what the live model recommends."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pandas
import pytest
import tiny_config
from jax import export as jax_export

from awrsr_jax.config import finalize
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.train import train
from awrsr_jax.inference import artefact, files, standalone
from awrsr_jax.inference.artefact import export, on_one_device
from awrsr_jax.inference.histories import Histories
from awrsr_jax.inference.standalone import Catalogue, Recommender
from awrsr_jax.inference.trained import Trained, load
from awrsr_jax.model.backbones import build_backbone, param_shapes

ROOT = pathlib.Path(__file__).parent.parent
TOLERANCE = 1e-6  # of scores, relative to the largest
K = 20

# Reads a JSON line {"folder": ..., "calls": [[histories, options], ...]} a folder, and prints what recommend gives.
SERVER = """
import json, runpy, sys
for line in sys.stdin:
  job = json.loads(line)
  Recommender = runpy.run_path(job["folder"] + "/recommender.py")["Recommender"]
  recommender = Recommender(job["folder"])
  print(json.dumps([recommender.recommend(histories, **options) for histories, options in job["calls"]]))
found = [name for name in ("awrsr_jax", "flax", "orbax", "ml_collections", "absl") if name in sys.modules]
assert not found, found
"""
FAITHFUL = {"model.backbone": "stosa", "model.faithful": True, "model.norm": "post", "model.activation": "elu",
            "model.ffn_width": 32}
VARIANTS = {
    "sasrec, none": {"model.refine": "none"},
    "sasrec, value, two layers again": {"model.layers": 2, "model.remat": True},
    "sasrec, stochastic": {"model.refine": "stochastic"},
    "sasrec, additive weights in memory": {"model.refine": "additive", "model.awr.additive_on": "weights",
                                           "model.attention.implementation": "reference"},
    "sasrec, simple in blocks, long": {"model.refine": "simple", "model.attention.implementation": "fused",
                                       "data.max_length": 300},
    "sasrec, bfloat16": {"model.dtype": "bfloat16"},
    "stosa, none": {"model.backbone": "stosa", "model.refine": "none"},
    "stosa, value": {"model.backbone": "stosa", "model.refine": "value"},
    "stosa, stochastic": {"model.backbone": "stosa", "model.refine": "stochastic"},
    "stosa, published": FAITHFUL,
}


def make_trained(changes, items=40):
  """Returns a model that was never trained, with parameters far from their start, on one device."""
  config = tiny_config.get_config()
  config.update_from_flattened_dict(changes)
  config = finalize(config)
  backbone = build_backbone(config, items)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), param_shapes(backbone))
  mesh = meshes.make_mesh(types.SimpleNamespace(data=1, model=1))
  corpus = {"name": "made", "fingerprint": "0" * 64, "split": {"words": "leave-one-out"}}
  catalogue = Catalogue(list(range(101, 101 + items)), [""] * items, "nowhere")
  return on_one_device(Trained("nowhere", 3, {"corpus": corpus}, config, backbone, params, mesh, catalogue), "cpu")


def draw(ids, lengths, seed=0):
  """Returns histories of raw ids."""
  rng = np.random.default_rng(seed)
  return [[ids[at] for at in rng.integers(0, len(ids), length)] for length in lengths]


def serve(jobs):
  """Returns what a fresh process with nothing but jax and numpy recommends: jobs are (folder, calls)."""
  lines = "".join(json.dumps({"folder": str(folder), "calls": calls}) + "\n" for folder, calls in jobs)
  done = subprocess.run([sys.executable, "-I", "-c", SERVER], input=lines, cwd="/", capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


def check_same(live, found, tolerance=TOLERANCE):
  """Scores place by place; items where scores are not tied. Returns the largest relative difference."""
  assert [len(row) for row in live] == [len(row) for row in found]
  scale = max((abs(best[1]) for row in live for best in row), default=1)
  largest = 0
  for mine, other in zip(live, found, strict=True):
    scores = np.array([best[1] for best in mine])
    difference = np.abs(scores - [best[1] for best in other]) / scale
    largest = max([largest, *difference])
    gaps = np.pad(-np.diff(scores), 1, constant_values=np.inf) / scale
    for at in range(len(mine) - 1):  # whether the last is tied with one that is not there, nobody knows
      if min(gaps[at], gaps[at + 1]) > 2 * tolerance:
        assert (mine[at][0], mine[at][2]) == (other[at][0], other[at][2])
  assert largest <= tolerance
  return largest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one epoch on a table with text ids and titles."""
  folder = tmp_path_factory.mktemp("export")
  rng = np.random.default_rng(0)
  item = rng.integers(0, 30, 600)
  pandas.DataFrame({"user": rng.integers(0, 60, 600), "item": [f"ü{i}" for i in item], "time": np.arange(600),
                    "title": [f"Title, “{i}”" for i in item]}).to_csv(folder / "log.csv", index=False)
  config = tiny_config.get_config()
  config.data.name, config.data.path, config.data.columns.title = "", str(folder / "log.csv"), "title"
  config.train.epochs = 1
  train(config, folder / "run")
  return folder / "run"


@pytest.fixture(scope="module")
def live(run):
  return load(run)


@pytest.fixture(scope="module")
def made(run):
  """The artefact of the run, made by the command, which compares it with the live model, compiled as users compile."""
  out = run.with_name("artefact")
  done = subprocess.run([sys.executable, "-m", "awrsr_jax.export", f"--workdir={run}", f"--out={out}", f"--k={K}"],
                        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert f"up to {K} of 30 items" in done.stdout and "for cpu, cuda, tpu" in done.stdout
  [difference] = re.findall(r"differ by at most (\S+) of the largest", done.stdout)
  assert float(difference) <= TOLERANCE
  return out


@pytest.fixture
def copied(made, tmp_path):
  """A copy of the artefact, to be damaged."""
  return pathlib.Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_fresh_process_gives_what_the_live_model_gives(live, made):
  ids, n = live.catalogue.item_ids, live.config.data.max_length
  calls = [
      [draw(ids, [3]), {}],
      [draw(ids, [1, 2, 0, n, n + 1, 5 * n, 4]), {"k": K}],
      [draw(ids, np.arange(70) % (3 * n) + 1), {}],
      [draw(ids, [5, 12]), {"exclude_seen": False, "k": K}],
      [draw(ids, [5, 12]), {"allow": [*ids[3:9], "nothing"]}],
      [draw(ids, [5, 12]), {"deny": ids[:20], "k": K}],
      [draw(ids, [5, 12]), {"allow": ids[:12], "deny": ids[:6], "exclude_seen": False}],
      [[["nothing", ids[4], "ü"], ["nothing"], []], {}],
  ]
  [found] = serve([(made, calls)])
  for (histories, options), rows in zip(calls, found, strict=True):
    check_same(live.recommend(histories, **options), rows)
  assert found[0][0][0][2].startswith("Title, “")
  assert [len(row) for row in found[-1]] == [10, 0, 0]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
  """Name -> (live model, what a fresh process gives); of all variants in one process."""
  folder = tmp_path_factory.mktemp("variants")
  trained = {name: make_trained(changes) for name, changes in VARIANTS.items()}
  jobs = []
  for number, model in enumerate(trained.values()):
    path = folder / str(number)
    path.mkdir()
    artefact.write_folder(path, model, 10, artefact.export_program(model, 10, artefact.PLATFORMS))
    lengths = np.arange(16) * 2 * model.config.data.max_length // 15
    jobs.append((path, [[draw(model.catalogue.item_ids, lengths), {}]]))
  return {name: (trained[name], *job, *found) for name, job, found in zip(trained, jobs, serve(jobs), strict=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_can_be_exported(name, variants):
  model, path, [[histories, _]], found = variants[name]
  check_same(model.recommend(histories), found, TOLERANCE if model.config.model.dtype == "float32" else artefact.COARSE)
  manifest = json.loads((path / "manifest.json").read_text())
  assert manifest["length"] == model.config.data.max_length
  assert dict(np.load(path / "params.npz")).keys() == manifest["parameters"].keys()


def test_the_program_is_for_all_platforms_and_calls_only_what_is_stable(variants):
  from jax._src.export import _export
  for name, (_, path, _, _) in variants.items():
    exported = jax_export.deserialize(bytearray((path / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.nr_devices == 1
    called = set(re.findall(r"custom_call @(\w[\w.$]*)", exported.mlir_module()))
    assert called <= _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE, name


def test_memory_grows_with_the_block_and_not_with_the_catalogue():
  changes = {"eval.block_items": 64}
  texts = [artefact.export_program(make_trained(changes, items), 5, ["cpu"]).mlir_module() for items in (500, 5000)]
  assert all("stablehlo.while" in text for text in texts)
  widths = [{int(width) for width in re.findall(r"tensor<\?x(\d+)xf32>", text)} for text in texts]
  assert widths[0] == widths[1] and max(widths[0]) <= 64  # of what has a row a history


def test_the_manifest_says_what_it_is(run, live, made):
  manifest = json.loads((made / "manifest.json").read_text())
  assert manifest["schema"] == standalone.SCHEMA
  assert manifest["jax_version"] == jax.__version__
  assert manifest["corpus"] == live.record["corpus"]
  assert manifest["config"]["model"]["width"] == live.config.model.width
  assert manifest["step"] == live.step
  result = json.loads((run / "result.json").read_text())
  assert manifest["protocol"] == result["protocol"]
  assert manifest["validation"]["ndcg@10"] == pytest.approx(result["valid"]["ndcg@10"])
  assert manifest["files"].keys() == {path.name for path in made.iterdir()} - {"manifest.json"}
  assert (made / "recommender.py").read_text() == pathlib.Path(standalone.__file__).read_text()
  assert '"ü' in (made / "README.md").read_text()


def test_a_call_on_numbers_has_any_batch_size(live, made):
  recommender = Recommender(made)
  n, rows = recommender.length, recommender.manifest["rows"]
  inputs = np.zeros((3, n), np.int32)
  inputs[:, -2:] = [[1, 2], [3, 4], [5, 6]]
  scores, items = recommender.run(inputs, np.array([[0], [7], [0]], np.int32), np.ones(rows, bool))
  assert scores.shape == items.shape == (3, K)
  assert 7 not in items[1] and 7 in np.concatenate([items[0], items[2]])


@pytest.mark.parametrize("change, message", [
    (lambda inputs, excluded, allowed: (inputs[:, 1:], excluded, allowed), "inputs is int32 of shape .* n=8 columns"),
    (lambda inputs, excluded, allowed: (np.pad(inputs, 1), excluded, allowed), "inputs is int32 of shape"),
    (lambda inputs, excluded, allowed: (inputs.astype(np.int64), excluded, allowed), "inputs is int64"),
    (lambda inputs, excluded, allowed: (inputs[:0], excluded, allowed), r"inputs is int32 of shape \(0, 8\)"),
    (lambda inputs, excluded, allowed: (inputs, excluded[:1], allowed), r"excluded is int32 of shape \(1, 1\)"),
    (lambda inputs, excluded, allowed: (inputs, excluded[:, :0], allowed), "excluded .* at least one column"),
    (lambda inputs, excluded, allowed: (inputs, excluded, allowed[1:]), "allowed is bool"),
])
def test_a_wrong_input_is_named(change, message, made):
  recommender = Recommender(made)
  given = np.ones((2, 8), np.int32), np.zeros((2, 1), np.int32), np.ones(recommender.manifest["rows"], bool)
  with pytest.raises(ValueError, match=message):
    recommender.run(*change(*given))


def test_unknown_items_are_counted(made, caplog):
  recommender = Recommender(made)
  assert recommender.recommend([["x", "y"], ["x"], []]) == [[], [], []]
  assert recommender.unknown == 3
  assert "3 items of the histories are not in the catalogue" in caplog.text


@pytest.mark.parametrize("call, message", [
    (lambda r: r.recommend([["ü1"]], k=K + 1), f"k={K + 1} must lie between 1 and {K}"),
    (lambda r: r.recommend([["ü1"]], k=0), "k=0"),
    (lambda r: r.recommend("ü1"), "histories must be a list"),
    (lambda r: r.recommend(["ü1"]), "history 0 is 'ü1'"),
    (lambda r: r.recommend([["ü1"]], allow=[]), "leave none of the 30 items"),
    (lambda r: r.recommend([["ü1"]], deny="ü1"), "deny must be a list"),
])
def test_a_wrong_question_is_named(call, message, made):
  with pytest.raises(ValueError, match=message):
    call(Recommender(made))


def test_not_a_number_is_an_error(made):
  recommender = Recommender(made)
  recommender._params = {name: x * np.nan for name, x in recommender._params.items()}
  with pytest.raises(FloatingPointError, match="1 of 1 histories have a NaN"):
    recommender.recommend([["ü1"]])


def flip(path):
  """Changes one byte in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def edit(path, **values):
  """Changes keys of a JSON file."""
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: flip(folder / "params.npz"), "params.npz is not what it was"),
    (lambda folder: flip(folder / "model.stablehlo"), "model.stablehlo is not what it was"),
    (lambda folder: (folder / "items.json").write_text("{}"), "items.json has 2 bytes"),
    (lambda folder: (folder / "params.npz").unlink(), "params.npz is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "no artefact: it has no manifest.json"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "has schema None"),
    (lambda folder: edit(folder / "manifest.json", schema=2), "has schema 2, and this recommender.py reads schema 1"),
    (lambda folder: edit(folder / "manifest.json", length=9), "says length 9"),
    (shutil.rmtree, "no artefact"),
])
def test_damage_is_named(damage, message, copied):
  damage(copied)
  with pytest.raises(ValueError, match=message):
    Recommender(copied)


def test_a_program_of_another_platform_or_version_is_named(copied, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "rocm")
  with pytest.raises(ValueError, match="exported for cpu, cuda, tpu, and the default device here is rocm"):
    Recommender(copied)
  monkeypatch.setattr(jax_export, "deserialize", lambda _: 1 / 0)
  with pytest.raises(ValueError, match=f"written by JAX {re.escape(jax.__version__)} and cannot be read by JAX"):
    Recommender(copied)


def test_the_file_of_the_artefact_is_a_command(made, tmp_path):
  histories = tmp_path / "histories.jsonl"
  histories.write_text('["ü1", "ü2"]\n\n[]\n')
  done = subprocess.run([sys.executable, "-I", made / "recommender.py", histories, "3"], cwd=tmp_path,
                        capture_output=True, text=True, encoding="utf-8", timeout=120)
  assert done.returncode == 0, done.stderr
  first, second = map(json.loads, done.stdout.splitlines())
  assert len(first["items"]) == len(first["scores"]) == len(first["titles"]) == 3
  assert second == {"items": [], "scores": [], "titles": []} and first.keys() == second.keys()
  assert [float(str(np.float32(score))) for score in first["scores"]] == first["scores"]
  histories.write_text('["ü1"]\n"ü2"\n')
  with pytest.raises(ValueError, match="line 2 is '\"ü2\"', not a list"):
    standalone.read_histories(str(histories))
  histories.write_text('["ü1"]\n[\n')
  with pytest.raises(ValueError, match="line 2 is no JSON"):
    standalone.read_histories(str(histories))


@pytest.mark.parametrize("title", ["", "Title, “\x9b”"])
def test_the_command_of_the_artefact_prints_what_the_live_one_prints(title):
  model = make_trained({})
  model.catalogue.titles[:] = [title] + [""] * 39
  lists = [[101, 102], ["nothing", 103, "ü"], [], ["nothing"]]
  numbered, unknown = model.catalogue.number(lists)
  read = Histories([None] * 4, numbered, unknown)
  scores, items = model.top(numbered, 40)
  ends = np.count_nonzero(items, axis=1)
  rows = [(scores[row, :end], items[row, :end]) for row, end in enumerate(ends)]
  text = standalone.to_json(model.recommend(lists, 40), unknown, bool(title))
  assert text == files._to_json(model, read, rows, files.Job()) and '"unknown": 2' in text
  assert ("titles" in text) == bool(title) and "\x9b" not in text


@pytest.mark.parametrize("arguments, message", [
    ({"k": 31}, "k=31 must lie between 1 and the 30 items"),
    ({"k": 0}, "k=0"),
    ({"step": 99}, "no checkpoint of step 99"),
    ({"platforms": ["cpu", "abacus"]}, "abacus"),
    ({"platforms": []}, "must be some of cpu, cuda, tpu, rocm"),
    ({"platforms": ["tpu"], "check": True}, "cannot be checked here, on cpu"),
])
def test_a_wrong_order_leaves_nothing(arguments, message, run, tmp_path):
  with pytest.raises(ValueError, match=message):
    export(run, tmp_path / "out", **{"k": 5, "check": False} | arguments)
  assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(run, tmp_path):
  (tmp_path / "mine").write_text("kept")
  for out in (tmp_path, tmp_path / "mine"):
    with pytest.raises(ValueError, match="exists; remove it, or choose another folder"):
      export(run, out)
  with pytest.raises(ValueError, match="is a bucket"):
    export(run, "gs://bucket/out")
  with pytest.raises(ValueError, match="cannot be written"):
    export(run, tmp_path / "mine" / "out", k=5, check=False)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("step", ["hash_file", "write_readme", "measure_parity"])
def test_a_failure_in_the_middle_leaves_nothing(step, run, tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")
  monkeypatch.setattr(artefact, step, fail)
  with pytest.raises(ValueError, match="cannot be written: No space left on device"):
    export(run, tmp_path / "out", k=5)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [
    (lambda lines: [line | {"scores": [score * 1.001 for score in line["scores"]]} for line in lines], "scores differ"),
    (lambda lines: [line | {"items": line["items"][::-1]} for line in lines], "items differ"),
    (lambda lines: [{name: column[:-1] for name, column in line.items()} for line in lines], "gives .* items and the"),
])
def test_an_artefact_that_gives_something_else_is_not_left(change, message, run, tmp_path, monkeypatch):
  def run_fresh(folder, histories, k, backend):  # no process: what it would print is made of the live model
    rows = on_one_device(load(run), backend).recommend(histories, k)
    return change([{"items": [best.item for best in row], "scores": [best.score for best in row]} for row in rows])

  monkeypatch.setattr(artefact, "run_fresh", run_fresh)
  with pytest.raises(ValueError, match=message):
    export(run, tmp_path / "out", k=5)
  assert not list(tmp_path.iterdir())


def test_an_artefact_that_does_not_run_is_not_left(run, tmp_path, monkeypatch):
  monkeypatch.setattr(artefact, "FRESH", "raise RuntimeError('no such thing')")
  with pytest.raises(ValueError, match="does not run: RuntimeError: no such thing"):
    export(run, tmp_path / "out", k=5)
  assert not list(tmp_path.iterdir())


def test_titles_that_hold_ends_of_lines_pass_the_check(tmp_path):
  model = make_trained({})
  model.catalogue.titles[:] = ["one\u2028two\u2029three\x85four"] * 40
  artefact.write_folder(tmp_path, model, 5, artefact.export_program(model, 5, ("cpu",)))
  assert artefact.measure_parity(model, tmp_path, 5, "cpu")["difference"] <= TOLERANCE


def test_the_command_of_the_artefact_reads_past_a_byte_order_mark(tmp_path):
  (tmp_path / "h.jsonl").write_bytes('\ufeff["ü1"]\r\n'.encode())
  assert standalone.read_histories(str(tmp_path / "h.jsonl")) == [["ü1"]]
