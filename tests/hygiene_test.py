"""What can be known without running the code: lint, types, shell scripts, and that nothing that is loaded is run."""

import ast
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run"))
FILES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "awrsr_jax").rglob("*.py"))}
PICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RUNNING = {"__import__", "eval", "exec", "run_path"}
RUN_BY_DESIGN = [("awrsr_jax/analysis/grid.py", "run_path")] * 2  # a grid, and the configs that it names


def find_tool(tool):
  path = shutil.which(tool, path=sysconfig.get_path("scripts"))
  return path or pytest.skip(f"{tool} is not installed in {sys.prefix}; requirements.txt names it")


@pytest.mark.parametrize("tool,arguments", [
    ("ruff", ["check", "--no-cache", "--quiet"]),
    ("mypy", ["--no-error-summary"]),
    ("shellcheck", ["--external-sources", *SCRIPTS]),
])
def test_the_tools_have_nothing_to_say(tool, arguments):
  done = subprocess.run([find_tool(tool), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr


def vulnerable(dependencies):
  """Yields what pip-audit, in JSON, found in the packages that it knows."""
  for package in dependencies:
    yield from (f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions'])}"
                for found in package.get("vulns", []))


def test_no_installed_package_has_a_known_vulnerability():
  command = [find_tool("pip-audit"), "--format=json", "--progress-spinner=off", "--timeout=10",
             f"--path={sysconfig.get_path('purelib')}"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dependencies = json.loads(done.stdout)["dependencies"]
  except (ValueError, subprocess.TimeoutExpired) as error:
    pytest.skip(f"pip-audit has no answer here: {error}")
  if all("skip_reason" in package for package in dependencies):
    pytest.skip(f"pip-audit knows no package here: {dependencies[0]['skip_reason']}")
  assert not list(vulnerable(dependencies))


def test_a_vulnerability_would_be_seen():
  assert list(vulnerable([{"name": "a", "skip_reason": "unknown"}, {"name": "b", "version": "1", "vulns": []}, {
      "name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}])) == [
          "c 2: PYSEC-1, fixed in 3"]


def dangers(source):
  """Yields what a source text has of pickles and of code that is made of text."""
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Import(names):
        yield from (alias.name for alias in names if alias.name.partition(".")[0] in PICKLING)
      case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PICKLING:
        yield module
      case ast.keyword("allow_pickle", value) if ast.unparse(value) != "False":
        yield "allow_pickle"
      case ast.Call(ast.Name(name) | ast.Attribute(attr=name)) if name in RUNNING:
        yield name


def test_nothing_that_is_loaded_is_run():
  assert [(name, found) for name, source in FILES.items() for found in dangers(source)] == RUN_BY_DESIGN


@pytest.mark.parametrize("source,found", [
    ("import os, pickle", ["pickle"]),
    ("def f():\n  from joblib.memory import Memory", ["joblib.memory"]),
    ("np.load(path, allow_pickle=True)", ["allow_pickle"]),
    ("np.load(path, allow_pickle=False)", []),
    ("eval(text)", ["eval"]),
    ("runpy.run_path(path)", ["run_path"]),
    ("from . import log", []),
])
def test_the_walk_sees_every_danger(source, found):
  assert list(dangers(source)) == found
