"""How numbers from runs are shown, in figures, pages and tables alike."""

import statistics
from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns the lines of a table of equally many cells a row: the first column flush left, the others flush right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.rjust(width) if place else cell.ljust(width)
                    for place, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]


def show_metric(value: float) -> str:
  """Returns a metric with four decimals, without the zero before the point."""
  return f"{value:.4f}".removeprefix("0")


def show_spread(values: Sequence[float]) -> str:
  """Returns the mean of a metric over seeds ± its sample deviation; the mean alone of one value."""
  mean = show_metric(statistics.fmean(values))
  return mean if len(values) == 1 else f"{mean} ± {show_metric(statistics.stdev(values))}"
