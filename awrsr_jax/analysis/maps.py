"""Figures of attention before and after refinement: maps of one history, and profiles over many.

Shapes: H heads, n the longest length, S shown items, N layers, X points of a line.
"""

import numpy as np
from matplotlib import colors, ticker
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from awrsr_jax.analysis.attention import LONG, NAMES, Histories, Profile
from awrsr_jax.analysis.drawing import COLUMN, TEXT, Drawing, legend, line_style, settle, styled, thin
from awrsr_jax.foreign import shorten
from awrsr_jax.inference.explain import Layer
from awrsr_jax.inference.trained import Trained

SHOWN = 16  # newest items of a map
HEADS = 4  # rows of a figure of maps
ACROSS = 3  # panels side by side
LETTERS, NAME = 18, 200  # letters of a tick label, and of an item in a table, at most


def draw_map(layer: Layer, heads: list[int], labels: list[str], is_refined: bool) -> Figure:
  """Returns maps of some heads, one below the other: first order, refined, and what refinement changed.

  A row is a query, a column a key; only keys up to the query have a cell. Both kinds of weights share one scale from 0;
  differences have one around 0. Colours go by the square root, or one large weight would hide all others.

  Args:
    layer: weights (H, S, S).
    heads: which of them.
    labels: S tick labels, oldest item first.
    is_refined: False: first order and refined are the same, and one is drawn.
  """
  size = len(labels)
  cells = [(i, j) for i in range(size) for j in range(i + 1)]
  corners = [[(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)] for i, j in cells]
  pick = lambda weights: np.array([weights[i, j] for i, j in cells])  # noqa: E731
  first, refined, change = ([pick(x[head]) for head in heads] for x in (layer.first_order, layer.refined, layer.change))
  panels = {"before refinement": first, "after refinement": refined, "difference": change}
  panels = panels if is_refined else {"attention": first}
  largest = max(float(np.max(x)) for x in first + refined)
  weight = colors.PowerNorm(0.5, 0, largest)
  most = max(1e-6, *(float(np.abs(x).max()) for x in change))
  difference = colors.FuncNorm((lambda x: np.sign(x) * np.abs(x) ** 0.5, lambda x: np.sign(x) * x ** 2), -most, most)
  with styled():
    width = TEXT if is_refined else COLUMN
    label = 0.055 * max(map(len, labels)) + 0.1  # inches
    side = (width - label - 0.5) / len(panels)
    figure = Figure((width, len(heads) * (side + 0.05) + label + 1.1), layout="constrained")
    axes = figure.subplots(len(heads), len(panels), sharex=True, sharey=True, squeeze=False)
    drawn = {}
    for row, head in enumerate(heads):
      for column, (title, values) in enumerate(panels.items()):
        place = axes[row][column]
        is_change = title == "difference"
        drawn[title] = place.add_collection(PolyCollection(
            corners, array=values[row], cmap="RdBu_r" if is_change else "viridis_r",
            norm=difference if is_change else weight, edgecolors="#cccccc" if is_change else "white", linewidths=0.3))
        place.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
        place.grid(False)
        place.spines[["left", "bottom"]].set_visible(False)
        place.tick_params(length=0, labelsize=6)
        place.set_xticks(np.arange(size) + 0.5, labels, rotation=90)
        place.set_yticks(np.arange(size) + 0.5, labels)
        if row == 0:
          place.set_title(title)
        if row == len(heads) - 1:
          place.set_xlabel("key")
      axes[row][0].set_ylabel(f"head {head + 1}, query" if len(layer.first_order) > 1 else "query")
    whole = axes[:, :2] if is_refined else axes
    steps = _ticks(largest, 0.12)
    bars = [(drawn[next(iter(panels))], whole, "attention weight", [0, *steps])]
    steps = _ticks(most, 0.3)
    if is_refined:
      bars.append((drawn["difference"], axes[:, 2], "after − before", [*(-x for x in steps[::-1]), 0, *steps]))
    for shown, beside, words, ticks in bars:
      bar = figure.colorbar(shown, ax=beside, location="top", label=words, aspect=30 if beside is whole else 14,
                            shrink=0.9, pad=0.02)
      bar.set_ticks(ticks, labels=[f"{x:g}".replace("-", "−") for x in ticks])
      bar.ax.minorticks_off()
      bar.outline.set_linewidth(0.4)
    return settle(figure)


def _ticks(most: float, gap: float) -> list[float]:
  """Returns round numbers up to `most`, ascending, whose square roots are apart by a share `gap` of its root."""
  kept, above = [], 2.0
  for power in range(int(np.ceil(np.log10(most))), -9, -1):
    for digit in (5, 2, 1):
      place = (digit * 10.0 ** power / most) ** 0.5
      if place <= 1 and gap <= min(place, above - place):
        kept.append(digit * 10.0 ** power)
        above = place
  return kept[::-1]


def map_drawings(trained: Trained, histories: Histories, row: int) -> list[Drawing]:
  """Draws the attention maps of one history (Figure 3 of the paper): a figure for each layer and four heads."""
  corpus = histories.corpus
  longest = trained.config.data.max_length
  numbers = histories.newest(np.array([row]), min(int(histories.lengths[row]), longest))[0]
  layers = trained.read_layers(numbers)
  item_ids, titles = trained.catalogue.item_ids, trained.catalogue.titles
  names = [shorten(titles[number - 1], NAME) or shorten(item_ids[number - 1], NAME) for number in numbers[-SHOWN:]]
  labels = [shorten(name, LETTERS) for name in names]
  is_refined = trained.config.model.refine != "none"
  sums = "sums to 1" if trained.config.model.attention.sink is None else "sums to 1 less what its sink takes,"
  who = (f"User {shorten(corpus.user_ids[histories.users[row]], NAME)}, {histories.lengths[row]} items before the test "
         f"target, of which the model sees {len(numbers)} and the newest {len(names)} are shown, oldest first")
  drawings = []
  for at, layer in enumerate(layers, start=1):
    layer = Layer(layer.first_order[:, -SHOWN:, -SHOWN:], layer.refined[:, -SHOWN:, -SHOWN:])
    count = len(layer.first_order)
    for start in range(0, count, HEADS):
      heads = list(range(start, min(start + HEADS, count)))
      some = f", heads {heads[0] + 1} to {heads[-1] + 1}" * (count > HEADS)
      columns = ["query", "key"] + [f"head {head + 1}, {name}" for head in heads
                                    for name in (NAMES.values() if is_refined else ("attention",))]
      rows = [(names[i], names[j], *(float(weights[head, i, j]) for head in heads for weights in
                                     (layer.first_order, layer.refined)[:1 + is_refined]))
              for i in range(len(names)) for j in range(i + 1)]
      what = ("Attention weights before and after refinement, and the change; both kinds of weights share one "
              "scale" if is_refined else "Attention weights; the model has no refinement")
      drawings.append(Drawing(
          f"attention_layer{at}" + f"_heads{heads[0] + 1}to{heads[-1] + 1}" * (count > HEADS),
          f"Attention of one user, layer {at}{some}",
          f"{what}. Colours go by the square root. A row is a query and {sums} over all keys, also those that "
          f"are not shown. {who}.",
          draw_map(layer, heads, labels, is_refined), tuple(columns), rows))
  return drawings


def draw_panels(values: dict[str, np.ndarray], x: np.ndarray, x_label: str, y_label: str,
                even: np.ndarray | None = None) -> Figure:
  """Returns a panel for each layer: for each kind of weights heads as thin lines, and their mean as a thick one.

  Args:
    values: name -> (N, H, X).
    x: (X,).
    x_label, y_label: of the axes.
    even: (X,) what even weights have, if it is to be drawn.
  """
  layers, heads = next(iter(values.values())).shape[:2]
  across = min(layers, ACROSS)
  down = -(-layers // across)
  with styled():
    figure = Figure((COLUMN if across == 1 else TEXT, 1.9 * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for place in axes.flat[layers:]:
      place.set_visible(False)
    for layer in range(layers):
      place = axes.flat[layer]
      for index, (name, lines) in enumerate(values.items()):
        style = line_style(index)
        every = 1 if len(x) <= 16 else -(-len(x) // 8)
        for head in range(heads if heads > 1 else 0):
          place.plot(x, lines[layer, head], color=style["color"], linestyle=style["linestyle"], linewidth=0.5,
                     alpha=0.6)
        place.plot(x, lines[layer].mean(axis=0), label=name, linewidth=1.6,
                   markevery=(index * every // 2, every), **style)
      if even is not None:
        place.plot(x, even, color="#666666", linestyle=":", linewidth=1, label="even weights")
      place.set_title(f"layer {layer + 1}")
      place.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 2.5, 5, 10), integer=True,
                                                       min_n_ticks=1))
      place.margins(x=0.02)
      if layer + across >= layers:
        place.tick_params(labelbottom=True)
        place.set_xlabel(x_label)
    for place in axes[:, 0]:
      place.set_ylabel(y_label)
    axes[0][0].set_ylim(bottom=0)  # of all panels, now that all lines are there
    legend(figure, axes.flat[0], len(values) + (even is not None))
    return settle(figure)


def profile_drawings(profile: Profile, is_refined: bool) -> list[Drawing]:
  """Draws attention by distance, and entropy in bits and of the most possible, by layer.

  Args:
    profile: see measure_profile.
    is_refined: False: first order and refined are the same, and one is drawn.
  """
  kept = {label: name for name, label in list(NAMES.items())[:1 + is_refined]}
  kept = kept if is_refined else {"attention": "first_order"}
  heads = next(iter(profile.attention.values())).shape[1]
  of_heads = "Thin lines are heads, thick ones their mean. " * (heads > 1)
  sample = (f"{of_heads}{profile.users} histories of the test split, {profile.queries.sum():,} queries; a query's keys "
            "are the items up to itself.")
  n = len(profile.queries)
  mass = np.stack([np.cumsum(profile.attention[name], axis=-1) for name in kept.values()])
  reached = mass >= 0.99 * mass[..., -1:]  # a sink leaves less than 1 of all of it
  span = min(n, max(LONG + 1, int(np.argmax(reached.all(axis=(0, 1, 2)))) + 1))
  some = profile.queries > 0
  keys = np.arange(1, n + 1)
  several = keys[some & (keys > 1)] - 1
  beyond = f" Distances above {span - 1} hold less than 1 % of the attention of each head." * (span < n)
  drawings = [_profile_drawing(
      "attention_by_distance", "Attention by distance", "Mean attention weight by how many items back the key is; 0 is "
      f"the query itself. A query without a key that far back counts with 0.{beyond} {sample}",
      {label: profile.attention[name][..., :span] for label, name in kept.items()}, np.arange(span),
      "distance (items back)", "mean attention weight")]
  if some.any():
    at = np.flatnonzero(some)
    drawings.append(_profile_drawing(
        "attention_entropy", "Entropy of attention", "Mean entropy of the attention weights of a query, by how many "
        f"keys it has; even weights have the logarithm of that number. {sample}",
        {label: profile.entropy[name][..., at] for label, name in kept.items()}, keys[at], "keys", "entropy (bits)",
        np.log2(keys[at])))
  if len(several):
    drawings.append(_profile_drawing(
        "attention_entropy_relative", "Entropy of attention, relative", "Mean entropy of the attention weights of a "
        f"query, divided by that of even weights: 1 looks everywhere alike, 0 at one item. {sample}",
        {label: profile.relative(name)[..., several] for label, name in kept.items()}, keys[several], "keys",
        "entropy / log2(keys)"))
  return drawings


def _profile_drawing(key: str, title: str, caption: str, values: dict[str, np.ndarray], x: np.ndarray, x_label: str,
                     y_label: str, even: np.ndarray | None = None) -> Drawing:
  """Returns the drawing of panels, with means over heads as its numbers."""
  layers = range(len(next(iter(values.values()))))
  columns = [x_label] + [f"layer {layer + 1}, {name}" for layer in layers for name in values]
  rows = [(int(x[at]), *(float(lines[layer, :, at].mean()) for layer in layers for lines in values.values()))
          for at in thin(range(len(x)))]
  return Drawing(key, title, caption, draw_panels(values, x, x_label, y_label, even), tuple(columns), rows)
