"""A U-Net for volumes, reversible between its changes of resolution."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.nets.mbconv import MBConv, conv
from isthmus.nets.mlp import Activation, fan_in
from isthmus.nets.norm import Norm, check_norm
from isthmus.nets.reversible import MODES
from isthmus.nets.vision.reversible import ConvBlock, ReversibleBlocks

#: The two halves of a level's channels.
Pair = tuple[Float[Array, "b z y x c"], Float[Array, "b z y x c"]]


class UNet3D(nn.Module):
  """Logits of every voxel, by a partially reversible U-Net.

  A level has half the resolution of that above it. Going down, each gets

    x_0 = blocks(stem(image)),   x_i = blocks(down(pool(x_(i-1))))

  with a 3x3x3 convolution `stem`, a maximum over 2x2x2 voxels and a 1x1x1
  convolution `down`; going up, from z = x of the last level,

    z_(i-1) = x_(i-1) + upsample(up(blocks(z_i)))

  with a 1x1x1 convolution `up` and trilinear interpolation between voxels'
  centres; logits are a 1x1x1 convolution of blocks(z_0). Blocks are reversible
  layers on the two halves of the channels, so that what the backward pass
  stores, one pair of streams a level and direction, doesn't grow with the
  depth. Pooling, upsampling and their convolutions are computed again.

  All modes have the same parameters and values: checkpoints move.

  Attributes:
    classes: logits a voxel.
    widths: channels of each level, even.
    depth: layers of each level going down, one number or one a level.
    decoder_depth: the same going up; None: as going down.
    block: what both halves of a layer are: "mbconv", an `MBConv` without a
      residual, or "conv", norm, activation and a 3x3x3 convolution.
    expand: of MBConv; None: 4.
    se_ratio: of MBConv.
    norm: "group", "batch", or what makes a layer; see `make_norm`.
    activation: applied elementwise.
    dropout: probability that a branch's channel is dropped, in training.
    mode: "reversible" computes layers backwards, "remat" keeps each layer's
      input, "plain" all that autodiff keeps.
    cache, grid: see `reversible_stack`.
    dtype: what is multiplied; the streams between layers are float32.
    param_dtype: what is stored.

  Raises:
    ValueError: sizes below 1, odd widths, another number of depths than of
      widths, an unknown block or mode, options that the block or mode doesn't
      read; when called, a volume whose sides the levels don't halve evenly.

  Example:
    >>> model = UNet3D(classes=3, widths=(8, 16), depth=2)
    >>> image = jax.ShapeDtypeStruct((1, 8, 8, 4, 1), jnp.float32)
    >>> (logits, aux), variables = jax.eval_shape(
    ...   model.init_with_output, jax.random.key(0), image
    ... )
    >>> logits.shape
    (1, 8, 8, 4, 3)
    >>> variables["params"]["encoder_1"]["f"]["expand"]["kernel"].shape
    (2, 8, 32)

  References:
    Brügger et al., A Partially Reversible U-Net, arXiv 1906.06148; with
    MBConv, arXiv 2104.09648.
  """

  classes: int
  widths: tuple[int, ...] = (60, 120, 240, 360, 480)
  depth: int | tuple[int, ...] = 1
  decoder_depth: int | tuple[int, ...] | None = None
  block: str = "mbconv"
  expand: float | None = None
  se_ratio: float | None = None
  norm: Norm = "group"
  activation: Activation = jax.nn.leaky_relu
  dropout: float = 0.0
  mode: str = "reversible"
  cache: float = 0.0
  grid: int | None = 12
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    _check(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, image: Float[Array, "b z y x c"], *, train: bool = False
  ) -> tuple[Float[Array, "b z y x n"], dict[str, Any]]:
    """Runs the net.

    Args:
      image: rows of volumes, of any number of channels.
      train: applies dropout, with the rng `dropout`, and moves the running
        statistics of batch normalisation.

    Returns:
      (logits, {}): logits in float32.
    """
    self._check_sides(image.shape[1:-1])
    depths, rises = self.depths
    last = len(self.widths) - 1
    stem = conv(self, self.widths[0], (3, 3, 3), scale=1.0, name="stem")
    x = _halves(stem(image))
    skips = []
    for i, width in enumerate(self.widths):
      if i:
        skips.append(x)
        x = self._again(_down, width, f"down_{i}")(self, x)
      x = self._blocks(depths[i], f"encoder_{i}")(x, train=train)
    for i in reversed(range(last + 1)):
      x = self._blocks(rises[i], f"decoder_{i}")(x, train=train)
      if i:
        x = self._again(_up, self.widths[i - 1], f"up_{i}")(self, x)
        x = jax.tree.map(jnp.add, x, skips.pop())
    return self._again(_head, self.classes, "head")(self, x), {}

  @property
  def depths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers of each level, going down and going up."""
    down = self.depth
    up = down if self.decoder_depth is None else self.decoder_depth
    every = lambda d: (d,) * len(self.widths) if isinstance(d, int) else d
    return every(down), every(up)

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step on a volume [z, y, x, c].

    6 for each multiplication of a convolution in the forward pass: 2 there
    and 4 in the backward pass. What is computed again, norms and the
    interpolation are not counted.
    """
    *sides, channels = shape
    self._check_sides(tuple(sides))
    depths, rises = self.depths
    total = 6.0 * math.prod(sides) * self.widths[0] * 27 * channels
    total += 6.0 * math.prod(sides) * self.widths[0] * self.classes
    for i, width in enumerate(self.widths):
      space = tuple(n >> i for n in sides)
      if i:  # down and up, both at the lower resolution
        total += 2 * 6.0 * math.prod(space) * width * self.widths[i - 1]
      branch = self._branch().flops_per_row((*space, width // 2))
      total += 2 * (depths[i] + rises[i]) * branch
    return total

  def _branch(self) -> MBConv | ConvBlock:
    options: dict[str, Any] = {
      name: getattr(self, name)
      for name in ("norm", "activation", "dtype", "param_dtype")
    }
    if self.block == "conv":
      return ConvBlock(**options, parent=None)
    expand = 4 if self.expand is None else self.expand
    return MBConv(expand=expand, se_ratio=self.se_ratio, **options, parent=None)

  def _blocks(self, depth: int, name: str) -> ReversibleBlocks:
    return ReversibleBlocks(
      self._branch(),
      depth,
      dropout=self.dropout,
      mode=self.mode,
      cache=self.cache,
      grid=self.grid,
      name=name,
    )

  def _again(self, function, features, name):
    """A convolution of one tap and what is around it, computed again."""

    def call(module, x):
      dense = nn.Dense(
        features,
        use_bias=name == "head",
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=fan_in(),
        name=name,
      )
      return function(dense, x)

    return nn.remat(call)

  def _check_sides(self, sides: tuple[int, ...]) -> None:
    factor = 2 ** (len(self.widths) - 1)
    if any(n % factor for n in sides):
      raise ValueError(
        f"a volume of {sides} voxels (z, y, x) in {len(self.widths)} levels;"
        f" sides must be multiples of {factor}: pad it, or use sliding_window"
      )


def upsample(
  x: Float[Array, "b *space c"],
) -> Float[Array, "b *double c"]:
  """Twice as many samples along each axis of space, linearly between centres.

  A sample becomes two, a quarter of a step to either side of it:
  `y_2i = (3 x_i + x_(i-1)) / 4`, `y_(2i+1) = (3 x_i + x_(i+1)) / 4`, where
  the outermost samples are their own neighbours.

  Example:
    >>> upsample(jnp.array([[0.0, 4.0]])[..., None])[0, :, 0].tolist()
    [0.0, 1.0, 3.0, 4.0]
  """
  for axis in range(1, x.ndim - 1):
    n = x.shape[axis]
    piece = functools.partial(jax.lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([piece(0, 1), piece(0, n - 1)], axis)
    after = jnp.concatenate([piece(1, n), piece(n - 1, n)], axis)
    both = jnp.stack(
      [0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1
    )
    x = both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
  return x


def _down(dense, x):
  return _halves(dense(jnp.concatenate([_pool(half) for half in x], -1)))


def _up(dense, x):
  # Interpolated in float32: in bfloat16 it would be rounded three times.
  y = dense(jnp.concatenate(x, -1))
  return _halves(upsample(y.astype(jnp.float32)))


def _head(dense, x):
  return dense(jnp.concatenate(x, -1)).astype(jnp.float32)


def _pool(x):
  """The maximum of each 2 x 2 x 2 voxels."""
  b, z, y, w, c = x.shape
  return x.reshape(b, z // 2, 2, y // 2, 2, w // 2, 2, c).max((2, 4, 6))


def _halves(x) -> Pair:
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return a, b


def _check(net: UNet3D) -> None:
  if net.classes < 1:
    raise ValueError(f"classes is {net.classes}; it must be at least 1")
  if not net.widths or any(w < 2 or w % 2 for w in net.widths):
    raise ValueError(
      f"widths are {net.widths}; even numbers of at least 2, for their halves"
    )
  for depths in net.depths:
    if len(depths) != len(net.widths) or min(depths) < 1:
      raise ValueError(
        f"depths are {depths} for {len(net.widths)} levels; one number of at"
        " least 1 each"
      )
  if net.block not in ("mbconv", "conv"):
    raise ValueError(f"block is {net.block!r}, neither 'mbconv' nor 'conv'")
  for name in ("expand", "se_ratio"):
    if net.block == "conv" and getattr(net, name) is not None:
      raise ValueError(
        f"{name} is {getattr(net, name)}; block 'conv' has none, 'mbconv' has"
      )
  check_norm(net.norm)
  if not 0 <= net.dropout < 1:
    raise ValueError(f"dropout is {net.dropout}; it lies in [0, 1)")
  if net.mode not in MODES:
    raise ValueError(f"mode {net.mode!r} is none of {', '.join(MODES)}")
  if not 0 <= net.cache <= 1 or net.cache and net.mode != "reversible":
    raise ValueError(
      f"cache is {net.cache}, mode {net.mode!r}; it is a share in [0, 1], of"
      " mode 'reversible'"
    )
  if net.grid is not None and not 0 <= net.grid <= 23:
    raise ValueError(f"grid is {net.grid}; it is None or in [0, 23]")
