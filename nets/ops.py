"""Pure functions over parameters that more than one network needs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from isthmus.attention.shard import place, widen
from isthmus.pallas.precision import accumulator, dot

# Up to this many rows a table's gradient is a matmul with one-hot rows; above
# it, a scatter. The matmul is deterministic, and few rows make a scatter slow:
# all tokens add to the same few addresses.
_ONE_HOT_ROWS = 2048


@jax.custom_vjp
def embed_lookup(
  table: Float[Array, "v m"], tokens: Int[Array, "b t"]
) -> Float[Array, "b t m"]:
  """Rows of a table: `x_bt = table[tokens_bt]`.

  On a mesh they lie where `isthmus.attention.shard.place` puts them.

  Args:
    table: one row a token of the vocabulary.
    tokens: ids in [0, v); an id outside gives NaN.

  Returns:
    The rows, of the table's dtype.

  Example:
    >>> table = jnp.array([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]])
    >>> embed_lookup(table, jnp.array([[2, 0]])).tolist()
    [[[2.0, 2.5], [0.0, 0.5]]]
  """
  return place(jnp.take(widen(table), place(tokens), axis=0, mode="fill"))


def _embed_forward(table, tokens):
  # An empty slice carries the table's shape and dtype without its memory.
  return embed_lookup(table, tokens), (tokens, table[:, :0])


def _embed_backward(residuals, dx):
  tokens, like = residuals
  rows, dtype = like.shape[0], like.dtype
  # Rows and tokens stay two axes: a mesh may divide both.
  tokens, dx = place(tokens), place(dx)
  wide = accumulator(dx.dtype)
  if rows <= _ONE_HOT_ROWS:
    hot = jax.nn.one_hot(tokens, rows, dtype=dx.dtype)
    # One-hot rows are exact in any dtype; float32 rows would be rounded to
    # TF32 on a GPU.
    exact = jax.lax.Precision.HIGHEST if dx.dtype == wide else None
    table = dot("btv,btm->vm", hot, dx, precision=exact)
  else:
    table = jnp.zeros((rows, dx.shape[-1]), wide)
    table = table.at[tokens].add(dx.astype(wide))
  return table.astype(dtype), None


embed_lookup.defvjp(_embed_forward, _embed_backward)


def project(
  x: Float[Array, "b t m"], kernel: Float[Array, "m v"], *, dtype: Any
) -> Float[Array, "b t v"]:
  """`x @ kernel` with operands of `dtype` and a result of at least float32.

  The backward matmuls take operands of `dtype` too. Left to autodiff, they
  would take the float32 cotangent, and so run at a fraction of the speed.

  Args:
    x: activations.
    kernel: parameters, of any float dtype; their gradient is not rounded to
      `dtype`.
    dtype: what is multiplied; sums are kept in at least float32.

  Returns:
    The product, in float32 (float64 for float64).

  Example:
    >>> x = jnp.ones((1, 3, 8), jnp.bfloat16)
    >>> y = project(x, jnp.ones((8, 5)), dtype=jnp.bfloat16)
    >>> y.shape, y.dtype
    ((1, 3, 5), dtype('float32'))
  """
  return _project(jnp.dtype(dtype), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(dtype, x, kernel):
  return _matmul("btm,mv->btv", x, kernel, dtype)


def _project_forward(dtype, x, kernel):
  return _project(dtype, x, kernel), (x, kernel)


def _project_backward(dtype, residuals, dy):
  x, kernel = residuals
  dx = _matmul("btv,mv->btm", dy, kernel, dtype)
  dkernel = _matmul("btm,btv->mv", x, dy, dtype)
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_project.defvjp(_project_forward, _project_backward)


def _matmul(equation, a, b, dtype):
  return dot(equation, a.astype(dtype), b.astype(dtype))
