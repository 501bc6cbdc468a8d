"""Readers: every format, what is refused and how, downloads, and TFDS. No network and no TensorFlow."""

import functools
import hashlib
import http.server
import os
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import requests
from conftest import raw_rows

from awrsr_jax.config import default
from awrsr_jax.data import from_tfds, log, movielens, readers, text

SHARED = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
RATINGS_DAT = "7::10::5::300\n7::20::4::100\n3::10::3::200\n"
MOVIES_DAT = "10::Café (1995)::Drama\n20::Two::Comedy|Drama\n"


def write(folder, name, content):
  """Writes a file and returns its path."""
  path = os.path.join(folder, name)
  with open(path, "wb") as file:
    file.write(content if isinstance(content, bytes) else content.encode("latin-1"))
  return path


def read_data(data):
  """Reads what `config.data` names, with all that is checked of its rows."""
  found = readers.read(log.open_database(), data)
  rows = log.clean(found, data.min_rating, data.on_bad_row)
  return found, rows


def read(path, form="auto", on_bad_row="error"):
  """Reads a path as `config.data` would."""
  data = default().data
  data.path, data.format, data.on_bad_row = str(path), form, on_bad_row
  return read_data(data)[0]


def columns(found):
  """Returns users, items and times in raw ids, as lists; the times None where all are 0."""
  number = lambda raw: int(raw) if str(raw).isdigit() else raw  # noqa: E731
  users, items, times = map(list, zip(*raw_rows(found.database), strict=True))
  return list(map(number, users)), list(map(number, items)), times if any(times) else None


def test_sequences(tmp_path):
  path = write(tmp_path, "a.txt", "5 3 1 3\r\n\n2\t9  8\n")
  assert readers.detect_format(path) == "sequences"
  assert columns(read(path)) == ([5, 5, 5, 2, 2], [3, 1, 3, 9, 8], None)


def test_byte_order_mark_is_dropped(tmp_path):
  assert columns(read(write(tmp_path, "a.txt", b"\xef\xbb\xbf5 3 1\n"))) == ([5, 5], [3, 1], None)


def test_pairs(tmp_path):
  path = write(tmp_path, "a.txt", "5 3\n2 9\n\n5 1\n")
  assert readers.detect_format(path) == "pairs"
  assert columns(read(path)) == ([5, 2, 5], [3, 9, 1], None)


@pytest.mark.parametrize("form, content, parts", [
    ("sequences", "1 2 3\n\n2 4 abc\n", [":3:", "'abc' is not a number"]),
    ("sequences", "1 2 3.5\n", [":1:", "'3.5' is not a number"]),
    ("sequences", "1 2 3\n2 0 4\n", [":2:", "item id 0 is below 1"]),
    ("sequences", "1 2 3\n2 4 -7\n", [":2:", "item id -7 is below 1"]),
    ("sequences", "1 2 3\n0 4 5\n", [":2:", "user id 0 is below 1"]),
    ("sequences", "1 2 99999999999999999999\n", [":1:", "'99999999999999999999' is too large for 64 bits"]),
    ("sequences", "1 2 3\n\n8\n", [":3:", "user 8 has no items"]),
    ("sequences", "4 2 3\n5 1 2\n4 5 6\n", [":3:", "user 4 is already on line 1", "--config.data.format=pairs"]),
    ("sequences", "\n \n", ["has no lines", "--config.data.path"]),
    ("sequences", "", ["has no lines (0 bytes)"]),
    ("sequences", b"1 2 3\n2 \xff 4\n", [":2:", "0xff is not utf-8"]),
    ("auto", b"1 2 3\n2 \xff 4\n", [":2:", "0xff is not utf-8"]),
    ("auto", "", ["has no lines"]),
    ("pairs", "1 2\n3 4 5\n", [":2:", "3 columns", "--config.data.format=sequences"]),
    ("pairs", "1 2\n3 x\n", [":2:", "'x' is not a number"]),
    ("pairs", "1 2\n3 0\n", [":2:", "item id 0 is below 1"]),
])
def test_bad_text_is_refused_with_its_place(tmp_path, form, content, parts):
  path = write(tmp_path, "a.txt", content)
  with pytest.raises(ValueError) as error:
    read(path, form)
  assert all(part in str(error.value) for part in [path, *parts]), error.value


@pytest.mark.parametrize("name, content, kind", [
    ("ratings.dat", RATINGS_DAT, "ratings.dat"),
    ("part.txt", RATINGS_DAT, "ratings.dat"),
    ("u.data", RATINGS_DAT.replace("::", "\t"), "u.data"),
    ("part.tsv", RATINGS_DAT.replace("::", "\t"), "u.data"),
    ("ratings.csv", "userId,movieId,rating,timestamp\n" + RATINGS_DAT.replace("::", ",").replace("5", "3.5"),
     "ratings.csv"),
    ("other.csv", "userId,movieId,rating,timestamp\n" + RATINGS_DAT.replace("::", ","), "ratings.csv"),
])
def test_movielens_rows_keep_file_order(tmp_path, name, content, kind):
  path = write(tmp_path, name, content)
  assert movielens.detect(path) == kind and readers.detect_format(path) == "movielens"
  found = read(path)
  assert columns(found) == ([7, 7, 3], [10, 20, 10], [300, 100, 200]) and found.titles == {}


def test_text_that_is_not_movielens_is_not_taken_for_it(tmp_path):
  assert movielens.detect(write(tmp_path, "a", "1 2 3 4\n")) is None
  assert movielens.detect(write(tmp_path, "b", "1\t2\t3\t4\n2\t3\t4\t5\t6\n")) is None
  with pytest.raises(ValueError, match="is not MovieLens.*--config.data.format=sequences"):
    read(write(tmp_path, "c", "1 2 3 4\n"), "movielens")


@pytest.mark.parametrize("ratings, titles, content, encoding", [
    ("ratings.dat", "movies.dat", MOVIES_DAT, "latin-1"),
    ("u.data", "u.item", MOVIES_DAT.replace("|", "/").replace("::", "|"), "latin-1"),
    ("ratings.csv", "movies.csv", 'movieId,title,genres\n10,Café (1995),Drama\n20,"Two",Comedy\n', "utf-8"),
])
@pytest.mark.parametrize("packed", [False, True])
def test_titles_beside_the_ratings(tmp_path, ratings, titles, content, encoding, packed):
  separator = movielens.FILES[ratings][0]
  rows = ("userId,movieId,rating,timestamp\n" if separator == "," else "") + RATINGS_DAT.replace("::", separator)
  if packed:
    path = os.path.join(tmp_path, "ml.zip")
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("ml-x/README", "")
      archive.writestr(f"ml-x/{titles}", content.encode(encoding))
      archive.writestr(f"ml-x/{ratings}", rows)
  else:
    write(tmp_path, ratings, rows)
    write(tmp_path, titles, content.encode(encoding))
    path = str(tmp_path)
  found = read(path)
  assert found.titles == {"10": "Café (1995)", "20": "Two"}
  assert columns(found) == ([7, 7, 3], [10, 20, 10], [300, 100, 200])


@pytest.mark.parametrize("row, reason", [
    ("7::20::4", "Expected Number of Columns: 4 Found: 3"),
    ("7::20::4::1::2", "Expected Number of Columns: 4 Found: 5"),
    ("7::20::4::late", "time='late'"), ("7::::4::100", "item=none"), ("7::20::4::", "time=none")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_movielens_row_is_refused_with_its_place_or_left_out(tmp_path, row, reason, packed, caplog):
  content = f"7::10::5::300\n\n{row}\n3::10::3::200\n"
  path = write(tmp_path, "ratings.dat", content)
  if packed:
    path = os.path.join(tmp_path, "ml.zip")
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("ml/ratings.dat", content)
  with pytest.raises(ValueError) as error:
    read(path)
  for part in (f"{path}{'/ml/ratings.dat' if packed else ''}:3: {row!r}", reason, "--config.data.on_bad_row=skip"):
    assert part in str(error.value), error.value
  assert columns(read(path, on_bad_row="skip"))[0] == [7, 3] and "bad and were left out" in caplog.text


def test_the_header_of_a_csv_counts_as_a_line(tmp_path):
  path = write(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,4\n1,,3.5,4\n")
  with pytest.raises(ValueError, match="ratings.csv:3: '1,,3.5,4': user='1', item=none"):
    read(path)


def test_empty_movielens_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"u.data has no interactions \(0 rows"):
    read(write(tmp_path, "u.data", "\n"))


def test_a_truncated_zip_is_refused(tmp_path):
  path = os.path.join(tmp_path, "ml.zip")
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("ml/ratings.dat", RATINGS_DAT * 1000)
  with open(path, "rb") as file:
    whole = file.read()
  with pytest.raises(ValueError, match=r"cut.zip \(\d+ bytes\) is truncated or damaged.*--config.data.path"):
    read(write(tmp_path, "cut.zip", whole[:len(whole) // 2]))
  damaged = whole[:80] + bytes([whole[80] ^ 255]) + whole[81:]
  with pytest.raises(ValueError, match="bad.zip.*truncated or damaged"):
    read(write(tmp_path, "bad.zip", damaged))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("ml/else.txt", "")
  with pytest.raises(ValueError, match="ml.zip holds none of ratings.dat.*else.txt"):
    read(path)


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no such file or folder.*--config.data.path=.*nowhere"):
    read(os.path.join(tmp_path, "nowhere"))
  with pytest.raises(ValueError, match="holds no table and none of ratings.dat, u.data, ratings.csv; .*pattern"):
    read(tmp_path)
  with pytest.raises(ValueError, match="cannot read .*Is a directory"):
    read(tmp_path, "sequences")


@pytest.mark.parametrize("name, form", [("", "auto"), ("beauty", "auto"), ("sports", "auto"), ("ml-1m", "pairs")])
def test_nothing_to_read_names_the_flag(name, form):
  data = default().data
  data.name, data.format = name, form
  with pytest.raises(ValueError, match="nothing to read.*--config.data.path=FILE"):
    read_data(data)


def test_the_shared_raw_files():
  path = os.path.join(SHARED, "raw", "ml-100k.u.data")
  if not os.path.exists(path):
    pytest.skip("needs ../shared/data/raw/ml-100k.u.data, which is not distributed")
  users, items, times = columns(read(path))
  assert len(users) == 100000 and len(set(users)) == 943 and len(set(items)) == 1682
  assert (users[0], items[0], times[0]) == (196, 242, 881250949)


def fail(*_, **__):
  """Stands for a machine without a network."""
  raise requests.ConnectionError("no network (test)")


def test_without_a_network_the_error_comes_at_once_and_names_the_flag(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setattr(requests, "head", fail)
  data = default().data
  data.name = "ml-1m"
  start = time.monotonic()
  with pytest.raises(ValueError, match=r"cannot reach https://files.*ml-1m.zip: no network.*--config.data.path=FILE"):
    read_data(data)
  monkeypatch.setattr(from_tfds, "check_reachable", lambda *_: None)  # the network goes after the check
  monkeypatch.setattr(tfds.download.DownloadManager, "download", fail)
  with pytest.raises(ValueError, match="cannot download .*ml-1m.zip.*no network.*--config.data.path=FILE"):
    read_data(data)
  assert time.monotonic() - start < 5


def test_a_network_that_swallows_everything_is_given_up(monkeypatch):
  monkeypatch.setattr(from_tfds, "TIMEOUT_SECONDS", 0.1)
  monkeypatch.setattr(requests, "head", lambda *_, **__: time.sleep(1) or fail())
  start = time.monotonic()
  with pytest.raises(ValueError, match="no answer within 0.2 s; the way out"):
    from_tfds.check_reachable("https://example.invalid", "the way out")
  assert time.monotonic() - start < 0.9


def test_a_download_is_hashed_kept_and_hashed_again(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
  served = tmp_path / "served"
  served.mkdir()
  with zipfile.ZipFile(served / "ml-tiny.zip", "w") as archive:
    archive.writestr("ml-tiny/ratings.dat", RATINGS_DAT)
  content = (served / "ml-tiny.zip").read_bytes()
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
  monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f"http://127.0.0.1:{server.server_address[1]}/ml-tiny.zip"
  right = (url, len(content), hashlib.sha256(content).hexdigest())
  try:
    with pytest.raises(ValueError, match="is not the expected file.*--config.data.path=FILE"):
      from_tfds.fetch(url, len(content), "0" * 64)
    with pytest.raises(ValueError, match="cannot download.*404.*--config.data.path=FILE"):
      from_tfds.fetch(url.replace("tiny", "none"), 1, "0" * 64)
    monkeypatch.setitem(movielens.DOWNLOADS, "ml-tiny", right)
    data = default().data
    data.name = "ml-tiny"
    assert columns(read_data(data)[0]) == ([7, 7, 3], [10, 20, 10], [300, 100, 200])
  finally:
    server.shutdown()
    server.server_close()
  kept = from_tfds.fetch(*right)  # the server is gone
  with open(kept, "ab") as file:
    file.write(b"x")
  with pytest.raises(ValueError, match="sha256 is .*remove it and run again"):
    from_tfds.fetch(*right)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A prepared TFDS data set of 40 rows, two of a user's neighbours tied in time, and its rows."""
  import tensorflow_datasets as tfds
  rows = [(f"u{n % 4}", n % 7 + 1, 1000 + n // 8, f"Title {n % 7 + 1}", 0.5, [n, n]) for n in range(40)]

  class TinyRatings(tfds.core.GeneratorBasedBuilder):
    """Rows made here."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
          "user_id": tfds.features.Text(), "movie_id": np.int64, "score": np.float32,
          "pair": tfds.features.Tensor(shape=(2,), dtype=np.int64),
          "when": {"timestamp": np.int64}, "title": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for at, (user, item, seconds, title, score, pair) in enumerate(rows):
        yield at, {"user_id": user, "movie_id": item, "when": {"timestamp": seconds}, "title": title, "score": score,
                   "pair": pair}

  builder = TinyRatings(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
  builder.download_and_prepare()
  return str(builder.data_dir), rows


def tfds_data(path):
  """Returns `config.data` for the prepared set."""
  data = default().data
  data.path, data.format = path, "tfds"
  data.columns.update(user="user_id", item="movie_id", time="when/timestamp", title="title")
  return data


def test_tfds_rows_are_read_without_tensorflow(prepared, caplog):
  path, rows = prepared
  found = read_data(tfds_data(path))[0]
  assert sorted(zip(*columns(found), strict=True)) == sorted(row[:3] for row in rows)
  assert found.titles == {str(n): f"Title {n}" for n in range(1, 8)}
  assert "20 of 36 neighbours in a history have equal times" in caplog.text
  assert "tensorflow" not in sys.modules
  data = tfds_data(path)
  data.format, data.columns.title = "auto", ""
  again = read_data(data)[0]
  assert columns(again) == columns(found) and again.titles == {}


@pytest.mark.parametrize("key, value, parts", [
    ("user", "nobody", ["no column 'nobody'", "movie_id", "when/timestamp", "--config.data.columns.user=NAME"]),
    ("time", "", ["which of the columns", "--config.data.columns.user=NAME", ".time=NAME"]),
    ("time", "title", ["'title' is not a time"]),
    ("item", "pair", ["'pair' has 80 values in 40 records"]),
    ("split", "test", ["no split 'test', but ['train']", "--config.data.tfds.split=NAME"]),
])
def test_tfds_fields_that_do_not_fit_are_refused(prepared, key, value, parts):
  data = tfds_data(prepared[0])
  (data.tfds if key == "split" else data.columns)[key] = value
  with pytest.raises(ValueError) as error:
    read_data(data)
  assert all(part in str(error.value) for part in parts), error.value


def test_tfds_sets_that_are_not_there_are_refused(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setattr(requests, "head", fail)
  with pytest.raises(ValueError, match="not a prepared TFDS data set.*dataset_info.json"):
    read_data(tfds_data(str(tmp_path)))
  data = tfds_data("")
  with pytest.raises(ValueError, match="needs --config.data.tfds.name=NAME"):
    read_data(data)
  data.tfds.name = "no_such_data_set_anywhere"
  with pytest.raises(ValueError, match="TFDS knows no data set 'no_such_data_set_anywhere'"):
    read_data(data)
  data.tfds.name = "movielens/100k-ratings"
  data.format = "auto"
  with pytest.raises(ValueError, match="cannot reach .*not prepared in .*array_record.*--config.data.path"):
    read_data(data)


def test_ids_are_located_by_line():
  with pytest.raises(ValueError, match="f:9: item id -1 is below 1"):
    text.check_ids(np.array([3, -1]), "item", [4, 9], "f")


def test_one_long_text_of_tfds_does_not_fill_the_memory():
  column = [b"x" * 100_000, b"a\0", "ü".encode(), *[b"a"] * 1000]
  found = from_tfds._to_array(column, "title", "it")
  assert found.nbytes < 1 << 20 and found[1:4].tolist() == ["a\0", "ü", "a"]
