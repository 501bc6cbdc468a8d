"""The parts of a self-contained HTML page: its style, tables and figures, for mouse, keyboard and screen reader."""

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from awrsr_jax.analysis.drawing import Drawing, to_svg
from awrsr_jax.foreign import plain

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
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
  root = ElementTree.fromstring(to_svg(drawing))  # noqa: S314 (our own)
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
