"""Pooled keys: what a query is compared with when it chooses blocks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.precision import accumulator

# Blocks of packed rows that are read at once.
_SOME = 64


@functools.partial(jax.jit, static_argnames="block")
def pool(
  k: Float[Array, "b s k d"], layout: BlockLayout, *, block: int
) -> Float[Array, "b g k d"]:
  """The mean key of each block, over the tokens that it has.

  `kbar_j = mean_{start_j <= i < stop_j} k_i`, summed in float32 and rounded to
  the dtype of k. A block without tokens has 0.

  Args:
    k: keys.
    layout: of their blocks.
    block: tokens of a block, at most.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> k = jnp.array([1.0, 3, 5, 7, 8]).reshape(1, 5, 1, 1)
    >>> pool(k, uniform(5, 5, block=2), block=2).ravel().tolist()
    [2.0, 6.0, 8.0]
  """
  (b, s, heads, d), g = k.shape, layout.start.shape[1]
  wide = accumulator(k.dtype)
  if layout.lost is None:
    k = jnp.pad(k, ((0, 0), (0, g * block - s), (0, 0), (0, 0)))
    total = jnp.sum(k.reshape(b, g, block, heads, d), axis=2, dtype=wide)
    return _mean(total, layout).astype(k.dtype)

  # Short blocks make g large: what is read at once has to be bounded.
  ends = ((0, 0), (0, -g % _SOME))
  start = jnp.pad(layout.start, ends, constant_values=s)
  stop = jnp.pad(layout.stop, ends, constant_values=s)

  def some(i, found):
    begin = jax.lax.dynamic_slice_in_dim(start, i * _SOME, _SOME, 1)
    end = jax.lax.dynamic_slice_in_dim(stop, i * _SOME, _SOME, 1)
    index = begin[..., None] + jnp.arange(block, dtype=jnp.int32)
    real = (index < end[..., None]).reshape(b, -1, 1, 1)
    index = jnp.minimum(index, s - 1).reshape(b, -1, 1, 1)
    x = jnp.where(real, jnp.take_along_axis(k, index, axis=1), 0)
    total = jnp.sum(x.reshape(b, _SOME, block, heads, d), axis=2, dtype=wide)
    return jax.lax.dynamic_update_slice_in_dim(found, total, i * _SOME, 1)

  count = jnp.max(jnp.sum(layout.stop > layout.start, axis=1))
  total = jax.lax.full_like(k, 0, wide, shape=(b, start.shape[1], heads, d))
  total = jax.lax.fori_loop(0, -(-count // _SOME), some, total)
  return _mean(total[:, :g], layout).astype(k.dtype)


def _mean(total, layout):
  """Sums [b g k d] over the counts of their blocks."""
  count = jnp.maximum(layout.stop - layout.start, 1).astype(total.dtype)
  return total / count[..., None, None]
