"""A step of Adam over moments in eight bits, in XLA: runs everywhere.

Moments are read, brought up to date in float32, and written back; the step is
made of what was not yet rounded. XLA recomputes the new moments for the codes
after it has found the scales, so that nothing of 32 bits a number is kept.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from isthmus.pallas.quant8.api import QTensor, to_codes, to_parts


class Rates(NamedTuple):
  """The numbers of one step; arrays or floats, so that they may change.

  Attributes:
    b1, b2: decays of the moments.
    eps: added to the root of the second moment.
    scale1: `1 / (1 - b1^t)`, t being the step counted from 1.
    scale2: `1 / sqrt(1 - b2^t)`.
    learning_rate: of the step, where there are parameters.
    weight_decay: decoupled, scaled by the learning rate.
    clip: what gradients are multiplied by before anything else.

  Example:
    >>> rates(1, b1=0.9).scale1.round(3).item()
    10.0
  """

  b1: Any
  b2: Any
  eps: Any
  scale1: Any
  scale2: Any
  learning_rate: Any = 1.0
  weight_decay: Any = 0.0
  clip: Any = 1.0


class Move(NamedTuple):
  """What a step does besides its direction: fields of `Rates`.

  Example:
    >>> one = jnp.ones(1)
    >>> moved(one, one, Move(learning_rate=0.25)).item()
    0.75
  """

  learning_rate: Any = 1.0
  weight_decay: Any = 0.0
  clip: Any = 1.0


def rates(
  step: Any,
  *,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  learning_rate: Any = 1.0,
  weight_decay: Any = 0.0,
  clip: Any = 1.0,
) -> Rates:
  """The rates of a step, as float32.

  Args:
    step: counted from 1.
    b1, b2, eps, learning_rate, weight_decay, clip: of `Rates`.

  Example:
    >>> float(rates(2, weight_decay=0.5).weight_decay)
    0.5
  """
  t = jnp.asarray(step, jnp.float32)
  b1, b2, eps, *move = (
    jnp.asarray(x, jnp.float32)
    for x in (b1, b2, eps, learning_rate, weight_decay, clip)
  )
  scale1, scale2 = 1 / (1 - b1**t), 1 / jnp.sqrt(1 - b2**t)
  return Rates(b1, b2, eps, scale1, scale2, *move)


def adam(
  g: Float[Array, "..."],
  m: QTensor,
  v: QTensor,
  rates: Rates,
  p: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "..."], QTensor, QTensor]:
  """One step; see `isthmus.pallas.quant8.step.adam`.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> from isthmus.pallas.quant8.maps import ROOT
    >>> m, v = zeros((4,)), zeros((4,), map=ROOT)
    >>> u, m, v = adam(jnp.array([1.0, -2.0, 0.0, 3.0]), m, v, rates(1))
    >>> u.round(3).tolist()
    [1.0, -1.0, 0.0, 1.0]
  """
  blocks = m.blocks
  u, m1, v1 = direction(
    blocks.split(g.astype(jnp.float32)), to_parts(m), to_parts(v), rates
  )
  u = blocks.merge(u)
  out = u if p is None else moved(p, u, rates)
  return out, written(m, m1), written(v, v1)


def direction(
  g: Float32[Array, "..."],
  m: Float32[Array, "..."],
  v: Float32[Array, "..."],
  rates: Rates,
) -> tuple[Float32[Array, "..."], Float32[Array, "..."], Float32[Array, "..."]]:
  """(u, m, v) of Adam: `u = scale1 m / (scale2 sqrt(v) + eps)`.

  Example:
    >>> one = jnp.ones(1)
    >>> f"{direction(one, one, one, rates(1))[0].item():.4f}"
    '0.3162'
  """
  g = rates.clip * g
  m = rates.b1 * m + (1 - rates.b1) * g
  v = rates.b2 * v + (1 - rates.b2) * jnp.square(g)
  return rates.scale1 * m / (rates.scale2 * jnp.sqrt(v) + rates.eps), m, v


def moved(
  p: Float[Array, "..."], u: Float32[Array, "..."], rates: Rates | Move
) -> Float[Array, "..."]:
  """`p - learning_rate (u + weight_decay p)`, in the dtype of p.

  Example:
    >>> one = jnp.ones(1)
    >>> moved(one, one, rates(1, learning_rate=0.5)).item()
    0.5
  """
  wide = p.astype(jnp.float32)
  wide = wide - rates.learning_rate * (u + rates.weight_decay * wide)
  return wide.astype(p.dtype)


def written(q: QTensor, parts: Float32[Array, "..."]) -> QTensor:
  """`q` holding other numbers, given in the shape of `Blocks.split`.

  Example:
    >>> from isthmus.pallas.quant8.api import dequantise, zeros
    >>> dequantise(written(zeros((2,)), jnp.ones((1, 2)))).tolist()
    [1.0, 1.0]
  """
  codes, absmax = to_codes(parts, q.map, inner=q.blocks.inner)
  return QTensor(
    q.blocks.merge(codes).astype(jnp.uint8),
    absmax.reshape(q.blocks.scales),
    q.map,
    q.block,
    q.axis,
    q.dtype,
  )
