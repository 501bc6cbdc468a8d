"""Memory that is freed is kept: what the commands that train do before a thread starts."""

import subprocess
import sys

import pytest

PROGRAM = """
{first}
import concurrent.futures, resource
import numpy as np

def touch_again(times):
  for _ in range(times):
    np.ones(64 << 20, np.uint8)

with concurrent.futures.ThreadPoolExecutor(1) as threads:
  threads.submit(touch_again, 3).result()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  threads.submit(touch_again, 20).result()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_large_arrays_of_a_thread_are_not_faulted_in_again():
  faults = {first: int(subprocess.run([sys.executable, "-c", PROGRAM.format(first=first)], check=True,
                                      capture_output=True, text=True).stdout)
            for first in ("", "import awrsr_jax.malloc")}
  assert faults["import awrsr_jax.malloc"] < 100 < faults[""]


@pytest.mark.parametrize("command", ["main", "bench.__main__"])
def test_commands_that_train_import_it_first(command):
  names = ("awrsr_jax.malloc", "numpy", "jax")
  program = f"import sys, awrsr_jax.{command}; print([name for name in sys.modules if name in {names}])"
  order = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
  assert order.startswith("['awrsr_jax.malloc'"), order
