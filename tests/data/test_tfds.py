"""TFDS without TensorFlow: own builders, one preparation, damage named."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest

from isthmus.data.loader import Loader
from isthmus.data.tfds import Tfds

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def builder():
  from tests.data.squares import Squares

  return Squares


def check(data):
  train, held = data.open("train"), data.open("eval")
  assert (len(train), len(held)) == (20, 5)
  labels = set()
  for i in range(20):
    example = train[i]
    label = int(example["label"])
    labels.add(label)
    assert example["image"].dtype == np.uint8
    assert (example["image"] == label).all()
    assert example["nested/square"] == label**2
    assert example["text"] == f"{label} squared ünd".encode()
  assert labels == set(range(20))


def test_own_builder_prepares_and_reads_without_tensorflow(builder, tmp_path):
  data = Tfds(builder, data_dir=tmp_path)
  check(data)
  check(data)  # now from what is on disk
  check(Tfds("squares", data_dir=tmp_path))  # and by name
  ten = Tfds(builder, data_dir=tmp_path, train="train[:50%]")
  assert len(ten.open("train")) == 10
  assert "tensorflow" not in sys.modules


def test_batches_of_a_tfds_source(builder, tmp_path):
  drop = lambda e, rng: {k: v for k, v in e.items() if k != "text"}
  loader = Loader(
    Tfds(builder, data_dir=tmp_path).open("train"),
    batch_size=8,
    seed=0,
    transform=drop,
  )
  batch = loader.batch(0)
  assert batch["image"].shape == (8, 4, 4, 1)
  square, label = np.asarray(batch["nested/square"]), batch["label"]
  np.testing.assert_array_equal(square, np.asarray(label) ** 2)


def test_leftovers_of_killed_preparations_are_removed(builder, tmp_path):
  left = tmp_path / "squares" / "incomplete.ABCDEF_1.0.0"
  other = tmp_path / "squares" / "incomplete.ABCDEF_2.0.0"
  for folder in (left, other):
    folder.mkdir(parents=True)
    (folder / "part").write_text("half")
  check(Tfds(builder, data_dir=tmp_path))
  assert not left.exists() and other.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_file_is_named_with_the_remedy(builder, tmp_path, damage):
  data = Tfds(builder, data_dir=tmp_path)
  data.open("train")
  (path,) = (tmp_path / "squares" / "1.0.0").glob("*train*array_record*")
  size = path.stat().st_size
  if damage == "missing":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=rf"train.*{size}; delete .*1.0.0"):
    data.open("train")


def test_flipped_byte_is_named_with_the_remedy(builder, tmp_path):
  source = Tfds(builder, data_dir=tmp_path).open("train")
  (path,) = (tmp_path / "squares" / "1.0.0").glob("*train*array_record*")
  content = bytearray(path.read_bytes())
  content[100] ^= 0xFF
  path.write_bytes(content)
  with pytest.raises(RuntimeError, match="1.0.0.*delete that data set's fol"):
    source = Tfds(builder, data_dir=tmp_path).open("train")
    source.__getitems__(list(range(20)))


@pytest.mark.parametrize("size", [0, 1000, 65536, 65537, 100000, 131071])
def test_cut_off_file_that_someone_else_prepared(builder, tmp_path, size):
  """No sizes were noted; cut at 65536, the file opens and is empty."""
  data = Tfds(builder, data_dir=tmp_path)
  data.open("train")
  folder = tmp_path / "squares" / "1.0.0"
  (folder / "isthmus_sizes.json").unlink()
  check(data)
  (path,) = folder.glob("*train*array_record*")
  assert path.stat().st_size == 131072
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(RuntimeError, match="train.array_record.*delete") as info:
    data.open("train")
  assert "\n" not in str(info.value)


def test_fewer_examples_than_were_prepared(builder, tmp_path):
  data = Tfds(builder, data_dir=tmp_path)
  data.open("train")
  folder = tmp_path / "squares" / "1.0.0"
  (folder / "isthmus_sizes.json").unlink()
  (train,) = folder.glob("*train*array_record*")
  (held,) = folder.glob("*test*array_record*")
  train.write_bytes(held.read_bytes())  # whole, but not the right one
  with pytest.raises(ValueError, match="train.* holds 5 examples, .* with 20"):
    data.open("eval")


@pytest.mark.parametrize("content", ["", '{"splits": [', "[]", "{}"])
def test_damaged_description_is_named(builder, tmp_path, content):
  Tfds(builder, data_dir=tmp_path).open("train")
  path = tmp_path / "squares" / "1.0.0" / "dataset_info.json"
  path.write_text(content)
  for named in (builder, "squares"):
    with pytest.raises(RuntimeError, match="dataset_info.json.*delete") as info:
      Tfds(named, data_dir=tmp_path).open("train")
    assert "\n" not in str(info.value)


def test_unknown_name_is_left_to_tfds(tmp_path):
  with pytest.raises(Exception, match="no_such_set"):
    Tfds("no_such_set", data_dir=tmp_path).open("train")


def test_example_that_its_decoder_refuses_is_named(builder, tmp_path):
  source = Tfds(builder, data_dir=tmp_path).open("train")

  class Refusing:
    def __len__(self):
      return 1

    def __getitems__(self, indices):
      raise ValueError("no such\nimage")

  bad = dataclasses.replace(source, data=Refusing())
  with pytest.raises(RuntimeError, match=r"1.0.0' \(no such image\); delete"):
    bad[0]
  with pytest.raises(IndexError, match=r"index 1 is outside \[0, 1\)"):
    bad[1]


PREPARE = """
import pathlib, sys, time
from tests.data.squares import Squares
from isthmus.data.tfds import Tfds
folder, me = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{me}").touch()
while not (folder / "go").exists(): time.sleep(0.01)
source = Tfds(Squares, data_dir=folder / "data").open("train")
assert len(source) == 20
assert "tensorflow" not in sys.modules
"""


@pytest.mark.process
def test_two_processes_prepare_once(builder, tmp_path, monkeypatch):
  monkeypatch.setenv("SQUARES_LOG", str(tmp_path))
  workers = [
    subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path), str(i)])
    for i in range(2)
  ]
  deadline = time.monotonic() + 120
  while len(list(tmp_path.glob("ready-*"))) < 2:
    assert time.monotonic() < deadline
    assert all(worker.poll() is None for worker in workers)
    time.sleep(0.02)
  (tmp_path / "go").touch()
  assert [worker.wait(120) for worker in workers] == [0, 0]
  assert len(list(tmp_path.glob("prepared-*"))) == 1


@pytest.mark.parametrize(
  "package", ["tensorflow_datasets", "array_record", "importlib_resources"]
)
def test_missing_package_names_the_extra(package, monkeypatch, builder):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"{package}.*'isthmus\[data\]'"):
    Tfds(builder).open("train")
