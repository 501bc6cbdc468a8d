"""Prepares a log for training: `python -m awrsr_jax.prepare --config=my_config.py --out=prepared/my_log`.

Logs may be larger than memory. Afterwards `--config.data.path=prepared/my_log` trains on it.
"""

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from awrsr_jax.command import begin, parse_flags_or_defaults, refuse
from awrsr_jax.config import finalize
from awrsr_jax.data import prepared


def main(argv: Sequence[str]) -> None:
  """Prepares, and prints what was made."""
  begin(argv)
  try:
    if not OUT.value:
      raise ValueError("--out=FOLDER is missing; it is where the prepared corpus goes")
    made = prepared.prepare(finalize(CONFIG.value).data, OUT.value, MEMORY.value * 2 ** 20)
  except ValueError as error:
    refuse(error)
  size = sum(file["bytes"] for file in made["files"].values())
  print("{users} users, {items} items, {interactions} interactions in {size:,.0f} MiB; train on it with "
        "--config.data.path={out}".format(**made["description"], size=size / 2 ** 20, out=OUT.value))


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  CONFIG = config_flags.DEFINE_config_file("config", None, "A config file; config.data says what to read, and "
                                           "by which rules.", lock_config=True)
  OUT = flags.DEFINE_string("out", None, "The folder to make.")
  MEMORY = flags.DEFINE_integer("memory_mib", 1024, "What the database may take of memory, in MiB; the rest takes some "
                                "hundred MiB more.", 64)
  app.run(main, flags_parser=parse_flags_or_defaults)
