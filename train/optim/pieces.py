"""Where and how much of a parameter an update works on at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from isthmus.pallas.dispatch import platform
from isthmus.pallas.quant8.api import QTensor
from isthmus.train.mesh import P

#: Numbers of a piece, by platform: what an update needs besides its state is
#: a few times as large.
LIMITS = {"cpu": 2**20, "gpu": 2**25, "tpu": 2**23}


def local(
  function: Callable[..., Any],
  spec: P | None,
  *,
  limit: int | None = None,
  whole: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
  """`function(given, *arrays)`, each device taking its part of the arrays.

  Arrays and results have one spec; `given` is copied. A device goes through
  its part piece by piece. Without a spec in a mesh, the function takes it
  whole, for pieces of it may lie on several devices.

  Args:
    function: results are like `arrays` in shape and dtype, number for number.
    spec: of the arrays, or None.
    limit: numbers of a piece; default that of the platform.
    whole: `whole(*arrays)`: whether a device takes its part in one piece.

  Example:
    >>> local(lambda a, x: (a * x,), None)(2, jnp.ones(3))[0].tolist()
    [2.0, 2.0, 2.0]
  """
  mesh = jax.sharding.get_abstract_mesh()

  def pieces(given: Any, *arrays: Any):
    if whole is not None and whole(*arrays):
      return function(given, *arrays)
    return piecewise(
      function, given, *arrays, limit=limit or LIMITS[platform()]
    )

  if mesh.empty or mesh.manual_axes:
    return pieces
  if spec is None:
    return function

  def run(given: Any, *arrays: Any):
    return jax.shard_map(
      pieces,
      in_specs=(P(), *(spec for _ in arrays)),
      out_specs=tuple(spec for _ in arrays),
      check_vma=False,
    )(given, *arrays)

  return run


def piecewise(
  function: Callable[..., Any], given: Any, *arrays: Any, limit: int
) -> tuple[Any, ...]:
  """`function(given, *arrays)` by pieces of the leading axis, in place.

  Args:
    function: as in `local`.
    given: passed on whole.
    *arrays: arrays or trees of them; their leading axes are cut alike, so that
      blocks along it stay whole.
    limit: numbers of a piece, where the leading axes divide so.

  Example:
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> (y,) = piecewise(lambda a, x: (x - a,), 1, x, limit=2)
    >>> y.tolist() == (x - 1).tolist()
    True
  """
  count = _count(arrays, limit)
  if count == 1:
    return function(given, *arrays)
  cut = jax.tree.map(
    lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), arrays
  )

  def body(i: Any, held: Any):
    part = jax.tree.map(
      lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), held
    )
    return jax.tree.map(
      lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0),
      held,
      tuple(function(given, *part)),
    )

  done = lax.fori_loop(0, count, body, cut)
  return jax.tree.map(lambda x, y: y.reshape(x.shape), arrays, done)


def _count(arrays: Any, limit: int) -> int:
  """The fewest pieces within the limit, or the most there can be."""
  coded = lambda x: isinstance(x, QTensor)
  for q in filter(coded, jax.tree.leaves(arrays, is_leaf=coded)):
    if q.axis is None or q.axis == -len(q.shape):
      length = math.prod(q.shape) if q.axis is None else q.shape[0]
      if length % q.block:
        return 1  # pieces would cut blocks
  leaves = jax.tree.leaves(arrays)
  most = math.gcd(*(x.shape[0] if x.ndim else 1 for x in leaves))
  size = max(x.size for x in leaves)
  divisors = [k for k in range(1, most + 1) if most % k == 0] or [1]
  return next((k for k in divisors if size <= k * limit), divisors[-1])


def after(x: Any, done: Any) -> Any:
  """x, once `done` is there: parameters take turns with the memory.

  Example:
    >>> after(jnp.ones(2), jnp.zeros(3)).tolist()
    [1.0, 1.0]
  """
  return x if done is None else lax.optimization_barrier((x, done))[0]
