"""What fault tests share: a small disk, an uninterrupted run, and the log that docs/reliability.md is made of."""

import json
import os
import pathlib
import subprocess

import pytest

from faults import runs


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
  report = (yield).get_result()
  if report.when == "call":
    item.passed = report.passed


@pytest.fixture
def record(request):
  """Returns a function: notes a fault and what happens then, for the file named by AWRSR_FAULTS_LOG.

  Call it first; the count of the row that it returns may be set later.
  """
  rows = []

  def record(fault: str, happens: str, count: int = 1) -> dict:
    rows.append({"fault": fault, "what happens": happens, "test": request.node.nodeid, "count": count})
    return rows[-1]

  yield record
  if "AWRSR_FAULTS_LOG" in os.environ:
    with open(os.environ["AWRSR_FAULTS_LOG"], "a") as file:
      for row in rows:
        file.write(json.dumps(row | {"green": getattr(request.node, "passed", False)}) + "\n")


@pytest.fixture
def disk(tmp_path):
  """A disk of 4 MiB of its own."""
  folder = tmp_path / "disk"
  folder.mkdir()
  try:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no tmpfs can be mounted here: {error}")
  yield folder
  subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def timed(tmp_path_factory) -> runs.Timed:
  """An uninterrupted run."""
  return runs.Timed(tmp_path_factory.mktemp("whole") / "run", *runs.FLAGS)


@pytest.fixture
def whole(timed) -> pathlib.Path:
  """The folder of an uninterrupted run."""
  return timed.workdir
