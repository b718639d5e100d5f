"""Parts of the keys merged: values, gradients, and what is empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from isthmus.attention import attention
from isthmus.attention.merge import add_sinks, merge
from tests.attention.oracle import inputs, vjp

pytestmark = pytest.mark.once


def halves(q, k, v, cut, **kwargs):
  s = k.shape[1]
  positions = jnp.arange(s, dtype=jnp.int32)[None, None]
  places = jnp.arange(s - q.shape[1], s, dtype=jnp.int32)[None, None]
  return [
    attention(
      q,
      k[:, part],
      v[:, part],
      q_positions=places,
      kv_positions=positions[..., part],
      causal=True,
      return_lse=True,
      **kwargs,
    )
    for part in (slice(0, cut), slice(cut, s))
  ]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_values_and_gradients_are_those_of_the_whole(cut):
  """Early queries see nothing of the second part."""
  q, k, v, do, dlse = inputs(2, 6, 10, 4, 2, 8)

  def whole(q, k, v):
    return attention(q, k, v, causal=True, return_lse=True)

  def merged(q, k, v):
    first, second = halves(q, k, v, cut)
    return merge(*first, *second)

  a, b = (vjp(f, (q, k, v), do, dlse) for f in (whole, merged))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=5e-6)


def test_three_parts_in_any_order():
  q, k, v, _, _ = inputs(1, 5, 9, 2, 2, 8)
  parts = [
    attention(q, k[:, i : i + 3], v[:, i : i + 3], return_lse=True)
    for i in (0, 3, 6)
  ]
  want = attention(q, k, v, return_lse=True)
  for order in ((0, 1, 2), (2, 0, 1)):
    total = parts[order[0]]
    for i in order[1:]:
      total = merge(*total, *parts[i])
    for x, y in zip(total, want, strict=True):
      np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_empty_parts_have_no_weight_and_finite_gradients(empty):
  o, o2 = jnp.ones((1, 2, 1, 3)), 2 * jnp.ones((1, 2, 1, 3))
  pairs = [[o, jnp.zeros((1, 1, 2))], [o2, jnp.zeros((1, 1, 2))]]
  for i in empty:
    pairs[i] = [jnp.zeros_like(o), jnp.full((1, 1, 2), -jnp.inf)]
  args = (*pairs[0], *pairs[1])
  got, lse = merge(*args)
  if len(empty) == 2:
    assert not got.any() and np.isneginf(lse).all()
  else:
    np.testing.assert_array_equal(got, pairs[1 - empty[0]][0])
    assert not lse.any()

  def loss(*args):
    o, lse = merge(*args)
    return jnp.sum(jnp.square(o)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

  gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*args)
  assert all(np.isfinite(x).all() for x in gradients)
  for i in empty:
    assert not np.asarray(gradients[2 * i + 1]).any()


def test_gradients_of_both_results_by_finite_differences():
  keys = jax.random.split(jax.random.key(0), 6)
  shapes = [(1, 3, 2, 4), (1, 2, 3)] * 2
  with jax.enable_x64(True):
    args = [
      jax.random.normal(key, shape, jnp.float64)
      for key, shape in zip(keys, shapes, strict=False)
    ]
    call = jax.jit(lambda *x: merge(*x))
    assert call(*args)[0].dtype == jnp.float64
    check_grads(call, args, order=1, modes=("rev",))


def test_arithmetic_is_float32_and_the_wider_dtype_stays():
  low = jnp.full((1, 1, 1, 2), 1.0, jnp.bfloat16)
  lse = jnp.zeros((1, 1, 1))
  o, out = merge(low, lse, low * 3, lse - 5.0)
  assert o.dtype == jnp.bfloat16 and out.dtype == jnp.float32
  np.testing.assert_allclose(out, np.logaddexp(0, -5.0), rtol=1e-6)
  o, _ = merge(low.astype(jnp.float32), lse, low * 3, lse - 5.0)
  assert o.dtype == jnp.float32
  share = 1 / (1 + np.exp(-5.0))
  np.testing.assert_allclose(o, share + 3 * (1 - share), rtol=1e-6)


def test_a_part_that_is_nan_stays_so():
  """A query block that overflowed is not mended by a merge."""
  o, lse = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1))
  got, out = merge(o, lse, o * jnp.nan, lse * jnp.nan)
  assert np.isnan(got).all() and np.isnan(out).all()


def test_sinks_are_refused_by_merge_and_added_once():
  q, k, v, do, dlse = inputs(2, 6, 10, 4, 2, 8)
  sinks = jnp.linspace(-1, 2, 4)
  first, second = halves(q, k, v, 4)
  with pytest.raises(ValueError, match="then add_sinks once"):
    merge(*first, *second, sinks=sinks)

  def whole(q, k, v, sinks):
    return attention(q, k, v, causal=True, sinks=sinks, return_lse=True)

  def merged(q, k, v, sinks):
    first, second = halves(q, k, v, 4)
    return add_sinks(*merge(*first, *second), sinks)

  a, b = (vjp(f, (q, k, v, sinks), do, dlse) for f in (whole, merged))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_sinks_of_rows_without_keys():
  o, lse = add_sinks(
    jnp.zeros((1, 2, 1, 3)), jnp.full((1, 1, 2), -jnp.inf), jnp.array([0.5])
  )
  assert not o.any()
  np.testing.assert_allclose(lse, 0.5)
