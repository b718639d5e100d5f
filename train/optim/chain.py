"""The usual chain of an optimiser: clip, scale, decay, schedule."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from isthmus.train.mesh import path_name
from isthmus.train.optim import fuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """Clipping, a preconditioner, decoupled weight decay and a schedule.

  One step is `p <- p - lr(t) (scale(clip(g)) + weight_decay p)`, with
  `lr` rising linearly over `warmup` steps to `learning_rate`, then falling
  to `final * learning_rate` at the last step by the `decay` named.

  Attributes:
    scale: a function without arguments that gives the preconditioner, such as
      `functools.partial(optax.scale_by_adam, b2=0.95)`; any optax
      transformation without a learning rate of its own serves.
    learning_rate: the peak.
    warmup: steps of linear warm-up; shorter runs warm up for a tenth.
    decay: the shape of the fall.
    final: last learning rate as a fraction of the peak.
    weight_decay: decoupled, scaled by the learning rate.
    decays: regex; parameters whose path it finds are decayed.
    clip: bound on the global norm of the gradient, or None.

  Example:
    >>> optimizer = Optimizer(learning_rate=0.01, warmup=10, final=0.1)
    >>> rate = optimizer.schedule(100)
    >>> [f"{rate(step):.3f}" for step in (0, 9, 100)]
    ['0.001', '0.010', '0.001']

  Reference: Loshchilov and Hutter, "Decoupled weight decay regularization",
    2019.
  """

  scale: Callable[..., optax.GradientTransformation] = functools.partial(
    optax.scale_by_adam, b1=0.9, b2=0.95, eps=1e-8
  )
  learning_rate: float = 1e-3
  warmup: int = 100
  decay: Literal["cosine", "linear", "constant"] = "cosine"
  final: float = 0.1
  weight_decay: float = 0.1
  decays: str = "kernel$"
  clip: float | None = 1.0

  def __post_init__(self):
    if self.learning_rate <= 0:
      raise ValueError(f"learning_rate is {self.learning_rate}; it is positive")
    if self.warmup < 0:
      raise ValueError(f"warmup is {self.warmup} steps; it is at least 0")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip is {self.clip}; it is positive, or None")
    if not 0 <= self.final <= 1:
      raise ValueError(f"final is {self.final}; it is between 0 and 1")

  def schedule(self, steps: int) -> optax.Schedule:
    """The learning rate of each of `steps` steps, counted from 0."""
    warmup = min(self.warmup, max(steps // 10, 0))
    rest = max(steps - warmup, 1)
    peak, last = self.learning_rate, self.learning_rate * self.final
    falls = {
      "cosine": optax.cosine_decay_schedule(peak, rest, self.final),
      "linear": optax.linear_schedule(peak, last, rest),
      "constant": optax.constant_schedule(peak),
    }
    # The first step moves too: warm-up starts at peak / warmup, not at zero.
    rise = optax.linear_schedule(
      peak / max(warmup, 1), peak, max(warmup - 1, 1)
    )
    return optax.join_schedules([rise, falls[self.decay]], [warmup])

  def build(self, steps: int) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` steps.

    It takes whole steps itself if its preconditioner can: see
    `isthmus.train.optim.fuse`.
    """
    return fuse.chain(
      self.scale(),
      self.schedule(steps),
      weight_decay=float(self.weight_decay),
      decays=self._decayed,
      clip=self.clip,
    )

  def _decayed(self, params: Any) -> Any:
    return jax.tree.map_with_path(
      lambda path, _: bool(re.search(self.decays, path_name(path))), params
    )
