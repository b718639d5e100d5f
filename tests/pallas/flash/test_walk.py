"""Walks along tiles against what a mask, written down, says of them."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.lists import Lists, listed
from isthmus.pallas.flash.mosaic_backward import transposed
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import Plan
from isthmus.pallas.flash.walk import (
  band_steps,
  band_walk,
  list_walk,
  query_tile,
)

pytestmark = pytest.mark.once

STEPS = 40  # more than there are tiles in any case


def band_of(left, right, offset):
  """A Band of traced numbers, so that one compilation serves all cases."""
  band = object.__new__(Band)  # the dataclass wants an int
  vars(band).update(left=left, right=right, offset=offset)
  return band


@functools.partial(jax.jit, static_argnames=("sides", "block", "ragged"))
def walks(cases, sides, block, ragged):
  """(partial, total, indices) of cases (row, rows, cols, left, right, off)."""

  def one(row, rows, cols, left, right, offset):
    left, right = left if sides[0] else None, right if sides[1] else None
    walk = inspect.unwrap(band_walk)(  # lengths are traced too
      row,
      band_of(left, right, offset),
      lengths=(rows, cols),
      block=block,
      ragged=ragged,
    )
    return walk.partial, walk.total, walk.index(jnp.arange(STEPS))

  return jax.vmap(one)(*cases)


def tiles_of(row, rows, cols, band, block, ragged):
  """(some, every) by tile of the other side, element by element.

  The last tile of the other side counts as whole: what is behind its end is
  masked by `ragged`, or by a lse that is infinite.
  """
  tiles = -(-cols // block[1])
  i = np.arange(row * block[0], min(rows, (row + 1) * block[0]))[:, None]
  j = np.arange(tiles * block[1])
  seen = np.ones((len(i), len(j)), bool)
  if band.left is not None:
    seen &= j >= i + band.offset - band.left
  if band.right is not None:
    seen &= j <= i + band.offset + band.right
  seen = seen.reshape(len(i), tiles, block[1])
  every = seen.all(axis=(0, 2))
  if ragged and cols % block[1]:
    every[-1] = False
  return seen.any(axis=(0, 2)), every


@pytest.mark.parametrize("block", [(128, 128), (6, 4), (4, 8)], ids=str)
@pytest.mark.parametrize(
  "sides", list(itertools.product((True, False), repeat=2)), ids=str
)
def test_band_walk_meets_each_tile_it_has_to_and_no_other(sides, block):
  rng = np.random.default_rng(0)
  number, kinds = 120, set()
  rows, cols = (rng.integers(1, 6 * x, number) for x in block)
  row = rng.integers(0, 2**31, number) % -(-rows // block[0])
  far = int(2.5 * max(rows.max(), cols.max()))
  left, right, offset = (
    np.where(
      rng.random(number) < 0.5,
      rng.integers(-20, 20, number),
      rng.integers(-far, far, number),
    )
    for _ in range(3)
  )
  cases = [row, rows, cols, left, right, offset]
  for ragged in (True, False):
    found = walks(
      tuple(x.astype(np.int32) for x in cases), sides, block, ragged
    )
    for case, partial, total, index in zip(
      zip(*cases, strict=True), *map(np.asarray, found), strict=True
    ):
      row_, rows_, cols_, left_, right_, offset_ = map(int, case)
      band = Band(
        left_ if sides[0] else None, right_ if sides[1] else None, offset_
      )
      some, every = tiles_of(row_, rows_, cols_, band, block, ragged)
      met, masked = index[:total].tolist(), index[:partial].tolist()
      assert len(set(met)) == total <= len(some), (case, met)
      assert all(0 <= tile < len(some) for tile in met), (case, met)
      full = set(met) - set(masked)
      assert full == set(np.flatnonzero(every)), (case, met, partial)
      empty = None not in (band.left, band.right) and left_ + right_ < 0
      if empty:  # nothing is seen; what is met all the same is masked
        assert not some.any() and not full
      else:
        assert set(met) == set(np.flatnonzero(some)), (case, met)
      kinds |= {
        ("nothing", not some.any()),
        ("masked", partial > 0),
        ("full", partial < total),
        ("empty band", empty),
      }
  assert {("nothing", False), ("masked", True), ("full", True)} <= kinds
  if any(sides):
    assert ("nothing", True) in kinds
  if all(sides):
    assert ("empty band", True) in kinds


@pytest.mark.parametrize(
  "t, s, band",
  [
    (700, 700, Band(None, 0)),
    (700, 300, Band(None, 0, -400)),
    (130, 900, Band(200, 50, 770)),
    (600, 600, Band(None, None)),
    (600, 600, Band(-300, 400)),
    (600, 600, Band(5, -9)),
  ],
  ids=str,
)
def test_steps_are_the_mean_of_the_walks(t, s, band):
  walks = [
    band_walk(row, band, lengths=(t, s), block=(128, 128), ragged=True)
    for row in range(-(-t // 128))
  ]
  want = np.mean([int(walk.total) for walk in walks])
  assert abs(band_steps(band, (t, s)) - want) <= 0.5 and want < 6


def test_tiles_of_queries_are_in_order_of_their_work():
  """Late rows first along a band; lists say their own order."""
  batch, heads, rows = 2, 3, 4
  full = np.random.default_rng(0).random((batch, heads, rows, 5)) < 0.5
  lists = listed(jnp.asarray(full), block=(128, 128))
  order = jnp.argsort(-lists.full_num, axis=-1).astype(jnp.int32)
  lengths = (rows * 128 - 20, 640)
  band = Plan(lengths, band=Band(None, 0))
  both = Plan(lengths, lists=lists, order=order)
  for item in range(batch * heads * rows):
    pair, place = divmod(item, rows)
    at = divmod(pair, heads)
    *found, walk = query_tile(band.arrays(), band, heads, jnp.int32(item))
    assert tuple(map(int, found)) == (*at, rows - 1 - place)
    assert int(walk.total) == rows - place
    *found, walk = query_tile(both.arrays(), both, heads, jnp.int32(item))
    row = int(order[(*at, place)])
    assert tuple(map(int, found)) == (*at, row)
    keys = [int(walk.index(step)) for step in range(int(walk.total))]
    assert keys == np.flatnonzero(full[(*at, row)]).tolist()


@pytest.mark.parametrize("t", [1, 192, 400])
def test_tiles_of_queries_may_be_longer_than_those_of_keys(t):
  heads, rows, s, band = 2, -(-t // 192), 300, Band(100, 0)
  plan = Plan((t, s), band=band)
  for item in range(3 * heads * rows):
    pair, place = divmod(item, rows)
    *found, walk = query_tile(plan.arrays(), plan, heads, jnp.int32(item), 192)
    row = rows - 1 - place
    assert tuple(map(int, found)) == (*divmod(pair, heads), row)
    some, every = tiles_of(row, t, s, band, (192, 128), True)
    met = [int(walk.index(jnp.int32(x))) for x in range(int(walk.total))]
    assert sorted(met) == np.flatnonzero(some).tolist()
    assert set(met[int(walk.partial) :]) == set(np.flatnonzero(every))


@pytest.mark.parametrize(
  "t, s, left, right",
  [
    (300, 300, None, 0),
    (203, 113, None, 0),
    (113, 203, None, 0),
    (640, 384, 100, 20),
    (384, 640, 100, None),
    (1, 500, None, None),
    (500, 1, 3, 3),
    (256, 256, -300, 400),
    (256, 256, 5, -9),
  ],
)
def test_keys_meet_the_queries_that_meet_them(t, s, left, right):
  """The transposed band gives the transposed relation between tiles."""
  band = Band(left, right, offset=s - t)

  def relation(band, lengths, ragged):
    met = np.zeros([-(-x // 128) for x in lengths], int)
    for row in range(met.shape[0]):
      walk = band_walk(
        row, band, lengths=lengths, block=(128, 128), ragged=ragged
      )
      for step in range(int(walk.total)):
        met[row, int(walk.index(jnp.int32(step)))] = 1 + (
          step >= int(walk.partial)
        )
    return met

  queries = relation(band, (t, s), True)
  keys = relation(transposed(band), (s, t), False).T
  # The tiles at the ends, cut short, are told apart by one side or the other.
  np.testing.assert_array_equal(queries > 0, keys > 0)
  inner = (slice(t // 128), slice(s // 128))
  np.testing.assert_array_equal(queries[inner], keys[inner])


def test_the_partial_tiles_come_first_and_ascend():
  walk = band_walk(
    2, Band(200, 200), lengths=(1024, 1024), block=(128, 128), ragged=True
  )
  steps = [int(walk.index(jnp.int32(x))) for x in range(int(walk.total))]
  assert (int(walk.partial), steps) == (4, [0, 1, 3, 4, 2])
  assert walk.overflow is False


@pytest.mark.parametrize("lead", [(2, 6), (1, 6), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("with_partial", [True, False])
def test_list_walk_meets_the_listed_tiles(lead, with_partial):
  rng = np.random.default_rng(1)
  kind = rng.integers(0, 3, (*lead, 4, 7))
  kind[..., 3, :] = 0  # a row that lists nothing
  full, partial = kind == 1, kind == 2
  lists = listed(
    jnp.asarray(full),
    jnp.asarray(partial) if with_partial else None,
    block=(128, 128),
  )
  for batch, head, row in itertools.product(range(2), range(6), range(4)):
    at = (batch % lead[0], head % lead[1], row)
    walk = list_walk(lists, batch, head, row)
    steps = [int(walk.index(jnp.int32(x))) for x in range(int(walk.total))]
    masked = np.flatnonzero(partial[at]).tolist() if with_partial else []
    assert steps == masked + np.flatnonzero(full[at]).tolist()
    assert int(walk.partial) == len(masked)
    assert not walk.overflow


@pytest.mark.parametrize(
  "full_num, partial_num, total, partial, overflow",
  [
    (2, 1, 3, 1, False),
    (3, 1, 3, 1, True),
    (1, 2, 2, 1, True),
    (9, 9, 3, 1, True),
    (0, 0, 0, 0, False),
  ],
)
def test_a_count_above_the_capacity_is_an_overflow(
  full_num, partial_num, total, partial, overflow
):
  """What is met then stays within the list."""
  lists = Lists(
    jnp.full((1, 1, 1), full_num),
    jnp.array([[[[4, 5]]]]),
    jnp.full((1, 1, 1), partial_num),
    jnp.array([[[[2]]]]),
    (128, 128),
  )
  walk = list_walk(lists, 0, 0, 0)
  assert int(walk.total) == total and int(walk.partial) == partial
  assert bool(walk.overflow) is overflow
  met = [int(walk.index(jnp.int32(step))) for step in range(total)]
  assert met == [2][:partial] + [4, 5][: total - partial]
  alone = Lists(lists.full_num, lists.full, None, None, (128, 128))
  walk = list_walk(alone, 0, 0, 0)
  assert int(walk.partial) == 0 and int(walk.total) == min(full_num, 2)
  assert bool(walk.overflow) is (full_num > 2)
