"""Places of choices, against lists that are filled one choice at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.places import arrange, block_tiles, split

pytestmark = pytest.mark.once

MAX = 2**31 - 1


def draw(seed, lanes=2, rows=23, slots=3, g=5, block=4):
  """Choices, some of none; blocks of up to `block` keys, the last one short."""
  rng = np.random.default_rng(seed)
  choice = np.argsort(rng.random((lanes, rows, g)), axis=-1)[..., :slots]
  choice = np.where(rng.random(choice.shape) < 0.2, -1, choice)
  start = np.tile(np.arange(g) * block, (lanes, 1))
  stop = start + block
  stop[:, -1] -= 2
  at = np.sort(rng.integers(-1, g * block, (lanes, rows)), axis=1)
  at[:, -1] = MAX
  return [x.astype(np.int32) for x in (choice, at, start, stop)]


@pytest.mark.parametrize("tile", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_choice_that_sees_a_key_has_its_place(seed, tile):
  choice, at, start, stop = draw(seed)
  (lanes, rows, slots), g = choice.shape, start.shape[1]
  found = arrange(*map(jnp.asarray, (choice, at, start, stop)), tile=tile)
  row, limit, begin, place, real = (np.asarray(x) for x in found)
  assert row.shape == limit.shape and row.shape[1] % tile == 0
  for lane in range(lanes):
    want = [[] for _ in range(g)]
    for r in range(rows):
      for c in range(slots):
        j = choice[lane, r, c]
        sees = 0
        if j >= 0:
          sees = min(int(at[lane, r]) + 1, stop[lane, j]) - start[lane, j]
        assert real[lane, r, c] == (sees > 0)
        if sees > 0:
          want[j].append((r, c, sees))
    tiles = 0
    for j in range(g):
      assert begin[lane, j] == tiles
      for i, (r, c, sees) in enumerate(want[j]):
        p = tiles * tile + i
        assert (row[lane, p], limit[lane, p]) == (r, sees)
        assert place[lane, r, c] == p
      end = tiles * tile + len(want[j])
      tiles += -(-len(want[j]) // tile)
      assert (row[lane, end : tiles * tile] == rows).all()
      assert (limit[lane, end : tiles * tile] == 0).all()
    assert begin[lane, g] == tiles
    assert (row[lane, tiles * tile :] == rows).all()
    assert (limit[lane, tiles * tile :] == 0).all()


def test_nothing_chosen_has_no_tile():
  _, at, start, stop = draw(0)
  none = jnp.full((2, 23, 3), -1, jnp.int32)
  found = arrange(none, at, start, stop, tile=4)
  assert not found.begin.any() and not found.real.any()
  assert (found.row == 23).all()


def test_tiles_are_whole_if_every_row_sees_every_key():
  choice, at, start, stop = draw(1)
  found = arrange(*map(jnp.asarray, (choice, at, start, stop)), tile=2)
  tiles = block_tiles(found, 2, 4)
  limit = np.asarray(found.limit).reshape(2, -1, 2)
  np.testing.assert_array_equal(tiles.whole, (limit == 4).all(-1))
  assert 0 < np.asarray(tiles.whole).sum() < tiles.whole.size
  count = np.diff(found.begin, axis=1)
  for lane in range(2):
    ranked = count[lane][np.asarray(tiles.order[lane])]
    assert (np.diff(ranked) <= 0).all()
    assert sorted(tiles.order[lane].tolist()) == list(range(5))


@pytest.mark.parametrize("block, size", [(5, 8), (8, 8), (9, 4), (12, 4)])
def test_pieces_cover_the_chosen_blocks(block, size):
  start = np.arange(3, dtype=np.int32)[None] * block
  stop = np.minimum(start + block, 2 * block + 3)
  choice = np.array([[[2, 0], [-1, 1]]], np.int32)
  found, first, last = split(
    *map(jnp.asarray, (choice, start, stop)), block=block, size=size
  )
  first, last = np.asarray(first)[0], np.asarray(last)[0]
  assert (first <= last).all() and (last - first <= size).all()

  def keys(choice, start, stop):
    return sorted(i for j in choice if j >= 0 for i in range(start[j], stop[j]))

  for r in range(2):
    assert keys(np.asarray(found)[0, r], first, last) == keys(
      choice[0, r], start[0], stop[0]
    )
