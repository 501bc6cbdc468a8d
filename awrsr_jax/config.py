"""Every knob of awrsr_jax, with its default, in one place.

A config file (`configs/*.py`) starts from `default()` and states what differs; `--config.train.epochs=50` on the
command line overrides both. Optional keys are typed placeholders (None until set), so each can be set by flag and a
misspelt key fails. `finalize` checks a config and freezes it: after it nothing is filled in or guessed.
"""

import contextlib
import datetime
import math
from typing import Any

import ml_collections
from ml_collections import config_dict

REFINEMENTS = ("none", "simple", "value", "additive", "stochastic")
PER_POSITION = ("bce", "bpr", "gbce")  # losses that draw negatives for each position
LOSSES = (*PER_POSITION, "softmax", "sampled_softmax")

# The choices of every key that is a name: one table, so that one check and one message serve them all.
CHOICES = {
    "data.format": ("auto", "sequences", "pairs", "movielens", "table", "tfds", "prepared", "synthetic"),
    "data.on_bad_row": ("error", "skip"),
    "data.duplicates": ("keep", "first", "last", "consecutive"),
    "data.split.name": ("leave_one_out", "time", "users"),
    "data.split.target": ("last", "first", "all"),
    "data.long_history": ("newest", "windows"),
    "data.feed": ("auto", "device", "host"),
    "model.backbone": ("sasrec", "stosa"),
    "model.norm": ("pre", "post", "query"),
    "model.activation": ("relu", "gelu", "elu", "swiglu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention.implementation": ("auto", "reference", "fused"),
    "model.refine": REFINEMENTS,
    "model.awr.correlation": ("dot", "wasserstein"),
    "model.awr.slots": ("end", "lag"),
    "model.awr.additive_on": ("scores", "weights"),
    "loss.name": LOSSES,
    "loss.negatives": ("uniform", "popularity"),
    "train.item_start": ("random", "cooccurrence"),
    "train.optimizer": ("adam", "adamw"),
    "train.schedule": ("constant", "cosine", "linear"),
    "eval.protocol": ("full", "unfiltered", "uniform100", "popular100"),
}

# key -> smallest allowed value, and whether that value itself is allowed
BOUNDS = {
    "seed": (0, True), "data.k_core": (0, True), "data.max_history": (0, True), "data.split.valid_share": (0, False),
    "data.split.test_share": (0, False), "data.split.seed": (0, True), "data.max_length": (1, True),
    "data.buckets": (1, True),
    "data.synthetic.num_users": (1, True), "data.synthetic.num_items": (2, True), "data.synthetic.length": (5, True),
    "data.synthetic.order": (1, True), "data.synthetic.seed": (0, True), "data.synthetic.temperature": (1e-6, True),
    "model.width": (1, True), "model.layers": (1, True), "model.heads": (1, True), "model.ffn_width": (1, True),
    "model.dropout": (0, True), "model.attention.dropout": (0, True),
    "model.table_multiple": (1, True), "model.awr.rank": (1, True), "model.awr.order": (1, True),
    "loss.num_negatives": (1, True), "loss.gbce_t": (0, True), "loss.pvn_weight": (0, True),
    "train.epochs": (1, True), "train.batch_size": (1, True), "train.accumulate": (1, True),
    "train.steps_per_call": (1, True),
    "train.learning_rate": (0, False), "train.weight_decay": (0, True), "train.warmup_steps": (0, True),
    "train.clip_norm": (0, False), "train.average": (0, False), "model.awr.gate": (0, False),
    "model.cosine": (0, False),
    "train.patience": (1, True), "train.log_every": (1, True), "train.beta1": (0, True), "train.beta2": (0, True),
    "eval.every_epochs": (1, True), "eval.batch_size": (1, True), "eval.block_items": (1, True),
    "checkpoint.every_steps": (1, True), "mesh.model": (1, True),
}


def default() -> ml_collections.ConfigDict:
  """Returns the base config: a small SASRec with value refinement, trained by full softmax."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # parameters, batch order, negatives and dropout all derive from it

  config.data = data = ml_collections.ConfigDict()
  data.name = ""  # a benchmark (its counts and fingerprint must match), "synthetic", or "" for your own data
  data.path = ""  # local file or folder; empty: download, TFDS or generate, as name and format say
  data.format = "auto"  # auto (by name and content), or one of CHOICES
  data.columns = ml_collections.ConfigDict()  # of tables and TFDS data sets; "" = by the names of known layouts
  data.columns.user = ""
  data.columns.item = ""
  data.columns.time = ""
  data.columns.rating = ""
  data.columns.title = ""
  data.header = ""  # of a CSV file without one: "item,user,rating,time", in the order of its columns
  data.on_bad_row = "error"  # error | skip (and count)
  # What becomes of the rows, in this order:
  data.min_rating = config_dict.placeholder(float)  # drop rows rated lower
  data.duplicates = "keep"  # of one user and item: keep | first | last | consecutive (drop an item right after itself)
  data.k_core = 0  # drop users and items with fewer interactions, to a fixed point; 0 keeps everything
  data.max_history = 0  # the newest so many interactions of each user; 0 keeps everything
  data.split = ml_collections.ConfigDict()
  data.split.name = "leave_one_out"  # leave_one_out | time (train before, validate between, test after) | users
  data.split.valid_from = "90%"  # time: a date, a number in the data's own unit, or the share of rows before it
  data.split.test_from = "95%"
  data.split.target = "last"  # time: which of a user's items in a period are ranked: last | first | all
  data.split.valid_share = 0.1  # users: held out for validation, and for test; their last item is ranked
  data.split.test_share = 0.1
  data.split.seed = 0  # users: which ones, by a hash of their raw id
  data.max_length = 50  # n: the longest input the model sees
  data.long_history = "newest"  # histories longer than n: the newest n | windows (consecutive, all trained on)
  data.buckets = 4  # padded lengths, at most; a batch has rows of each; placed where they save the most padding
  data.feed = "auto"  # device (the corpus lives there) | host (batches are sent) | auto: device up to 1 GiB
  data.tfds = ml_collections.ConfigDict()
  data.tfds.name = ""  # as in tfds.builder: "movielens/100k-ratings"
  data.tfds.split = "train"
  data.synthetic = ml_collections.ConfigDict()  # the law is stated in data/synthetic.py
  data.synthetic.seed = 0
  data.synthetic.num_users = 4000
  data.synthetic.num_items = 500
  data.synthetic.length = 24  # mean history length
  data.synthetic.order = 2  # how many earlier items a transition depends on
  data.synthetic.temperature = 1.0  # larger: flatter transitions, lower best possible NDCG

  config.model = model = ml_collections.ConfigDict()
  model.backbone = "sasrec"  # sasrec | stosa (histories and items are Gaussians)
  model.faithful = False  # stosa: the published network, defects and all, instead of ours
  model.width = 64  # D
  model.layers = 2
  model.heads = 1  # H
  model.ffn_width = 64  # hidden width of the feed-forward block
  model.activation = "relu"  # relu | gelu | elu | swiglu (gated: two layers in)
  model.branch_gates = False  # sasrec: what a branch of a block adds is gated by what it is added to
  model.norm = "pre"  # pre | post | query (the original SASRec: only the query is normalised)
  model.dropout = 0.2  # embedding, attention weights, feed-forward
  model.attention = ml_collections.ConfigDict()
  model.attention.dropout = config_dict.placeholder(float)  # of attention weights; None: model.dropout
  model.attention.implementation = "auto"  # reference (L x L weights in memory) | fused (in blocks) | auto (if it can)
  model.attention.sink = config_dict.placeholder(float)  # a row may attend to nothing: a learned score starts here
  model.cosine = config_dict.placeholder(float)  # sasrec: scores are cosines, times this; None: dot products
  model.dtype = "float32"  # of activations; parameters, softmax, norms and scores stay float32 (docs/method.md)
  model.remat = False  # keep only the inputs of blocks for the backward pass, and make the rest again
  model.table_multiple = 128  # item table rows are padded to it, whatever the device count
  model.refine = "value"  # none | simple | value | additive | stochastic
  model.awr = ml_collections.ConfigDict()
  model.awr.rank = 64  # r: width of the correlation space
  model.awr.order = 1  # repetitions; order k reaches (k+1)-hop relations
  model.awr.slots = "end"  # end | lag: row j of a slot table is n-1-j steps before the end, or before each row
  model.awr.share_heads = False  # one slot table for all heads
  model.awr.correlation = config_dict.placeholder(str)  # dot | wasserstein; None: the preset's own
  model.awr.additive_on = "scores"  # additive: scores | weights (gated)
  # value, additive on weights: keep 1 - g of A; g starts here, a head; None: .5 on weights, and value keeps nothing
  model.awr.gate = config_dict.placeholder(float)
  model.awr.value_projection = False  # value: multiply A by a learned [n, n] matrix that starts at the identity

  config.loss = loss = ml_collections.ConfigDict()
  loss.name = "softmax"  # bce | bpr | softmax | sampled_softmax | gbce
  loss.num_negatives = 256  # K: per position (bce, bpr, gbce), shared by the batch (sampled_softmax)
  loss.negatives = "uniform"  # uniform | popularity (sampled_softmax only)
  loss.gbce_t = 0.75  # calibration of gbce: 0 is bce, 1 undoes the sampling bias
  loss.pvn_weight = 0.0  # stosa with bpr, bce or gbce: keeps negatives farther from the target than the history is

  config.train = train = ml_collections.ConfigDict()
  train.epochs = 100
  train.batch_size = 128  # sequences in a global batch, of every bucket its share
  train.steps_per_call = config_dict.placeholder(int)  # with data.feed on the device; None: 1 on CPUs, else 16
  train.accumulate = 1  # pieces of a batch, one after another: less memory, the same update but for what each draws
  train.item_start = "random"  # random | cooccurrence: item vectors begin near those that stand beside them in training
  train.optimizer = "adam"  # adam | adamw
  train.learning_rate = 1e-3
  train.schedule = "constant"  # constant | cosine | linear, after the warm-up
  train.warmup_steps = 0
  train.weight_decay = 0.0  # adamw only
  train.beta1 = 0.9
  train.beta2 = 0.999
  train.clip_norm = config_dict.placeholder(float)  # global gradient norm; None: no clipping
  train.average = config_dict.placeholder(float)  # evaluate and keep averages that decay so; None: parameters
  train.patience = config_dict.placeholder(int)  # stop after so many evaluations without a better NDCG@10
  train.log_every = 50  # steps between lines of metrics.jsonl

  config.eval = ml_collections.ConfigDict()
  config.eval.protocol = "full"  # full | unfiltered | uniform100 | popular100: full, or what others ranked by
  config.eval.every_epochs = 1
  config.eval.batch_size = 256  # users
  config.eval.block_items = 65_536  # items scored at a time: bounds memory, changes no rank
  config.eval.keep_ranks = True  # ranks.parquet: the rank of every test target, with raw ids, for compare and analyze
  config.eval.hash_ids = False  # without raw ids there, so that it can be shown to people who may not have the data

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_steps = 1000  # and after every evaluation

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # devices that share a batch; -1: all that mesh.model leaves
  config.mesh.model = 1  # devices that share the item table
  return config


get_config = default  # so that this file is itself a config file


def finalize(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
  """Checks a config and freezes it.

  Args:
    config: what `default()` returned, with values changed; no key added or removed.

  Returns:
    The same values, frozen; but model.awr.slots is the default where nothing is refined: the config files choose it for
    their refinement, and `--config.model.refine=none` stays one flag, whose runs are one experiment.

  Raises:
    ValueError: a key is unknown or missing, or a value has the wrong type, is out of range or fits no other value.
  """
  start = default()
  given, known = dict(walk(config)), dict(walk(start))
  if given.keys() != known.keys():
    raise ValueError(f"config: unknown keys {sorted(given.keys() - known.keys())}, missing keys "
                     f"{sorted(known.keys() - given.keys())}; start from awrsr_jax.config.default()")
  for key, value in given.items():
    kind = key_type(start, key)
    if type(value) is not kind and not (value is None and known[key] is None):  # True is no int here
      raise ValueError(f"config.{key}={value!r} must be {kind.__name__}"
                       f"{' or None' if known[key] is None else ''}, not {type(value).__name__}")
  for key, choices in CHOICES.items():
    if given[key] is not None and given[key] not in choices:
      raise ValueError(f"config.{key}={given[key]!r} is not one of {', '.join(choices)}")
  for key, (low, included) in BOUNDS.items():
    value = given[key]
    if value is not None and not (value >= low if included else value > low):  # NaN fails both
      raise ValueError(f"config.{key}={value} must be {'at least' if included else 'more than'} {low}")
  _check_together(config)
  values = config.to_dict()
  if config.model.refine == "none":
    values["model"]["awr"]["slots"] = known["model.awr.slots"]
  return ml_collections.FrozenConfigDict(values)


def key_type(config: ml_collections.ConfigDict, key: str) -> type:
  """Returns the type of a dotted key; of an optional one, the type that it has when it is set."""
  *parents, leaf = key.split(".")
  for parent in parents:
    config = config[parent]
  return config.get_type(leaf)


def _check_together(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for values that are each allowed but not together."""
  model, loss, train = config.model, config.loss, config.train
  if config.seed >= 1 << 32:
    raise ValueError(f"config.seed={config.seed} must be below {1 << 32}: JAX's keys are made of 32 bits, and a larger "
                     "seed would repeat the run of a smaller one")
  if model.width % model.heads:
    raise ValueError(f"config.model.heads={model.heads} does not divide config.model.width={model.width}; "
                     f"choose heads from {[h for h in range(1, model.width + 1) if model.width % h == 0]}")
  for name, value in (("model.dropout", model.dropout), ("model.attention.dropout", model.attention.dropout),
                      ("train.beta1", train.beta1), ("train.beta2", train.beta2), ("train.average", train.average)):
    if value is not None and value >= 1:
      raise ValueError(f"config.{name}={value} must be below 1")
  if loss.gbce_t > 1:
    raise ValueError(f"config.loss.gbce_t={loss.gbce_t} must lie between 0 and 1")
  if model.faithful:
    published = {"backbone": "stosa", "norm": "post", "activation": "elu", "ffn_width": 4 * model.width}
    other = {key: model[key] for key, value in published.items() if model[key] != value}
    if other:
      raise ValueError(f"config.model.faithful is the published STOSA, with model.backbone=stosa, norm=post, "
                       f"activation=elu and ffn_width={4 * model.width} (4 * width); not {other}")
  if model.cosine is not None and not (model.backbone == "sasrec" and math.isfinite(model.cosine)):
    raise ValueError(f"config.model.cosine={model.cosine} must be a finite factor of cosines, and needs "
                     f"config.model.backbone=sasrec, not {model.backbone}, whose scores are distances; or None")
  if model.branch_gates and model.backbone != "sasrec":
    raise ValueError(f"config.model.branch_gates=True needs config.model.backbone=sasrec, not {model.backbone}; set it "
                     "to False")
  if loss.pvn_weight and model.backbone != "stosa":
    raise ValueError(f"config.loss.pvn_weight={loss.pvn_weight} compares distances between items, and the scores of "
                     f"config.model.backbone={model.backbone} are no distances; set it to 0, or use backbone=stosa")
  if loss.pvn_weight and loss.name not in PER_POSITION:
    raise ValueError(f"config.loss.pvn_weight={loss.pvn_weight} needs negatives of each position: "
                     f"config.loss.name one of {', '.join(PER_POSITION)}, not {loss.name}")
  if model.awr.correlation and model.refine == "none":
    raise ValueError(f"config.model.awr.correlation={model.awr.correlation} needs a refinement; "
                     "config.model.refine=none has nothing to correlate")
  if model.attention.sink is not None and not math.isfinite(model.attention.sink):
    raise ValueError(f"config.model.attention.sink={model.attention.sink} must be a finite number, or None")
  if loss.negatives == "popularity" and loss.name != "sampled_softmax":
    raise ValueError(f"config.loss.negatives=popularity needs config.loss.name=sampled_softmax, not {loss.name}: "
                     "only there is the sampling bias corrected")
  if train.weight_decay and train.optimizer != "adamw":
    raise ValueError(f"config.train.weight_decay={train.weight_decay} needs config.train.optimizer=adamw, "
                     f"not {train.optimizer}")
  if train.steps_per_call is not None and config.data.feed == "host":
    raise ValueError(f"config.train.steps_per_call={train.steps_per_call} needs batches that are built on the devices; "
                     "config.data.feed=host sends one a step: set feed to auto or device, or leave steps_per_call out")
  if model.awr.value_projection and model.refine != "value":
    raise ValueError(f"config.model.awr.value_projection needs config.model.refine=value, not {model.refine}")
  if model.awr.additive_on == "weights" and model.refine != "additive":
    raise ValueError(f"config.model.awr.additive_on=weights needs config.model.refine=additive, not {model.refine}; "
                     "leave it out, and for a gated value set config.model.awr.gate")
  mixes = model.refine == "value" or model.awr.additive_on == "weights"
  if model.awr.gate is not None and not (mixes and model.awr.gate < 1):
    raise ValueError(f"config.model.awr.gate={model.awr.gate} is the share of refined weights at the start, between 0 "
                     "and 1, and needs config.model.refine=value, or additive with model.awr.additive_on=weights")
  if model.refine == "stochastic" and model.awr.correlation == "dot":
    raise ValueError("config.model.refine=stochastic is the Wasserstein correlation; for dot use "
                     "config.model.refine=simple")
  if config.data.min_rating is not None and not math.isfinite(config.data.min_rating):
    raise ValueError(f"config.data.min_rating={config.data.min_rating} must be a finite number, or None")
  split, usual = config.data.split, default().data.split
  for name, keys in (("time", ("valid_from", "test_from", "target")), ("users", ("valid_share", "test_share", "seed"))):
    for key in keys:
      if split.name != name and split[key] != usual[key]:
        raise ValueError(f"config.data.split.{key}={split[key]} needs config.data.split.name={name}, not {split.name}; "
                         f"set the name, or leave {key} out")
  if split.name == "users" and split.valid_share + split.test_share >= 1:
    raise ValueError(f"config.data.split.valid_share={split.valid_share} and test_share={split.test_share} leave no "
                     "user to train on; lower them")
  for name in ("valid_from", "test_from"):
    if split.name == "time":
      parse_moment(split[name], f"config.data.split.{name}")
  if config.mesh.data != -1 and config.mesh.data < 1:
    raise ValueError(f"config.mesh.data={config.mesh.data} must be -1 (all devices) or at least 1")


def parse_moment(text: str, key: str) -> tuple[str, float]:
  """Returns ("share", 0 .. 1), ("time", a number) or ("date", seconds since 1970): of "90%", "12" or "2024-01-31".

  A date is in UTC unless it says otherwise.

  Raises:
    ValueError: it is none of them.
  """
  try:
    number = float(text.removesuffix("%"))
    if text.endswith("%") and 0 < number < 100:
      return "share", number / 100
    if not text.endswith("%") and math.isfinite(number):
      return "time", int(text) if text.strip().lstrip("+-").isdigit() else number
  except ValueError:
    with contextlib.suppress(ValueError):
      date = datetime.datetime.fromisoformat(text)
      return "date", (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
  raise ValueError(f"{key}={text!r} is no share of the rows (90%), no number in the unit of the data's times and no "
                   "date (2024-01-31, or 2024-01-31T12:00)")


def restore(values: dict[str, Any], where: str) -> ml_collections.FrozenConfigDict:
  """Returns the finalized config of a finished or running run, from what it stored.

  A key that was added since has its default here: a default always means what was done before there was the key.

  Args:
    values: nested, as in config.json.
    where: they stood, for messages.

  Raises:
    ValueError: they are no config of this version.
  """
  config = default()
  known = dict(walk(config))
  given = dict(walk(values))
  unknown = sorted(given.keys() - known.keys())
  if unknown:
    raise ValueError(f"{where} was written by another version of awrsr_jax: this one has no config keys {unknown}; use "
                     "the version that made it")
  try:
    config.update_from_flattened_dict(given)
    return finalize(config)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where} holds a config that this version of awrsr_jax does not take: {error}") from error


def walk(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
  """Returns (dotted key, value) of every leaf of a config, nested dict or frozen config, in key order."""
  leaves: list[tuple[str, Any]] = []
  for key in sorted(config):
    value = config[key]
    is_node = isinstance(value, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict, dict))
    leaves += walk(value, f"{prefix}{key}.") if is_node else [(prefix + key, value)]
  return leaves
