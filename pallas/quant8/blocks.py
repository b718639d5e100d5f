"""How an array is cut into blocks that have one scale each."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Runs of numbers along one axis, or along the flattened array.

  Along an axis, what a device holds of the array has its scales beside it:
  nothing moves when both are divided alike over devices, provided that no
  block is cut. In row-major order blocks run on from row to row, as other
  libraries have them.

  Attributes:
    shape: of the array.
    size: numbers of a block, a power of two; the last one may be shorter.
    axis: counted from the end, -1 being the last; None for row-major order.

  Raises:
    ValueError: a size or axis that can't be.

  Example:
    >>> Blocks((4, 600), 256, -1).scales, Blocks((4, 600), 256, None).scales
    ((4, 3), (10,))
    >>> Blocks((4, 600), 100, -1)
    Traceback (most recent call last):
    ValueError: block is 100; it is a power of two
  """

  shape: tuple[int, ...]
  size: int
  axis: int | None

  def __post_init__(self):
    if self.size < 1 or self.size & (self.size - 1):
      raise ValueError(f"block is {self.size}; it is a power of two")
    if self.axis is not None and not -len(self.shape) <= self.axis < 0:
      raise ValueError(
        f"axis is {self.axis}; of {tuple(self.shape)} it is one of "
        f"-{len(self.shape)} to -1, or None"
      )

  @property
  def scales(self) -> tuple[int, ...]:
    """The shape of the blocks' scales."""
    shape = list(self._line)
    shape[self._at] = -(-shape[self._at] // self.size)
    return tuple(shape)

  @property
  def inner(self) -> int:
    """The axis of a block's numbers, in what `split` gives."""
    return self._at + 1

  def split(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """[..., n, ...] as [..., n / size, size, ...], zeros at the end.

    An axis shorter than a block is one block of its own length.
    """
    x, short = x.reshape(self._line), self._short
    if short:
      ends = [(0, 0)] * x.ndim
      ends[self._at] = (0, short)
      x = jnp.pad(x, ends)
    count, width = self._counts
    line = self._line
    return x.reshape(*line[: self._at], count, width, *line[self._at + 1 :])

  def merge(self, parts: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The array that `split` was given."""
    line, (count, width) = list(self._line), self._counts
    line[self._at] = count * width
    x = parts.reshape(line)
    if self._short:
      whole = [slice(None)] * x.ndim
      whole[self._at] = slice(self._line[self._at])
      x = x[tuple(whole)]
    return x.reshape(self.shape)

  @property
  def _line(self) -> tuple[int, ...]:
    return (math.prod(self.shape),) if self.axis is None else self.shape

  @property
  def _at(self) -> int:
    return 0 if self.axis is None else self.axis + len(self.shape)

  @property
  def _counts(self) -> tuple[int, int]:
    """Blocks along the axis, and the numbers of one."""
    n = self._line[self._at]
    width = min(self.size, n)
    return (-(-n // width) if n else 0), width

  @property
  def _short(self) -> int:
    count, width = self._counts
    return count * width - self._line[self._at]
