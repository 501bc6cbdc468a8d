"""Runs at the edge of what there is: one user, new items, n = 1, batches that fit nothing, updates that overflow."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from awrsr_jax.engine.train import train


def run(config, tmp_path, histories=None, **changes):
  """Trains on these histories, or the synthetic corpus of 60 users: finite figures, every user ranked once."""
  if histories:
    (tmp_path / "log.txt").write_text("".join(f"{user} {' '.join(map(str, items))}\n"
                                              for user, items in enumerate(histories, start=1)))
    config.data.update(name="", path=str(tmp_path / "log.txt"), format="sequences")
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  result = train(config, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert np.isfinite([line[name] for line in lines for name in ("loss", "ndcg@10") if name in line]).all()
  assert 0 < result["test"]["mrr"] <= 1
  assert pyarrow.parquet.read_table(tmp_path / "run" / "ranks.parquet").num_rows == len(histories or range(60))


@pytest.mark.parametrize("histories, changes", [
    pytest.param([[1, 2, 3, 4, 5, 6]], {}, id="one user"),
    pytest.param([[1, 2, 3, 9], [2, 3, 1, 8], [3, 2, 7, 6]], {"model__dtype": "bfloat16"},
                 id="targets that nobody was trained on, bfloat16"),
    pytest.param([[1, 2, 1, 2], [2, 1, 2, 1, 2]], {"model__heads": 8}, id="two items, heads of width 1"),
    pytest.param(None, {"data__max_length": 1, "train__batch_size": 4096, "eval__batch_size": 4096},
                 id="n = 1, batches larger than the corpus"),
    pytest.param(None, {"model__cosine": 1e4, "train__learning_rate": 0.5, "train__batch_size": 7,
                        "eval__batch_size": 7}, id="a softmax of one item, a last batch that is not full"),
])
def test_a_run_at_the_edge_ends_with_finite_figures_of_everyone(histories, changes, small_config, tmp_path):
  run(small_config, tmp_path, histories, **changes)


def test_an_overflow_in_the_last_update_is_an_error_and_no_figure(small_config, tmp_path):
  with pytest.raises(FloatingPointError, match="NaN among their scores"):
    run(small_config, tmp_path, train__learning_rate=3e38, train__epochs=1, train__batch_size=4096)
  assert not (tmp_path / "run" / "result.json").exists()
