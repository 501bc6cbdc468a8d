"""What all figures share: their style, their parts, and their files.

Figures are as wide as a column (3.3 inches) or the text (7 inches) of a paper, with letters of 7 and 8 points. Colours
are those of Okabe and Ito ("Color Universal Design", 2008), and every colour has its own dashes and marker, so that
black-and-white print can be read. The same numbers give the same bytes.
"""

import contextlib
import dataclasses
import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from awrsr_jax.foreign import shorten

COLUMN, TEXT = 3.3, 7.0  # widths in inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")  # yellow is too pale for a line
DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # the first comes with it
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.3,
    "lines.markersize": 3.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False,
    "text.parse_math": False,  # a title may hold a dollar sign
    "svg.fonttype": "none", "figure.dpi": 100,
}
DOTS = 300  # an inch, of PNG files
MOST_ROWS = 200  # of the table below a figure


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A figure with its words and its numbers.

  Attributes:
    key: the name of its files.
    title, caption: plain text.
    figure: to be drawn.
    columns, rows: the numbers that it shows, as a table; the first column names the row.
  """

  key: str
  title: str
  caption: str
  figure: Figure
  columns: tuple[str, ...]
  rows: list[tuple[Any, ...]]


@contextlib.contextmanager
def styled(**more: Any) -> Iterator[None]:
  """A context in which figures are made and saved: our style, whatever the user's matplotlibrc says.

  Letters that the font does not have are boxes in a PNG file; SVG text is shown in a font of who reads it.
  """
  plain_style: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
  with matplotlib.rc_context(plain_style | STYLE | more), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one for each letter and each time it is drawn
    yield


def line_style(index: int) -> dict[str, Any]:
  """Returns colour, dashes and marker of a group; 35 groups have their own."""
  return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)],
          "marker": MARKERS[index % len(MARKERS)]}


def legend(figure: Figure, axes: Axes, entries: int) -> None:
  """Puts a legend above the axes, where it covers nothing, in as many columns as fit; none for one entry.

  The figure grows by what the legend has beyond one line, so that the axes keep their height.
  """
  if entries < 2:
    return
  handles, labels = axes.get_legend_handles_labels()
  letters = int(figure.get_figwidth() * 72 / 4.6)  # of 8 points, about 4.6 wide
  labels = ["\n".join(textwrap.wrap(shorten(label, 3 * letters), letters - 8)) for label in labels]
  longest = max(len(line) for label in labels for line in label.split("\n"))
  columns = min(max(1, letters // (longest + 8)), entries)
  lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
  figure.set_figheight(figure.get_figheight() + 0.16 * (lines - 1))
  figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.2, columnspacing=1.2)


def log_axis(axes: Axes, values: np.ndarray) -> None:
  """Makes the y axis logarithmic, with plain numbers at its ticks."""
  axes.set_yscale("log", nonpositive="mask")
  values = values[(values > 0) & np.isfinite(values)]
  span = values.max() / values.min() if len(values) else 1
  decades = ticker.LogLocator(subs=(1, 2, 5) if span < 200 else (1,), numticks=10)
  axes.yaxis.set_major_locator(decades if span > 4 else ticker.MaxNLocator(5))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def settle(figure: Figure) -> Figure:
  """Lays a figure out once and for all, so that its files do not depend on which of them is written first."""
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  return figure


def to_png(drawing: Drawing) -> bytes:
  """Returns a PNG file of 300 dots an inch."""
  with styled():
    file = io.BytesIO()
    drawing.figure.savefig(file, format="png", dpi=DOTS, metadata={"Software": None})
  return file.getvalue()


def to_svg(drawing: Drawing) -> bytes:
  """Returns an SVG file whose text is text; its ids are hashes, of the drawing's key among others."""
  with styled(**{"svg.hashsalt": drawing.key}):
    file = io.BytesIO()
    drawing.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  return file.getvalue()


FORMATS = {"png": to_png, "svg": to_svg}


def thin(rows: Sequence[Any]) -> list[Any]:
  """Returns at most `MOST_ROWS` rows, evenly spaced, the first and the last among them."""
  return [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).round().astype(int))]
