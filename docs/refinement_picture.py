"""Draws docs/refinement.svg from a finished run: attention of one user before and after refinement.

  PYTHONPATH=. python docs/refinement_picture.py runs/synthetic
"""

import pathlib
import sys

import numpy as np

from awrsr_jax.data import prepared
from awrsr_jax.data.batches import ranking_batches
from awrsr_jax.inference.trained import load

CELL, SHOWN = 14, 14  # pixels, newest positions
SIDE = CELL * SHOWN


def read_maps(workdir: str) -> dict[str, np.ndarray]:
  """Returns "first_order" and "refined" (SHOWN, SHOWN) of the first layer and head, for the first long history."""
  trained = load(workdir)
  batches = ranking_batches(prepared.load(trained.config.data), trained.config, "test")
  inputs = next(batch["inputs"] for batch in batches if batch["inputs"].shape[1] >= SHOWN)
  layer = trained.read_layers(inputs[-1][inputs[-1] > 0])[0]
  return {name: getattr(layer, name)[0, -SHOWN:, -SHOWN:] for name in ("first_order", "refined")}


def draw_map(weights: np.ndarray, left: int, title: str) -> str:
  """Returns the SVG of one heat map; a row is a query, darker is more weight."""
  cells = "".join(
      f'<rect x="{left + CELL * j}" y="{40 + CELL * i}" width="{CELL - 1}" height="{CELL - 1}" '
      f'fill="rgb({round(247 - 239 * w)},{round(251 - 203 * w)},{round(255 - 148 * w)})"/>'
      for i, row in enumerate(weights / weights.max()) for j, w in enumerate(row ** 0.5) if j <= i)
  return (f'<text x="{left + SIDE / 2}" y="24" text-anchor="middle" font-weight="bold">{title}</text>{cells}'
          f'<text x="{left + SIDE / 2}" y="{60 + SIDE}" text-anchor="middle">items, oldest to newest</text>')


def main(workdir: str) -> None:
  """Writes docs/refinement.svg."""
  maps = read_maps(workdir)
  right, middle = SIDE + 250, SIDE + 135
  steps = ("rows of A are tokens", "Q' = A Wq,  K' = A Wk", "S' = Q' K'ᵀ / √r", "A* = softmax(S') A")
  lines = "".join(f'<text x="{middle}" y="{40 + SIDE / 2 - 40 + 26 * k}" text-anchor="middle">{step}</text>'
                  for k, step in enumerate(steps))
  svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + SIDE + 20} {SIDE + 76}" '
         'font-family="sans-serif" font-size="14" role="img">'
         '<title>Attention weights before and after refinement</title>'
         '<rect width="100%" height="100%" fill="white"/>'
         f'{draw_map(maps["first_order"], 20, "A: attention")}{lines}'
         f'<path d="M{SIDE + 40} {46 + SIDE / 2 + 50} H{right - 20}" stroke="black" marker-end="url(#head)"/>'
         '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
         '<path d="M0 0 L8 4 L0 8 Z"/></marker></defs>'
         f'{draw_map(maps["refined"], right, "A*: refined attention")}</svg>\n')
  pathlib.Path(__file__).with_name("refinement.svg").write_text(svg)


if __name__ == "__main__":
  main(sys.argv[1])
