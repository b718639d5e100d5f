"""Means of blocks, and tiles of a softmax, against whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.pooling import block_scores, pool_blocks, tile_softmax
from isthmus.pallas.scores import ref
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


def test_scores_are_of_mean_queries_and_the_keys_they_share():
  q, k, *_ = inputs(2, 21, 21, 4, 2, 8)
  means = [np.asarray(pool_blocks(x, size)) for x, size in ((q, 8), (k, 4))]
  score = block_scores(*(jnp.asarray(x) for x in means), 0.5)
  keys = np.repeat(means[1], 2, axis=2)
  want = np.einsum("bmnd,bgnd->bnmg", means[0], keys) * 0.5
  np.testing.assert_allclose(score, want, atol=1e-6)


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("length, side", [(37, 4), (16, 16), (5, 8)])
def test_tiles_of_the_softmax(length, side, reduce, monkeypatch):
  """Also where rows come in several portions."""
  q, k, *_ = inputs(2, length, length, 4, 2, 8)
  x = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), 2, axis=2)
  x = np.einsum("btnd,bsnd->bnts", *x) * 0.6
  x = np.where(np.tril(np.ones((length, length), bool)), x, -np.inf)
  p = np.exp(x - x.max(-1, keepdims=True))
  p = p / p.sum(-1, keepdims=True)
  ends = -length % side
  p = np.pad(p, ((0, 0), (0, 0), (0, ends), (0, ends)))
  tiles = p.shape[2] // side
  p = p.reshape(2, 4, tiles, side, tiles, side)
  want = (np.max if reduce == "max" else np.sum)(p, axis=(3, 5))
  for size in (ref.SIZE, 9 * length):
    monkeypatch.setattr(ref, "SIZE", size)
    found = tile_softmax(q, k, side=side, reduce=reduce, scale=0.6)
    np.testing.assert_allclose(found, want, atol=1e-6, rtol=1e-6)


def test_the_softmax_never_is_whole():
  x = jax.ShapeDtypeStruct((1, 2**14, 1, 16), jnp.bfloat16)
  f = lambda q, k: tile_softmax(q, k, side=32, scale=1.0)
  memory = jax.jit(f).lower(x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2**28 / 2
