"""Quantised arrays: errors, outliers, layouts, trees, what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import QTensor, dequantise, quantise, zeros
from isthmus.pallas.quant8.maps import (
  NOZERO,
  ROOT,
  SIGNED,
  UNSIGNED,
  Map,
)


@functools.partial(jax.jit, static_argnames=("block", "map", "axis"))
def through(x, **how):
  return dequantise(quantise(x, **how))


def errors(x, **how):
  """Mean absolute and mean relative."""
  off = np.abs(np.asarray(through(x, **how), np.float64) - x)
  return off.mean(), (off / (np.abs(x) + 1e-8)).mean()


@functools.cache
def normal():
  return np.random.default_rng(0).normal(size=2**20).astype(np.float32)


@functools.cache
def uniform():
  return np.random.default_rng(0).uniform(size=2**20).astype(np.float32)


@pytest.mark.once
@pytest.mark.parametrize(
  "block, absolute, relative",
  [
    (64, 0.00754, 0.0142),
    (256, 0.00854, 0.0154),
    (1024, 0.00935, 0.0163),
    (2048, 0.00970, 0.0167),
    (4096, 0.01005, 0.0170),
    (2**20, 0.01194, 0.0188),
  ],
)
def test_errors_of_normal_numbers(block, absolute, relative):
  got = errors(normal(), block=block)
  assert got == pytest.approx((absolute, relative), rel=0.01)
  if block <= 256:
    assert got[0] < 0.011 and got[1] < 0.018


@pytest.mark.once
@pytest.mark.parametrize(
  "map, absolute, relative",
  [(SIGNED, 0.0032, 0.0099), (UNSIGNED, 0.0016, 0.0050)],
)
def test_errors_of_uniform_numbers(map, absolute, relative):
  assert errors(uniform(), map=map) == pytest.approx(
    (absolute, relative), rel=0.015
  )


@pytest.mark.once
def test_equal_steps_have_twice_the_relative_error():
  got = errors(normal(), map=Map(kind="linear"))
  assert got == pytest.approx((0.0060, 0.0313), rel=0.01)
  assert got[1] > 2 * errors(normal())[1]


@pytest.mark.once
def test_an_outlier_spoils_its_block_only():
  x = normal().copy()
  x[12345] = 1000
  assert errors(x)[0] == pytest.approx(errors(normal())[0], rel=0.003)
  assert errors(x, block=2**20)[0] == pytest.approx(0.0561, rel=0.01)


@pytest.mark.once
def test_roots_reach_twice_as_many_decades():
  """From 1 down to 1e-12, within a part of a decade's first value."""
  x = jnp.asarray(10.0 ** np.linspace(-12, 0, 2048), jnp.float32)
  ratio = through(x, map=ROOT, block=2048) / x
  assert 0.28 < ratio.min() and ratio.max() < 3
  plain = through(x, map=UNSIGNED, block=2048)
  assert (plain == 0).mean() > 0.3
  kept = through(x, map=NOZERO, block=2048)
  assert (kept > 0).all() and (kept / x).max() > 1e5


LAYOUTS = [((6, 512), -1), ((512, 6), -2), ((5, 300), -1), ((5, 300), None)]


@pytest.mark.parametrize("shape, axis", LAYOUTS)
def test_layouts_are_blocks_of_their_own(shape, axis):
  """What each block reads as is what it reads as alone."""
  x = jax.random.normal(jax.random.key(0), shape)
  x = x * jnp.exp(3 * jax.random.normal(jax.random.key(1), shape))
  got = np.asarray(through(x, block=64, axis=axis))
  line = (
    (lambda y: y.reshape(-1, 1))
    if axis is None
    else (lambda y: np.moveaxis(y, axis, 0).reshape(y.shape[axis], -1))
  )
  x, got = line(np.asarray(x)), line(got)
  for start in range(0, len(x), 64):
    for column in range(x.shape[1]):
      alone = through(jnp.asarray(x[start : start + 64, column]), block=64)
      np.testing.assert_array_equal(got[start : start + 64, column], alone)


def test_zeros_read_as_zeros():
  for map in (SIGNED, UNSIGNED, NOZERO, ROOT, Map(kind="linear")):
    for q in (zeros((3, 300), map=map), quantise(jnp.zeros((3, 300)), map=map)):
      assert (q.codes == map.zero).all() and (q.absmax == 0).all()
      assert (dequantise(q) == 0).all()


def test_dtypes_come_back():
  x = jnp.ones((4, 4), jnp.bfloat16)
  q = quantise(x)
  assert q.codes.dtype == jnp.uint8 and q.absmax.dtype == jnp.float32
  assert dequantise(q).dtype == jnp.bfloat16


def test_bytes_are_those_of_the_formula():
  q = quantise(jnp.ones((64, 4096)), block=2048)
  size = sum(x.nbytes for x in jax.tree.leaves(q))
  assert q.nbytes == size == 64 * 4096 + 4 * 64 * 2


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_not_hidden(bad):
  x = jnp.ones((2, 512)).at[0, 3].set(bad)
  got = through(x, block=256)
  assert jnp.isnan(got[0, :256]).all() and (got[0, 256:] == 1).all()
  assert (got[1] == 1).all()


def test_small_blocks_of_tiny_numbers():
  x = jnp.full((256,), 1e-36).at[0].set(-2e-36)
  np.testing.assert_allclose(through(x), x, rtol=0.02)


def test_it_is_a_tree():
  q = quantise(jnp.ones((4, 300)), map=UNSIGNED, block=128)
  leaves, tree = jax.tree.flatten(q)
  assert [x.dtype for x in leaves] == [jnp.uint8, jnp.float32]
  back = jax.tree.unflatten(tree, leaves)
  assert isinstance(back, QTensor)
  assert (back.map, back.block, back.axis) == (UNSIGNED, 128, -1)
  names = [str(p[0]) for p, _ in jax.tree.leaves_with_path(q)]
  assert names == [".codes", ".absmax"]


def test_vmap_and_scan():
  x = jax.random.normal(jax.random.key(0), (3, 4, 300))
  whole = quantise(x, block=64)
  mapped = jax.vmap(functools.partial(quantise, block=64))(x)
  jax.tree.map(np.testing.assert_array_equal, mapped, whole)
  _, scanned = jax.lax.scan(lambda c, y: (c, quantise(y, block=64)), 0, x)
  jax.tree.map(np.testing.assert_array_equal, scanned, whole)
  np.testing.assert_array_equal(jax.vmap(dequantise)(whole), dequantise(whole))


def test_axes_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match="axis is -3"):
    quantise(jnp.ones((4, 4)), axis=-3)
  with pytest.raises(ValueError, match="power of two"):
    quantise(jnp.ones((4, 4)), block=48)
