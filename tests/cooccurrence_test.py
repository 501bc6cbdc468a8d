"""Item vectors from training histories: counts and information against loops, what they read, and where they begin."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from awrsr_jax.data import cooccurrence
from awrsr_jax.data import corpus as corpora
from awrsr_jax.data.cooccurrence import SMOOTHING, count_pairs, item_vectors, positive_information
from awrsr_jax.engine import train as training
from awrsr_jax.engine.state import init_state

KINDS = 3  # of items: histories hold one kind each
ITEMS = 31  # ten of each kind, and one that stands beside itself only


@pytest.fixture
def corpus(make_corpus):
  """40 histories of 6 to 10 items of one kind each (1, 4, ...; 2, 5, ...; 3, 6, ...), and two odd ones; the last two
  items of each are held out."""
  rng = np.random.default_rng(0)
  histories = [(rng.permutation(10)[:length] * KINDS + user % KINDS + 1).tolist()
               for user, length in enumerate(rng.integers(6, 11, size=40))]
  return make_corpus([*histories, [1, 4, 1, 7, 2], [ITEMS] * 4])


def count_by_loops(corpus):
  counts = np.zeros((corpus.num_items + 1,) * 2)
  for user in range(corpus.num_users):
    history = corpus.history(user)[:-2].tolist()
    for t, newer in enumerate(history):
      for s in range(max(t - cooccurrence.WINDOW, 0), t):
        if history[s] != newer:
          counts[newer, history[s]] += 1 / (t - s)
          counts[history[s], newer] += 1 / (t - s)
  return counts


@pytest.mark.parametrize("window, chunk", [(50, corpora.CHUNK), (50, 30), (50, 1), (2, 30)])
def test_pairs_are_counted_as_by_loops_however_users_are_cut_into_chunks(corpus, window, chunk, monkeypatch):
  monkeypatch.setattr(corpora, "CHUNK", chunk)
  monkeypatch.setattr(cooccurrence, "WINDOW", window)
  np.testing.assert_allclose(count_pairs(corpus).toarray(), count_by_loops(corpus), rtol=1e-12)


def test_information_is_that_of_loops(corpus):
  counts = count_by_loops(corpus)
  totals = counts.sum(axis=1)
  context = totals ** SMOOTHING / np.sum(totals ** SMOOTHING)
  wanted = np.zeros_like(counts)
  for i, j in np.argwhere(counts):
    wanted[i, j] = max(0, np.log(counts[i, j] / totals[i] / context[j]))
  found = positive_information(count_pairs(corpus)).toarray()
  assert np.any(wanted) and np.any((counts > 0) & (wanted == 0))
  np.testing.assert_allclose(found, (wanted + wanted.T) / 2, rtol=1e-12)


def test_products_of_all_positive_factors_are_the_nearest_of_all(corpus):
  """With as many coordinates as items, products at their lengths are the information without negative eigenvalues."""
  information = positive_information(count_pairs(corpus)).toarray()
  values, factors = np.linalg.eigh(information)
  wanted = factors * np.maximum(values, 0) @ factors.T
  lengths = np.sqrt(np.diag(wanted))
  cosines = wanted / np.maximum(np.outer(lengths, lengths), 1e-12)
  vectors = item_vectors(corpus, ITEMS + 5, 0)
  beside_some = information.any(axis=1)
  np.testing.assert_allclose((vectors @ vectors.T)[beside_some][:, beside_some],
                             cosines[beside_some][:, beside_some], atol=1e-5)


def test_vectors_have_length_1_or_0_and_items_bought_together_are_closer(corpus):
  vectors = item_vectors(corpus, 6, 0)
  assert vectors.shape == (ITEMS + 1, 6) and vectors.dtype == np.float32
  beside_some = count_by_loops(corpus).any(axis=1)
  assert not beside_some[0] and not beside_some[ITEMS] and np.sum(beside_some) > 20
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), beside_some, atol=1e-6)
  kind = np.arange(ITEMS + 1) % KINDS
  pairs = beside_some[:, None] & beside_some & ~np.eye(ITEMS + 1, dtype=bool)
  same = kind[:, None] == kind
  cosines = vectors @ vectors.T
  assert np.mean(cosines[pairs & same]) > np.mean(cosines[pairs & ~same]) + 0.3


def test_what_is_held_out_is_never_read_and_a_seed_rotates(corpus):
  vectors = item_vectors(corpus, 6, 0)
  items = np.array(corpus.items)
  for positions in corpus.split.targets.values():
    items[positions] = items[positions] % ITEMS + 1
  other = dataclasses.replace(corpus, items=items)
  np.testing.assert_array_equal(item_vectors(other, 6, 0), vectors)
  items[corpus.offsets[0]] = items[corpus.offsets[0]] % ITEMS + 1  # the first item of a history is
  assert np.any(np.abs(item_vectors(other, 6, 0) - vectors) > 1e-3)
  turned = item_vectors(corpus, 6, 1)
  assert np.max(np.abs(turned - vectors)) > 0.1
  np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, atol=1e-5)


def test_a_corpus_without_pairs_gives_no_vectors(make_corpus):
  assert not np.any(item_vectors(make_corpus([[1, 2, 3], [2, 3, 1]]), 4, 0))  # one item each is trained on


@pytest.mark.parametrize("backbone, table", [("sasrec", "embedding"), ("stosa", "embedding_mean")])
@pytest.mark.parametrize("model", [1, 4])
def test_a_run_begins_with_their_directions_and_the_length_of_random_ones(small_config, backbone, table, model):
  small_config.model.backbone, small_config.mesh.model = backbone, model
  small_config.train.update({"item_start": "cooccurrence", "average": 0.9})
  job = training.make_job(small_config)
  vectors = training.item_vectors(job)
  start, other = (init_state(job.backbone, job.optimizer, 0, job.mesh, given) for given in (vectors, None))
  random, found = (np.array(state.params[table]["item_table"]) for state in (other, start))
  length = np.linalg.norm(random, axis=1).mean()
  has_vector = np.any(vectors != 0, axis=1)
  assert np.sum(has_vector) > 30 and len(found) > len(vectors)
  np.testing.assert_allclose(found[:len(vectors)][has_vector], length * vectors[has_vector], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(found[:len(vectors)][~has_vector], random[:len(vectors)][~has_vector], rtol=1e-6)
  np.testing.assert_allclose(found[len(vectors):], random[len(vectors):], rtol=1e-6)
  np.testing.assert_array_equal(start.trained[table]["item_table"], found)
  for state in (start, other):  # of the rest nothing differs
    state.params[table]["item_table"] = state.trained[table]["item_table"] = 0
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), start, other)


def test_random_vectors_are_the_default(small_config):
  assert training.item_vectors(training.make_job(small_config)) is None
