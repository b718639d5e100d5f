"""Which blocks to keep: the best ones, by mass or by number.

A sort would find them too. What is done instead takes the same few passes
over the scores whatever their number: the bits of floats that are not
negative rise with their values, so that the least value kept is found a few
bits at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Num

# Bits of the least value that one pass settles, by a sum for each of their
# numbers but 0: sums over the same array, which XLA may take in one reading.
_BITS = 3


def keep_best(
  score: Float[Array, "*#lead m"],
  weight: Num[Array, "*#lead #m"] | None,
  target: Num[Array, "*#lead"],
  allowed: Bool[Array, "*#lead m"] | None = None,
) -> Bool[Array, "*lead m"]:
  """The fewest of the best whose weights add up to `target`.

  In the order of falling scores, of equal ones the first ahead, it is the
  shortest start with `sum weight >= target`; all that are allowed if their sum
  is less.

  Where scores are the same for several targets, one copy of them is read.

  Args:
    score: not negative.
    weight: of each, not negative; None: the scores themselves.
    target: what the weights kept must reach; none are kept if it is <= 0.
    allowed: what may be kept; default all.

  Example:
    >>> score = jnp.array([0.1, 0.4, 0.3, 0.2])
    >>> keep_best(score, None, jnp.array(0.6)).tolist()
    [False, True, True, False]
    >>> keep_best(score, jnp.ones(4), jnp.array(3.0)).tolist()
    [False, True, True, True]
  """
  score = score.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(score, jnp.int32)
  if allowed is None:
    allowed = jnp.ones_like(bits, bool)
  # Those of -0 are a negative number's.
  bits = jnp.where(allowed, jnp.maximum(bits, 0), -1)
  if weight is None:  # of what isn't allowed it is NaN, and not looked at
    weight = jax.lax.bitcast_convert_type(bits, jnp.float32)
  lead = jnp.broadcast_shapes(
    bits.shape[:-1], weight.shape[:-1], jnp.shape(target)
  )
  target = jnp.broadcast_to(target, lead)

  def enough(least):
    kept = jnp.where(bits >= least[..., None], weight, 0)
    return jnp.sum(kept, axis=-1) >= target

  least = _largest(enough, lead, 31)
  # Of those at the least value, as many as are wanted still: up to the place
  # before which they are not enough.
  above, equal = bits > least[..., None], bits == least[..., None]
  have = jnp.sum(jnp.where(above, weight, 0), axis=-1)
  place = jnp.arange(bits.shape[-1], dtype=jnp.int32)

  def lacking(end):
    first = jnp.where(equal & (place < end[..., None]), weight, 0)
    return have + jnp.sum(first, axis=-1) < target

  end = _largest(lacking, lead, bits.shape[-1].bit_length())
  kept = above | (equal & (place <= end[..., None]))
  return kept & (target > 0)[..., None]


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


def keep_mass(
  score: Float[Array, "*lead m"],
  threshold: float,
  allowed: Bool[Array, "*#lead m"],
) -> Bool[Array, "*lead m"]:
  """The fewest blocks with `threshold` of the softmax's mass.

  `p_j = exp(x_j) / sum_j exp(x_j)` over what is allowed, in float32; kept are
  the largest until their sum is `threshold`, or all.

  Args:
    score: logits x.
    threshold: in (0, 1]; 1 keeps all that is allowed.
    allowed: what may be kept.

  Raises:
    ValueError: a threshold outside of (0, 1].

  Example:
    >>> score = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    >>> keep_mass(score, 0.7, jnp.ones(4, bool)).tolist()
    [False, True, False, True]
  """
  if not 0 < threshold <= 1:
    raise ValueError(f"the threshold is {threshold}, not in (0, 1]")
  if threshold == 1:
    return jnp.broadcast_to(allowed, score.shape)
  score = jnp.where(allowed, score.astype(jnp.float32), -jnp.inf)
  top = jnp.max(score, axis=-1, keepdims=True)
  p = jnp.exp(score - jnp.where(jnp.isneginf(top), 0.0, top))
  total = jnp.sum(p, axis=-1, keepdims=True)
  p = p / jnp.where(total == 0, 1.0, total)
  return keep_best(p, None, jnp.float32(threshold), allowed)
