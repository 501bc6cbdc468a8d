"""Owns everything that touches tensorflow-datasets (TFDS): downloads, and reading any prepared data set.

TFDS takes about a second to import, so it is imported inside the functions that need it. TensorFlow is never imported
here: records are read as bytes and decoded as `tf.train.Example` messages by TFDS's own protocol buffers.
"""

import hashlib
import logging
import os
import threading
from typing import Any

import ml_collections
import numpy as np

from awrsr_jax.data.columns import choose_columns
from awrsr_jax.data.log import Interactions
from awrsr_jax.foreign import parse_json

LOG = logging.getLogger(__name__)
TIMEOUT_SECONDS = 5.0  # to find a host, to connect and to be answered, each
BULK = 8192  # records asked for at a time
OWN = "tensorflow_datasets.core.features."  # where its kinds of fields are


def fetch(url: str, size: int, sha256: str) -> str:
  """Downloads a file once with TFDS's download manager, into TFDS's own download folder.

  Args:
    url: an http(s) address.
    size: expected bytes.
    sha256: expected hash, hexadecimal.

  Returns:
    The local file; a file that is already there is hashed again, which TFDS itself does not do.

  Raises:
    ValueError: the host cannot be reached (within seconds), or the content is not the expected one.
  """
  import tensorflow_datasets as tfds
  folder = os.path.join(tfds.core.constants.DATA_DIR, "downloads")
  way_out = "download it yourself and set --config.data.path=FILE"
  if not _is_cached(folder, url, sha256):
    check_reachable(url, way_out)
  info = tfds.download.checksums.UrlInfo(size=size, checksum=sha256, filename=os.path.basename(url))
  try:
    path = os.fspath(tfds.download.DownloadManager(download_dir=folder, url_infos={url: info}).download(url))
  except tfds.download.download_manager.NonMatchingChecksumError as error:
    raise ValueError(f"{url} is not the expected file ({size} bytes, sha256 {sha256}): {' '.join(str(error).split())}; "
                     f"try again, or {way_out}") from error
  except Exception as error:  # requests, urllib3, TFDS and the file system each raise their own
    raise ValueError(f"cannot download {url} into {folder}: {error}; {way_out}") from error
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != sha256:
    raise ValueError(f"{path} was downloaded from {url} but its sha256 is {found}, not {sha256}; remove it and run "
                     f"again, or {way_out}")
  return path


def check_reachable(url: str, way_out: str) -> None:
  """Refuses at once what a download manager finds out only after minutes of retries: that there is no network.

  Args:
    url: an http(s) address; proxies from the environment are used.
    way_out: end of the message.

  Raises:
    ValueError: no answer of any kind in a few times `TIMEOUT_SECONDS`.
  """
  import requests  # comes with TFDS, and is slow to import too

  failure: list[Any] = [f"no answer within {2 * TIMEOUT_SECONDS:g} s"]

  def ask() -> None:
    try:
      requests.head(url, timeout=TIMEOUT_SECONDS).close()
      failure[0] = None
    except requests.RequestException as error:
      failure[0] = error

  thread = threading.Thread(target=ask, daemon=True)  # looking up a host name has no time-out of its own
  thread.start()
  thread.join(2 * TIMEOUT_SECONDS)
  if failure[0] is not None:
    raise ValueError(f"cannot reach {url}: {failure[0]}; {way_out}")


def read_tfds(data: ml_collections.ConfigDict) -> Interactions:
  """Reads user, item and time of every record of a TFDS data set; one that is not prepared yet is prepared.

  Args:
    data: `config.data`: `path` (folder of a prepared data set) or else `tfds.name`; `tfds.split`, and the names of the
      fields in `columns` ("a/b" for a nested one).

  Returns:
    Rows in the order stored, which is not the order they had in their source.

  Raises:
    ValueError: no such data set, split or field, or it is not prepared and cannot be.
  """
  builder = _open_folder(data.path) if data.path else _open_name(data.tfds.name)
  name = f"TFDS data set {builder.info.full_name}"
  split = data.tfds.split
  chosen = choose_columns(sorted(_list_fields(builder.info.features)), data.columns, name)
  if split not in builder.info.splits:
    raise ValueError(f"{name} has no split {split!r}, but {sorted(builder.info.splits)}; set "
                     "--config.data.tfds.split=NAME")
  found = _read_columns(builder, split, list(chosen.values()))
  columns = {key: _to_array(found[field], field, name) for key, field in chosen.items()}
  times = columns["time"]
  if times.dtype.kind not in "if" or not np.isfinite(times).all():
    raise ValueError(f"{name}: field {chosen['time']!r} is not a time (a finite number) in every record; "
                     "set --config.data.columns.time=FIELD")
  titles = {}
  if "title" in columns:
    titles = dict(zip(columns["item"].tolist(), map(str, columns["title"].tolist()), strict=True))
  _warn_of_ties(columns["user"], times, name)
  return Interactions(columns["user"], columns["item"], times, titles, name, columns.get("rating"))


def _is_cached(folder: str, url: str, sha256: str) -> bool:
  """Returns whether TFDS's download manager has a file already."""
  import tensorflow_datasets as tfds
  resource = tfds.download.resource
  return resource.is_locally_cached(tfds.core.Path(folder) / resource.get_dl_fname(url, sha256))


def _check_features(path: str) -> None:
  """Refuses fields of classes that are not TFDS's own: TFDS imports whatever module features.json names.

  Raises:
    ValueError: there is one, or the file cannot be read.
  """
  with open(os.path.join(path, "features.json"), "rb") as file:
    waiting = [parse_json(file.read(), "features.json")]
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      waiting += value.values()
      for key in ("pythonClassName", "python_class_name", "type"):
        if isinstance(name := value.get(key), str) and not name.startswith(OWN):
          raise ValueError(f"features.json names {name!r}, and only features of TFDS itself are read")
      if isinstance(content := value.get("content"), str):  # JSON once more
        waiting.append(parse_json(content, "features.json"))
    elif isinstance(value, list):
      waiting += value


def _open_folder(path: str) -> Any:
  """Returns the builder of a prepared data set in a folder."""
  import tensorflow_datasets as tfds
  try:
    _check_features(path)
    return tfds.builder_from_directory(path)
  except Exception as error:  # TFDS raises its own kinds, and a bare AssertionError
    raise ValueError(f"{path} is not a prepared TFDS data set: {error or type(error).__name__}; give the folder that "
                     "holds dataset_info.json, --config.data.path=DATA_DIR/NAME/CONFIG/VERSION") from error


def _open_name(name: str) -> Any:
  """Returns the builder of a data set by name, prepared now if it was not."""
  import tensorflow_datasets as tfds
  if not name:
    raise ValueError("config.data.format=tfds needs --config.data.tfds.name=NAME, or --config.data.path=FOLDER of a "
                     "prepared data set")
  try:
    if ":" in name:
      raise ValueError("what follows a colon is a data set of others, which TFDS makes by running their code")
    builder = tfds.builder(name)
  except Exception as error:
    raise ValueError(f"TFDS knows no data set {name!r}: {error or type(error).__name__}; set "
                     "--config.data.tfds.name=NAME, or --config.data.path=FOLDER of a prepared one") from error
  if not builder.is_prepared():
    _prepare(builder, name)
  return builder


def _prepare(builder: Any, name: str) -> None:
  """Downloads and prepares a data set as array_record, the format that reads without TensorFlow."""
  import tensorflow_datasets as tfds
  folder = os.path.join(tfds.core.constants.DATA_DIR, "downloads")
  way_out = ("prepare it with file_format='array_record' on a machine that has network access and, if the data set "
             "needs it, TensorFlow, and set --config.data.format=tfds --config.data.path=FOLDER; for MovieLens, give "
             "the raw file or zip with --config.data.path=FILE")
  urls = builder.url_infos or {}
  if urls and not any(_is_cached(folder, url, info.checksum) for url, info in urls.items()):
    check_reachable(next(iter(urls)), f"TFDS data set {name} is not prepared in {builder.data_dir}; {way_out}")
  try:
    builder.download_and_prepare(file_format="array_record")
  except Exception as error:
    raise ValueError(f"TFDS data set {name} is not prepared in {builder.data_dir} and cannot be prepared here: "
                     f"{error or type(error).__name__}; {way_out}") from error


def _list_fields(features: Any, prefix: str = "") -> list[str]:
  """Returns the names that fields have in a stored record: nested ones joined by "/"."""
  if not hasattr(features, "items"):
    return [prefix.rstrip("/")]
  return [field for key, value in features.items() for field in _list_fields(value, f"{prefix}{key}/")]


def _read_columns(builder: Any, split: str, fields: list[str]) -> dict[str, list[Any]]:
  """Returns the values of some fields of all records, in stored order."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2
  try:
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw)
    columns: dict[str, list[Any]] = {field: [] for field in fields}
    for start in range(0, len(source), BULK):
      for record in source.__getitems__(range(start, min(start + BULK, len(source)))):
        features = tf_example_pb2.Example.FromString(record).features.feature
        for field, column in columns.items():
          feature = features[field]
          column.extend(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)
  except (NotImplementedError, ImportError, OSError, KeyError) as error:
    raise ValueError(f"cannot read TFDS data set {builder.info.full_name} in {builder.data_dir}: {error}; formats that "
                     "need TensorFlow (tfrecord) are not read: prepare it with file_format='array_record'") from error
  for field, column in columns.items():
    if len(column) != len(source):
      raise ValueError(f"TFDS data set {builder.info.full_name}: field {field!r} has {len(column)} values in "
                       f"{len(source)} records; a field with one value a record is needed")
  return columns


def _to_array(column: list[Any], field: str, name: str) -> np.ndarray:
  """Returns a column as (N,) int64, float64 or text of any length."""
  if column and isinstance(column[0], bytes):
    try:
      return np.array([value.decode() for value in column], np.dtypes.StringDType())  # str: all as long as the longest
    except UnicodeDecodeError as error:
      raise ValueError(f"{name}: field {field!r} is not text: {error}") from error
  return np.array(column)


def _warn_of_ties(users: np.ndarray, times: np.ndarray, name: str) -> None:
  """Logs how many neighbours of a history have the same time: TFDS shuffles what it stores, so their order is lost."""
  user = np.unique(users, return_inverse=True)[1]
  order = np.lexsort((times, user))
  same_user = np.diff(user[order]) == 0
  ties = int((same_user & (np.diff(times[order]) == 0)).sum())
  if ties:
    LOG.warning("%s: %d of %d neighbours in a history have equal times; TFDS does not keep the order of its source,"
                    " so theirs is arbitrary. A raw file given by --config.data.path keeps it.", name, ties,
                    int(same_user.sum()))
