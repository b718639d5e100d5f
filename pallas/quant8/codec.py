"""Codes to numbers of [-1, 1] and back by arithmetic, without a table.

Counted from 0, so that decade `i` starts at a power of two, the d-th value of
a dynamic map has a closed form: with `m = 2 d + 1` and `p` the largest power
of two in it, it is `(9 m / p - 8) 10^(i-7)`, where `m / p` is the mantissa of
m as a float, and `i` comes of its exponent. What the formula gives is the
table to the last bit; gathers are slow or missing where kernels run.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from isthmus.pallas.quant8.maps import DECADES, Map, table

#: Added to a number, it rounds it to a whole one, see `_near`.
_WHOLE = 1.5 * 2**23


def decode(code: Int32[Array, "..."], which: Map) -> Float32[Array, "..."]:
  """What codes stand for, `table(which)[code]`, before the square of `root`.

  Args:
    code: 0 to 255.
    which: the map.

  Example:
    >>> from isthmus.pallas.quant8.maps import SIGNED
    >>> decode(jnp.array([127, 128, 255]), SIGNED).tolist()
    [0.0, 5.499999815583578e-07, 1.0]
  """
  rank = code - which.zero
  size = _value(jnp.abs(rank), which)
  return jnp.where(rank < 0, -size, size) if which.signed else size


def encode(
  y: Float32[Array, "..."], which: Map, *, exact: bool = True
) -> Int32[Array, "..."]:
  """The code of the value next to y; of two as near, the lower code.

  Args:
    y: in [-1, 1], or in [0, 1] for an unsigned map; NaN takes the code of 0.
    which: the map.
    exact: compare with the midpoint of two neighbours as float32 gives it.
      Without, y within a few roundings of a midpoint may take either code,
      for half the work.

  Returns:
    0 to 255.

  Example:
    >>> from isthmus.pallas.quant8.maps import NOZERO, SIGNED, UNSIGNED
    >>> encode(jnp.array([0.0, 1e-6, -1.0]), SIGNED).tolist()
    [127, 128, 0]
    >>> x = jnp.array([0.0, 1e-9])
    >>> encode(x, UNSIGNED).tolist(), encode(x, NOZERO).tolist()
    ([0, 0], [0, 1])
  """
  size = jnp.abs(y) if which.signed else y
  if not exact:
    return _near(y, size, which)
  below = (y < 0) if which.signed else None
  rank = _nearest(size, below, which)
  if which.zero_free:
    rank = jnp.where((size > 0) & (rank == 0), 1, rank)
  if below is not None:
    rank = jnp.where(below, -jnp.minimum(rank, 127), rank)
  return rank + which.zero


def _value(rank, which: Map):
  """The rank-th value from 0 on: 0, then those of the decades, then 1."""
  if which.kind == "linear":
    high, low = _split(1 / _last(which))
    size = rank.astype(jnp.float32)
    return jnp.minimum(size * high + size * low, 1.0)
  m = 2 * (rank + _shift(which)) + 1
  bits = lax.bitcast_convert_type(m.astype(jnp.float32), jnp.int32)
  mantissa = lax.bitcast_convert_type(
    (bits & 0x007FFFFF) | 0x3F800000, jnp.float32
  )
  factor = 9.0 * mantissa - 8.0
  starts = [2**i - 1 if _shift(which) else 2**i for i in _exponents(which)]
  high, low = (
    _by_decade(rank, starts, list(x)) for x in zip(*_POWERS, strict=True)
  )
  # The factor and `high` have 12 bits each: only the sum is rounded, whether a
  # compiler fuses it or not.
  value = factor * high + factor * low
  value = jnp.where(rank == _last(which), 1.0, value)
  return jnp.where(rank == 0, 0.0, value)


def _nearest(size, below, which: Map):
  """By the midpoint of the two neighbours there may be."""
  place = jnp.where(size > 0, _place(size, size, which), 0.0)
  upper = jnp.clip((place + 1.0).astype(jnp.int32), 1, _last(which))
  middle = (_value(upper - 1, which) + _value(upper, which)) * 0.5
  past = size > middle
  if below is not None:
    past = past | (below & (size == middle))
  return jnp.where(past, upper, upper - 1)


def _near(y, size, which: Map):
  """By the place alone, rounded: the code, not the rank."""
  place = _place(size, y, which)
  if which.signed:
    # Places are positive: the sign is a bit to set.
    sign = lax.bitcast_convert_type(y, jnp.int32) & ~0x7FFFFFFF
    place = lax.bitcast_convert_type(
      lax.bitcast_convert_type(place, jnp.int32) | sign, jnp.float32
    )
  # At this magnitude, floats are whole and their bits count them.
  code = lax.bitcast_convert_type(place + _WHOLE, jnp.int32)
  code = code - (np.float32(_WHOLE).view(np.int32) - which.zero)
  return jnp.where(size > 0, code, which.zero)


def _place(size, y, which: Map):
  """What rounds to the rank: r - 0.5 at the midpoint below rank r.

  Between, it is the least of straight lines, for midpoints lie ever farther
  apart as they rise, but for that below 1, which is reached from below by y.
  """
  (slope, start), *lines = _lines(which)
  place = size * slope + start
  for slope, start in lines:
    place = jnp.minimum(place, size * slope + start)
  if which.kind == "linear":
    return jnp.maximum(place, 0.75) if which.zero_free else place
  last = _last(which)
  if which.signed:
    place = jnp.minimum(place, last - 0.75)  # -1 reads as the value above it
  # Steep enough to be the greatest there only, and below last + 0.5 at 1.
  slope, at = 1.5 * last, _midpoints(which)[-1]
  return jnp.maximum(place, y * slope + (last - 0.5 - at * slope))


@functools.cache
def _lines(which: Map) -> list[tuple[float, float]]:
  """Slopes and starts of lines through midpoints, each through two or more."""
  if which.kind == "linear":
    return [(float(_last(which)), 0.0)]
  points = [(x, r + 0.5) for r, x in enumerate(_midpoints(which)[:-1])]
  if which.zero_free:
    points[0] = 0.0, 0.75
  lines, i = [], 0
  while i < len(points):
    (x0, y0), (x1, y1) = points[i : i + 2]
    slope = (y1 - y0) / (x1 - x0)
    start = y0 - x0 * slope
    lines.append((slope, start))
    while (
      i < len(points)
      and abs(points[i][0] * slope + start - points[i][1]) < 1e-4
    ):
      i += 1
  return lines


def _midpoints(which: Map) -> list[float]:
  """Of the values from 0 on."""
  values = table(which)[which.zero : which.top + 1].astype(np.float64)
  return ((values[1:] + values[:-1]) / 2).tolist()


def _last(which: Map) -> int:
  """The rank of 1."""
  return which.top - which.zero


def _shift(which: Map) -> int:
  """What is added to ranks, so that decades start at powers of two."""
  return int(which.kind == "dynamic" and not which.signed)


def _exponents(which: Map) -> range:
  """Of two, at the start of each decade."""
  return range(_shift(which), DECADES + _shift(which))


def _by_decade(x, starts, values):
  """values[i], i being the last decade that starts at or below x, or 0."""
  found = values[0]
  for start, value in zip(starts[1:], values[1:], strict=True):
    found = jnp.where(x >= start, value, found)
  return found


def _split(x: float) -> tuple[float, float]:
  """float32 numbers: 12 bits of x, and the rest."""
  bits = np.float32(x).view(np.int32) & np.int32(-4096)
  high = float(bits.view(np.float32))
  return high, float(np.float32(x - high))


_POWERS = [_split(10.0 ** (i - DECADES)) for i in range(DECADES)]
