"""Which blocks are kept; what is behind is tested in tests/pallas/keep."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.keep import keep_count, keep_mass, keep_sum
from isthmus.pallas.compat import has_mosaic, interpreted

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_mass(threshold):
  score = RNG.normal(0, 3, (6, 50)).astype("float32")
  limit = np.array([0, 1, 7, 30, 50, 50], np.int32)
  found = np.asarray(
    keep_mass(jnp.asarray(score), threshold, jnp.asarray(limit))
  )
  allowed = np.arange(50) < limit[:, None]
  p = np.where(allowed, np.exp(score.astype(float)), 0)
  p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
  mass = np.where(found, p, 0).sum(-1)
  assert (mass[1:] >= threshold - 1e-6).all() and not found[0].any()
  # The least of them is wanted, and those left are below it.
  least = np.where(found, p, 2).min(-1)
  assert (mass[1:] - least[1:] < threshold).all()
  assert (np.where(found | ~allowed, 0, p).max(-1) <= least).all()


def test_the_whole_mass_is_everything_and_a_bad_one_is_refused():
  limit = jnp.array(2)
  # Of the second one so little that a sum would not notice.
  score = jnp.array([0.0, -200.0, 0.0])
  assert keep_mass(score, 1, limit).tolist() == [True, True, False]
  assert keep_mass(score, 0.99, limit).tolist() == [True, False, False]
  for bad in (0, 1.5, -1):
    with pytest.raises(ValueError, match="not in"):
      keep_mass(score, bad, limit)


@pytest.mark.parametrize("impl", ["xla", "mosaic"])
def test_counts_and_sums(impl):
  if impl == "mosaic" and not has_mosaic():
    pytest.skip("the kernel needs jax 0.11")
  score = jnp.array([[1.0, 4, 3, 2], [0.0, 0, 5, 0]])
  count, target = jnp.array([3, 2]), jnp.array([8.0, 5])

  def both():
    yield keep_count(score, count, impl=impl)
    yield keep_count(score, count, jnp.array([2, 4]), impl=impl)
    yield keep_sum(score, target, impl=impl)

  if impl == "mosaic":
    with interpreted():
      found = list(both())
  else:
    found = list(both())
  want = [
    [[0, 1, 1, 1], [1, 0, 1, 0]],
    [[1, 1, 0, 0], [1, 0, 1, 0]],
    [[0, 1, 1, 1], [0, 0, 1, 0]],
  ]
  np.testing.assert_array_equal(np.asarray(found).astype(int), want)
