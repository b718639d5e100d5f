"""Block masks: which blocks of keys each block of queries sees.

A mask is a pytree of static shape. Its lists, and the ids of its segments,
are traced: one compiled function serves every mask of one capacity. All of it
is built and combined block by block, from bounds of what a block holds, so
that nothing of size t x s ever is.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

from isthmus.attention.mask import Window, check_window, conditions
from isthmus.pallas.flash.lists import (
  Lists,
  capacities,
  dropped,
  listed,
  to_blocks,
)
from isthmus.pallas.flash.plan import classify, most, tiles
from isthmus.pallas.flash.predicate import (
  Band,
  BlockDiagonal,
  Either,
  Predicate,
  Prefix,
  Strided,
)

Block = tuple[int, int]
_BLOCK = (128, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BlockMask:
  """Which keys each query sees, as lists of blocks; `mask` of `attention`.

  Made by the functions below, and combined by `&` and `|`. The last query
  stands at the last key (bottom-right aligned), as in `attention`.

  Attributes:
    lists: the blocks seen whole, and those seen in part.
    q: operands of the predicate by query, int32 [b|1, n|1, t].
    k: operands by key, int32 [b|1, k|1, s].
    predicate: the element mask within blocks seen in part; static.
    lengths: (t, s), numbers of queries and keys; static.
    exact: whether the predicate alone, asked everywhere, is the mask; static.

  Example:
    >>> mask = BlockMask.causal(256) & BlockMask.window((128, 0), 256)
    >>> mask
    BlockMask(256 queries, 256 keys, blocks 128 x 128, batch 1, heads 1, ...
    >>> print(mask.density)
    0.75
  """

  lists: Lists
  q: tuple[Any, ...] = ()
  k: tuple[Any, ...] = ()
  predicate: Predicate | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  lengths: tuple[int, int] = dataclasses.field(
    default=(0, 0), metadata={"static": True}
  )
  exact: bool = dataclasses.field(default=False, metadata={"static": True})

  @staticmethod
  def from_blocks(
    blocks: Bool[Array, "#b #n qb kb"],
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
    causal: bool = False,
    q_length: int | None = None,
    kv_length: int | None = None,
  ) -> "BlockMask":
    """The blocks that are True, for every batch row and head by itself.

    Args:
      blocks: may be traced; of batch 1 or heads 1 is shared.
      block: (bq, bk), tokens of a query block and of a key block.
      capacity: how many blocks seen whole, and how many seen in part, a query
        block has place for; default kb. A query block with more is NaN, in
        outputs and gradients, and counts in `dropped`.
      causal: a query sees keys up to its own, within these blocks.
      q_length: t, if the last query block is short; default qb bq.
      kv_length: s, if the last key block is short; default kb bk.

    Raises:
      ValueError: lengths that make other numbers of blocks.

    Example:
      >>> blocks = jnp.array([[[[True, False], [True, True]]]])
      >>> mask = BlockMask.from_blocks(blocks, block=(2, 2), causal=True)
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]
    """
    block = _check(block, capacity)
    if len(blocks.shape) != 4 or blocks.dtype != bool:
      raise ValueError(
        f"blocks are {blocks.dtype}{list(blocks.shape)}, not bool [b n qb kb]"
      )
    lengths = (
      _length("queries", q_length, blocks.shape[2], block[0]),
      _length("keys", kv_length, blocks.shape[3], block[1]),
    )
    if not causal:
      lists = listed(blocks, block=block, capacity=capacity)
      return BlockMask(lists, lengths=lengths)
    (t, s), kb = lengths, blocks.shape[3]
    band = Band(None, 0, s - t)
    some, every = classify(band, (), (), t=t, s=s, block=block)
    places = kb if capacity is None else capacity
    lists = listed(
      blocks & every,
      blocks & some & ~every,
      block=block,
      capacity=(places, min(places, most(band, block, kb)[1])),
    )
    return BlockMask(lists, predicate=band, lengths=lengths)

  @staticmethod
  def full(
    t: int, s: int | None = None, *, block: Block = _BLOCK
  ) -> "BlockMask":
    """Every key is seen.

    Example:
      >>> print(BlockMask.full(256).density)
      1.0
    """
    s = t if s is None else s
    return _exact(None, (), (), t, s, block, None)

  @staticmethod
  def causal(
    t: int,
    s: int | None = None,
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """Keys up to the query's own.

    Example:
      >>> print(BlockMask.causal(256).density)
      0.75
    """
    s = t if s is None else s
    return _exact(Band(None, 0, s - t), (), (), t, s, block, capacity)

  @staticmethod
  def window(
    width: Window,
    t: int,
    s: int | None = None,
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """Keys from `left` before the query's own to `right` after it.

    Args:
      width: an int, or (left, right), both inclusive; None is no limit.
      t, s, block, capacity: numbers of queries and keys (default: as many),
        tokens of a block, places of each list.

    Example:
      >>> mask = BlockMask.window((1, 0), 4, block=(2, 2))
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [0 1 1 0]
       [0 0 1 1]]
    """
    s = t if s is None else s
    left, right = check_window(width) or (None, None)
    return _exact(Band(left, right, s - t), (), (), t, s, block, capacity)

  @staticmethod
  def segments(
    ids: Int[Array, "b t"],
    kv_ids: Int[Array, "b s"] | None = None,
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """Keys of the query's own segment: the documents of a packed row.

    Args:
      ids: the queries', which may be traced. Blocks are skipped best where
        ids ascend.
      kv_ids: the keys'; default the queries'.
      block, capacity: tokens of a block, places of each list.

    Example:
      >>> ids = jnp.array([[0, 0, 0, 1]])
      >>> mask = BlockMask.segments(ids, block=(2, 2))
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 1 1 0]
       [1 1 1 0]
       [1 1 1 0]
       [0 0 0 1]]
    """
    kv_ids = ids if kv_ids is None else kv_ids
    t, s = ids.shape[1], kv_ids.shape[1]
    found = conditions(t, s, segment_ids=ids, kv_segment_ids=kv_ids)
    return _exact(*found, t, s, block, capacity)

  @staticmethod
  def prefix(
    length: int | Int[Array, "b"],
    t: int,
    s: int | None = None,
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """The first `length` keys, and those up to the query's own.

    Args:
      length: of the prefix, which every query sees whole; an int, or one for
        each batch row, which may be traced.
      t, s, block, capacity: see `window`.

    Example:
      >>> mask = BlockMask.prefix(2, 4, block=(2, 2))
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 1 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]
    """
    s, q = t if s is None else s, ()
    head = Prefix(length if isinstance(length, int) else None)
    if not isinstance(length, int):
      rows = length.astype(jnp.int32)[:, None, None]
      q = (jnp.broadcast_to(rows, (len(length), 1, t)),)
    predicate = Either(Band(None, 0, s - t), head)
    return _exact(predicate, q, (), t, s, block, capacity)

  @staticmethod
  def block_diagonal(
    size: int,
    t: int,
    s: int | None = None,
    *,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """Keys of the query's own group of `size`.

    Example:
      >>> print(BlockMask.block_diagonal(128, 256).density)
      0.5
    """
    if size < 1:
      raise ValueError(f"block_diagonal of size {size}; it must be 1 or more")
    s = t if s is None else s
    return _exact(BlockDiagonal(size, s - t), (), (), t, s, block, capacity)

  @staticmethod
  def strided(
    stride: int,
    t: int,
    s: int | None = None,
    *,
    width: int = 1,
    block: Block = _BLOCK,
    capacity: int | None = None,
  ) -> "BlockMask":
    """Keys at distances d, before or after, with `d mod stride < width`.

    Whole blocks are skipped only if stride is above two blocks: up to there,
    every block has a key at such a distance.

    Example:
      >>> mask = BlockMask.strided(2, 4, block=(2, 2))
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 0 1 0]
       [0 1 0 1]
       [1 0 1 0]
       [0 1 0 1]]
    """
    if not 1 <= width <= stride:
      raise ValueError(f"a stride of {stride} has no width {width}")
    s = t if s is None else s
    predicate = Strided(stride, width, s - t)
    return _exact(predicate, (), (), t, s, block, capacity)

  @property
  def dropped(self) -> Int32[Array, ""]:
    """How many blocks found no place; the query blocks they are of are NaN."""
    return jnp.sum(dropped(self.lists), dtype=jnp.int32)

  @property
  def density(self) -> Float32[Array, ""]:
    """The share of blocks that are listed, whole or in part."""
    full, partial = self.to_blocks()
    return jnp.mean(full | partial, dtype=jnp.float32)

  def __and__(self, other: Any) -> Any:
    """The keys that both masks show; see `intersection`."""
    from isthmus.attention.block_algebra import intersection

    if not isinstance(other, BlockMask):
      return NotImplemented
    return intersection(self, other)

  def __or__(self, other: Any) -> Any:
    """The keys that either mask shows; see `union`."""
    from isthmus.attention.block_algebra import union

    if not isinstance(other, BlockMask):
      return NotImplemented
    return union(self, other)

  def to_dense(self) -> Bool[Array, "#b #n t s"]:
    """The element mask; for tests and pictures of short sequences.

    Rows that overflowed show the blocks that found a place.

    Example:
      >>> mask = BlockMask.causal(4, block=(2, 2))
      >>> print(mask.to_dense()[0, 0].astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 1 1 0]
       [1 1 1 1]]
    """
    from isthmus.attention.block_picture import dense

    return dense(self)

  def plot(self, row: int = 0, head: int = 0, ax: Any = None) -> Any:
    """Draws the blocks on matplotlib axes (default new ones), returned.

    White is skipped, grey seen in part, blue whole; query blocks that
    overflowed are red.

    Example:
      >>> ax = BlockMask.causal(256).plot()
      >>> ax.get_title()
      'row 0, head 0: 0.750 of the blocks'
    """
    from isthmus.attention.block_picture import draw

    return draw(self, row, head, ax)

  def __repr__(self) -> str:
    (t, s), (bq, bk) = self.lengths, self.lists.block
    batch, heads = self.lists.full_num.shape[-3:-1]
    full, partial = capacities(self.lists)
    return (
      f"BlockMask({t} queries, {s} keys, blocks {bq} x {bk}, batch {batch}, "
      f"heads {heads}, capacity {full} + {partial}, {self.predicate})"
    )

  def to_blocks(
    self,
  ) -> tuple[Bool[Array, "#b #n qb kb"], Bool[Array, "#b #n qb kb"]]:
    """Which blocks are seen whole, and which in part.

    Example:
      >>> full, partial = BlockMask.causal(4, block=(2, 2)).to_blocks()
      >>> full[0, 0].tolist(), partial[0, 0].tolist()
      ([[False, False], [True, False]], [[True, False], [False, True]])
    """
    kb = -(-self.lengths[1] // self.lists.block[1])
    full, partial = to_blocks(self.lists, kb)
    return full, jnp.zeros_like(full) if partial is None else partial


def _exact(predicate, q, k, t, s, block, capacity):
  """The mask that a predicate is by itself."""
  block = _check(block, capacity)
  lists = tiles(
    None,
    predicate,
    q,
    k,
    t=t,
    s=s,
    block=block,
    mask_end=False,
    capacity=capacity,
  )
  return BlockMask(lists, q, k, predicate, (t, s), exact=True)


def _check(block, capacity):
  if len(block) != 2 or min(block) < 1:
    raise ValueError(f"block is {block}; it is to be (bq, bk) of 1 or more")
  if capacity is not None and capacity < 1:
    raise ValueError(f"capacity is {capacity}; a list has 1 place or more")
  return tuple(block)


def _length(name, given, blocks, size):
  length = blocks * size if given is None else given
  if -(-length // size) != blocks:
    raise ValueError(
      f"{length} {name} are {-(-length // size)} blocks of {size}, and "
      f"{blocks} are given"
    )
  return length
