"""Means of blocks in plain XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator


def pool_blocks(
  x: Float[Array, "b t n d"], block: int
) -> Float[Array, "b m n d"]:
  """Sums of blocks over `block`, also of a last block that is short.

  In float32, rounded to the dtype of x.

  Args:
    x: tokens.
    block: of how many.

  Example:
    >>> x = jnp.array([1.0, 3, 8]).reshape(1, 3, 1, 1)
    >>> pool_blocks(x, 2).ravel().tolist()
    [2.0, 4.0]
  """
  b, t, n, d = x.shape
  padded = jnp.pad(x, ((0, 0), (0, -t % block), (0, 0), (0, 0)))
  total = jnp.sum(
    padded.reshape(b, -1, block, n, d), axis=2, dtype=accumulator(x.dtype)
  )
  return (total / block).astype(x.dtype)
