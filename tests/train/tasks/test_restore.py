"""Restoration: corruptions, the loss by hand, evaluation that holds still."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.tasks.restore import Downsample, Noise, Restore

IMAGE = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))


class Scale(nn.Module):
  """The image itself, times a parameter that is one."""

  @nn.compact
  def __call__(self, image, *, train=False):
    return image * self.param("one", nn.initializers.ones, ()), {}


def _params():
  return {"one": jnp.ones(())}


def _evaluate(task, image, valid=None):
  valid = jnp.ones(len(image)) if valid is None else valid
  batch = {"image": image, "valid": valid}
  sums = task.evaluate(Scale(), _params(), {}, batch)
  return {k: float(v) for k, v in sums.items()}


def test_noise_has_its_size_and_is_drawn_anew():
  image = jnp.full((64, 64, 1), 0.5)
  one, other = (Noise(sigma=0.2)(image, jax.random.key(i)) for i in (0, 1))
  assert float(jnp.std(one)) == pytest.approx(0.2, rel=0.05)
  assert float(jnp.mean(one)) == pytest.approx(0.5, abs=0.02)
  assert float(jnp.abs(one - other).max()) > 0.1


def test_downsample_keeps_the_means_of_its_squares():
  out = Downsample(factor=4)(IMAGE[0], jax.random.key(0))
  assert out.shape == IMAGE[0].shape
  np.testing.assert_allclose(
    out[0, 0, 0], np.asarray(IMAGE[0])[:4, :4].mean(), rtol=1e-6
  )
  assert len(np.unique(np.asarray(out))) == 4
  with pytest.raises(ValueError, match="8 x 8 pixels in squares of 3 x 3"):
    Downsample(factor=3)(IMAGE[0], jax.random.key(0))


def test_loss_and_psnr_by_hand():
  task = Restore(corruption=Downsample(factor=2))
  small = np.asarray(IMAGE).reshape(6, 4, 2, 4, 2, 1).mean((2, 4))
  large = small.repeat(2, 1).repeat(2, 2)
  mse = ((large - np.asarray(IMAGE)) ** 2).mean((1, 2, 3))
  loss, aux = task.loss(
    Scale(), _params(), {}, {"image": IMAGE}, jax.random.key(0)
  )
  np.testing.assert_allclose(loss, mse.mean(), rtol=1e-5)
  assert float(aux.weight) == 6
  result = task.summarize(_evaluate(task, IMAGE))
  psnr = (10 * np.log10(1 / mse)).mean()
  assert result["loss"] == pytest.approx(mse.mean(), rel=1e-5)
  assert result["psnr"] == pytest.approx(psnr, rel=1e-5)
  assert result["psnr_input"] == pytest.approx(psnr, rel=1e-5)


def test_training_noise_follows_the_key():
  task, batch = Restore(corruption=Noise(sigma=0.2)), {"image": IMAGE}

  def loss(seed):
    args = (Scale(), _params(), {}, batch, jax.random.key(seed))
    return float(task.loss(*args)[0])

  assert loss(0) == loss(0) != loss(1)


def test_evaluation_noise_follows_the_image_alone():
  """Neither its place in the batch nor the batch's size matters."""
  task = Restore(corruption=Noise(sigma=0.2))
  whole = _evaluate(task, IMAGE)
  halves = [_evaluate(task, IMAGE[i : i + 3]) for i in (0, 3)]
  for name, value in whole.items():
    np.testing.assert_allclose(sum(h[name] for h in halves), value, rtol=1e-5)
  turned = _evaluate(task, IMAGE[::-1])
  np.testing.assert_allclose(turned["mse"], whole["mse"], rtol=1e-5)
  # Images differ in their noise: equal noise would give equal errors.
  each = [float(_evaluate(task, IMAGE[i : i + 1])["mse"]) for i in range(6)]
  assert len(set(each)) == 6


def test_padding_counts_nothing():
  task = Restore(corruption=Noise(sigma=0.2))
  padded = _evaluate(task, IMAGE, jnp.array([1.0, 1, 1, 0, 0, 0]))
  part = _evaluate(task, IMAGE[:3])
  for name in part:
    np.testing.assert_allclose(padded[name], part[name], rtol=1e-5)


def test_refused():
  with pytest.raises(ValueError, match="sigma is 0"):
    Noise(sigma=0.0)
  with pytest.raises(ValueError, match="factor is 1"):
    Downsample(factor=1)
