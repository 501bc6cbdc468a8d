"""What fault tests share: a small disk and an uninterrupted run."""

import pathlib
import subprocess

import pytest

from faults import runs


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
