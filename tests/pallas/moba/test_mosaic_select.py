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
from isthmus.pallas.moba.mosaic_select import MOST, spans
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.ref import choose_plainly
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


def check(shape, block, top_k, causal=True, ids=None, levels=2):
  """Scores of coarse numbers are exact, and often equal."""
  b, t, n, k, d = shape
  q, key, *_ = inputs(b, t, t, n, k, d, dtype=jnp.bfloat16)
  q, key = (jnp.round(levels * x) / levels for x in (q, key))
  found, want, centroids, layout = both(q, key, block, top_k, causal, ids)
  np.testing.assert_array_equal(found, want)
  return q, centroids, layout


def both(q, key, block, top_k, causal=True, ids=None):
  """The blocks that the kernel chooses and those of a sort, own ones first."""
  t = q.shape[1]
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
  own = int(causal)
  found, want = (
    np.concatenate([x[..., :own], np.sort(x[..., own:], -1)], -1)
    for x in (found, np.asarray(want))
  )
  return found, want, centroids, layout


def check_orders(t, block, top_k, ids=None):
  """Heads whose scores rise, fall, and are equal; a tile that is all better."""
  j = jnp.arange(t) // block
  zero = jnp.zeros_like(j)
  # j to base 128, whose digits are exact.
  digits = jnp.stack([j % 128, j // 128, *[zero] * 62], axis=-1)
  key = jnp.stack([digits, digits[::-1], 0 * digits + 1], axis=1)
  weights = jnp.zeros(64).at[:2].set(jnp.array([1, 128.0]))
  q = jnp.broadcast_to(weights, (1, t, 3, 64))
  q, key = (x.astype(jnp.bfloat16) for x in (q, key[None]))
  found, want, *_ = both(q, key, block, top_k, ids=ids)
  np.testing.assert_array_equal(found, want)


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


@pytest.mark.parametrize("top_k, cut", [(4, 0), (20, 40)])
def test_any_order_of_scores(top_k, cut):
  """Three tiles of centroids; a segment begins within one, or none does."""
  ids = np.repeat([0, 1], [cut, 190 - cut])[None]
  with interpreted():
    check_orders(190, 1, top_k, jnp.asarray(ids, jnp.int32) if cut else None)


def test_what_queries_of_a_tile_may_choose():
  """Tiles with a query that may choose none, of one segment, and padded."""
  first = np.repeat([[0, 5], [0, 0]], [64, 66], axis=1)
  last = np.repeat([[4, 9], [7, 7]], [64, 66], axis=1)
  first[0, 3], last[0, 3] = 6, 6
  found = spans(jnp.asarray(first), jnp.asarray(last), 20)
  assert found.tolist() == [
    [[0, 5, 5], [4, 9, 9], [6, 5, 20], [4, 9, 0]],
    [[0, 0, 0], [7, 7, 7], [0, 0, 20], [7, 7, 0]],
  ]


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [2, 30])
def test_segments_and_lists(top_k):
  with interpreted():
    check((1, 150, 1, 1, 64), 2, top_k, ids=IDS, levels=0.5)


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


# Lists of 1, 8, 32 and 64 places.
@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [2, 9, 33, 65])
def test_lists_on_gpu(top_k):
  """Short rows and long ones, equal scores, segments, any order."""
  check((2, 70, 4, 2, 64), 1, top_k)
  check((1, 4096, 4, 2, 128), 2, top_k, levels=8)
  check((1, 4096, 4, 2, 128), 4, top_k, levels=0.5)
  check((2, 2048, 4, 2, 64), 1, top_k, causal=False)
  check_orders(1500, 1, top_k)
  ids = np.repeat([0, 1, 0], [700, 111, 690])[None]
  ids = jnp.asarray(ids, jnp.int32)
  check((1, 1501, 4, 2, 64), 2, top_k, ids=ids)
  check((1, 1501, 4, 2, 64), 2, top_k, ids=ids, levels=0.5)
  check_orders(1501, 1, top_k, ids)


@pytest.mark.gpu
def test_the_same_lists_each_time_on_gpu():
  q, key, *_ = inputs(1, 8192, 8192, 4, 2, 128, dtype=jnp.bfloat16)
  options, layout = Options(block=16, top_k=32), uniform(8192, 8192, block=16)
  choose = jax.jit(mosaic._choose, static_argnums=0)
  first, *more = (choose(options, q, key, Extras(layout)) for _ in range(4))
  for x in more:
    np.testing.assert_array_equal(np.asarray(first), np.asarray(x))
