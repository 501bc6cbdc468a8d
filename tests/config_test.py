"""The config: every knob is checked, read by the package, and frozen once it has been checked."""

import ast
import importlib.util
import json
import math
import pathlib
import re

import ml_collections
import pytest

from awrsr_jax import config as configs

ROOT = pathlib.Path(__file__).parent.parent
LEAVES = dict(configs.walk(configs.default()))
TYPES = {key: configs.key_type(configs.default(), key) for key in LEAVES}
OPTIONAL = {key for key, value in LEAVES.items() if value is None}
FREE_TEXT = {"data.name", "data.path", "data.header", "data.tfds.name", "data.tfds.split", "data.columns.user",
             "data.columns.item", "data.columns.time", "data.columns.rating", "data.columns.title",
             "data.split.valid_from", "data.split.test_from"}
PUBLISHED = {"model__faithful": True, "model__backbone": "stosa", "model__norm": "post", "model__activation": "elu",
             "model__ffn_width": 256}
LOCAL_NAMES = {"wanted": "split"}  # a node of the config under another name in the package


def changed(**values):
  """Returns the default config with values at dotted keys ("model__width" is model.width)."""
  config = configs.default()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return config


def set_value(key, value):
  """Returns the default config with one value, unchecked by ml_collections."""
  config = configs.default()
  *parents, leaf = key.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  with node.ignore_type():
    node[leaf] = value
  if parents[-1:] == ["split"] and leaf != "name":
    node.name = "users" if leaf in ("valid_share", "test_share", "seed") else "time"
  return config


def load_config(path):
  """Returns what get_config() of a config file gives."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def test_the_default_config_is_accepted_unchanged():
  assert dict(configs.walk(configs.finalize(configs.default()))) == LEAVES


def test_walk_lists_leaves_of_dicts_configs_and_frozen_configs_alike():
  nested = {"b": {"d": 1, "c": None}, "a": "x"}
  expected = [("a", "x"), ("b.c", None), ("b.d", 1)]
  assert configs.walk(nested) == configs.walk(ml_collections.ConfigDict(nested)) == expected
  assert configs.walk(ml_collections.FrozenConfigDict(nested)) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_accepted(path):
  config = load_config(path)
  assert configs.finalize(config).to_dict() == config.to_dict()


def test_the_named_config_files_exist():
  names = {path.stem for path in (ROOT / "configs").glob("*.py")}
  assert names >= {"ml1m", "ml100k", "beauty", "sports", "synthetic", "beauty_stosa", "ml1m_stosa"}


def test_a_finalized_config_is_frozen_and_is_a_copy():
  config = configs.default()
  final = configs.finalize(config)
  with pytest.raises(AttributeError, match="immutable"):
    final.model.width = 32
  with pytest.raises(AttributeError, match="immutable"):
    final.seed = 3
  config.model.width = 32
  assert final.model.width == 64


def test_finalize_leaves_the_given_config_as_it_was():
  config = configs.default()
  configs.finalize(config)
  config.model.width = 32
  assert dict(configs.walk(config)) == LEAVES | {"model.width": 32}


def test_an_unknown_key_is_refused_by_name():
  config = configs.default()
  config.model.widht = 3
  with pytest.raises(ValueError, match=r"unknown keys \['model.widht'\]"):
    configs.finalize(config)


def test_a_missing_key_is_refused_by_name():
  config = configs.default()
  del config.train.beta2
  with pytest.raises(ValueError, match=r"missing keys \['train.beta2'\]"):
    configs.finalize(config)


@pytest.mark.parametrize("key", sorted(configs.CHOICES))
def test_a_name_outside_its_choices_is_refused(key):
  with pytest.raises(ValueError, match=re.escape(f"config.{key}='nonsense' is not one of")):
    configs.finalize(set_value(key, "nonsense"))


@pytest.mark.parametrize("key,choice", [(key, choice) for key in sorted(configs.CHOICES)
                                        for choice in configs.CHOICES[key]])
def test_every_choice_is_accepted(key, choice):
  config = set_value(key, choice)
  if choice == "popularity":
    config.loss.name = "sampled_softmax"
  if key == "model.awr.additive_on":
    config.model.refine = "additive"
  assert dict(configs.walk(configs.finalize(config)))[key] == choice


@pytest.mark.parametrize("key", sorted(configs.BOUNDS))
def test_a_value_below_its_bound_is_refused_and_the_bound_itself_is_as_stated(key):
  low, included = configs.BOUNDS[key]
  kind = TYPES[key]
  below = kind(low - 1)
  refused = [below] if included else [below, kind(low)]
  if kind is float:
    refused += [float("nan"), low - 1e-9]
  for value in refused:
    with pytest.raises(ValueError, match=re.escape(f"config.{key}={value} must be")):
      configs.finalize(set_value(key, value))
  accepted = kind(low) if included else low + 1e-9
  assert dict(configs.walk(configs.finalize(set_value(key, accepted))))[key] == accepted


@pytest.mark.parametrize("key", sorted(configs.BOUNDS))
def test_zero_is_refused_where_something_is_counted_or_divided_by_it(key):
  zero = set_value(key, TYPES[key](0))
  if key in {"seed", "data.k_core", "data.max_history", "data.split.seed", "data.synthetic.seed", "model.dropout",
             "model.attention.dropout", "loss.gbce_t", "loss.pvn_weight", "train.weight_decay",
             "train.warmup_steps", "train.beta1", "train.beta2"}:
    assert dict(configs.walk(configs.finalize(zero)))[key] == 0
  else:
    with pytest.raises(ValueError, match=re.escape(f"config.{key}=0")):
      configs.finalize(zero)


def test_every_number_has_a_bound_and_every_name_its_choices():
  numbers = {key for key in LEAVES if TYPES[key] in (int, float)}
  texts = {key for key in LEAVES if TYPES[key] is str}
  assert numbers - configs.BOUNDS.keys() == {
      "mesh.data", "data.min_rating", "model.attention.sink"}  # -1 or at least 1; any number; any number
  assert texts - configs.CHOICES.keys() == FREE_TEXT
  assert configs.BOUNDS.keys() <= numbers and configs.CHOICES.keys() <= texts


@pytest.mark.parametrize("key", sorted(LEAVES))
def test_a_value_of_the_wrong_type_is_refused(key):
  wrong = {int: (2.0, "2", True), float: ("2", [1.0]), bool: (1, "yes"), str: (1, True)}[TYPES[key]]
  for value in wrong + (() if key in OPTIONAL else (None,)):
    with pytest.raises(ValueError, match=re.escape(f"config.{key}={value!r}")):
      configs.finalize(set_value(key, value))


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_an_optional_key_has_a_type_and_accepts_a_value_of_it(key):
  assert TYPES[key] in (int, float, str)
  value = {"model.awr.correlation": "wasserstein"}.get(key, TYPES[key](0.5) if TYPES[key] is float else 1)
  assert dict(configs.walk(configs.finalize(set_value(key, value))))[key] == value


@pytest.mark.parametrize("values,key", [
    ({"model__heads": 3}, "config.model.heads=3 does not divide config.model.width=64"),
    ({"model__heads": 128}, "config.model.heads=128 does not divide config.model.width=64"),
    ({"model__dropout": 1.0}, "config.model.dropout=1.0 must be below 1"),
    ({"model__attention__dropout": 1.5}, "config.model.attention.dropout=1.5 must be below 1"),
    ({"train__beta1": 1.0}, "config.train.beta1=1.0 must be below 1"),
    ({"seed": 1 << 32}, "config.seed=4294967296 must be below 4294967296"),
    ({"train__beta2": 1.0}, "config.train.beta2=1.0 must be below 1"),
    ({"loss__gbce_t": 1.01}, "config.loss.gbce_t=1.01"),
    ({"loss__negatives": "popularity"}, "config.loss.negatives=popularity needs config.loss.name=sampled_softmax"),
    ({"train__weight_decay": 0.1}, "config.train.weight_decay=0.1 needs config.train.optimizer=adamw"),
    ({"train__steps_per_call": 2, "data__feed": "host"}, "config.train.steps_per_call=2 needs"),
    ({"model__refine": "additive", "model__awr__value_projection": True}, "config.model.awr.value_projection"),
    ({"model__awr__additive_on": "weights"}, "config.model.awr.additive_on=weights needs config.model.refine=additive"),
    ({"model__refine": "stochastic", "model__awr__correlation": "dot"}, "config.model.refine=stochastic"),
    ({"model__refine": "none", "model__awr__correlation": "dot"}, "config.model.awr.correlation=dot"),
    ({"model__attention__sink": math.inf}, "config.model.attention.sink=inf must be a finite number"),
    ({"model__cosine": 9.0, "model__backbone": "stosa"}, "config.model.cosine=9.0 must be a finite factor"),
    ({"model__branch_gates": True, "model__backbone": "stosa"}, "branch_gates=True needs config.model.backbone=sasrec"),
    ({"model__cosine": math.inf}, "config.model.cosine=inf must be a finite factor"),
    ({"train__average": 1.0}, "config.train.average=1.0 must be below 1"),
    ({"model__faithful": True}, "not {'backbone': 'sasrec', 'norm': 'pre', 'activation': 'relu', 'ffn_width': 64}"),
    (PUBLISHED | {"model__ffn_width": 64}, "ffn_width=256 (4 * width); not {'ffn_width': 64}"),
    ({"loss__pvn_weight": 0.1, "loss__name": "bpr"}, "config.model.backbone=sasrec are no distances"),
    ({"loss__pvn_weight": 0.1, "model__backbone": "stosa"}, "one of bce, bpr, gbce, not softmax"),
    ({"mesh__data": 0}, "config.mesh.data=0"),
    ({"mesh__data": -2}, "config.mesh.data=-2"),
])
def test_values_that_do_not_fit_together_are_refused(values, key):
  with pytest.raises(ValueError, match=re.escape(key)):
    configs.finalize(changed(**values))


@pytest.mark.parametrize("text, expected", [
    ("90%", ("share", 0.9)), ("0.5%", ("share", 0.005)), ("12", ("time", 12)), ("-3", ("time", -3)),
    ("1.5e9", ("time", 1.5e9)), ("1970-01-02", ("date", 86400.0)), ("1970-01-01T00:00:01+01:00", ("date", -3599.0)),
])
def test_moments_are_shares_numbers_or_dates(text, expected):
  found = configs.parse_moment(text, "key")
  assert found == pytest.approx(expected) if isinstance(expected[1], float) and found[0] == expected[0] else (
      found == expected and type(found[1]) is type(expected[1]))


@pytest.mark.parametrize("text", ["", "%", "0%", "100%", "-5%", "nan", "inf", "nan%", "2024-13-01", "yesterday"])
def test_what_is_no_moment_is_refused(text):
  with pytest.raises(ValueError, match=re.escape(f"config.data.split.test_from={text!r} is no share")):
    configs.finalize(changed(data__split__name="time", data__split__test_from=text))


@pytest.mark.parametrize("name, others", [("leave_one_out", "time users"), ("time", "users"), ("users", "time")])
def test_what_a_split_would_not_look_at_is_refused(name, others):
  values = {"time": {"valid_from": "70%", "test_from": "96%", "target": "all"},
            "users": {"valid_share": 0.2, "test_share": 0.2, "seed": 1}}
  for other in others.split():
    for key, value in values[other].items():
      with pytest.raises(ValueError, match=f"split.{key}={value} needs config.data.split.name={other}, not"):
        configs.finalize(changed(**{"data__split__name": name, f"data__split__{key}": value}))
      configs.finalize(changed(**{"data__split__name": other, f"data__split__{key}": value}))


def test_rating_floors_are_numbers_and_users_are_left_to_train_on():
  with pytest.raises(ValueError, match="config.data.min_rating=nan must be a finite number"):
    configs.finalize(changed(data__min_rating=float("nan")))
  with pytest.raises(ValueError, match="leave no user to train on"):
    configs.finalize(changed(data__split__name="users", data__split__valid_share=0.5, data__split__test_share=0.5))


@pytest.mark.parametrize("values", [
    {"model__heads": 64}, {"model__dropout": 0.99, "model__attention__dropout": 0.0}, {"loss__gbce_t": 1.0},
    {"train__weight_decay": 0.1, "train__optimizer": "adamw"}, {"mesh__data": -1}, {"mesh__data": 1},
    {"model__refine": "value", "model__awr__value_projection": True},
    {"model__refine": "additive", "model__awr__additive_on": "weights", "model__awr__gate": 0.1},
    {"model__refine": "stochastic", "model__awr__correlation": "wasserstein"}, {"model__refine": "stochastic"},
    {"model__cosine": 20.0, "train__average": 0.999},
    {"loss__negatives": "popularity", "loss__name": "sampled_softmax"}, {"model__backbone": "stosa"}, PUBLISHED,
    {"model__backbone": "stosa", "loss__name": "gbce", "loss__pvn_weight": 0.1},
    {"model__awr__slots": "lag", "model__awr__order": 2}, {"model__refine": "none", "model__attention__sink": -2.5},
    {"model__awr__slots": "lag", "model__attention__implementation": "fused", "model__attention__sink": 0.0},
    {"model__awr__slots": "lag", "model__awr__order": 2, "model__attention__implementation": "fused",
     "model__refine": "simple"},
])
def test_values_that_fit_together_are_accepted(values):
  final = dict(configs.walk(configs.finalize(changed(**values))))
  assert all(final[key.replace("__", ".")] == value for key, value in values.items())


def test_slots_are_the_default_where_nothing_is_refined():
  config = changed(model__refine="none", model__awr__slots="lag")
  assert configs.finalize(config) == configs.finalize(changed(model__refine="none"))
  assert config.model.awr.slots == "lag"  # what was given stays as it is


def test_a_stored_config_comes_back():
  config = configs.default()
  config.model.width, config.train.clip_norm, config.data.path = 32, 1.0, "x"
  stored = json.loads(json.dumps(configs.finalize(config).to_dict()))
  assert configs.restore(stored, "run") == configs.finalize(config)
  del stored["eval"]["keep_ranks"]  # as before there was the key
  assert configs.restore(stored, "run") == configs.finalize(config)


@pytest.mark.parametrize("key,value,message", [
    ("speed", 3, r"run was written by another version of awrsr_jax: this one has no config keys \['model.speed'\]"),
    ("width", "wide", "run holds a config that this version"), ("refine", "more", "run holds .*refine='more'")])
def test_a_stored_config_of_another_version_is_refused(key, value, message):
  stored = configs.default().to_dict()
  stored["model"][key] = value
  with pytest.raises(ValueError, match=message):
    configs.restore(stored, "run")


def test_every_knob_is_read_by_the_package():
  reads = set()
  for path in (ROOT / "awrsr_jax").rglob("*.py"):
    if path.name == "config.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute):
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
        reads.add((LOCAL_NAMES.get(owner, owner), node.attr))
  dead = [key for key in LEAVES if tuple(f"config.{key}".split(".")[-2:]) not in reads]
  assert not dead
