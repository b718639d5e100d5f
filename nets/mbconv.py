"""Inverted bottlenecks: narrow, wide, filtered in space, narrow again."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.nets.depthwise import Depthwise
from isthmus.nets.mlp import Activation, fan_in
from isthmus.nets.norm import Norm, check_norm, make_norm
from isthmus.pallas.precision import accumulator

#: One number for all axes of space, or one each.
Extent = int | tuple[int, ...]


class MBConv(nn.Module):
  """`project(excite(filter(expand(x))))`, in any number of axes of space.

  The stages, each followed by a norm and, but for the last, the activation:

    expand     1x1, c -> expand c         fused: k x k, with the strides
    depthwise  k x k, channel by channel  fused: left out
    excite     factors in (0, 1), where `se_ratio` is given; without a norm
    project    1x1, expand c -> features

  Norms and activations are computed again in the backward pass, so that it
  keeps one array for each convolution.

  Attributes:
    features: channels of the result; None: those of x.
    expand: times x's channels inside, a whole number of them; None leaves
      the first stage out.
    kernel: taps along each axis of space.
    strides: from a result to the next along each axis, with "SAME" padding.
    fused: one full convolution in place of the 1x1 and the depthwise one.
    depthwise: False leaves the second stage out.
    se_ratio: of the excitation, which squeezes to `round8(se_ratio inside)`
      channels; None: no excitation.
    norm: "group", "batch", or what makes a layer; see `make_norm`.
    activation: applied elementwise.
    residual: adds x.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Raises:
    ValueError: sizes below 1; stages that are all left out; strides without
      a stage that takes them; a residual with strides or, when called, with
      other features than x has; when called, expand times channels that is
      no whole number, an extent of another number of axes than x has.

  Example:
    >>> block = MBConv(expand=6, se_ratio=0.25, residual=True)
    >>> for shape in ((1, 8, 8, 16), (1, 8, 8, 8, 16)):
    ...   x = jax.ShapeDtypeStruct(shape, jnp.float32)
    ...   y, variables = jax.eval_shape(
    ...     block.init_with_output, jax.random.key(0), x
    ...   )
    ...   print(y.shape, variables["params"]["depthwise"]["kernel"].shape)
    (1, 8, 8, 16) (3, 3, 1, 96)
    (1, 8, 8, 8, 16) (3, 3, 3, 1, 96)

  References:
    Sandler et al., MobileNetV2, arXiv 1801.04381; Xiong et al., MobileDets
    (fused), arXiv 2004.14525; Hu et al. (excitation), arXiv 1709.01507.
  """

  features: int | None = None
  expand: float | None = 4
  kernel: Extent = 3
  strides: Extent = 1
  fused: bool = False
  depthwise: bool = True
  se_ratio: float | None = None
  norm: Norm = "group"
  activation: Activation = jax.nn.silu
  residual: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    _check(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *space c"], *, train: bool = False
  ) -> Float[Array, "b *out f"]:
    """Runs the block.

    Args:
      x: rows of images [y, x, c], volumes [z, y, x, c], or others.
      train: for batch normalisation.
    """
    channels, rank = x.shape[-1], x.ndim - 2
    features = self.features or channels
    if self.residual and features != channels:
      raise ValueError(
        f"a residual of {features} features onto {channels} channels; set"
        " residual=False"
      )
    inside = _inside(self.expand, channels)
    kernel = _extent("kernel", self.kernel, rank)
    strides = _extent("strides", self.strides, rank)
    dense = functools.partial(_dense, self)
    after = functools.partial(_after, self, train=train)
    h = x.astype(self.dtype)
    if self.fused:
      h = conv(self, inside, kernel, strides=strides, name="expand")(h)
      h = after(h, name="expand_norm")
    elif self.expand is not None:
      h = after(dense(inside, 2**0.5, name="expand")(h), name="expand_norm")
    if self.depthwise and not self.fused:
      h = Depthwise(
        kernel, strides, self.dtype, self.param_dtype, name="depthwise"
      )(h)
      h = after(h, name="depthwise_norm")
    if self.se_ratio is not None:
      h = SqueezeExcite(
        round8(self.se_ratio * inside),
        self.activation,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name="excite",
      )(h)
    y = dense(features, name="project")(h)
    y = after(y, name="project_norm", activate=False)
    return x + y if self.residual else y

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step on x [*space, c]: 6 a multiplication.

    Norms, activations and the excitation's product are not counted.
    """
    *space, channels = shape
    inside = _inside(self.expand, channels)
    taps = math.prod(_extent("kernel", self.kernel, len(space)))
    strides = _extent("strides", self.strides, len(space))
    small = math.prod(-(-n // s) for n, s in zip(space, strides, strict=True))
    total = small * inside * (self.features or channels)
    if self.fused:
      total += small * taps * channels * inside
    else:
      if self.expand is not None:
        total += math.prod(space) * channels * inside
      if self.depthwise:
        total += small * taps * inside
    if self.se_ratio is not None:
      total += 2 * inside * round8(self.se_ratio * inside)
    return 6.0 * total


class SqueezeExcite(nn.Module):
  """`x gate(excite(activation(squeeze(mean of x over space))))`.

  One factor a row and channel; both layers have biases.

  Attributes:
    hidden: channels between the two layers.
    activation: applied between them.
    gate: gives the factors.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Raises:
    ValueError: hidden below 1.

  Example:
    >>> y, variables = SqueezeExcite(8).init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 4, 4, 16))
    ... )
    >>> y.shape, variables["params"]["squeeze"]["kernel"].shape
    ((1, 4, 4, 16), (16, 8))

  Reference: https://arxiv.org/abs/1709.01507
  """

  hidden: int
  activation: Activation = jax.nn.relu
  gate: Activation = jax.nn.sigmoid
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if self.hidden < 1:
      raise ValueError(f"hidden is {self.hidden}; it must be at least 1")
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *space c"], *, train: bool = False
  ) -> Float[Array, "b *space c"]:
    wide = accumulator(x.dtype)
    space = tuple(range(1, x.ndim - 1))
    mean = jnp.mean(x, axis=space, keepdims=True, dtype=wide)
    dense = functools.partial(_dense, self, use_bias=True)
    h = self.activation(dense(self.hidden, 2**0.5, name="squeeze")(mean))
    h = dense(x.shape[-1], name="excite")(h)
    return (x * self.gate(h.astype(wide))).astype(x.dtype)


def round8(channels: float) -> int:
  """The nearest multiple of 8, halves upwards, and at least 8.

  Example:
    >>> [round8(channels) for channels in (1, 11, 12, 24)]
    [8, 8, 16, 24]
  """
  return max(8, int(channels / 8 + 0.5) * 8)


def conv(
  module: Any,
  features: int,
  kernel: tuple[int, ...],
  *,
  strides: tuple[int, ...] | int = 1,
  scale: float = 2**0.5,
  name: str | None = None,
) -> nn.Conv:
  """A full convolution without a bias, "SAME", in a module's dtypes.

  Args:
    module: what has `dtype` and `param_dtype`.
    features: channels of the result.
    kernel: taps along each axis.
    strides: along each axis.
    scale: factor on the initial standard deviation 1 / sqrt(inputs).
    name: of the layer.

  Example:
    >>> layer = conv(MBConv(), 16, (3, 3, 3))
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 4, 2)))
    >>> params["params"]["kernel"].shape
    (3, 3, 3, 2, 16)
  """
  return nn.Conv(
    features,
    kernel,
    strides=strides,
    use_bias=False,
    dtype=module.dtype,
    param_dtype=module.param_dtype,
    kernel_init=fan_in(scale),
    name=name,
  )


def _dense(module, features, scale=1.0, *, name, use_bias=False) -> nn.Dense:
  """A convolution of one tap, as a matrix product."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=module.dtype,
    param_dtype=module.param_dtype,
    kernel_init=fan_in(scale),
    name=name,
  )


def _after(module, h, *, name, train, activate=True):
  """Norm and activation, of which the backward pass keeps h alone."""

  def run(module, h):
    norm = make_norm(
      module.norm,
      h.shape,
      train=train,
      param_dtype=module.param_dtype,
      name=name,
    )
    y = norm(h)
    return (module.activation(y) if activate else y).astype(h.dtype)

  return nn.remat(run)(module, h)


def _inside(expand, channels) -> int:
  inside = channels if expand is None else expand * channels
  if inside < 1 or inside != int(inside):
    raise ValueError(
      f"expand is {expand}, times {channels} channels is {inside}; it must be"
      " a whole number of at least 1"
    )
  return int(inside)


def _extent(name, extent, rank) -> tuple[int, ...]:
  extent = (extent,) * rank if isinstance(extent, int) else tuple(extent)
  if len(extent) != rank:
    raise ValueError(f"{name} is {extent}; x has {rank} axes of space")
  return extent


def _check(block: MBConv) -> None:
  for name in ("kernel", "strides"):
    value = getattr(block, name)
    if np.min(value) < 1:
      raise ValueError(f"{name} is {value}; it must be at least 1")
  for name in ("features", "expand", "se_ratio"):
    value = getattr(block, name)
    if value is not None and not value > 0:
      raise ValueError(f"{name} is {value}; it must be above 0, or None")
  check_norm(block.norm)
  strided = np.max(block.strides) > 1
  if block.expand is None and (block.fused or not block.depthwise):
    kind = "fused=True" if block.fused else "depthwise=False"
    raise ValueError(f"expand is None and {kind}; one of them is to filter")
  if strided and not (block.fused or block.depthwise):
    raise ValueError(
      f"strides are {block.strides} and depthwise=False; no stage takes them"
    )
  if strided and block.residual:
    raise ValueError(
      f"a residual with strides {block.strides}; set residual=False"
    )
