"""Rotary positions: differences only, and the scalings' formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.rotary import LinearScaling, Llama3Scaling, rope, rotation


def test_rope_depends_on_differences_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

  def product(i, j, theta=100.0):
    at = functools.partial(rotation, head_dim=16, theta=theta)
    a, b = rope(q, at(jnp.full((1, 1), i))), rope(k, at(jnp.full((1, 1), j)))
    return float((a * b).sum())

  np.testing.assert_allclose(product(3, 7), product(103, 107), rtol=1e-4)
  np.testing.assert_allclose(product(0, 0), float((q * k).sum()), rtol=1e-5)
  assert abs(product(3, 7) - product(3, 8)) > 1e-3
  assert abs(product(3, 7) - product(3, 7, theta=10.0)) > 1e-3
  with pytest.raises(ValueError, match="not 7"):
    rotation(jnp.zeros((1, 1), jnp.int32), head_dim=7)


def test_angles_are_those_of_float64():
  positions = np.asarray([[0, 1, 4097, 131071]])
  cos, sin = rotation(jnp.asarray(positions), head_dim=16, theta=5e5)
  angles = positions[..., None] * 5e5 ** (-np.arange(8) / 8)
  assert cos.dtype == sin.dtype == jnp.float32
  # An angle of 1e5 radians is held to 2^-7 by float32, smaller ones better.
  error = np.spacing(np.float32(angles)) * 2 + 1e-6
  assert (np.abs(cos - np.cos(angles)) < error).all()
  assert (np.abs(sin - np.sin(angles)) < error).all()


def test_linear_scaling_divides_positions():
  slow = rotation(
    jnp.arange(0, 40, 4)[None], head_dim=8, scaling=LinearScaling(4.0)
  )
  plain = rotation(jnp.arange(10)[None], head_dim=8)
  for a, b in zip(slow, plain, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  fast = rotation(jnp.arange(0, 40, 4)[None], head_dim=8)
  assert np.abs(slow[0] - fast[0]).max() > 0.1


def test_llama3_scaling_by_cases():
  """Wave by wave, as the paper's code says it in words of wavelengths."""
  scaling = Llama3Scaling(factor=8.0, low=1.0, high=4.0, context=8192)
  speeds = 5e5 ** (-np.arange(64) / 64)
  expected, cases = [], set()
  for speed in speeds:
    wave = 2 * np.pi / speed
    if wave < 8192 / 4:
      cases.add("kept")
      expected.append(speed)
    elif wave > 8192 / 1:
      cases.add("slowed")
      expected.append(speed / 8)
    else:
      cases.add("between")
      smooth = (8192 / wave - 1) / (4 - 1)
      expected.append((1 - smooth) * speed / 8 + smooth * speed)
  assert cases == {"kept", "slowed", "between"}
  np.testing.assert_allclose(scaling.scale(speeds), expected, rtol=1e-12)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: LinearScaling(0.5), "factor is 0.5"),
    (lambda: Llama3Scaling(8.0, 4.0, 1.0, 8192), "low 4.0 and high 1.0"),
    (lambda: Llama3Scaling(8.0, 0.0, 1.0, 8192), "low 0.0 and high 1.0"),
    (lambda: Llama3Scaling(0.0, 1.0, 4.0, 8192), "factor is 0.0"),
    (lambda: Llama3Scaling(8.0, 1.0, 4.0, 0), "context is 0"),
  ],
)
def test_bad_scalings_are_errors_at_construction(make, message):
  with pytest.raises(ValueError, match=message):
    make()
