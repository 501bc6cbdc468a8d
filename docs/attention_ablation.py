"""What trained attention is worth: ranks a finished run again with other weights in place of its own.

  PYTHONPATH=. python docs/attention_ablation.py runs/beauty_stosa

trained: the run's own weights. mean: every earlier item alike. self: the newest item alone. Nothing is trained anew.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from awrsr_jax.engine import ranking
from awrsr_jax.engine.train import make_job
from awrsr_jax.inference.trained import Trained, load
from awrsr_jax.model import sasrec, stosa

WEIGHTS = {
    "trained": None,
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

  def weights(self, scores: jax.Array, mask: jax.Array, drop: None) -> tuple[jax.Array, jax.Array]:
    """Returns the weights, twice: nothing is dropped."""
    weights = self._make(scores, mask)
    return weights, weights


def rank(trained: Trained) -> dict[str, float]:
  """Returns NDCG@10 of both splits, by the best checkpoint of a run."""
  job, params = make_job(trained.config), jax.device_get(trained.params)
  return {split: ranking.summarize(ranking.rank_users(job.rank_step, params, batches, job.mesh))["ndcg@10"]
          for split, batches in job.ranking.items()}


def main(workdir: str) -> None:
  """Prints a line for each kind of weights."""
  trained = load(workdir)
  own = stosa.build_refinement
  for name, weights in WEIGHTS.items():
    build = own if weights is None else lambda model, max_length, weights=weights: Fixed(weights)
    sasrec.build_refinement = stosa.build_refinement = build
    metrics = rank(trained)
    print(f"{name:8} valid ndcg@10={metrics['valid']:.4f} test ndcg@10={metrics['test']:.4f}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
