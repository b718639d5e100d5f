"""Depthwise convolution against XLA's grouped one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.depthwise import depthwise


def grouped(x, kernel, strides):
  """The same by `lax.conv_general_dilated`."""
  axes = "ZYX"[-(x.ndim - 2) :]
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    strides,
    "SAME",
    dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    feature_group_count=x.shape[-1],
  )


@pytest.mark.parametrize(
  "space, taps, strides",
  [
    ((7,), (3,), (1,)),
    ((6, 5), (3, 3), (1, 1)),
    ((6, 5), (3, 3), (2, 2)),
    ((7, 8), (5, 4), (2, 3)),
    ((4, 9), (1, 7), (1, 4)),
    ((5, 4, 6), (3, 3, 3), (1, 1, 1)),
    ((5, 4, 6), (3, 3, 3), (2, 2, 2)),
    ((5, 4, 7), (1, 3, 5), (1, 2, 3)),
    ((2, 2, 1), (5, 3, 3), (1, 3, 1)),
  ],
)
def test_values_and_gradients_are_the_grouped_convolution_s(
  space, taps, strides
):
  """In float64, where only a wrong term makes a difference."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *space, 3)))
    kernel = jnp.asarray(rng.standard_normal((*taps, 1, 3)))
    shape = [-(-n // s) for n, s in zip(space, strides, strict=True)]
    dy = jnp.asarray(rng.standard_normal((2, *shape, 3)))

    @jax.jit
    def both(x, kernel, dy):
      ours = lambda x, k: depthwise(x, k, strides=strides)
      pairs = []
      for function in (ours, lambda x, k: grouped(x, k, strides)):
        y, pull = jax.vjp(function, x, kernel)
        pairs.append((y, *pull(dy)))
      return pairs

    for a, b in zip(*both(x, kernel, dy), strict=True):
      assert a.shape == b.shape and a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
  """Of a cubic loss, reverse over reverse."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((1, 4, 5, 2)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((3, 3, 1, 2)), jnp.float32)

  def twice(f):
    def norm(x, k):
      first = jax.grad(lambda x, k: (f(x, k) ** 3).sum(), (0, 1))(x, k)
      return sum((g**2).sum() for g in first)

    return jax.jit(jax.grad(norm, (0, 1)))(x, kernel)

  ours = twice(lambda x, k: depthwise(x, k))
  for a, b in zip(ours, twice(lambda x, k: grouped(x, k, (1, 1))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_bfloat16_is_summed_in_float32():
  """1 + 1/256 + 1/256: in bfloat16 each addition would round to 1."""
  x = jnp.array([1, 2.0**-8, 2.0**-8], jnp.bfloat16)[None, :, None]
  y, pull = jax.vjp(depthwise, x, jnp.ones((3, 1, 1), jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert y[0, 1, 0] == 1 + 2.0**-7
  dx, dkernel = pull(x)
  assert dx.dtype == dkernel.dtype == jnp.bfloat16
  assert dx[0, 1, 0] == 1 + 2.0**-7
  ones = jnp.ones((1, 257, 1), jnp.bfloat16)  # 257 would stop at 256
  wide = jax.grad(lambda k: depthwise(ones, k).astype(jnp.float32).sum())
  assert wide(jnp.ones((1, 1, 1))).item() == 257


@pytest.mark.parametrize(
  "kernel, strides, message",
  [
    ((3, 1, 2), None, r"kernel \(3, 1, 2\) for x \(1, 4, 4, 2\)"),
    ((3, 3, 1, 3), None, r"kernel \(3, 3, 1, 3\) for x \(1, 4, 4, 2\)"),
    ((3, 3, 1, 2), (1,), r"strides are \(1,\); 2 numbers"),
    ((3, 3, 1, 2), (1, 0), r"strides are \(1, 0\); 2 numbers"),
  ],
)
def test_what_does_not_fit_is_refused(kernel, strides, message):
  with pytest.raises(ValueError, match=message):
    depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones(kernel), strides=strides)
