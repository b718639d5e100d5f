"""Sums of products, kept in at least float32 whatever is multiplied."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform


def accumulator(dtype: Any) -> jnp.dtype:
  """The dtype of sums and statistics: float64 for float64, else float32.

  Example:
    >>> accumulator(jnp.bfloat16)
    dtype('float32')
  """
  return jnp.dtype(
    jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
  )


def dot(
  equation: str,
  a: Float[Array, "..."],
  b: Float[Array, "..."],
  **kwargs: Any,
) -> Float[Array, "..."]:
  """einsum of two arrays of one dtype, summed and returned in `accumulator`.

  Args:
    equation: of `jnp.einsum`.
    a, b: the operands.
    **kwargs: of `jnp.einsum`, such as `precision`.

  Example:
    >>> a = jnp.ones((1, 257), jnp.bfloat16)  # which has no number 257
    >>> dot("ik,jk->ij", a, a).tolist()
    [[257.0]]
  """
  wide = accumulator(a.dtype)
  if platform() == "cpu":  # some layouts of bfloat16 are missing there
    a, b = a.astype(wide), b.astype(wide)
  return jnp.einsum(equation, a, b, preferred_element_type=wide, **kwargs)


def exact_dot(
  equation: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
  """`dot` that multiplies float32 as float32.

  A GPU's default cuts float32 operands to TensorFloat-32, 10 bits of mantissa,
  which is faster and wrong by 1e-3. `jax.default_matmul_precision` asks for
  that, or for another precision, here too.

  Args:
    equation: of `jnp.einsum`.
    a, b: the operands.

  Example:
    >>> exact_dot("i,i->", jnp.ones(3), jnp.ones(3)).item()
    3.0
  """
  asked = jax.config.jax_default_matmul_precision
  whole = a.dtype == jnp.float32 and asked is None
  return dot(equation, a, b, precision="highest" if whole else None)
