"""Functions under jit, for tests.

Called as it is, a function compiles a program for every operation and shape in
it, hundreds in a test; under jit it compiles one, which is also what users run.
"""

import functools

import jax
import numpy as np


def jitted(function):
  """`function` with its arrays traced and whatever else is given held fixed.

  Arrays may lie in pytrees. Calls that hold equal values fixed share programs.
  """

  @functools.wraps(function)
  def call(*args, **kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
    fixed = tuple(
      None if yes else x for x, yes in zip(leaves, traced, strict=True)
    )
    arrays = [x for x, yes in zip(leaves, traced, strict=True) if yes]
    return _run(function, tree, tuple(traced), fixed, arrays)

  return call


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function, tree, traced, fixed, arrays):
  given = iter(arrays)
  leaves = [
    next(given) if yes else x for x, yes in zip(fixed, traced, strict=True)
  ]
  args, kwargs = jax.tree.unflatten(tree, leaves)
  return function(*args, **kwargs)
