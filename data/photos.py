"""Crops of real photographs that ship with a package."""

import dataclasses
import functools
import pathlib

import numpy as np
from jaxtyping import Int, UInt8

from isthmus.data.package import package_file
from isthmus.data.source import Example, check_split

# Both eyes of the motorcycle's stereo pair are on one side.
_FILES = {
  "train": (
    *("astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "ihc.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
  ),
  "eval": ("coffee.png", "rocket.jpg"),
}


@dataclasses.dataclass(frozen=True)
class Photographs:
  """Square crops of scikit-image's colour photographs.

  An example holds image float32 [size, size, 3] in [0, 1]. To train on: an
  astronaut, a cat, a galaxy field, stained tissue, a motorcycle from its left
  and its right, a retina; held out, as whole photographs: a cup of coffee, a
  rocket on its pad. They are 300 x 451 to 1411 x 1411 pixels; the crops are
  taken from a grid, so a stride of 1 gives every crop there is.

  Args:
    size: height and width of a crop, in pixels.
    stride: pixels from a crop to the next; None means the size.

  Raises:
    ValueError: size or stride below 1; when opened, a size larger than one
      of the photographs.
    ImportError: when opened, where scikit-image or pillow is missing.

  Example:
    >>> data = Photographs(size=64)
    >>> len(data.open("train")), data.open("eval")[0]["image"].shape
    (989, (64, 64, 3))

  Reference:
    van der Walt et al., scikit-image: Image Processing in Python, PeerJ
    2:e453, 2014; the origin of each photograph is in its module `data`.
  """

  _: dataclasses.KW_ONLY
  size: int
  stride: int | None = None

  def __post_init__(self):
    for name in ("size", "stride"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")

  def open(self, split: str) -> "CropSource":
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    photos, rows = [], []
    for file in _FILES[split]:
      path = package_file(
        *("skimage", f"data/{file}"),
        name="Photographs", extra="data", distribution="scikit-image",
      )  # fmt: skip
      photo = _photo(path)
      if min(photo.shape[:2]) < self.size:
        raise ValueError(
          f"size is {self.size}; {file} is {photo.shape[0]} x"
          f" {photo.shape[1]} pixels"
        )
      begins = [
        np.arange(0, n - self.size + 1, self.stride or self.size)
        for n in photo.shape[:2]
      ]
      grid = np.stack(np.meshgrid(*begins, indexing="ij"), -1).reshape(-1, 2)
      rows.append(np.insert(grid, 0, len(photos), axis=1))
      photos.append(photo)
    return CropSource(tuple(photos), np.concatenate(rows), self.size)


@dataclasses.dataclass(frozen=True, eq=False)
class CropSource:
  """Crops cut out when they are asked for; see Photographs.

  Args:
    photos: [y, x, 3] each.
    rows: a crop's photograph and first pixel (y, x).
    size: height and width of a crop.

  Example:
    >>> photo = np.zeros((8, 8, 3), np.uint8)
    >>> source = CropSource((photo,), np.array([[0, 2, 3]]), 4)
    >>> len(source), source[0]["image"].shape
    (1, (4, 4, 3))
  """

  photos: tuple[np.ndarray, ...]
  rows: Int[np.ndarray, "n 3"]
  size: int

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Example:
    photo, y, x = self.rows[i].tolist()
    cut = self.photos[photo][y : y + self.size, x : x + self.size]
    return {"image": cut.astype(np.float32) / 255}


@functools.cache
def _photo(path: pathlib.Path) -> UInt8[np.ndarray, "y x 3"]:
  try:
    import PIL.Image
  except ImportError as error:
    raise ImportError(
      "Photographs needs the package pillow: pip install 'isthmus[data]'"
    ) from error
  with PIL.Image.open(path) as file:
    return np.asarray(file.convert("RGB"))
