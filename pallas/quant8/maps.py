"""The 256 numbers in [-1, 1] that a code of eight bits can stand for.

A dynamic map spends its bits where small numbers are: seven decades, each
with twice as many values as the one below. In decade `i` of 0 to 6 the values
are midpoints of `n` equal parts of `[10^(i-7), 10^(i-6)]`, `n = 2^(i+1)` if
the map is unsigned and `2^i` for each sign if it is signed; 0 and 1 complete
them, so that a signed map holds 1 and not -1.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Float32

#: Decades of a dynamic map.
DECADES = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
  """Which numbers codes stand for.

  Attributes:
    kind: "dynamic", or "linear" for equal steps.
    signed: whether negative numbers have codes.
    root: whether codes hold the square root of what they stand for; for
      numbers that aren't negative. It halves the number of decades between
      the smallest and the largest number of a block, counted in codes.
    zero_free: whether a number above 0 never takes the code of 0, but at
      least the smallest there is (and one below 0 the largest below it).

  Raises:
    ValueError: a root of a signed map.

  Example:
    >>> float(table(Map())[128]), float(table(Map(signed=False))[1])
    (5.499999815583578e-07, 3.250000020216248e-07)
    >>> Map(root=True)
    Traceback (most recent call last):
    ValueError: a map of square roots is unsigned
  """

  kind: Literal["dynamic", "linear"] = "dynamic"
  signed: bool = True
  root: bool = False
  zero_free: bool = False

  def __post_init__(self):
    if self.kind not in ("dynamic", "linear"):
      raise ValueError(f"map {self.kind!r}; there are dynamic and linear")
    if self.root and self.signed:
      raise ValueError("a map of square roots is unsigned")

  @property
  def zero(self) -> int:
    """The code of 0."""
    return 127 if self.signed else 0

  @property
  def top(self) -> int:
    """The code of 1."""
    return 254 if self.signed and self.kind == "linear" else 255


#: For what has a sign, such as a first moment.
SIGNED = Map()
#: For what has none; small second moments become 0.
UNSIGNED = Map(signed=False)
#: For second moments: no small one becomes 0.
NOZERO = Map(signed=False, zero_free=True)
#: For second moments: of their square roots, which step sizes are made of.
ROOT = Map(signed=False, root=True, zero_free=True)


@functools.cache
def table(which: Map) -> Float32[np.ndarray, "256"]:
  """What each code stands for, before the square of `root`; rising.

  The last code of a signed linear map is never written; it reads as 1.

  Example:
    >>> values = table(UNSIGNED)
    >>> len(values), float(values[0]), float(values[255])
    (256, 0.0, 1.0)
  """
  if which.kind == "linear":
    steps = np.arange(256) - which.zero
    values = np.minimum(steps / (127 if which.signed else 255), 1.0)
    return values.astype(np.float32)
  positive = []
  for decade in range(DECADES):
    parts = 2 ** (decade if which.signed else decade + 1)
    # As a quotient of integers, which is rounded once.
    odd = 2 * np.arange(parts) + 1
    above = 10.0 ** (DECADES - decade)
    positive += ((2 * parts + 9 * odd) / (2 * parts * above)).tolist()
  negative = [-x for x in reversed(positive)] if which.signed else []
  return np.array([*negative, 0.0, *positive, 1.0], np.float32)
