"""Which keys a query sees, element by element, and for whole tiles at once.

A predicate is a frozen dataclass, so that equal ones share a compiled kernel.
It is called twice over:

* `predicate(i, j, q, k)` on indices and per-token operands that broadcast
  against each other, giving the element mask of one tile;
* `predicate.tiles(i, j, q, k)` on `Range`s, the least and greatest of the
  same over a tile, giving two bounds: `some` is False only where no element
  is seen, `every` is True only where all are. A kernel skips the tiles
  without `some` and leaves the mask out of those with `every`.

Operands never are closed over: Pallas takes arrays as arguments only. Indices
are below 2**30. Operands are any int32: sums with them stop at its ends
instead of wrapping.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

_LEAST = int(np.iinfo(np.int32).min)

#: The position of a cache slot that holds nothing: no query sees it.
EMPTY = int(np.iinfo(np.int32).max)

# Wider than any difference of two indices.
_FAR = 2**30

Operands = tuple[Any, ...]


class Range(NamedTuple):
  """Least and greatest of an integer over a tile, both inclusive.

  Example:
    >>> Range(128, 255)
    Range(low=128, high=255)
  """

  low: Any
  high: Any


@runtime_checkable
class Predicate(Protocol):
  """What says which keys a query sees: equal ones are one, and hash alike."""

  @property
  def operands(self) -> tuple[int, int]:
    """How many per-query and per-key arrays it takes."""
    ...

  def __call__(self, i: Any, j: Any, q: Operands, k: Operands) -> Any:
    """The mask of queries i and keys j, in their broadcast shape."""
    ...

  def tiles(
    self, i: Range, j: Range, q: tuple[Range, ...], k: tuple[Range, ...]
  ) -> tuple[Any, Any]:
    """(some, every), in the broadcast shape of all bounds it reads."""
    ...


@dataclasses.dataclass(frozen=True)
class Band:
  """`i + offset - left <= j <= i + offset + right`; None is no limit.

  Causal attention is `Band(None, 0, s - t)`.

  Example:
    >>> i, j = jnp.arange(3)[:, None], jnp.arange(3)
    >>> print(Band(1, 0)(i, j, (), ()).astype(int))
    [[1 0 0]
     [1 1 0]
     [0 1 1]]
  """

  left: int | None
  right: int | None
  offset: int = 0

  operands = (0, 0)

  def __call__(self, i, j, q, k):
    low, high = self._limits()
    seen = _whole(i, j) if low is None and high is None else None
    if high is not None:
      seen = j <= i + high
    if low is not None:
      seen = j >= i + low if seen is None else seen & (j >= i + low)
    return seen

  def tiles(self, i, j, q, k):
    """Both bounds are exact."""
    low, high = self._limits()
    some = every = _whole(i.low, j.low)
    if low is not None and high is not None:
      some = some & (low <= high)
    if high is not None:
      some = some & (j.low <= i.high + high)
      every = every & (j.high <= i.low + high)
    if low is not None:
      some = some & (j.high >= i.low + low)
      every = every & (j.low >= i.high + low)
    return some, every

  def _limits(self):
    """Bounds of j - i."""
    low = None if self.left is None else self.offset - self.left
    high = None if self.right is None else self.offset + self.right
    low = None if low is None else min(max(low, -_FAR), _FAR)
    return low, None if high is None else min(max(high, -_FAR), _FAR)


@dataclasses.dataclass(frozen=True)
class Positions:
  """`q - left <= k <= q + right` of positions, and k is not EMPTY.

  Operands are the queries' positions and the keys'.

  Example:
    >>> q, k = jnp.array([[5], [7]]), jnp.array([7, 4, EMPTY])
    >>> print(Positions(None, 0)(0, 0, (q,), (k,)).astype(int))
    [[0 1 0]
     [1 1 0]]
  """

  left: int | None
  right: int | None

  operands = (1, 1)

  def __call__(self, i, j, q, k):
    (q,), (k,) = q, k
    seen = _whole(q, k) & (k != EMPTY)
    if self.right is not None:
      seen = seen & (k <= _shift(q, self.right))
    if self.left is not None:
      seen = seen & (k >= _shift(q, -self.left))
    return seen

  def tiles(self, i, j, q, k):
    """Exact where positions run on; EMPTY may hide that a tile is unseen."""
    (q,), (k,) = q, k
    some = _whole(q.low, k.low) & (k.low != EMPTY)
    every = _whole(q.low, k.low) & (k.high != EMPTY)
    if self.right is not None:
      some = some & (k.low <= _shift(q.high, self.right))
      every = every & (k.high <= _shift(q.low, self.right))
    if self.left is not None:
      some = some & (k.high >= _shift(q.low, -self.left))
      every = every & (k.low >= _shift(q.high, -self.left))
    return some, every


@dataclasses.dataclass(frozen=True)
class Segments:
  """Queries see the keys of their own id.

  Example:
    >>> q, k = jnp.array([[0], [1]]), jnp.array([0, 0, 1])
    >>> print(Segments()(0, 0, (q,), (k,)).astype(int))
    [[1 1 0]
     [0 0 1]]
  """

  operands = (1, 1)

  def __call__(self, i, j, q, k):
    return q[0] == k[0]

  def tiles(self, i, j, q, k):
    """`every` is exact, and so is `some` where ids never jump by above 1."""
    (q,), (k,) = q, k
    some = (q.low <= k.high) & (k.low <= q.high)
    return some, (q.low == q.high) & (k.low == k.high) & (q.low == k.low)


@dataclasses.dataclass(frozen=True)
class Prefix:
  """`j < length`: every query sees the first keys.

  Attributes:
    length: how many; None: a per-query operand says it.

  Example:
    >>> i, j = jnp.arange(2)[:, None], jnp.arange(4)
    >>> print(Prefix(2)(i, j, (), ()).astype(int))
    [[1 1 0 0]
     [1 1 0 0]]
    >>> print(Prefix(None)(i, j, (jnp.array([[1], [3]]),), ()).astype(int))
    [[1 0 0 0]
     [1 1 1 0]]
  """

  length: int | None

  @property
  def operands(self):
    """One per-query array if the length is not static."""
    return (0, 0) if self.length is not None else (1, 0)

  def __call__(self, i, j, q, k):
    if self.length is None:
      return j < q[0]
    return _whole(i, j) & (j < self._limit())

  def tiles(self, i, j, q, k):
    """Both bounds are exact."""
    if self.length is None:
      return j.low < q[0].high, j.high < q[0].low
    tile = _whole(i.low, j.low)
    return tile & (j.low < self._limit()), tile & (j.high < self._limit())

  def _limit(self):
    return min(max(self.length or 0, 0), _FAR)


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
  """`(i + offset) // size == j // size`: blocks that see themselves only.

  Example:
    >>> i, j = jnp.arange(3)[:, None], jnp.arange(3)
    >>> print(BlockDiagonal(2)(i, j, (), ()).astype(int))
    [[1 1 0]
     [1 1 0]
     [0 0 1]]
  """

  size: int
  offset: int = 0

  operands = (0, 0)

  def __call__(self, i, j, q, k):
    return (i + self.offset) // self.size == j // self.size

  def tiles(self, i, j, q, k):
    """Both bounds are exact."""
    q = Range(*((x + self.offset) // self.size for x in i))
    return Segments().tiles(i, j, (q,), (Range(*(x // self.size for x in j)),))


@dataclasses.dataclass(frozen=True)
class Strided:
  """`(i + offset - j) mod stride < width`: each stride-th key.

  Example:
    >>> i, j = jnp.arange(4)[:, None], jnp.arange(4)
    >>> print(Strided(3)(i, j, (), ()).astype(int))
    [[1 0 0 1]
     [0 1 0 0]
     [0 0 1 0]
     [1 0 0 1]]
  """

  stride: int
  width: int = 1
  offset: int = 0

  operands = (0, 0)

  def __call__(self, i, j, q, k):
    return (i + self.offset - j) % self.stride < self.width

  def tiles(self, i, j, q, k):
    """Both bounds are exact."""
    first = i.low + self.offset - j.high
    more = i.high + self.offset - j.low - first
    first = first % self.stride
    some = (first < self.width) | (first + more >= self.stride)
    every = (first + more < self.width) | (self.width >= self.stride)
    return some, every


@dataclasses.dataclass(frozen=True)
class Both:
  """The keys that both `a` and `b` show; operands of `a` come first.

  Example:
    >>> i, j = jnp.arange(3)[:, None], jnp.arange(3)
    >>> print(Both(Band(None, 0), Prefix(1))(i, j, (), ()).astype(int))
    [[1 0 0]
     [1 0 0]
     [1 0 0]]
  """

  a: Predicate
  b: Predicate

  @property
  def operands(self):
    """Those of a and b."""
    return _sum(self.a.operands, self.b.operands)

  def __call__(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    return self.a(i, j, qa, ka) & self.b(i, j, qb, kb)

  def tiles(self, i, j, q, k):
    """`every` is exact if both are; a and b may miss each other in a tile."""
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    some, every = self.a.tiles(i, j, qa, ka)
    some2, every2 = self.b.tiles(i, j, qb, kb)
    return some & some2, every & every2


@dataclasses.dataclass(frozen=True)
class Either:
  """The keys that `a` or `b` shows; operands of `a` come first.

  Example:
    >>> i, j = jnp.arange(3)[:, None], jnp.arange(3)
    >>> print(Either(Band(None, 0), Prefix(2))(i, j, (), ()).astype(int))
    [[1 1 0]
     [1 1 0]
     [1 1 1]]
  """

  a: Predicate
  b: Predicate

  @property
  def operands(self):
    """Those of a and b."""
    return _sum(self.a.operands, self.b.operands)

  def __call__(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    return self.a(i, j, qa, ka) | self.b(i, j, qb, kb)

  def tiles(self, i, j, q, k):
    """`some` is exact if both are; a and b may fill a tile together."""
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    some, every = self.a.tiles(i, j, qa, ka)
    some2, every2 = self.b.tiles(i, j, qb, kb)
    return some | some2, every | every2


def both(a: Predicate | None, b: Predicate | None) -> Predicate | None:
  """`Both(a, b)`, in fewer words where there are; None shows every key.

  Example:
    >>> both(Band(None, 0), Band(8, 8))
    Band(left=8, right=0, offset=0)
  """
  if a is None or b is None:
    return b if a is None else a
  if a == b and a.operands == (0, 0):
    return a
  if isinstance(a, Band) and isinstance(b, Band):
    shift = b.offset - a.offset
    left = [x for x in (a.left, _plus(b.left, -shift)) if x is not None]
    right = [x for x in (a.right, _plus(b.right, shift)) if x is not None]
    return Band(min(left, default=None), min(right, default=None), a.offset)
  return Both(a, b)


def _plus(x, by):
  return None if x is None else x + by


def _whole(i, j):
  """True, in the broadcast shape."""
  return (i == i) & (j == j)


def _shift(x, by):
  """x + by for a static `by`, no further than the ends of int32."""
  if by == 0:
    return x
  if by > 0:
    return jnp.minimum(x, EMPTY - by) + by
  return jnp.maximum(x, _LEAST - by) + by


def _sum(a, b):
  return a[0] + b[0], a[1] + b[1]


def _split(a, q, k):
  nq, nk = a.operands
  return (q[:nq], k[:nk]), (q[nq:], k[nk:])
