"""Ranking: exact ranks against loops in float64, whatever the blocks, batches and devices; metrics by hand."""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from awrsr_jax.config import default, finalize
from awrsr_jax.data import batches as data_batches
from awrsr_jax.data import corpus as data_corpus
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine import ranking
from awrsr_jax.inference import top
from awrsr_jax.model.backbones import build_backbone
from awrsr_jax.model.hidden import Hidden

ITEMS, ROWS, WIDTH = 33, 40, 8  # 6 rows only fill the table


def make(data, model):
  return meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))


def make_config(**values):
  """Returns a finalized config of a small model, with values at dotted keys ("eval__batch_size")."""
  config = default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in {
      "data__max_length": 6, "data__buckets": 2, "model__width": WIDTH, "model__layers": 1, "model__ffn_width": 8,
      "model__awr__rank": 4, "model__table_multiple": 8, "eval__batch_size": 16, "eval__block_items": 16,
      **values}.items()})
  return finalize(config)


@pytest.fixture(scope="module")
def backbone():
  return build_backbone(make_config(), ITEMS)


@pytest.fixture(scope="module")
def params(backbone):
  return jax.jit(backbone.init)(jax.random.key(3), jnp.zeros((1, 6), jnp.int32))["params"]


@pytest.fixture
def corpus(make_corpus):
  """45 users, 33 items; histories repeat items, and some targets are in the history."""
  rng = np.random.default_rng(5)
  histories = [rng.integers(1, ITEMS + 1, size=rng.integers(3, 14)).tolist() for _ in range(43)]
  return make_corpus([*histories, [4, 9, 4, 9, 9], [1, ITEMS, ITEMS, ITEMS]])


def with_table(params, table):
  """Returns the parameters with another item table."""
  return params | {"embedding": params["embedding"] | {"item_table": jnp.float32(table)}}


def loop_rank(scores, target, seen):
  """The rank by its definition.

  Args:
    scores: of items 0 to I, float64.
    target: an item. seen: items.
  """
  rivals = [scores[item] for item in range(1, len(scores)) if item != target and item not in set(seen)]
  return 1 + sum(score > scores[target] for score in rivals) + sum(score == scores[target] for score in rivals) / 2


def loop_ranks(table, mean, target, seen):
  """Ranks of a dot product model, in float64."""
  scores = np.float64(mean) @ np.float64(table)[:ITEMS + 1].T
  return [loop_rank(*row) for row in zip(scores, target.tolist(), seen.tolist(), strict=True)]


def rank_all(backbone, params, mean, target, seen, block):
  return rank_hidden(backbone, params, Hidden(mean=jnp.float32(mean)), target, seen, block)


def rank_hidden(backbone, params, hidden, target, seen, block, mesh=None):
  catalogue = backbone.apply({"params": params}, method="catalogue")
  ranks = jax.jit(lambda *args: ranking.rank_among_all(backbone, mesh or make(1, 1), *args, block))
  return np.asarray(ranks(catalogue, hidden, jnp.int32(target), jnp.int32(seen)))


def integer_case(ties):
  """A table, 24 hidden states, targets and histories of small whole numbers: every score is exact, `ties` many tie."""
  rng = np.random.default_rng(1)
  table = rng.integers(-1, 2, size=(ROWS, WIDTH)) if ties else rng.integers(-99, 100, size=(ROWS, WIDTH))
  table[ITEMS + 1:] = 50  # rows that fill the table would score high
  table[0] = 50
  mean = rng.integers(0, 3, size=(24, WIDTH))
  target = np.r_[1, ITEMS, 16, 17, rng.integers(1, ITEMS + 1, size=20)]  # ends of the table, ends of blocks
  seen = rng.integers(0, ITEMS + 1, size=(24, 7))
  seen[:8, 3] = seen[:8, 4]  # repeated
  seen[4:12, 2] = target[4:12]  # the target was seen before
  seen[12] = 0  # nothing seen
  return table, mean, target, seen


# --- among all items


@pytest.mark.parametrize("block", [1, 7, 16, 20, 39, 40, 1000])
def test_ranks_equal_a_loop_for_any_block_size_with_ties_repeats_and_seen_targets(backbone, params, block):
  for ties in (True, False):
    table, mean, target, seen = integer_case(ties)
    expected = loop_ranks(table, mean, target, seen)
    assert any(rank % 1 for rank in expected) == ties
    got = rank_all(backbone, with_table(params, table), mean, target, seen, block)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32


@pytest.mark.parametrize("block, shape", [(7, (1, 1)), (40, (1, 1)), (4, (2, 4)), (40, (1, 8))])
def test_gaussians_rank_by_their_distance(block, shape):
  config = default()
  config.model.update({"backbone": "stosa", "width": WIDTH, "layers": 0, "table_multiple": 8})
  backbone = build_backbone(config, ITEMS)
  rng = np.random.default_rng(3)
  params = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
  draw = lambda: rng.normal(size=(ROWS, WIDTH))  # noqa: E731
  means, covs = draw(), draw()
  params |= {f"embedding_{stream}": params[f"embedding_{stream}"] | {"item_table": jnp.float32(table)}
             for stream, table in (("mean", means), ("cov", covs))}
  mean, cov = rng.normal(size=(24, WIDTH)), rng.uniform(0.1, 2, size=(24, WIDTH))
  _, _, target, seen = integer_case(True)
  roots = np.sqrt(np.where(covs > 0, covs + 1, np.exp(np.minimum(covs, 0))))
  scores = -np.sum((mean[:, None] - means) ** 2 + (np.sqrt(cov)[:, None] - roots) ** 2, axis=-1)[:, :ITEMS + 1]
  hidden = Hidden(mean=jnp.float32(mean), cov=jnp.float32(cov))
  np.testing.assert_array_equal(rank_hidden(backbone, params, hidden, target, seen, block, make(*shape)),
                                [loop_rank(*row) for row in zip(scores, target.tolist(), seen.tolist(), strict=True)])


def test_rows_that_fill_the_table_never_rank(backbone, params):
  table, mean, target, seen = integer_case(True)
  ranks = []
  for filling in (-1000, 0, 1000, np.nan):
    other = table.astype(np.float64)
    other[ITEMS + 1:] = other[0] = filling
    ranks.append(rank_all(backbone, with_table(params, other), mean, target, seen, 16))
  for other in ranks[1:]:
    np.testing.assert_array_equal(other, ranks[0])


@pytest.mark.parametrize("block", [7, 40])
def test_a_model_that_scores_all_items_alike_gets_the_middle_rank(backbone, params, block):
  rng = np.random.default_rng(2)
  mean = rng.normal(size=(24, WIDTH))  # real numbers: ties must be exact for rounded scores too
  _, _, target, seen = integer_case(True)
  got = rank_all(backbone, with_table(params, np.tile(rng.normal(size=WIDTH), (ROWS, 1))), mean, target, seen, block)
  rivals = [len(set(range(1, ITEMS + 1)) - set(row) - {item}) for row, item in zip(seen.tolist(), target, strict=True)]
  np.testing.assert_array_equal(got, [1 + count / 2 for count in rivals])


@pytest.mark.parametrize("split,back,protocol", [("valid", 2, "full"), ("test", 1, "full"), ("test", 1, "unfiltered")])
def test_a_real_backbone_ranks_as_a_float64_loop_over_users(backbone, params, corpus, split, back, protocol):
  config = make_config(eval__protocol=protocol)
  batches = data_batches.ranking_batches(corpus, config, split)
  step = ranking.make_rank_step(backbone, make(1, 1), 16)
  got = ranking.rank_users(step, params, batches, make(1, 1))
  resident = ranking.rank_users(step, params, batches, make(1, 1), items=jnp.int32(corpus.items))
  np.testing.assert_array_equal(resident, got)
  encode = jax.jit(lambda inputs: backbone.apply({"params": params}, inputs, method="encode").newest().mean)
  table = np.float64(params["embedding"]["item_table"])[:ITEMS + 1]
  expected, targets_seen = [], 0
  for user in batches.users:
    known, target = corpus.history(user)[:-back], corpus.history(user)[-back]
    newest = known[-6:]
    mean = encode(jnp.int32([[0] * (6 - len(newest)) + newest.tolist()]))
    expected.append(loop_rank(table @ np.float64(mean[0]), target, known.tolist() if protocol == "full" else []))
    targets_seen += target in known
  np.testing.assert_array_equal(got, expected)
  assert len(got) == 45 and targets_seen > 0 and len(set(expected)) > 10


def test_what_ranks_and_recommends_multiplies_in_full_precision_on_every_device(backbone, params):
  inputs, items = jnp.ones((2, 6), jnp.int32), jnp.int32([3, 4])
  feed = {"inputs": inputs, "seen": inputs, "target": items, "stop": jnp.zeros(1, jnp.int32)}
  allowed = jnp.ones(len(params["embedding"]["item_table"]), bool)
  for step, *arguments in ((ranking.make_rank_step(backbone, make(1, 1), 16), feed),
                           (ranking.make_rank_step(backbone, make(1, 1), 16), feed | {"candidates": inputs}),
                           (top.make_top_step(backbone, make(1, 1), 3, 16), inputs, inputs, allowed),
                           (top.make_similar_step(backbone, make(1, 1), 3, 16), items, inputs, allowed)):
    program = step.lower(params, *arguments).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") > 0


def test_broken_parameters_are_an_error_not_a_rank(backbone, params, corpus):
  table = np.array(params["embedding"]["item_table"])
  table[20] = np.nan  # one item only: every user scores it
  step = ranking.make_rank_step(backbone, make(1, 1), 16)
  batches = data_batches.ranking_batches(corpus, make_config(), "valid")
  with pytest.raises(FloatingPointError, match="of 45 users of the valid split have a NaN"):
    ranking.rank_users(step, with_table(params, table), batches, make(1, 1))


def test_an_infinite_parameter_is_an_error_not_a_rank(backbone, params, corpus):
  step = ranking.make_rank_step(backbone, make(1, 1), 16)
  batches = data_batches.ranking_batches(corpus, make_config(), "test")
  with pytest.raises(FloatingPointError, match="NaN"):
    ranking.rank_users(step, with_table(params, np.full((ROWS, WIDTH), np.inf)), batches, make(1, 1))


# --- among candidates


def test_ranks_among_candidates_equal_a_loop(backbone, params):
  table, mean, target, _ = integer_case(True)
  table = table.astype(np.float64)
  candidates = np.random.default_rng(3).integers(1, ITEMS + 1, size=(24, 11))
  table[target[0]] = np.nan
  got = ranking.rank_among_candidates(backbone, with_table(params, table), Hidden(mean=jnp.float32(mean)),
                                      jnp.int32(target), jnp.int32(candidates))
  scores = np.float64(mean) @ np.float64(table).T
  for user in range(24):
    own, others = scores[user, target[user]], scores[user, candidates[user]]
    broken = np.isnan(own) or np.isnan(others).any()
    expected = np.nan if broken else 1 + (others > own).sum() + (others == own).sum() / 2
    np.testing.assert_equal(float(got[user]), expected)
  assert np.isnan(got[0]) and np.isfinite(got).sum() > 10 and (np.asarray(got) % 1 == 0.5).any()


def test_a_sampled_protocol_ranks_among_the_candidates_of_the_batch(make_corpus):
  rng = np.random.default_rng(7)
  corpus = make_corpus([*rng.integers(1, 201, size=(20, 6)).tolist(), list(range(196, 201))])
  config = make_config(eval__protocol="uniform100", eval__batch_size=16, data__buckets=1)
  backbone = build_backbone(config, corpus.num_items)
  params = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
  batches = data_batches.ranking_batches(corpus, config, "test")
  got = ranking.rank_users(ranking.make_rank_step(backbone, make(1, 1), 16), params, batches, make(1, 1),
                           items=jnp.int32(corpus.items))  # candidates are drawn on the host also where these are there
  encode = jax.jit(lambda inputs: backbone.apply({"params": params}, inputs, method="encode").newest().mean)
  expected = []
  for batch in batches:
    mean = encode(batch["inputs"])
    scores = np.float64(mean) @ np.float64(params["embedding"]["item_table"]).T
    for row in np.flatnonzero(batch["mask"]):
      expected.append(1 + (scores[row, batch["candidates"][row]] > scores[row, batch["target"][row]]).sum())
  np.testing.assert_array_equal(got, expected)
  assert len(got) == 21 and max(got) > 30


# --- all users


def test_every_user_counts_once_whatever_the_batch_size(backbone, params, corpus):
  step, ranks = ranking.make_rank_step(backbone, make(1, 1), 16), {}
  for size in (7, 64):
    batches = data_batches.ranking_batches(corpus, make_config(eval__batch_size=size, data__buckets=1), "valid")
    got = ranking.rank_users(step, params, batches, make(1, 1))
    assert got.shape == (45,)
    ranks[size] = dict(zip(batches.users.tolist(), got.tolist(), strict=True))
  assert ranks[7] == ranks[64] and ranks[7].keys() == set(range(45))


@pytest.mark.parametrize("protocol", ["full", "unfiltered"])
def test_devices_change_no_rank(backbone, params, corpus, protocol):
  ranks = []
  batches = data_batches.ranking_batches(corpus, make_config(data__buckets=1, eval__protocol=protocol), "test")
  for shape in ((1, 1), (8, 1), (2, 4), (1, 8)):
    mesh = make(*shape)
    step = ranking.make_rank_step(backbone, mesh, 16)
    ranks.append(ranking.rank_users(step, jax.device_put(params, meshes.shardings(mesh, params)), batches, mesh))
  for other in ranks[1:]:
    np.testing.assert_array_equal(other, ranks[0])


# --- metrics


def test_metrics_of_ranks_by_hand():
  got = ranking.summarize([1, 2, 5.5, 10, 20.5])
  assert list(got) == ["hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr"]
  gain = [1.0, 1 / math.log2(3), 1 / math.log2(6.5), 1 / math.log2(11)]
  expected = {"hr@1": 0.2, "hr@5": 0.4, "hr@10": 0.8, "hr@20": 0.8, "ndcg@5": sum(gain[:2]) / 5,
              "ndcg@10": sum(gain) / 5, "ndcg@20": sum(gain) / 5,
              "mrr": (1 + 1 / 2 + 1 / 5.5 + 1 / 10 + 1 / 20.5) / 5}
  assert got == pytest.approx(expected, rel=1e-12)
  assert all(type(value) is float for value in got.values())


def test_metrics_of_many_users_keep_their_digits():
  ranks = np.r_[np.ones(1, np.float32), np.full(10 ** 6 - 1, 10 ** 6, np.float32)]
  got = ranking.summarize(ranks)
  assert got["hr@1"] == got["ndcg@10"] == 1e-6 and got["mrr"] == pytest.approx(1e-6 + (1 - 1e-6) * 1e-6, rel=1e-9)


def test_the_protocol_in_words_has_the_tie_rule_and_labels_samples():
  words = {protocol: ranking.describe_protocol(protocol, "some split") for protocol in ranking.PROTOCOLS}
  assert all(text.startswith("some split, ") for text in words.values())
  assert all(ranking.TIE_RULE in text for text in words.values())
  assert {protocol for protocol, text in words.items() if "SAMPLED" in text} == {"uniform100", "popular100"}


# --- the computable best


@pytest.mark.parametrize("protocol", ["full", "unfiltered", "uniform100"])
def test_the_oracle_ranks_as_a_loop_over_users(protocol):
  config = default()
  config.data.name, config.data.max_length, config.data.buckets = "synthetic", 6, 2
  config.data.synthetic.num_users, config.data.synthetic.num_items, config.data.synthetic.length = 70, 150, 8
  config.eval.protocol, config.eval.batch_size = protocol, 16
  corpus = data_corpus.load(config.data)
  batches = data_batches.ranking_batches(corpus, config, "test")
  got = ranking.rank_by(batches, corpus.oracle)
  candidates = {}
  if protocol == "uniform100":
    drawn = np.concatenate([batch["candidates"] for batch in batches])
    candidates = dict(zip(batches.users.tolist(), drawn.tolist(), strict=False))
  expected = []
  for user in batches.users.tolist():
    known, target = corpus.history(user)[:-1], corpus.history(user)[-1]
    scores = corpus.oracle(known[None])[0]
    outside = set(range(1, corpus.num_items + 1)) - set(candidates.get(user, range(1, corpus.num_items + 1)))
    expected.append(loop_rank(scores, target, outside if protocol == "unfiltered" else {*known.tolist(), *outside}))
  np.testing.assert_array_equal(got, expected)
  assert got.shape == (70,) and got.min() >= 1


def test_the_oracle_gives_ties_their_middle_and_skips_the_history(make_corpus):
  corpus = make_corpus([[1, 2, 3, 4, 5], [5, 5, 1, 2], [2, 4, 4, 4], [1, 2, 6]])
  law = np.array([-np.inf, 3, 2, 2, 1, 2, 0.5])
  corpus = data_corpus.dataclasses.replace(corpus, oracle=lambda histories: np.tile(law, (len(histories), 1)))
  config = make_config(eval__batch_size=3)
  batches = data_batches.ranking_batches(corpus, config, "test")
  ranks = dict(zip(batches.users.tolist(), ranking.rank_by(batches, corpus.oracle).tolist(), strict=True))
  # user 0: target 5 (score 2) against item 6; user 1: 2 against 3 (tied), 4, 6; user 2: 4 (seen before, score 1)
  # against 1, 3, 5 and 6; user 3: 6 (score .5) against 3, 4, 5
  assert ranks == {0: 1.0, 1: 1.5, 2: 4.0, 3: 4.0}
