"""Makes an artefact of a trained model: a folder that recommends with jax and numpy alone.

  model.stablehlo   the program, from jax.export: any batch size, any number of excluded items, several platforms
  params.npz        the parameters, float32 arrays by their paths ("blocks_0/attention/query/kernel")
  items.json        {"ids": raw ids of items 1 to I, "titles": as many, or null where there are none}
  recommender.py    a copy of standalone.py, which reads all this
  README.md         how to use it
  manifest.json     what it is, and size and SHA-256 of every other file; written last

It is made as OUT.partial-*, checked in a fresh process without this package, and renamed when whole and right; an
export that is killed leaves that folder, which nothing reads and anyone may remove.
Shapes: B histories, S padded excluded items, n longest input, k best items, V rows of the item table, I items.
"""

import contextlib
import datetime
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax import export as jax_export
from jax.sharding import AxisType, Mesh

import awrsr_jax
from awrsr_jax.config import walk
from awrsr_jax.data.prepared import hash_file
from awrsr_jax.engine.checkpoint import name_arrays
from awrsr_jax.engine.ranking import describe_protocol
from awrsr_jax.engine.run_folder import is_remote, nest
from awrsr_jax.foreign import parse_json, plain
from awrsr_jax.inference import standalone
from awrsr_jax.inference.standalone import Id
from awrsr_jax.inference.top import Top, take_top
from awrsr_jax.inference.trained import Trained, load
from awrsr_jax.model.backbones import encode_newest, in_full_precision
from awrsr_jax.model.hidden import table_rows

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
CHECKED = 64  # histories of a parity check: one batch, so that the live model pads them to the same length
# Largest difference of a score, relative to the largest score: of a float32 model on a CPU, and else. A bfloat16 model
# may round once more or less where a program was fused differently, by 2^-8. A float32 model multiplies in full
# precision on any device, here and in the artefact; but others add up in orders of their own, which was not tried.
TOLERANCE, COARSE = 1e-6, 2 ** -8
# Runs recommender.py where neither this package nor what only training needs can be imported.
FRESH = """import runpy, sys
sys.modules.update(dict.fromkeys(["awrsr_jax", "flax", "orbax", "ml_collections", "optax", "grain", "absl"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def export(workdir: str | os.PathLike[str], out: str | os.PathLike[str], k: int = 100, step: int | None = None,
           platforms: Sequence[str] = PLATFORMS, check: bool = True) -> dict[str, Any]:
  """Makes an artefact of a run.

  Args:
    workdir: the run folder.
    out: the folder to make.
    k: the most items that the artefact can give a history, up to I.
    step: of the checkpoint; None: as `trained.load` chooses.
    platforms: that it shall run on, of KNOWN_PLATFORMS.
    check: compare it, in a fresh process, with the live model.

  Returns:
    The content of manifest.json, and "parity", see `measure_parity`; None without `check`.

  Raises:
    ValueError: see `trained.load`; or `out` exists or cannot be written, k or platforms are out of range, the model
      cannot be exported, or the artefact does not give what the live model gives. Nothing is left then.
    FloatingPointError: a score of the live model is NaN.
  """
  if is_remote(out):
    raise ValueError(f"--out={out} is a bucket, and an artefact is made in a folder; make it here and copy it there")
  out = pathlib.Path(os.path.abspath(out))
  if out.exists() or out.is_symlink():
    raise ValueError(f"--out={out} exists; remove it, or choose another folder")
  platforms = check_platforms(platforms)
  where = choose_backend(platforms) if check else None
  trained = load(workdir, step)
  if not 1 <= k <= len(trained.catalogue.item_ids):
    raise ValueError(f"k={k} must lie between 1 and the {len(trained.catalogue.item_ids)} items of {workdir}")
  program = export_program(trained, k, platforms)
  partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
  try:
    partial.mkdir(parents=True)
    manifest = write_folder(partial, trained, k, program)
    parity = measure_parity(trained, partial, k, where) if where else None
    try:
      os.rename(partial, out)  # fails where someone else has filled the folder by now
    except OSError as error:
      raise ValueError(f"--out={out} exists by now ({error.strerror}); choose another folder") from error
  except OSError as error:
    raise ValueError(f"--out={out} cannot be written: {error.strerror or error}; choose another folder") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return manifest | {"parity": parity}


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
  """Returns the platforms, each once.

  Raises:
    ValueError: there is none, or an unknown one.
  """
  unknown = [name for name in platforms if name not in KNOWN_PLATFORMS]
  if unknown or not platforms:
    raise ValueError(f"platforms {list(platforms)} must be some of {', '.join(KNOWN_PLATFORMS)}")
  return tuple(dict.fromkeys(platforms))


def choose_backend(platforms: Sequence[str]) -> str:
  """Returns where an artefact is checked: "cpu", whose bound for float32 is the tightest, or else what is here.

  Raises:
    ValueError: it cannot run here.
  """
  here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
  with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave no CPU
    if "cpu" in platforms and jax.local_devices(backend="cpu"):
      return "cpu"
  if here in platforms:
    return here
  raise ValueError(f"an artefact for {', '.join(platforms)} cannot be checked here, on {here}; add cpu to --platforms, "
                   "or leave the check out with --nocheck")


def export_program(trained: Trained, k: int, platforms: Sequence[str]) -> jax_export.Exported:
  """Returns the program (params by path, inputs_Bxn, excluded_BxS, allowed_V) -> Top, for any B and S from 1.

  Parameters are arguments, so that the program stays small and one of them can be replaced; the table is scored in the
  blocks of the live model.

  Raises:
    ValueError: JAX does not export the model for these platforms.
  """
  backbone, config = trained.backbone, trained.config

  def recommend(params: dict[str, jax.Array], inputs_Bxn: jax.Array, excluded_BxS: jax.Array,
                allowed_V: jax.Array) -> Top:
    params = traverse_util.unflatten_dict(params, sep="/")
    catalogue = backbone.apply({"params": params}, method="catalogue")
    return take_top(backbone.score_rows, encode_newest(backbone, params, inputs_Bxn), catalogue, 0, backbone.num_items,
                    excluded_BxS, allowed_V, k, config.eval.block_items)

  batch, width = jax_export.symbolic_shape("b, s")
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), name_arrays(trained.params))
  rows = table_rows(backbone.num_items, config.model.table_multiple)
  try:
    return jax_export.export(jax.jit(in_full_precision(recommend)), platforms=platforms)(
        shapes, jax.ShapeDtypeStruct((batch, config.data.max_length), jnp.int32),
        jax.ShapeDtypeStruct((batch, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.bool_))
  except (ValueError, NotImplementedError) as error:
    raise ValueError(f"JAX {jax.__version__} cannot export the model of {trained.workdir} for {', '.join(platforms)}: "
                     f"{error}") from error


def write_folder(folder: pathlib.Path, trained: Trained, k: int, program: jax_export.Exported) -> dict[str, Any]:
  """Fills an empty folder, manifest.json last. Returns its content."""
  (folder / "model.stablehlo").write_bytes(program.serialize())
  with (folder / "params.npz").open("wb") as file:
    np.savez(file, **{name: np.asarray(x) for name, x in name_arrays(trained.params).items()})  # type: ignore[arg-type]
  item_ids, titles = trained.catalogue.item_ids, trained.catalogue.titles
  items = {"ids": item_ids, "titles": titles if any(titles) else None}
  (folder / "items.json").write_text(json.dumps(items, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
  shutil.copyfile(standalone.__file__, folder / "recommender.py")
  about = describe(trained, k, program)
  (folder / "README.md").write_text(write_readme(about, item_ids), encoding="utf-8")
  files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())}
  manifest = about | {"files": files}
  (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  for path in (*folder.iterdir(), folder):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
  return manifest


def describe(trained: Trained, k: int, program: jax_export.Exported) -> dict[str, Any]:
  """Returns manifest.json without its files."""
  config, corpus = trained.config, trained.record["corpus"]
  length, rows = config.data.max_length, table_rows(trained.backbone.num_items, config.model.table_multiple)
  return {
      "schema": standalone.SCHEMA,
      "awrsr_jax_version": awrsr_jax.__version__,
      "jax_version": jax.__version__,
      "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "platforms": list(program.platforms),
      "calling_convention_version": program.calling_convention_version,
      "needs": ["jax", "numpy", "flatbuffers"],
      "k": k, "length": length, "items": len(trained.catalogue.item_ids), "rows": rows,
      "signature": {
          "inputs": [
              {"name": "params", "type": "dict", "meaning": "the arrays of params.npz by their names"},
              {"name": "inputs", "shape": ["b", length], "dtype": "int32",
               "meaning": "item numbers of histories, oldest first, the newest n of them, padded with 0 on the left"},
              {"name": "excluded", "shape": ["b", "s"], "dtype": "int32",
               "meaning": "item numbers that a history is not given, in any order; 0 is none; s is at least 1"},
              {"name": "allowed", "shape": [rows], "dtype": "bool",
               "meaning": "which rows of the item table may be given to any history; row j is item j"}],
          "outputs": [
              {"name": "scores", "shape": ["b", k], "dtype": "float32",
               "meaning": "best first, larger is better; -inf where fewer than k items are left"},
              {"name": "items", "shape": ["b", k], "dtype": "int32",
               "meaning": "their numbers from 1, as in items.json; 0 where fewer are left; of equal scores the lower "
                          "number first"}]},
      "parameters": {name: list(x.shape) for name, x in sorted(name_arrays(trained.params).items())},
      "run": trained.workdir, "step": trained.step, "validation": read_validation(trained),
      "protocol": describe_protocol(config.eval.protocol, corpus["split"]["words"]),
      "corpus": corpus, "config": nest(json.loads(json.dumps(dict(walk(config))))),
  }


def read_validation(trained: Trained) -> dict[str, float] | None:
  """Returns the metrics of the checkpoint on validation, of metrics.jsonl; None where it has none of this step.

  A checkpoint does not know its own: it is written beside its evaluation.
  """
  try:
    lines = (epath.Path(trained.workdir) / "metrics.jsonl").read_text().splitlines()
  except OSError:
    return None
  for line in lines:
    try:
      values = parse_json(line, "it")
      if values.pop("split") == "valid" and values.pop("step") == trained.step:
        values.pop("epoch", None)
        return values
    except (ValueError, KeyError, TypeError, AttributeError):  # a line that is being written
      continue
  return None


README = """# A recommender

Transformer `{backbone}`, trained on {corpus} ({items:,} items, fingerprint `{fingerprint}`), checkpoint of step {step}.
It gives up to {k} items for a history of raw item ids, of any user; it looks at the newest {length} of them.

```sh
pip install "jax=={jax}" numpy flatbuffers      # jax[cuda13], jax[tpu] where there is such a device
echo {words} > histories.jsonl
python recommender.py histories.jsonl 5         # a JSON line a history: items, scores, titles if there are any
```

```python
from recommender import Recommender             # this folder is the working folder, or on sys.path

recommender = Recommender("FOLDER")             # checks every file, once
[best] = recommender.recommend([[{example}]], k=5)
for item, score, title in best:
  print(item, score, title)
# allow, deny: lists of raw ids; exclude_seen=False: seen items too
recommender.recommend(histories, k=5, allow=in_stock, deny=sold_out)
```

Make one `Recommender` when the server starts; a call takes any number of histories. The first call of each batch size,
a power of two up to 256, compiles: call it once with each size that you will use before you let users in. With
`JAX_COMPILATION_CACHE_DIR` set to a folder, the next start finds the programs there. `flatbuffers` is what jax.export
reads with.

**Which JAX.** Made with JAX {jax}, for {platforms}. jax.export promises that a program runs under a JAX (jaxlib) that
is up to 6 months newer than the one that made it, or up to 3 weeks older; from 0.11.1 on JAX may refuse older programs
(`JAX_EXPORT_DESERIALIZE_EXPIRED_VERSIONS=1` makes it try). Before you update further, export again from the run with
the new JAX. The surest is the same version on both sides. `params.npz`, `items.json` and `manifest.json` are plain
files that stay readable; the manifest has config, corpus, protocol and the signature of the program.

A program can do what its process may do: load artefacts of people you trust.
"""


def write_readme(about: dict[str, Any], item_ids: list[Id]) -> str:
  """Returns README.md for a manifest; its examples have raw ids of this catalogue."""
  corpus = about["corpus"]
  return README.format(
      backbone=about["config"]["model"]["backbone"], corpus=plain(corpus["name"]) or "data of your own",
      words=shlex.quote(json.dumps(item_ids[:2], ensure_ascii=False)), items=about["items"],
      fingerprint=corpus["fingerprint"][:12], step=about["step"], k=about["k"], length=about["length"],
      jax=about["jax_version"], platforms=", ".join(about["platforms"]),
      example=", ".join(json.dumps(raw, ensure_ascii=False) for raw in item_ids[:2]))


def measure_parity(trained: Trained, folder: pathlib.Path, k: int, backend: str, seed: int = 0) -> dict[str, Any]:
  """Compares an artefact, in a fresh process that has no awrsr_jax, with the live model.

  Histories are drawn: CHECKED of them, of 1 to 2n items. Scores are compared place by place, items where the live score
  differs from those before and after it by more than twice the tolerance, since equal ones may swap.

  Args:
    trained: the live model.
    folder: the artefact.
    k: it was exported for.
    backend: where both run.
    seed: of the histories.

  Returns:
    "histories", "scores" (how many were compared), "difference" (the largest, relative to "scale", the largest absolute
    score of the live model), "tolerance", "items_compared", "backend".

  Raises:
    ValueError: they differ, or the artefact does not run.
  """
  rng, length = np.random.default_rng(seed), trained.config.data.max_length
  lengths = rng.integers(1, 2 * length + 1, CHECKED)
  lengths[0] = 2 * length
  item_ids, known = trained.catalogue.item_ids, trained.catalogue.numbers
  numbered = [rng.integers(1, len(item_ids) + 1, size).astype(np.int32) for size in lengths]
  live_scores, live_items = on_one_device(trained, backend).top(numbered, min(k + 1, len(item_ids)))
  found = run_fresh(folder, [[item_ids[number - 1] for number in numbers] for numbers in numbered], k, backend)
  scores, items = np.full((CHECKED, k), -np.inf, np.float32), np.zeros((CHECKED, k), np.int32)
  for row, line in enumerate(found):
    scores[row, :len(line["scores"])] = line["scores"]
    items[row, :len(line["items"])] = [known[str(raw)] for raw in line["items"]]
  given = np.isfinite(live_scores[:, :k])
  if (np.isfinite(scores) != given).any():
    raise ValueError(f"the artefact gives {np.isfinite(scores).sum()} items and the live model {given.sum()}, over "
                     f"{CHECKED} histories. This is a defect, please report it; --nocheck exports all the same")
  scale = float(np.abs(live_scores[np.isfinite(live_scores)]).max(initial=np.finfo(np.float32).tiny))
  difference = float(np.abs(np.where(given, scores, 0) - np.where(given, live_scores[:, :k], 0)).max()) / scale
  tolerance = TOLERANCE if backend == "cpu" and trained.config.model.dtype == "float32" else COARSE
  edge = np.pad(live_scores.astype(np.float64), ((0, 0), (1, 1)), constant_values=(np.inf, -np.inf))
  with np.errstate(invalid="ignore"):  # of no scores
    apart = -np.diff(edge, axis=1) > 2 * tolerance * scale
  sure = (apart[:, :-1] & apart[:, 1:])[:, :k] & given
  other = int((sure & (items != live_items[:, :k])).sum())
  if not difference <= tolerance or other:
    raise ValueError(f"the artefact does not give what the live model gives: scores differ by {difference:.1e} of the "
                     f"largest score, {scale:.4g}, where {tolerance:.1e} is allowed, and {other} of {sure.sum()} items "
                     f"differ, over {CHECKED} histories on {backend}. This is a defect, please report it; --nocheck "
                     "exports all the same")
  return {"histories": CHECKED, "scores": int(given.sum()), "difference": difference, "scale": scale,
          "tolerance": tolerance, "items_compared": int(sure.sum()), "backend": backend}


def on_one_device(trained: Trained, backend: str) -> Trained:
  """Returns the same model on one device of a backend."""
  platform = {"cuda": "gpu"}.get(backend, backend)
  mesh = Mesh(np.array(jax.local_devices(backend=platform)[:1]).reshape(1, 1), ("data", "model"),
              axis_types=(AxisType.Auto,) * 2)
  params = jax.device_put(jax.tree.map(np.asarray, trained.params), jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()))
  return Trained(**{field: getattr(trained, field) for field in trained.__dataclass_fields__} | {
      "mesh": mesh, "params": params})


def run_fresh(folder: pathlib.Path, histories: list[list[Any]], k: int, backend: str) -> list[dict[str, Any]]:
  """Returns what recommender.py of an artefact prints for histories of raw ids, in a process of its own.

  Raises:
    ValueError: it fails.
  """
  with tempfile.TemporaryDirectory() as elsewhere:
    path = pathlib.Path(elsewhere) / "histories.jsonl"
    path.write_text("".join(json.dumps(history) + "\n" for history in histories), encoding="utf-8")
    platforms = {"JAX_PLATFORMS": "cpu"} if backend == "cpu" else {}
    done = subprocess.run([sys.executable, "-P", "-c", FRESH, str(folder / "recommender.py"), str(path), str(k)],
                          cwd=elsewhere, env=os.environ | platforms, capture_output=True, text=True)
  if done.returncode:
    raise ValueError(f"the artefact does not run: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
  return [json.loads(line) for line in done.stdout.split("\n") if line]  # a title may hold U+2028
