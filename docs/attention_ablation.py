"""What attention weights that are learned are worth, beside weights that nothing changes.

  PYTHONPATH=. python docs/attention_ablation.py rank runs/beauty
  PYTHONPATH=. python docs/attention_ablation.py train mean --config=configs/beauty.py --workdir=runs/beauty_mean

mean: every item up to here alike. self: the newest item alone. `rank` ranks a finished run by its own weights and by
each of these in their place, nothing trained anew. `train` is awrsr_jax.main, with its flags, and has them from the
first step on, dropped as learned ones are; its run folder is of no use without this file.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app

from awrsr_jax import main as command
from awrsr_jax.engine import ranking
from awrsr_jax.engine.train import make_job
from awrsr_jax.inference.trained import Trained, load
from awrsr_jax.model import sasrec, stosa
from awrsr_jax.model.dropout import Drop, number_rows

WEIGHTS = {
    "mean": lambda scores, mask: jnp.broadcast_to(mask / jnp.maximum(mask.sum(-1, keepdims=True), 1), scores.shape),
    "self": lambda scores, mask: jnp.broadcast_to(mask * jnp.eye(mask.shape[-1])[None, None], scores.shape),
}


class Fixed:
  """Takes the place of a refinement: weights that no score changes."""

  combine = "fixed"

  def __init__(self, make: Callable[[jax.Array, jax.Array], jax.Array]):
    self._make = make

  def refuses_blocks(self, squares: bool) -> str:
    """Returns why weights are kept as matrices."""
    return "fixed weights are matrices"

  def weights(self, scores: jax.Array, mask: jax.Array, drop: Drop | None) -> tuple[jax.Array, jax.Array]:
    """Returns the weights with and without what is dropped."""
    weights = self._make(scores, mask)
    batch, heads, length, _ = scores.shape
    rows = number_rows((heads, batch, length)).swapaxes(0, 1)
    return weights if drop is None else drop.again(0)(weights, rows), weights


def fix(kind: str) -> None:
  """Gives every backbone that is built from here on these weights."""
  sasrec.build_refinement = stosa.build_refinement = lambda model, max_length: Fixed(WEIGHTS[kind])


def rank(trained: Trained) -> dict[str, float]:
  """Returns NDCG@10 of both splits, by the best checkpoint of a run."""
  job, params = make_job(trained.config), jax.device_get(trained.params)
  return {split: ranking.summarize(ranking.rank_users(job.rank_step, params, batches, job.mesh))["ndcg@10"]
          for split, batches in job.ranking.items()}


def rank_with_each(workdir: str) -> None:
  """Prints a line for each kind of weights."""
  trained = load(workdir)
  for kind in ("trained", *WEIGHTS):
    if kind != "trained":
      fix(kind)
    metrics = rank(trained)
    print(f"{kind:8} valid ndcg@10={metrics['valid']:.4f} test ndcg@10={metrics['test']:.4f}", flush=True)


if __name__ == "__main__":
  what, name, *others = sys.argv[1:]
  if what == "rank":
    rank_with_each(name)
  elif what == "train":
    fix(name)
    app.run(command.main, [sys.argv[0], *others], flags_parser=command.parse_flags)
  else:
    sys.exit(f"{what} is neither rank nor train")
