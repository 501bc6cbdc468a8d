"""Baselines for every table: `python -m awrsr_jax.baselines --config=configs/beauty.py --config.data.path=FILE`.

They learn from the training parts alone and are ranked as trained models are: the same targets and histories, under the
same protocol and tie rule. Three that need no training loop:

  popularity   how often an item is trained on
  last item    a Markov chain of order one: how often an item follows the newest one of the history
  item-kNN     cosine similarity to the items of the history, whatever their order

U users, I items, N training interactions, B histories, S their padded length.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from scipy import sparse

from awrsr_jax.analysis.text import align
from awrsr_jax.command import begin, parse_flags_or_defaults, refuse
from awrsr_jax.config import finalize
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data import prepared
from awrsr_jax.data.batches import ranking_batches
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.data.splits import HELD_OUT
from awrsr_jax.engine.ranking import describe_protocol, rank_by, summarize
from awrsr_jax.engine.run_folder import check_out, write_found

Score = Callable[[np.ndarray], np.ndarray]  # as `ranking.rank_by` takes it

MOST_SCORES = 1 << 25  # of a ranking batch: 256 MiB, whatever the number of items
SHOWN = (("test", "hr@10"), ("test", "ndcg@5"), ("test", "ndcg@10"), ("test", "mrr"), ("valid", "ndcg@10"))


def learn_popularity(corpus: Corpus) -> Score:
  """Returns a score that is the same for every history: how often each item is trained on."""
  return lambda histories_BxS: np.tile(corpus.counts.astype(np.float64), (len(histories_BxS), 1))


def learn_transitions(corpus: Corpus) -> Score:
  """Returns the score of a Markov chain of order one.

  We define: how often item j comes right after the newest item of the history in the training parts, plus the
  popularity of j as a number below 1, so that it orders only items with equal counts. An empty history has popularity
  alone.
  """
  items_N, starts_U = read_training(corpus)
  user_N = np.repeat(np.arange(corpus.num_users), np.diff(starts_U))
  together = user_N[1:] == user_N[:-1]
  counts_IxI = sparse.csr_array((np.ones(together.sum()), (items_N[:-1][together], items_N[1:][together])),
                                shape=(corpus.num_items + 1,) * 2)
  popularity_I = shrink_popularity(corpus)
  return lambda histories_BxS: counts_IxI[histories_BxS[:, -1]].toarray() + popularity_I


def learn_neighbours(corpus: Corpus, neighbours: int) -> Score:
  """Returns the score of item-kNN.

  The score of item j is the sum of sim(j, h) over the distinct items h of the history that are neighbours of j: the
  lists are those of the items that are scored (Sarwar et al., 2001, equation of the weighted sum, without its division,
  since there are no ratings), not those of the items of the history (Deshpande and Karypis, 2004). We define: items
  without a neighbour in the history follow all others, ordered by popularity. Equal sums stay tied.

  Args:
    corpus: to learn from.
    neighbours: see `compare_items`.
  """
  similar_IxI = compare_items(corpus, neighbours).T.tocsr()  # from an item of the history to those it is a neighbour of
  popularity_I = shrink_popularity(corpus) - 1

  def score(histories_BxS: np.ndarray) -> np.ndarray:
    rows, length = histories_BxS.shape
    history_BxI = sparse.csr_array((np.ones(rows * length), histories_BxS.flatten(), np.arange(rows + 1) * length),
                                   shape=(rows, corpus.num_items + 1))
    history_BxI.sum_duplicates()
    history_BxI.data[:] = 1  # padding too: item 0 is nobody's neighbour
    scores_BxI = (history_BxI @ similar_IxI).toarray()
    return np.where(scores_BxI > 0, scores_BxI, popularity_I)

  return score


# name -> (corpus, neighbours) -> score
BASELINES: dict[str, Callable[[Corpus, int], Score]] = {
    "popularity": lambda corpus, _: learn_popularity(corpus),
    "last item": lambda corpus, _: learn_transitions(corpus),
    "item-kNN": learn_neighbours,
}


def compare_items(corpus: Corpus, neighbours: int) -> sparse.csr_array:
  """Returns the similarities of every item to its neighbours, in memory that does not grow with I x I.

  The similarity of two items is the cosine of their binary columns of the user-item training matrix: users of both /
  sqrt(users of one * users of the other) (Sarwar et al., 2001, "Item-Based Collaborative Filtering Recommendation
  Algorithms"; Deshpande and Karypis, 2004, "Item-Based Top-N Recommendation Algorithms"). It is rounded to float32, so
  that float64 sums of thousands of them are exact and do not depend on their order: ties stay ties.

  Args:
    corpus: to learn from.
    neighbours: how many most similar others each item keeps, from 1; of equally similar ones those of lower number.

  Returns:
    (I + 1, I + 1) float64; row j holds the neighbours of item j. No item is its own neighbour.
  """
  items_N, starts_U = read_training(corpus)
  width = corpus.num_items + 1
  trained_UxI = sparse.csr_array((np.ones(len(items_N), np.int32), items_N, starts_U), shape=(corpus.num_users, width))
  trained_UxI.sum_duplicates()
  trained_UxI.data[:] = 1
  trained_IxU = trained_UxI.T.tocsr()
  users_I = np.diff(trained_IxU.indptr).astype(np.int64)
  most_I = np.minimum(trained_IxU @ np.diff(trained_UxI.indptr).astype(np.int64), width)  # entries of each row
  blocks = []
  for first, last in corpora.chunks_of_users(np.concatenate([[0], np.cumsum(most_I)])):  # here, of items
    both = trained_IxU[first:last] @ trained_UxI
    both.sort_indices()
    row, column = np.repeat(np.arange(first, last), np.diff(both.indptr)), both.indices
    cosine = (both.data / np.sqrt(users_I[row] * users_I[column])).astype(np.float32)
    order = np.lexsort((-cosine, row))
    order = order[row[order] != column[order]]
    row, column, cosine = row[order], column[order], cosine[order]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < neighbours
    blocks.append(sparse.csr_array((cosine[kept], (row[kept] - first, column[kept])), shape=(last - first, width)))
  return sparse.vstack(blocks, format="csr", dtype=np.float64)


def read_training(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
  """Returns the training parts: items (N,) int32, user after user, and (U + 1,) int64 where each user's begin."""
  lengths_U = corpus.split.train_ends - corpus.offsets[:-1]
  parts = corpora.training_parts(corpus.items, corpus.offsets, corpus.split)
  return np.concatenate(list(parts)), np.concatenate([[0], np.cumsum(lengths_U)])


def shrink_popularity(corpus: Corpus) -> np.ndarray:
  """Returns (I + 1,) float64 below 1: how often each item is trained on / (1 + how often all are)."""
  return corpus.counts / (1 + corpus.counts.sum())


def measure(corpus: Corpus, config: Any, neighbours: int) -> dict[str, Any]:
  """Ranks both splits by every baseline, and by the law that made the data where there is one.

  Args:
    corpus: to learn from and to rank.
    config: of it `eval`, `data` and `seed`, as for a trained model.
    neighbours: of item-kNN, from 1.

  Returns:
    "protocol" in words, "corpus" (see `corpus.describe`), "neighbours", and "baselines": name -> "valid" and "test"
    (see `ranking.summarize`) and "seconds" for learning and ranking both.

  Raises:
    ValueError: too few items are left to sample candidates from.
  """
  learners = dict(BASELINES)
  if oracle := corpus.oracle:
    learners["best possible"] = lambda *_: oracle
  batches = {split: ranking_batches(corpus, config, split) for split in HELD_OUT}
  size = min(config.eval.batch_size, max(1, MOST_SCORES // (corpus.num_items + 1)))
  batches = {split: dataclasses.replace(whole, batch_size=size) for split, whole in batches.items()}
  found: dict[str, dict[str, Any]] = {}
  for name, learn in learners.items():
    start = time.monotonic()
    score = learn(corpus, neighbours)
    found[name] = {split: summarize(rank_by(batches[split], score)) for split in HELD_OUT}
    found[name]["seconds"] = time.monotonic() - start
  return {"protocol": describe_protocol(config.eval.protocol, corpus.split.words), "corpus": corpora.describe(corpus),
          "neighbours": neighbours, "baselines": found}


def format_table(baselines: dict[str, dict[str, Any]]) -> str:
  """Returns the "baselines" of `measure` as a table."""
  rows = [["", *(f"{split} {metric}" for split, metric in SHOWN), "seconds"]]
  for name, found in baselines.items():
    rows.append([name, *(f"{found[split][metric]:.4f}" for split, metric in SHOWN), f"{found['seconds']:.1f}"])
  return "\n".join(align(rows))


def run(config: Any, neighbours: int, out: str | None) -> None:
  """Measures the baselines on what the config names, and prints them.

  Args:
    config: finalized.
    neighbours: of item-kNN, from 1.
    out: a JSON file for what `measure` returns, written whole or not at all; or None.

  Raises:
    ValueError: see `prepared.load` and `measure`; or the file cannot be written.
  """
  if out:
    check_out(out)
  found = measure(prepared.load(config.data), config, neighbours)
  print("{name}: {users} users, {items} items, {interactions} interactions".format(**found["corpus"]))
  print(f"{found['protocol']}\n{format_table(found['baselines'])}")
  if out:
    write_found(out, found)


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  begin(argv)
  try:
    run(finalize(CONFIG.value), NEIGHBOURS.value, OUT.value)
  except ValueError as error:
    refuse(error)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, as in configs/.", lock_config=True)
  NEIGHBOURS = flags.DEFINE_integer("neighbours", 100, "How many most similar others each item keeps in item-kNN.", 1)
  OUT = flags.DEFINE_string("out", None, "A JSON file for all metrics.")
  app.run(main, flags_parser=parse_flags_or_defaults)
