"""Which tiles a CTA takes: one, or several where each is little work."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from isthmus.pallas import hopper
from isthmus.pallas.flash.tile import rem

# Steps that are worth a CTA, which takes the time of a few to begin and to end.
_WORTH = 64


def rounds(ctas: int) -> int:
  """How many of them a processor takes, one after the other.

  Example:
    >>> rounds(132), rounds(133)
    (1, 2)
  """
  return math.ceil(ctas / hopper.PROCESSORS)


def chunk(items: int, steps: float) -> int:
  """How many items a CTA takes one after the other.

  As many as are worth a CTA, or fewer, so that the last round of CTAs leaves
  next to no processor idle; else one, and the GPU gives whoever is done first
  what is left.

  Args:
    items: how many there are.
    steps: of an item, about.

  Example:
    >>> chunk(4096, 8), chunk(4096, 128), chunk(400, 8)
    (8, 1, 1)
  """
  for each in range(int(_WORTH // max(steps, 1)), 1, -1):
    slots = rounds(math.ceil(items / each)) * each * hopper.PROCESSORS
    if slots <= 1.1 * items:
      return each
  return 1


def each_item(items: int, each: int, function: Callable[..., Any]) -> Any:
  """The last `done = function(i, item, done)` of this CTA's items, from 0.

  The CTAs take their first items in order, the second ones in the opposite
  order, and so on: where items are by falling work, all take about as much.

  Args:
    items: how many there are for all.
    each: how many a CTA takes, see `chunk`; the axis "item" is of CTAs.
    function: of the CTA's how-manieth item, the item, and what it has done.

  Example:
    >>> import jax
    >>> from isthmus.pallas.flash.tile import launch
    >>> def body(x_ref, y_ref):
    ...   def one(i, item, done):
    ...     y_ref[item] = x_ref[item]
    ...     return done
    ...   each_item(5, 2, one)
    >>> run = lambda x: launch(
    ...   body,
    ...   (x,),
    ...   out_type=jax.ShapeDtypeStruct((5,), jnp.int32),
    ...   scratch=(),
    ...   items=3,
    ...   threads=1,
    ...   name="copy",
    ... )
    >>> jax.eval_shape(run, jnp.arange(5)).shape
    (5,)
  """
  cta, ctas = lax.axis_index("item"), -(-items // each)
  if each == 1:
    return function(0, cta, jnp.int32(0))
  place = lambda i: jnp.where(rem(i, 2) == 0, cta, ctas - 1 - cta)
  whole, rest = divmod(items, ctas)
  count = whole + (place(jnp.int32(whole)) < rest).astype(jnp.int32)
  one = lambda i, done: function(i, i * ctas + place(i), done)
  return lax.fori_loop(0, count, one, jnp.int32(0))
