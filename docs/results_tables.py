"""Prints the tables of docs/stosa.md from finished run folders: metrics, then validation over epochs.

  python docs/results_tables.py runs/beauty_stosa_none runs/beauty_stosa_value ...
"""

import json
import pathlib
import sys

COLUMNS = ("hr@1", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def show(value: float) -> str:
  """Returns four decimals without the zero before the point."""
  return f"{value:.4f}".removeprefix("0")


def print_row(*cells: object) -> None:
  print(f"| {' | '.join(map(str, cells))} |")


def main(workdirs: list[str]) -> None:
  """Prints both tables."""
  results, curves = {}, {}
  for workdir in map(pathlib.Path, workdirs):
    result, config = (json.loads((workdir / name).read_text()) for name in ("result.json", "config.json"))
    network = result["backbone"] + (", published" if config["model"]["faithful"] else "")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results[network, result["refine"]] = result
    curves[network, result["refine"]] = {line["epoch"]: line["ndcg@10"] for line in lines if line["split"] == "valid"}
  print_row("network", "refine", *(f"test {name.upper()}" for name in COLUMNS), "validation NDCG@10", "best epoch",
            "parameters")
  print_row(*["---"] * (len(COLUMNS) + 5))
  for (network, refine), result in results.items():
    print_row(network, f"`{refine}`", *(show(result["test"][name]) for name in COLUMNS),
              show(result["valid"]["ndcg@10"]), result["best_epoch"], f"{result['parameters']:,}")
  print()
  epochs = sorted({epoch for curve in curves.values() for epoch in curve})
  print_row("validation NDCG@10 after epoch", "", *epochs)
  print_row(*["---"] * (len(epochs) + 2))
  for (network, refine), curve in curves.items():
    print_row(network, f"`{refine}`", *(show(curve[epoch]) if epoch in curve else "" for epoch in epochs))


if __name__ == "__main__":
  main(sys.argv[1:])
