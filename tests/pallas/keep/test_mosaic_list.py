"""The best of a warp's row as a list: bounds, ties, and where none are."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.keep import mosaic
from isthmus.pallas.keep.api import Options
from isthmus.pallas.keep.mosaic_list import between, lists
from tests.pallas.keep.cases import listed

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@pytest.mark.once
@pytest.mark.parametrize("count", [True, False])
def test_bounds_keep_what_a_sort_keeps(count):
  rng = np.random.default_rng(int(count))
  x = np.exp(rng.normal(0, 2, (40, 50))).astype(np.float32)
  x[:20] = rng.integers(0, 5, (20, 50))
  bits = x.view(np.int32).copy()
  bits[rng.random(x.shape) < 0.3] = -1
  bits[3] = -1
  weight = np.where(bits < 0, 0, 1 if count else x)
  target = (rng.random(40) * 1.1 * weight.sum(1)).astype(np.float32)
  low, high, have = map(
    np.asarray, between(jnp.asarray(bits), jnp.asarray(target), count=count)
  )
  for i, row in enumerate(bits):
    sure, reached = row >= high[i], row >= low[i]
    np.testing.assert_allclose(have[i], weight[i][sure].sum(), rtol=1e-5)
    if weight[i].sum() >= target[i] > 0:
      middle = np.unique(row[reached & ~sure])
      assert middle.size == 1 and have[i] < target[i]
      assert weight[i][reached].sum() >= target[i] * (1 - 1e-5)
    else:
      np.testing.assert_array_equal(sure, row >= 0)


@pytest.mark.once
def test_of_equal_ones_the_first_as_far_as_they_are_wanted():
  rng = np.random.default_rng(0)
  x = rng.integers(1, 3, (6, 40)).astype(np.float32)
  above, ends = (x == 2).sum(1), np.full(6, 36, np.int32)
  wanted = np.array([0, 1, 4, 0, 99, 0])
  target = (2 * above + wanted - 0.5).astype(np.float32)
  target[3], target[5] = 0, 3
  forced = np.array([-1, -1, 0, 7, 39, -1], np.int32)
  args = map(jnp.asarray, (x.view(np.int32), target, forced, ends))
  num, index = lists(*args, count=False)
  found = listed(num, index)
  for row in range(6):
    order = np.argsort(-x[row], kind="stable")
    before = np.cumsum(x[row][order]) - x[row][order]
    kept = np.zeros(40, bool)
    kept[order[before < target[row]]] = True
    if forced[row] >= 0:
      kept[forced[row]] = True
    kept[36:] = False
    np.testing.assert_array_equal(found[row], kept)
    assert not np.asarray(index)[row, num[row] :].any()


def check_ties(m):
  """Rows of few values, by the whole kernel, against numpy."""
  rng = np.random.default_rng(m)
  x = rng.integers(1, 4, (64, m)).astype(np.float32)
  target = np.linspace(0, 2.2 * m, 64).astype(np.float32)
  limit = np.linspace(m, 1, 64).astype(np.int32)
  args = map(jnp.asarray, (x, target, limit, np.int32(0), limit))
  found = listed(*mosaic.keep(*args, options=Options("value")))
  for row in range(64):
    part = x[row, : limit[row]]
    order = np.argsort(-part, kind="stable")
    before = np.cumsum(part[order]) - part[order]
    kept = np.zeros(m, bool)
    kept[order[before < target[row]]] = True
    kept[0] = True
    np.testing.assert_array_equal(found[row], kept)
  return True


@pytest.mark.once
@needs_mosaic
def test_ties():
  with interpreted():
    assert check_ties(130)


@pytest.mark.once
@pytest.mark.gpu
@pytest.mark.parametrize("m", [130, 1024, mosaic.MOST])
def test_ties_on_gpu(m):
  assert check_ties(m)
