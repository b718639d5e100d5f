"""Photographs: crops of the package's pictures, whole pictures held out."""

import sys

import numpy as np
import pytest

from isthmus.data import photos
from isthmus.data.package import package_file
from isthmus.data.photos import Photographs

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")


def test_crops_are_where_they_say_and_photographs_are_not_shared():
  data = Photographs(size=96, stride=80)
  sources = {split: data.open(split) for split in ("train", "eval")}
  for split, source in sources.items():
    files = photos._FILES[split]
    assert set(source.rows[:, 0]) == set(range(len(files)))
    rng = np.random.default_rng(0)
    for i in rng.integers(len(source), size=5).tolist():
      photo, y, x = source.rows[i]
      path = package_file(
        "skimage", f"data/{files[photo]}", name="test", extra="data"
      )
      with Image.open(path) as file:
        cut = file.convert("RGB").crop((x, y, x + 96, y + 96))
      image = source[i]["image"]
      assert image.dtype == np.float32 and image.max() <= 1
      np.testing.assert_array_equal(image, np.float32(cut) / 255)
  assert not set(photos._FILES["train"]) & set(photos._FILES["eval"])
  # A picture is a photograph, not an accident: neighbours are alike.
  image = sources["eval"][0]["image"]
  assert 0 < np.abs(np.diff(image, axis=1)).mean() < image.std()


def test_stride_counts_the_crops():
  # coffee is 400 x 600 pixels, rocket 427 x 640.
  assert len(Photographs(size=200).open("eval")) == 2 * 3 + 2 * 3
  dense = Photographs(size=400, stride=10).open("eval")
  assert len(dense) == 1 * 21 + 3 * 25


def test_skimage_is_not_imported():
  before = set(sys.modules)
  Photographs(size=300).open("eval")
  assert "skimage" not in set(sys.modules) - before


def test_sizes_that_cannot_be(monkeypatch):
  with pytest.raises(ValueError, match="size is 301; chelsea.png is 300 x 451"):
    Photographs(size=301).open("train")
  with pytest.raises(ValueError, match="size is 0"):
    Photographs(size=0)
  with pytest.raises(ValueError, match="stride is 0"):
    Photographs(size=8, stride=0)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"scikit-image: .*'isthmus\[data\]'"):
    Photographs(size=8).open("train")
