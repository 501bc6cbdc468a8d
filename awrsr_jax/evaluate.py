"""Ranks by a trained run again: `python -m awrsr_jax.evaluate --workdir=runs/ml1m --protocol=uniform100`.

The model is the one that training chose on validation. Its data are read as its config says, or from --data_path; they
must be what it was trained on. So a run can be compared with papers that rank among samples or leave seen items in, and
one that was watched by samples can be ranked among all items, without training again. The run folder stays as it is.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from awrsr_jax.command import begin, refuse
from awrsr_jax.config import restore
from awrsr_jax.data.batches import ranking_batches
from awrsr_jax.data.splits import HELD_OUT
from awrsr_jax.engine.ranking import PROTOCOLS, describe_protocol, make_rank_step, rank_users, summarize
from awrsr_jax.engine.run_folder import read_data
from awrsr_jax.inference.trained import load


def evaluate(workdir: str | os.PathLike[str], protocol: str | None = None,
             data_path: str | os.PathLike[str] | None = None, step: int | None = None) -> dict[str, Any]:
  """Ranks both held-out splits by the model of a run.

  Args:
    workdir: the run folder.
    protocol: as `config.eval.protocol`; None: that of the run.
    data_path: where the data of the run lie now, instead of `config.data.path`.
    step: of the checkpoint; None: the best on validation.

  Returns:
    "protocol" in words, "step", and "valid" and "test", see `ranking.summarize`.

  Raises:
    ValueError: see `trained.load` and `run_folder.read_data`; or too few items are left to sample candidates from.
    FloatingPointError: a score is NaN.
  """
  trained = load(workdir, step)
  values = trained.config.to_dict()
  values["eval"]["protocol"] = protocol or values["eval"]["protocol"]
  config = restore(values, f"checkpoint {trained.step} of {workdir}")
  corpus = read_data(config.data, trained.record["corpus"], workdir, data_path)
  devices = trained.mesh.shape["data"]
  batch_size = -(-config.eval.batch_size // devices) * devices
  rank_step = make_rank_step(trained.backbone, trained.mesh, config.eval.block_items)
  found = {split: rank_users(rank_step, trained.params, dataclasses.replace(
      ranking_batches(corpus, config, split), batch_size=batch_size), trained.mesh) for split in HELD_OUT}
  return {"protocol": describe_protocol(config.eval.protocol, corpus.split.words), "step": trained.step,
          **{split: summarize(ranks) for split, ranks in found.items()}}


def main(argv: Sequence[str]) -> None:
  """Ranks, and prints what was found as JSON."""
  begin(argv)
  try:
    if not WORKDIR.value:
      raise ValueError("--workdir=FOLDER is missing; it is the run folder that python -m awrsr_jax.main left")
    print(json.dumps(evaluate(WORKDIR.value, PROTOCOL.value, DATA_PATH.value, STEP.value), indent=2))
  except (ValueError, FloatingPointError) as error:
    refuse(type(error)(str(error).replace("--config.eval.protocol", "--protocol")))


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  WORKDIR = flags.DEFINE_string("workdir", "", "The run folder.")
  PROTOCOL = flags.DEFINE_enum("protocol", None, list(PROTOCOLS), "As config.eval.protocol; not set: that of the run.")
  DATA_PATH = flags.DEFINE_string("data_path", None, "Where the data of the run lie now, instead of config.data.path.")
  STEP = flags.DEFINE_integer("step", None, "Which checkpoint; not set: the best on validation.")
  app.run(main)
