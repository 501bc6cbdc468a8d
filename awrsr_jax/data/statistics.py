"""Owns what is said about a log after its rules: counts, lengths, times, repeats, ties, popularity, leakage; warnings.

Every number comes from table `coded` (user, item, time, row) of data/log.py, some users' rows at a time: a log may be
larger than memory, and this file takes about 100 bytes a user and an item. U users, I items, N interactions; two
interactions of a user are neighbours when nothing of that user lies between them.
"""

import textwrap
from typing import Any

import duckdb
import numpy as np

from awrsr_jax.data import log as logs
from awrsr_jax.data import rules
from awrsr_jax.data.corpus import Corpus
from awrsr_jax.data.splits import FEWEST, HELD_OUT

SLICE = 1 << 22  # interactions whose users are looked at together; all at once, distinct pairs fill the memory
MANY_TIES = 0.05  # of neighbours
DOMINANT = 0.5  # of interactions, if the most popular hundredth of items has them
BAR = 40  # columns
PER_USER = """
    SELECT count(*)::INTEGER AS length, count(DISTINCT item)::INTEGER AS items,
      (count(*) FILTER (item = item_before))::INTEGER AS immediate,
      (count(*) FILTER (time = time_before))::INTEGER AS tied, max(time) AS newest,
      min(time) FILTER (NOT has_two_after) AS second
    FROM (SELECT user, item, time, lag(item) OVER history AS item_before, lag(time) OVER history AS time_before,
        lead(row, 2) OVER history IS NOT NULL AS has_two_after
      FROM coded WHERE user % {parts} = {part} WINDOW history AS (PARTITION BY user ORDER BY time, row))
    GROUP BY user"""


def measure(database: duckdb.DuckDBPyConnection, corpus: Corpus | None, data: Any,
            read: dict[str, int]) -> dict[str, Any]:
  """Measures a log after its rules.

  Args:
    database: with `coded`, not empty.
    corpus: made of it; None where training refuses it. Its histories are not read.
    data: `config.data`; of it `split.name`, `max_length` and `long_history`.
    read: see `log.clean`.

  Returns:
    Plain values, for JSON. Shares lie between 0 and 1. Histograms are {"1": how many, "2-3": ..., "4-7": ...}.
      read: `read`, and "taken_out", the rows that the rules took out.
      users, items, interactions: U, I, N.
      lengths: of histories: "min", "quartiles" (three), "max", "mean", "histogram" (of users).
      times: "oldest" and "newest", as numbers; "from" and "to", as dates where they look like some. None: no times,
        that is, all are equal.
      repeats: "interactions" whose user had the item before, and "immediate", those with nothing between.
      ties: "neighbours" with equal times, and their "share" of all neighbours; None: no times.
      popularity: "top_1_percent" and "top_10_percent", the share of interactions with so many items, rounded up, the
        most popular ones; "gini" of the items' counts, 0 where all are equal; "once", items that occur once;
        "histogram" (of items).
      later_training: of training interactions, the share that is later than a test target, on average over targets;
        under leave-one-out over users with `FEWEST` interactions. None: no times, no targets, or users are held out.
      never_trained: items that are never trained on; None: no corpus.
      beyond_max_length: see `count_beyond`; None: no corpus.
  """
  total, oldest, newest = database.execute("SELECT count(*), min(time), max(time) FROM coded").fetchone()
  users = _measure_users(database, total)
  lengths_U, tied = users["length"], int(users["tied"].sum())
  _, counts_I = rules.codes(database, "item")
  times = ties = later = None
  if oldest != newest:
    unit = logs.find_unit(database)
    times = {"oldest": oldest, "newest": newest, "from": logs.describe_time(oldest, unit),
             "to": logs.describe_time(newest, unit)}
    ties = {"neighbours": tied, "share": tied / max(total - lengths_U.size, 1)}
    if data.split.name != "users":  # by time, nothing is later
      later = 0.0 if data.split.name == "time" else _share_later(database, users)
  return {
      "read": read | {"taken_out": read["rows"] - read["bad_rows"] - read["low_ratings"] - total},
      "users": lengths_U.size, "items": counts_I.size, "interactions": total,
      "lengths": {"min": int(lengths_U.min()), "quartiles": np.quantile(lengths_U, [0.25, 0.5, 0.75]).tolist(),
                  "max": int(lengths_U.max()), "mean": total / lengths_U.size, "histogram": _count_powers(lengths_U)},
      "times": times,
      "repeats": {"interactions": total - int(users["items"].sum()), "immediate": int(users["immediate"].sum())},
      "ties": ties, "popularity": _measure_popularity(counts_I), "later_training": later,
      "never_trained": None if corpus is None else int(np.sum(corpus.counts[1:] == 0)),
      "beyond_max_length": None if corpus is None else count_beyond(corpus, data),
  }


def count_beyond(corpus: Corpus, data: Any) -> dict[str, int]:
  """Counts what does not fit into a row of training: `max_length` inputs, and one item more as the last target.

  Args:
    corpus: with offsets and split.
    data: `config.data`; of it `max_length` and `long_history`.

  Returns:
    "max_length"; "histories" whose training part is longer; and "interactions", those that are in no row, which are
    none with long_history=windows.
  """
  beyond_U = (corpus.split.train_ends - corpus.offsets[:-1] - data.max_length - 1).clip(0)
  return {"max_length": data.max_length, "histories": int(np.sum(beyond_U > 0)),
          "interactions": int(beyond_U.sum()) if data.long_history == "newest" else 0}


def _measure_users(database: duckdb.DuckDBPyConnection, total: int) -> dict[str, np.ndarray]:
  """Returns name -> (U,) of `PER_USER`, in any order; "second" is the second newest time, or the only one."""
  parts = -(-total // SLICE)
  found = [database.execute(PER_USER.format(parts=parts, part=part)).fetchnumpy() for part in range(parts)]
  return {name: np.concatenate([np.asarray(columns[name]) for columns in found]) for name in found[0]}


def _share_later(database: duckdb.DuckDBPyConnection, users: dict[str, np.ndarray]) -> float | None:
  """Returns the mean share of training interactions that are later than a test target, under leave-one-out.

  Training has all rows but the newest two of each user. So we count pairs of a target and a later row over all rows, a
  piece at a time, and take off the pairs with a row of those two.
  """
  length_U, newest_U = users["length"], users["newest"]
  targets = np.sort(newest_U[length_U >= FEWEST])
  untrained = np.concatenate([newest_U, users["second"][length_U > 1]])
  trained = int(length_U.sum()) - untrained.size
  if not trained:
    return None
  pairs = -_count_pairs(targets, untrained)
  for batch in database.sql("SELECT time FROM coded").to_arrow_reader(1 << 20):
    pairs += _count_pairs(targets, batch.column(0).to_numpy())
  return pairs / trained / targets.size


def _count_pairs(targets: np.ndarray, times: np.ndarray) -> int:
  """Returns how many pairs of a target (they ascend) and a later time there are."""
  return int(np.searchsorted(targets, np.sort(times)).sum())  # sorted, since neighbours are found near each other


def _measure_popularity(counts_I: np.ndarray) -> dict[str, Any]:
  """Returns how unevenly interactions are spread over items; see `measure`."""
  counts, size, total = np.sort(counts_I), counts_I.size, int(counts_I.sum())
  top = {f"top_{percent}_percent": int(counts[size - _percent_of(size, percent):].sum()) / total for percent in (1, 10)}
  gini = float(np.sum((2 * np.arange(1, size + 1) - size - 1) / size * counts)) / total
  return top | {"gini": gini, "once": int(np.sum(counts == 1)), "histogram": _count_powers(counts)}


def _percent_of(size: int, percent: int) -> int:
  """Returns so many percent, rounded up."""
  return -(-size * percent // 100)


def _count_powers(values: np.ndarray) -> dict[str, int]:
  """Returns how many values (from 1) lie in 1, 2-3, 4-7, ...: from the first of these that has some to the last."""
  found = np.bincount(np.frexp(values)[1] - 1).tolist()
  return {f"{1 << k}-{(2 << k) - 1}" if k else "1": count for k, count in enumerate(found) if any(found[:k + 1])}


def warn(found: dict[str, Any]) -> list[str]:
  """Returns one sentence for each thing about a log that may surprise who trains on it.

  Args:
    found: what `measure` returned.
  """
  read, ties, beyond, popularity = (found[key] for key in ("read", "ties", "beyond_max_length", "popularity"))
  total, repeats, later, never = (found[key] for key in ("interactions", "repeats", "later_training", "never_trained"))
  warnings = []
  if read["bad_rows"]:
    warnings.append(f"{read['bad_rows']:,} of {read['rows']:,} rows are bad and were left out; "
                    "--config.data.on_bad_row=error names the first of them")
  if ties and ties["share"] > MANY_TIES:
    warnings.append(f"{ties['share']:.1%} of neighbours in histories have equal times: which of them came first is "
                    "taken from the order of the source's rows, so never shuffle them")
  if repeats["interactions"]:
    warnings.append(f"{repeats['interactions']:,} interactions ({repeats['interactions'] / total:.1%}) repeat an item "
                    "that their user had before; rankings leave out what a user had, except the target; "
                    "--config.data.duplicates=first drops repeats")
  if later:
    warnings.append(f"{later:.1%} of the training interactions are later than a test target, on average: leave-one-out "
                    "trains on what was not known then; --config.data.split.name=time does not")
  if beyond and beyond["interactions"]:
    warnings.append(f"{beyond['interactions']:,} interactions ({beyond['interactions'] / total:.1%}) are never trained "
                    f"on: of {beyond['histories']:,} histories only the newest part fits "
                    f"--config.data.max_length={beyond['max_length']}; raise it, or cut them all into rows with "
                    "--config.data.long_history=windows")
  if never:
    warnings.append(f"{never:,} of {found['items']:,} items are never trained on, and are ranked all the same; "
                    "a larger --config.data.k_core leaves fewer of them")
  if popularity["top_1_percent"] > DOMINANT:
    items = _percent_of(found["items"], 1)
    warnings.append(f"{popularity['top_1_percent']:.1%} of interactions are with the most popular "
                    f"{'item' if items == 1 else f'{items:,} items'}: compare with a ranking by popularity")
  return warnings


def render(found: dict[str, Any], plan: dict[str, Any]) -> str:
  """Returns a report of lines of up to 100 columns.

  Args:
    found: what `measure` returned.
    plan: what training makes of the log: "rules", as `prepared.rules_of`; "description", as `corpus.describe`; and
      "padding", a list of {"buckets": how many, "lengths": of them, "share": of padding}. The last two may be None.
  """
  read, lengths, popularity, times = (found[key] for key in ("read", "lengths", "popularity", "times"))
  total, repeats, ties, later = (found[key] for key in ("interactions", "repeats", "ties", "later_training"))
  rules_set = [f"{key}={value}" for key, value in plan["rules"].items()
               if not key.startswith("split.") and value not in (None, 0, "keep")]
  rows = [
      ("rows", f"{read['rows']:,} read, {read['bad_rows']:,} bad, {read['low_ratings']:,} rated too low, "
               f"{read['taken_out']:,} taken out by other rules"),
      ("rules", ", ".join(rules_set) or "none"),
      ("users", f"{found['users']:,}"),
      ("items", f"{found['items']:,}; {popularity['once']:,} occur once" + (
          "" if found["never_trained"] is None else f", {found['never_trained']:,} are never trained on")),
      ("interactions", f"{total:,}; density {total / found['users'] / found['items']:.3%}"),
      ("lengths", f"min {lengths['min']:,}, quartiles {' / '.join(f'{value:,g}' for value in lengths['quartiles'])}, "
                  f"max {lengths['max']:,}, mean {lengths['mean']:,.2f}"),
      ("times", f"{times['from']} to {times['to']}" if times else "none: rows are in the order of time"),
      ("ties", f"{ties['neighbours']:,} ({ties['share']:.1%} of neighbours)" if ties else "no times"),
      ("repeats", f"{repeats['interactions']:,} ({repeats['interactions'] / total:.1%}), {repeats['immediate']:,} of "
                  "them right after the same item"),
      ("popularity", f"top 1% of items: {popularity['top_1_percent']:.1%} of interactions, top 10%: "
                     f"{popularity['top_10_percent']:.1%}; Gini {popularity['gini']:.3f}"),
      ("leakage", "not known" if later is None else f"{later:.1%} of training interactions are later than a "
                  "test target")]
  if plan["description"]:
    split = plan["description"]["split"]
    rows += [("fingerprint", plan["description"]["fingerprint"]), ("split", split["words"]),
             ("  training", f"{split['training']:,} interactions")]
    rows += [(f"  {part}", f"{split[part]['targets']:,} targets; {split[part]['new_users']:,} of their users, "
                           f"{split[part]['new_items']:,} of their items never trained on") for part in HELD_OUT]
  for at, row in enumerate(plan["padding"] or []):
    rows.append(("" if at else "padding", f"{row['share']:5.1%} with {row['buckets']} "
                 f"bucket{'' if row['buckets'] == 1 else 's'}: {', '.join(map(str, row['lengths']))}"))
  return "\n".join([*(textwrap.fill(value, 100, initial_indent=f"{name:14}", subsequent_indent=" " * 14)
                      for name, value in rows),
                    "", "history lengths (users)", *_draw(lengths["histogram"]),
                    "", "interactions of an item (items)", *_draw(popularity["histogram"])])


def _draw(histogram: dict[str, int]) -> list[str]:
  """Returns a line for each bar; only 0 has none."""
  labels, counts = max(map(len, histogram)), max(len(f"{count:,}") for count in histogram.values())
  most = max(histogram.values())
  return [f"  {label:>{labels}}  {count:>{counts},} {'█' * -(-BAR * count // most)}".rstrip()
          for label, count in histogram.items()]
