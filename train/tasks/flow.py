"""Velocities of a flow from noise to images."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from isthmus.train.tasks.restore import image_keys
from isthmus.train.tasks.task import Aux, Batch, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
  """Mean squared error of the velocity on straight paths from images to noise.

  At t a path is at `(1 - t) x + t e`, with e normal and x an image's values,
  [0, 1] taken to [-1, 1]; its velocity is `e - x`. The model maps
  `(x_t, t)`, or `(x_t, t, label)`, to velocities, or to a pair
  (velocities, aux). In training each row draws its time, its noise, and
  whether its label is dropped, anew at each step. In evaluation time and noise
  are a function of the image alone, so that a figure depends neither on the
  batch size nor on the number of devices, and two models see the same pixels.

  Evaluation gives `loss`, the mean over images and pixels.

  Attributes:
    times: "logit_normal", t being `1 / (1 + exp(-z))` with z normal of `mean`
      and `std`, or "uniform".
    mean, std: of z.
    classes: that `label` may name, and the label that means none; None for a
      model without labels.
    drop: share of the labels that are dropped in training, so that the model
      can be guided.

  Raises:
    ValueError: other times, a std not above 0, a share outside [0, 1].

  Example:
    >>> class Still(nn.Module):
    ...   def __call__(self, x, t, *, train=False):
    ...     return 0 * x
    >>> batch = {"image": jnp.full((8, 32, 32, 1), 0.5), "valid": jnp.ones(8)}
    >>> task = FlowMatching()
    >>> sums = task.evaluate(Still(), {}, {}, batch)
    >>> result = task.summarize({k: float(v) for k, v in sums.items()})
    >>> print(f"{result['loss']:.1f}")  # that of the noise itself
    1.0

  Reference: https://arxiv.org/abs/2210.02747; logit-normal times,
    https://arxiv.org/abs/2403.03206.
  """

  times: str = "logit_normal"
  mean: float = 0.0
  std: float = 1.0
  classes: int | None = None
  drop: float = 0.1

  def __post_init__(self):
    if self.times not in ("logit_normal", "uniform"):
      raise ValueError(
        f"times is {self.times!r}, neither 'logit_normal' nor 'uniform'"
      )
    if not self.std > 0:
      raise ValueError(f"std is {self.std}; it must be above 0")
    if self.classes is not None and self.classes < 1:
      raise ValueError(f"classes is {self.classes}; it is at least 1, or None")
    if not 0 <= self.drop <= 1:
      raise ValueError(f"drop is {self.drop}, not in [0, 1]")

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    """The model's variables, of an image's shape."""
    image = batch["image"]
    return model.init(key, image, jnp.ones(len(image)), *self._label(batch))

  def encode(self, image: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the flow ends at: values from [0, 1] taken to [-1, 1]."""
    return 2 * image - 1

  def decode(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The image of what a flow ended at, within [0, 1]."""
    return jnp.clip((x + 1) / 2, 0, 1)

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
    """Mean squared error, each row at a time of its own."""
    image = batch["image"]
    draws, drops, dropout = jax.random.split(key, 3)
    x, t, velocity = self._paths(image, jax.random.split(draws, len(image)))
    label = self._label(batch)
    if self.classes is not None:
      lost = jax.random.bernoulli(drops, self.drop, (len(image),))
      label = (jnp.where(lost, self.classes, label[0]),)
    out, new = model.apply(
      {"params": params, **mutables},
      *(x, t, *label),
      train=True,
      rngs={"dropout": dropout},
      mutable=list(mutables),
    )
    loss = _mse(out, velocity).mean()
    weight = jnp.asarray(len(image), jnp.float32)
    return loss, Aux(weight=weight, mutables=dict(new))

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over the valid rows: mse, rows."""
    image, valid = batch["image"], batch["valid"].astype(jnp.float32)
    x, t, velocity = self._paths(image, image_keys(image))
    out = model.apply(
      {"params": params, **mutables}, x, t, *self._label(batch), train=False
    )
    return {
      "mse": jnp.sum(_mse(out, velocity) * valid),
      "rows": valid.sum(),
    }

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """`loss`, the mean over the rows."""
    return {"loss": sums["mse"] / sums["rows"]}

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """Images, and the model's `flops_per_row` if it has that."""
    rows, *shape = batch_shapes["image"]
    flops = getattr(model, "flops_per_row", None)
    return "images", rows, rows * flops(tuple(shape)) if flops else math.nan

  def _label(self, batch):
    return () if self.classes is None else (batch["label"],)

  def _paths(self, image, keys):
    """(x at t, t, velocity) of each row, by its key."""

    def path(image, key):
      when, which = jax.random.split(key)
      if self.times == "uniform":
        t = jax.random.uniform(when)
      else:
        t = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(when))
      noise = jax.random.normal(which, image.shape)
      x = self.encode(image)
      return (1 - t) * x + t * noise, t, noise - x

    return jax.vmap(path)(image, keys)


def _mse(out: Any, velocity: Float[Array, "b y x c"]) -> Float[Array, "b"]:
  v = out[0] if isinstance(out, tuple) else out
  return jnp.square(v.astype(jnp.float32) - velocity).mean((1, 2, 3))
