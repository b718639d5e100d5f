"""Mean keys of blocks, with rows and blocks of any length."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba import pool as module
from isthmus.pallas.moba.layout import packed, uniform
from isthmus.pallas.moba.pool import pool
from tests.pallas.moba.sets import blocks, means, runs

pytestmark = pytest.mark.once


def keys(*shape, dtype=jnp.float32, seed=0):
  draw = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(draw, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_last_block_counts_its_own_tokens(dtype):
  k = keys(2, 37, 3, 8, dtype=dtype)
  found = pool(k, uniform(37, 37, block=8), block=8)
  assert found.dtype == dtype
  for row in range(2):
    want = means(np.asarray(k[row]), blocks([(0, 37)], 8))
    want = want.astype(np.float32)
    np.testing.assert_allclose(found[row], want, rtol=8e-3, atol=1e-6)


def test_sums_are_float32():
  """In bfloat16 a sum of ones stops at 256."""
  k = jnp.ones((1, 512, 1, 4), jnp.bfloat16)
  np.testing.assert_array_equal(
    pool(k, uniform(512, 512, block=512), block=512), 1
  )
  layout = packed(jnp.zeros((1, 512), jnp.int32), block=512, max_segments=1)
  np.testing.assert_array_equal(pool(k, layout, block=512), 1)


def row_case(b, s, heads, d, block, bound):
  """Rows of several segments, some of length 0, NaN in the one after."""
  rng = np.random.default_rng(s + block)
  cuts = np.sort(rng.integers(0, s, (b, 5)), axis=1)
  cuts[0, 2] = cuts[0, 1]  # nothing between
  ids = (np.arange(s)[None, :, None] >= cuts[:, None]).sum(-1)
  k = np.asarray(keys(b, s, heads, d, dtype=jnp.bfloat16)).copy()
  k[ids == 5] = np.nan
  layout = packed(jnp.asarray(ids, jnp.int32), block=block, max_segments=bound)
  found = pool(jnp.asarray(k), layout, block=block)
  for row in range(b):
    where = blocks(runs(ids[row]), block)
    want = means(k[row], where).astype(np.float32)
    ours = np.asarray(found[row], np.float32)
    np.testing.assert_allclose(ours[: len(where)], want, atol=1e-2)
    assert not ours[len(where) :].any()


ROWS = [
  (1, 512, 4, 64, 32, 6),
  (8, 512, 12, 64, 512, None),
  (1, 2048, 4, 128, 128, None),
  (1, 512, 4, 256, 64, 9),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_grid_of_packed_rows(case):
  row_case(*case)


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("s", [512, 2048])
@pytest.mark.parametrize("b", [1, 8])
def test_whole_grid_of_packed_rows(b, s, heads, d, block):
  row_case(b, s, heads, d, block, 6)


def test_blocks_are_read_some_at_a_time(monkeypatch):
  """As many as there are, under a bound that is far too large."""
  monkeypatch.setattr(module, "_SOME", 4)
  k = keys(2, 40, 1, 4, seed=3)
  ids = jnp.asarray(np.arange(40)[None] >= np.array([[13], [40]]), jnp.int32)
  pool.clear_cache()
  whole = pool(k, packed(ids, block=8), block=8)
  pool.clear_cache()
  assert whole.shape == (2, 40, 1, 4)
  want = means(np.asarray(k[0]), blocks([(0, 13), (13, 40)], 8))
  np.testing.assert_allclose(whole[0, :6], want, atol=1e-6)
  assert not np.asarray(whole[:, 6:]).any()
