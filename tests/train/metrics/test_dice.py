"""Soft and hard Dice against sums in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.metrics.dice import hard_dice, soft_dice

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def _example(shape=(2, 3, 4, 5, 3)):
  p, t = RNG.random(shape).astype(np.float32), RNG.random(shape) < 0.3
  return jnp.asarray(p), jnp.asarray(t)


def _by_hand(p, t, smooth):
  p, t = np.asarray(p, np.float64), np.asarray(t, np.float64)
  space = tuple(range(1, p.ndim - 1))
  both = (p * t).sum(space)
  return (2 * both + smooth) / (p.sum(space) + t.sum(space) + smooth)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 3), (2, 6, 7, 2), (3, 9, 1)])
@pytest.mark.parametrize("smooth", [1.0, 1e-5, 20.0])
def test_soft_dice_by_hand(shape, smooth):
  p, t = _example(shape)
  got = soft_dice(p, t, smooth=smooth)
  assert got.shape == (shape[0], shape[-1]) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, _by_hand(p, t, smooth), rtol=1e-6)


def test_soft_dice_of_a_large_volume_is_summed_well():
  """2M voxels of bfloat16: narrower sums would stop growing at 256."""
  p, t = _example((1, 128, 128, 128, 1))
  p = p.astype(jnp.bfloat16)
  want = _by_hand(p, t, 1.0)
  np.testing.assert_allclose(soft_dice(p, t), want, rtol=2e-6)


def test_gradient_by_hand():
  """dD/dp = (2 t - D) / (sum p + sum t + s)."""
  p, t = _example((2, 3, 4, 2))
  got = jax.grad(lambda p: soft_dice(p, t).sum())(p)
  p, t = np.asarray(p, np.float64), np.asarray(t)
  dice = _by_hand(p, t, 1.0)[:, None, None]
  sizes = p.sum((1, 2)) + t.sum((1, 2)) + 1
  want = (2 * t - dice) / sizes[:, None, None]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_class_that_is_absent():
  """Nothing predicted is perfect; predictions cost, with a finite slope."""
  none, all_of_it = jnp.zeros((1, 10, 1)), jnp.ones((1, 10, 1))
  t = none > 0
  assert float(soft_dice(none, t)[0, 0]) == 1.0
  assert float(soft_dice(all_of_it, t)[0, 0]) == pytest.approx(1 / 11)
  slope = jax.grad(lambda p: soft_dice(p, t).sum())(none)
  np.testing.assert_allclose(slope, -1.0)


def test_hard_dice_by_hand():
  p, t = RNG.random((2, 50, 3)) < 0.4, RNG.random((2, 50, 3)) < 0.5
  sums = [x.sum((0, 1)).astype(float).tolist() for x in (p & t, p, t)]
  want = [
    2 * (p[..., i] & t[..., i]).sum() / (p[..., i].sum() + t[..., i].sum())
    for i in range(3)
  ]
  np.testing.assert_allclose(hard_dice(*sums), want, rtol=1e-12)
  assert hard_dice([5.0], [5.0], [5.0]) == [1.0]
  assert hard_dice([0.0], [0.0], [7.0]) == [0.0]
  assert hard_dice([0.0], [0.0], [0.0]) == [1.0]


def test_refused():
  p, t = _example((1, 4, 2))
  for smooth in (0.0, -1.0, float("nan"), float("inf")):
    with pytest.raises(ValueError, match=f"smooth is {smooth}; .* above 0"):
      soft_dice(p, t, smooth=smooth)
  with pytest.raises(ValueError, match=r"class 1: an overlap of 3 .* 2 and 9"):
    hard_dice([1.0, 3.0], [1.0, 2.0], [1.0, 9.0])
  with pytest.raises(ValueError, match="overlap of -1 voxels"):
    hard_dice([-1.0], [1.0], [1.0])
  with pytest.raises(ValueError, match="2 overlaps, 1 predicted and 1 true"):
    hard_dice([1.0, 1.0], [1.0], [1.0])
