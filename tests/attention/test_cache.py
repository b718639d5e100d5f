"""Appending to a cache and attending to it equals attending to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import EMPTY, KVCache, attention, decode


def inputs(b=2, t=7, n=4, k=2, d=8):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(b, t, n, d), (b, t, k, d), (b, t, k, d)]
  return [
    jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)
  ]


def empty(capacity, **kwargs):
  settings = {"batch": 2, "num_kv_heads": 2, "head_dim": 8, **kwargs}
  return KVCache.init(capacity=capacity, **settings)


@pytest.mark.parametrize("steps", [[7], [4, 1, 1, 1], [1, 2, 4]])
def test_decode_equals_the_whole(steps):
  q, k, v = inputs()
  whole = attention(q, k, v, causal=True)
  cache, start, parts = empty(10), 0, []
  for t in steps:
    at = slice(start, start + t)
    cache = cache.append(k[:, at], v[:, at])
    places = jnp.arange(start, start + t, dtype=jnp.int32)[None, None]
    parts.append(
      attention(
        q[:, at],
        cache.k,
        cache.v,
        causal=True,
        q_positions=places,
        kv_positions=cache.positions[:, None],
      )
    )
    start += t
  assert int(cache.length) == 7 and cache.capacity == 10
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)


def test_empty_slots_are_not_seen_whatever_they_hold():
  q, k, v = inputs()
  cache = empty(10).append(k, v)
  bad = KVCache(
    k=cache.k.at[:, 7:].set(jnp.nan),
    v=cache.v.at[:, 7:].set(jnp.nan),
    positions=cache.positions,
    length=cache.length,
  )
  out = attention(q, bad.k, bad.v, kv_positions=bad.positions[:, None])
  np.testing.assert_allclose(out, attention(q, k, v), atol=1e-6)


def test_positions_are_kept_and_padding_is_empty():
  _, k, v = inputs(t=3)
  places = jnp.asarray([[0, 1, 2], [0, 1, EMPTY]], jnp.int32)
  cache = empty(5).append(k, v, positions=places)
  cache = cache.append(
    k[:, :1], v[:, :1], positions=jnp.asarray([[3], [2]], jnp.int32)
  )
  e = EMPTY
  assert cache.positions.tolist() == [[0, 1, 2, 3, e], [0, 1, e, 2, e]]
  np.testing.assert_array_equal(cache.k[:, 3], k[:, 0])


def test_padding_holds_0_whatever_was_given():
  """So that reading it can't harm; attention and decode agree."""
  q, k, v = inputs(t=3)
  places = jnp.asarray([[0, 1, 2], [EMPTY, 0, 1]], jnp.int32)
  bad = (x.at[1, 0].set(jnp.nan) for x in (k, v))
  cache = empty(5).append(*bad, positions=places)
  for got, x in ((cache.k, k), (cache.v, v)):
    assert not np.any(got[1, 0])
    np.testing.assert_array_equal(got[0, :3], x[0])
    np.testing.assert_array_equal(got[1, 1:3], x[1, 1:])
  want = attention(q[1:, 2:], k[1:, 1:], v[1:, 1:])
  o = jax.jit(decode)(q[:, 2:], cache)
  np.testing.assert_allclose(o[1:], want, atol=1e-6)


def test_overflow_is_nan_and_never_silent():
  _, k, v = inputs(t=3)
  append = jax.jit(lambda c: c.append(k, v))
  full = append(empty(5))
  assert not np.isnan(full.k).any()
  assert np.isnan(append(full).k).any() and np.isnan(append(full).v).any()
  with pytest.raises(ValueError, match="3 keys .* capacity 2"):
    empty(2).append(k, v)


def test_shapes_that_do_not_fit():
  _, k, v = inputs(k=4)
  with pytest.raises(ValueError, match="2 heads"):
    empty(8).append(k, v)


def test_init_with_layers_and_widths():
  cache = empty(5, value_dim=3, depth=6, dtype=jnp.bfloat16)
  assert cache.k.shape == (6, 2, 5, 2, 8) and cache.v.shape == (6, 2, 5, 2, 3)
  assert cache.positions.shape == (6, 2, 5) and cache.length.shape == (6,)
  assert cache.k.dtype == jnp.bfloat16 and (cache.positions == EMPTY).all()
  assert cache.capacity == 5
  assert len(jax.tree.leaves(cache)) == 4
