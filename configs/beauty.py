"""Amazon Beauty (2014, 5-core): 22,363 users, 12,101 items, 198,502 interactions.

    python -m awrsr_jax.main --config=configs/beauty.py --workdir=runs/beauty --config.data.path=FILE

FILE holds one line per user, `user item_1 item_2 ...`, oldest first. It cannot be downloaded: it has no licence.
Result: docs/results.md has the table, docs/recipes.md what was tried. About 40 minutes on one CPU core.
`--config.model.refine=none` is plain SASRec, level with this refinement.
"""

import ml_collections

from awrsr_jax.config import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the base config with what this data set needs."""
  config = default()
  config.data.name = "beauty"
  config.data.max_length = 50
  config.data.buckets = 6
  config.model.width = 256
  config.model.ffn_width = 256
  config.model.norm = "query"
  config.model.cosine = 14.0
  config.model.dropout = 0.6
  config.model.refine = "additive"
  config.model.awr.slots = "lag"
  config.train.item_start = "cooccurrence"
  config.train.epochs = 40
  config.train.batch_size = 512
  config.train.average = 0.997
  config.eval.every_epochs = 4
  return config
