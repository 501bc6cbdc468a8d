"""Benchmarks: `python -m awrsr_jax.bench --config=configs/beauty.py --peer=recbole,rectools,torch`.

Whatever is compared takes turns, a few seconds each, round after round in one call: so ratios hold on a machine that
is not quiet, and absolute numbers are only as good as the machine was. `--measure` chooses:

  throughput   training interactions/s and full-ranking users/s of whole epochs, each refinement beside the peers
  step         one train step of full length: refinements, fused and reference, beside the floor of this machine
  memory       of attention as n grows, and of the full softmax as the catalogue grows, as the compiler plans it
  start        from the command to the first train step, with an empty cache of compiled programs and with a full one

A peer is a program of launch/peers/ in an environment of its own, made at its first use.
"""

import awrsr_jax.malloc  # noqa: F401, I001 (before a thread is started)

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from awrsr_jax.analysis.text import align
from awrsr_jax.bench import measures
from awrsr_jax.command import keep_compiled, parse_flags, refuse, require_config
from awrsr_jax.config import REFINEMENTS, finalize
from awrsr_jax.engine import memory
from awrsr_jax.engine.mesh import mesh_sizes
from awrsr_jax.engine.run_folder import check_out, write_found

MEASURES = ("throughput", "step", "memory", "start")

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, as in configs/.", lock_config=True)
MEASURE = flags.DEFINE_list("measure", list(MEASURES), f"Which of {', '.join(MEASURES)}.")
REFINE = flags.DEFINE_list("refine", ["none", "simple", "value"], f"Which of {', '.join(REFINEMENTS)}.")
PEER = flags.DEFINE_list("peer", [], "Which programs of launch/peers/ to compare with: recbole, rectools, torch.")
SECONDS = flags.DEFINE_float("seconds", 10, "How long each trains in each round.", 0.1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often all take turns.", 1)
USERS = flags.DEFINE_integer("users", 5000, "How many users each ranks in each round.", 1)
OUT = flags.DEFINE_string("out", None, "A JSON file for all that was measured.")


def format_table(rows: list[dict[str, Any]]) -> str:
  """Returns rows of equal keys as a table."""
  def text(value: Any) -> str:
    if isinstance(value, float):
      return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value

  lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
  return "\n".join(align(lines))


def config_flags_of(words: Sequence[str]) -> list[str]:
  """Returns the words of a command line that set the config, in each of the ways that flags are written."""
  found, is_config = [], False
  for word in words:
    if word.startswith("-"):  # another word is the value of the flag before it
      is_config = word.lstrip("-").partition("=")[0].partition(".")[0] in ("config", "noconfig")
    found += [word] if is_config else []
  return found


def name_devices(mesh: Any) -> str:
  """Returns how many devices the mesh of a config has here, and their kind. Raises ValueError: see mesh_sizes."""
  data, model = mesh_sizes(mesh, jax.device_count())
  return f"{data * model} x {jax.devices()[0].device_kind}"


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  try:
    if len(argv) > 1:
      raise ValueError(f"unknown arguments {argv[1:]}; flags start with --")
    for flag, values, known in (("measure", MEASURE.value, MEASURES), ("refine", REFINE.value, REFINEMENTS)):
      if set(values) - set(known):
        raise ValueError(f"--{flag}={','.join(values)} is not of {', '.join(known)}")
    if OUT.value:
      check_out(OUT.value)
    keep_compiled()
    config = CONFIG.value
    mesh = finalize(config.copy_and_resolve_references()).mesh
    # first: once this process has a TPU, the one that is started cannot have it
    started = measures.measure_start(config_flags_of(sys.argv[1:])) if "start" in MEASURE.value else {}
    devices = name_devices(mesh)
    turns = measures.Turns(REFINE.value, PEER.value, ROUNDS.value, SECONDS.value, USERS.value)
    measure = {"throughput": lambda: measures.measure_throughput(config, turns),
               "step": lambda: measures.measure_step(config, turns),
               "memory": lambda: measures.measure_memory(config, turns),
               "start": lambda: started}
    result = {"device": f"{devices}, {os.cpu_count()} cores", "command": " ".join(sys.argv[1:]),
              "config": config.to_dict()}
    print(result["device"])
    for name in MEASURE.value:
      result[name] = measured = measure[name]()
      for title, rows in measured.items():
        if title.endswith("rows"):
          print(f"\n{name}{' ' if title != 'rows' else ''}{title.removesuffix('rows').strip()}\n{format_table(rows)}")
      print("\n".join(measured.get("notes", [])), flush=True)
      if OUT.value:  # now: what comes next may be refused
        write_found(OUT.value, result | {"peak memory": memory.measure_peak()})
  except ValueError as error:
    refuse(error)


if __name__ == "__main__":
  require_config()
  app.run(main, flags_parser=parse_flags)
