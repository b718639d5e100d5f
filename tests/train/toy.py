"""A toy recipe, given to the command line by path; each failure is a setting.

Batch statistics, dropout, Adam's moments, a running average: everything that a
resumed run could get wrong is in its state.
"""

import dataclasses
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from isthmus.data.source import ArraySource
from isthmus.train.jobs import Fit
from isthmus.train.mesh import Mesh, P
from isthmus.train.optim.chain import Optimizer
from isthmus.train.tasks.classify import Classify


class OneDevice(Mesh):
  """The first device alone, whatever there is."""

  def build(self, devices=None):
    return super().build(jax.devices()[:1])


class Net(nn.Module):
  """Logits [b, 4] of images [b, 3, 3, 1]."""

  width: int = 8
  dropout: float = 0.2

  @nn.compact
  def __call__(self, image, *, train=False):
    dead = self.param("dead", nn.initializers.zeros, ())
    # No bias: its gradient is zero but for rounding, which Adam would enlarge.
    x = image.reshape(len(image), -1)
    x = nn.Dense(self.width, use_bias=False, name="up")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    return nn.Dense(4, name="head")(x + 0 * dead)


class Slow(ArraySource):
  """Takes `pause` seconds for each batch."""

  pause = 0.0

  def take(self, indices):
    time.sleep(self.pause)
    return super().take(indices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """Labelled noise; `flag` marks the example `poison`.

  Attributes:
    rows, held_out: examples to train on and to evaluate.
    poison: index of the training example that is flagged, or -1.
    pause: seconds that reading a training batch takes.
  """

  rows: int = 96
  held_out: int = 13
  poison: int = -1
  pause: float = 0.0

  def open(self, split: str) -> ArraySource:
    train = split == "train"
    count = self.rows if train else self.held_out
    rng = np.random.default_rng(train)
    label = rng.integers(0, 4, count).astype(np.int32)
    image = rng.normal(size=(count, 3, 3, 1)) + label[:, None, None, None]
    source = Slow(
      {
        "image": image.astype(np.float32),
        "label": label,
        "flag": (np.arange(count) == self.poison).astype(np.float32),
      }
    )
    object.__setattr__(source, "pause", self.pause if train else 0.0)
    return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(Classify):
  """Classification whose loss, or gradient alone, is NaN on a flagged batch."""

  nan: Literal["nowhere", "loss", "gradient"] = "nowhere"

  def loss(self, model, params, mutables, batch, key) -> Any:
    value, aux = super().loss(model, params, mutables, batch, key)
    flag = batch["flag"].max()
    if self.nan == "loss":
      value = value + jnp.where(flag > 0, jnp.nan, 0.0)
    if self.nan == "gradient":  # sqrt at 0: a value, and no slope
      zero = 0 * jnp.sum(params["head"]["kernel"])
      value = value + jnp.sqrt(1 - flag + zero) - (1 - flag)
    return value, aux


def measure(job, workdir, params, results) -> dict[str, float]:
  """A report: the parameters' norm, on whatever devices they are."""
  squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)]
  return {"norm": float(sum(squares)) ** 0.5}


def get_config(variant: str = "one") -> Fit:
  """`one` device, or `all` of them with the parameters split over them."""
  return Fit(
    model=Net(),
    task=Fragile(),
    data=Noise(),
    optimizer=Optimizer(learning_rate=1e-2, warmup=4),
    steps=16,
    batch_size=16,
    mesh=OneDevice() if variant == "one" else Mesh(data=1, fsdp=-1),
    rules=(
      (r"head/kernel$", P("fsdp", None)),
      (r"up/kernel$", P(None, "fsdp")),
    ),
    ema=0.9,
    eval_every=4,
    log_every=1,
    save_every=2,
    report=measure,
  )
