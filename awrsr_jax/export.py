"""Exports a run: `python -m awrsr_jax.export --workdir=runs/ml1m --out=artefacts/ml1m`.

Makes a folder that recommends with jax and numpy alone: see inference/artefact.py, and docs/recommend.md.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags

from awrsr_jax.command import begin, refuse
from awrsr_jax.inference.artefact import PLATFORMS, export


def main(argv: Sequence[str]) -> None:
  """Exports, and prints what was made."""
  begin(argv)
  try:
    for name, value, what in (("workdir", WORKDIR.value, "the run folder that python -m awrsr_jax.main left"),
                              ("out", OUT.value, "the folder to make")):
      if not value:
        raise ValueError(f"--{name}=FOLDER is missing; it is {what}")
    made = export(WORKDIR.value, OUT.value, K.value, STEP.value, PLATFORMS_.value, not NOCHECK.value)
  except (ValueError, FloatingPointError) as error:
    refuse(error)
  print(report(OUT.value, made))


def report(out: str, made: dict[str, Any]) -> str:
  """Returns what `artefact.export` made, in words."""
  lines = [f"{out}: up to {made['k']} of {made['items']:,} items for histories of up to {made['length']} items, "
           f"checkpoint {made['step']} of {made['run']}, for {', '.join(made['platforms'])}"]
  lines += [f"{file['bytes']:>14,} bytes  {name}" for name, file in made["files"].items()]
  if made["parity"] is None:
    return "\n".join([*lines, "not compared with the live model (--nocheck)"])
  lines.append("a fresh process without awrsr_jax gave the scores of the live model: {scores:,} scores of {histories} "
               "histories differ by at most {difference:.1e} of the largest ({scale:.4g}; {tolerance:.1e} is allowed), "
               "and {items_compared:,} items that are not tied are the same, on {backend}".format(**made["parity"]))
  return "\n".join(lines)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  WORKDIR = flags.DEFINE_string("workdir", "", "The run folder.")
  OUT = flags.DEFINE_string("out", "", "The folder to make.")
  K = flags.DEFINE_integer("k", 100, "The most items that the artefact can give a history.")
  STEP = flags.DEFINE_integer("step", None, "Which checkpoint; not set: the best on validation.")
  PLATFORMS_ = flags.DEFINE_list("platforms", list(PLATFORMS), "What it shall run on: cpu, cuda, tpu, rocm.")
  NOCHECK = flags.DEFINE_bool("nocheck", False, "Do not compare the artefact with the live model.")
  app.run(main)
