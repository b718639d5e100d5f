"""The forward kernel alone, on lists that are made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.moba.mosaic_forward import forward
from isthmus.pallas.moba.places import Places, block_tiles

pytestmark = pytest.mark.once

#: Tiles of each block of two lanes: some have none, one has five.
TILES = np.array([[2, 0, 5], [0, 1, 3]])


def lists(width, tiles=TILES, seed=0):
  """Limits of rows: of the first tile of a block any, of the others whole."""
  rng = np.random.default_rng(seed)
  lanes = len(tiles)
  begin = np.pad(np.cumsum(tiles, axis=1), ((0, 0), (1, 0)))
  limit = np.full((lanes, begin.max(), 64), width)
  for lane in range(lanes):
    for first in begin[lane, :-1][tiles[lane] > 0]:
      limit[lane, first] = rng.integers(0, width + 1, 64)
    limit[lane, begin[lane, -1] :] = 0
  begin, limit = (
    jnp.asarray(x, jnp.int32) for x in (begin, limit.reshape(lanes, -1))
  )
  return block_tiles(Places(None, limit, begin, None, None), 64, width)


def arrays(width, d, tiles=TILES, seed=1):
  """(q, do, k, v), rows in places and blocks."""
  rng = np.random.default_rng(seed)
  lanes, places = len(tiles), int(tiles.sum(1).max()) * 64
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  rows = lanes, places, d
  blocks = lanes, tiles.shape[1], width, d
  return draw(*rows), draw(*rows), draw(*blocks), draw(*blocks)


def by_tiles(function, q, k, v, lists):
  """function(rows, keys, values, seen) of each tile; {(lane, tile): result}."""
  found = {}
  for lane in range(len(q)):
    begin = np.asarray(lists.begin[lane])
    for block in range(len(begin) - 1):
      for tile in range(begin[block], begin[block + 1]):
        span = slice(tile * 64, tile * 64 + 64)
        limit = np.asarray(lists.limit[lane, span])
        seen = np.arange(k.shape[2]) < limit[:, None]
        found[lane, tile] = function(
          lane, span, block, *(np.asarray(x, np.float64) for x in (k, v)), seen
        )
  return found


def check(width, d, scale=0.3):
  q, _, k, v = arrays(width, d)
  tiles = lists(width)
  o, lse = jax.jit(lambda *x: forward(*x, scale=scale))(q, k, v, tiles)
  assert 0 < np.asarray(tiles.whole).sum() < tiles.whole.size
  wide = np.asarray(q, np.float64)

  def one(lane, span, block, k, v, seen):
    x = np.where(seen, wide[lane, span] @ k[lane, block].T * scale, -np.inf)
    with np.errstate(divide="ignore"):
      total = np.log(np.exp(x).sum(1))
    p = np.exp(x - np.where(np.isneginf(total), 0, total)[:, None])
    np.testing.assert_allclose(lse[lane, span], total, atol=1e-4)
    np.testing.assert_allclose(
      np.asarray(o[lane, span], np.float64), p @ v[lane, block], atol=3e-2
    )
    return (~seen.any(1)).sum()

  empty = by_tiles(one, q, k, v, tiles)
  assert len(empty) == TILES.sum()


@pytest.mark.parametrize("width, d", [(64, 64), (128, 128)])
def test_equals_the_oracle(width, d):
  with interpreted():
    check(width, d)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_equals_the_oracle_on_gpu(width, d):
  check(width, d)
