"""Predicates against their sentence in Python's integers, and their bounds."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.predicate import (
  EMPTY,
  Band,
  BlockDiagonal,
  Both,
  Either,
  Positions,
  Predicate,
  Prefix,
  Range,
  Segments,
  Strided,
  both,
)

pytestmark = pytest.mark.once

LEAST = -(2**31)
T, S = 23, 29


def _band(left, right, offset=0):
  def seen(i, j, q, k):
    after = left is None or j >= i + offset - left
    return after and (right is None or j <= i + offset + right)

  return Band(left, right, offset), seen


def _positions(left, right):
  def seen(i, j, q, k):
    after = left is None or k[0] >= q[0] - left
    before = right is None or k[0] <= q[0] + right
    return k[0] != EMPTY and after and before

  return Positions(left, right), seen


def _pair(kind, a, b):
  (x, seen), (y, seen2) = a, b
  nq, nk = x.operands

  def either(i, j, q, k):
    one = seen(i, j, q[:nq], k[:nk]), seen2(i, j, q[nq:], k[nk:])
    return all(one) if kind is Both else any(one)

  return kind(x, y), either


SEGMENTS = Segments(), lambda i, j, q, k: q[0] == k[0]
CAUSAL = _band(None, 0, S - T)
# (predicate, its sentence), whether `some` and whether `every` is exact.
EXACT = [
  CAUSAL,
  _band(4, None, 2),
  _band(3, 1, -2),
  _band(None, None),
  _band(-3, 1),
  _band(2**31 - 1, 2**31 - 1, 5),
  (Prefix(7), lambda i, j, q, k: j < 7),
  (Prefix(0), lambda i, j, q, k: False),
  (Prefix(2**31), lambda i, j, q, k: True),
  (Prefix(None), lambda i, j, q, k: j < q[0]),
  (BlockDiagonal(5), lambda i, j, q, k: i // 5 == j // 5),
  (BlockDiagonal(4, -6), lambda i, j, q, k: (i - 6) // 4 == j // 4),
  (Strided(6), lambda i, j, q, k: (i - j) % 6 == 0),
  (Strided(11, 4, -3), lambda i, j, q, k: (i - 3 - j) % 11 < 4),
  (Strided(4, 4), lambda i, j, q, k: True),
]
CASES = [
  *((case, True, True) for case in EXACT),
  (SEGMENTS, False, True),
  (_positions(None, None), False, True),
  (_positions(None, 0), False, True),
  (_positions(3, 2), False, True),
  (_pair(Both, SEGMENTS, CAUSAL), False, True),
  (_pair(Both, CAUSAL, _band(8, 3, 1)), False, True),
  (_pair(Either, _band(5, 0), EXACT[6]), True, False),
  (_pair(Either, _pair(Both, CAUSAL, SEGMENTS), EXACT[9]), False, False),
]


def _operands(rng, count, size, kind):
  """Ids that ascend, or any, or with empty slots."""
  x = rng.integers(-3, 12, (count, size))
  if kind == "ascending":
    x = np.sort(x // 3)
  if kind == "empty":
    x = np.where(rng.random(x.shape) < 0.3, EMPTY, x)
  return tuple(x.astype(np.int32))


def _sentence(seen, q, k):
  """[T, S], in Python's integers."""
  return np.array(
    [
      [
        bool(seen(i, j, [int(x[i]) for x in q], [int(x[j]) for x in k]))
        for j in range(S)
      ]
      for i in range(T)
    ]
  )


def _tile(x, start, block):
  part = x[start : start + block]
  return Range(part.min(), part.max())


@pytest.mark.parametrize("kind", ["any", "ascending", "empty"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0][0]))
def test_predicate(case, kind):
  """Elements are as the sentence says, and bounds hold for every tile."""
  (predicate, seen), some_exact, every_exact = case
  assert isinstance(predicate, Predicate) and hash(predicate)
  nq, nk = predicate.operands
  if kind != "any" and not nq + nk:
    kind = "any"
  rng = np.random.default_rng(0)
  q, k = _operands(rng, nq, T, kind), _operands(rng, nk, S, kind)
  expected = _sentence(seen, q, k)
  i, j = np.arange(T, dtype=np.int32), np.arange(S, dtype=np.int32)
  ours = predicate(i[:, None], j, tuple(x[:, None] for x in q), tuple(k))
  np.testing.assert_array_equal(ours, expected)
  for bq, bk in ((1, 1), (4, 4), (7, 3), (2, 11), (T, S)):
    for a, b in itertools.product(range(0, T, bq), range(0, S, bk)):
      some, every = predicate.tiles(
        _tile(i, a, bq),
        _tile(j, b, bk),
        tuple(_tile(x, a, bq) for x in q),
        tuple(_tile(x, b, bk) for x in k),
      )
      tile = expected[a : a + bq, b : b + bk]
      assert some or not tile.any()
      assert tile.all() or not every
      if some_exact:
        assert bool(some) == tile.any()
      if every_exact:
        assert bool(every) == tile.all()


def test_segments_that_ascend_are_skipped_exactly():
  ids = np.sort(np.random.default_rng(1).integers(0, 9, 64)).astype(np.int32)
  ids = np.unique(ids, return_inverse=True)[1].astype(np.int32)
  for a, b in itertools.product(range(0, 64, 8), repeat=2):
    some, _ = Segments().tiles(
      None, None, (_tile(ids, a, 8),), (_tile(ids, b, 8),)
    )
    shared = set(ids[a : a + 8]) & set(ids[b : b + 8])
    assert bool(some) == bool(shared)


def test_positions_that_run_on_are_bounded_exactly():
  q, k = np.arange(40, 72), np.arange(90)
  q, k = q.astype(np.int32), k.astype(np.int32)
  for left, right in ((None, 0), (9, 0), (3, 5), (0, None)):
    predicate, seen = _positions(left, right)
    for a, b in itertools.product(range(0, 32, 8), range(0, 90, 6)):
      some, every = predicate.tiles(
        None, None, (_tile(q, a, 8),), (_tile(k, b, 6),)
      )
      tile = [
        seen(0, 0, [x], [y])
        for x in q[a : a + 8].tolist()
        for y in k[b : b + 6].tolist()
      ]
      assert (bool(some), bool(every)) == (any(tile), all(tile))


@pytest.mark.parametrize("left", [None, 0, 5, EMPTY])
@pytest.mark.parametrize("right", [None, 0, 5, EMPTY])
def test_positions_at_the_ends_of_int32(left, right):
  """Sums with them stop there; wrapped, they would hide or show keys."""
  ends = [LEAST, LEAST + 1, -1, 0, 7, EMPTY - 1, EMPTY]
  predicate, seen = _positions(left, right)
  q = jnp.asarray(ends, jnp.int32)[:, None]
  k = jnp.asarray(ends, jnp.int32)
  expected = [[seen(0, 0, [x], [y]) for y in ends] for x in ends]
  np.testing.assert_array_equal(predicate(0, 0, (q,), (k,)), expected)
  some, every = predicate.tiles(0, 0, (Range(q, q),), (Range(k, k),))
  np.testing.assert_array_equal(some, expected)
  np.testing.assert_array_equal(every, expected)


def test_bands_of_any_width_at_the_largest_indices():
  i = j = jnp.asarray([0, 2**30 - 1], jnp.int32)
  for predicate in (Band(2**31 - 1, 2**31 - 1), Band(2**40, 2**40, -5)):
    assert predicate(i[:, None], j, (), ()).all()
  assert not Band(2**40, -(2**40))(i[:, None], j, (), ()).any()


def test_both_says_it_in_fewer_words():
  i, j = np.arange(T)[:, None], np.arange(S)
  bands = [b for b, _ in EXACT if isinstance(b, Band)]
  for a, b in itertools.product(bands, repeat=2):
    one = both(a, b)
    assert isinstance(one, Band)
    np.testing.assert_array_equal(
      one(i, j, (), ()), a(i, j, (), ()) & b(i, j, (), ())
    )
  assert both(None, None) is None
  assert both(None, bands[0]) == both(bands[0], None) == bands[0]
  assert both(Prefix(3), Prefix(3)) == Prefix(3)
  assert both(Segments(), Segments()) == Both(Segments(), Segments())


def test_equal_predicates_are_one():
  assert len({Band(1, 0), Band(1, 0), Band(1, 1), Prefix(1)}) == 3
