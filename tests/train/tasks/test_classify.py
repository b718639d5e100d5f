"""Classification: the loss by hand, padding, micro-batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.tasks.classify import Classify


class Table(nn.Module):
  """Logits that are the image itself, times a parameter that is one."""

  @nn.compact
  def __call__(self, image, *, train=False):
    return image * self.param("one", nn.initializers.ones, ()), {}


def _batch():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
  return {"image": logits, "label": jnp.array([0, 1])}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_by_hand(smoothing):
  task = Classify(smoothing=smoothing)
  batch = _batch()
  params = task.init(Table(), batch, jax.random.key(0))["params"]
  loss, aux = task.loss(Table(), params, {}, batch, jax.random.key(0))
  p = np.exp(np.asarray(batch["image"]))
  target = np.eye(3)[[0, 1]] * (1 - smoothing) + smoothing / 3
  np.testing.assert_allclose(loss, -(target * np.log(p)).sum(-1).mean(), 1e-6)
  assert float(aux.metrics["accuracy"]) == 0.5
  assert float(aux.weight) == 2


def test_padding_counts_nothing():
  task = Classify()
  batch = {**_batch(), "valid": jnp.array([1.0, 0.0])}
  params = task.init(Table(), batch, jax.random.key(0))["params"]
  result = task.summarize(
    {k: float(v) for k, v in task.evaluate(Table(), params, {}, batch).items()}
  )
  assert result["accuracy"] == 1.0
  assert result["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_smoothing_refused():
  with pytest.raises(ValueError, match=r"smoothing is 1\.0"):
    Classify(smoothing=1.0)
