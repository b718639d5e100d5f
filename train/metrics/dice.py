"""Dice: how far a predicted region and the true one overlap."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def soft_dice(
  p: Float[Array, "b *space n"],
  t: Bool[Array, "b *space n"],
  *,
  smooth: float = 1.0,
) -> Float[Array, "b n"]:
  """`(2 sum(p t) + s) / (sum(p) + sum(t) + s)` of each row and class.

  The sums run over the voxels of a row, in float32, and nothing is squared.
  A class that has no voxel in the truth is not left out: its Dice is
  `s / (sum(p) + s)`, 1 where nothing is predicted either. With s = 0 that
  would be 0 / 0, so s has to be above 0.

  Args:
    p: probability of each class at each voxel, in [0, 1].
    t: where the class truly is.
    smooth: s, in voxels.

  Returns:
    Dice in (0, 1], differentiable in p.

  Raises:
    ValueError: smooth not above 0.

  Example:
    >>> p = jnp.array([[[0.5, 0.0], [1.0, 0.0]]])  # one row, two voxels
    >>> t = jnp.array([[[True, False], [True, False]]])
    >>> print(soft_dice(p, t))  # (3 + 1) / (1.5 + 2 + 1), and 1 / 1
    [[0.8888889 1.       ]]

  Reference: Milletari et al., V-Net, https://arxiv.org/abs/1606.04797 (which
    squares in the denominator).
  """
  check_smooth(smooth)
  space = tuple(range(1, p.ndim - 1))
  p, t = p.astype(jnp.float32), t.astype(jnp.float32)
  sizes = p.sum(space) + t.sum(space)
  return (2 * (p * t).sum(space) + smooth) / (sizes + smooth)


def hard_dice(
  overlap: Sequence[float],
  predicted: Sequence[float],
  true: Sequence[float],
) -> list[float]:
  """`2 overlap / (predicted + true)` of each class, from numbers of voxels.

  Numbers of several volumes may be added up first; the figure is then that of
  one large volume. A class that is nowhere predicted and nowhere true has a
  Dice of 1: nothing about it was wrong.

  Args:
    overlap: voxels that have the class in both.
    predicted, true: voxels that have it in one.

  Returns:
    Dice in [0, 1], one for each class.

  Raises:
    ValueError: lengths that differ, or an overlap outside of what the sizes
      allow.

  Example:
    >>> hard_dice([3.0, 0.0, 0.0], [4.0, 2.0, 0.0], [4.0, 0.0, 0.0])
    [0.75, 0.0, 1.0]
  """
  if not len(overlap) == len(predicted) == len(true):
    raise ValueError(
      f"{len(overlap)} overlaps, {len(predicted)} predicted and {len(true)}"
      " true sizes; there must be one of each for every class"
    )
  found = []
  for i, (both, p, t) in enumerate(zip(overlap, predicted, true, strict=True)):
    if not 0 <= both <= min(p, t):
      raise ValueError(
        f"class {i}: an overlap of {both:g} voxels, of sizes {p:g} and {t:g};"
        " it lies between 0 and the smaller one"
      )
    found.append(2 * both / (p + t) if p + t else 1.0)
  return found


def check_smooth(smooth: float) -> None:
  """Raises ValueError for what can't be added to both sides of a soft Dice.

  Example:
    >>> check_smooth(0.0)
    Traceback (most recent call last):
    ValueError: smooth is 0.0; it must be above 0 and finite
  """
  if not 0 < smooth < float("inf"):
    raise ValueError(f"smooth is {smooth}; it must be above 0 and finite")
