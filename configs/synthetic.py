"""A corpus made from a seed by a known law (awrsr_jax/data/synthetic.py), so that the best possible result is known.

  python -m awrsr_jax.main --config=configs/synthetic.py --workdir=runs/synthetic

A minute or two on one CPU core. Tables "C law" of docs/results.md have longer runs of it, beside the best possible.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default()
  config.data.name = "synthetic"
  config.data.max_length = 24
  config.data.buckets = 2
  config.model.dropout = 0.1
  config.model.awr.rank = 16
  config.train.epochs = 40
  return config
