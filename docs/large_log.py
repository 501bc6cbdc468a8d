"""A log larger than memory, from a CSV file to trained steps: the figures of docs/performance.md.

  PYTHONPATH=. python docs/large_log.py FOLDER [MILLIONS]

Makes a log of so many million interactions (100), of a user for every hundred and an item for every two hundred, in
FOLDER; prepares it; builds batches; trains 200 steps. Prints how long each took and the most memory that it held. The
log (26 MB a million) and the corpus stay in FOLDER, and are made only once.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

STEPS = 200
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_log(path: pathlib.Path, rows: int) -> None:
  """Writes the log: user, item and time by hashes of the row, in the order of time, popular items first."""
  import duckdb
  users, items = rows // 100, rows // 200
  duckdb.execute("SET memory_limit = '1GB'")
  duckdb.execute(
      f"COPY (SELECT 'u' || (hash(row) % {users}) AS user, 'i' || (floor({items} * pow(hash(row + {rows}) % 1000003 / "
      f"1000003.0, 2)))::INTEGER AS item, 1500000000 + row // 3 AS time FROM range({rows}) AS log(row)) TO '{path}' "
      "(HEADER true)")


def count_memory() -> tuple[int, int]:
  """Returns the bytes of this process that are its own, and all that it has mapped."""
  _, resident, shared, *_ = (int(number) * PAGE for number in pathlib.Path("/proc/self/statm").read_text().split())
  return resident - shared, resident


def run_apart(*arguments: str) -> None:
  """Runs a part of this file in its own process, so that each shows its own memory."""
  subprocess.run([sys.executable, __file__, *arguments], check=True)


def prepare(log: str, out: str) -> None:
  """Prepares the log, and prints the most memory held meanwhile."""
  from awrsr_jax.config import default, finalize
  from awrsr_jax.data import prepared
  config = default()
  config.data.path = log
  peak = [0]

  def watch() -> None:
    while True:
      peak[0] = max(peak[0], count_memory()[1])
      time.sleep(0.05)

  threading.Thread(target=watch, daemon=True).start()
  begin = time.monotonic()
  made = prepared.prepare(finalize(config).data, out, 2**30)
  print("{users:,} users, {items:,} items, {interactions:,} interactions".format(**made["description"]),
        f"prepared in {time.monotonic() - begin:.0f} s, at most {peak[0] / 2**20:,.0f} MiB of memory", flush=True)


def make_config(path: str, batch_size: int) -> object:
  """Returns the config of a small model on the prepared corpus."""
  from awrsr_jax.config import default, finalize
  config = default()
  config.data.path, config.data.max_length = path, 50
  config.train.batch_size, config.train.epochs = batch_size, 10_000
  config.model.width = config.model.ffn_width = 32
  config.loss.name, config.loss.num_negatives = "sampled_softmax", 256
  return finalize(config)


def read(path: str) -> None:
  """Builds batches for 15 seconds each, and prints how many."""
  from awrsr_jax.data import batches, prepared
  for batch_size in (128, 1024):
    config = make_config(path, batch_size)
    begin = time.monotonic()
    stream = batches.stream(batches.training_batches(prepared.load(config.data), config), 0)
    next(stream)
    opened = time.monotonic() - begin
    begin, count, first = time.monotonic(), 0, count_memory()[0]
    while time.monotonic() - begin < 15:
      next(stream)
      count += 1
    rate = count * batch_size / (time.monotonic() - begin)
    print(f"batches of {batch_size}: {rate:,.0f} sequences/s; the first after {opened:.1f} s; memory "
          f"{first / 2**20:,.0f} MiB before, {count_memory()[0] / 2**20:,.0f} MiB after", flush=True)


def train(path: str) -> None:
  """Trains, and prints the memory on the way."""
  import jax

  from awrsr_jax.engine import feed
  from awrsr_jax.engine import mesh as meshes
  from awrsr_jax.engine.state import init_state
  from awrsr_jax.engine.train import make_job
  config = make_config(path, 128)
  job = make_job(config)
  state = init_state(job.backbone, job.optimizer, config.seed, job.mesh)
  held, begin = [], time.monotonic()
  for step, call in zip(range(STEPS), feed.streamed_calls(job.mesh, job.batches, 0), strict=False):
    state, report = job.train_step(state, call.feed | {"stop": meshes.stop_flags(job.mesh, False)}, job.cumulative,
                                   lengths=call.lengths)
    jax.block_until_ready(report)
    if step % 50 == 49:
      held.append(f"{count_memory()[0] / 2**20:,.0f}")
  print(f"{STEPS} steps of 128 sequences ({len(job.batches.buckets)} lengths) in {time.monotonic() - begin:.0f} s; "
        f"memory after every 50: {', '.join(held)} MiB", flush=True)


def main(folder: str, millions: str = "100") -> None:
  """Makes what is missing, then measures."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  log, out = path / f"log_{millions}.csv", path / f"prepared_{millions}"
  if not log.exists():
    make_log(log, int(millions) * 10**6)
  print(f"log: {log.stat().st_size / 2**30:.1f} GiB", flush=True)
  if not out.exists():
    run_apart("prepare", str(log), str(out))
  size = sum(file["bytes"] for file in json.loads((out / "prepared.json").read_text())["files"].values())
  print(f"prepared: {size / 2**30:.2f} GiB", flush=True)
  run_apart("read", str(out))
  run_apart("train", str(out))


if __name__ == "__main__":
  {"prepare": prepare, "read": read, "train": train}.get(sys.argv[1], lambda *_: main(*sys.argv[1:]))(*sys.argv[2:])
