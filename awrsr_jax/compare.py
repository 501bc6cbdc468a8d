"""Compares trained runs: `python -m awrsr_jax.compare RUN RUN ... --metrics=ndcg@10,hr@10,mrr --out=compared.json`.

RUN are run folders (--workdir of training). Runs that differ in nothing but the seed are one group; the first run's
group is the baseline, and all others are compared with it, user by user, on the test targets. What interval and p value
cover stands at the top of awrsr_jax/analysis/significance.py. Several seeds of one config alone are described: mean and
deviation over seeds.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags
from etils import epath

from awrsr_jax.analysis import runs, significance
from awrsr_jax.analysis.text import align
from awrsr_jax.command import refuse
from awrsr_jax.engine.run_folder import write_found
from awrsr_jax.foreign import printable


def format_table(metric: str, found: dict[str, Any]) -> str:
  """Returns one metric of what `significance.compare` returned as a table, a group a line."""
  groups, level = found["metrics"][metric], f"{100 * found['level']:g} %"
  has_seeds = any(values.get("users_and_seeds") for values in groups.values())
  titles = [metric, "seeds", "mean", "deviation"]
  if len(groups) > 1:
    intervals = [f"{level} interval", *["users and seeds"] * has_seeds]
    titles += ["difference", *intervals, "relative", *intervals, "p", "p (Holm)"]
  rows = [titles]
  for name, values in groups.items():
    row = [name, str(len(values["seeds"])), f"{values['mean']:.4f}", _show(values["deviation"], ".4f")]
    if "difference" in values:
      row += [f"{values['difference']:+.4f}", _show_interval(values["interval"], "+.4f"),
              *[_show_interval(values["users_and_seeds"], "+.4f")] * has_seeds,
              _show(values["relative"], "+.1f", " %"), _show_interval(values["relative_interval"], "+.1f"),
              *[_show_interval(values["relative_users_and_seeds"], "+.1f")] * has_seeds,
              f"{values['p']:.4f}", f"{values['p_holm']:.4f}"]
    rows.append(row + [""] * (len(titles) - len(row)))
  return "\n".join(line.rstrip() for line in align(rows))


def _show(value: float | None, form: str, unit: str = "") -> str:
  """Returns a number as text, "-" where there is none."""
  return "-" if value is None else f"{value:{form}}{unit}"


def _show_interval(ends: list[float] | None, form: str) -> str:
  """Returns an interval as text, "-" where there is none."""
  return "-" if ends is None else f"[{', '.join(f'{end:{form}}' for end in ends)}]"


def render(found: dict[str, Any]) -> str:
  """Returns what `significance.compare` returned as a text: what was compared, and a table a metric."""
  several = "" if found["targets"] == found["users"] else "; means are over each user's targets, then over users"
  lines = [found["protocol"],
           "{name}: {users} users, {items} items, {interactions} interactions".format(**found["corpus"])
           + f"; {found['targets']} test targets of {found['users']} users{several}"]
  if len(found["groups"]) > 1:
    lines.append(f"compared with {found['baseline']}; intervals over users as drawn, models as trained: "
                 f"{found['resamples']:,} resamples; p: two-sided, signs flipped by user; seed {found['seed']}")
  else:
    seeds = next(iter(found["groups"].values()))["seeds"]
    lines.append(f"all runs have one config, with {len(seeds)} seeds ({', '.join(map(str, seeds))}): there is no other "
                 "group to compare with")
  return "\n".join([*lines, *(f"\n{format_table(metric, found)}" for metric in found["metrics"])])


def run(folders: Sequence[str], metrics: Sequence[str], resamples: int, seed: int, level: float,
        out: str | None) -> None:
  """Compares the runs in folders, and prints what is found.

  Args:
    folders: of runs; the group of the first is the baseline.
    metrics, resamples, seed, level: see significance.compare.
    out: a new JSON file for what `significance.compare` returns, written whole or not at all; or None.

  Raises:
    ValueError: there is only one run, a folder is no complete run, see runs.group and significance.compare; or the file
      exists, or cannot be written.
  """
  significance.check_settings(metrics, resamples, seed, level)
  if out and epath.Path(out).exists():
    raise ValueError(f"--out={out} exists; choose another file, or take it away")
  if out and not epath.Path(out).parent.is_dir():
    raise ValueError(f"--out={out} lies in no folder that exists; name a file in a folder that does")
  if len(folders) < 2:
    raise ValueError(f"{len(folders)} run folders were given; name two or more, first those of the baseline: "
                     "python -m awrsr_jax.compare RUN RUN ...")
  groups = runs.group([runs.read_run(folder) for folder in folders])
  found = significance.compare(groups, metrics, resamples, seed, level)
  for name, telling in zip(groups, runs.tell_apart(list(groups.values())), strict=True):
    if len(groups) > 1 and name != telling:
      print(printable(f"{name}: {telling}"))
  print(printable(render(found)))
  if out:
    write_found(out, found)


def main(argv: Sequence[str]) -> None:
  """Compares, and prints."""
  try:
    run(argv[1:], METRICS.value, RESAMPLES.value, SEED.value, LEVEL.value, OUT.value)
  except ValueError as error:
    refuse(error)


if __name__ == "__main__":
  # Here, so that whoever imports this file may have flags of the same names.
  METRICS = flags.DEFINE_list("metrics", list(significance.METRICS), "Metrics: hr@K, ndcg@K and mrr.")
  RESAMPLES = flags.DEFINE_integer("resamples", significance.RESAMPLES, "How often users are drawn, and signs flipped.")
  SEED = flags.DEFINE_integer("seed", 0, "Of both; the same seed gives the same numbers.")
  LEVEL = flags.DEFINE_float("level", significance.LEVEL, "Of the intervals.")
  OUT = flags.DEFINE_string("out", None, "A new JSON file for all numbers.")
  app.run(main)
