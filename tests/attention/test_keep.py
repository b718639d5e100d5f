"""Which blocks are kept; what is behind is tested in tests/pallas/keep."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import BlockMask
from isthmus.attention.keep import (
  causal_mask,
  keep_count,
  keep_mass,
  keep_sum,
)
from isthmus.pallas.compat import has_mosaic, interpreted
from tests.pallas.keep.cases import listed

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_mass(threshold):
  score = RNG.normal(0, 3, (6, 50)).astype("float32")
  limit = np.array([0, 1, 7, 30, 50, 50], np.int32)
  found = listed(*keep_mass(jnp.asarray(score), threshold, jnp.asarray(limit)))
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
  assert listed(*keep_mass(score, 1, limit)).tolist() == [True, True, False]
  assert listed(*keep_mass(score, 0.99, limit)).tolist() == [True, False, False]
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
    ends, forced = jnp.array([3, 2]), jnp.array([0, 2])
    yield keep_count(score, count, ends=ends, forced=forced, impl=impl)

  if impl == "mosaic":
    with interpreted():
      found = list(both())
  else:
    found = list(both())
  want = [
    [[0, 1, 1, 1], [1, 0, 1, 0]],
    [[1, 1, 0, 0], [1, 0, 1, 0]],
    [[0, 1, 1, 1], [0, 0, 1, 0]],
    [[1, 1, 1, 0], [1, 0, 0, 0]],
  ]
  found = [listed(*x).astype(int) for x in found]
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("t", [24, 21])
def test_the_mask_is_causal_within_lists_and_the_own_block(t):
  kept = np.tril(RNG.random((2, 3, 6, 6)) < 0.5, -1)
  index = np.argsort(~kept, axis=-1, kind="stable").astype(np.int32)
  mask = causal_mask(
    jnp.asarray(kept.sum(-1, dtype=np.int32)),
    jnp.asarray(index),
    block=4,
    length=t,
  )
  blocks = jnp.asarray(kept | np.eye(6, dtype=bool))
  size = {"block": (4, 4), "q_length": t, "kv_length": t}
  want = BlockMask.from_blocks(blocks, causal=True, **size)
  np.testing.assert_array_equal(mask.to_dense(), want.to_dense())
  assert mask.dropped == 0
  full, tested = mask.to_blocks()
  np.testing.assert_array_equal(full, kept)
  assert (np.asarray(tested) == np.eye(6, dtype=bool)).all()
