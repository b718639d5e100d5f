"""Codes to numbers of [-1, 1] and back by arithmetic, without a table.

Counted from 0, so that decade `i` starts at a power of two, the d-th value of
a dynamic map has a closed form: with `m = 2 d + 1` and `p` the largest power
of two in it, it is `(9 m / p - 8) 10^(i-7)`, where `m / p` is the mantissa of
m as a float, and `i` comes of its exponent. What the formula gives is the
table to the last bit; gathers are slow or missing where kernels run.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from isthmus.pallas.quant8.maps import DECADES, Map


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
  below = (y < 0) if which.signed else None
  rank = (_nearest if exact else _near)(size, below, which)
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
  upper = _whole(_position(size, which)[0] + 0.5) - _shift(which)
  upper = jnp.clip(upper, 1, _last(which))
  middle = (_value(upper - 1, which) + _value(upper, which)) * 0.5
  past = size > middle
  if below is not None:
    past = past | (below & (size == middle))
  return jnp.where(past, upper, upper - 1)


def _near(size, below, which: Map):
  """By the place in the decade, without a second look."""
  del below
  position, first = _position(size, which)
  last = _last(which)
  if which.kind == "linear":
    return jnp.clip(_whole(position), 0, last)
  # The first value of a decade is nearer than the last one of the decade below
  # from a fifth of its part on.
  early = jnp.where(position < first + 0.2, 1, 0)
  rank = jnp.clip(_whole(position) - early - _shift(which), 1, last - 1)
  smallest, parts = (5.5, 64) if which.signed else (3.25, 128)
  rank = jnp.where(size > 1 - 0.225 / parts, last, rank)
  return jnp.where(size > smallest / 2 * 10.0**-DECADES, rank, 0)


def _position(size, which: Map):
  """Where size lies among ranks plus `_shift`; the start of its decade.

  The midpoint below a rank lies at the rank; at decades' starts, near it.
  """
  if which.kind == "linear":
    return size * _last(which) + 0.5, 0.0
  first = [2.0**i for i in _exponents(which)]
  slope = [x * 10.0 ** (DECADES - i) / 9 for i, x in enumerate(first)]
  edges = [10.0 ** (i - DECADES) for i in range(DECADES)]
  slope = _by_decade(size, edges, slope)
  first = _by_decade(size, edges, first)
  return size * slope + first * (8 / 9), first


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


def _whole(x):
  """The whole part of a number that isn't negative, as int32; NaN is 0."""
  return jnp.where(x == x, x, 0.0).astype(jnp.int32)


def _split(x: float) -> tuple[float, float]:
  """float32 numbers: 12 bits of x, and the rest."""
  bits = np.float32(x).view(np.int32) & np.int32(-4096)
  high = float(bits.view(np.float32))
  return high, float(np.float32(x - high))


_POWERS = [_split(10.0 ** (i - DECADES)) for i in range(DECADES)]
