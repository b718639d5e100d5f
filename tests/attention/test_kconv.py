"""The convolution of keys against loops; nothing from after, or elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from isthmus.attention import EMPTY, KVCache
from isthmus.attention.kconv import KeyConv, KeyConvCache, extend_kconv, kconv
from tests.attention.oracle import segments

pytestmark = pytest.mark.once


def inputs(t, w, b=2, heads=3, d=4):
  one, other = jax.random.split(jax.random.key(t + w))
  k = jax.random.normal(one, (b, t, heads, d))
  return k, jax.random.normal(other, (w, heads, d))


def by_loops(k, kernel, ids=None):
  """In float64, token by token."""
  k, kernel = np.asarray(k, np.float64), np.asarray(kernel, np.float64)
  ids = np.zeros(k.shape[:2]) if ids is None else np.asarray(ids)
  out = np.empty_like(k)
  for row, t in np.ndindex(k.shape[:2]):
    x = np.zeros(k.shape[2:])
    for l in range(len(kernel)):
      if t < l or (ids[row, t - l : t + 1] != ids[row, t]).any():
        break
      x += kernel[l] * k[row, t - l]
    out[row, t] = k[row, t] + x / (1 + np.exp(-x))
  return out


@pytest.mark.parametrize("w", [1, 3, 5])
@pytest.mark.parametrize("t", [1, 2, 7, 33])
def test_equals_the_loops(t, w):
  k, kernel = inputs(t, w)
  ids = segments(2, t)
  np.testing.assert_allclose(
    kconv(k, kernel), by_loops(k, kernel), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    kconv(k, kernel, segment_ids=ids), by_loops(k, kernel, ids), atol=1e-5
  )


def test_an_id_that_comes_back_is_another_segment():
  k, kernel = inputs(4, 5, b=1)
  apart = kconv(k, kernel, segment_ids=jnp.array([[1, 2, 1, 1]]))
  np.testing.assert_array_equal(
    apart, kconv(k, kernel, segment_ids=jnp.array([[1, 2, 3, 3]]))
  )
  whole = kconv(k, kernel)
  assert np.abs(apart - whole)[:, 2:].max() > 1e-2


def test_nothing_comes_from_later_tokens():
  k, kernel = inputs(9, 3)
  changed = kconv(k.at[:, 5:].set(jnp.nan), kernel)
  np.testing.assert_array_equal(changed[:, :5], kconv(k, kernel)[:, :5])
  assert np.isnan(changed[:, 5:]).all()


def test_nan_stays_in_its_segment():
  """In values, and in the gradient of the keys."""
  k, kernel = inputs(9, 5)
  ids = jnp.repeat(jnp.array([[0, 1, 2]]), 3, axis=1).repeat(2, axis=0)
  bad = k.at[:, 3:6].set(jnp.nan)

  def call(k):
    return kconv(k, kernel, segment_ids=ids)

  mine = jnp.array([0, 1, 2, 6, 7, 8])
  got, pull = jax.vjp(call, bad)
  want, right = jax.vjp(call, k)
  np.testing.assert_array_equal(got[:, mine], want[:, mine])
  np.testing.assert_array_equal(
    pull(jnp.ones_like(k))[0][:, mine], right(jnp.ones_like(k))[0][:, mine]
  )
  assert np.isnan(got[:, 3:6]).all()


def test_gradients():
  """Against differences in float64, across a segment's edge."""
  with jax.enable_x64(True):
    k, kernel = (jnp.asarray(np.asarray(x), "float64") for x in inputs(7, 3))
    ids = segments(2, 7)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(k.shape))

    def loss(k, kernel):
      k, kernel = jnp.asarray(k), jnp.asarray(kernel)
      return jnp.sum(weights * kconv(k, kernel, segment_ids=ids))

    check_grads(loss, (k, kernel), order=1, modes=["rev"])
    slope = jax.grad(loss, argnums=1)(k, jnp.zeros_like(kernel))
    assert np.abs(slope).min() > 1e-3  # silu leaves zero


def test_sums_are_float32():
  """256 + 1 has no bfloat16 number, 256 + 1 + 1 has."""
  k = jnp.ones((1, 3, 1, 1), jnp.bfloat16)
  kernel = jnp.array([256, 1, 1], jnp.bfloat16).reshape(3, 1, 1)
  got = kconv(k, kernel)
  assert got.dtype == jnp.bfloat16
  assert got.ravel().tolist() == [256.0, 258.0, 260.0]  # of 257, 258, 259


@pytest.mark.parametrize("w", [1, 3, 5])
@pytest.mark.parametrize("steps", [[7], [1] * 7, [2, 1, 4]])
def test_steps_equal_the_whole(w, steps):
  k, kernel = inputs(7, w)
  cache = KVCache.init(batch=2, capacity=8, num_kv_heads=3, head_dim=4)
  tail, start, parts = KeyConvCache.init(cache, width=w).tail, 0, []
  for t in steps:
    new, tail = extend_kconv(k[:, start : start + t], kernel, tail)
    parts.append(new)
    start += t
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), kconv(k, kernel), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize("places", [
  [[0, 1, 2, EMPTY, EMPTY, 3, 4], [0, 1, 2, 3, 4, 5, 6]],
  [[EMPTY, EMPTY, EMPTY, EMPTY, 0, 1, 2], [EMPTY, 0, 1, EMPTY, 2, 3, EMPTY]],
])  # fmt: skip
def test_padding_is_passed_over(places):
  """Tokens are as if there were none between them, whatever it holds."""
  k, kernel = inputs(7, 5)
  places = jnp.array(places, jnp.int32)
  real = np.asarray(places) != EMPTY
  k = jnp.where(real[..., None, None], k, jnp.nan)
  tail, parts = jnp.zeros((2, 4, 3, 4)), []
  for at in (slice(0, 4), slice(4, 5), slice(5, 7)):
    new, tail = extend_kconv(k[:, at], kernel, tail, positions=places[:, at])
    parts.append(new)
  got = jnp.concatenate(parts, 1)
  for row in range(2):
    alone = kconv(k[row : row + 1, real[row]], kernel)
    np.testing.assert_allclose(
      got[row, real[row]], alone[0], rtol=1e-6, atol=1e-6
    )
    last = alone.shape[1]
    want = np.asarray(k[row, real[row]])[-4:]
    np.testing.assert_array_equal(tail[row, -min(4, last) :], want)


def test_module():
  layer, k = KeyConv(3, param_dtype=jnp.float32), inputs(64, 3, d=64)[0]
  (got, aux), variables = layer.init_with_output(jax.random.key(0), k)
  kernel = variables["params"]["kernel"]
  assert kernel.shape == (3, 3, 64) and aux == {}
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
  np.testing.assert_array_equal(got, kconv(k, kernel))
  assert 1e-4 < np.abs(got - k).mean() < 0.05  # starts near the keys
  tail = jnp.zeros((2, 2, 3, 64))
  got, aux = layer.apply(variables, k[:, :5], tail=tail)
  np.testing.assert_array_equal(aux["tail"], k[:, 3:5])


def test_refusals():
  k, kernel = inputs(5, 3)
  for call, words in (
    (lambda: kconv(k, kernel[:, :2]), "kernel .3, 2, 4."),
    (lambda: kconv(k, kernel[:0]), "kernel .0, 3, 4."),
    (lambda: extend_kconv(k, kernel, k[:, :1]), "tail .2, 1, 3, 4."),
    (lambda: KeyConv(0), "width is 0"),
  ):
    with pytest.raises(ValueError, match=words):
      call()
