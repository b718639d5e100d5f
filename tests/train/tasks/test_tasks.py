"""Every task in the common suite; a new task is one entry."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.tasks.classify import Classify
from isthmus.train.tasks.flow import FlowMatching
from isthmus.train.tasks.lm import NextToken
from isthmus.train.tasks.restore import Downsample, Restore
from isthmus.train.tasks.segment import Segment
from tests.train.tasks import suite
from tests.train.tasks.suite import Entry


class Net(nn.Module):
  """A perceptron that may drop and keep running statistics."""

  outputs: int
  dropout: float = 0.0
  statistics: bool = False

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.tanh(nn.Dense(16, name="up")(x))
    if self.statistics:
      x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.outputs, name="head")(x)

  def flops_per_row(self, shape):
    return 6 * 16 * (shape[-1] + self.outputs)


class Bigram(nn.Module):
  """Logits of the token after each, from that token alone."""

  dropout: float = 0.0
  statistics: bool = False

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None, train=False):
    x = nn.Embed(11, 8, name="embed")(tokens)
    net = Net(11, self.dropout, self.statistics, name="net")
    return net(x, train=train), {}


def _restorer(**kwargs):
  return Net(3, **kwargs)


def _pictures(rows):
  image = np.random.default_rng(0).random((rows, 4, 4, 3))
  return {"image": image.astype(np.float32)}


class Moving(nn.Module):
  """A velocity of each pixel, by its value and the time."""

  net: nn.Module

  def __call__(self, x, t, *, train=False):
    when = jnp.broadcast_to(t[:, None, None, None], (*x.shape[:-1], 1))
    return self.net(jnp.concatenate([x, when], -1), train=train)

  def flops_per_row(self, shape):
    return self.net.flops_per_row((*shape[:-1], shape[-1] + 1))


def _mover(**kwargs):
  return Moving(Net(3, **kwargs))


def _images(rows):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, rows).astype(np.int32)
  image = rng.normal(size=(rows, 6)) + label[:, None]
  return {"image": image.astype(np.float32), "label": label}


def _classifier(**kwargs):
  return Net(4, **kwargs)


def _text(rows):
  """Rows that weigh differently, and one that weighs nothing."""
  rng = np.random.default_rng(0)
  weights = rng.random((rows, 8)) < np.linspace(0, 1, rows)[:, None]
  return {
    "tokens": rng.integers(0, 11, (rows, 9)).astype(np.int32),
    "segment_ids": np.zeros((rows, 9), np.int32),
    "weights": weights.astype(np.float32),
    "num_bytes": np.arange(1, rows + 1, dtype=np.int32),
  }


def _volumes(rows):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, (rows, 3, 4, 4)).astype(np.int32)
  image = rng.normal(size=(rows, 3, 4, 4, 2)) + label[..., None]
  return {"image": image.astype(np.float32), "label": label}


def _regions(label):
  return jnp.stack([label > 0, label > 1, label == 3, label == 1], -1)


TASKS = [
  Entry(name="classify", task=Classify(), model=_classifier, batch=_images),
  Entry(
    name="classify, smoothed",
    task=Classify(smoothing=0.1),
    model=_classifier,
    batch=_images,
  ),
  Entry(name="next token", task=NextToken(), model=Bigram, batch=_text),
  Entry(
    name="next token, z loss",
    task=NextToken(z_loss=1e-2, segments=False),
    model=Bigram,
    batch=_text,
  ),
  Entry(
    name="restore",
    # No noise: micro-batches draw other noise than the whole batch does.
    task=Restore(corruption=Downsample(factor=2)),
    model=_restorer,
    batch=_pictures,
  ),
  Entry(
    name="flow matching",
    task=FlowMatching(),
    model=_mover,
    batch=_pictures,
    draws=True,
    learns=0.9,
  ),
  Entry(
    name="segment",
    task=Segment(),
    model=_classifier,
    batch=_volumes,
    learns=0.9,
  ),
  Entry(
    name="segment, regions and cross-entropy",
    task=Segment(regions=_regions, cross_entropy=1.0),
    model=_classifier,
    batch=_volumes,
  ),
]


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_task(task, assertion):
  assertion(task)
