"""The selecting kernel alone, against one sort of all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas.moba import mosaic
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import packed, uniform
from isthmus.pallas.moba.mosaic_select import MOST
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.ref import choose_plainly
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


def check(shape, block, top_k, causal=True, ids=None, levels=2):
  """Scores of coarse numbers are exact, and often equal."""
  b, t, n, k, d = shape
  q, key, *_ = inputs(b, t, t, n, k, d, dtype=jnp.bfloat16)
  q, key = (jnp.round(levels * x) / levels for x in (q, key))
  if ids is None:
    layout = uniform(t, t, block=block, causal=causal)
  else:
    layout = packed(ids, block=block, max_segments=4, causal=causal)
  centroids = pool(key, layout, block=block)
  options = Options(block=block, top_k=top_k, causal=causal)
  found = np.asarray(
    jax.jit(mosaic._choose, static_argnums=0)(options, q, key, Extras(layout))
  )
  want = choose_plainly(q, centroids, layout, top_k=top_k, causal=causal)
  assert found.shape == want.shape
  if causal:
    np.testing.assert_array_equal(found[..., 0], want[..., 0])
    found, want = found[..., 1:], want[..., 1:]
  np.testing.assert_array_equal(np.sort(found, -1), np.sort(want, -1))
  return q, centroids, layout


IDS = jnp.asarray(np.repeat([0, 1, 0], [70, 11, 69])[None], jnp.int32)


def test_equals_the_sort():
  """Several tiles of rows and of centroids, groups, rows that lack blocks."""
  with interpreted():
    check((1, 150, 2, 1, 64), block=2, top_k=6)


def test_equal_scores_and_segments():
  with interpreted():
    q, centroids, _ = check((1, 150, 1, 1, 64), 4, 4, ids=IDS, levels=0.5)
  scores = jnp.einsum("btnd,bgkd->btg", q, centroids)
  assert len(np.unique(scores)) < 0.2 * scores.size


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 9, MOST + 1])
@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_any_length(count, causal):
  with interpreted():
    check((2, 200, 2, 2, 64), block=2, top_k=count, causal=causal)


# (batch, heads, tokens) of the grid of FlashMoBA's suite.
SHAPES = ((1, 4, 128), (2, 8, 256), (4, 16, 512), (8, 2, 1024))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block", [1, 16, 32])
@pytest.mark.parametrize("top_k", [1, 2, 4, 8, 16, 24, 32, 33, 64])
def test_grid_on_gpu(shape, d, block, top_k):
  b, n, t = shape
  check((b, t, n, n, d), block, top_k)
  check((b, t, n, n // 2, d), block, top_k, causal=False)
