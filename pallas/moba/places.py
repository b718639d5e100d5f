"""Choices in the order of their blocks, in tiles that belong to one block.

What a kernel reads: the rows that chose a block stand side by side, ascending,
and the list of each block begins at a tile of its own; the places that remain
of its last tile are none's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from isthmus.pallas.moba.invert import count_below, invert
from isthmus.pallas.moba.parts import take


class Places(NamedTuple):
  """Rows by place and places by row; int32.

  There are p places, a whole number of tiles.

  Attributes:
    row: [l, p], the row of each place; r, one past the last row, for none.
    limit: [l, p], keys of the tile's block that the row sees, from the first
      one on; 0 for none.
    begin: [l, g + 1], the first tile of each block, and the number of tiles.
    place: [l, r, c], where each choice is.
    real: bool [l, r, c], whether it is anywhere: it sees a key.

  Example:
    >>> choice = jnp.array([[[0, -1], [0, 1]]], jnp.int32)
    >>> at, start = jnp.array([[0, 2]]), jnp.array([[0, 2]])
    >>> found = arrange(choice, at, start, start + 2, tile=2)
    >>> found.row[:, :4].tolist(), found.limit[:, :4].tolist()
    ([[0, 1, 1, 2]], [[1, 2, 1, 0]])
    >>> found.begin.tolist()
    [[0, 1, 2]]
  """

  row: Any
  limit: Any
  begin: Any
  place: Any
  real: Any


@functools.partial(jax.jit, static_argnames="tile")
def arrange(
  choice: Int32[Array, "l r c"],
  at: Int32[Array, "l r"],
  start: Int32[Array, "l g"],
  stop: Int32[Array, "l g"],
  *,
  tile: int,
) -> Places:
  """The places of choices, each block's list beginning at a whole tile.

  Args:
    choice: blocks of each row; -1 for none.
    at: the last key that a row sees.
    start, stop: the keys of each block.
    tile: places of a tile.

  Example:
    >>> choice = jnp.array([[[0], [1], [0]]], jnp.int32)
    >>> at, start = jnp.array([[9, 9, 9]]), jnp.array([[0, 4]])
    >>> found = arrange(choice, at, start, start + 4, tile=2)
    >>> found.place.tolist(), found.real.all().item()
    ([[[0], [2], [1]]], True)
  """
  (lanes, rows, slots), g = choice.shape, start.shape[1]
  index = jnp.clip(choice, 0, g - 1)
  begins, ends = (take(x, index.reshape(lanes, -1)) for x in (start, stop))
  # at may be the largest number.
  seen = jnp.minimum(at[..., None], ends.reshape(index.shape) - 1) + 1
  real = (choice >= 0) & (seen > begins.reshape(index.shape))
  found = invert(jnp.where(real, choice, -1), g)

  offset = found.offset
  tiles = -(-(offset[:, 1:] - offset[:, :-1]) // tile)
  begin = jnp.cumsum(tiles, axis=1, dtype=jnp.int32)
  begin = jnp.pad(begin, ((0, 0), (1, 0)))

  entries = rows * slots
  most = min(entries // tile + min(g, entries), entries)
  which = jnp.arange(most, dtype=jnp.int32)
  block = count_below(begin, most)[:, 1:] - 1
  # Tiles past the last one have no block; their places are none's.
  there = block < g
  block = jnp.minimum(block, g - 1)
  first = take(offset, block) + (which - take(begin, block)) * tile
  last = jnp.where(there, take(offset, block + 1), 0)
  entry = first[..., None] + jnp.arange(tile, dtype=jnp.int32)
  taken = entry < last[..., None]
  entry = jnp.clip(entry, 0, entries - 1).reshape(lanes, -1)
  row = (take(found.order, entry) // slots).reshape(taken.shape)
  sees = take(at, row.reshape(lanes, -1)).reshape(taken.shape)
  sees = jnp.minimum(sees, take(stop, block)[..., None] - 1) + 1
  limit = jnp.where(taken, sees - take(start, block)[..., None], 0)
  row = jnp.where(taken, row, rows)

  flat = index.reshape(lanes, -1)
  place = found.place + take(begin, flat) * tile - take(offset, flat)
  return Places(
    row.reshape(lanes, -1),
    limit.reshape(lanes, -1),
    begin,
    jnp.where(real, place.reshape(real.shape), 0),
    real,
  )


class BlockTiles(NamedTuple):
  """What a kernel that walks along the tiles of a block reads; int32.

  Attributes:
    begin: [l, g + 1], the first tile of each block, and the number of tiles.
    limit: [l, p], keys of the block that each place's row sees.
    whole: [l, tiles], 1 where each row of the tile sees all w keys.
    order: [l, g], blocks by falling number of tiles.

  Example:
    >>> begin, limit = jnp.array([[0, 1]]), jnp.array([[4, 3]])
    >>> found = block_tiles(Places(None, limit, begin, None, None), 2, 4)
    >>> found.whole.tolist(), found.order.tolist()
    ([[0]], [[0]])
  """

  begin: Any
  limit: Any
  whole: Any
  order: Any


@functools.partial(jax.jit, static_argnames=("tile", "keys"))
def block_tiles(places: Places, tile: int, keys: int) -> BlockTiles:
  """The `BlockTiles` of places.

  Args:
    places: of choices, arranged with the same `tile`.
    tile: places of a tile.
    keys: of a whole block.

  Example:
    >>> begin = jnp.array([[0, 1, 3]])
    >>> limit = jnp.array([[4, 4, 4, 4, 4, 0]])
    >>> found = block_tiles(Places(None, limit, begin, None, None), 2, 4)
    >>> found.whole.tolist(), found.order.tolist()
    ([[1, 1, 0]], [[1, 0]])
  """
  begin, limit = places.begin, places.limit
  least = jnp.min(limit.reshape(limit.shape[0], -1, tile), axis=2)
  order = jnp.argsort(begin[:, :-1] - begin[:, 1:], axis=1)
  whole = (least >= keys).astype(jnp.int32)
  return BlockTiles(begin, limit, whole, order.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("block", "size"))
def split(
  choice: Int32[Array, "*lead c"],
  start: Int32[Array, "b g"],
  stop: Int32[Array, "b g"],
  *,
  block: int,
  size: int,
) -> tuple[Int32[Array, "*lead m"], Int32[Array, "b f"], Int32[Array, "b f"]]:
  """Choices of blocks as choices of their pieces of `size` keys.

  Args:
    choice: blocks; -1 for none.
    start, stop: of the blocks.
    block: keys of a block, at most.
    size: keys of a piece.

  Returns:
    (choice, start, stop) of pieces, `ceil(block / size)` of each block.

  Example:
    >>> start = jnp.array([[0, 6]])
    >>> found = split(jnp.array([1, -1]), start, start + 6, block=6, size=4)
    >>> [x.tolist() for x in found]
    [[2, 3, -1, -1], [[0, 4, 6, 10]], [[4, 6, 10, 12]]]
  """
  pieces = -(-block // size)
  if pieces == 1:
    return choice, start, stop
  step = jnp.arange(pieces, dtype=jnp.int32)
  found = jnp.where(
    choice[..., None] >= 0, choice[..., None] * pieces + step, -1
  )
  start = start[..., None] + step * size
  stop = jnp.minimum(start + size, stop[..., None])
  return (
    found.reshape(*choice.shape[:-1], -1),
    start.reshape(start.shape[0], -1),
    jnp.maximum(stop, start).reshape(start.shape[0], -1),
  )
