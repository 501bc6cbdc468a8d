"""A config that trains in seconds: a synthetic corpus of 60 users and 40 items, width 8, one device."""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  config = default()
  config.data.name = "synthetic"
  config.data.synthetic.num_users = 60
  config.data.synthetic.num_items = 40
  config.data.synthetic.length = 8
  config.data.max_length = 8
  config.data.buckets = 2
  config.model.width = 8
  config.model.heads = 2
  config.model.ffn_width = 16
  config.model.layers = 1
  config.model.awr.rank = 4
  config.model.table_multiple = 8
  config.train.batch_size = 16
  config.train.epochs = 2
  config.train.log_every = 3
  config.eval.batch_size = 32
  config.eval.block_items = 16
  config.mesh.data = 1
  return config
