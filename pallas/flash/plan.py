"""From conditions to lists of tiles: what a kernel skips, takes whole, tests.

Everything is decided by the least and greatest operand of each tile, so that
nothing of size t x s is built; it runs under jit, on traced operands and
lists.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from isthmus.pallas.flash.lists import (
  Lists,
  capacities,
  dropped,
  listed,
  to_blocks,
)
from isthmus.pallas.flash.predicate import (
  Band,
  BlockDiagonal,
  Both,
  Either,
  Operands,
  Predicate,
  Range,
)


def ranges(x: Int32[Array, "*lead t"], block: int) -> Range:
  """Least and greatest of x over each tile; the last one may be short.

  Example:
    >>> found = ranges(jnp.array([3, 1, 2, 7, 5]), 2)
    >>> found.low.tolist(), found.high.tolist()
    ([1, 2, 5], [3, 7, 5])
  """
  short = -x.shape[-1] % block
  if short:
    # The last element again: what pads a tile must not widen its range.
    last = jnp.broadcast_to(x[..., -1:], (*x.shape[:-1], short))
    x = jnp.concatenate([x, last], axis=-1)
  x = x.reshape(*x.shape[:-1], -1, block)
  return Range(x.min(axis=-1), x.max(axis=-1))


_STATIC = ("predicate", "t", "s", "block", "num_heads")


# Compiled as one where it is called outside of jit.
@functools.partial(jax.jit, static_argnames=_STATIC, inline=True)
def classify(
  predicate: Predicate | None,
  q: Operands,
  k: Operands,
  *,
  t: int,
  s: int,
  block: tuple[int, int],
  num_heads: int | None = None,
) -> tuple[Bool[Array, "#b #n qb kb"], Bool[Array, "#b #n qb kb"]]:
  """(some, every) of each tile: whether it may be seen, and surely whole.

  Args:
    predicate: the element mask; None shows everything.
    q: its operands by query, int32 [b|1, n|1, t].
    k: its operands by key, int32 [b|1, k|1, s].
    t: number of queries.
    s: number of keys.
    block: (bq, bk), tokens of a tile.
    num_heads: n, needed where an operand by key has several heads.

  Raises:
    ValueError: heads that don't divide n.

  Example:
    >>> from isthmus.pallas.flash.predicate import Band
    >>> some, every = classify(
    ...   Band(None, 0), (), (), t=4, s=4, block=(2, 2)
    ... )
    >>> some[0, 0].tolist(), every[0, 0].tolist()
    ([[True, False], [True, True]], [[False, False], [True, False]])
  """
  shape = (1, 1, -(-t // block[0]), -(-s // block[1]))
  if predicate is None:
    return jnp.ones(shape, bool), jnp.ones(shape, bool)
  i, j = _indices(t, block[0]), _indices(s, block[1])
  some, every = predicate.tiles(
    Range(*(x[None, None, :, None] for x in i)),
    Range(*(x[None, None, None, :] for x in j)),
    tuple(Range(*(y[..., None] for y in ranges(x, block[0]))) for x in q),
    tuple(
      Range(*(_repeat(y, num_heads)[:, :, None] for y in ranges(x, block[1])))
      for x in k
    ),
  )
  some, every, _ = jnp.broadcast_arrays(some, every, jnp.ones(shape, bool))
  return some, every


def most(
  predicate: Predicate | None, block: tuple[int, int], kb: int
) -> tuple[int, int]:
  """The most (full, partial) tiles that a row of kb can have.

  Args:
    predicate: the element mask; None shows everything.
    block: (bq, bk), tokens of a tile.
    kb: number of key tiles.

  Example:
    >>> from isthmus.pallas.flash.predicate import Band
    >>> most(Band(None, 0), (128, 128), 1024)  # causal
    (1024, 2)
    >>> most(Band(256, 0), (128, 128), 1024)  # and 256 keys back
    (4, 4)
  """
  full, partial = kb, kb
  if predicate is None:
    partial = 0
  elif isinstance(predicate, Band):
    ends = [x for x in (predicate.left, predicate.right) if x is not None]
    # From query to query an end moves by one key: bq - 1 in a tile.
    partial = len(ends) * _touched(block[0] - 1, block[1])
    if len(ends) == 2:
      full = _touched(block[0] + max(sum(ends), 0), block[1])
      partial = min(partial, full)
  elif isinstance(predicate, BlockDiagonal):
    size = predicate.size
    full = partial = _touched(_touched(block[0], size) * size, block[1])
  elif isinstance(predicate, Both | Either):
    a = most(predicate.a, block, kb)
    b = most(predicate.b, block, kb)
    if isinstance(predicate, Both):
      full, partial = min(a[0], b[0]), min(sum(a), sum(b), a[1] + b[1])
    else:
      full, partial = a[0] + b[0], a[1] + b[1]
  return min(full, kb), min(partial, kb)


def tiles(
  lists: Lists | None,
  predicate: Predicate | None,
  q: Operands = (),
  k: Operands = (),
  *,
  t: int,
  s: int,
  block: tuple[int, int] = (128, 128),
  num_heads: int | None = None,
  mask_end: bool = True,
  capacity: int | None = None,
) -> Lists:
  """Lists of the tiles of a kernel, from lists of blocks and a predicate.

  Lists that are of tiles already are returned as they are. Larger blocks are
  cut into tiles, and the tiles of partial blocks asked again. A row of blocks
  that overflowed makes rows of tiles that did.

  Args:
    lists: lists of blocks; None lists every one.
    predicate: the element mask within partial blocks, or without lists
      everywhere; None if there is none.
    q: its operands by query, int32 [b|1, n|1, t].
    k: its operands by key, int32 [b|1, k|1, s].
    t: number of queries.
    s: number of keys.
    block: (bq, bk), tokens of a tile.
    num_heads: n, needed where an operand by key has several heads.
    mask_end: whether the kernel looks at s only where it tests elements; then
      a last tile that s cuts short is never full.
    capacity: places of each list, where lists is None; default as many as
      the predicate may need.

  Raises:
    ValueError: blocks that are not multiples of the tile, or lists of other
      lengths.

  Example:
    >>> from isthmus.pallas.flash.predicate import Band
    >>> found = tiles(None, Band(1, 0), t=4, s=4, block=(1, 2))
    >>> found.full.tolist(), found.full_num.tolist()
    ([[[[0, 0], [0, 0], [0, 0], [1, 1]]]], [[[0, 1, 0, 1]]])
    >>> found.partial.tolist(), found.partial_num.tolist()
    ([[[[0, 0], [0, 0], [0, 1], [0, 0]]]], [[[1, 0, 2, 0]]])
  """
  kb = -(-s // block[1])
  cut = bool(mask_end and s % block[1])
  ask = {"t": t, "s": s, "block": block, "num_heads": num_heads}
  partial: Any
  if lists is None:
    some, full = classify(predicate, q, k, **ask)
    partial = None if predicate is None else some & ~full
    lost, sizes = None, most(predicate, block, kb)
    if capacity is not None:
      sizes = (min(sizes[0], capacity), min(sizes[1], capacity))
  else:
    times = _times(lists, block, t)
    if times == (1, 1) and not cut:
      return lists
    full, partial = to_blocks(lists, -(-s // lists.block[1]))
    full = _cut(full, times, t, s, block)
    if partial is not None:
      partial = _cut(partial, times, t, s, block)
    lost = _rows(dropped(lists), times[0], full.shape[-2])
    sizes = tuple(size * times[1] for size in capacities(lists))
    if partial is not None and predicate is not None and times != (1, 1):
      some, every = classify(predicate, q, k, **ask)
      full, partial = full | (partial & every), partial & some & ~every
      sizes = (sizes[0] + sizes[1], sizes[1])
  if cut:
    end = jnp.arange(kb) == kb - 1
    full, ends = full & ~end, full & end
    partial = ends if partial is None else partial | ends
    sizes = (sizes[0], sizes[1] + 1)
  return _listed(full, partial, lost, block, sizes)


def restrict(
  lists: Lists,
  predicate: Predicate | None,
  q: Operands = (),
  k: Operands = (),
  *,
  t: int,
  s: int,
  num_heads: int | None = None,
) -> Lists:
  """The lists under one more predicate, in the same blocks.

  A full block stays full where the predicate surely holds everywhere, and
  becomes partial where it may hold somewhere; else it is no longer listed.
  Within the result's partial blocks both predicates are to be tested, that of
  the lists and this one.

  Args:
    lists: lists of blocks.
    predicate: what is to hold besides; None is no condition.
    q: its operands by query, int32 [b|1, n|1, t].
    k: its operands by key, int32 [b|1, k|1, s].
    t: number of queries.
    s: number of keys.
    num_heads: n, needed where an operand by key has several heads.

  Raises:
    ValueError: lists of other lengths.

  Example:
    >>> from isthmus.pallas.flash.predicate import Band
    >>> lists = listed(jnp.ones((1, 1, 2, 2), bool), block=(2, 2))
    >>> found = restrict(lists, Band(None, 0), t=4, s=4)
    >>> found.full_num.tolist(), found.partial_num.tolist()
    ([[[0, 1]]], [[[1, 1]]])
  """
  _times(lists, lists.block, t)
  if predicate is None:
    return lists
  full, partial = to_blocks(lists, -(-s // lists.block[1]))
  some, every = classify(
    predicate, q, k, t=t, s=s, block=lists.block, num_heads=num_heads
  )
  tested = full & some & ~every
  if partial is not None:
    tested = tested | (partial & some)
  sizes = capacities(lists)
  more = most(predicate, lists.block, full.shape[-1])[1]
  sizes = (sizes[0], min(sizes[0], more) + sizes[1])
  return _listed(full & every, tested, dropped(lists), lists.block, sizes)


def _listed(full, partial, lost, block, sizes):
  kb = full.shape[-1]
  sizes = min(max(sizes[0], 1), kb), min(max(sizes[1], 1), kb)
  return listed(full, partial, block=block, capacity=sizes, lost=lost)


def _touched(size, block):
  """The most blocks that `size` tokens in a row can touch."""
  return -(-(size - 1) // block) + 1


def _indices(size, block):
  """The first and last index of each tile."""
  first = jnp.arange(-(-size // block), dtype=jnp.int32) * block
  return Range(first, jnp.minimum(first + block, size) - 1)


def _repeat(x, num_heads):
  """[b, k, kb] by key head as [b, n, kb] by query head."""
  heads = x.shape[1]
  if heads == 1:
    return x
  if num_heads is None or num_heads % heads:
    raise ValueError(
      f"operands of {heads} key heads: num_heads is {num_heads}, no multiple"
    )
  return jnp.repeat(x, num_heads // heads, axis=1)


def _times(lists, block, t):
  """How many tiles a block is high and wide."""
  rows, wanted = lists.full_num.shape[-1], -(-t // lists.block[0])
  if rows != wanted:
    raise ValueError(
      f"lists of {rows} query blocks of {lists.block[0]}; {t} queries make "
      f"{wanted}"
    )
  if lists.block[0] % block[0] or lists.block[1] % block[1]:
    raise ValueError(
      f"blocks of {lists.block} are not multiples of the tile {block}"
    )
  return lists.block[0] // block[0], lists.block[1] // block[1]


def _rows(x, times, rows):
  """[b, n, qb, ...] of blocks as [b, n, rows, ...] of tiles."""
  return jnp.repeat(x, times, axis=2)[:, :, :rows] if times > 1 else x


def _cut(x, times, t, s, block):
  """A mask of blocks as one of their tiles, without those past the ends."""
  x = _rows(x, times[0], -(-t // block[0]))
  if times[1] > 1:
    x = jnp.repeat(x, times[1], axis=3)[..., : -(-s // block[1])]
  return x
