"""Rotary positions: angles, their scaling to longer contexts, and the turn."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from isthmus.pallas.precision import accumulator

#: cos and sin, each [b|1, t, d/2].
Rotation = tuple[jax.Array, jax.Array]


@runtime_checkable
class RopeScaling(Protocol):
  """Makes the rotations slower, for contexts longer than those of training."""

  def scale(
    self, speeds: Float[np.ndarray, "half"]
  ) -> Float[np.ndarray, "half"]:
    """Angles a token, float64 [d/2], from those without scaling."""
    ...


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions are divided by a factor.

  Attributes:
    factor: at least 1; contexts are longer by as much.

  Raises:
    ValueError: a factor below 1.

  Example:
    >>> LinearScaling(4.0).scale(np.asarray([1.0, 0.1]))
    array([0.25 , 0.025])

  Reference: https://arxiv.org/abs/2306.15595
  """

  factor: float

  def __post_init__(self):
    _check_factor(self.factor)

  def scale(
    self, speeds: Float[np.ndarray, "half"]
  ) -> Float[np.ndarray, "half"]:
    """`speeds / factor`."""
    return speeds / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Slow rotations become slower, fast ones stay, with a ramp between.

  With L the context of training, a speed w makes r = L w / 2 pi rounds in it.
  It becomes `((1 - s) / factor + s) w`, where s = (r - low) / (high - low) is
  cut to [0, 1]: it stays where r is above high, and is divided by the factor
  where r is below low.

  Attributes:
    factor: at least 1; contexts are longer by as much.
    low: rounds below which a rotation is slowed in full.
    high: rounds above which it isn't slowed; above low.
    context: L, in tokens.

  Raises:
    ValueError: a value outside its range.

  Example:
    >>> slow = Llama3Scaling(factor=8.0, low=1.0, high=4.0, context=8192)
    >>> slow.scale(np.asarray([1.0, 1e-4]))
    array([1.00e+00, 1.25e-05])

  Reference: https://arxiv.org/abs/2407.21783
  """

  factor: float
  low: float
  high: float
  context: int

  def __post_init__(self):
    _check_factor(self.factor)
    if not 0 < self.low < self.high < math.inf:
      raise ValueError(
        f"low {self.low} and high {self.high} are not 0 < low < high"
      )
    if self.context < 1:
      raise ValueError(f"context is {self.context}; it is at least 1")

  def scale(
    self, speeds: Float[np.ndarray, "half"]
  ) -> Float[np.ndarray, "half"]:
    """Speeds of the formula above."""
    rounds = self.context * speeds / (2 * math.pi)
    kept = np.clip((rounds - self.low) / (self.high - self.low), 0, 1)
    return speeds * ((1 - kept) / self.factor + kept)


def rotation(
  positions: Int[Array, "#b t"],
  *,
  head_dim: int,
  theta: float = 1e4,
  scaling: RopeScaling | None = None,
) -> Rotation:
  """cos and sin of `p theta^(-2i/d)`, each float32 [b|1, t, d/2].

  Args:
    positions: p, in tokens.
    head_dim: d; even.
    theta: longest wavelength over 2 pi, about.
    scaling: slows rotations down; None leaves them.

  Raises:
    ValueError: an odd head_dim.

  Example:
    >>> cos, sin = rotation(jnp.arange(5)[None], head_dim=8)
    >>> cos.shape
    (1, 5, 4)

  Reference: https://arxiv.org/abs/2104.09864
  """
  if head_dim % 2:
    raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
  # In float64: an error in a speed grows with the position.
  speeds = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is not None:
    speeds = scaling.scale(speeds)
  angles = positions[..., None].astype(jnp.float32) * speeds.astype(np.float32)
  return jnp.cos(angles), jnp.sin(angles)


def rope(x: Float[Array, "b t n d"], turn: Rotation) -> Float[Array, "b t n d"]:
  """Turns each pair (x_i, x_{i + d/2}) by its position's angle.

  Args:
    x: queries or keys, any heads.
    turn: from `rotation`.

  Returns:
    The turned heads, of x's dtype; products of two depend on the difference
    of their positions only.

  Example:
    >>> turn = rotation(jnp.zeros((1, 1), jnp.int32), head_dim=4)
    >>> rope(jnp.arange(4.0).reshape(1, 1, 1, 4), turn).tolist()
    [[[[0.0, 1.0, 2.0, 3.0]]]]
  """
  cos, sin = (a[:, :, None, :] for a in turn)
  wide = accumulator(x.dtype)
  cos, sin = cos.astype(wide), sin.astype(wide)
  a, b = jnp.split(x.astype(wide), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


def _check_factor(factor: float) -> None:
  if not 1 <= factor < math.inf:
    raise ValueError(f"factor is {factor}; it is at least 1")
