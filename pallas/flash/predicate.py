"""Which keys a query sees, element by element, and for whole tiles at once.

A predicate is a frozen dataclass, so that equal ones share a compiled kernel.
It is called twice over:

* `predicate(i, j, q, k)` on indices and per-token operands that broadcast
  against each other, giving the element mask of one tile;
* `predicate.tiles(i, j, q, k)` on `Range`s, the least and greatest of the
  same over a tile, giving two bounds: `some` is False only where no element
  is seen, `every` is True only where all are. A kernel skips the tiles
  without `some` and leaves the mask out of those with `every`.

Operands never are closed over: Pallas takes arrays as arguments only.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

#: The position of a cache slot that holds nothing: no query sees it.
EMPTY = int(np.iinfo(np.int32).max)

Operands = tuple[Any, ...]


class Range(NamedTuple):
  """Least and greatest of an integer over a tile, both inclusive."""

  low: Any
  high: Any


class Predicate(Protocol):
  """What says which keys a query sees.

  Attributes:
    operands: how many per-query and per-key arrays it takes.
  """

  @property
  def operands(self) -> tuple[int, int]: ...

  def __call__(self, i: Any, j: Any, q: Operands, k: Operands) -> Any: ...

  def tiles(
    self, i: Range, j: Range, q: tuple[Range, ...], k: tuple[Range, ...]
  ) -> tuple[Any, Any]: ...


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
    return _between(i + self.offset, j, self.left, self.right)

  def tiles(self, i, j, q, k):
    i = Range(i.low + self.offset, i.high + self.offset)
    return _tiles_between(i, j, self.left, self.right)


@dataclasses.dataclass(frozen=True)
class Positions:
  """`p_i - left <= p_j <= p_i + right`, and p_j is not EMPTY."""

  left: int | None
  right: int | None

  operands = (1, 1)

  def __call__(self, i, j, q, k):
    seen = k[0] != EMPTY
    if self.left is None and self.right is None:
      return seen & (q[0] == q[0])
    return seen & _between(q[0], k[0], self.left, self.right)

  def tiles(self, i, j, q, k):
    some, every = _tiles_between(q[0], k[0], self.left, self.right)
    return some & (k[0].low != EMPTY), every & (k[0].high != EMPTY)


@dataclasses.dataclass(frozen=True)
class Segments:
  """Queries see the keys of their own id."""

  operands = (1, 1)

  def __call__(self, i, j, q, k):
    return q[0] == k[0]

  def tiles(self, i, j, q, k):
    (q,), (k,) = q, k
    some = (q.low <= k.high) & (k.low <= q.high)
    return some, (q.low == q.high) & (k.low == k.high) & (q.low == k.low)


@dataclasses.dataclass(frozen=True)
class Both:
  """The keys that both `a` and `b` show; operands of `a` come first."""

  a: Predicate
  b: Predicate

  @property
  def operands(self):
    return _sum(self.a.operands, self.b.operands)

  def __call__(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    return self.a(i, j, qa, ka) & self.b(i, j, qb, kb)

  def tiles(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    some, every = self.a.tiles(i, j, qa, ka)
    some2, every2 = self.b.tiles(i, j, qb, kb)
    return some & some2, every & every2


@dataclasses.dataclass(frozen=True)
class Either:
  """The keys that `a` or `b` shows; operands of `a` come first."""

  a: Predicate
  b: Predicate

  @property
  def operands(self):
    return _sum(self.a.operands, self.b.operands)

  def __call__(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    return self.a(i, j, qa, ka) | self.b(i, j, qb, kb)

  def tiles(self, i, j, q, k):
    (qa, ka), (qb, kb) = _split(self.a, q, k)
    some, every = self.a.tiles(i, j, qa, ka)
    some2, every2 = self.b.tiles(i, j, qb, kb)
    return some | some2, every | every2


def _between(i, j, left, right):
  seen = None
  if right is not None:
    seen = j <= i + right
  if left is not None:
    after = j >= i - left
    seen = after if seen is None else seen & after
  return (i == i) & (j == j) if seen is None else seen


def _tiles_between(i, j, left, right):
  some, every = i.low <= i.high, i.low <= i.high
  some, every = some & (j.low <= j.high), every & (j.low <= j.high)
  if right is not None:
    some, every = some & (j.low <= i.high + right), every & (j.high <= i.low + right)
  if left is not None:
    some, every = some & (j.high >= i.low - left), every & (j.low >= i.high - left)
  return some, every


def _sum(a, b):
  return a[0] + b[0], a[1] + b[1]


def _split(a, q, k):
  nq, nk = a.operands
  return (q[:nq], k[:nk]), (q[nq:], k[nk:])
