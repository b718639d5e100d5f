"""Transformations whose moments are codes: their state, and one sweep of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from isthmus.pallas.quant8.api import QTensor
from isthmus.pallas.quant8.maps import Map
from isthmus.pallas.quant8.ref import Move, moved
from isthmus.train.optim.codes import Codes, join, tensors
from isthmus.train.optim.fuse import Scaling
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


def coded(
  leaf: Callable[..., Any],
  prepare: Callable[[Any], Any],
  maps: dict[str, Map],
  codes: Codes,
  *,
  wide: bool = False,
  move: Callable[..., Any] | None = None,
  in_place: Callable[..., bool] | None = None,
) -> Scaling:
  """The scaling that does `leaf` to every parameter.

  Args:
    leaf: `leaf(given, g, *moments) -> (u, *moments)`, where a moment is a
      `QTensor`, or float32 where codes say so.
    prepare: `prepare(count)`, once a step, is `given`.
    maps: of the moments, by name.
    codes: which parameters, and in which blocks.
    wide: updates in float32, whatever the gradients are.
    move: `move(given, how, p, g, *moments) -> (p, *moments)`, `how` a `Move`;
      default `leaf`, and what is left to do.
    in_place: `in_place([p,] g, *moments, divided=False)`: whether `leaf` and
      `move` need no memory besides these, or besides each device's part of
      them. Such parameters aren't cut, and don't wait.

  Example:
    >>> keep = lambda given, g, m: (given * g, m)
    >>> maps = {"mu": Map()}
    >>> tx = coded(keep, lambda count: count, maps, Codes())
    >>> params = {"w": jnp.ones((64, 128))}
    >>> update, state = tx.update(params, tx.init(params))
    >>> int(state.count), update["w"][0, 0].item()
    (1, 1.0)
    >>> params, state = tx.take(params, params, state, [Move(0.25)])
    >>> int(state.count), params["w"][0, 0].item()
    (2, 0.5)
  """

  def scaled(given: Any, g: Any, *moments: Any):
    u, *new = leaf(given, g, *moments)
    return u.astype(g.dtype), *new

  def stepped(given: Any, p: Any, g: Any, *moments: Any):
    p, *new = (move or by_leaf)(*given, p, g, *moments)
    return p, g, *new

  def by_leaf(given: Any, how: Move, p: Any, g: Any, *moments: Any):
    u, *new = leaf(given, how.clip * g.astype(jnp.float32), *moments)
    return moved(p, u, how), *new

  def init(params: Any) -> CodedState:
    moments = {name: codes.zeros(params, map) for name, map in maps.items()}
    return CodedState(jnp.zeros((), jnp.int32), moments)

  def update(updates: Any, state: CodedState, params: Any = None):
    del params
    count = optax.safe_increment(state.count)
    if wide:
      updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    given = [prepare(count)] * len(jax.tree.leaves(updates))
    out, moments = _sweep(
      scaled, given, (updates,), state.moments, maps, codes, in_place
    )
    return out, CodedState(count, moments)

  def take(
    params: Any, gradients: Any, state: CodedState, moves: Sequence[Move]
  ):
    count = optax.safe_increment(state.count)
    once = prepare(count)
    given = [(once, jax.tree.map(jnp.asarray, how)) for how in moves]
    trees = params, gradients
    out, moments = _sweep(
      stepped, given, trees, state.moments, maps, codes, in_place
    )
    return out, CodedState(count, moments)

  return Scaling(init, update, take)


def _sweep(function, given, trees, moments, maps, codes, in_place):
  """`function` of one parameter after another.

  Returns what it gives first, as a tree, and the new moments.
  """
  plan, tree = codes.plan(trees[0]), jax.tree.structure(trees[0])
  arrays = [tree.flatten_up_to(x) for x in trees]
  held = [tensors(moments[n], tree, plan, m) for n, m in maps.items()]
  out, new, done = [], [[] for _ in maps], None
  for (name, _), once, *all_ in zip(plan, given, *arrays, *held, strict=True):
    spec = codes.spec(name, all_[0].ndim) if codes.rules else None
    divided = spec is not None
    if in_place is None or not in_place(*all_, divided=divided):
      # Of all it reads, codes are the least to wait: what waits may be copied.
      waiting = after(tuple(all_[len(trees) :]), done)
      all_ = [*all_[: len(trees)], *waiting]
    results = local(function, spec, whole=in_place)(once, *all_)
    out.append(results[0])
    renewed = results[len(trees) :]
    done = jax.tree.leaves(renewed)[-1]
    for parts, x in zip(new, renewed, strict=True):
      kept = isinstance(x, QTensor)
      parts.append((x.codes, x.absmax) if kept else (x, None))
  moments = {n: join(tree, x) for n, x in zip(maps, new, strict=True)}
  return tree.unflatten(out), moments
