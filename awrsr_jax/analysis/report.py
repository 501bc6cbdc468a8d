"""One self-contained HTML page of a run or of several: what was run, on what, with which results, and all figures.

No scripts, no fonts and nothing from elsewhere: the page says so itself (Content-Security-Policy) and opens from disk.
Every text that comes from data, folders or configs is escaped. The same runs give the same bytes.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from awrsr_jax.analysis.drawing import Drawing
from awrsr_jax.analysis.figures import Groups
from awrsr_jax.analysis.page import STYLE, Page, escape
from awrsr_jax.analysis.runs import Run
from awrsr_jax.analysis.text import show_metric, show_spread
from awrsr_jax.config import default, walk

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Attention:
  """What was seen of one model: `run` stands for its `group`."""

  group: str
  run: Run
  drawings: list[Drawing]


def render(groups: Groups, drawings: Sequence[Drawing], attention: Sequence[Attention],
           comparison: dict[str, Any] | str, left_out: Sequence[str]) -> str:
  """Returns the page.

  Args:
    groups: see runs.group; they rank the same targets under one protocol. The first is what others are compared with.
    drawings: from run folders.
    attention: of models.
    comparison: see significance.compare; or a sentence that says why there is none.
    left_out: sentences about what could not be made.
  """
  page, runs = Page(), [run for members in groups.values() for run in members]
  name = runs[0].corpus["name"]
  title = f"{', '.join(groups)} on {name}" if len(groups) < 4 else f"{len(groups)} configs on {name}"
  parts = {
      "run": ("What was run", _what_was_run(page, groups)),
      "data": ("Corpus and protocol", _corpus(page, runs[0])),
      "results": ("Results", _results(page, groups)),
      "significance": ("Significance", _significance(page, comparison)),
      "figures": ("Figures", '<div class="figures">' + "".join(page.figure(drawing, 3) for drawing in drawings) +
                  "</div>" if drawings else "<p>None could be made; see what was left out.</p>"),
      "attention": ("Attention", _attention(page, attention)),
      "cost": ("Cost", _cost(page, groups)),
      "left-out": ("Left out", "<ul>" + "".join(f"<li>{escape(words)}</li>" for words in left_out) + "</ul>"
                   if left_out else "<p>Nothing: all that the command makes is here.</p>"),
  }
  links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, (heading, _) in parts.items())
  sections = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>\n{content}</section>\n'
                     for key, (heading, content) in parts.items())
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(title)}</h1>
<p>{len(runs)} run{"s" * (len(runs) > 1)} of {len(groups)} config{"s" * (len(groups) > 1)}; {_span_of_seeds(runs)}.</p>
</header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="content" tabindex="-1">
{sections}</main>
<footer><p>Made by <code>python -m awrsr_jax.analyze</code> from the run folders
{", ".join(f"<code>{escape(run.folder)}</code>" for run in runs)}.</p></footer>
</body>
</html>
"""


def command(run: Run) -> list[str]:
  """Returns a command that trains the same config, as words; the run folder does not hold the one that was typed."""
  flags = [f"--config.{key}={value}" for key, value, _ in changed_keys(run.config)]
  return ["python", "-m", "awrsr_jax.main", "--config=awrsr_jax/config.py", *flags, f"--workdir={run.folder}"]


def changed_keys(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
  """Returns key, value and default of every key of a flat config that is not at its default."""
  start = dict(walk(default()))
  return [(key, value, start.get(key)) for key, value in sorted(config.items())
          if json.dumps(value) != json.dumps(start.get(key))]


def _span_of_seeds(runs: Sequence[Run]) -> str:
  """Returns the seeds in words."""
  seeds = sorted({run.seed for run in runs})
  return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _what_was_run(page: Page, groups: Groups) -> str:
  """Returns the runs, the keys of their configs that are not at their defaults, and their commands."""
  start = dict(walk(default()))
  keys = sorted({key for members in groups.values() for run in members for key, _, _ in changed_keys(run.config)}
                | {key for key in start if len({_values(members, key) for members in groups.values()}) > 1})
  keys = [key for key in keys if key != "seed"]
  differ = [key for key in keys if len({_values(members, key) for members in groups.values()}) > 1]
  shared = [(key, _values(next(iter(groups.values())), key), str(start.get(key))) for key in keys if key not in differ]
  runs = page.table("Runs", ("run folder", "config", "seed", "epochs", "best epoch", "steps", "device", "jax"), [
      (run.folder, name, run.seed, run.result["epochs"], run.result["best_epoch"], run.result["steps"],
       run.result["device"], run.result["versions"]["jax"]) for name, members in groups.items() for run in members], 2)
  found = [runs]
  if len(groups) > 1:
    found.append(page.table("Keys that differ between configs", ("key", *groups, "default"), [
        (key, *(_values(members, key) for members in groups.values()), str(start.get(key))) for key in differ],
        len(groups) + 2))
  if shared:
    found.append(page.table("Keys with other values than their defaults" + ", in all configs" * (len(groups) > 1),
                            ("key", "value", "default"), shared, 3))
  else:
    found.append("<p>All other keys have their defaults (awrsr_jax/config.py).</p>")
  lines = "".join(f"<li><code>{_words(command(members[0]))}</code>{_other_seeds(members)}</li>\n"
                  for members in groups.values())
  found.append("<p>Commands that train the same configs; run folders do not hold those that were typed. Keys that are "
               f"not named have their defaults.</p>\n<ol>{lines}</ol>\n")
  return "".join(found)


def _words(command: Sequence[str]) -> str:
  """Returns the words of a command for a shell; lines break between them."""
  return " ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in command)


def _other_seeds(members: Sequence[Run]) -> str:
  """Returns in words which seeds a group has besides the first."""
  seeds = ", ".join(f"<code><span>--config.seed={run.seed}</span></code>" for run in members[1:])
  return f"; also with {seeds}, each in a folder of its own" if seeds else ""


def _values(members: Sequence[Run], key: str) -> str:
  """Returns the values of a key in a group; they are more than one only where they change no result."""
  return ", ".join(dict.fromkeys(str(run.config.get(key)) for run in members))


def _corpus(page: Page, run: Run) -> str:
  """Returns corpus and protocol in words."""
  corpus, split = run.corpus, run.corpus["split"]
  facts = (
      ("Corpus", corpus["name"]),
      ("Size", f"{corpus['users']:,} users, {corpus['items']:,} items, {corpus['interactions']:,} interactions "
               f"({100 * corpus['density']:.3g} % of all pairs)"),
      ("Histories", f"{corpus['min_length']:,} to {corpus['max_length']:,} items, mean {corpus['mean_length']:.1f}, "
                    f"median {corpus['median_length']:g}"),
      ("Split", split["words"]),
      ("Protocol", run.result["protocol"]),
      ("Chosen by", "the epoch with the best validation NDCG@10; the test split is read once"),
      ("Fingerprint", corpus["fingerprint"]),
  )
  rows = [(name, split[name]["targets"], split[name]["new_users"], split[name]["no_history"], split[name]["new_items"])
          for name in ("valid", "test")]
  facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts)
  return f"<dl>{facts}</dl>\n" + page.table(
      f"What is ranked; {split['training']:,} interactions are trained on", ("split", "targets", "of users without "
      "training", "without a history", "of items without training"), rows)


def _results(page: Page, groups: Groups) -> str:
  """Returns the metrics of both splits, by group and by run."""
  found = []
  runs = [(name, run) for name, members in groups.items() for run in members]
  for split, words in (("test", "Test"), ("valid", "Validation")):
    metrics = list(runs[0][1].result[split])
    titles = [metric.upper() for metric in metrics]
    rows = [(name, len(members), *(show_spread([run.result[split][metric] for run in members]) for metric in metrics))
            for name, members in groups.items()]
    oracle = runs[0][1].result.get("oracle") if split == "test" else None
    if oracle:
      rows.append(("best possible", "", *(show_metric(oracle[metric]) for metric in metrics)))
    several = len(runs) > len(groups)
    found.append(page.table(f"{words} split" + ": mean ± sample deviation over seeds" * several,
                            ("config", "runs", *titles), rows))
    if several:
      found.append(page.table(f"{words} split, each run", ("run folder", "config", "seed", *titles), [
          (run.folder, name, run.seed, *(show_metric(run.result[split][metric]) for metric in metrics))
          for name, run in runs], 2))
  if "oracle" in runs[0][1].result:
    found.append("<p>Best possible: the law that made the corpus, ranked in the same way.</p>\n")
  return "".join(found)


def _significance(page: Page, comparison: dict[str, Any] | str) -> str:
  """Returns the tables of significance.compare, or why there are none."""
  if isinstance(comparison, str):
    return f"<p>{escape(comparison)}</p>\n"
  level = f"{100 * comparison['level']:g} % interval"
  several = any(values.get("users_and_seeds") for found in comparison["metrics"].values() for values in found.values())
  intervals = [level, *[f"{level}, users and seeds"] * several]
  columns = ["config", "seeds", "mean", "difference", *intervals, "relative",
             *(f"relative, {interval}" for interval in intervals), "p", "p (Holm)"]
  tables = []
  for metric, found in comparison["metrics"].items():
    rows = []
    for name, values in found.items():
      row = [name, len(values["seeds"]), show_metric(values["mean"])]
      if "difference" in values:
        row += [_signed(values["difference"]), _interval(values["interval"]),
                *([_interval(values["users_and_seeds"])] * several),
                "–" if values["relative"] is None else f"{_percent(values['relative'])} %",
                _interval(values["relative_interval"], _percent),
                *([_interval(values["relative_users_and_seeds"], _percent)] * several),
                show_metric(values["p"]), show_metric(values["p_holm"])]
      rows.append(row + [None] * (len(columns) - len(row)))
    tables.append(page.table(f"Test {metric.upper()}, compared with {comparison['baseline']}", columns, rows))
  return (
      f"<p>{comparison['users']:,} users with {comparison['targets']:,} test targets, paired by user. The interval is "
      f"a bootstrap over users ({comparison['resamples']:,} resamples, seed {comparison['seed']}); p is two-sided, of "
      "a test that flips signs by user, and corrected for the number of configs by Holm's method. Both take the "
      "trained models as given: they say whether these models differ beyond the luck of which users were ranked, not "
      "whether training again would say the same. An interval over users and seeds needs three seeds of each config."
      "</p>\n" + "".join(tables))


def _signed(value: float) -> str:
  """Returns the difference of a metric as text, with its sign."""
  return ("−" if value < 0 else "+") + show_metric(abs(value))


def _percent(value: float) -> str:
  """Returns a relative difference in % as text, with its sign."""
  return f"{value:+.1f}".replace("-", "−")


def _interval(ends: Sequence[float] | None, show: Callable[[float], str] = _signed) -> str | None:
  """Returns an interval as text; None where there is none."""
  return None if ends is None else f"{show(ends[0])} to {show(ends[1])}"


def _attention(page: Page, attention: Sequence[Attention]) -> str:
  """Returns the drawings of each model."""
  if not attention:
    return "<p>No model was looked into; see what was left out.</p>\n"
  found = []
  for seen in attention:
    found.append(f"<h3>{escape(seen.group)}</h3>\n<p>Of the run <code>{escape(seen.run.folder)}</code>, seed "
                 f"{seen.run.seed}, best epoch. First order is attention before refinement.</p>\n")
    found += [page.figure(drawing, 4) for drawing in seen.drawings]
  return "".join(found)


def _cost(page: Page, groups: Groups) -> str:
  """Returns what each run took."""
  mib = lambda peak, key: f"{peak[key] / MIB:,.0f}" if key in peak else None  # noqa: E731
  rows = [(run.folder, name, run.seed, run.result["parameters"], run.result["wall_time_s"],
           round(run.result.get("compiled", {}).get("seconds", float("nan")), 1),
           *(mib(run.result.get("peak_memory", {}), where) for where in ("host", "device")), run.result["device"])
          for name, members in groups.items() for run in members]
  return page.table("Wall time is that of training with its evaluations, and of compiling; peak memory that of the "
                    "process and of its fullest device", (
                        "run folder", "config", "seed", "parameters", "wall time (s)", "compiling (s)", "host (MiB)",
                        "device (MiB)", "devices"), rows, 2)
