"""What the loader reads: sources of examples, and data sets that open them."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

#: Field name -> array; text may stay bytes or str.
Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
  """Random access to examples: the protocol of Grain and tfds.data_source.

  A source may also offer one of two fast paths, which the loader prefers:
  `take(indices) -> dict` of stacked arrays, or `__getitems__(indices) ->
  list` of examples.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Example: ...


@runtime_checkable
class Dataset(Protocol):
  """Plain settings that name some data; building one reads nothing.

  Implementations are frozen dataclasses, so they print, compare and can be
  overridden field by field.
  """

  def open(self, split: str) -> Source:
    """The source of a split, "train" or "eval"."""
    ...


def check_split(split: str, names: Iterable[str] = ("train", "eval")) -> None:
  """Raise a ValueError that names the splits and the nearest of them.

  Example:
    >>> check_split("trian")
    Traceback (most recent call last):
    ValueError: no split 'trian'; there are ['eval', 'train']; did you mean ...
  """
  names = list(names)
  if split in names:
    return
  near = difflib.get_close_matches(split, names, n=1, cutoff=0.3)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"no split {split!r}; there are {sorted(names)}{hint}")


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """A source over arrays that share their leading axis.

  Args:
    arrays: field name -> array [n, ...].

  Raises:
    ValueError: no field, a scalar field, or leading axes that differ.

  Example:
    >>> source = ArraySource({"x": np.zeros((3, 2)), "y": np.arange(3)})
    >>> len(source), source[1]["x"].shape
    (3, (2,))
  """

  arrays: Mapping[str, Any]

  def __post_init__(self):
    if not self.arrays:
      raise ValueError("ArraySource got 0 arrays; it needs at least 1")
    arrays = {k: np.asarray(v) for k, v in self.arrays.items()}
    first = next(iter(arrays))
    for name, array in arrays.items():
      if not array.ndim:
        raise ValueError(f"field {name!r} is a scalar; it needs a leading axis")
      if len(array) != len(arrays[first]):
        raise ValueError(
          f"field {name!r} has {len(array)} rows, field {first!r} has"
          f" {len(arrays[first])}"
        )
    object.__setattr__(self, "arrays", arrays)

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def __getitem__(self, i: int) -> Example:
    return {name: array[i] for name, array in self.arrays.items()}

  def take(self, indices: Int[np.ndarray, "b"]) -> Example:
    """Rows of every array, in the order of the indices."""
    return {name: array[indices] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Arrays:
  """Arrays in memory as a data set, one mapping of fields per split.

  Args:
    train: field name -> array [n, ...].
    eval: the same for the held-out examples; None where there are none.

  Example:
    >>> data = Arrays(train={"x": np.zeros((8, 2))})
    >>> len(data.open("train"))
    8
  """

  train: Mapping[str, Any]
  eval: Mapping[str, Any] | None = None

  def open(self, split: str) -> ArraySource:
    """The source of a split that was given."""
    given = {"train": self.train}
    if self.eval is not None:
      given["eval"] = self.eval
    check_split(split, given)
    return ArraySource(given[split])
