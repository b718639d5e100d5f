"""Which tokens a device has, and whom it sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.zigzag import (
  chunks,
  reach,
  spread,
  unzigzag,
  zigzag,
  zigzag_positions,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("numpy", [np, jnp])
def test_there_and_back(devices, axis, numpy):
  x = numpy.arange(48 * 48 * 2).reshape(48, 48, 2)
  y = zigzag(x, devices, axis)
  assert isinstance(y, np.ndarray) == (numpy is np)
  order = zigzag_positions(48, devices)
  x = np.asarray(x)
  np.testing.assert_array_equal(y, np.take(x, order, axis=axis))
  np.testing.assert_array_equal(unzigzag(y, devices, axis), x)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_each_device_has_the_tokens_that_it_says(devices):
  order = zigzag_positions(48, devices).reshape(devices, -1)
  for rank in range(devices):
    mine = spread(rank, devices, "zigzag", 48 // devices)
    np.testing.assert_array_equal(mine, order[rank])
    run = spread(jnp.asarray(rank), devices, "contiguous", 3)
    np.testing.assert_array_equal(run, 3 * rank + np.arange(3))


def test_causal_work_is_even():
  """Queries times keys: the same for every device."""
  order = zigzag_positions(48, 4).reshape(4, -1)
  work = [(order[r][:, None] >= np.arange(48)).sum() for r in range(4)]
  assert len(set(work)) == 1


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("devices", [1, 2, 4, 5, 8])
def test_reach_is_that_of_the_tokens(devices, layout):
  """Against every pair of tokens; no limit is all."""
  for size in (2, 6):
    places = np.stack(
      [spread(r, devices, layout, size) for r in range(devices)]
    )
    far = places[:, None, :, None] - places[None, :, None]
    for left in (None, 0, 1, 2, 5, 6, 7, 30):
      for right in (None, 0, 1, 4, 9):
        seen = np.ones(far.shape, bool)
        seen &= True if left is None else far <= left
        seen &= True if right is None else far >= -right
        seen = seen.any((2, 3))
        want = tuple(
          i
          for i in range(1, devices)
          if any(seen[r, (r - i) % devices] for r in range(devices))
        )
        assert reach(devices, size, layout, left, right) == want


def test_refused_length():
  with pytest.raises(ValueError, match="10 tokens are not a multiple of 4: "):
    zigzag(np.zeros((1, 10)), 2)


def test_chunks():
  assert [chunks(r, 3, "zigzag") for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
