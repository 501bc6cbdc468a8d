"""Checkpoints: bit-equal on any devices; every damage is noticed, named and survived; the right ones are kept."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from etils import epath

from awrsr_jax.engine import checkpoint
from awrsr_jax.engine import mesh as meshes
from awrsr_jax.engine.state import NO_STEP, TrainState, Window

# Orbax leaves failed reads behind, and Python tells of them when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IDS = {"items": checkpoint.encode_texts(["i1", "é", ""]), "titles": checkpoint.encode_texts(["", "title", ""])}


def make(data, model):
  return meshes.make_mesh(ml_collections.ConfigDict({"data": data, "model": model}))


def make_state(step, mesh=None):
  """A train state of random numbers, all of them functions of the step; on a mesh, or on one device."""
  rng = np.random.default_rng(step)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  params = {"embedding": {"item_table": draw(96, 32)}, "out": {"bias": draw(7), "gate": draw(1, 1)}}
  moments = optax.ScaleByAdamState(np.int32(step), *(jax.tree.map(lambda x: draw(*x.shape), params) for _ in range(2)))
  state = TrainState(np.int32(step), params, (moments, optax.EmptyState()), Window(*draw(4)), np.int32(NO_STEP))
  state = jax.tree.map(np.asarray, state)
  return jax.device_put(state, meshes.shardings(mesh or make(1, 1), state))


def template_of(state, mesh=None):
  return meshes.template(mesh or make(1, 1), state)


def save(manager, step, best_step=0, mesh=None):
  """Saves make_state(step); best_step is the best of the steps before it, none unless one is given."""
  record = {"step": step, "best": 0.25, "best_step": best_step, "config": {"seed": 0}}
  checkpoint.save(manager, make_state(step, mesh), record, IDS)
  manager.wait_until_finished()


def assert_bit_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with checkpoints of steps 3 and 6; copied, never changed."""
  workdir = tmp_path_factory.mktemp("run")
  with checkpoint.open_checkpoints(workdir) as manager:
    save(manager, 3)
    save(manager, 6)
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, mesh=None):
  """What a run that starts again in a folder finds."""
  with checkpoint.open_checkpoints(workdir) as manager:
    return checkpoint.restore_newest(manager, template_of(make_state(0), mesh))


# --- a round trip


def test_all_leaves_and_the_record_come_back_bit_equal(workdir):
  state, record = restore(workdir)
  assert_bit_equal(state, make_state(6))
  assert (record["step"], record["best"], record["config"]) == (6, 0.25, {"seed": 0})
  assert record["schema"] == checkpoint.SCHEMA


def test_ids_come_back_as_they_were(workdir):
  with checkpoint.open_checkpoints(workdir, read_only=True) as manager:
    record = checkpoint.read_record(manager, 6)
    ids, titles = checkpoint.restore_ids(manager, 6, record)
  assert (ids.tolist(), titles) == (["i1", "é", ""], ["", "title", ""])


def test_ids_that_were_numbers_are_numbers(tmp_path):
  state, ids = make_state(3), {name: checkpoint.encode_texts(["7", "-12"]) for name in ("items", "titles")}
  with checkpoint.open_checkpoints(tmp_path) as manager:
    checkpoint.save(manager, state, {"step": 3, "best_step": 0, "ids_are_numbers": True}, ids)
  with checkpoint.open_checkpoints(tmp_path, read_only=True) as manager:
    found, _ = checkpoint.restore_ids(manager, 3, checkpoint.read_record(manager, 3))
  assert found.dtype == np.int64 and found.tolist() == [7, -12]


def test_changed_ids_are_an_error(workdir, monkeypatch):
  with checkpoint.open_checkpoints(workdir) as manager:
    record = checkpoint.read_record(manager, 6)
    genuine = manager.restore

    def with_a_flipped_bit(step, args):  # Orbax itself restores it silently
      restored = genuine(step, args=args)
      flipped = np.array(restored["ids"]["items"]["bytes"])
      flipped[0] ^= 1
      return {**restored, "ids": {**restored["ids"], "items": {**restored["ids"]["items"], "bytes": flipped}}}

    monkeypatch.setattr(manager, "restore", with_a_flipped_bit)
    with pytest.raises(ValueError, match="item ids are damaged"):
      checkpoint.restore_ids(manager, 6, record)


def test_parameters_come_back_without_the_rest_of_the_state(workdir):
  template = template_of(make_state(0)).params
  with checkpoint.open_checkpoints(workdir, read_only=True) as manager:
    record = checkpoint.read_record(manager, 6)
    params = checkpoint.restore_params(manager, 6, template, record)
    assert_bit_equal(params, make_state(6).params)
    record["checksums"] = {name: value + 1 for name, value in record["checksums"].items()}
    with pytest.raises(ValueError, match="checksums differ: params/"):
      checkpoint.restore_params(manager, 6, template, record)
    more = template | {"value": template["out"], "out": template["out"] | {"scale": template["out"]["bias"]}}
    with pytest.raises(ValueError, match="it lacks params/out/scale, params/value/bias, params/value/gate, which its "
                                         "own config asks for"):
      checkpoint.restore_params(manager, 6, more, record)


def test_reading_leaves_an_unfinished_save_alone(workdir):
  unfinished = workdir / "checkpoints" / "9.orbax-checkpoint-tmp-1"
  unfinished.mkdir()
  with checkpoint.open_checkpoints(workdir, read_only=True) as manager:
    assert sorted(manager.all_steps()) == [3, 6]
  assert unfinished.exists()


def wrapped(error):
  """An error of TensorStore as Orbax raises it for an array."""
  found = Exception("Encountered error while reading array index: (slice(0, 96, 1),). See full details:\n{}")
  found.__cause__ = error
  return found


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ValueError('PERMISSION_DENIED: Error reading local file "d/0a": Permission denied [tensorstore_spec=\'{}\'] '
               "[os_error_code='13']"),
    wrapped(ValueError("UNKNOWN: Error reading local file \"d/0a\": Input/output error [os_error_code='5']")),
    wrapped(ValueError('ABORTED: Error reading "step/0" in OCDBT database: All 1 retry attempts failed')),
    type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Service Unavailable, 503"),
])
def test_an_error_of_the_machine_is_one_line_and_moves_nothing_aside(workdir, monkeypatch, error):
  with checkpoint.open_checkpoints(workdir) as manager:
    genuine = manager.restore

    def fail(step, args):
      if "state" in args:
        raise error
      return genuine(step, args=args)
    monkeypatch.setattr(manager, "restore", fail)
    with pytest.raises(checkpoint.Unreachable, match=r"^checkpoints cannot be read now \(\w+: .*\); once they can, "
                                                     r"start the same command again$") as found:
      checkpoint.restore_newest(manager, template_of(make_state(6)))
    assert "spec" not in str(found.value)
    assert sorted(manager.all_steps()) == [3, 6] and not checkpoint.damaged_folder(manager).exists()


def test_a_process_that_is_gone_is_no_error_of_the_machine(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(jax.errors.JaxRuntimeError), checkpoint.reading():
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer")


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  assert restore(tmp_path) is None


def test_a_state_of_one_device_opens_on_eight_and_back(tmp_path):
  with checkpoint.open_checkpoints(tmp_path) as manager:
    save(manager, 1, mesh=make(1, 1))
    state, _ = checkpoint.restore_newest(manager, template_of(make_state(0), make(2, 4)))
    assert_bit_equal(state, make_state(1))
    for table in (state.params["embedding"]["item_table"], state.opt_state[0].mu["embedding"]["item_table"]):
      assert {shard.data.shape for shard in table.addressable_shards} == {(24, 32)}
      assert len(table.addressable_shards) == 8
    assert state.params["out"]["bias"].is_fully_replicated and len(state.step.addressable_shards) == 8
    save(manager, 2, mesh=make(2, 4))
    state, record = checkpoint.restore_newest(manager, template_of(make_state(0)))
  assert record["step"] == 2
  assert_bit_equal(state, make_state(2))
  assert all(len(leaf.addressable_shards) == 1 for leaf in jax.tree.leaves(state))


def test_the_state_may_be_donated_right_after_saving(tmp_path):
  state = jax.tree.map(jnp.copy, make_state(4))  # in memory of its own: numpy's cannot be donated
  expected = jax.tree.map(np.array, state)
  overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  with checkpoint.open_checkpoints(tmp_path) as manager:
    checkpoint.save(manager, state, {"step": 4, "best_step": 0}, IDS)
    jax.block_until_ready(overwrite(state))
    manager.wait_until_finished()
    assert_bit_equal(checkpoint.restore_newest(manager, template_of(make_state(0)))[0], expected)


# --- damage


def largest_file(folder):
  return max((path for path in pathlib.Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(part):
  """Returns a function that flips one bit of the largest data file of a checkpoint, at a part of its length."""
  def damage(folder):
    path = largest_file(folder / "state")
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 0x10
    path.write_bytes(data)
  return damage


def truncate(folder):
  path = largest_file(folder / "state")
  os.truncate(path, path.stat().st_size // 2)


def delete(folder):
  largest_file(folder / "state").unlink()


def record_file(folder):
  return largest_file(folder / "record")


def write_garbage(folder):
  record_file(folder).write_text('{"content": {"step": ')


def change_record(folder):
  content = json.loads(record_file(folder).read_text())
  content["content"]["best"] = 0.75
  record_file(folder).write_text(json.dumps(content))


def edit_record(change):
  """Returns a function that changes the record of a checkpoint, so that it is good in itself."""
  def edit(folder):
    content = json.loads(record_file(folder).read_text())["content"]
    change(content)
    record_file(folder).write_text(json.dumps({"content": content, "sha256": checkpoint.hash_json(content)}))
  return edit


def drop_content(folder):
  """A bit of a key's name."""
  record_file(folder).write_text(record_file(folder).read_text().replace('"content"', '"contenu"', 1))


def delete_item(name):
  return lambda folder: shutil.rmtree(folder / name)


DAMAGES = {
    "flip_early": flip(0.2), "flip_middle": flip(0.5), "flip_late": flip(0.8), "truncate": truncate, "delete": delete,
    "garbage_record": write_garbage, "changed_record": change_record,
    "changed_checksum": edit_record(lambda record: record["checksums"].update({"params/out/bias": 1})),
    "no_content": drop_content, "no_state": delete_item("state"), "no_record": delete_item("record"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_moved_aside_and_the_one_before_is_used(workdir, caplog, name):
  DAMAGES[name](workdir / "checkpoints" / "6")
  state, record = restore(workdir)
  assert record["step"] == 3
  assert_bit_equal(state, make_state(3))
  assert "checkpoint 6 of" in caplog.text and "is damaged and is not used" in caplog.text
  assert os.listdir(workdir / "checkpoints") == ["3"]
  assert os.listdir(workdir / "checkpoints_damaged") == ["6"]


@pytest.mark.parametrize("change,message", [
    (lambda record: record.update(schema=3), "its schema is 3"),
    (lambda record: record.update(law=1), "it was trained under law 1"),
    (lambda record: record.pop("law"), "it was trained under law 1"),
    (lambda record: record["checksums"].pop("window/loss"), "its state or this version's lacks window/loss "),
    (lambda record: record["checksums"].update({"opt_state/1/count": 7}), ".* lacks opt_state/1/count "),
])
def test_a_checkpoint_of_another_version_is_refused_and_stays_where_it_is(workdir, change, message):
  edit_record(change)(workdir / "checkpoints" / "6")
  with pytest.raises(ValueError, match=f"checkpoint 6 of .* is of another version of this package: {message}.*"
                                       "Finish the run with the version that began it"):
    restore(workdir)
  assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "6"] and not (workdir / "checkpoints_damaged").exists()


def test_a_flipped_bit_that_is_read_without_complaint_is_found_by_the_checksum_of_its_array(tmp_path, caplog):
  with checkpoint.open_checkpoints(tmp_path) as manager:
    state, record = make_state(5), {"step": 5}
    record |= {"schema": checkpoint.SCHEMA, "law": checkpoint.LAW, "checksums": checkpoint.name_checksums(state)}
    bias = np.array(state.params["out"]["bias"])
    bias.view(np.uint32)[3] ^= 1  # the lowest bit of one number
    state = dataclasses.replace(state, params=state.params | {"out": state.params["out"] | {"bias": bias}})
    args = checkpoint.ocp.args
    manager.save(5, args=args.Composite(
        state=args.StandardSave(state), ids=args.StandardSave(IDS),
        record=args.JsonSave({"content": record, "sha256": checkpoint.hash_json(record)})))
    manager.wait_until_finished()
    with pytest.raises(ValueError, match="none of the checkpoints"):
      checkpoint.restore_newest(manager, template_of(make_state(0)))
  assert "checksums differ: params/out/bias" in caplog.text


def test_a_step_that_was_damaged_can_be_saved_and_damaged_again(workdir):
  for copies in (["6"], ["6", "6.1"]):
    flip(0.5)(workdir / "checkpoints" / "6")
    assert restore(workdir)[1]["step"] == 3
    with checkpoint.open_checkpoints(workdir) as manager:
      save(manager, 6)
    assert sorted(os.listdir(workdir / "checkpoints_damaged")) == copies
  state, record = restore(workdir)
  assert record["step"] == 6
  assert_bit_equal(state, make_state(6))


def test_the_step_can_be_saved_again_by_the_manager_that_found_the_damage(workdir):
  flip(0.5)(workdir / "checkpoints" / "6")
  with checkpoint.open_checkpoints(workdir) as manager:
    assert checkpoint.restore_newest(manager, template_of(make_state(0)))[1]["step"] == 3
    save(manager, 6)
    assert sorted(manager.all_steps()) == [3, 6]
  assert restore(workdir)[1]["step"] == 6


def test_a_damaged_checkpoint_is_moved_aside_in_a_bucket(bucket):
  folder = epath.Path("gs://bucket/run/checkpoints")
  manager = types.SimpleNamespace(directory=folder, reload=lambda: None)
  for name in ("6", "6.1"):
    for part in ("record/metadata", "state/d/0a"):
      (folder / "6" / part).write_text(part)
    checkpoint.set_aside(manager, 6)
    assert not (folder / "6").exists()
    aside = checkpoint.damaged_folder(manager) / name
    assert [(aside / part).read_text() for part in ("record/metadata", "state/d/0a")] == [
        "record/metadata", "state/d/0a"]


def test_when_all_are_damaged_the_run_says_so_and_deletes_nothing(workdir):
  for step in (3, 6):
    truncate(workdir / "checkpoints" / str(step))
  for _ in range(2):  # the second time there are none left, and the run must not begin anew
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be restored: all were damaged"):
      restore(workdir)
  assert sorted(os.listdir(workdir / "checkpoints_damaged")) == ["3", "6"]


def test_one_step_can_be_restored_by_number_and_its_damage_is_an_error(workdir):
  flip(0.5)(workdir / "checkpoints" / "6")
  with checkpoint.open_checkpoints(workdir) as manager:
    template = template_of(make_state(0))
    assert_bit_equal(checkpoint.restore_step(manager, 3, template)[0], make_state(3))
    with pytest.raises(Exception):  # noqa: B017 (Orbax's own where a file cannot be read)
      checkpoint.restore_step(manager, 6, template)


def test_an_interrupted_save_is_cleaned_up_and_its_step_can_be_saved_again(workdir, monkeypatch):
  root, temporary = workdir / "checkpoints", checkpoint.ocp.path.atomicity.AtomicRenameTemporaryPath

  async def stop(*_, **__):
    raise OSError("the process ends here")
  for interrupted, next_step, kept in ((9, 9, ["6", "9"]), (12, 15, ["15", "9"])):
    with checkpoint.open_checkpoints(workdir) as manager:
      monkeypatch.setattr(temporary, "finalize", stop)
      with pytest.raises(OSError, match="the process ends here"):
        save(manager, interrupted)
      monkeypatch.undo()
    assert any(path.is_file() for path in root.glob(f"{interrupted}.orbax-checkpoint-tmp*/**/*"))
    with checkpoint.open_checkpoints(workdir) as manager:
      found = checkpoint.restore_newest(manager, template_of(make_state(0)))[1]["step"]
      assert found == {9: 6, 12: 9}[interrupted]  # what is half saved is no checkpoint
      save(manager, next_step)
    assert sorted(os.listdir(root)) == kept
    assert restore(workdir)[1]["step"] == next_step


# --- which are kept


def test_the_two_newest_and_the_best_that_the_newest_knows_are_kept(tmp_path):
  def steps_after(best_steps):
    """Saves steps that know these best ones, each from a newly opened manager. Returns the steps kept."""
    for step, best_step in best_steps.items():
      with checkpoint.open_checkpoints(tmp_path) as manager:
        save(manager, step, best_step)
    return sorted(int(name) for name in os.listdir(tmp_path / "checkpoints"))

  with checkpoint.open_checkpoints(tmp_path) as manager:
    for step, best_step in {1: 0, 2: 1, 3: 2, 4: 2, 5: 2}.items():
      save(manager, step, best_step)
    assert sorted(manager.all_steps()) == [2, 4, 5]
  assert steps_after({6: 2, 7: 2}) == [2, 6, 7]
  assert steps_after({8: 7}) == [7, 8] and steps_after({9: 7, 10: 7}) == [7, 9, 10]
  assert steps_after({11: 10}) == [10, 11]


# --- checksums and hashes


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32])
def test_every_single_flipped_bit_changes_the_checksum(dtype):
  words = np.random.default_rng(0).integers(0, 2 ** 32, size=(3, 5), dtype=np.uint32)
  words[1, :3] = 0, 0x7FC00001, 0xFFFFFFFF  # zeros, not-a-numbers
  right = int(checkpoint.checksum_leaves(words.view(dtype)))
  for at in range(15):
    for bit in range(32):
      flipped = words.copy()
      flipped.flat[at] ^= np.uint32(1 << bit)
      assert int(checkpoint.checksum_leaves(flipped.view(dtype))) != right


def test_the_checksum_is_its_definition_and_knows_places():
  words = np.random.default_rng(1).integers(0, 2 ** 32, size=(4, 3, 2), dtype=np.uint32)
  expected = sum(int(word) * (2 * index * 0x9E3779B1 + 1) for index, word in enumerate(words.flat)) % 2 ** 32
  assert int(checkpoint.checksum_leaves(words)) == expected
  swapped = words.copy()
  swapped[0, 0], swapped[3, 2] = words[3, 2], words[0, 0]
  assert int(checkpoint.checksum_leaves(swapped)) != expected


def test_checksums_have_names_and_do_not_depend_on_the_devices():
  one, eight, both = (checkpoint.name_checksums(make_state(3, make(*shape))) for shape in ((1, 1), (1, 8), (2, 4)))
  assert one == eight == both and len(set(one.values())) == len(one) - 1  # step and Adam's count are equal
  assert {"step", "params/embedding/item_table", "opt_state/0/mu/out/bias", "window/loss"} <= one.keys()
  assert all(type(value) is int and 0 <= value < 2 ** 32 for value in one.values())
  assert checkpoint.name_checksums(make_state(4)) != one


def test_the_hash_of_parameters_is_of_float32_bytes_in_the_order_of_their_paths():
  params = {"b": {"z": jnp.float32([1, 2]), "a": jnp.float32([[3, 4], [5, 6]])}, "a": jnp.float32(7),
            "b-": jnp.float32([8]), "b0": jnp.float32(9)}
  order = [7, 8, 3, 4, 5, 6, 1, 2, 9]  # a, b-, b/a, b/z, b0
  expected = hashlib.sha256(np.array(order, "<f4").tobytes()).hexdigest()
  assert checkpoint.hash_arrays(params) == expected
  split = jax.device_put(make_state(1).params, meshes.shardings(make(2, 4), make_state(1).params))
  assert checkpoint.hash_arrays(split) == checkpoint.hash_arrays(make_state(1).params)


def test_the_hash_of_json_knows_content_not_order():
  a, b = {"x": 1, "y": [1, {"u": None, "v": 0.1}]}, {"y": [1, {"v": 0.1, "u": None}], "x": 1}
  assert checkpoint.hash_json(a) == checkpoint.hash_json(b)
  assert checkpoint.hash_json(a) != checkpoint.hash_json({"x": 1, "y": [1, {"u": None, "v": 0.2}]})


@pytest.mark.parametrize("texts", [
    [], [""], ["", ""], ["a"], ["Amélie (2001)", "", "千と千尋", "🎬 x", "\n", "a\0b", ""]])
def test_texts_come_back(texts):
  arrays = checkpoint.encode_texts(texts)
  assert checkpoint.decode_texts(arrays) == texts
  assert checkpoint.decode_texts(jax.tree.map(jnp.asarray, arrays)) == texts
  assert arrays["bytes"].dtype == np.uint8 and arrays["ends"].dtype == np.int32 and arrays["bytes"].size > 0


def test_texts_of_more_bytes_than_a_checkpoint_holds_are_refused(monkeypatch):
  monkeypatch.setattr(checkpoint, "MOST_BYTES", 5)
  checkpoint.encode_texts(["é", "abc"])
  with pytest.raises(ValueError, match="titles of 2 items have 6 bytes, and a checkpoint holds up to 5"):
    checkpoint.encode_texts(["é", "abcd"])
