"""Depthwise convolution: each channel by itself, in any number of axes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.nets.mlp import fan_in
from isthmus.pallas.precision import accumulator


def depthwise(
  x: Float[Array, "b *space c"],
  kernel: Float[Array, "*taps 1 k"],
  *,
  strides: tuple[int, ...] | None = None,
) -> Float[Array, "b *out c"]:
  """`y_oc = sum_t x_(s o + t)c k_tc`, with zeros around x ("SAME").

  A sum of shifted copies of x, which XLA makes in one loop. Its grouped
  convolutions in three axes are no match on a CPU: they run one multiplication
  after the other, and the kernel's gradient is slower still.

  Args:
    x: rows of images, volumes, or of any other number of axes.
    kernel: one filter a channel.
    strides: one an axis of space; None: 1 each. An axis of n gives
      ceil(n / s), as `lax.conv_general_dilated` with "SAME" does.

  Returns:
    y of x's dtype, summed in at least float32.

  Raises:
    ValueError: a kernel or strides of another number of axes, or of another
      number of channels.

  Example:
    >>> x = jnp.array([[1.0, 2.0, 4.0, 8.0]])[..., None]
    >>> depthwise(x, jnp.ones((3, 1, 1)))[0, :, 0].tolist()
    [3.0, 7.0, 14.0, 12.0]
    >>> depthwise(x, jnp.ones((3, 1, 1)), strides=(2,))[0, :, 0].tolist()
    [7.0, 12.0]
  """
  rank = x.ndim - 2
  strides = (1,) * rank if strides is None else tuple(strides)
  if kernel.ndim != rank + 2 or kernel.shape[-1] != x.shape[-1]:
    raise ValueError(
      f"kernel {kernel.shape} for x {x.shape}; it is one filter a channel,"
      f" {('k',) * rank + (1, x.shape[-1])}"
    )
  if len(strides) != rank or min(strides) < 1:
    raise ValueError(f"strides are {strides}; {rank} numbers of at least 1")
  return _depthwise(strides, x, kernel[..., 0, :])


class Depthwise(nn.Module):
  """`depthwise` with a learned `kernel` [*taps, 1, c], without a bias.

  Example:
    >>> y, variables = Depthwise((3, 3), (2, 2)).init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 8, 8, 16))
    ... )
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 4, 4, 16), (3, 3, 1, 16))
  """

  kernel: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *space c"], *, train: bool = False
  ) -> Float[Array, "b *out c"]:
    shape = (*self.kernel, 1, x.shape[-1])
    kernel = self.param("kernel", fan_in(2**0.5), shape, self.param_dtype)
    kernel = kernel.astype(self.dtype)
    return depthwise(x.astype(self.dtype), kernel, strides=self.strides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(strides, x, kernel):
  return _sum_of_shifts(strides, x, kernel)


# Under jit, the many taps of one shape are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _sum_of_shifts(strides, x, kernel):
  space, taps = x.shape[1:-1], kernel.shape[:-1]
  pads = _same(space, taps, strides)
  padded = jax.lax.pad(x, _zero(x), [_NONE, *pads, _NONE])
  return _correlate(padded, kernel, strides, _output(space, strides))


def _forward(strides, x, kernel):
  return _sum_of_shifts(strides, x, kernel), (x, kernel)


@functools.partial(jax.jit, static_argnums=0)
def _backward(strides, residuals, dy):
  x, kernel = residuals
  space, taps = x.shape[1:-1], kernel.shape[:-1]
  pads = _same(space, taps, strides)
  # dx_i = sum_t dy_((i + low - t) / s) k_t: the flipped kernel over dy spread
  # out by the strides.
  spread = []
  for n, k, s, (low, _, _), o in zip(
    space, taps, strides, pads, dy.shape[1:-1], strict=True
  ):
    before = k - 1 - low
    spread.append((before, n + k - 1 - before - ((o - 1) * s + 1), s - 1))
  wide = jax.lax.pad(dy, _zero(dy), [_NONE, *spread, _NONE])
  flipped = jnp.flip(kernel, tuple(range(len(taps))))
  dx = _correlate(wide, flipped, (1,) * len(space), space)
  padded = jax.lax.pad(x, _zero(x), [_NONE, *pads, _NONE])
  total = accumulator(x.dtype)
  rows, channels = x.shape[0], x.shape[-1]
  ends = _spans(dy.shape[1:-1], strides)
  step = (slice(None), *(slice(None, None, s) for s in strides))

  size = (rows, *ends, channels)

  def one(corner):
    window = jax.lax.dynamic_slice(padded, tuple(corner), size)
    products = window[step].astype(total) * dy.astype(total)
    return jnp.sum(products, axis=range(x.ndim - 1))

  # One after the other: on a CPU, XLA would keep the products of all taps.
  corners = np.pad(list(np.ndindex(*taps)), ((0, 0), (1, 1)))
  dkernel = jax.lax.map(one, jnp.asarray(corners, jnp.int32)).reshape(
    kernel.shape
  )
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_depthwise.defvjp(_forward, _backward)

_NONE = (0, 0, 0)


def _correlate(padded, kernel, strides, out):
  total = accumulator(padded.dtype)
  kernel, y = kernel.astype(total), jnp.zeros((), total)
  rows, channels = padded.shape[0], padded.shape[-1]
  spans = _spans(out, strides)
  for tap in np.ndindex(*kernel.shape[:-1]):
    ends = [t + span for t, span in zip(tap, spans, strict=True)]
    window = jax.lax.slice(
      padded, (0, *tap, 0), (rows, *ends, channels), (1, *strides, 1)
    )
    y = y + window.astype(total) * kernel[tap]
  return y.astype(padded.dtype)


def _spans(out, strides):
  """Voxels from the first to the last that a tap reads."""
  return [(o - 1) * s + 1 for o, s in zip(out, strides, strict=True)]


def _output(space, strides):
  return tuple(-(-n // s) for n, s in zip(space, strides, strict=True))


def _same(space, taps, strides):
  """(before, after, 0) of each axis; an odd one more goes after."""
  pads = []
  for n, k, s in zip(space, taps, strides, strict=True):
    total = max((-(-n // s) - 1) * s + k - n, 0)
    pads.append((total // 2, total - total // 2, 0))
  return pads


def _zero(x):
  return jnp.zeros((), x.dtype)
