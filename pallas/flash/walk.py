"""The order in which a kernel's tile meets the tiles of the other side.

A walk first visits the partial tiles, whose elements are masked, then the
full ones. It comes from lists, or, for a band (causal, window, everything),
from arithmetic alone, so that dense attention needs no memory for lists.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import BLOCK, div, entry, rem


@dataclasses.dataclass(frozen=True)
class Walk:
  """The tiles one tile meets.

  Attributes:
    partial: how many come first that are masked.
    total: how many there are.
    index: from a step below `total` to the index of its tile.
    overflow: whether entries were dropped from the list.

  Example:
    >>> Walk(0, 2, lambda step: 1 - step).index(0)
    1
  """

  partial: Any
  total: Any
  index: Callable[[Any], Any]
  overflow: Any = False


def band_walk(
  row: Any,
  band: Band,
  *,
  lengths: tuple[int, int],
  block: tuple[int, int],
  ragged: bool,
) -> Walk:
  """The tiles that the band shows to the tile `row`, by arithmetic.

  Args:
    row: index of the tile; its tokens are row block[0], ...
    band: what is seen, `Band(None, None)` for everything.
    lengths: tokens of this side and of the other.
    block: tokens of a tile of this side and of the other.
    ragged: whether the other side's last tile is masked if it is not whole.

  Example:
    >>> walk = band_walk(
    ...   2, Band(None, 0), lengths=(512, 512), block=(128, 128), ragged=True
    ... )
    >>> int(walk.partial), int(walk.total)  # the diagonal, and two before it
    (1, 3)
    >>> [int(walk.index(jnp.int32(step))) for step in range(3)]
    [2, 0, 1]
  """
  (rows, cols), (br, bc) = lengths, block
  tiles = -(-cols // bc)
  whole = cols // bc if ragged else tiles
  low = row * br + band.offset
  high = jnp.minimum(row * br + br, rows) - 1 + band.offset
  start, stop = jnp.int32(0), jnp.int32(tiles)
  first, last = jnp.int32(0), jnp.int32(whole)
  if band.left is not None:
    start = jnp.minimum(div(jnp.maximum(low - band.left, 0), bc), tiles)
    first = div(jnp.maximum(high - band.left, 0) + (bc - 1), bc)
  if band.right is not None:
    ends = div(jnp.maximum(high + band.right + 1, 0) + (bc - 1), bc)
    stop = jnp.minimum(ends, tiles)
    last = jnp.minimum(div(jnp.maximum(low + band.right + 1, 0), bc), whole)
  stop = jnp.maximum(stop, start)
  first = jnp.clip(first, start, stop)
  last = jnp.clip(last, first, stop)
  before = first - start
  partial = before + stop - last

  def index(step):
    masked = jnp.where(step < before, start + step, last + step - before)
    return jnp.where(step < partial, masked, first + step - partial)

  return Walk(partial, stop - start, index)


def band_steps(band: Band, lengths: tuple[int, int]) -> float:
  """Tiles of BLOCK that a tile of BLOCK meets, on the average.

  Example:
    >>> [band_steps(Band(left, 0), (512, 512)) for left in (None, 0)]
    [2.5, 1.0]
  """
  rows, cols = lengths
  low = np.arange(0, rows, BLOCK) + band.offset
  left = math.inf if band.left is None else band.left
  right = math.inf if band.right is None else band.right
  first = np.clip(low - left, 0, cols) // BLOCK
  last = np.clip(low + (BLOCK - 1) + right, -1, cols - 1) // BLOCK
  return float(np.maximum(last - first + 1, 0).mean())


def query_tile(
  refs: Any, plan: Any, heads: int, item: Any, side: int = BLOCK
) -> tuple[Any, Any, Any, Walk]:
  """(batch, head, row, walk): the tile of queries that an item is.

  Args:
    refs: the arrays of the plan, by name.
    plan: a `Plan`, for what is static.
    heads: of queries.
    item: in batches x heads x rows of tiles.
    side: queries of a tile; BLOCK where there are lists.

  Example:
    >>> from isthmus.pallas.flash.tile import Plan
    >>> plan = Plan((256, 256))
    >>> at = query_tile(plan.arrays(), plan, 2, jnp.int32(5))
    >>> [int(x) for x in at[:3]]  # the last rows come first
    [1, 0, 0]
  """
  t, s = plan.lengths
  tiles = -(-t // side)
  pair, place = div(item, tiles), rem(item, tiles)
  batch, head = div(pair, heads), rem(pair, heads)
  row = tiles - 1 - place
  if refs["order"] is not None:
    row = entry(refs["order"], batch, head, place)
  if refs["lists"] is not None:
    return batch, head, row, list_walk(refs["lists"], batch, head, row)
  block = (side, BLOCK)
  walk = band_walk(row, plan.band, lengths=(t, s), block=block, ragged=True)
  return batch, head, row, walk


def list_walk(refs: Any, batch: Any, head: Any, row: Any) -> Walk:
  """The tiles that lists name for (batch, head, row).

  Args:
    refs: a `Lists` of refs or arrays; axes of size 1 are shared.
    batch, head, row: where.

  Example:
    >>> from isthmus.pallas.flash.lists import listed
    >>> full = jnp.array([[[[True, False, True]]]])
    >>> walk = list_walk(listed(full, ~full, block=(128, 128)), 0, 0, 0)
    >>> int(walk.partial), int(walk.total)
    (1, 3)
    >>> [int(walk.index(step)) for step in range(3)]
    [1, 0, 2]
  """
  size = refs.full_num.shape
  at = (batch if size[0] > 1 else 0, head if size[1] > 1 else 0, row)
  capacity = refs.full.shape[-1]
  full = refs.full_num[at]
  overflow = full > capacity
  full = jnp.minimum(full, capacity)
  if refs.partial is None:
    return Walk(
      jnp.int32(0), full, lambda step: refs.full[(*at, step)], overflow
    )
  room = refs.partial.shape[-1]
  partial = refs.partial_num[at]
  overflow = overflow | (partial > room)
  partial = jnp.minimum(partial, room)

  def index(step):
    masked = refs.partial[(*at, jnp.minimum(step, room - 1))]
    whole = refs.full[(*at, jnp.clip(step - partial, 0, capacity - 1))]
    return jnp.where(step < partial, masked, whole)

  return Walk(partial, partial + full, index, overflow)
