"""Results in words and tables, written from the run folders of a grid: every number is read, none is typed.

The same run folders give the same bytes. What is missing is named; what does not belong together is refused.
"""

import dataclasses
import functools
import math
import os
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from awrsr_jax.analysis import figures, significance
from awrsr_jax.analysis.drawing import Drawing, to_svg
from awrsr_jax.analysis.grid import COMPLETE, METRICS, MISSING, STARTED, Anchor, Cost, Grid, Planned, Table, read_states
from awrsr_jax.analysis.runs import Run, check_comparable, read_run
from awrsr_jax.analysis.text import show_metric, show_spread
from awrsr_jax.engine.run_folder import lock_folder, write_bytes, write_text
from awrsr_jax.foreign import plain

COMPARED = "ndcg@10"
HOW_TO_READ = """\
Values are means over seeds ± one sample deviation; there is no deviation where one seed is complete. Of each run the
best epoch by validation NDCG@10 is ranked once on the test split. "Against" compares test NDCG@10 with the first row,
user by user, over the seeds that are complete in both rows ("over seeds"), since runs of one seed start from the same
values and can share its luck: the difference in % with its 95 % interval. With three seeds or more the interval covers
the luck of users and of seeds; with fewer, in italics, of users alone, and training again may say something else. p is
two-sided, over users, corrected by Holm for the rows of a table. Numbers of others are in italics with their source;
they were not made by this code. Commands are those of rows with a complete run, and DATA is the folder of the data
files. A command trains nothing where its run folder is complete, as in a clone of this repository; with another
--workdir it trains anew."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table: its name, the runs it wants, by seed, those that are complete, and folder -> state of all."""

  name: str
  planned: Sequence[Planned]
  runs: Sequence[Run]
  states: dict[str, str]


def write_results(grid: Grid, out: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
  """Writes the results as markdown, and beside it, in a folder of its name, a figure a table.

  Of several hosts one writes at a time, and what the last one writes is of all runs.

  Args:
    grid: what is wanted.
    out: the folder of its runs.
    path: of the markdown file; it and the figures are replaced, each whole or not at all.

  Raises:
    ValueError: no run is complete; a run folder is damaged, of another config, or ranks other targets or under another
      protocol than the rest of its table; or a file cannot be written.
  """
  path = epath.Path(path)
  folder = path.with_suffix("")
  with lock_folder(folder, "--results", wait=math.inf):
    text, drawings = render(grid, out, path.stem)
    try:
      for drawing in drawings:
        write_bytes(folder / f"{drawing.key}.svg", to_svg(drawing))
      write_text(path, text)
    except OSError as error:
      raise ValueError(f"--results={path} cannot be written: {error.strerror or error}; choose another file") from error


def render(grid: Grid, out: str | os.PathLike[str], figure_folder: str) -> tuple[str, list[Drawing]]:
  """Returns the markdown and its figures; see write_results.

  Args:
    grid: what is wanted.
    out: the folder of its runs.
    figure_folder: where the figures will lie, seen from the markdown file.
  """
  states = read_states(grid, out)
  if COMPLETE not in states.values():
    raise ValueError(f"--out={out}: none of the {len(grid.runs)} runs of {grid.path} is complete, so there is nothing "
                     "to report; run them, or name the folder where they are")
  rows: dict[str, list[Row]] = {}
  for (key, name), planned in grid.by_row.items():
    complete = [_read(out, run.folder) for run in planned if states[run.folder] == COMPLETE]
    rows.setdefault(key, []).append(Row(name, planned, complete, states))
  count = sum(state == COMPLETE for state in states.values())
  parts = ["# Results", f"Written by `python -m awrsr_jax.reproduce` from run folders; {count} of the {len(grid.runs)} "
           f"runs that `{os.path.basename(grid.path)}` declares are complete.", HOW_TO_READ]
  drawings, empty = [], []
  for table in grid.tables:
    if isinstance(table, Table) and not any(row.runs for row in rows[table.key]):
      empty.append(f"- {table.key}: {table.title}")
      continue
    parts += [f"## {table.key}: {table.title}", table.text]
    if isinstance(table, Cost):
      parts += render_cost(table, rows)
      continue
    found, drawing = render_table(table, rows[table.key], figure_folder, out)
    parts += found
    drawings += [drawing] if drawing else []
  if empty:
    parts += ["## Not run yet", "No run of these tables is complete. `python -m awrsr_jax.reproduce --list` prints "
              "their commands.", "\n".join(empty)]
  return "\n\n".join(parts) + "\n", drawings


def render_table(table: Table, rows: Sequence[Row], figure_folder: str,
                 out: str | os.PathLike[str]) -> tuple[list[str], Drawing | None]:
  """Returns the paragraphs of a table after its text, and its figure where two rows have a complete run.

  Args:
    table: what is wanted.
    rows: of it; one or more of them have a complete run.
    figure_folder, out: see render.

  Raises:
    ValueError: its runs rank other targets or under another protocol.
  """
  complete = [row for row in rows if row.runs]
  runs = [run for row in complete for run in row.runs]
  check_table_runs(table, runs)
  compared, left_out = compare_rows(rows)
  titles = ["row", "seeds", *(title(column) for column in METRICS), f"against {escape(rows[0].name)}", "over seeds",
            "p (Holm)", "parameters"]
  lines = [[escape(row.name), f"{len(row.runs)}/{len(row.planned)}",
            *(show_spread([read_metric(run, column) for run in row.runs]) for column in METRICS),
            *show_difference(compared.get(row.name)), show_parameters(row.runs)] for row in complete]
  lines += [show_anchor(anchor, len(titles)) for anchor in table.anchors]
  lines += [show_oracle(runs[0].result["oracle"], len(titles))] if "oracle" in runs[0].result else []
  parts, drawing = [describe_setting(runs[0]), format_table(titles, lines), *left_out], None
  parts += [f"Not complete: {missing}."] if (missing := name_missing(rows)) else []
  parts.append(f"{describe_devices(runs)}.")
  groups = {row.name: list(row.runs) for row in complete}
  if len(groups) >= 2:
    try:
      drawing = dataclasses.replace(figures.validation_curve(groups, COMPARED), key=table.folder)
      caption = escape(f"{drawing.title}. {drawing.caption}")
      parts += [f"![{drawing.title}, {table.title}]({figure_folder}/{drawing.key}.svg)", caption]
    except ValueError as error:
      parts.append(f"There is no figure: {escape(str(error))}.")
  parts.append(list_commands(complete, "OUT" if os.path.isabs(out) else os.fspath(out)))  # a page names no machine
  return parts, drawing


def render_cost(table: Cost, rows: dict[str, list[Row]]) -> list[str]:
  """Returns the paragraphs of a cost table after its text: a table of all rows of the tables whose runs it shows."""
  titles = ["table", "row", "runs", "parameters", "minutes", "peak memory", "device"]
  lines = []
  for key in table.of:
    for row in rows[key]:
      for device in sorted({run.result["device"] for run in row.runs}):
        runs = [run for run in row.runs if run.result["device"] == device]
        lines.append([escape(key), escape(row.name), str(len(runs)), show_parameters(runs),
                      show_minutes(runs), show_memory(runs), escape(device)])
  if not lines:
    return [f"No run of {', '.join(table.of)} is complete."]
  return ["Minutes are means over runs ± one sample deviation, from start to result, with compiling and evaluating. "
          "Memory is the largest of the runs.",
          format_table(titles, lines)]


def check_table_runs(table: Table, runs: Sequence[Run]) -> None:
  """Raises ValueError, with the table's name, unless its runs may stand in one table."""
  try:
    check_comparable(runs)
  except ValueError as error:
    raise ValueError(f"table {table.key!r}: {error}; move the one that does not belong out of the folder") from error


def compare_rows(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """Compares each row with the first one over the seeds that both have complete.

  Returns:
    Row name -> "relative", its interval ("ends"), whether that covers seeds ("covers_seeds"), how many were compared
    ("seeds") and "p_holm", corrected for all rows; and sentences of what could not be compared.
  """
  base, found, left_out = rows[0], {}, []
  together: dict[tuple[int, ...], list[Row]] = {}
  for row in rows[1:]:
    shared = sorted({run.seed for run in base.runs} & {run.seed for run in row.runs})
    if shared:
      together.setdefault(tuple(shared), []).append(row)  # rows of the same seeds share one draw of users
    elif row.runs:
      left_out.append(f"{escape(row.name)} is not compared: it has no complete seed that {escape(base.name)} has.")
  for seeds, members in together.items():
    pick = lambda row: tuple(run for run in row.runs if run.seed in seeds)  # noqa: B023, E731
    try:
      values = _compare(tuple((row.name, tuple(map(_stamp, pick(row)))) for row in (base, *members)))
    except ValueError as error:
      left_out.append(f"{', '.join(escape(row.name) for row in members)}: not compared, {escape(str(error))}.")
      continue
    for row in members:
      of_row = values[row.name]
      both = of_row["relative_users_and_seeds"]
      found[row.name] = {"relative": of_row["relative"], "ends": both or of_row["relative_interval"],
                         "covers_seeds": both is not None, "seeds": len(seeds), "p": of_row["p"]}
  corrected = significance.correct_holm([values["p"] for values in found.values()])
  return {name: values | {"p_holm": p_holm}
          for (name, values), p_holm in zip(found.items(), corrected, strict=True)}, left_out


def describe_setting(run: Run) -> str:
  """Returns protocol and corpus in words."""
  corpus = run.corpus
  return (f"{escape(corpus['name'] or 'own data')}: {corpus['users']:,} users, {corpus['items']:,} items, "
          f"{corpus['interactions']:,} interactions. Protocol: {escape(run.result['protocol'])}.")


def describe_devices(runs: Sequence[Run]) -> str:
  """Returns what the runs were trained on and with, and how many on each."""
  said = Counter(f"{run.result['device']}, " + ", ".join(f"{name} {version}" for name, version in
                                                        sorted(run.result["versions"].items())) for run in runs)
  return "Trained: " + "; ".join(f"{count} run{'s' * (count > 1)} on {escape(words)}"
                                 for words, count in sorted(said.items()))


def name_missing(rows: Sequence[Row]) -> str:
  """Returns which seeds of which rows are not complete, "" where all are."""
  parts = []
  for row in rows:
    for state in (STARTED, MISSING):
      seeds = [str(run.seed) for run in row.planned if row.states[run.folder] == state]
      if seeds:
        parts.append(f"{escape(row.name)}: seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {state}")
  return "; ".join(parts)


def list_commands(rows: Sequence[Row], out: str) -> str:
  """Returns the commands of a table as a block of shell, one line a row, in a loop over seeds; runs lie in `out`."""
  lines = []
  for row in rows:
    words = row.planned[0].command(out, "DATA", seed="$seed")
    lines.append("  " + " ".join(word if "$" in word else shlex.quote(word) for word in words))
  seeds = " ".join(str(run.seed) for run in rows[0].planned)
  return "\n".join(["```bash", f"for seed in {seeds}; do", *lines, "done", "```"])


def read_metric(run: Run, column: str) -> float:
  """Returns a metric of a run, of a column as "test ndcg@10"."""
  split, name = column.split()
  return run.result[split][name]


def show_difference(values: dict[str, Any] | None) -> list[str]:
  """Returns the three cells of a comparison; empty for what was not compared."""
  if values is None:
    return ["", "", ""]
  ends = values["ends"]
  relative = "-" if values["relative"] is None else f"{values['relative']:+.1f} %"
  interval = "-" if ends is None else f"[{ends[0]:+.1f}, {ends[1]:+.1f}]"
  return [f"{relative} {interval if values['covers_seeds'] or ends is None else f'*{interval}*'}", str(values["seeds"]),
          show_metric(values["p_holm"])]


def show_parameters(runs: Sequence[Run]) -> str:
  """Returns how many parameters the runs have."""
  return ", ".join(f"{count:,}" for count in sorted({run.result["parameters"] for run in runs}))


def show_minutes(runs: Sequence[Run]) -> str:
  """Returns how many minutes the runs took: mean and sample deviation."""
  minutes = [run.result["wall_time_s"] / 60 for run in runs]
  deviation = f" ± {statistics.stdev(minutes):.1f}" if len(minutes) > 1 else ""
  return f"{statistics.fmean(minutes):.1f}{deviation}"


def show_memory(runs: Sequence[Run]) -> str:
  """Returns the largest peak memory of the runs, wherever it was measured, in MiB."""
  places = sorted({place for run in runs for place in run.result["peak_memory"]})
  return ", ".join(f"{escape(place)} {max(run.result['peak_memory'].get(place, 0) for run in runs) / 2**20:,.0f} MiB"
                   for place in places)


def show_anchor(anchor: Anchor, cells: int) -> list[str]:
  """Returns the cells of others' numbers."""
  values = [f"*{show_metric(anchor.values[column])}*" if column in anchor.values else "" for column in METRICS]
  line = [f"*{escape(anchor.name)} (others: {escape(anchor.source)})*", "", *values]
  return line + [""] * (cells - len(line))


def show_oracle(oracle: dict[str, float], cells: int) -> list[str]:
  """Returns the cells of what the law that made the data ranks at, on the test split."""
  values = {f"test {name}": show_metric(value) for name, value in oracle.items()}
  line = ["best possible, by the law of the data", "", *(values.get(column, "") for column in METRICS)]
  return line + [""] * (cells - len(line))


def title(column: str) -> str:
  """Returns the title of a column of metrics."""
  split, name = column.split()
  return f"{'validation' if split == 'valid' else split} {name.upper()}"


def escape(text: str) -> str:
  """Returns a text that markdown shows as it is, also in a cell."""
  return re.sub(r"[\\|*_`<[]|^[#>+=-]", r"\\\g<0>", plain(text))


def format_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Returns a markdown table."""
  return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *lines])


def _read(out: str | os.PathLike[str], folder: str) -> Run:
  """Returns a complete run; what was read stays read until its result changes."""
  path = epath.Path(out) / folder
  return _read_once(str(path), (path / "result.json").stat().mtime)


@functools.cache
def _read_once(folder: str, _: float) -> Run:
  return read_run(folder)


def _stamp(run: Run) -> tuple[str, float]:
  """Returns what tells a run from all others, and from itself before it changed."""
  return run.folder, (epath.Path(run.folder) / "result.json").stat().mtime


@functools.cache  # thousands of resamples: a grid of many tables writes them after every run
def _compare(groups: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]) -> dict[str, dict[str, Any]]:
  """Returns significance.compare of rows, name -> values of the one metric that is compared."""
  runs = {name: [_read_once(*stamp) for stamp in members] for name, members in groups}
  return significance.compare(runs, (COMPARED,))["metrics"][COMPARED]
