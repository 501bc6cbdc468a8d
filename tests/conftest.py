"""Process set-up for all tests: 8 simulated devices, strict shapes, a compilation cache, corpora, a log of faults."""

import json
import os
import pathlib
import re

# Tests compile much and run little; XLA's newer fusion emitters alone double it. For processes that tests start, too.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"])

import jax
import numpy as np
import pytest
import tiny_config
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from awrsr_jax.data import splits
from awrsr_jax.data.corpus import Corpus, count_trained

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if not jax.config.jax_compilation_cache_dir:
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir  # for tests that start processes


ROWS = pytest.StashKey[list[dict]]()
# of docs/reliability.md: the tests of a file, each a row that its name tells
TOLD_BY_NAME = {"fuzz_test.py": "a source made at random", "hostile_test.py": "a hostile input",
                "numerics_test.py": "odd numbers and shapes"}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
  """Notes what a test did and whether it passed in the file named by AWRSR_FAULTS_LOG."""
  report = (yield).get_result()
  if report.when != "call" or report.skipped or "AWRSR_FAULTS_LOG" not in os.environ:
    return
  rows = item.stash.get(ROWS, [])
  if item.path.name in TOLD_BY_NAME:
    tried = re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", "1 passing"))
    rows = [{"fault": TOLD_BY_NAME[item.path.name], "what happens":
             item.originalname.removeprefix("test_").replace("_", " "), "count": sum(map(int, tried))}]
  with open(os.environ["AWRSR_FAULTS_LOG"], "a") as file:
    for row in rows:
      file.write(json.dumps(row | {"test": item.nodeid, "green": report.passed}) + "\n")


@pytest.fixture
def record(request):
  """Returns a function: notes a fault and what happens then, for the file named by AWRSR_FAULTS_LOG.

  Call it first; the count of the row that it returns may be set later.
  """
  rows = request.node.stash[ROWS] = []

  def record(fault: str, happens: str, count: int = 1) -> dict:
    rows.append({"fault": fault, "what happens": happens, "count": count})
    return rows[-1]
  return record


@pytest.fixture
def bucket(monkeypatch):
  """What lies behind gs:// in this test: objects in memory, without folders, as gcsfs shows a bucket."""
  class Bucket(MemoryFileSystem):
    store, pseudo_dirs = {}, [""]  # of its own

    def mkdir(self, *_, **__):
      """Makes nothing."""

    makedirs = mkdir

  found = Bucket()
  monkeypatch.setattr(backend.fsspec_backend, "fs", lambda _: found)
  return found


@pytest.fixture
def small_config():
  """The config of tests/tiny_config.py."""
  return tiny_config.get_config()


def from_arrays(items: np.ndarray, offsets: np.ndarray, split: splits.Split, num_items: int | None = None) -> Corpus:
  """Returns a Corpus of item numbers, without raw ids of its own."""
  num_items = int(items.max()) if num_items is None else num_items
  return Corpus(items, offsets, split, np.arange(len(offsets) - 1), np.arange(num_items + 1), {}, "made for a test",
                None, count_trained(items, offsets, split, num_items))


def raw_rows(database) -> list[tuple]:
  """Returns the (user, item, time) rows of a clean log in raw ids, in the order of their source."""
  return database.execute("SELECT users.raw, items.raw, time FROM coded JOIN users ON user = users.code JOIN items ON "
                          "item = items.code ORDER BY row").fetchall()


@pytest.fixture
def make_corpus():
  """Returns a function: lists of item numbers, one a user, and what makes a split of offsets -> Corpus."""
  def make(histories: list[list[int]], make_split=splits.leave_one_out) -> Corpus:
    offsets = np.cumsum([0, *map(len, histories)])
    return from_arrays(np.concatenate(histories).astype(np.int32), offsets, make_split(offsets))
  return make
