"""Prints docs/reliability.md: what was done to runs and readers, what happened, and how often; from a log of the tests.

  export AWRSR_FAULTS_LOG=$PWD/faults.jsonl
  bash launch/test.sh
  AWRSR_SOAK_MINUTES=120 bash launch/test.sh --faults
  AWRSR_FUZZ=1000 bash launch/test.sh tests/fuzz_test.py
  python docs/reliability.py faults.jsonl > docs/reliability.md
"""

import json
import pathlib
import re
import sys

HEAD = """# What a run survives

Each row is done by the test that it names: to real runs by `tests/faults/`, the fast part with all tests, the long
one by `bash launch/test.sh --faults`; to readers of data, checkpoints and artefacts by the others. Count is how often
it was done for this page, which `docs/reliability.py` made of a log of these tests. "Ends bit-equal" is: result,
parameters and metric lines are those of an uninterrupted run, bit for bit. [security.md](security.md) says what is
trusted and what is not.

Where memory is not flat in a soak, it is by the saves: `tracemalloc` finds what stays behind in JSON that TensorStore
makes for Orbax, specs and metrics. It does so alone, too, in all of five releases from 0.1.71 to 0.1.86:

```bash
python -c "import tensorstore as ts, tracemalloc
spec = ts.Spec({'driver': 'zarr', 'kvstore': {'driver': 'memory'}, 'metadata': {'shape': [10, 20], 'dtype': '<f4'}})
tracemalloc.start(); [None for _ in range(3000) if not spec.to_json()]
print(tracemalloc.get_traced_memory()[0] // 3000, 'bytes a call stay behind')"
```

Orbax calls it at each save and has no switch for it. A run that saves every 10 steps, as this one, shows it most. So
the soak is done as it is and without these calls. What grows besides, until it is full, is a cache of JAX, in which
every resumption in the same process leaves the calls that it traced: the short resumptions before fill it.

| fault | what happens | test | count | green |
|---|---|---|---|---|"""


def main(path: str) -> None:
  """Prints the page; rows of the same fault, outcome and test are one, with their counts added up."""
  found: dict[tuple[str, str, str], list[dict]] = {}
  for line in pathlib.Path(path).read_text().splitlines():
    row = json.loads(line)
    test = re.sub(r"\[.*", "", row["test"]).replace("tests/", "").replace("::", " ")
    found.setdefault((row["fault"], row["what happens"], test), []).append(row)
  print(HEAD)
  for key, rows in sorted(found.items(), key=lambda item: (item[0][2].split()[0], item[0])):
    cells = (*key[:2], f"`{key[2]}`", str(sum(row["count"] for row in rows)),
             "yes" if all(row["green"] for row in rows) else "**no**")
    print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")


if __name__ == "__main__":
  main(sys.argv[1])
