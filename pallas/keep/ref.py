"""The best of each row in plain XLA.

A sort would find them too. What is done instead takes the same few passes
over the scores whatever their number: the bits of floats that are not
negative rise with their values, so that the least value kept is found a few
bits at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Num

from isthmus.pallas.flash.lists import compact
from isthmus.pallas.keep.api import Options

# Bits of the least value that one pass settles, by a sum for each of their
# numbers but 0: sums over the same array, which XLA may take in one reading.
_BITS = 3


def kept(
  x: Float[Array, "*#lead m"],
  target: Num[Array | np.ndarray, "*#lead"],
  limit: Int32[Array | np.ndarray, "*#lead"],
  *,
  options: Options,
) -> Bool[Array, "*lead m"]:
  """The fewest of the best whose weights add up to `target`.

  In the order of falling x, of equal ones the first ahead, it is the shortest
  start with `sum weight >= target`; all that are allowed if their sum is less.
  Where x is the same for several targets, one copy of it is read.

  Args:
    x: see `options`; in float32.
    target: what the weights kept must reach; none are kept if it is <= 0.
    limit: only the first so many of a row may be kept.
    options: what is weighed.

  Example:
    >>> x, target = jnp.array([0.1, 0.4, 0.3, 0.2]), jnp.array(0.6)
    >>> kept(x, target, jnp.array(4), options=Options("value")).tolist()
    [False, True, True, False]
    >>> kept(x, target * 5, jnp.array(3), options=Options("one")).tolist()
    [True, True, True, False]
  """
  x = x.astype(jnp.float32)
  place = jnp.arange(x.shape[-1], dtype=jnp.int32)
  allowed = place < limit[..., None]
  if options.weigh == "softmax":
    x = jnp.where(allowed, x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True)
    x = jnp.exp(x - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(x, axis=-1, keepdims=True)
    x = x / jnp.where(total == 0, 1.0, total)
  # Once in memory: computed again for each pass over it, as XLA may fuse it,
  # x could be rounded in more than one way, and the least value kept not be
  # found again.
  x = jax.lax.optimization_barrier(x)
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  # Those of -0 are a negative number's.
  bits = jnp.where(allowed, jnp.maximum(bits, 0), -1)
  weight = jnp.ones((1,), jnp.int32)
  if options.weigh != "one":  # NaN where it isn't allowed, and not looked at
    weight = jax.lax.bitcast_convert_type(bits, jnp.float32)
  lead = jnp.broadcast_shapes(bits.shape[:-1], jnp.shape(target))
  target = jnp.broadcast_to(target, lead)

  def enough(least):
    some = jnp.where(bits >= least[..., None], weight, 0)
    return jnp.sum(some, axis=-1) >= target

  least = _largest(enough, lead, 31)
  # Of those at the least value, as many as are wanted still: up to the place
  # before which they are not enough.
  above, equal = bits > least[..., None], bits == least[..., None]
  have = jnp.sum(jnp.where(above, weight, 0), axis=-1)

  def lacking(end):
    first = jnp.where(equal & (place < end[..., None]), weight, 0)
    return have + jnp.sum(first, axis=-1) < target

  end = _largest(lacking, lead, bits.shape[-1].bit_length())
  found = above | (equal & (place <= end[..., None]))
  return found & (target > 0)[..., None]


def keep(
  x: Float[Array, "*#lead m"],
  target: Num[Array | np.ndarray, "*#lead"],
  limit: Int32[Array | np.ndarray, "*#lead"],
  forced: Int32[Array | np.ndarray, "*#lead"],
  ends: Int32[Array | np.ndarray, "*#lead"],
  *,
  options: Options,
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead m"]]:
  """What `kept` says, and one more, as ascending lists.

  Args:
    x, target, limit, options: as in `kept`.
    forced: is listed in any case; -1 for none.
    ends: what is listed is below it, and below `limit`.

  Returns:
    (num, index): how many, and which; entries past the number are some index
    or other.

  Example:
    >>> x, one = jnp.array([0.1, 0.4, 0.3, 0.2]), jnp.int32(1)
    >>> num, index = keep(
    ...   x, one, jnp.array(4), jnp.array(3), jnp.array(4),
    ...   options=Options("one"),
    ... )
    >>> index[:num].tolist()
    [1, 3]
  """
  place = jnp.arange(x.shape[-1], dtype=jnp.int32)
  found = kept(x, target, limit, options=options)
  found = found | (place == forced[..., None])
  return compact(found & (place < jnp.minimum(ends, limit)[..., None]))


def _largest(
  holds: Callable[[Int32[Array, "*lead"]], Bool[Array, "*lead"]],
  shape: tuple[int, ...],
  bits: int,
) -> Int32[Array, "*lead"]:
  """The largest number of so many bits that `holds`, as all lower ones do."""

  def settle(least, shift, number):
    more = sum(
      holds(least | (jnp.int32(i) << shift)).astype(jnp.int32)
      for i in range(1, number)
    )
    return least | (more << shift)

  rounds, rest = divmod(bits, _BITS)
  least = settle(jnp.zeros(shape, jnp.int32), bits - rest, 2**rest)

  def next_bits(i, least):
    shift = (bits - rest - _BITS * (i + 1)).astype(jnp.int32)
    return settle(least, shift, 2**_BITS)

  return jax.lax.fori_loop(0, rounds, next_bits, least)
