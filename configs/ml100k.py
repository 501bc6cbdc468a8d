"""MovieLens-100K: 943 users, 1,349 movies, 99,287 interactions.

    python -m awrsr_jax.main --config=configs/ml100k.py --workdir=runs/ml100k

Downloads ml-100k.zip once. Offline: --config.data.path=FILE, where FILE is u.data, the zip, or the sequences.
Not measured yet.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config with what this data set needs."""
  config = default()
  config.data.name = "ml-100k"
  config.data.k_core = 5  # the raw file holds rarer movies
  config.data.max_length = 100
  config.model.dropout = 0.2
  return config
