"""STOSA on MovieLens-1M, the published network and loss.

    python -m awrsr_jax.main --config=configs/ml1m_stosa.py --workdir=runs/ml1m_stosa

Data as in configs/ml1m.py. The settings are those of configs/beauty_stosa.py but for n = 200 and
batches of 128, carried over and not measured here.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config with what this data set and this network need."""
  config = default()
  config.data.name = "ml-1m"
  config.data.k_core = 5  # the raw file holds rarer movies; the published sequences are its 5-core
  config.data.max_length = 200
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
  config.train.batch_size = 128
  config.train.learning_rate = 5e-4
  config.eval.every_epochs = 10
  return config
