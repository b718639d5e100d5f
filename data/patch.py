"""Patches: boxes cut out of volumes when they are asked for."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from isthmus.data.source import Example

#: Voxels along z, y and x, one number for all or three.
Size = int | tuple[int, int, int]
#: Number of a volume -> image [z y x c], and label [z y x] or None.
Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class PatchSource:
  """Examples of image float32 [z y x c] and, if any, label int32 [z y x].

  Args:
    load: number of a volume -> image [z y x c], and label [z y x] or None.
    rows: a patch's volume and first voxel (z, y, x).
    size: voxels along z, y, x; None for whole volumes.
    scale: what intensities are multiplied with.

  Example:
    >>> load = lambda i: (np.ones((4, 4, 4, 1)), None)
    >>> source = PatchSource(load, np.array([[0, 1, 2, 0]]), (2, 2, 2))
    >>> source[0]["image"].shape
    (2, 2, 2, 1)
  """

  load: Load
  rows: Int[np.ndarray, "n 4"]
  size: tuple[int, int, int] | None
  _: dataclasses.KW_ONLY
  scale: float = 1.0

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Example:
    volume, *corner = self.rows[i].tolist()
    image, label = self.load(volume)
    place = box(corner, self.size or image.shape[:3])
    # Copied, for what `load` keeps may not be written to.
    cut = image[place].astype(np.float32)
    cut *= np.float32(self.scale)
    example = {"image": cut}
    if label is not None:
      example["label"] = label[place].astype(np.int32)
    return example


def cover(
  shape: Sequence[int],
  size: Size | None,
  *,
  stride: int | None = None,
  name: str,
) -> Int[np.ndarray, "n 3"]:
  """First voxels (z, y, x) of the patches that cover a volume.

  Args:
    shape: voxels of the volume along z, y, x.
    size: of a patch; None for one patch that is the volume.
    stride: voxels from a patch to the next; None means the size. The last
      patch along an axis ends with the volume.
    name: of the volume, for the error.

  Raises:
    ValueError: a patch that is larger than the volume.

  Example:
    >>> cover((4, 4, 10), 4, name="it").tolist()
    [[0, 0, 0], [0, 0, 4], [0, 0, 6]]
  """
  if size is None:
    return np.zeros((1, 3), np.int64)
  sizes = three(size)
  if any(n < s for n, s in zip(shape, sizes, strict=True)):
    raise ValueError(
      f"{name} has {tuple(shape)} voxels (z, y, x), a patch {sizes}; set size"
    )
  axes = []
  for n, s in zip(shape, sizes, strict=True):
    begins = np.arange(0, n - s + 1, stride or s)
    axes.append(np.union1d(begins, [n - s]))
  return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def box(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
  """The slices of a patch from its first voxel and its size.

  Example:
    >>> np.arange(10)[box([3], [2])].tolist()
    [3, 4]
  """
  return tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))


def three(size: Size) -> tuple[int, int, int]:
  """A size's three numbers.

  Example:
    >>> three(8), three((1, 2, 3))
    ((8, 8, 8), (1, 2, 3))
  """
  return (size, size, size) if isinstance(size, int) else size


def check_size(size: Size | None, stride: int | None) -> None:
  """Raises ValueError for a size or stride that no patch can have.

  Example:
    >>> check_size((8, 8, 0), None)
    Traceback (most recent call last):
    ValueError: size is (8, 8, 0); it must be 1 or 3 numbers of at least 1
  """
  if size is not None and (len(three(size)) != 3 or min(three(size)) < 1):
    raise ValueError(f"size is {size}; it must be 1 or 3 numbers of at least 1")
  if stride is not None and stride < 1:
    raise ValueError(f"stride is {stride}; it must be at least 1")
  if size is None and stride is not None:
    raise ValueError(
      f"stride is {stride} and size None: whole volumes have no stride; set"
      " size, or leave stride out"
    )
