"""Intersections and unions of block masks, block by block."""

import dataclasses

from isthmus.attention.block_mask import BlockMask
from isthmus.pallas.flash.lists import capacities, dropped, listed
from isthmus.pallas.flash.plan import tiles
from isthmus.pallas.flash.predicate import Either, both


def intersection(a: BlockMask, b: BlockMask) -> BlockMask:
  """The keys that both masks show; `a & b`.

  Blocks are those of the finer mask. A query block that overflowed in a or b
  counts as overflowed.

  Raises:
    ValueError: lengths, batches or heads that differ, or blocks of which
      neither divides the other.

  Example:
    >>> mask = intersection(BlockMask.causal(4), BlockMask.window((1, 9), 4))
    >>> mask.predicate
    Band(left=1, right=0, offset=0)
  """
  a, b = _alike(a, b)
  (fa, pa), (fb, pb) = a.to_blocks(), b.to_blocks()
  full = fa & fb
  partial = (fa | pa) & (fb | pb) & ~full
  (na, ma), (nb, mb) = capacities(a.lists), capacities(b.lists)
  sizes = min(na, nb), min(na + ma, nb + mb, ma + mb)
  rule = a.predicate, a.q, a.k
  if not _same(a, b):
    rule = both(a.predicate, b.predicate), (*a.q, *b.q), (*a.k, *b.k)
  return _combined(a, b, full, partial, sizes, rule)


def union(a: BlockMask, b: BlockMask) -> BlockMask:
  """The keys that either mask shows; `a | b`.

  One predicate has to say what is seen in the blocks that are seen in part.
  So both masks have the same, or both are what their predicates say by
  themselves; block lists under another predicate than the other mask's are
  refused.

  Raises:
    NotImplementedError: masks that no one predicate expresses.
    ValueError: as `intersection` does.

  Example:
    >>> mask = union(
    ...   BlockMask.window((0, 0), 4, block=(2, 2)),
    ...   BlockMask.block_diagonal(2, 4, block=(2, 2)),
    ... )
    >>> print(mask.to_dense()[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 1]
     [0 0 1 1]]
  """
  a, b = _alike(a, b)
  rule = a.predicate, a.q, a.k
  if not _same(a, b):
    if not (a.exact and b.exact):
      raise NotImplementedError(
        f"union of block lists under {a.predicate} with ones under "
        f"{b.predicate}: a block of one may show elements that the other's "
        "predicate hides; add the other's blocks to from_blocks instead"
      )
    rule = None, (), ()
    if a.predicate is not None and b.predicate is not None:
      rule = Either(a.predicate, b.predicate), (*a.q, *b.q), (*a.k, *b.k)
  (fa, pa), (fb, pb) = a.to_blocks(), b.to_blocks()
  full = fa | fb
  (na, ma), (nb, mb) = capacities(a.lists), capacities(b.lists)
  return _combined(a, b, full, (pa | pb) & ~full, (na + nb, ma + mb), rule)


def _alike(a, b):
  """Both masks in blocks of one size."""
  if a.lengths != b.lengths:
    raise ValueError(f"masks of (queries, keys) {a.lengths} and {b.lengths}")
  x, y = a.lists.full_num.shape[:2], b.lists.full_num.shape[:2]
  for name, m, n in zip(("batch", "heads"), x, y, strict=True):
    if m != n and 1 not in (m, n):
      raise ValueError(f"masks of {name} {m} and {n}")
  (aq, ak), (bq, bk) = a.lists.block, b.lists.block
  if max(aq, bq) % min(aq, bq) or max(ak, bk) % min(ak, bk):
    raise ValueError(f"blocks of {a.lists.block} don't fit {b.lists.block}")
  return (_cut(x, (min(aq, bq), min(ak, bk))) for x in (a, b))


def _cut(mask, block):
  """The mask in smaller blocks."""
  (t, s), heads = mask.lengths, mask.lists.full_num.shape[1]
  lists = tiles(
    mask.lists,
    mask.predicate,
    mask.q,
    mask.k,
    t=t,
    s=s,
    block=block,
    num_heads=heads,
    mask_end=False,
  )
  return dataclasses.replace(mask, lists=lists)


def _same(a, b):
  """Whether one predicate on the same operands is that of both."""
  pairs = zip((*a.q, *a.k), (*b.q, *b.k), strict=False)
  return a.predicate == b.predicate and all(x is y for x, y in pairs)


def _combined(a, b, full, partial, sizes, rule):
  predicate, q, k = rule
  lists = listed(
    full,
    partial if sizes[1] else None,
    block=a.lists.block,
    capacity=sizes,
    lost=dropped(a.lists) + dropped(b.lists),
  )
  return BlockMask(lists, q, k, predicate, a.lengths, a.exact and b.exact)
