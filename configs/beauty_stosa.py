"""STOSA on Amazon Beauty, the published network, loss and settings, but 200 epochs for 500.

    python -m awrsr_jax.main --config=configs/beauty_stosa.py --workdir=runs/beauty_stosa --config.data.path=FILE

FILE as in configs/beauty.py. Result: docs/results.md has the tables, docs/stosa.md what attention does there. 10 to 30
minutes on one busy CPU core.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config with what this data set and this network need."""
  config = default()
  config.data.name = "beauty"
  config.data.max_length = 50
  config.data.buckets = 6
  config.model.backbone = "stosa"
  config.model.faithful = True
  config.model.norm = "post"
  config.model.activation = "elu"
  config.model.ffn_width = 256
  config.model.layers = 1
  config.model.heads = 4
  config.model.dropout = 0.2
  config.model.attention.dropout = 0.5
  config.model.refine = "none"
  config.model.awr.rank = 16  # the width of a head
  config.loss.name = "bpr"
  config.loss.num_negatives = 1
  config.loss.pvn_weight = 0.001
  config.train.epochs = 200
  config.train.batch_size = 512
  config.train.learning_rate = 5e-4
  config.eval.every_epochs = 10
  return config
