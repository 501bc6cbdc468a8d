"""Item vectors from what stands close together in training histories: where the item table may start.

Items that are rare are trained on a few times only; that they stand beside others is known before the first step. The
vectors factor positive pointwise mutual information, as Levy and Goldberg (NeurIPS 2014) do for words, of counts that
weigh a pair by its distance, as GloVe does (Pennington et al., 2014). The window, and that only directions are kept, we
define; docs/recipes.md has what they are worth.

Shapes: I items (numbers 1 to I; 0 is padding), D width.
"""

import logging

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from awrsr_jax.data import corpus as corpora

LOG = logging.getLogger(__name__)
WINDOW = 50  # positions between two items of a history that count as close, at most
SMOOTHING = 0.75  # exponent of context counts (Levy, Goldberg and Dagan, TACL 2015)


def item_vectors(corpus: corpora.Corpus, width: int, seed: int) -> np.ndarray:
  """Returns vectors (I + 1, D) float32 of length 1 whose products approximate how much items attract each other.

  With M = positive_information(count_pairs(corpus)) they are the rows of Q sqrt(max(L, 0)) R at length 1, of the D
  largest eigenvalues L of M with eigenvectors Q, and a random rotation R, which leaves no coordinate more to say than
  others. An item that stands beside none, and padding, has a vector of 0. Nothing but training histories is read.
  Machines agree to rounding, and one machine with itself exactly. Takes some 16 D (I + 1) bytes beside the pairs.

  Args:
    corpus: any.
    width: D; where there are fewer items than that, the rest are coordinates of 0 before the rotation.
    seed: of the rotation.
  """
  information = positive_information(count_pairs(corpus))
  if not information.nnz:
    return np.zeros((corpus.num_items + 1, width), np.float32)
  rng = np.random.default_rng(seed)
  rank = min(width, corpus.num_items)  # one less than rows: what the method allows
  start = rng.normal(size=corpus.num_items + 1)
  values, factors = scipy.sparse.linalg.eigsh(information, rank, which="LA", v0=start)
  factors *= np.sign(factors[np.argmax(np.abs(factors), axis=0), np.arange(rank)])  # else it is for the machine to say
  rows = np.zeros((corpus.num_items + 1, width))
  rows[:, :rank] = factors * np.sqrt(np.maximum(values, 0))
  rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  beside_some = lengths > 1e-6  # of others the eigenvectors are rounding
  LOG.info("the vectors of %d of %d items start from what they stand beside", np.sum(beside_some), corpus.num_items)
  return np.where(beside_some, rows / np.maximum(lengths, 1e-6) @ rotation, 0).astype(np.float32)


def count_pairs(corpus: corpora.Corpus) -> scipy.sparse.csr_array:
  """Returns (I + 1, I + 1) float64, symmetric: for two items the sum of 1 / distance over all places in training
  histories where they are up to WINDOW positions apart; 0 for an item and itself."""
  shape = corpus.num_items + 1, corpus.num_items + 1
  counts = scipy.sparse.csr_array(shape)
  split, offsets = corpus.split, corpus.offsets
  parts = corpora.training_parts(corpus.items, offsets, split)
  for (first, last), items_N in zip(corpora.chunks_of_users(offsets), parts, strict=True):
    of_chunk = scipy.sparse.csr_array(shape)
    users_N = np.repeat(np.arange(first, last), split.train_ends[first:last] - offsets[first:last])
    for distance in range(1, WINDOW + 1):
      newer, older = items_N[distance:], items_N[:-distance]
      same_user = users_N[distance:] == users_N[:-distance]
      if not np.any(same_user):
        break
      pair = same_user & (newer != older)
      weights = np.full(np.sum(pair), 1 / distance)
      of_chunk += scipy.sparse.coo_array((weights, (newer[pair], older[pair])), shape).tocsr()
    counts += of_chunk
  return counts + counts.T


def positive_information(counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
  """Returns PPMI of symmetric counts w, made symmetric: the mean of max(0, log(w_ij / (w_i. p_j))) and its transpose.

  p_j = w_j.^SMOOTHING / sum_k w_k.^SMOOTHING.
  """
  totals = counts.sum(axis=1)
  context = totals ** SMOOTHING
  context /= max(context.sum(), 1)
  pairs = counts.tocoo()
  row, column = pairs.coords
  gain = np.log(pairs.data / (totals[row] * context[column]))
  positive = gain > 0
  information = scipy.sparse.coo_array((gain[positive], (row[positive], column[positive])), counts.shape).tocsr()
  return (information + information.T) / 2
