"""Lists of key blocks for each query block: what a kernel walks along.

`Lists` is static in shape and traced in content: one compiled kernel serves
every selection of one capacity. Blocks in `full` need no element mask; those
in `partial` are tested element by element. Both are ascending.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

# The least entry is taken as often instead of looking each place up: the blocks
# that the end of a causal mask crosses are two.
_FEW = 4
# Bits of a word of a row.
_WORD = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
  """Key blocks of each query block, by batch row and query head.

  A count above its list's capacity says that entries were dropped: the rows
  of that query block are NaN, in outputs and gradients. Entries past the
  count repeat a valid index, so that they can be loaded and ignored.

  Attributes:
    full_num: int32 [b|1, n|1, qb], blocks that are seen whole.
    full: int32 [b|1, n|1, qb, capacity], their indices, ascending.
    partial_num: int32 [b|1, n|1, qb], or None if no block is partial.
    partial: int32 [b|1, n|1, qb, capacity], or None.
    block: (bq, bk), tokens of a query block and of a key block; static.

  Example:
    >>> blocks = jnp.array([[[[True, False], [True, True]]]])
    >>> lists = listed(blocks, block=(128, 128))
    >>> lists.full_num.tolist(), lists.full.tolist()
    ([[[1, 2]]], [[[[0, 0], [0, 1]]]])
  """

  full_num: Any
  full: Any
  partial_num: Any
  partial: Any
  block: tuple[int, int] = dataclasses.field(metadata={"static": True})


def listed(
  full: Bool[Array, "#b #n qb kb"],
  partial: Bool[Array, "#b #n qb kb"] | None = None,
  *,
  block: tuple[int, int],
  capacity: int | tuple[int, int] | None = None,
  lost: Int32[Array, "#b #n qb"] | None = None,
) -> Lists:
  """Lists of the blocks that are True.

  Args:
    full: which blocks are seen whole.
    partial: which others are seen in part; None if none is.
    block: (bq, bk), tokens of a query block and of a key block.
    capacity: places of each list, or those of (full, partial); default kb.
      A row with more blocks keeps the first ones and its whole count, which
      marks it.
    lost: how many blocks were dropped before; rows that lost one are marked.

  Example:
    >>> full = jnp.array([[[[True, True, False]]]])
    >>> lists = listed(full, ~full, block=(64, 64), capacity=1)
    >>> lists.full_num.tolist(), lists.full.tolist()
    ([[[2]]], [[[[0]]]])
    >>> lists.partial_num.tolist(), lists.partial.tolist()
    ([[[1]]], [[[[2]]]])
  """
  sizes = capacity if isinstance(capacity, tuple) else (capacity, capacity)
  if partial is not None:
    full, partial = jnp.broadcast_arrays(full, partial)
  num, index = compact(full, sizes[0])
  if lost is not None:
    num = jnp.where(lost > 0, index.shape[-1] + lost, num)
  if partial is None:
    return Lists(num, index, None, None, block)
  return Lists(num, index, *compact(partial, sizes[1]), block)


@functools.partial(jax.jit, static_argnames="capacity", inline=True)
def compact(
  seen: Bool[Array, "*lead kb"], capacity: int | None = None
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead capacity"]]:
  """(num, indices): where each row is True, ascending, padded validly.

  What says where is computed once, not again for each digit of each place.

  Example:
    >>> num, index = compact(jnp.array([[False, True, True, False]]))
    >>> num.tolist(), index.tolist()
    ([2], [[1, 2, 2, 2]])
  """
  size = seen.shape[-1]
  capacity = size if capacity is None else min(capacity, size)
  if capacity > _FEW:
    seen = lax.optimization_barrier(seen)
  num = jnp.sum(seen, axis=-1, dtype=jnp.int32)
  place = jnp.arange(size, dtype=jnp.int32)
  if capacity <= _FEW:
    index = jnp.where(seen, place, size)
    found = [jnp.min(index, axis=-1)]
    while len(found) < capacity:
      index = jnp.where(index > found[-1][..., None], index, size)
      found.append(jnp.min(index, axis=-1))
    index = jnp.stack(found, axis=-1)
  else:
    index = _places(seen, capacity)
  # A row without blocks points at block 0.
  last = jnp.max(jnp.where(seen, place, 0), axis=-1, keepdims=True)
  valid = jnp.arange(capacity, dtype=jnp.int32) < num[..., None]
  return num, jnp.where(valid, index, last)


def _places(seen, capacity: int):
  """Where a row is True for the j-th time, j < capacity, if it is as often.

  Each j finds its word of the row by the counts up to each word's end, and its
  bit by those of halves: a row is read once, and nothing is sorted.
  """
  lead, size = seen.shape[:-1], seen.shape[-1]
  number = -(-size // _WORD)
  padded = jnp.pad(seen, [(0, 0)] * len(lead) + [(0, number * _WORD - size)])
  bits = padded.reshape(*lead, number, _WORD).astype(jnp.uint32)
  words = jnp.sum(
    bits << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32
  )
  ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32), axis=-1)
  j = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (*lead, capacity))

  def at(x, index):
    return jnp.take_along_axis(x, index, axis=-1, mode="promise_in_bounds")

  # How many words end at or before j.
  word = jnp.zeros_like(j)
  for i in reversed(range(number.bit_length())):
    further = jnp.minimum(word + (1 << i), number)
    word = jnp.where(at(ends, further - 1) <= j, further, word)
  before = jnp.where(word > 0, at(ends, jnp.maximum(word - 1, 0)), 0)
  word = jnp.minimum(word, number - 1)
  left, rest, bit = at(words, word), j - before, jnp.zeros_like(j)
  for half in (16, 8, 4, 2, 1):
    low = left & jnp.uint32((1 << half) - 1)
    count = lax.population_count(low).astype(jnp.int32)
    above = rest >= count
    rest = jnp.where(above, rest - count, rest)
    left = jnp.where(above, left >> half, left)
    bit = jnp.where(above, bit + half, bit)
  return word * _WORD + bit


def to_blocks(
  lists: Lists, kb: int
) -> tuple[Bool[Array, "#b #n qb kb"], Bool[Array, "#b #n qb kb"] | None]:
  """(full, partial) as block masks; what overflowed is not in them.

  Args:
    lists: lists over kb blocks.
    kb: number of key blocks.

  Returns:
    bool [b|1, n|1, qb, kb]; the second is None if no block is partial.

  Example:
    >>> full = jnp.array([[[[True, False, True]]]])
    >>> to_blocks(listed(full, block=(64, 64)), 3)[0].tolist()
    [[[[True, False, True]]]]
  """
  full = _spread(lists.full_num, lists.full, kb)
  if lists.partial is None:
    return full, None
  return full, _spread(lists.partial_num, lists.partial, kb)


def transpose(lists: Lists, kb: int) -> Lists:
  """The query blocks that list each key block.

  The result has rows of key blocks, entries that are query blocks, and a
  capacity of qb, so it never overflows. A query block that overflowed is
  listed whole by every key block: its lse is NaN, and so are then the
  gradients of all keys, among them those whose entry was dropped.

  Example:
    >>> full = jnp.array([[[[True, False], [True, True]]]])
    >>> turned = transpose(listed(full, block=(64, 128)), 2)
    >>> turned.full_num.tolist(), turned.full.tolist(), turned.block
    ([[[2, 1]]], [[[[0, 1], [1, 1]]]], (128, 64))
  """
  full, partial = to_blocks(lists, kb)
  lost = overflowed(lists)[..., None]
  full = full | lost
  if partial is not None:
    partial = partial & ~lost
  return listed(
    jnp.swapaxes(full, -1, -2),
    None if partial is None else jnp.swapaxes(partial, -1, -2),
    block=(lists.block[1], lists.block[0]),
  )


def dropped(lists: Lists) -> Int32[Array, "#b #n qb"]:
  """How many blocks of each query block found no place.

  Example:
    >>> full = jnp.array([[[[True, True, True], [False, True, False]]]])
    >>> dropped(listed(full, block=(64, 64), capacity=1)).tolist()
    [[[2, 0]]]
  """
  lost = jnp.maximum(lists.full_num - lists.full.shape[-1], 0)
  if lists.partial is None:
    return lost
  return lost + jnp.maximum(lists.partial_num - lists.partial.shape[-1], 0)


def capacities(lists: Lists) -> tuple[int, int]:
  """The places of a row in both lists.

  Example:
    >>> capacities(listed(jnp.ones((1, 1, 2, 3), bool), block=(64, 64)))
    (3, 0)
  """
  partial = 0 if lists.partial is None else lists.partial.shape[-1]
  return lists.full.shape[-1], partial


def overflowed(lists: Lists) -> Bool[Array, "#b #n qb"]:
  """Which query blocks are NaN, because a list of theirs was too short.

  Example:
    >>> full = jnp.array([[[[True, True, True], [False, True, False]]]])
    >>> overflowed(listed(full, block=(64, 64), capacity=1)).tolist()
    [[[True, False]]]
  """
  return dropped(lists) > 0


@functools.partial(jax.jit, static_argnames="kb", inline=True)
def _spread(num, index, kb):
  """Where each row's first `num` entries, which ascend, point.

  A search in each row, not a scatter: it reads in order, and it is split over
  devices as any elementwise operation is.
  """
  capacity = index.shape[-1]
  num = jnp.minimum(num, capacity)[..., None]
  wanted = jnp.arange(kb, dtype=jnp.int32)
  below = jnp.zeros((*index.shape[:-1], kb), jnp.int32)
  step = 1 << max(capacity.bit_length() - 1, 0)
  while step:
    # How many entries are below `wanted`, one binary digit at a time.
    more = below + step
    entry = jnp.take_along_axis(
      index, jnp.minimum(more, capacity) - 1, axis=-1, mode="clip"
    )
    below = jnp.where((more <= num) & (entry < wanted), more, below)
    step //= 2
  entry = jnp.take_along_axis(
    index, jnp.minimum(below, capacity - 1), axis=-1, mode="clip"
  )
  return (below < num) & (entry == wanted)
