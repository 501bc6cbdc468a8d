"""Files made to harm: nothing outside of their folder is touched, no code is run, memory stays bounded, one ValueError.

docs/security.md says what is trusted; tests/fuzz_test.py has files that are odd or damaged by chance.
"""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import types
import zipfile

import jax
import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from export_test import make_trained
from figures_test import write_run
from prepared_test import make_config, write_log
from report_test import NASTY

from awrsr_jax import analyze, command, describe, evaluate, foreign, recommend
from awrsr_jax.analysis import attention, maps, report, results, runs
from awrsr_jax.config import default, walk
from awrsr_jax.data import from_tfds, log, movielens, prepared, readers
from awrsr_jax.engine import checkpoint, run_folder
from awrsr_jax.engine.state import NO_STEP, TrainState, Window
from awrsr_jax.inference import artefact, files, histories, standalone
from awrsr_jax.inference.trained import load

# Orbax leaves failed reads behind, and Python tells of them when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = pathlib.Path(__file__).parent.parent
DEEP = "[" * 100_000
CONTROLS = "\x1b[2J\x1b]0;t\x07\r\b\x7f\x9b31m\u202e\u2066"  # clear, title, C1, right to left
OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a\0b", "sub/name", "name/"]
JSON = '{"user": "u", "item": "i", "time": %s}\n'
ODD_IDS = ["=1+1", "a\nb", "a\tb", '"', "a,b", "<script>", "</style>", "\x1b[2J", "\u202eid", "x" * 10**6]


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hostile")
  config = make_config(write_log(folder / "log.csv", rows=600, users=30, items=20), data__k_core=3)
  prepared.prepare(config.data, folder / "out", 2**28)
  return config, folder / "out"


@pytest.fixture
def corpus(prepared_folder, tmp_path):
  """A copy of a prepared folder, and the config.data that opens it."""
  config, folder = prepared_folder
  data = ml_collections.ConfigDict(config.data.to_dict())
  data.path = str(shutil.copytree(folder, tmp_path / "out"))
  return data, tmp_path / "out"


@pytest.fixture(scope="module")
def model():
  """A model that was never trained, of 40 items."""
  return make_trained({})


@pytest.fixture(scope="module")
def artefact_folder(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("artefact")
  model.record["corpus"].setdefault("name", "corpus")
  artefact.write_folder(folder, model, 5, artefact.export_program(model, 5, ("cpu",)))
  return folder


@pytest.fixture
def exported(artefact_folder, tmp_path):
  return shutil.copytree(artefact_folder, tmp_path / "exported")


@pytest.fixture(scope="module")
def run_with_checkpoint(model, tmp_path_factory):
  """A run folder whose checkpoint was saved without training."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "config.json").write_text(json.dumps(run_folder.nest(dict(walk(model.config)))))
  state = TrainState(np.int32(3), model.params, (), Window(*np.zeros(4, np.float32)), np.int32(NO_STEP))
  ids = {"items": checkpoint.encode_texts([f"i{number}" for number in range(40)]),
         "titles": checkpoint.encode_texts([""] * 40)}
  config = json.loads((folder / "config.json").read_text())
  record = {"step": 3, "best_step": 0, "corpus": {"items": 40}, "config": config}
  with checkpoint.open_checkpoints(folder) as manager:
    checkpoint.save(manager, jax.tree.map(jax.numpy.asarray, state), record, ids)
    manager.wait_until_finished()
  return folder


@pytest.fixture
def run(run_with_checkpoint, tmp_path):
  return shutil.copytree(run_with_checkpoint, tmp_path / "run")


def edit(path, change):
  """Changes a JSON file by a function of its content, or puts a text in its place."""
  if isinstance(change, str):
    path.write_text(change)
    return
  content = json.loads(path.read_text())
  path.write_text(json.dumps(change(content) or content))


def put(folder, manifest, name, content):
  """Replaces a file of a folder, and what its manifest says of it."""
  (folder / name).write_bytes(content)
  said = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
  edit(folder / manifest, lambda found: found["files"].update({name: said}))


def savez(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def read(path, **values):
  """Reads a log, and returns how many rows it has."""
  data = default().data
  data.update_from_flattened_dict({"path": str(path), **values})
  with log.open_database() as database:
    return log.clean(readers.read(database, data), None, data.on_bad_row)["rows"]


class Payload:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return (open, (self.path, "w"))


# --- paths


@pytest.mark.parametrize("name", [*OUTSIDE, 5])
def test_a_prepared_folder_names_only_files_of_its_own(name, corpus):
  data, folder = corpus
  (folder.parent / "secret").write_text("secret")
  edit(folder / "prepared.json", lambda made: made["shards"].append(name))
  with pytest.raises(ValueError, match=r"prepared.json cannot be read \(it names .*no file in its folder"):
    prepared.open_corpus(data)
  if isinstance(name, str):
    edit(folder / "prepared.json", lambda made: (made["shards"].pop(), made["files"].update(
        {name: {"bytes": 6, "sha256": ""}})) and None)
    with pytest.raises(ValueError, match="no file in its folder"):
      prepared.open_corpus(data)


def test_a_prepared_folder_says_what_every_file_was_that_is_read(corpus):
  data, folder = corpus
  edit(folder / "prepared.json", lambda made: made["files"].pop("split.npz") and None)
  with pytest.raises(ValueError, match="does not say what split.npz had been"):
    prepared.open_corpus(data)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_artefact_names_only_files_of_its_own(name, exported):
  (exported.parent / "secret").write_text("secret")
  edit(exported / "manifest.json", lambda found: found["files"].update({name: {"bytes": 6, "sha256": ""}}))
  with pytest.raises(ValueError, match="manifest.json: its files are not .*of its folder|is missing"):
    standalone.Recommender(exported)


def test_members_of_a_zip_land_nowhere_but_in_a_folder_that_goes_again(tmp_path, monkeypatch):
  inside = tmp_path / "a" / "b"
  inside.mkdir(parents=True)
  monkeypatch.chdir(inside)
  monkeypatch.setattr(tempfile, "tempdir", str(inside))
  link = zipfile.ZipInfo("ml/movies.dat")
  link.external_attr = (stat.S_IFLNK | 0o777) << 16
  for member in ("../../ratings.dat", f"{tmp_path}/ratings.dat", "ratings.dat"):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("ml.zip", "w") as archive:
      archive.writestr("../evil", "x")
      archive.writestr(member, "1::1::5::1\n")
      archive.writestr(member, "1::1::5::1\n1::2::5::2\n")  # the last of one name counts
      archive.writestr(member.replace("ratings", "movies"), "1::A::B\n")
      archive.writestr(link, "/etc/passwd")
    assert read("ml.zip") == 2
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["a/b/ml.zip"]


def test_a_zip_that_fills_the_disk_is_one_value_error(tmp_path, monkeypatch):
  with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
    archive.writestr("ratings.dat", "1::1::5::1\n")

  def fill(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(shutil, "copyfileobj", fill)
  with pytest.raises(ValueError, match="ml.zip cannot be unpacked into .*No space left on device; TMPDIR"):
    read(tmp_path / "ml.zip")


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("mine")
  folder = epath.Path(tmp_path / "run")
  folder.mkdir()
  for name in ("config.json", "config.json.tmp"):
    os.symlink(victim, folder / name)
  os.symlink(tmp_path / "made", folder / ".lock")
  with pytest.raises(ValueError, match="cannot be written: Too many levels of symbolic links"):
    run_folder.lock_folder(folder)
  assert not os.path.exists(tmp_path / "made")
  run_folder.write_json(folder / "config.json", {})
  assert victim.read_text() == "mine" and not os.path.islink(folder / "config.json")


def test_a_report_does_not_go_where_a_link_of_the_run_leads(tmp_path):
  folder = write_run(tmp_path / "run")
  (tmp_path / "elsewhere").mkdir()
  os.symlink(tmp_path / "elsewhere", tmp_path / "run" / "analysis")
  with pytest.raises(ValueError, match="analysis leads to another place; say with --out"):
    analyze.analyze([folder], with_maps=False)
  assert not os.listdir(tmp_path / "elsewhere")


# --- resources

BOMBS = """
import os, resource, sys
from awrsr_jax.config import default
from awrsr_jax.data import log, readers
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
def read(name):
  data = default().data
  data.path = name
  data.format = {"a_pairs.txt": "pairs", "a_sequences.txt": "sequences"}.get(name, "auto")
  try:
    with log.open_database() as database:
      log.clean(readers.read(database, data), None, "error")
    return "read"
  except ValueError as error:
    return str(error)
read("small.csv")
begin = peak()
for name in sorted(os.listdir()):
  if name != "small.csv":
    told = ascii(read(name))
    print(name, peak() - begin, told)
"""
SIZE = 200 << 20
SMALLER = 40 << 20  # what DuckDB is to find takes longer


def test_files_that_unpack_to_one_endless_line_are_refused_in_bounded_memory(tmp_path):
  zeros = gzip.compress(b"0" * (SMALLER // 2), 1)
  head = {"csv": b"user,item,time\nu,i,1\n", "jsonl": JSON.encode() % b"1", "dat": b"1::1::5::1\n",
          "late.csv": b"user,item,time\n" + b"u,i,1\n" * 1500}
  for name, size in (("csv", SIZE), ("jsonl", SIZE), ("late.csv", SMALLER)):
    (tmp_path / f"bomb.{name}.gz").write_bytes(gzip.compress(head[name]) + zeros * (2 * size // SMALLER))
  (tmp_path / "small.csv").write_bytes(head["csv"])
  for name, start in (("plain.csv", head["csv"]), ("plain.jsonl", head["jsonl"]), ("ratings.dat", head["dat"]),
                      ("a_auto.txt", b"1 2\n"), ("a_pairs.txt", b"1 2\n"), ("a_sequences.txt", b"1 2 3\n")):
    with open(tmp_path / name, "wb") as file:
      file.write(start)
      file.truncate(SMALLER if name == "ratings.dat" else SIZE)  # a hole, which reads as zeros
  with zipfile.ZipFile(tmp_path / "ml.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("ml/ratings.dat", head["dat"] + b"0" * SMALLER)
  done = subprocess.run([sys.executable, "-c", BOMBS], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                        capture_output=True, text=True)
  found = [line.split(" ", 2) for line in done.stdout.splitlines()]
  assert len(found) == 10, done.stderr
  for name, grown, told in found:
    assert f"{name}:" in told.replace("ml.zip/ml/ratings.dat", "ml.zip") and len(told) < 1000, told
    assert int(grown) < (150 if name.startswith("a_") else 800), (name, grown)  # MiB; DuckDB has large buffers


def test_titles_of_any_size_are_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(movielens, "MOST_TITLES", 1000)
  (tmp_path / "ratings.dat").write_text("1::1::5::1\n")
  (tmp_path / "movies.dat").write_text("1::A::B\n" * 200)
  with pytest.raises(ValueError, match="movies.dat has 1600 bytes, and titles are read up to 1000"):
    read(tmp_path)


@pytest.mark.parametrize("token", ["9" * 5000, "9" * 30, "1e400", "NaN", "x" * 10**6])
@pytest.mark.parametrize("form", ["pairs", "sequences"])
def test_a_token_of_any_length_is_named_in_short(form, token, tmp_path):
  (tmp_path / "a.txt").write_text(f"1 2\n3 {token}\n")
  with pytest.raises(ValueError, match="a.txt:2: '.*' is (not a number|too large)") as caught:
    read(tmp_path / "a.txt", format=form)
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["9" * 5000, "1e400", "NaN", "-Infinity", DEEP, '"' + "9" * 5000 + '"'])
def test_a_time_of_json_that_is_no_number_is_a_bad_row(value, tmp_path):
  (tmp_path / "a.jsonl").write_text(JSON % 1 + JSON % value)
  with pytest.raises(ValueError, match=r"a.jsonl:2: "):
    read(tmp_path / "a.jsonl")


# --- JSON that is deep, of other kinds, or huge

SHAPES = [DEEP, '{"a":' * 100_000, "9" * 5000, "[]", "5", "null", '"text"', "", "{", "{}"]


@pytest.mark.parametrize("text", [*SHAPES, '{"a":' * 300 + "1" + "}" * 300])
def test_json_of_any_shape_is_one_value_error(text, prepared_folder, corpus, exported, run, tmp_path):
  (exported / "manifest.json").write_text(text)
  with pytest.raises(ValueError, match=r"manifest.json"):
    standalone.Recommender(exported)
  data, folder = corpus
  (folder / "prepared.json").write_text(text)
  with pytest.raises(ValueError, match=r"prepared.json cannot be read"):
    prepared.open_corpus(data)
  for name in ("config.json", "corpus.json", "result.json", "metrics.jsonl"):
    folder = write_run(tmp_path / name, ranks=False)
    (tmp_path / name / name).write_text(text)
    if (name, text) in (("config.json", "{}"), ("metrics.jsonl", "")):
      continue  # an early run; a run without lines
    with pytest.raises(ValueError, match=rf"{name}|has no"):
      made = runs.read_run(folder)
      report.render({"one": [made]}, [], [], "", [])
  (run / "result.json").write_text(text)
  with pytest.raises(ValueError, match="checkpoint 3 of .* cannot be loaded"):
    load(run)


@pytest.mark.parametrize("text", SHAPES)
def test_a_record_or_items_of_any_shape_are_one_value_error(text, exported, run):
  [path] = (run / "checkpoints").glob("*/record/metadata")
  path.write_text(text)
  with pytest.raises(ValueError, match="checkpoint 3 of .* cannot be loaded"):
    load(run)
  put(exported, "manifest.json", "items.json", text.encode())
  with pytest.raises(ValueError, match="items.json"):
    standalone.Recommender(exported)
  lines = exported / "lines.jsonl"
  lines.write_text(text)
  if text and text != "[]":
    with pytest.raises(ValueError, match="lines.jsonl"):
      standalone.read_histories(str(lines))


@pytest.mark.parametrize("change", [
    {"corpus": {}}, {"corpus": 5}, {"corpus": {"items": 2**31}}, {"corpus": {"items": 39}}, {"corpus": {"items": -1}},
    {"corpus": {"items": "40"}}, {"corpus": {"items": 1e400}}, {"config": []}, {"config": {}},
    {"config": {"seed": "<b>"}}, {"config": {"model": {"width": 2**40}}}, {"checksums": {}}, {"checksums": []},
    {"best_step": [3]}, {"schema": "2"}, {"ids_are_numbers": True}, {"ids_sha256": 5}])
def test_a_record_with_a_right_hash_and_wrong_values_is_one_value_error(change, run):
  [path] = (run / "checkpoints").glob("*/record/metadata")

  def sign(stored):
    content = stored["content"] | change
    return {"content": content, "sha256": checkpoint.hash_json(content)}

  edit(path, sign)
  with pytest.raises(ValueError, match="checkpoint 3 of .* cannot be loaded"):
    load(run)


def test_a_checkpoint_whose_record_is_whole_is_loaded(run):
  assert load(run).catalogue.item_ids[:2] == ["i0", "i1"]


@pytest.mark.parametrize("change", [
    lambda found: found.update(k="5"), lambda found: found.update(length=2**40), lambda found: found.update(rows=None),
    lambda found: found.update(items=41), lambda found: found.update(items="x"), lambda found: found.update(files=[]),
    lambda found: found.update(files={}), lambda found: found["files"].update({"items.json": 5})])
def test_a_manifest_with_wrong_values_is_one_value_error(change, exported):
  edit(exported / "manifest.json", lambda found: change(found) and None)
  with pytest.raises(ValueError, match=r"manifest.json|items.json"):
    standalone.Recommender(exported)


# --- numbers of a prepared folder


@pytest.mark.parametrize("change", [
    lambda a: a.update(lengths=-a["lengths"]), lambda a: a.update(lengths=a["lengths"] + 2**40),
    lambda a: a.update(lengths=a["lengths"].astype(float)), lambda a: a.update(lengths=a["lengths"][:-1]),
    lambda a: a.update(train_ends=a["train_ends"] + 2**33), lambda a: a.update(train_ends=a["train_ends"] * 0 - 1),
    lambda a: a.update(test=a["test"] + 2**33), lambda a: a.update(test=-a["test"]),
    lambda a: a.update(valid=a["valid"][:0]), lambda a: a.update(valid=a["valid"][::-1]), lambda a: a.pop("valid")])
def test_numbers_that_lead_out_of_a_prepared_corpus_are_refused(change, corpus):
  data, folder = corpus
  arrays = dict(np.load(folder / "split.npz"))
  change(arrays)
  put(folder, "prepared.json", "split.npz", savez(**arrays))
  with pytest.raises(ValueError, match="does not hold what a corpus does"):
    prepared.open_corpus(data)


@pytest.mark.parametrize("key, value", [
    ("users_of_shards", [0, 2**40]), ("users_of_shards", [0]), ("users_of_shards", []), ("users_of_shards", [0, -1, 5]),
    ("users_of_shards", [0, "1"]), ("shards", []), ("rules", []), ("description", {"items": 2**40}),
    ("description", []),
    ("description", {"users": "1"}), ("description", {"interactions": 1e400}), ("files", {"a": 5}), ("schema", None)])
def test_counts_of_a_prepared_json_that_are_none_are_refused(key, value, corpus):
  data, folder = corpus
  edit(folder / "prepared.json", lambda made: made.update(
      {key: made[key] | value if isinstance(value, dict) and isinstance(made[key], dict) else value}))
  with pytest.raises(ValueError, match="does not hold what a corpus does|prepared.json cannot be read|other rules"):
    prepared.open_corpus(data)


def test_an_array_that_claims_a_size_that_no_memory_has_is_refused(corpus):
  data, folder = corpus
  arrays = dict(np.load(folder / "split.npz"))
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, array in arrays.items():
      one = io.BytesIO()
      np.save(one, array)
      archive.writestr(f"{name}.npy", header.getvalue() if name == "lengths" else one.getvalue())
  put(folder, "prepared.json", "split.npz", buffer.getvalue())
  with pytest.raises(ValueError, match="does not hold what a corpus does"):
    prepared.open_corpus(data)


def test_histories_with_items_beyond_the_catalogue_are_refused_when_they_are_read(corpus):
  data, folder = corpus
  table = pyarrow.parquet.read_table(folder / "items.parquet").slice(0, 5)
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer)
  put(folder, "prepared.json", "items.parquet", buffer.getvalue())
  edit(folder / "prepared.json", lambda made: made["description"].update(items=5))
  opened = prepared.open_corpus(data)
  for get in (lambda: opened.items[:], lambda: opened.items[np.arange(50)]):
    with pytest.raises(ValueError, match="item numbers that none of its 5 items has"):
      get()


def test_rules_of_a_prepared_folder_that_are_none_are_refused(corpus):
  _, folder = corpus
  for rules in ({"k_core": "3"}, {"split.name": "x"}, {"no.key": 1}, {"tfds.name": "c4"}):
    edit(folder / "prepared.json", lambda made, rules=rules: made.update(rules=made["rules"] | rules))
    with pytest.raises(ValueError, match="prepared.json|other rules"):
      describe.describe(default(), str(folder))


# --- run folders


@pytest.mark.parametrize("name, change, words", [
    ("config.json", {"seed": "<script>"}, "'seed' is '<script>', and should be int"),
    ("config.json", {"seed": 2**64}, "'seed' is"), ("config.json", {"seed": None}, "'seed' is None"),
    ("config.json", {"train": {"epochs": "9"}}, "'train.epochs' is '9'"),
    ("corpus.json", {"users": "many"}, "'users' is 'many', and should be int"),
    ("corpus.json", {"name": 5}, "'name' is 5"),
    ("corpus.json", {"split": {"test": []}}, "is not a JSON object|\\[\\], not a JSON object"),
    ("corpus.json", {"density": True}, "'density' is True"), ("corpus.json", {"fingerprint": ["f"]}, "'fingerprint'"),
    ("result.json", {"test": 5}, "'test' is 5, not a JSON object"), ("result.json", {"protocol": {}}, "'protocol'"),
    ("result.json", {"test": {"mrr": "1"}}, "'mrr' is '1'"), ("result.json", {"epochs": 1e400}, "'epochs' is inf"),
    ("result.json", {"peak_memory": {"host": "1"}}, "'host'"), ("result.json", {"versions": {"jax": 5}}, "'jax' is 5"),
    ("metrics.jsonl", {"step": "1", "epoch": 1, "split": "train"}, "metrics.jsonl:1 is damaged .*'step'"),
    ("metrics.jsonl", {"step": 2**70, "epoch": 1, "split": "train"}, "'step'"),
    ("metrics.jsonl", {"step": 1, "epoch": 1, "split": "train", "loss": []}, "'loss' is \\[\\]"),
    ("metrics.jsonl", {"step": 1, "epoch": 1, "split": "train", "loss": "x" * 10**6}, "'loss' is 'x")])
def test_a_value_of_another_kind_in_a_run_folder_is_named(name, change, words, tmp_path):
  folder = write_run(tmp_path / "run", ranks=False)
  path = tmp_path / "run" / name
  if name == "metrics.jsonl":
    path.write_text(json.dumps(change) + "\n")
  else:
    edit(path, lambda found: found | change)
  with pytest.raises(ValueError, match=words) as caught:
    runs.read_run(folder)
  assert len(str(caught.value)) < 1000


def test_what_a_report_needs_and_a_run_lacks_is_named(tmp_path):
  for name, key in (("result.json", "versions"), ("result.json", "valid"), ("corpus.json", "split"),
                    ("corpus.json", "density")):
    folder = write_run(tmp_path / key, ranks=False)
    edit(tmp_path / key / name, lambda found, key=key: found.pop(key) and None)
    with pytest.raises(ValueError, match=f"{name} has no '{key}'"):
      report.render({"one": [runs.read_run(folder)]}, [], [], "", [])


def test_lines_that_are_not_finite_are_drawn_or_left_out(tmp_path):
  folder = write_run(tmp_path / "run")
  with open(tmp_path / "run" / "metrics.jsonl", "w") as file:
    file.writelines(f'{{"step": {step}, "epoch": {step}, "split": "{split}", "loss": NaN, "grad_norm": Infinity, '
                    f'"ndcg@5": -Infinity}}\n' for step in (1, 2) for split in ("train", "valid"))
  analyze.analyze([folder], formats=("svg",), with_maps=False)
  assert (tmp_path / "run" / "analysis" / "report.html").exists()


RANKS = {"user": ["u", "v"], "item": [1, 2], "rank": np.float32([1, 2]), "history": np.int32([2, 3]),
         "trained": np.int64([1, 2])}


@pytest.mark.parametrize("change", [
    {"rank": np.float32([0, 1])}, {"rank": np.float32([np.nan, 1])}, {"rank": np.float32([np.inf, 1])},
    {"rank": np.float32([-1, 1])}, {"rank": ["1", "2"]}, {"rank": [[1.0], [2.0]]}, {"rank": [None, 1.0]},
    {"history": [0.5, 1]}, {"trained": [None, 1]}, {"user": [b"a", b"b"]}, {"user": [["a"], ["b"]]}, {"item": [1.5, 2]},
    {"user": None}])
def test_ranks_of_other_columns_are_refused(change, tmp_path):
  columns = {name: values for name, values in (RANKS | change).items() if values is not None}
  pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "ranks.parquet")
  with pytest.raises(ValueError, match=r"ranks.parquet cannot be read"):
    run_folder.read_ranks(epath.Path(tmp_path / "ranks.parquet"))


# --- texts


@pytest.fixture
def odd(model):
  """A model's stand-in whose ids and titles are odd."""
  ids = [*ODD_IDS, CONTROLS]
  return types.SimpleNamespace(catalogue=standalone.Catalogue(ids, [f"{raw}\n  1  fake" for raw in ids], "here"))


def found_all(odd):
  count = len(odd.catalogue.item_ids)
  asked = histories.Histories([CONTROLS + "\nuser"], [np.array([1], np.int32)], [[]])
  return asked, [(np.ones(count, np.float32), np.arange(1, count + 1, dtype=np.int32))]


def test_text_for_a_terminal_has_a_short_line_an_item_and_no_controls(odd, monkeypatch, capsys):
  text = files._to_text(odd, *found_all(odd), 0)
  monkeypatch.setattr(recommend, "TEXT", types.SimpleNamespace(value=True), raising=False)
  odd.similar = lambda items, k, allow, deny: [odd.catalogue.name(*found_all(odd)[1][0])]
  recommend.write_similar(odd, ["=1+1"], files.Job())
  for shown in (text, capsys.readouterr().out):
    assert shown.count("\n") == 1 + len(odd.catalogue.item_ids) and max(map(len, shown.split("\n"))) < 500
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_json_lines_escape_what_a_terminal_obeys_and_say_the_same(odd):
  text = files._to_json(odd, *found_all(odd), files.Job())
  assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f]", text)
  assert json.loads(text)["items"] == odd.catalogue.item_ids


def test_csv_keeps_every_id_as_it_stands(odd):
  content = files._to_table(odd, *found_all(odd), 0, "csv").decode()
  rows = list(csv.reader(io.StringIO(content, newline="")))
  assert [row[2] for row in rows[1:]] == odd.catalogue.item_ids


def test_an_error_of_a_command_moves_no_cursor_and_fills_no_screen():
  with pytest.raises(SystemExit) as caught:
    command.refuse(ValueError(CONTROLS + "\ud800" + "é" * 10**6))
  told = str(caught.value)
  assert r"\x1b[2J" in told and r"\x9b31m\u202e" in told and len(told) < 2 * foreign.LONGEST
  assert not re.search("[\0-\x1f\x7f-\x9f\u202e]", told) and told.encode()


def test_a_page_of_results_keeps_its_form(tmp_path):
  for text in ("a|b", "a\nb", "# a", "> a", "- a", "[a](b)", "<script>", "`a`", "*a*", "a\u2028b", CONTROLS):
    shown = results.escape(text)
    assert not re.search(r"(?<!\\)[|`<*\[]|^[#>-]|[\n\x1b\u202e]", shown), shown
  memory = types.SimpleNamespace(result={"peak_memory": {"host|x\n# y": 1 << 20}})
  assert results.show_memory([memory]) == r"host\|x # y 1 MiB"


def test_titles_of_any_length_do_not_fill_the_tables_of_a_report(monkeypatch):
  catalogue = standalone.Catalogue(["i"] * 9, [NASTY + "x" * 10**5] * 9, "")
  layer = types.SimpleNamespace(first_order=np.ones((1, 9, 9)), refined=np.ones((1, 9, 9)), change=np.ones((1, 9, 9)))
  config = ml_collections.ConfigDict({
      "data": {"max_length": 9}, "model": {"refine": "none", "attention": {"sink": 1.0}}})
  trained = types.SimpleNamespace(catalogue=catalogue, config=config, read_layers=lambda numbers: [layer])
  seen = types.SimpleNamespace(corpus=types.SimpleNamespace(user_ids=["u" * 10**5]), users=[0], lengths=[9],
                               newest=lambda rows, length: [np.arange(1, 10)])
  monkeypatch.setattr(maps, "draw_map", lambda *_: None)
  [drawing] = maps.map_drawings(trained, seen, 0)
  assert sum(len(str(cell)) for row in drawing.rows for cell in row) < 30_000 and len(drawing.caption) < 1000


def test_the_readme_of_an_artefact_holds_no_command_but_its_own(model):
  about = {"config": {"model": {"backbone": "sasrec"}}, "items": 2, "step": 1, "k": 5, "length": 8, "jax_version": "1",
           "platforms": ["cpu"], "corpus": {"name": "a\n```sh\nrm -rf x", "fingerprint": "f" * 20}}
  ids = ["'; touch x; '", "$(touch x)`touch x`\n```"]
  text = artefact.write_readme(about, ids)
  [line] = [line for line in text.split("\n") if line.startswith("echo")]
  words = shlex.split(line)
  assert words[:1] + words[2:] == ["echo", ">", "histories.jsonl"] and json.loads(words[1]) == ids
  assert sum(line.startswith("```") for line in text.split("\n")) == 4


# --- code and network


def test_no_array_of_objects_is_unpickled(corpus, exported, tmp_path):
  objects = savez(lengths=np.array([Payload(tmp_path / "run")], dtype=object))
  data, folder = corpus
  put(folder, "prepared.json", "split.npz", objects)
  put(exported, "manifest.json", "params.npz", objects)
  for use in (lambda: prepared.open_corpus(data), lambda: standalone.Recommender(exported)):
    with pytest.raises(ValueError, match="[Oo]bject arrays cannot be loaded"):
      use()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    {"pythonClassName": "evil_module.Feature"},
    {"pythonClassName": f"{from_tfds.OWN}features_dict.FeaturesDict",
     "featuresDict": {"features": {"a": {"pythonClassName": "evil_module.Feature"}}}},
    {"type": "evil_module.Feature", "content": {}},
    {"type": f"{from_tfds.OWN}features_dict.FeaturesDict", "proto_cls": "tensorflow_datasets.FeaturesDict",
     "content": json.dumps({"features": {"a": {"pythonClassName": "evil_module.Feature"}}})}])
def test_a_tfds_folder_has_no_module_imported(content, corpus, tmp_path, monkeypatch):
  _, folder = corpus
  (folder / "prepared.json").unlink()
  (tmp_path / "evil_module.py").write_text("import pathlib\n(pathlib.Path(__file__).parent / 'ran').touch()\n")
  monkeypatch.syspath_prepend(tmp_path)
  (folder / "features.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="features.json names 'evil_module.Feature'"):
    read(folder)
  assert not (tmp_path / "ran").exists()


def test_a_data_set_of_others_is_not_run_by_its_name(monkeypatch):
  import tensorflow_datasets
  monkeypatch.setattr(tensorflow_datasets, "builder", lambda name: pytest.fail("asked for"))
  data = default().data
  data.tfds.name = "huggingface:someone/data"
  with pytest.raises(ValueError, match="running their code"):
    from_tfds.read_tfds(data)


@pytest.mark.parametrize("changes, words", [
    ({"data.tfds.name": "c4"}, "may not have it downloaded here; --data_path"),
    ({"data.format": "tfds"}, "may not have it downloaded here; --data_path"),
    ({}, "was trained on a table that was given from Python; --data_path=FILE names a file of its rows")])
def test_looking_at_a_run_of_others_downloads_no_data_set_that_it_names(changes, words, tmp_path, monkeypatch):
  monkeypatch.setattr(from_tfds, "_open_name", lambda name: pytest.fail("asked for"))
  monkeypatch.setattr(evaluate, "load", lambda *_: make_trained({"data.name": ""} | changes))
  run = runs.read_run(write_run(tmp_path / "run", 0, changes, ranks=False))
  for use in (lambda: attention.read_histories(run), lambda: evaluate.evaluate(run.folder)):
    with pytest.raises(ValueError, match=words):
      use()


def test_a_config_that_others_stored_is_only_data(run, tmp_path):
  for text in ("import os", "{'seed': __import__('os')}", '{"seed": "${oc.env:HOME}"}'):
    (run / "config.json").write_text(text)
    load(run)  # the record of the checkpoint counts
    with pytest.raises(ValueError, match=r"config.json"):
      runs.read_config(epath.Path(run))
