"""Blocks of a cache: whatever the order of appending, the same means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import EMPTY, KVCache
from isthmus.attention.moba_cache import MobaCache, is_lost

pytestmark = pytest.mark.once

K = jax.random.normal(jax.random.key(0), (2, 9, 2, 4))
V = jax.random.normal(jax.random.key(1), (2, 9, 2, 3))


def empty(**settings):
  sizes = {"batch": 2, "capacity": 11, "num_kv_heads": 2, "head_dim": 4}
  return MobaCache.init(**{**sizes, "block": 3, "value_dim": 3, **settings})


def fill(cache, steps, k=K, v=V, places=None):
  start = 0
  for t in steps:
    at = slice(start, start + t)
    some = None if places is None else places[:, at]
    cache = cache.append(k[:, at], v[:, at], positions=some)
    start += t
  return cache


@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 3, 1]])
def test_running_means_are_those_of_the_keys(steps):
  cache = fill(empty(), steps)
  assert cache.counts.tolist() == [[3, 3, 3, 0]] * 2
  want = np.asarray(K, np.float64).reshape(2, 3, 3, 2, 4).mean(2)
  np.testing.assert_allclose(cache.centroids()[:, :3], want, atol=1e-6)
  np.testing.assert_array_equal(cache.centroids()[:, 3], 0)
  assert cache.slots.tolist() == [[*range(9), -1, -1]] * 2
  k, v = cache.ordered()
  np.testing.assert_array_equal(k[:, :9], K)
  np.testing.assert_array_equal(v[:, :9], V)
  np.testing.assert_array_equal(k[:, 9:], 0)
  assert int(cache.length) == 9 and cache.capacity == 11


def test_a_closed_block_stays():
  cache = fill(empty(), [4])
  before = cache.centroids()
  later = cache.append(K[:, 4:5], V[:, 4:5]).centroids()
  np.testing.assert_array_equal(later[:, 0], before[:, 0])
  assert np.abs(later[:, 1] - before[:, 1]).max() > 0.01


def test_ragged_rows_are_in_the_order_of_their_positions():
  places = jnp.array(
    [[0, 1, EMPTY, EMPTY, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
    jnp.int32,
  )
  real = np.asarray(places[0]) != EMPTY
  for steps in ([9], [4, *[1] * 5]):
    # What padding holds is never read.
    k = K.at[0, 2:4].set(jnp.nan)
    cache = fill(empty(), steps, k, V, places)
    assert cache.counts.tolist() == [[3, 3, 1, 0], [3, 3, 3, 0]]
    assert cache.slots[0, :7].tolist() == [0, 1, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(cache.ordered()[0][0, :7], K[0, real])
    alone = fill(empty(batch=1), [7], K[:1, real], V[:1, real])
    np.testing.assert_allclose(
      cache.centroids()[0], alone.centroids()[0], atol=1e-6
    )


def test_means_are_of_what_is_stored():
  cache = fill(empty(dtype=jnp.bfloat16), [9])
  assert cache.k.dtype == jnp.bfloat16 and cache.sums.dtype == jnp.float32
  stored = K.astype(jnp.bfloat16).astype(jnp.float32)
  want = stored.reshape(2, 3, 3, 2, 4).sum(2)
  np.testing.assert_allclose(cache.sums[:, :3], want, rtol=1e-6, atol=1e-6)
  assert cache.centroids().dtype == jnp.bfloat16


def test_past_the_capacity():
  cache = fill(empty(capacity=8), [8])
  over = cache.append(K[:, 8:], V[:, 8:])
  assert is_lost(over, jnp.array([[7, 8, EMPTY]])).tolist() == [
    [False, True, False]
  ]
  assert np.isnan(over.k[:, -1]).all()
  np.testing.assert_array_equal(over.sums, cache.sums)
  # Padding took its slots: there are positions left, and no room for them.
  places = jnp.array([[*[EMPTY] * 4, 0, 1, 2, 3]] * 2, jnp.int32)
  full = fill(empty(capacity=8), [8], places=places)
  over = full.append(K[:, :1], V[:, :1], positions=jnp.array([[4]], jnp.int32))
  assert np.isnan(over.ordered()[0][:, 4]).all()


def test_passes_through_jit_in_place():
  step = jax.jit(lambda cache, k, v: cache.append(k, v), donate_argnums=0)
  cache = empty()
  for i in range(9):
    cache = step(cache, K[:, i : i + 1], V[:, i : i + 1])
  np.testing.assert_array_equal(cache.k, fill(empty(), [1] * 9).k)
  assert cache.block == 3 and isinstance(cache.kv, KVCache)


def test_the_plain_cache_inside_is_the_plain_cache():
  plain = KVCache.init(
    batch=2, capacity=11, num_kv_heads=2, head_dim=4, value_dim=3
  ).append(K, V)
  ours = fill(empty(), [9]).kv
  for field in dataclasses.fields(plain):
    np.testing.assert_array_equal(
      getattr(ours, field.name), getattr(plain, field.name)
    )


def test_a_block_of_nothing_is_refused():
  with pytest.raises(ValueError, match="block is 0"):
    empty(block=0)
