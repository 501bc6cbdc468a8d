"""The report: well-formed and accessible HTML, everything escaped, nothing from elsewhere, the numbers of the runs."""

import html.parser
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from figures_test import make_groups, write_run

from awrsr_jax.analysis import figures, report, runs, significance
from awrsr_jax.analysis.drawing import Drawing
from awrsr_jax.analysis.page import STYLE, SVG
from awrsr_jax.config import default, walk

CHROMIUM = "/usr/bin/chromium"
VOID = {"meta", "br", "link", "img", "input", "hr"}
NASTY = "<script>alert(1)</script>\"&<>'"


class Reader(html.parser.HTMLParser):
  """Reads a page into (tag, attributes, parents, text) and complains of what does not nest."""

  def __init__(self, text: str):
    super().__init__()
    self.elements, self._open = [], []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attributes):
    assert len(attributes) == len(dict(attributes)), (tag, attributes)
    parents = [self.elements[place]["tag"] for place in self._open]
    self.elements.append({"tag": tag, "parents": parents, "text": "", **{
        f"@{key}": value for key, value in attributes}})
    if tag not in VOID:
      self._open.append(len(self.elements) - 1)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self._open.pop()

  def handle_endtag(self, tag):
    assert self.elements[self._open.pop()]["tag"] == tag

  def handle_data(self, data):
    for place in self._open:
      self.elements[place]["text"] += data

  def find(self, *tags):
    """Returns the elements of some tags."""
    return [element for element in self.elements if element["tag"] in tags]


def fake_attention(groups):
  """Returns attention of the first group without a model, with texts that want to be markup."""
  curves = [figures.Curve(NASTY, np.arange(3), np.arange(3.0), None)] * 2
  drawing = Drawing("fake", NASTY, f"Caption {NASTY}", figures.draw_curves(curves, NASTY, NASTY),
                            (NASTY, "value"), [(NASTY, 0.25), ("nothing", float("nan"))])
  name, members = next(iter(groups.items()))
  return [report.Attention(name, members[0], [drawing])]


def render(groups, comparison="There is none.", left_out=()):
  """Returns the page of groups, with all figures."""
  return report.render(groups, [make(groups) for make in figures.FROM_RUNS], fake_attention(groups), comparison,
                       left_out)


@pytest.fixture
def groups(tmp_path):
  return make_groups(tmp_path)


def check(text):
  """Checks all that every page has to have; returns it read."""
  page = Reader(text)
  assert text.startswith("<!DOCTYPE html>")
  [root], [title] = page.find("html"), [element for element in page.find("title") if "svg" not in element["parents"]]
  assert root["@lang"] == "en" and title["text"]
  for tag in ("h1", "main", "header", "nav", "footer"):
    assert len(page.find(tag)) == 1, tag
  levels = [int(element["tag"][1]) for element in page.find("h1", "h2", "h3", "h4", "h5", "h6")]
  assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
  ids = [element["@id"] for element in page.elements if "@id" in element]
  assert len(ids) == len(set(ids))
  wanted = [name for element in page.elements for name in element.get("@aria-labelledby", "").split()]
  wanted += [element["@href"][1:] for element in page.elements if element.get("@href", "").startswith("#")]
  wanted += re.findall(r"url\(#([^)]+)\)", text)
  assert wanted and set(wanted) <= set(ids)
  for element in page.elements:
    for key, value in element.items():
      assert not key.startswith("@on"), element
      if key.startswith("@") and not key.startswith("@xmlns"):
        assert "http://" not in (value or "") and "https://" not in (value or ""), (element["tag"], key, value)
    if "@href" in element or "@src" in element:
      assert element.get("@href", element.get("@src")).startswith(("#", "data:image/png;"))
  assert not page.find("script", "iframe", "object", "embed", "form", "base")
  for element in page.elements:
    if element.get("@tabindex") == "0":  # can be reached, so it says what it is
      assert element["@role"] == "region" and (element.get("@aria-label") or element.get("@aria-labelledby"))
  assert len(page.find("table")) == len(page.find("caption")) > 0
  assert all(element["@scope"] in ("row", "col") for element in page.find("th"))
  for element in page.find("svg"):
    assert element["@role"] == "img" and element["@aria-labelledby"] and element["@xmlns"] == SVG
  drawn = len(page.find("svg"))
  for tag in ("figure", "figcaption", "desc", "details", "summary"):
    assert len(page.find(tag)) == drawn, tag
  return page


def test_a_page_is_well_formed_and_accessible(groups):
  page = check(render(groups, significance.compare(groups, resamples=50)))
  assert len(page.find("svg")) == len(figures.FROM_RUNS) + 1
  [skip] = [element for element in page.find("a") if element.get("@class") == "skip"]
  assert skip["@href"] == "#" + page.find("main")[0]["@id"] and page.find("main")[0]["@tabindex"] == "-1"
  assert page.elements.index(skip) < page.elements.index(page.find("header")[0])


def test_a_page_of_one_run_is_well_formed(tmp_path):
  groups = runs.group([runs.read_run(write_run(tmp_path / "run"))])
  page = check(render(groups))
  [title] = page.find("h1")
  assert title["text"] == "sasrec, refine=value on made for a test"


def test_a_page_without_figures_says_why(groups):
  page = check(report.render(groups, [], [], "no ranks", ["ndcg by cutoff: no <ranks>"]))
  assert any("ndcg by cutoff: no <ranks>" in element["text"] for element in page.find("li"))


def test_every_text_is_escaped(tmp_path):
  folder = tmp_path / "<img src=x onerror=alert(1)>\"&'"
  first = write_run(folder)
  second = write_run(tmp_path / "b", 1, {"data.columns.title": NASTY, "data.name": NASTY})
  groups = runs.group([runs.read_run(first), runs.read_run(second)])
  for members in groups.values():
    members[0].corpus.update(name=NASTY, fingerprint=NASTY)
    members[0].corpus["split"]["words"] = NASTY
    members[0].result.update(protocol=NASTY, device=NASTY)
  text = render(groups, f"no {NASTY}", [NASTY])
  page = check(text)  # there is no script, no image and no handler
  assert not page.find("img")
  assert "<script" not in text and "onerror=alert(1)>" not in text
  assert any(NASTY in element["text"] for element in page.find("text"))  # within SVG, as text
  for tag in ("h1", "figcaption", "desc", "li", "td", "th", "dd", "code"):
    assert any("<script>alert(1)</script>" in element["text"] for element in page.find(tag)), tag


def test_the_page_forbids_itself_everything_from_elsewhere(groups):
  [policy] = [element for element in check(render(groups)).find("meta") if "@http-equiv" in element]
  assert policy["@http-equiv"] == "Content-Security-Policy"
  assert policy["@content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_same_runs_give_the_same_bytes(groups):
  compared = significance.compare(groups, resamples=50)
  assert render(groups, compared) == render(groups, compared)


def cells(page, caption):
  """Returns the rows of the table with a caption, as lists of texts."""
  at = next(place for place, element in enumerate(page.elements)
            if element["tag"] == "caption" and element["text"] == caption)
  rows = []
  for element in page.elements[at + 1:]:
    if element["tag"] == "table":
      break
    if element["tag"] == "tr":
      rows.append([])
    if element["tag"] in ("td", "th"):
      rows[-1].append(element["text"])
  return rows


def test_results_are_those_of_the_runs(groups):
  page = check(render(groups))
  rows = {row[0]: row for row in cells(page, "Test split: mean ± sample deviation over seeds")}
  place = rows["config"].index("NDCG@10")
  for name, members in groups.items():
    values = [run.result["test"]["ndcg@10"] for run in members]
    assert rows[name][1] == "3"
    assert rows[name][place] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}".replace("0.", ".")
  each = cells(page, "Validation split, each run")
  assert [row[0] for row in each[1:]] == [run.folder for members in groups.values() for run in members]
  assert each[1][each[0].index("MRR")] == f"{groups['refine=none'][0].result['valid']['mrr']:.4f}"[1:]


def test_the_best_possible_stands_below_the_results(tmp_path):
  groups = runs.group([runs.read_run(write_run(tmp_path / "run"))])
  [run] = groups["sasrec, refine=value"]
  run.result["oracle"] = dict.fromkeys(run.result["test"], 0.875)
  assert cells(check(render(groups)), "Test split")[-1][:3] == ["best possible", "", ".8750"]


def test_significance_is_what_was_compared(groups):
  compared = significance.compare(groups, resamples=50)
  page = check(render(groups, compared))
  found = compared["metrics"]["ndcg@10"]["refine=value"]
  head, base, row = cells(page, "Test NDCG@10, compared with refine=none")
  row = dict(zip(head, row, strict=True))
  assert base[3:] == ["–"] * (len(head) - 3)
  for key in ("mean", "p", "p_holm"):
    assert float(row[{"p_holm": "p (Holm)"}.get(key, key)]) == round(found[key], 4)
  assert float(row["difference"].replace("−", "-")) == round(found["difference"], 4)
  for column, key, off in (("95 % interval", "interval", 5.1e-5),
                           ("relative, 95 % interval", "relative_interval", 0.051),
                           ("relative, 95 % interval, users and seeds", "relative_users_and_seeds", 0.051)):
    ends = [float(end) for end in row[column].replace("−", "-").split(" to ")]
    np.testing.assert_allclose(ends, found[key], atol=off)


def test_only_keys_that_are_not_at_their_defaults_are_shown(tmp_path):
  changes = {"model.width": 32, "data.name": "synthetic"}
  made = [runs.read_run(write_run(tmp_path / refine, 4, {"model.refine": refine, **changes}))
          for refine in ("none", "value")]
  page = check(render(runs.group(made)))
  assert cells(page, "Keys that differ between configs") == [
      ["key", "refine=none", "refine=value", "default"], ["model.refine", "none", "value", "value"]]
  assert cells(page, "Keys with other values than their defaults, in all configs") == [
      ["key", "value", "default"], ["data.name", "synthetic", ""], ["model.width", "32", "64"]]


def test_the_command_makes_the_same_config(tmp_path):
  run = runs.read_run(write_run(tmp_path / "a run", 7, {
      "model.refine": "none", "train.learning_rate": 0.0003, "train.patience": 3, "data.path": "it's here.csv",
      "model.remat": True}))
  words = report.command(run)
  assert words[-1] == f"--workdir={tmp_path}/a run"
  groups = runs.group([run])
  [shown] = [element["text"] for element in check(render(groups)).find("code") if "awrsr_jax.main" in element["text"]]
  assert shlex.split(shown) == words
  code = ("import sys; from absl import app; from ml_collections import config_flags; import json\n"
          "from awrsr_jax.config import walk; from absl import flags; flags.DEFINE_string('workdir', None, '')\n"
          "CONFIG = config_flags.DEFINE_config_file('config')\n"
          "app.run(lambda _: print(json.dumps(dict(walk(CONFIG.value)))))")
  done = subprocess.run([sys.executable, "-c", code, *words[3:]], cwd=pathlib.Path(__file__).parent.parent,
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == run.config
  assert set(run.config) == set(dict(walk(default())))


def test_cost_stands_in_the_report(tmp_path):
  groups = runs.group([runs.read_run(write_run(tmp_path / "run"))])
  head, row = cells(check(render(groups)), next(
      element["text"] for element in Reader(render(groups)).find("caption") if element["text"].startswith("Wall time")))
  row = dict(zip(head, row, strict=True))
  assert row["parameters"] == "1,234" and row["wall time (s)"] == "3.5" and row["host (MiB)"] == "1,024"
  assert row["device (MiB)"] == "–"


def luminance(colour):
  """Returns the relative luminance of "#rrggbb" (WCAG 2.2)."""
  parts = [int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5)]
  red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(which):
  blocks = re.findall(r":root \{([^}]*)\}", STYLE)
  assert len(blocks) == 2
  colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[which]))
  for ink in ("ink", "faint", "link", "focus"):
    for ground in ("paper", "card"):
      low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
      assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def screenshot(page, image, width, height, *flags):
  """Has Chromium draw a page into a file; returns its pixels."""
  profile = image.with_suffix(".profile")
  done = subprocess.run([
      CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
      "--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},{height}",
      f"--screenshot={image}", *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert "CONSOLE" not in done.stderr, done.stderr  # what the page complains of
  return matplotlib.image.imread(image)[..., :3]


@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs /usr/bin/chromium")
def test_a_browser_shows_the_page(groups, tmp_path):
  page = tmp_path / "report.html"
  page.write_text(render(groups, significance.compare(groups, resamples=50)))
  wide = screenshot(page, tmp_path / "wide.png", 1280, 4000)
  assert wide.shape == (4000, 1280, 3) and (wide[5, 5] == 1).all()
  assert 0.02 < (wide.min(axis=-1) < 0.6).mean() < 0.5  # ink
  blue = np.array([0, 0x72, 0xB2]) / 255
  assert (np.abs(wide - blue).max(axis=-1) < 0.01).sum() > 300  # lines of figures
  dark = screenshot(page, tmp_path / "dark.png", 1280, 4000, "--blink-settings=preferredColorScheme=0")
  assert dark[5, 5].max() < 0.2
  assert (dark.min(axis=-1) == 1).mean() > 0.05  # figures keep a white card


@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs /usr/bin/chromium")
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_is_no_wider_than_the_window(width, groups, tmp_path):
  page = tmp_path / "report.html"
  page.write_text(render(groups, significance.compare(groups, resamples=50)))
  frame = tmp_path / "frame.html"  # a window is at least 500 wide
  frame.write_text(f'<body><iframe id="f" src="report.html" style="width:{width}px;height:900px"></iframe><script>'
                   "onload = () => { const root = document.getElementById('f').contentDocument.documentElement; "
                   "document.title = root.scrollWidth + ' ' + root.clientWidth }</script>")
  done = subprocess.run([
      CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync",
      "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()],
      capture_output=True, text=True, timeout=120)
  scroll, client = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
  assert scroll <= client
