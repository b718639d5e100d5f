"""Gathers, sums and merges of parts, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.parts import merged, summed, take, taken

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def draw(slots):
  """Parts of 40 places; rows whose slots lie anywhere, some nowhere."""
  o = RNG.standard_normal((2, 40, 3)).astype("float32")
  lse = RNG.standard_normal((2, 40)).astype("float32")
  place = RNG.integers(0, 40, (2, 9, slots)).astype("int32")
  real = RNG.random(place.shape) < 0.7
  real[:, 4] = False
  return o, lse, place, real


def test_take_and_what_lies_past_the_end():
  x = RNG.standard_normal((2, 5, 3)).astype("float32")
  index = np.array([[4, 0], [2, 5]], np.int32)
  found = taken(jnp.asarray(x), jnp.asarray(index), 7)
  np.testing.assert_array_equal(found[0], x[0, [4, 0]])
  np.testing.assert_array_equal(found[1, 0], x[1, 2])
  assert (found[1, 1] == 7).all()
  index[1, 1] = 1
  np.testing.assert_array_equal(
    take(jnp.asarray(x), jnp.asarray(index))[1], x[1, [2, 1]]
  )


@pytest.mark.parametrize("slots", [1, 8, 35])
def test_sums(slots):
  """In one go, and in a loop."""
  o, _, place, real = draw(slots)
  weight = RNG.random(place.shape).astype("float32")
  # What is nowhere may point at anything.
  o[0, place[0, 4, 0]] = np.nan
  place[real & np.isnan(o[0, :, 0])[place]] = 0
  o[0, 0], o[1, 0] = 1, 1
  want = np.zeros((2, 9, 3))
  for lane, row, slot in np.ndindex(place.shape):
    if real[lane, row, slot]:
      part = o[lane, place[lane, row, slot]]
      want[lane, row] += part * weight[lane, row, slot]
  args = map(jnp.asarray, (o, place, real, weight))
  np.testing.assert_allclose(summed(*args), want, atol=1e-5)


def test_sums_are_wide():
  x = jnp.asarray([[[256.0], [1.0]]], jnp.bfloat16)
  place = jnp.asarray([[[0, 1]]], jnp.int32)
  found = summed(x, place, place >= 0)
  assert found.dtype == jnp.float32 and found.item() == 257


@pytest.mark.parametrize("slots", [1, 5])
def test_merges(slots):
  o, lse, place, real = draw(slots)
  lse[0, 7] = -np.inf
  out, total = merged(*map(jnp.asarray, (o, lse, place, real)))
  for lane, row in np.ndindex(place.shape[:2]):
    at = [
      p for p, r in zip(place[lane, row], real[lane, row], strict=True) if r
    ]
    weight = np.exp(lse[lane, at].astype(float))
    if weight.sum() == 0:
      assert (
        total[lane, row] == -np.inf and not np.asarray(out[lane, row]).any()
      )
      continue
    np.testing.assert_allclose(
      total[lane, row], np.log(weight.sum()), rtol=1e-5
    )
    want = (o[lane, at] * weight[:, None]).sum(0) / weight.sum()
    np.testing.assert_allclose(out[lane, row], want, atol=1e-5)
  assert np.isneginf(total[:, 4]).all()
