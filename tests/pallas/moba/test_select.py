"""The choice of blocks: streamed, against sorts that are written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.layout import packed, uniform
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.ref import choose_plainly
from isthmus.pallas.moba.select import choose
from tests.pallas.moba.sets import table

pytestmark = pytest.mark.once


def draw(b, t, s, n, heads, d, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  q = jax.random.normal(keys[0], (b, t, n, d)).astype(dtype)
  return q, jax.random.normal(keys[1], (b, s, heads, d)).astype(dtype)


IDS = np.repeat([0, 1, 0], [17, 1, 19])[None]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  "top_k, tile", [(3, (8, 2)), (5, (10, 3)), (2, (256, 64))]
)
def test_equals_the_sets(top_k, tile, causal, packs):
  q, k = draw(1, 37, 37, 6, 2, 8)
  if packs:
    ids = jnp.asarray(IDS, jnp.int32)
    layout = packed(ids, block=4, max_segments=3, causal=causal)
  else:
    layout, ids = uniform(37, 37, block=4, causal=causal), None
  settings = {"top_k": top_k, "causal": causal}
  middle = pool(k, layout, block=4)
  found = choose(q, middle, layout, tile=tile, **settings)
  want = table(q, k, block=4, segment_ids=ids, width=top_k, **settings)
  np.testing.assert_array_equal(found, want)
  # The reference makes the same choice, by another way.
  plain = choose_plainly(q, middle, layout, **settings)
  np.testing.assert_array_equal(plain, want)


def test_rows_at_positions():
  q, k = draw(2, 5, 30, 2, 2, 8)
  places = jnp.array([[-1, 3, 29, 30, 40], [8, 7, 6, 5, 4]], jnp.int32)
  layout = uniform(5, 30, block=4, positions=places)
  found = choose(q, pool(k, layout, block=4), layout, top_k=3, tile=(4, 2))
  want = table(q, k, block=4, top_k=3, q_positions=places, width=3)
  own = np.asarray(layout.own)[:, None, :]
  np.testing.assert_array_equal(found[..., 0], np.broadcast_to(own, (2, 2, 5)))
  # A query without an own block leaves the first place empty.
  moved = np.where(own[..., None] < 0, np.roll(want, 1, axis=-1), want)
  np.testing.assert_array_equal(found, moved)


@pytest.mark.parametrize("causal", [True, False])
def test_of_equal_scores_the_later_block_across_tiles(causal):
  """Ties of 0 and -0 as well, in every tile size."""
  q = jnp.array([1.0, -1.0] * 10).reshape(1, 20, 1, 1)
  middle = jnp.array([0.0, -0.0, 1, 1, 0, -0.0, 0, -1, 1, 0] * 2)
  layout = uniform(20, 20, block=1, causal=causal)
  want = None
  for width in (1, 2, 3, 7, 32):
    found = choose(
      q,
      middle.reshape(1, 20, 1, 1),
      layout,
      top_k=6,
      causal=causal,
      tile=(8, width),
    )
    want = found if want is None else want
    np.testing.assert_array_equal(found, want)
  scores = np.asarray(q)[0, :, 0, 0][:, None] * np.asarray(middle)
  for i in range(20):
    able = range(i) if causal else range(20)
    best = sorted(able, key=lambda j: (-scores[i, j], -j))
    best = [i, *best[:5]] if causal else best[:6]
    assert found[0, 0, i].tolist()[: len(best)] == best


def test_all_blocks_need_no_scores():
  """And NaN in what isn't asked changes nothing."""
  q, _ = draw(1, 12, 12, 2, 1, 4)
  layout = uniform(12, 12, block=4)
  middle = jnp.full((1, 3, 1, 4), jnp.nan)
  f = functools.partial(choose, layout=layout, top_k=4)
  text = str(jax.make_jaxpr(lambda q: f(q, middle))(q))
  assert "dot_general" not in text and "top_k[" not in text
  want = [[0, -1, -1, -1]] * 4 + [[1, 0, -1, -1]] * 4 + [[2, 1, 0, -1]] * 4
  assert choose(q, middle, layout, top_k=4)[0, 1].tolist() == want


def test_scores_are_never_all_there():
  """Nothing of t x g in the compiled program, at any dtype."""
  t, g = 8192, 1024
  q = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
  middle = jax.ShapeDtypeStruct((1, g, 1, 16), jnp.float32)
  layout = uniform(t, t, block=8)
  compiled = choose.lower(q, middle, layout, top_k=4).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < t * g
  assert memory.output_size_in_bytes == t * 4 * 4


def top_case(top_k, block, d, sizes, causal):
  """At most one index in 200 may fall otherwise than in float64."""
  b, n, t = sizes
  q, k = draw(b, t, t, n, n, d, jnp.bfloat16)
  layout = uniform(t, t, block=block, causal=causal)
  middle = pool(k, layout, block=block)
  found = np.asarray(choose(q, middle, layout, top_k=top_k, causal=causal))
  wide = np.asarray(middle, np.float64).transpose(0, 2, 3, 1)
  scores = np.asarray(q, np.float64).swapaxes(1, 2) @ wide
  j, own = np.arange(middle.shape[1]), np.arange(t)[:, None] // block
  if causal:
    scores = np.where(j == own, np.inf, np.where(j < own, scores, -np.inf))
  best = np.argsort(scores, axis=-1, kind="stable")[..., ::-1]
  best = np.where(np.take_along_axis(scores, best, -1) > -np.inf, best, -1)
  width = min(top_k, best.shape[-1])
  assert (found[..., width:] == -1).all()
  if width == middle.shape[1]:  # all of them, in another order
    found, best = np.sort(found[..., :width]), np.sort(best)
  assert (found[..., :width] != best[..., :width]).mean() < 0.005


TOPS = (1, 2, 4, 8, 16, 24, 32, 33, 64)
SIZES = ((1, 4, 128), (2, 8, 256), (4, 16, 512), (8, 2, 1024))
TURNS = [
  (top_k, (1, 16, 32)[i % 3], (64, 128, 256)[i % 3], SIZES[i % 2], i % 4 < 2)
  for i, top_k in enumerate(TOPS)
]


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_grid(turn):
  top_case(*turn)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("block", [1, 16, 32])
@pytest.mark.parametrize("top_k", TOPS)
def test_whole_grid(top_k, block, d, sizes):
  for causal in (True, False):
    top_case(top_k, block, d, sizes, causal)
