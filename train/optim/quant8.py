"""Optimisers whose states take a byte a number, in optax's protocol.

A moment is codes of eight bits and a scale for each block, see
`isthmus.pallas.quant8`; the arithmetic is in float32. Which parameters are
kept so, and how they are cut, is `codes`, see `isthmus.train.optim.codes`.

The published scheme writes a second moment that is small in its block as 0,
while the first is not: where gradients in a block are of different sizes, a
step then reaches hundreds of times the learning rate. By default its square
root is kept, and nothing above 0 is written as 0 (`second="sqrt"`).

But for those that round at random, all of them are `Fused`, see
`isthmus.train.optim.fuse`: the trainer has them take their steps themselves.
Where the kernel of `isthmus.pallas.quant8` runs, Adam then reads gradients,
codes and parameters once, and writes codes and parameters once.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from isthmus.pallas.quant8 import ref, step
from isthmus.pallas.quant8.api import QTensor, to_parts
from isthmus.pallas.quant8.maps import NOZERO, ROOT, SIGNED, UNSIGNED, Map
from isthmus.train.optim import fuse
from isthmus.train.optim.coded import coded
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.fuse import Scaling
from isthmus.train.optim.rounding import stochastic_rounding

#: States in eight bits from 4096 numbers on, but for embeddings.
DEFAULT = Codes()
#: A rate; `optax.inject_hyperparams` gives arrays.
Number = float | Float[Array, ""]
#: How a second moment is kept.
Second = Literal["sqrt", "nozero", "plain", "linear"]
#: How a first moment is kept.
First = Literal["dynamic", "linear"]
_SECOND = {
  "sqrt": ROOT,
  "nozero": NOZERO,
  "plain": UNSIGNED,
  "linear": Map(kind="linear", signed=False),
}
_FIRST = {"dynamic": SIGNED, "linear": Map(kind="linear")}


def scale_by_adam8bit(
  *,
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  first: First = "dynamic",
  second: Second = "sqrt",
  codes: Codes = DEFAULT,
  wide: bool = False,
) -> Scaling:
  """Adam's scaling, with both moments in eight bits.

  Args:
    b1, b2: decays of the moments.
    eps: added to the root of the second moment.
    first: how the first moment is kept: "dynamic" or "linear".
    second: how the second is: "sqrt", its root, small ones not as 0; "nozero",
      itself, small ones not as 0; "plain", as published; "linear".
    codes: which parameters, and in which blocks.
    wide: updates in float32, whatever the gradients are.

  Example:
    >>> params = {"w": jnp.ones((64, 128))}
    >>> tx = scale_by_adam8bit()
    >>> update, state = tx.update(params, tx.init(params))
    >>> sum(x.nbytes for x in jax.tree.leaves(state.moments))  # of 8192 numbers
    16896
    >>> update["w"][0, 0].round(3).item()
    1.0

  Reference: Dettmers et al., "8-bit optimizers via block-wise quantization",
    2021.
  """

  def prepare(count):
    return ref.rates(count, b1=b1, b2=b2, eps=eps)

  maps = {"mu": _FIRST[first], "nu": _SECOND[second]}
  return coded(
    _adam,
    prepare,
    maps,
    codes,
    wide=wide,
    move=_adam_step,
    in_place=_in_place,
  )


def adamw8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  weight_decay: Number = 1e-2,
  decays: Any = None,
  first: First = "dynamic",
  second: Second = "sqrt",
  codes: Codes = DEFAULT,
  rounding: bool = False,
) -> optax.GradientTransformation:
  """AdamW with both moments in eight bits.

  Args:
    learning_rate: a number or a schedule.
    b1, b2, eps, first, second, codes: of `scale_by_adam8bit`.
    weight_decay: decoupled, scaled by the learning rate.
    decays: optax's mask of the parameters that decay.
    rounding: round bfloat16 parameters at random, see `stochastic_rounding`,
      not to even.

  Example:
    >>> tx = adamw8bit(1e-3)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0, 0]:.3g}"
    '-0.00101'
  """
  scale = scale_by_adam8bit(
    b1=b1,
    b2=b2,
    eps=eps,
    first=first,
    second=second,
    codes=codes,
    wide=rounding,
  )
  return _chain(scale, learning_rate, weight_decay, decays, rounding)


def lion8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: Number = 0.9,
  b2: Number = 0.99,
  weight_decay: Number = 1e-3,
  decays: Any = None,
  first: First = "dynamic",
  codes: Codes = DEFAULT,
  rounding: bool = False,
) -> optax.GradientTransformation:
  """Lion, `u = sign(b1 m + (1 - b1) g)`, with its moment in eight bits.

  Args:
    learning_rate, weight_decay, decays, first, codes, rounding: of `adamw8bit`.
    b1: weight of the moment in the step.
    b2: its decay.

  Example:
    >>> tx = lion8bit(1e-3, weight_decay=0.0)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0, 0]:.3g}"
    '-0.001'
  """

  def rule(_, g, m):
    return jnp.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

  scale = _one(rule, "mu", _FIRST[first], codes, rounding)
  return _chain(scale, learning_rate, weight_decay, decays, rounding)


def momentum8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  decay: Number = 0.9,
  nesterov: bool = False,
  first: First = "dynamic",
  codes: Codes = DEFAULT,
  rounding: bool = False,
) -> optax.GradientTransformation:
  """Gradient descent with momentum, `m <- decay m + g`, in eight bits.

  Args:
    learning_rate, first, codes, rounding: of `adamw8bit`.
    decay: of the momentum.
    nesterov: step by `decay m + g`, not by m.

  Example:
    >>> tx = momentum8bit(0.1)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0, 0]:.3g}"
    '-0.1'
  """

  def rule(_, g, m):
    m = decay * m + g
    return (decay * m + g if nesterov else m), m

  scale = _one(rule, "mu", _FIRST[first], codes, rounding)
  return _chain(scale, learning_rate, 0.0, None, rounding)


def rmsprop8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  decay: Number = 0.9,
  eps: Number = 1e-8,
  second: Second = "sqrt",
  codes: Codes = DEFAULT,
  rounding: bool = False,
) -> optax.GradientTransformation:
  """RMSprop, `v <- decay v + (1 - decay) g^2`, in eight bits.

  Args:
    learning_rate, second, codes, rounding: of `adamw8bit`.
    decay: of the second moment.
    eps: added to its root.

  Example:
    >>> tx = rmsprop8bit(0.1)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0, 0]:.3g}"
    '-0.316'
  """

  def rule(_, g, v):
    v = decay * v + (1 - decay) * jnp.square(g)
    return g / (jnp.sqrt(v) + eps), v

  scale = _one(rule, "nu", _SECOND[second], codes, rounding)
  return _chain(scale, learning_rate, 0.0, None, rounding)


def adagrad8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  eps: Number = 1e-10,
  second: Second = "sqrt",
  codes: Codes = DEFAULT,
  rounding: bool = False,
) -> optax.GradientTransformation:
  """AdaGrad, `v <- v + g^2`, in eight bits.

  The sum grows by less than a code's step in the end, and then stands still:
  rates fall less than AdaGrad's do.

  Args:
    learning_rate, second, codes, rounding: of `adamw8bit`.
    eps: added to the sum's root.

  Example:
    >>> tx = adagrad8bit(0.1)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, _ = tx.update(params, tx.init(params), params)
    >>> f"{update['w'][0, 0]:.3g}"
    '-0.1'
  """

  def rule(_, g, v):
    v = v + jnp.square(g)
    return g / (jnp.sqrt(v) + eps), v

  scale = _one(rule, "nu", _SECOND[second], codes, rounding)
  return _chain(scale, learning_rate, 0.0, None, rounding)


def _chain(scale, learning_rate, weight_decay, decays, rounding):
  tx = fuse.chain(
    scale, learning_rate, weight_decay=weight_decay, decays=decays
  )
  return optax.chain(tx, stochastic_rounding()) if rounding else tx


def _one(rule, name, map, codes, rounding):
  """A scaling with one moment."""
  leaf = functools.partial(_by_rule, rule)
  return coded(leaf, lambda count: count, {name: map}, codes, wide=rounding)


def _adam(rates, g, m, v):
  """The update of one parameter, whichever way its moments are kept."""
  if isinstance(m, QTensor):
    return step.adam(g, m, v, rates, impl=_impl())
  return ref.direction(g.astype(jnp.float32), m, v, rates)


def _adam_step(rates, how, p, g, m, v):
  """A parameter after the step, whichever way its moments are kept."""
  rates = rates._replace(**how._asdict())
  if isinstance(m, QTensor):
    return step.adam(g, m, v, rates, p, impl=_impl())
  u, m, v = ref.direction(g.astype(jnp.float32), m, v, rates)
  return ref.moved(p, u, rates), m, v


def _in_place(*arrays, divided=False):
  """Whether the step of a parameter takes no memory besides its arrays."""
  *p, g, m, v = arrays
  if not isinstance(m, QTensor):
    return False
  return step.in_place(g, m, v, *p, impl=None if divided else _impl())


def _impl():
  """XLA, if this is of arrays that may lie on several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  spread = not mesh.empty and mesh.size > 1 and not mesh.manual_axes
  return "xla" if spread else None


def _by_rule(rule, given, g, *moments):
  """Of one parameter, by a rule on float32 arrays."""
  g = g.astype(jnp.float32)
  if not isinstance(moments[0], QTensor):
    return rule(given, g, *moments)
  blocks = moments[0].blocks
  u, *new = rule(given, blocks.split(g), *map(to_parts, moments))
  new = (ref.written(q, x) for q, x in zip(moments, new, strict=True))
  return blocks.merge(u), *new
