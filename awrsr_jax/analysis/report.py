"""One self-contained HTML page of a run or of several: what was run, on what, with which results, and all figures.

No scripts, no fonts and nothing from elsewhere: the page says so itself (Content-Security-Policy) and opens from disk.
Every text that comes from data, folders or configs is escaped. The same runs give the same bytes.
"""

import dataclasses
import html
import itertools
import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from awrsr_jax.analysis.figures import Drawing, Groups, plain, to_svg
from awrsr_jax.analysis.runs import Run
from awrsr_jax.config import default, walk

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
MIB = 1 << 20
LARGEST = 1000  # pixels, of the width of a figure

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --faint: #53575e; --paper: #ffffff; --card: #f4f5f7; --line: #c9ccd2;
  --link: #0a4b9c; --focus: #b34700; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e7e8eb; --faint: #b0b4bc; --paper: #15171b; --card: #20242a; --line: #474c55; --link: #8fbcff;
    --focus: #ffb25c; }
}
* { box-sizing: border-box; }
html { font: 100%/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; color: var(--ink); background: var(--paper); }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; padding: .5rem 1rem; background: var(--paper); }
.skip:focus { left: 1rem; top: 1rem; z-index: 1; }
h1, h2, h3, h4, p, li, dd, caption, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.05rem; }
h4 { margin: 1rem 0 .5rem; font-size: 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { color: var(--faint); }
dd { margin: 0; min-width: 0; }
code { overflow-wrap: anywhere; font-size: .85rem; }
code span { display: inline-block; max-width: 100%; }
.wide { margin: .75rem 0; max-width: 100%; overflow: auto; }
details .wide { max-height: 26rem; }
table { width: max-content; border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; color: var(--faint); text-align: left; }
caption span { display: block; position: sticky; left: 0; max-width: min(100%, calc(100vw - 4rem)); }
th, td { max-width: 22rem; padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
th, td { vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td.text, th.text { text-align: left; }
tbody th { font-weight: normal; }
th.text, td.text { overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
.figures > section { min-width: 0; }
figure { margin: 0; }
.sheet { overflow-x: auto; padding: .5rem; border: 1px solid var(--line); background: #ffffff; }
.sheet svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { margin: .5rem 0; color: var(--faint); font-size: .9rem; }
summary { cursor: pointer; color: var(--link); }
footer { margin-top: 3rem; color: var(--faint); font-size: .9rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip, details { display: none; }
  .wide, .sheet { overflow: visible; border: 0; }
  table { width: auto; font-size: 8pt; }
  figcaption { font-size: 9pt; }
  th, td { padding: .15rem .3rem; }
  th.text, td.text { overflow-wrap: break-word; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""


@dataclasses.dataclass(frozen=True)
class Attention:
  """What was seen of one model: `run` stands for its `group`."""

  group: str
  run: Run
  drawings: list[Drawing]


class Page:
  """Makes the parts of a page that carry ids, so that each id and each number of a figure comes once."""

  def __init__(self) -> None:
    self._tables, self._figures = itertools.count(1), itertools.count(1)

  def table(self, caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text: int = 1) -> str:
    """Returns a table that scrolls, also by keyboard, where it is wider than the page.

    Args:
      caption: plain text.
      columns: of them the first names a row.
      rows: numbers are shown with up to six digits; text is escaped.
      text: how many columns, from the left, are text.
    """
    name = f"table{next(self._tables)}"
    kind = lambda at: ' class="text"' if at < text else ""  # noqa: E731
    head = "".join(f'<th scope="col"{kind(at)}>{escape(column)}</th>' for at, column in enumerate(columns))
    body = "".join("<tr>" + "".join(
        f'<th scope="row">{show(cell)}</th>' if at == 0 else f"<td{kind(at)}>{show(cell)}</td>"
        for at, cell in enumerate(row)) + "</tr>\n" for row in rows)
    return (f'<div class="wide" role="region" tabindex="0" aria-labelledby="{name}"><table>'
            f'<caption id="{name}"><span>{escape(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}</tbody></table></div>\n")

  def figure(self, drawing: Drawing, level: int) -> str:
    """Returns a figure under a heading of a level, with its numbers as a table that is closed at first."""
    number = next(self._figures)
    numbers = self.table(f"Numbers of figure {number}", drawing.columns, drawing.rows)
    return (f'<section aria-labelledby="figure{number}"><h{level} id="figure{number}">{escape(drawing.title)}'
            f'</h{level}>\n<figure><div class="sheet" role="region" tabindex="0" '
            f'aria-label="Figure {number}: {escape(drawing.title)}">{inline_svg(drawing, f"f{number}-")}</div>\n'
            f"<figcaption>Figure {number}. {escape(drawing.caption)}</figcaption>\n"
            f"<details><summary>Numbers of figure {number}</summary>{numbers}</details></figure></section>\n")


def escape(text: Any) -> str:
  """Returns a text for HTML, also within quotes; characters that print nothing are left out."""
  return html.escape(plain(text))


def show(value: Any) -> str:
  """Returns a cell: numbers with up to six digits, None and NaN as a dash, all else as escaped text."""
  if value is None or (isinstance(value, float) and np.isnan(value)):
    return "–"
  if isinstance(value, float):
    return f"{value:.6g}".replace("-", "−", 1)
  return f"{value:,}" if type(value) is int else escape(value)


def inline_svg(drawing: Drawing, prefix: str) -> str:
  """Returns a drawing as an SVG element within HTML: named for screen readers, its ids starting with a prefix."""
  root = ElementTree.fromstring(to_svg(drawing))
  for element in root.iter():
    element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    if XLINK in element.attrib:
      element.set("href", element.attrib.pop(XLINK))
    for key, value in element.attrib.items():
      if key == "id":
        element.set(key, prefix + value)
      elif key == "href" and value.startswith("#"):
        element.set(key, f"#{prefix}{value[1:]}")
      elif "url(#" in value:
        element.set(key, value.replace("url(#", f"url(#{prefix}"))
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag in ("style", "metadata"):  # a style would rule the whole page
        parent.remove(child)
  width, height = (float(root.attrib.pop(side).removesuffix("pt")) * 96 / 72 for side in ("width", "height"))
  largest = min(1.7 * width, LARGEST)
  root.attrib |= {
      "xmlns": SVG, "role": "img", "aria-labelledby": f"{prefix}title {prefix}desc",
      "style": f"stroke-linejoin:round;stroke-linecap:butt;min-width:{0.85 * width:.0f}px;max-width:{largest:.0f}px;"
               f"aspect-ratio:{width:.0f}/{height:.0f}"}
  for at, (tag, text) in enumerate((("title", drawing.title), ("desc", drawing.caption))):
    child = ElementTree.Element(tag, id=prefix + tag)
    child.text = plain(text)
    root.insert(at, child)
  return ElementTree.tostring(root, encoding="unicode")


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
    rows = [(name, len(members), *(_spread([run.result[split][metric] for run in members]) for metric in metrics))
            for name, members in groups.items()]
    oracle = runs[0][1].result.get("oracle") if split == "test" else None
    if oracle:
      rows.append(("best possible", "", *(_score(oracle[metric]) for metric in metrics)))
    several = len(runs) > len(groups)
    found.append(page.table(f"{words} split" + ": mean ± sample deviation over seeds" * several,
                            ("config", "runs", *titles), rows))
    if several:
      found.append(page.table(f"{words} split, each run", ("run folder", "config", "seed", *titles), [
          (run.folder, name, run.seed, *(_score(run.result[split][metric]) for metric in metrics))
          for name, run in runs], 2))
  if "oracle" in runs[0][1].result:
    found.append("<p>Best possible: the law that made the corpus, ranked in the same way.</p>\n")
  return "".join(found)


def _spread(values: Sequence[float]) -> str:
  """Returns mean and sample deviation as text; the mean alone of one value."""
  mean = _score(np.mean(values))
  return mean if len(values) == 1 else f"{mean} ± {_score(np.std(values, ddof=1))}"


def _score(value: float) -> str:
  """Returns a metric as text, without a zero before the point."""
  return f"{value:.4f}".removeprefix("0")


def _significance(page: Page, comparison: dict[str, Any] | str) -> str:
  """Returns the tables of significance.compare, or why there are none."""
  if isinstance(comparison, str):
    return f"<p>{escape(comparison)}</p>\n"
  level = f"{100 * comparison['level']:g} % interval"
  several = any(values.get("users_and_seeds") for found in comparison["metrics"].values() for values in found.values())
  columns = ["config", "seeds", "mean", "difference", level, *[f"{level}, users and seeds"] * several, "relative", "p",
             "p (Holm)"]
  tables = []
  for metric, found in comparison["metrics"].items():
    rows = []
    for name, values in found.items():
      row = [name, len(values["seeds"]), _score(values["mean"])]
      if "difference" in values:
        row += [_signed(values["difference"]), _interval(values["interval"]),
                *([_interval(values["users_and_seeds"])] * several),
                "–" if values["relative"] is None else f"{values['relative']:+.1f} %".replace("-", "−"),
                _score(values["p"]), _score(values["p_holm"])]
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
  return ("−" if value < 0 else "+") + _score(abs(value))


def _interval(ends: Sequence[float] | None) -> str | None:
  """Returns an interval as text; None where there is none."""
  return None if ends is None else f"{_signed(ends[0])} to {_signed(ends[1])}"


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
