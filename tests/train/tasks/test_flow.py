"""Flow matching: paths by hand, times, labels, evaluation that holds still."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.sample.flow import sample_flow
from isthmus.train.tasks.flow import FlowMatching

pytestmark = pytest.mark.once

IMAGE = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
LABEL = jnp.array([0, 1, 2, 3, 2, 1])
KEY = jax.random.key(3)


class Spy(nn.Module):
  """Returns zeros, and keeps what it was given."""

  @nn.compact
  def __call__(self, x, t, label=None, *, train=False):
    given = {"x": x, "t": t, "label": label, "train": jnp.asarray(train)}
    for name, value in given.items():
      self.sow("seen", name, value)
    return 0 * x


def seen(task, batch, key=KEY):
  """(loss, what the model was given)."""
  loss, aux = task.loss(Spy(), {}, {"seen": {}}, batch, key)
  return loss, {k: v[0] for k, v in aux.mutables["seen"].items()}


def evaluate(task, image, valid=None, **more):
  valid = jnp.ones(len(image)) if valid is None else valid
  batch = {"image": image, "valid": valid, **more}
  return {k: float(v) for k, v in task.evaluate(Spy(), {}, {}, batch).items()}


def test_a_path_is_straight_from_the_image_to_noise():
  """x at t and the velocity together give image and noise back."""
  task = FlowMatching(times="uniform")
  _, given = seen(task, {"image": IMAGE})
  t = np.asarray(given["t"])[:, None, None, None]
  data = 2 * np.asarray(IMAGE) - 1
  noise = (np.asarray(given["x"]) - (1 - t) * data) / t
  assert np.abs(noise.mean()) < 0.2 and noise.std() == pytest.approx(1, abs=0.1)
  loss, _ = seen(task, {"image": IMAGE})
  want = ((noise - data) ** 2).mean()
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  rows = noise.reshape(6, -1)
  assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.5


def test_the_right_velocity_has_no_loss():
  """All images being one, the field that leads there is known."""
  image = jnp.full((6, 8, 8, 1), 0.75)

  class Known(nn.Module):
    def __call__(self, x, t, *, train=False):
      return (x - 0.5) / t[:, None, None, None], {"aux": 0}

  task = FlowMatching()
  loss, aux = task.loss(Known(), {}, {}, {"image": image}, KEY)
  assert float(loss) < 1e-8 and float(aux.weight) == 6
  field = lambda x, t: Known().apply({}, x, t)[0]
  noise = jax.random.normal(KEY, image.shape)
  end = task.decode(sample_flow(field, noise, steps=3))
  np.testing.assert_allclose(end, image, atol=1e-5)


def test_images_go_to_the_flows_range_and_back():
  task = FlowMatching()
  x = task.encode(jnp.array([0.0, 0.5, 1.0]))
  assert x.tolist() == [-1, 0, 1]
  assert task.decode(2 * x).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
  "settings, quartiles",
  [
    ({"times": "uniform"}, (0.25, 0.5, 0.75)),
    ({}, (0.337, 0.5, 0.663)),
    ({"mean": 1.0, "std": 0.5}, (0.660, 0.731, 0.792)),
  ],
)
def test_times_have_their_distribution(settings, quartiles):
  image = jnp.zeros((4000, 1, 1, 1))
  _, given = seen(FlowMatching(**settings), {"image": image})
  found = np.quantile(given["t"], [0.25, 0.5, 0.75])
  np.testing.assert_allclose(found, quartiles, atol=0.03)


def test_labels_are_dropped_in_training_alone():
  rows = 2000
  batch = {
    "image": jnp.zeros((rows, 1, 1, 1)),
    "label": jnp.arange(rows) % 4,
    "valid": jnp.ones(rows),
  }
  task = FlowMatching(classes=4, drop=0.25)
  _, given = seen(task, batch)
  lost = np.asarray(given["label"] == 4)
  assert lost.mean() == pytest.approx(0.25, abs=0.04)
  np.testing.assert_array_equal(given["label"][~lost], batch["label"][~lost])
  other = np.asarray(seen(task, batch, jax.random.key(9))[1]["label"] == 4)
  assert (lost != other).any() and bool(given["train"])
  whole = seen(dataclasses.replace(task, drop=0.0), batch)[1]
  np.testing.assert_array_equal(whole["label"], batch["label"])
  assert "label" not in FlowMatching().init(Spy(), batch, KEY)
  # Evaluation: a model that tells the label it was given.

  class Told(nn.Module):
    def __call__(self, x, t, label, *, train=False):
      assert not train
      return x * 0 + label[:, None, None, None]

  sums = task.evaluate(Told(), {}, {}, batch)
  none = task.evaluate(Told(), {}, {}, {**batch, "label": 0 * batch["label"]})
  assert abs(float(sums["mse"]) - float(none["mse"])) > 100


def test_training_follows_the_key():
  losses = [
    float(seen(FlowMatching(), {"image": IMAGE}, jax.random.key(i))[0])
    for i in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2]


def test_evaluation_follows_the_image_alone():
  """Neither its place in the batch nor the batch's size matters."""
  task = FlowMatching()
  whole = evaluate(task, IMAGE)
  halves = [evaluate(task, IMAGE[i : i + 3]) for i in (0, 3)]
  for name, value in whole.items():
    np.testing.assert_allclose(sum(h[name] for h in halves), value, rtol=1e-5)
  turned = evaluate(task, IMAGE[::-1])
  np.testing.assert_allclose(turned["mse"], whole["mse"], rtol=1e-5)
  each = {evaluate(task, IMAGE[i : i + 1])["mse"] for i in range(6)}
  assert len(each) == 6
  padded = evaluate(task, IMAGE, jnp.array([1.0, 1, 1, 0, 0, 0]))
  np.testing.assert_allclose(padded["mse"], halves[0]["mse"], rtol=1e-5)
  assert task.summarize(padded)["loss"] == padded["mse"] / 3


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"times": "even"}, "times is 'even'"),
    ({"std": 0.0}, "std is 0"),
    ({"classes": 0}, "classes is 0"),
    ({"drop": 1.5}, "drop is 1.5"),
  ],
)
def test_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    FlowMatching(**settings)
