"""Images from corrupted images: denoising, super-resolution."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from isthmus.train.tasks.task import Aux, Batch, Sums


@runtime_checkable
class Corruption(Protocol):
  """What is to be undone: `(image, key) -> image` of the same shape."""

  def __call__(
    self, image: Float[Array, "y x c"], key: PRNGKeyArray
  ) -> Float[Array, "y x c"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """Adds Gaussian noise of standard deviation `sigma` to values in [0, 1].

  Example:
    >>> image = jnp.zeros((256, 256, 1))
    >>> noisy = Noise(sigma=0.25)(image, jax.random.key(0))
    >>> print(f"{noisy.std():.2f}")
    0.25
  """

  sigma: float = 0.25

  def __post_init__(self):
    if not self.sigma > 0:
      raise ValueError(f"sigma is {self.sigma}; it is above 0")

  def __call__(
    self, image: Float[Array, "y x c"], key: PRNGKeyArray
  ) -> Float[Array, "y x c"]:
    noise = jax.random.normal(key, image.shape, image.dtype)
    return image + self.sigma * noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Downsample:
  """Averages squares of `factor` by `factor` pixels, repeated to full size.

  What comes in has as many pixels as what goes out, so every model sees an
  input of one width.

  Raises:
    ValueError: factor below 2; when called, sides that it doesn't divide.

  Example:
    >>> image = jnp.arange(4.0).reshape(2, 2, 1)
    >>> Downsample(factor=2)(image, jax.random.key(0))[..., 0].tolist()
    [[1.5, 1.5], [1.5, 1.5]]
  """

  factor: int = 2

  def __post_init__(self):
    if self.factor < 2:
      raise ValueError(f"factor is {self.factor}; it is at least 2")

  def __call__(
    self, image: Float[Array, "y x c"], key: PRNGKeyArray
  ) -> Float[Array, "y x c"]:
    y, x, c = image.shape
    f = self.factor
    if y % f or x % f:
      raise ValueError(f"an image of {y} x {x} pixels in squares of {f} x {f}")
    small = image.reshape(y // f, f, x // f, f, c).mean((1, 3))
    return jnp.repeat(jnp.repeat(small, f, axis=0), f, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore:
  """Mean squared error of `model(corruption(image))` against `image`.

  The model maps images [b, y, x, c] to images, or to a pair (images, aux).
  In training each row draws new noise at each step. In evaluation its noise is
  a function of the image alone, so that a figure depends neither on the batch
  size nor on the number of devices, and two models see the same pixels.

  Evaluation gives `loss`, the mean squared error; `psnr` in dB, the mean over
  images of `10 log10(1 / mse)`, for values in [0, 1]; and `psnr_input`, that
  of the corrupted image itself.

  Attributes:
    corruption: `Noise`, `Downsample`, or a function of your own.

  Example:
    >>> class Identity(nn.Module):
    ...   def __call__(self, image, *, train=False):
    ...     return image
    >>> task = Restore(corruption=Noise(sigma=0.1))
    >>> batch = {"image": jnp.zeros((4, 32, 32, 1)), "valid": jnp.ones(4)}
    >>> sums = task.evaluate(Identity(), {}, {}, batch)
    >>> result = task.summarize({k: float(v) for k, v in sums.items()})
    >>> print(f"{result['psnr']:.0f} dB")
    20 dB
  """

  corruption: Corruption = Noise()

  def init(self, model: nn.Module, batch: Batch, key: PRNGKeyArray):
    """The model's variables, of an image's shape."""
    return model.init(key, batch["image"])

  def loss(
    self,
    model: nn.Module,
    params: Any,
    mutables: dict[str, Any],
    batch: Batch,
    key: PRNGKeyArray,
  ) -> tuple[Float[Array, ""], Aux]:
    """Mean squared error with new corruption for each row."""
    image = batch["image"]
    noise, dropout = jax.random.split(key)
    keys = jax.random.split(noise, len(image))
    out, new = model.apply(
      {"params": params, **mutables},
      jax.vmap(self.corruption)(image, keys),
      train=True,
      rngs={"dropout": dropout},
      mutable=list(mutables),
    )
    loss = _mse(_images(out), image).mean()
    weight = jnp.asarray(len(image), jnp.float32)
    return loss, Aux(weight=weight, mutables=dict(new))

  def evaluate(
    self, model: nn.Module, params: Any, mutables: dict[str, Any], batch: Batch
  ) -> Sums:
    """Sums over the valid rows: mse, psnr, psnr_input, rows."""
    image, valid = batch["image"], batch["valid"].astype(jnp.float32)
    corrupted = jax.vmap(self.corruption)(image, image_keys(image))
    out = model.apply({"params": params, **mutables}, corrupted, train=False)
    mse = _mse(_images(out), image)
    return {
      "mse": jnp.sum(mse * valid),
      "psnr": jnp.sum(_psnr(mse) * valid),
      "psnr_input": jnp.sum(_psnr(_mse(corrupted, image)) * valid),
      "rows": valid.sum(),
    }

  def summarize(self, sums: dict[str, float]) -> dict[str, float]:
    """Means over the rows."""
    rows = sums["rows"]
    return {
      "loss": sums["mse"] / rows,
      "psnr": sums["psnr"] / rows,
      "psnr_input": sums["psnr_input"] / rows,
    }

  def throughput(
    self, model: nn.Module, batch_shapes: dict[str, tuple[int, ...]]
  ) -> tuple[str, int, float]:
    """Images, and the model's `flops_per_row` if it has that."""
    rows, *shape = batch_shapes["image"]
    flops = getattr(model, "flops_per_row", None)
    return "images", rows, rows * flops(tuple(shape)) if flops else math.nan


def _images(out: Any) -> Float[Array, "b y x c"]:
  return out[0] if isinstance(out, tuple) else out


def _mse(
  x: Float[Array, "b y x c"], y: Float[Array, "b y x c"]
) -> Float[Array, "b"]:
  difference = x.astype(jnp.float32) - y.astype(jnp.float32)
  return jnp.square(difference).mean((1, 2, 3))


def _psnr(mse: Float[Array, "b"]) -> Float[Array, "b"]:
  # A perfect image would give infinity, and every mean with it.
  return -10 * jnp.log10(jnp.maximum(mse, 1e-10))


def image_keys(image: Float[Array, "b y x c"]) -> Key[Array, "b"]:
  """A key for each image: a hash of its pixels, to 8 bits each.

  Args:
    image: values in [0, 1].

  Example:
    >>> keys = image_keys(jnp.arange(8.0).reshape(2, 2, 2, 1) / 8)
    >>> keys.shape, bool((keys[0] == keys[1]).all())
    ((2,), False)
  """
  pixels = jnp.round(image * 255).astype(jnp.uint32).reshape(len(image), -1)
  # Odd multipliers, different at each pixel: a moved image has another hash.
  place = jnp.arange(pixels.shape[-1], dtype=jnp.uint32)
  odd = place * jnp.uint32(2654435769) | jnp.uint32(1)
  seeds = jnp.sum(pixels * odd, axis=-1, dtype=jnp.uint32)
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), seeds)
