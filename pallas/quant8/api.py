"""Arrays as codes of eight bits with a scale for each block.

The scale of a block is its largest magnitude `a`; a number x becomes the code
of the value of the map that is nearest to `x / a`, and reads as `value a`. One
large number thus spoils the precision of its own block only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from isthmus.pallas.quant8.blocks import Blocks
from isthmus.pallas.quant8.codec import decode, encode
from isthmus.pallas.quant8.maps import SIGNED, Map


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """An array of codes; a tree of two leaves.

  Attributes:
    codes: uint8, in the shape of the array.
    absmax: float32, the scales, in the shape that `Blocks.scales` says; of
      roots, where the map has them.
    map: what codes stand for.
    block: numbers of a block, a power of two.
    axis: the one that blocks lie along, counted from the end; None if they
      lie along the flattened array.
    dtype: what `dequantise` gives.

  Example:
    >>> q = quantise(jnp.ones((4, 600)), block=256)
    >>> q.shape, q.absmax.shape, q.nbytes
    ((4, 600), (4, 3), 2448)
  """

  codes: Any
  absmax: Any
  map: Map = dataclasses.field(default=SIGNED, metadata={"static": True})
  block: int = dataclasses.field(default=256, metadata={"static": True})
  axis: int | None = dataclasses.field(default=-1, metadata={"static": True})
  dtype: Any = dataclasses.field(default=jnp.float32, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array."""
    return self.codes.shape

  @property
  def blocks(self) -> Blocks:
    """How the array is cut."""
    return Blocks(self.shape, self.block, self.axis)

  @property
  def nbytes(self) -> int:
    """Of codes and scales: one for each number, four for each block."""
    return self.codes.size + 4 * self.absmax.size


def quantise(
  x: Float[Array, "..."],
  *,
  map: Map = SIGNED,
  block: int = 256,
  axis: int | None = -1,
) -> QTensor:
  """Codes of an array: of each number, that of the nearest value.

  A block that holds a NaN or an infinity reads as NaN: what went wrong is not
  hidden. Of an unsigned map, numbers below 0 count as 0.

  Args:
    x: an array.
    map: what codes stand for.
    block: numbers of a block, a power of two.
    axis: of blocks, counted from the end; None for row-major order.

  Raises:
    ValueError: a block or axis that can't be.

  Example:
    >>> x = jnp.array([0.0, 1e-3, -0.5, 2.0])
    >>> [f"{x:.3g}" for x in dequantise(quantise(x, block=4)).tolist()]
    ['0', '0.000987', '-0.495', '2']
  """
  blocks = Blocks(x.shape, block, axis)
  codes, absmax = to_codes(
    blocks.split(x.astype(jnp.float32)), map, inner=blocks.inner
  )
  return QTensor(
    blocks.merge(codes).astype(jnp.uint8),
    absmax.reshape(blocks.scales),
    map,
    block,
    axis,
    jnp.dtype(x.dtype),
  )


def dequantise(q: QTensor) -> Float[Array, "..."]:
  """What the codes stand for: `map[codes] absmax`, squared for roots.

  Example:
    >>> from isthmus.pallas.quant8.maps import ROOT
    >>> q = quantise(jnp.array([4.0, 1.0, 1e-9]), map=ROOT)
    >>> [f"{x:.2g}" for x in dequantise(q).tolist()]
    ['4', '0.99', '9.8e-10']
  """
  return q.blocks.merge(to_parts(q)).astype(q.dtype)


def to_codes(
  parts: Float32[Array, "..."], map: Map, *, inner: int, exact: bool = True
) -> tuple[Int32[Array, "..."], Float32[Array, "..."]]:
  """Codes and scales of an array whose axis `inner` is that of blocks.

  Args:
    parts: as `Blocks.split` gives it.
    map: what codes stand for.
    inner: the axis.
    exact: of `encode`.

  Returns:
    Codes as int32, and scales with 1 for the axis.

  Example:
    >>> codes, scale = to_codes(jnp.array([[0.5, -2.0]]), SIGNED, inner=1)
    >>> codes.tolist(), scale.tolist()
    ([[201, 0]], [[2.0]])
  """
  if map.root:
    parts = jnp.sqrt(jnp.maximum(parts, 0.0))
  size = parts if map.signed else jnp.where(parts < 0, 0.0, parts)
  # Magnitudes rise with their bits, and NaN lies above them all; a maximum of
  # floats may pass over it.
  bits = lax.bitcast_convert_type(jnp.abs(size), jnp.int32)
  bits = jnp.max(bits, axis=inner, keepdims=True, initial=0)
  scale = lax.bitcast_convert_type(bits, jnp.float32)
  y = parts / jnp.where(scale > 0, scale, 1.0)
  return encode(y, map, exact=exact), scale


def to_parts(q: QTensor) -> Float32[Array, "..."]:
  """`dequantise` in float32, in the shape of `Blocks.split`.

  Example:
    >>> to_parts(quantise(jnp.ones((2, 512)))).shape
    (2, 2, 256)
  """
  codes = q.blocks.split(q.codes).astype(jnp.int32)
  return values(codes, jnp.expand_dims(q.absmax, q.blocks.inner), q.map)


def values(
  codes: Int32[Array, "..."], scale: Float32[Array, "..."], map: Map
) -> Float32[Array, "..."]:
  """What codes of blocks stand for, given scales that they broadcast with.

  Example:
    >>> values(jnp.array([254, 127]), jnp.array([2.0]), SIGNED).tolist()
    [1.985937476158142, 0.0]
  """
  x = decode(codes, map) * scale
  return jnp.square(x) if map.root else x


def zeros(
  shape: tuple[int, ...],
  *,
  map: Map = SIGNED,
  block: int = 256,
  axis: int | None = -1,
  dtype: Any = jnp.float32,
) -> QTensor:
  """The codes of an array of zeros.

  Args:
    shape: of the array.
    map, block, axis: of `quantise`.
    dtype: of the array.

  Example:
    >>> dequantise(zeros((2, 3))).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
  """
  blocks = Blocks(tuple(shape), block, axis)
  return QTensor(
    jnp.full(shape, map.zero, jnp.uint8),
    jnp.zeros(blocks.scales, jnp.float32),
    map,
    block,
    axis,
    jnp.dtype(dtype),
  )
