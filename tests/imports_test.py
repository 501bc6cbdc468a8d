"""The house: a file imports only from files above it, and training needs no TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "awrsr_jax"
# Every file of the package, ground floor first. A file may import, at its top or inside a function, only from files
# above it in this list.
ORDER = (
    "config", "malloc", "foreign", "command",
    "data.log", "data.rules", "data.lines", "data.text", "data.columns",
    "data.tables", "data.from_tfds", "data.movielens", "data.readers",
    "data.synthetic", "data.splits", "data.corpus", "data.cooccurrence", "data.statistics", "data.records",
    "data.prepared", "data.batches",
    "model.dropout", "model.gaussian", "model.attention", "model.refine", "model.blocks", "model.hidden",
    "model.sasrec", "model.stosa", "model.backbones", "model.losses",
    "engine.processes", "engine.mesh", "engine.feed", "engine.state", "engine.objective", "engine.step",
    "engine.ranking", "engine.compiling", "engine.memory", "engine.run_folder", "engine.metrics", "engine.checkpoint",
    "engine.train",
    "inference.top", "inference.explain", "inference.standalone", "inference.trained", "inference.histories",
    "inference.files", "inference.artefact",
    "analysis.runs", "analysis.significance", "analysis.text", "analysis.drawing", "analysis.figures",
    "analysis.attention", "analysis.maps", "analysis.page", "analysis.report", "analysis.grid", "analysis.results",
    "main", "prepare", "describe", "baselines", "evaluate", "recommend", "export", "compare", "analyze", "reproduce",
    "bench.contenders", "bench.measures", "bench.__main__",
)
FILES = {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path
         for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported(source, module):
  """Returns the package's files that a source text imports, by their names in ORDER ("" is the package itself).

  Args:
    source: Python.
    module: its own name as in ORDER, for relative imports.
  """
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      parents = [PACKAGE, *module.split(".")]
      origin = [*parents[:len(parents) - node.level], *([node.module] if node.module else [])]
      origin = ".".join(origin) if node.level else node.module
      # `from a.b import c` may name the file a/b/c.py or something inside a/b.py.
      names += [f"{origin}.{alias.name}" if f"{origin}.{alias.name}".removeprefix(f"{PACKAGE}.") in ORDER else origin
                for alias in node.names]
  return [name.removeprefix(PACKAGE).removeprefix(".") for name in names
          if name == PACKAGE or name.startswith(f"{PACKAGE}.")]


def test_every_file_has_its_place():
  assert sorted(name for name in FILES if not name.endswith("__init__")) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_files_above_it(module):
  above = ORDER[:ORDER.index(module)]
  bare = ""  # the package itself, for its version
  assert [name for name in imported(FILES[module].read_text(), module) if name not in (bare, *above)] == []


def test_packages_import_nothing_when_they_are_imported():
  for name, path in FILES.items():
    if name.endswith("__init__"):
      assert not [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("source,expected", [
    ("import jax", []),
    ("import awrsr_jax", [""]),
    ("import awrsr_jax.config as c", ["config"]),
    ("from awrsr_jax import config", ["config"]),
    ("from awrsr_jax.config import walk", ["config"]),
    ("from awrsr_jax.engine import mesh, state", ["engine.mesh", "engine.state"]),
    ("def f():\n  from awrsr_jax.data.log import Interactions", ["data.log"]),
    ("from .mesh import make_mesh", ["engine.mesh"]),
    ("from . import mesh", ["engine.mesh"]),
    ("from ..model import losses", ["model.losses"]),
])
def test_the_walk_sees_every_form_of_import(source, expected):
  assert imported(source, "engine.state") == expected


def test_training_imports_no_tensorflow():
  code = ("import sys, awrsr_jax.engine.train; "
          "print([m for m in ('tensorflow', 'tensorflow_datasets', 'torch') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == "[]", done.stderr
