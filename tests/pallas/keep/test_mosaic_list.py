"""What a warp keeps of its row as a list: where there are ties."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.keep import mosaic
from isthmus.pallas.keep.api import Options
from isthmus.pallas.keep.mosaic_list import EQUAL, LISTED, SURE, lists
from tests.pallas.keep.cases import listed

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernel needs jax 0.11"
)


@pytest.mark.once
def test_of_equal_ones_the_first_as_far_as_they_are_wanted():
  rng = np.random.default_rng(0)
  kinds = rng.choice([0, EQUAL, SURE], (4, 40))
  code = kinds + np.where(rng.random((4, 40)) < 0.8, LISTED, 0)
  have, target = np.full((4, 1), 2.0), np.array([[2.0], [2.5], [5.0], [99.0]])
  wide = [np.broadcast_to(x, code.shape) for x in (have, target)]
  args = [jnp.asarray(x) for x in (code, np.full(code.shape, 0.75), *wide)]
  num, index = lists(*(x.astype(d) for x, d in zip(args, "ifff", strict=True)))
  found = listed(num, index)
  for row, wanted in enumerate([0, 1, 4, 40]):
    first = np.flatnonzero(kinds[row] == EQUAL)[:wanted]
    kept = (kinds[row] == SURE) | np.isin(np.arange(40), first)
    kept = kept & (code[row] >= LISTED)
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
