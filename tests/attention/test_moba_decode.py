"""Reading a cache block by block equals routing over the whole sequence."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import EMPTY, moba
from isthmus.attention.moba_cache import MobaCache
from isthmus.attention.moba_decode import moba_decode, moba_prefill
from tests.attention.oracle import inputs
from tests.nets import suite

pytestmark = pytest.mark.once

T = 23


def draw(b=2, n=4, k=2, dv=5, dtype=jnp.float32):
  return inputs(b, T, T, n, k, 8, dv, dtype)[:3]


def empty(k, v, block, capacity=26):
  return MobaCache.init(
    batch=len(k),
    capacity=capacity,
    num_kv_heads=k.shape[2],
    head_dim=k.shape[3],
    value_dim=v.shape[3],
    block=block,
    dtype=k.dtype,
  )


@pytest.mark.parametrize(
  "block, top_k, heads, dtype",
  [
    (4, 3, (4, 2), "float32"),
    (4, 3, (4, 2), "bfloat16"),
    (4, 1, (2, 2), "float32"),
    (1, 5, (3, 1), "float32"),
    (5, 99, (2, 2), "float32"),
  ],
)
def test_steps_equal_the_whole(block, top_k, heads, dtype):
  """A prompt, then one token a step, then two at once."""
  q, k, v = draw(n=heads[0], k=heads[1], dtype=dtype)
  whole = functools.partial(moba, block=block, top_k=top_k, return_lse=True)
  want, lse = suite.jit(whole)(q, k, v)
  cache = empty(k, v, block).append(k[:, :12], v[:, :12])
  places = jnp.arange(12, dtype=jnp.int32)[None]
  first = suite.jit(
    lambda q, cache: moba_prefill(q, cache, top_k=top_k, positions=places)
  )(q[:, :12], cache)
  tol = 1e-5 if dtype == "float32" else 0.02
  close = functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol)
  close(first.astype("f4"), want[:, :12].astype("f4"))

  @suite.jit
  def step(q, k, v, cache):
    cache = cache.append(k, v)
    return moba_decode(q, cache, top_k=top_k, return_lse=True), cache

  start = 12
  for t in (*[1] * 9, 2):
    at = slice(start, start + t)
    (o, l), cache = step(q[:, at], k[:, at], v[:, at], cache)
    assert o.dtype == dtype and l.dtype == jnp.float32
    close(o.astype("f4"), want[:, at].astype("f4"))
    close(l, lse[:, :, at])
    start += t
  assert start == T


def test_what_is_compared_differs():
  """Dense attention, and another choice, are not near."""
  q, k, v = draw()
  cache = empty(k, v, 4).append(k, v)
  ours = moba_decode(q[:, -1:], cache, top_k=3)
  for top_k in (2, 4, 99):
    other = moba_decode(q[:, -1:], cache, top_k=top_k)
    assert np.abs(ours - other).max() > 1e-2, top_k


def test_ragged_prompts():
  """A padded prompt, and tokens after it, are as if alone."""
  q, k, v = draw()
  real = [*range(7), *range(11, T)]  # 4 slots of padding in row 0
  places = np.full((2, T), EMPTY, np.int32)
  places[0, real], places[1] = np.arange(T - 4), np.arange(T)
  places = jnp.asarray(places)
  cache = empty(k, v, 4)
  cache = cache.append(k[:, :11], v[:, :11], positions=places[:, :11])
  first = moba_prefill(q[:, :11], cache, top_k=3, positions=places[:, :11])
  parts = [first]

  @suite.jit
  def step(q, k, v, places, cache):
    cache = cache.append(k, v, positions=places)
    return moba_decode(q, cache, top_k=3, positions=places), cache

  for i in range(11, T):
    at = slice(i, i + 1)
    o, cache = step(q[:, at], k[:, at], v[:, at], places[:, at], cache)
    parts.append(o)
  got = jnp.concatenate(parts, 1)
  whole = suite.jit(functools.partial(moba, block=4, top_k=3))
  alone = jnp.asarray(real)
  short = whole(*(x[:1, alone] for x in (q, k, v)))
  np.testing.assert_allclose(got[:1, alone], short, atol=1e-5)
  np.testing.assert_allclose(got[1:], whole(q, k, v)[1:], atol=1e-5)
  assert np.isfinite(got).all()
  # By default a query stands at the slot's own position.
  last = moba_decode(q[:, -1:], cache, top_k=3)
  np.testing.assert_allclose(last, got[:, -1:], atol=1e-5)


def test_only_the_chosen_blocks_are_read():
  q, k, v = draw(n=1, k=1)
  cache = empty(k, v, 4).append(k, v)
  want = moba_decode(q[:, -1:], cache, top_k=2)
  scores = jnp.einsum("btnd,bgkd->bg", q[:, -1:], cache.centroids())[:, :5]
  best = np.asarray(scores.argmax(-1))
  unread = np.ones((2, 26), bool)
  for row in range(2):
    unread[row, 4 * best[row] : 4 * best[row] + 4] = False
  unread[:, 20:T] = False
  bad = jnp.asarray(unread)[..., None, None]
  kv = dataclasses.replace(
    cache.kv,
    k=jnp.where(bad, jnp.nan, cache.kv.k),
    v=jnp.where(bad, jnp.nan, cache.kv.v),
  )
  got = moba_decode(q[:, -1:], dataclasses.replace(cache, kv=kv), top_k=2)
  np.testing.assert_array_equal(got, want)


def test_of_equal_scores_the_newest():
  q = jnp.zeros((1, 1, 1, 8))
  k = jnp.ones((1, 12, 1, 8))
  v = jnp.arange(12.0).reshape(1, 12, 1, 1)
  cache = empty(k, v, 2).append(k, v)
  o = moba_decode(q, cache, top_k=3)
  assert o.item() == np.mean([6, 7, 8, 9, 10, 11])


def test_scale():
  q, k, v = draw()
  cache = empty(k, v, 4).append(k, v)
  want = moba(q, k, v, block=4, top_k=3, scale=0.9)[:, -1:]
  got = moba_decode(q[:, -1:], cache, top_k=3, scale=0.9)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(got - moba_decode(q[:, -1:], cache, top_k=3)).max() > 1e-2


def test_past_the_capacity_is_nan():
  """And says nothing of the rows that have room."""
  q, k, v = draw()
  cache = empty(k, v, 4, capacity=T - 1).append(k[:, :-1], v[:, :-1])
  cache = cache.append(k[:, -1:], v[:, -1:])
  places = jnp.array([[T - 1], [T - 2]], jnp.int32)
  for call in (moba_decode, moba_prefill):
    o = suite.jit(
      lambda q, cache, call=call: call(q, cache, top_k=3, positions=places)
    )(q[:, -1:], cache)
    assert np.isnan(o[0]).all()
  _, lse = moba_decode(
    q[:, -1:], cache, top_k=3, positions=places, return_lse=True
  )
  assert np.isnan(lse[0]).all()


def test_a_query_without_keys():
  q, k, v = draw()
  cache = empty(k, v, 4)
  places = jnp.zeros((1, 1), jnp.int32)
  o, lse = moba_decode(
    q[:, :1], cache, top_k=2, positions=places, return_lse=True
  )
  np.testing.assert_array_equal(o, 0)
  np.testing.assert_array_equal(lse, -np.inf)


def test_refusals():
  q, k, v = draw()
  cache = empty(k, v, 4)
  for call, words in (
    (lambda: moba_decode(q[:1], cache, top_k=2), "meet a cache of keys"),
    (lambda: moba_decode(q[:, :, :3], cache, top_k=2), "3 query heads"),
    (lambda: moba_decode(q, cache, top_k=0), "top_k is 0"),
  ):
    with pytest.raises(ValueError, match=words):
      call()
