"""A step of Adam over codes, against the same in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import dequantise, quantise
from isthmus.pallas.quant8.maps import NOZERO, ROOT, SIGNED, UNSIGNED
from isthmus.pallas.quant8.ref import adam, direction, moved, rates, written

HOW = {"learning_rate": 0.1, "weight_decay": 0.01, "b2": 0.95}


def given(shape, second, **cut):
  keys = jax.random.split(jax.random.key(0), 4)
  g, m, v, p = (jax.random.normal(k, shape) for k in keys)
  m = quantise(0.1 * m, map=SIGNED, **cut)
  return g, m, quantise(jnp.square(v), map=second, **cut), p


@pytest.mark.parametrize("second", [UNSIGNED, NOZERO, ROOT], ids=str)
@pytest.mark.parametrize(
  "shape, axis", [((6, 512), -1), ((300, 5), -2), ((4, 100), None)]
)
def test_it_is_adam(shape, axis, second):
  g, m, v, p = given(shape, second, block=64, axis=axis)
  g64, m64, v64, p64 = (
    np.asarray(x, np.float64) for x in (g, dequantise(m), dequantise(v), p)
  )
  m64, v64 = 0.9 * m64 + 0.1 * g64, 0.95 * v64 + 0.05 * g64**2
  u64 = m64 / (1 - 0.9**3) / (np.sqrt(v64 / (1 - 0.95**3)) + 1e-8)
  u, m1, v1 = jax.jit(adam)(g, m, v, rates(3, **HOW))
  np.testing.assert_allclose(u, u64, rtol=2e-5, atol=1e-6)
  for q, x, map in ((m1, m64, SIGNED), (v1, v64, second)):
    want = quantise(jnp.asarray(x, jnp.float32), map=map, block=64, axis=axis)
    off = np.abs(np.asarray(q.codes, int) - np.asarray(want.codes, int))
    assert off.max() <= 1 and off.mean() < 1e-2
    np.testing.assert_allclose(q.absmax, want.absmax, rtol=1e-6)
  stepped, *_ = jax.jit(adam)(g, m, v, rates(3, **HOW), p)
  want = p64 - 0.1 * (u64 + 0.01 * p64)
  np.testing.assert_allclose(stepped, want, rtol=1e-4, atol=1e-6)


def test_parameters_keep_their_dtype():
  g, m, v, p = given((4, 64), ROOT, block=64)
  new, *_ = adam(g, m, v, rates(1), p.astype(jnp.bfloat16))
  assert new.dtype == jnp.bfloat16
  assert moved(p, p, rates(1, learning_rate=0.0)).dtype == jnp.float32


def test_parts():
  one = jnp.ones((1, 2))
  u, m, v = direction(one, 0 * one, 0 * one, rates(1))
  np.testing.assert_allclose(u, one, rtol=1e-5)
  q = quantise(jnp.zeros((2,)))
  np.testing.assert_allclose(dequantise(written(q, m)), 0.1, rtol=1e-6)
