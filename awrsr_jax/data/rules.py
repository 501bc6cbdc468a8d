"""Owns the rules that make histories of a clean log: duplicates, k-core, longest history, order; and counts.

Everything here is a query on table `coded` (user, item, time, row) of data/log.py, so that a log may be larger than
memory. A history is a user's rows by (time, row): between equal times the order of the source decides.
"""

import logging
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np

LOG = logging.getLogger(__name__)
KEPT = {  # of rows that repeat: which ones stay
    "keep": "true",
    "first": "row_number() OVER (PARTITION BY user, item ORDER BY time, row) = 1",
    "last": "row_number() OVER (PARTITION BY user, item ORDER BY time DESC, row DESC) = 1",
    "consecutive": "lag(item) OVER (PARTITION BY user ORDER BY time, row) IS DISTINCT FROM item",
}


def apply_rules(database: duckdb.DuckDBPyConnection, data: Any, source: str) -> None:
  """Leaves in `coded` what `config.data` wants of it: first duplicates go, then k-core, then old ends of histories.

  Args:
    database: with table `coded`.
    data: `config.data`; of it `duplicates`, `k_core` and `max_history`.
    source: for messages.

  Raises:
    ValueError: no row is left.
  """
  before = count(database)
  if data.duplicates != "keep":
    _keep(database, KEPT[data.duplicates])
    _tell(source, f"duplicates={data.duplicates}", before, count(database))
  _keep_core(database, data.k_core, source)
  if data.max_history:
    before = count(database)
    _keep(database, f"row_number() OVER (PARTITION BY user ORDER BY time DESC, row DESC) <= {data.max_history}")
    _tell(source, f"max_history={data.max_history}", before, count(database))


def count(database: duckdb.DuckDBPyConnection) -> tuple[int, int, int]:
  """Returns how many users, items and interactions are in `coded`."""
  return database.execute("SELECT (SELECT count(*) FROM (SELECT DISTINCT user FROM coded)), "
                          "(SELECT count(*) FROM (SELECT DISTINCT item FROM coded)), count(*) FROM coded").fetchone()


def codes(database: duckdb.DuckDBPyConnection, column: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the codes that are left of "user" or "item", ascending, and how many rows each has (int32, int64)."""
  found = database.execute(f"SELECT {column} AS code, count(*) AS rows FROM coded GROUP BY code ORDER BY code")
  found = found.fetchnumpy()
  return np.asarray(found["code"]), np.asarray(found["rows"])


def count_before(database: duckdb.DuckDBPyConnection, time: float) -> np.ndarray:
  """Returns (U,) int64 how many rows of each user are older than a time."""
  found = database.execute(f"SELECT user, count(*) FILTER (time < {time!r}) AS rows FROM coded GROUP BY user "
                           "ORDER BY user").fetchnumpy()
  return np.asarray(found["rows"])


def find_share(database: duckdb.DuckDBPyConnection, share: float) -> float:
  """Returns the time of the first row after a share of all rows, by time."""
  total, = database.execute("SELECT count(*) FROM coded").fetchone()
  return database.execute("SELECT time FROM coded ORDER BY time LIMIT 1 OFFSET $rows",
                          {"rows": min(int(round(total * share, 6)), total - 1)}).fetchone()[0]


def order_items(database: duckdb.DuckDBPyConnection) -> Iterator[np.ndarray]:
  """Yields the item codes in pieces: user after user, each user's oldest first."""
  database.execute("CREATE TABLE ordered AS SELECT item FROM coded ORDER BY user, time, row")
  for batch in database.sql("SELECT item FROM ordered").to_arrow_reader(1 << 20):
    yield batch.column(0).to_numpy()
  database.execute("DROP TABLE ordered")


def _keep(database: duckdb.DuckDBPyConnection, condition: str) -> None:
  database.execute(f"CREATE TABLE kept AS SELECT * FROM coded QUALIFY {condition}")
  database.execute("DROP TABLE coded")
  database.execute("ALTER TABLE kept RENAME TO coded")


def _keep_core(database: duckdb.DuckDBPyConnection, k: int, source: str) -> None:
  """Leaves the k-core: every user and every item left has at least k rows left. It is unique."""
  before = count(database)
  rare = "{0} IN (SELECT {0} FROM coded GROUP BY {0} HAVING count(*) < " + str(k) + ")"
  while k > 1:
    gone, = database.execute(f"DELETE FROM coded WHERE {rare.format('user')} OR {rare.format('item')}").fetchone()
    if not gone:
      break
  after = count(database)
  if not after[2]:
    raise ValueError("{}: no users left after k-core {} (there were {} users, {} items, {} interactions); set a lower "
                     "--config.data.k_core".format(source, k, *before))
  _tell(source, f"k-core {k}", before, after)


def _tell(source: str, rule: str, before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
  """Logs what a rule left."""
  if before != after:
    LOG.info("%s of %s: %d of %d users, %d of %d items, %d of %d interactions kept", rule, source,
             *(count for pair in zip(after, before, strict=True) for count in pair))
