"""MovieLens-1M: 6,040 users, 3,416 movies, 999,611 interactions.

    python -m awrsr_jax.main --config=configs/ml1m.py --workdir=runs/ml1m

Downloads ml-1m.zip once. Offline: --config.data.path=FILE, where FILE is ratings.dat, the zip, or the sequences.
Result: docs/results.md has the table, docs/recipes.md what was tried. Some two hours on one busy CPU core.
`--config.model.refine=none` is plain SASRec, level with this refinement on the test split of one seed, in 90 minutes.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config with what this data set needs."""
  config = default()
  config.data.name = "ml-1m"
  config.data.k_core = 5  # the raw file holds rarer movies; the published sequences are its 5-core
  config.data.max_length = 200
  config.data.long_history = "windows"  # a quarter of the users have more items
  config.data.buckets = 4
  config.model.width = 128
  config.model.ffn_width = 256
  config.model.activation = "swiglu"
  config.model.branch_gates = True
  config.model.cosine = 14.0
  config.model.dropout = 0.25
  config.model.refine = "additive"
  config.model.awr.slots = "lag"
  config.train.epochs = 40
  config.train.batch_size = 32
  config.train.average = 0.999
  config.eval.every_epochs = 4
  return config
