"""How texts and numbers from runs and data are shown, in figures, pages and tables alike."""

import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any


def plain(text: Any) -> str:
  """Returns a text on one line, without characters that print nothing (an SVG file may not hold some of them)."""
  text = "".join(" " if char.isspace() else char for char in str(text))
  return " ".join("".join(char for char in text if unicodedata.category(char)[0] != "C").split())


def shorten(text: Any, most: int) -> str:
  """Returns a plain text of at most so many characters; an ellipsis says that more was there."""
  text = plain(text)
  return text if len(text) <= most else text[:most - 1].rstrip() + "…"


def show_metric(value: float) -> str:
  """Returns a metric with four decimals, without the zero before the point."""
  return f"{value:.4f}".removeprefix("0")


def show_spread(values: Sequence[float]) -> str:
  """Returns the mean of a metric over seeds ± its sample deviation; the mean alone of one value."""
  mean = show_metric(statistics.fmean(values))
  return mean if len(values) == 1 else f"{mean} ± {show_metric(statistics.stdev(values))}"
