"""From the blocks of each query to the queries of each block, in one order.

A stable sort of the choices by block leaves the queries of a block side by
side and ascending, whatever runs it. Beside that whole numbers are counted, and
written each to a place of its own: no order of writes is told by the result. A
GPU, whose writes to scattered places are slow and whose sort is fast, sorts a
second time instead.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from isthmus.pallas.dispatch import platform
from isthmus.pallas.moba.parts import take


class Inverted(NamedTuple):
  """Choices in the order of their blocks; int32.

  Attributes:
    order: [*lead, r c], the choices `row c + slot`, by block and then
      ascending; those of no block come last.
    block: [*lead, r c], their blocks; g for none.
    place: [*lead, r c], where each choice is in that order.
    offset: [*lead, g + 1], where each block's choices begin; the last is
      where those of no block do.

  Example:
    >>> invert(jnp.array([[1, 0], [1, -1]], jnp.int32), 2).offset.tolist()
    [0, 1, 3]
  """

  order: Any
  block: Any
  place: Any
  offset: Any


class Tiles(NamedTuple):
  """Pieces of an inverted choice, none of which has two blocks; int32.

  Attributes:
    block: [*lead, m], the block of each tile; g past the last tile.
    begin: [*lead, m], its first place in `Inverted.order`.
    count: [*lead, m], its choices; 0 past the last tile.
    total: [*lead], the number of tiles.

  Example:
    >>> found = invert(jnp.array([[0], [0], [1], [0]], jnp.int32), 2)
    >>> found = tiles(found, size=2)
    >>> found.block.tolist(), found.count.tolist(), found.total.tolist()
    ([0, 0, 1, 2], [2, 1, 1, 0], 3)
  """

  block: Any
  begin: Any
  count: Any
  total: Any


@functools.partial(jax.jit, static_argnums=1)
def invert(choice: Int32[Array, "*lead r c"], num_blocks: int) -> Inverted:
  """The choices of each block, in the order of their rows.

  Args:
    choice: blocks of each row; what is not in [0, num_blocks) counts as none.
    num_blocks: g.

  Example:
    >>> found = invert(jnp.array([[1, 0], [1, -1]], jnp.int32), 2)
    >>> found.order.tolist(), found.place.tolist()
    ([1, 0, 2, 3], [1, 0, 2, 3])
  """
  *lead, r, c = choice.shape
  real = (choice >= 0) & (choice < num_blocks)
  flat = jnp.where(real, choice, num_blocks).reshape(-1, r * c)
  lanes, entries = flat.shape
  # One sort of all lanes: a GPU sorts one long array far faster than many.
  lane = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
  index = jax.lax.iota(jnp.int32, flat.size)
  key = (lane * (num_blocks + 1) + flat).reshape(-1)
  key, order = jax.lax.sort((key, index), num_keys=1, is_stable=True)
  if platform() == "gpu":
    _, place = jax.lax.sort((order, index), num_keys=1, is_stable=True)
  else:
    # Every place is written once, so in no order of writes.
    place = (
      jnp.zeros_like(index)
      .at[order]
      .set(index, unique_indices=True, mode="promise_in_bounds")
    )
  block, order, place = (x.reshape(flat.shape) for x in (key, order, place))
  block = block - lane * (num_blocks + 1)
  order, place = order - lane * entries, place - lane * entries
  offset = count_below(block, num_blocks + 1)[:, :-1]
  found = (order, block, place, offset)
  return Inverted(*(x.reshape(*lead, x.shape[1]) for x in found))


@functools.partial(jax.jit, static_argnums=1)
def count_below(x: Int32[Array, "l e"], bound: int) -> Int32[Array, "l m"]:
  """How many of a lane's numbers are less than 0, ..., bound.

  Whole numbers are added up by a scatter, whose order changes nothing.

  Args:
    x: numbers; those outside of [0, bound) are not counted.
    bound: m - 1.

  Example:
    >>> count_below(jnp.array([[2, 0, 2]]), 3).tolist()
    [[0, 1, 1, 3]]
  """
  lanes = x.shape[0]
  real = (x >= 0) & (x < bound)
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  count = jnp.zeros((lanes, bound + 1), jnp.int32)
  count = count.at[lane, jnp.where(real, x, bound)].add(1)
  below = jnp.cumsum(count[:, :-1], axis=1, dtype=jnp.int32)
  return jnp.pad(below, ((0, 0), (1, 0)))


@functools.partial(jax.jit, static_argnames="size")
def tiles(inverted: Inverted, *, size: int) -> Tiles:
  """Tiles of at most `size` choices that cover those of every block.

  Args:
    inverted: the choices.
    size: choices of a tile.

  Example:
    >>> choice = jnp.array([[1], [3], [1], [1], [3]], jnp.int32)
    >>> found = tiles(invert(choice, 5), size=2)
    >>> found.block[: found.total].tolist()
    [1, 1, 3]
    >>> found.begin[: found.total].tolist()
    [0, 2, 3]
  """
  *lead, entries = inverted.order.shape
  g = inverted.offset.shape[-1] - 1
  block = inverted.block.reshape(-1, entries)
  offset = inverted.offset.reshape(-1, g + 1)
  place = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
  opens = (place - take(offset, block)) % size == 0
  opens = opens & (block < g)
  # Each block that is chosen may leave one tile part empty.
  most = min(-(-entries // size) + min(g, entries), entries)
  begin = jnp.sort(jnp.where(opens, place, entries), axis=1)[:, :most]
  real = begin < entries
  block = jnp.where(real, take(block, jnp.minimum(begin, entries - 1)), g)
  stop = take(offset, jnp.minimum(block + 1, g))
  count = jnp.where(real, jnp.minimum(stop - begin, size), 0)
  total = jnp.sum(opens, axis=1, dtype=jnp.int32)
  found = (x.reshape(*lead, most) for x in (block, begin, count))
  return Tiles(*found, total.reshape(lead))
