"""The usual chain, and its whole step at once where its scaling can take it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from isthmus.pallas.quant8.ref import Move


class Fused(optax.GradientTransformation):
  """A transformation that can also take its step itself.

  `step` does what `update` and `optax.apply_updates` do, on the same state:
  which of them is called may change between two steps. Within a chain, or
  whatever else only knows of `update`, it is as any other.

  Args:
    init, update: of an optax transformation.
    step: `step(params, gradients, state) -> (params, state)`.

  Example:
    >>> descent = optax.sgd(1.0)
    >>> def step(params, gradients, state):
    ...   return jax.tree.map(lambda p, g: p - g, params, gradients), state
    >>> tx = Fused(descent.init, descent.update, step)
    >>> tx.step(3.0, 1.0, tx.init(3.0))[0], len(optax.chain(tx))
    (2.0, 2)
  """

  step: Callable[[Any, Any, Any], tuple[Any, Any]]

  def __new__(
    cls,
    init: Any,
    update: Any,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
  ):
    self = super().__new__(cls, init, update)
    self.step = step
    return self


class Scaling(optax.GradientTransformation):
  """A scaling, without a learning rate, that can also move parameters.

  Args:
    init, update: of an optax transformation.
    take: `take(params, gradients, state, moves) -> (params, state)`, with a
      `Move` for each parameter, in the order of leaves.

  Example:
    >>> alone = optax.identity()
    >>> def take(params, gradients, state, moves):
    ...   return params - moves[0].learning_rate * gradients, state
    >>> Scaling(alone.init, alone.update, take).take(3, 1, (), [Move(0.5)])
    (2.5, ())
  """

  take: Callable[[Any, Any, Any, list[Move]], tuple[Any, Any]]

  def __new__(
    cls,
    init: Any,
    update: Any,
    take: Callable[[Any, Any, Any, list[Move]], tuple[Any, Any]],
  ):
    self = super().__new__(cls, init, update)
    self.take = take
    return self


def chain(
  scale: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: Any = 0.0,
  decays: Any = None,
  clip: float | None = None,
) -> optax.GradientTransformation:
  """`p <- p - lr(t) (scale(clip(g)) + weight_decay p)`.

  Args:
    scale: a transformation without a learning rate. Of a `Scaling`, the chain
      is `Fused`: gradients aren't written clipped, nor updates at all, and in
      float32 nothing is rounded between.
    learning_rate: a number or a schedule.
    weight_decay: decoupled, scaled by the learning rate.
    decays: optax's mask of the parameters that decay; None is all of them.
    clip: bound on the global norm of the gradient, or None.

  Example:
    >>> tx = chain(optax.scale_by_adam(), 0.1, clip=1.0)
    >>> params = {"w": jnp.ones(3)}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0]:.3g}"
    '-0.1'
  """
  parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
  at = len(parts)
  parts.append(scale)
  if not isinstance(weight_decay, float) or weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, decays))
  parts.append(optax.scale_by_learning_rate(learning_rate))
  tx = optax.chain(*parts)
  if not isinstance(scale, Scaling):
    return tx

  def step(params: Any, gradients: Any, state: Any):
    states = list(state)
    rate = learning_rate
    if callable(rate):
      count = states[-1].count
      rate = rate(count)
      states[-1] = states[-1]._replace(count=optax.safe_increment(count))
    factor = 1.0
    if clip is not None:
      norm = optax.tree.norm(gradients)
      factor = jnp.where(norm < clip, 1.0, clip / norm)
    moves = [
      Move(rate, weight_decay if decayed else 0.0, factor)
      for decayed in _each(decays, params)
    ]
    params, states[at] = scale.take(params, gradients, states[at], moves)
    return params, tuple(states)

  return Fused(tx.init, tx.update, step)


def advance(
  tx: optax.GradientTransformation, params: Any, gradients: Any, state: Any
) -> tuple[Any, Any]:
  """`(params, state)` after a step, which tx takes itself if it can.

  Example:
    >>> tx = optax.sgd(0.5)
    >>> params, _ = advance(tx, jnp.ones(2), jnp.ones(2), tx.init(jnp.ones(2)))
    >>> params.tolist()
    [0.5, 0.5]
  """
  if isinstance(tx, Fused):
    return tx.step(params, gradients, state)
  updates, state = tx.update(gradients, state, params)
  return optax.apply_updates(params, updates), state


def _each(decays: Any, params: Any) -> list[bool]:
  """Of each parameter, whether it decays; a mask may end above the leaves."""
  mask = decays(params) if callable(decays) else decays
  if mask is None:
    mask = True
  return jax.tree.leaves(
    jax.tree.map(lambda m, x: jax.tree.map(lambda _: m, x), mask, params)
  )
