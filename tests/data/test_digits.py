"""Digits: the split, the ranges, the labels."""

import sys

import numpy as np
import pytest

from isthmus.data.digits import Digits


def test_digits_are_split_once_and_for_all():
  pytest.importorskip("sklearn")
  train, held = (Digits().open(s) for s in ("train", "eval"))
  assert (len(train), len(held)) == (1437, 360)
  example = train[0]
  assert example["image"].shape == (8, 8, 1)
  assert example["image"].dtype == np.float32
  assert example["label"].dtype == np.int32
  images = np.concatenate([train.arrays["image"], held.arrays["image"]])
  labels = np.concatenate([train.arrays["label"], held.arrays["label"]])
  assert images.min() == 0 and images.max() == 1
  # All of the data set's images, each with its own label still.
  from sklearn.datasets import load_digits

  digits = load_digits()
  keys = [(i.tobytes(), int(y)) for i, y in zip(images, labels, strict=True)]
  raw = (digits.images / 16).astype(np.float32)
  assert sorted(keys) == sorted(
    (i.tobytes(), int(y)) for i, y in zip(raw, digits.target, strict=True)
  )
  # Every class is held out about as often as it occurs.
  assert np.bincount(held.arrays["label"]).min() > 20
  again = Digits().open("eval")
  np.testing.assert_array_equal(again.arrays["image"], held.arrays["image"])


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[data\]'"):
    Digits().open("train")
