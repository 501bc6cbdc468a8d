"""Draws what is in run folders, and writes a report: `python -m awrsr_jax.analyze RUN RUN ... --out=DIR`.

RUN are folders of complete runs (--workdir of training). Runs that differ in nothing but the seed are one group; the
first run's group is the one that others are compared with. Into --out go report.html, one page with everything, and
every figure as PNG and SVG; files of the same names are replaced, each whole or not at all. What cannot be made is left
out, with a line that says why, on stderr and in the report.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence

from absl import app, flags
from etils import epath

from awrsr_jax.analysis import maps, report, runs, significance
from awrsr_jax.analysis.attention import choose, measure_profile, read_histories
from awrsr_jax.analysis.drawing import FORMATS, Drawing
from awrsr_jax.analysis.figures import FROM_RUNS, Groups
from awrsr_jax.command import refuse
from awrsr_jax.engine.run_folder import write_bytes, write_text
from awrsr_jax.foreign import printable
from awrsr_jax.inference import trained as models

USERS = 512


def analyze(folders: Sequence[str], out: str | None = None, user: str | None = None, users: int = USERS,
            data_path: str | None = None, formats: Sequence[str] = tuple(FORMATS), with_maps: bool = True) -> list[str]:
  """Writes all figures and the report of some runs.

  Args:
    folders: of runs.
    out: a folder, made where there is none; None: RUN/analysis, of one run.
    user: raw id of the user whose attention is drawn; None: see attention.choose.
    users: histories that attention is averaged over.
    data_path: where the data of the runs lie now, for attention.
    formats: of figures, of "png" and "svg".
    with_maps: whether models are loaded and their attention is looked at.

  Returns:
    What was left out, one sentence each.

  Raises:
    ValueError: an argument is wrong, a folder is no complete run, the runs rank other targets or under another
      protocol, or --out cannot be written.
  """
  unknown = [name for name in formats if name not in FORMATS]
  if unknown or not formats:
    raise ValueError(f"--format={','.join(formats)}: choose from {', '.join(FORMATS)}, with commas between them")
  if users < 1:
    raise ValueError(f"--users={users} must be at least 1")
  if not folders:
    raise ValueError("no run folder was given; name one or more: python -m awrsr_jax.analyze RUN RUN ... --out=DIR")
  if out is None and len(folders) > 1:
    raise ValueError(f"{len(folders)} run folders were given; say with --out=DIR where their report goes")
  found = [runs.read_run(folder) for folder in folders]
  runs.check_comparable(found)
  groups = runs.group(found)
  folder = make_folder(epath.Path(folders[0]) / "analysis" if out is None else epath.Path(out), out is None)
  left_out: list[str] = []
  drawings = []
  for make in FROM_RUNS:
    try:
      drawings.append(make(groups))
    except ValueError as error:
      left_out.append(f"{make.__name__.replace('_', ' ')}: {error}")
  attention = look_at_attention(groups, user, users, data_path, left_out) if with_maps else []
  if not with_maps:
    left_out.append("attention: --no_maps was given")
  if len(groups) > 1:
    try:
      comparison = significance.compare(groups)
    except ValueError as error:
      comparison = f"The configs could not be compared: {error}"
      left_out.append(f"significance: {error}")
  else:
    comparison = "There is one config only, so there is none to compare it with."
  try:
    for drawing in drawings + [drawing for seen in attention for drawing in seen.drawings]:
      for name in formats:
        write_bytes(folder / f"{drawing.key}.{name}", FORMATS[name](drawing))
    write_text(folder / "report.html", report.render(groups, drawings, attention, comparison, left_out))
  except OSError as error:
    raise ValueError(f"--out={folder} cannot be written: {error.strerror or error}; choose another folder") from error
  print(folder / "report.html")
  return left_out


def make_folder(folder: epath.Path, own: bool) -> epath.Path:
  """Makes the folder of a report, if it is not there; `own`: it lies in the run folder, which others may have made.

  Raises:
    ValueError: it is a file, or cannot be made.
  """
  if own and os.path.islink(folder):
    raise ValueError(f"{folder} leads to another place; say with --out=DIR where the report goes")
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--out={folder} is a file; name a folder, or one that is to be made")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--out={folder} cannot be made: {error.strerror or error}; choose another folder") from error
  return folder


def look_at_attention(groups: Groups, user: str | None, users: int, data_path: str | None,
                      left_out: list[str]) -> list[report.Attention]:
  """Returns what is seen of the first run of each group; adds to what was left out.

  All groups have one corpus, so it is read once.

  Raises:
    ValueError: there is no such user.
  """
  seen: list[report.Attention] = []
  first = next(iter(groups.values()))[0]
  try:
    histories = read_histories(first, data_path)
  except ValueError as error:
    left_out.append(f"attention: {error}")
    return seen
  row = choose(histories, user)
  for name, members in groups.items():
    try:
      trained = models.load(members[0].folder)
    except ValueError as error:
      left_out.append(f"attention of {name}: {error}")
      continue
    is_refined = trained.config.model.refine != "none"
    drawings = maps.map_drawings(trained, histories, row) + maps.profile_drawings(
        measure_profile(trained, histories, users), is_refined)
    seen.append(report.Attention(name, members[0], name_files(drawings, name if len(groups) > 1 else "", len(seen))))
  return seen


def name_files(drawings: Sequence[Drawing], group: str, index: int) -> list[Drawing]:
  """Returns drawings whose keys, the names of their files, tell their group and are no other group's."""
  end = re.sub(r"[^A-Za-z0-9]+", "_", group).strip("_")[:60]
  return [dataclasses.replace(drawing, key=f"{drawing.key}_{index + 1}_{end}") if group else drawing
          for drawing in drawings]


def main(argv: Sequence[str]) -> None:
  """Analyzes, and says what was left out."""
  try:
    left_out = analyze(argv[1:], OUT.value, USER.value, NUMBER.value, DATA_PATH.value, FORMAT.value, not NO_MAPS.value)
  except ValueError as error:
    refuse(error)
  for words in left_out:
    print(printable(f"left out: {words}"), file=sys.stderr)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  OUT = flags.DEFINE_string("out", None, "A folder for report.html and the figures; of one run RUN/analysis.")
  USER = flags.DEFINE_string("user", None, "Raw id of the user whose attention is drawn; else one of median history.")
  NUMBER = flags.DEFINE_integer("users", USERS, "Histories that attention is averaged over.")
  DATA_PATH = flags.DEFINE_string("data_path", None, "Where the data of the runs lie now, instead of config.data.path.")
  FORMAT = flags.DEFINE_list("format", list(FORMATS), "Of figures: png, svg.")
  NO_MAPS = flags.DEFINE_bool("no_maps", False, "Load no model and leave attention out.")
  app.run(main)
