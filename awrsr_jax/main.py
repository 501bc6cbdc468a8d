"""The main job: `python -m awrsr_jax.main --config=configs/ml1m.py --workdir=runs/ml1m`.

Trains, evaluates exactly, checkpoints; the same command resumes. Every key of the config can be set by flag, as in
`--config.model.refine=value`.
"""

import awrsr_jax.malloc  # noqa: F401, I001 (before a thread is started)

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from awrsr_jax.command import in_one_line, keep_compiled, parse_flags, refuse, require_config
from awrsr_jax.config import finalize
from awrsr_jax.data import prepared
from awrsr_jax.data.batches import training_batches
from awrsr_jax.engine import checkpoint, feed, memory, processes, run_folder
from awrsr_jax.engine.mesh import check_config, make_mesh
from awrsr_jax.engine.train import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, as in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder: checkpoints, metrics, result. May be gs://bucket/...")
COORDINATOR_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; not needed on Cloud "
                                          "TPU VMs and under SLURM.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run, on one host or many.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what memory a run would take on each device, and train nothing.")
DEVICES = flags.DEFINE_integer("devices", None, "With --dry_run: on so many devices, that need not be here.", 1)
ITEMS = flags.DEFINE_integer("items", None, "With --dry_run: for so many items, and no data is read.", 2)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: Sequence[str]) -> None:
  """Runs the job and prints its result; exit code 75: start the same command again."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; flags start with --")
  if flags.FLAGS.verbosity <= 0:
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells a page about every checkpoint
    logging.getLogger("absl").addFilter(lambda told: not told.exc_info)  # and of every error that it raises as well
  keep_compiled()
  try:
    if DRY_RUN.value:
      print(plan_memory())
      return
    check_flags()
    processes.start(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    logging.getLogger("awrsr_jax").setLevel(logging.INFO if processes.is_first() else logging.WARNING)
    result = train(CONFIG.value, WORKDIR.value, processes.listen())
  except processes.Preempted as notice:
    print(f"stopped as told, {notice}; all steps are saved, and the same command goes on", file=sys.stderr)
    sys.exit(processes.TRY_AGAIN)
  except processes.ProcessLost as error:
    print(f"another process of this run is gone ({error}). Start all of them again: the same command goes on from the "
          "newest checkpoint", file=sys.stderr, flush=True)
    os._exit(processes.TRY_AGAIN)  # a regular exit would wait for the process that is gone
  except (run_folder.DiskFull, checkpoint.Unreachable) as error:
    sys.stderr.write(f"{type(error).__name__}: {error}\n")  # at once: threads of Orbax may be telling of it too
    sys.stderr.flush()
    os._exit(1)  # a regular exit would write what is still open, and fail again
  except (ValueError, FloatingPointError) as error:
    if flags.FLAGS.verbosity > 0:
      traceback.print_exc()
    if not processes.fails_alone(error):
      refuse(error)
    print(in_one_line(error), file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for the others, and they wait for this process
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # at once: the others notice that this process is gone, and would not notice that it waits for them
  if processes.is_first():
    print_result(result)


def check_flags() -> None:
  """Raises ValueError when flags lack each other."""
  if not WORKDIR.value:
    raise ValueError("--workdir=FOLDER is missing; it is where the run lives, and continues")
  if DEVICES.value or ITEMS.value:
    raise ValueError("--devices and --items are for --dry_run; a run takes the devices that there are, and the items "
                     "of its data")


def plan_memory() -> str:
  """Returns what --dry_run prints."""
  if DEVICES.value:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
  config = finalize(CONFIG.value)
  mesh = make_mesh(config.mesh)
  check_config(mesh.shape["data"], mesh.shape["model"], config)
  items, corpus_bytes = ITEMS.value, 0
  if not items:
    corpus = prepared.load(config.data)
    items, batches = corpus.num_items, training_batches(corpus, config)
    corpus_bytes = feed.resident_bytes(batches, mesh.shape["data"]) if feed.is_resident(config, batches) else 0
  return f"{items} items, {memory.describe(memory.plan(config, items, mesh, corpus_bytes), mesh.devices.shape)}"


def print_result(result: dict) -> None:
  """Prints the test metrics, beside the computable best where there is one."""
  columns = {name: result[name] for name in ("valid", "test", "oracle") if name in result}
  print(f"{result['backbone']}, refine={result['refine']}, loss={result['loss']}, best epoch {result['best_epoch']}; "
        f"{result['protocol']}")
  print(" ".join([f"{'':8}", *(f"{name:>8}" for name in columns)]))
  for metric in result["test"]:
    print(" ".join([f"{metric:8}", *(f"{values[metric]:8.4f}" for values in columns.values())]))
  peaks = (f"{size / 2 ** 20:,.0f} MiB on the {where}" for where, size in result["peak_memory"].items())
  print(f"peak memory: {', '.join(peaks)}")


if __name__ == "__main__":
  require_config()
  app.run(main, flags_parser=parse_flags)
