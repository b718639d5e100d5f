"""Transformations whose moments are codes: their state, and one sweep of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from isthmus.pallas.quant8.api import QTensor
from isthmus.pallas.quant8.maps import Map
from isthmus.train.optim.codes import Codes, join, tensors
from isthmus.train.optim.pieces import after, local


class CodedState(NamedTuple):
  """The state of an optimiser whose moments are codes.

  Attributes:
    count: steps done.
    moments: by name, each a `Moment`: `mu` with a sign, `nu` without.

  Example:
    >>> CodedState(jnp.zeros((), jnp.int32), {}).count.item()
    0
  """

  count: Any
  moments: dict[str, Any]


class Fused(NamedTuple):
  """An optimiser that takes its step itself, instead of giving an update.

  What optax adds afterwards is read and written once less.

  Attributes:
    init: `init(params) -> state`.
    step: `step(params, gradients, state) -> (params, state)`.

  Example:
    >>> descend = lambda p, g, s: (jax.tree.map(lambda p, g: p - g, p, g), s)
    >>> Fused(lambda params: (), descend).step(3, 1, ())
    (2, ())
  """

  init: Callable[[Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, Any]]


def coded(
  leaf: Callable[..., Any],
  prepare: Callable[[Any], Any],
  maps: dict[str, Map],
  codes: Codes,
  *,
  wide: bool = False,
) -> optax.GradientTransformation:
  """The transformation that does `leaf` to every parameter.

  Args:
    leaf: `leaf(given, g, *moments) -> (u, *moments)`, where a moment is a
      `QTensor`, or float32 where codes say so.
    prepare: `prepare(count)`, once a step, is `given`.
    maps: of the moments, by name.
    codes: which parameters, and in which blocks.
    wide: updates in float32, whatever the gradients are.

  Example:
    >>> keep = lambda given, g, m: (given * g, m)
    >>> maps = {"mu": Map()}
    >>> tx = coded(keep, lambda count: count, maps, Codes())
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, state = tx.update(params, tx.init(params))
    >>> int(state.count), update["w"][0, 0].item()
    (1, 1.0)
  """

  def one(given: Any, g: Any, *moments: Any):
    u, *moments = leaf(given, g, *moments)
    return u.astype(g.dtype), *moments

  def update(updates: Any, state: CodedState, params: Any = None):
    del params
    count = optax.safe_increment(state.count)
    if wide:
      updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    out, moments = _sweep(
      one, prepare(count), (updates,), state.moments, maps, codes
    )
    return out, CodedState(count, moments)

  return optax.GradientTransformation(_init(maps, codes), update)


def fused(
  leaf: Callable[..., Any],
  prepare: Callable[[Any], Any],
  maps: dict[str, Map],
  codes: Codes,
) -> Fused:
  """The optimiser that does `leaf` to every parameter.

  Args:
    leaf: `leaf(given, p, g, *moments) -> (p, *moments)`.
    prepare, maps, codes: of `coded`.

  Example:
    >>> keep = lambda given, p, g, m: (p - g, m)
    >>> maps = {"mu": Map()}
    >>> optimizer = fused(keep, lambda count: count, maps, Codes())
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, _ = optimizer.step(params, params, optimizer.init(params))
    >>> params["w"][0, 0].item()
    0.0
  """

  def one(given: Any, p: Any, g: Any, *moments: Any):
    p, *moments = leaf(given, p, g, *moments)
    return p, g, *moments

  def step(params: Any, gradients: Any, state: CodedState):
    count = optax.safe_increment(state.count)
    out, moments = _sweep(
      one, prepare(count), (params, gradients), state.moments, maps, codes
    )
    return out, CodedState(count, moments)

  return Fused(_init(maps, codes), step)


def _init(maps, codes):
  def init(params: Any) -> CodedState:
    moments = {name: codes.zeros(params, map) for name, map in maps.items()}
    return CodedState(jnp.zeros((), jnp.int32), moments)

  return init


def _sweep(function, given, trees, moments, maps, codes):
  """`function` of one parameter after another.

  Returns what it gives first, as a tree, and the new moments.
  """
  plan, tree = codes.plan(trees[0]), jax.tree.structure(trees[0])
  given_arrays = [tree.flatten_up_to(x) for x in trees]
  held = [tensors(moments[n], tree, plan, m) for n, m in maps.items()]
  out, new, done = [], [[] for _ in maps], None
  for (name, _), first, *rest in zip(plan, *given_arrays, *held, strict=True):
    spec = codes.spec(name, first.ndim) if codes.rules else None
    # Of all it reads, codes are the least to wait: what waits may be copied.
    count = len(rest) - len(maps)
    others, waiting = rest[:count], after(tuple(rest[count:]), done)
    results = local(function, spec)(given, first, *others, *waiting)
    out.append(results[0])
    renewed = results[len(trees) :]
    done = jax.tree.leaves(renewed)[-1]
    for parts, x in zip(new, renewed, strict=True):
      kept = isinstance(x, QTensor)
      parts.append((x.codes, x.absmax) if kept else (x, None))
  moments = {n: join(tree, x) for n, x in zip(maps, new, strict=True)}
  return tree.unflatten(out), moments
