"""Where key blocks lie, and which of them a query may choose.

Blocks are counted along a row, oldest first. Those of a packed row never cross
from one segment to the next, so that they begin anywhere and may be short.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32


class BlockLayout(NamedTuple):
  """Blocks by index, and queries by what they may choose; int32, by row.

  Attributes:
    start: [b|1, g], each block's first key; past the last block, s.
    stop: [b|1, g], one past its last key.
    own: [b|1, t], the block that a query reads in any case; -1 for none.
    first: [b|1, t], the first block it may choose.
    last: [b|1, t], one past the last block it may choose.
    at: [b|1, t], the last key that it sees.
    lost: bool [b|1, t], tokens of segments past the bound, whose results are
      NaN; None if blocks lie at multiples of their size, no row being packed.

  Example:
    >>> uniform(3, 5, block=2).own.tolist()
    [[1, 1, 2]]
  """

  start: Any
  stop: Any
  own: Any
  first: Any
  last: Any
  at: Any
  lost: Any = None


def uniform(
  t: int,
  s: int,
  *,
  block: int,
  causal: bool = True,
  positions: Int32[Array, "#b t"] | None = None,
) -> BlockLayout:
  """Blocks at multiples of their size, the last one cut at the end.

  Args:
    t: number of queries.
    s: number of keys.
    block: tokens of a block.
    causal: a query sees keys up to its position, and has a block of its own.
    positions: of the queries among the keys; by default s - t, ..., s - 1. A
      query before the first key sees none; one past the last has an own block
      without keys, which takes its place among the chosen ones.

  Example:
    >>> layout = uniform(2, 5, block=2)
    >>> layout.start.tolist(), layout.stop.tolist()
    ([[0, 2, 4]], [[2, 4, 5]])
    >>> layout.first.tolist(), layout.last.tolist(), layout.own.tolist()
    ([[0, 0]], [[1, 2]], [[1, 2]])
  """
  g = -(-s // block)
  start = jnp.arange(g, dtype=jnp.int32)[None] * block
  stop = jnp.minimum(start + block, s)
  if not causal:
    zero = jnp.zeros((1, t), jnp.int32)
    return BlockLayout(start, stop, zero - 1, zero, zero + g, zero + s)
  if positions is None:
    positions = jnp.arange(s - t, s, dtype=jnp.int32)[None]
  own = positions // block
  last = jnp.clip(own, 0, g)
  own = jnp.where((own >= 0) & (own < g), own, -1)
  return BlockLayout(start, stop, own, jnp.zeros_like(own), last, positions)


def packed(
  segment_ids: Int[Array, "b t"],
  *,
  block: int,
  max_segments: int | None = None,
  causal: bool = True,
) -> BlockLayout:
  """Blocks of rows that hold several segments, counted from each one's start.

  Args:
    segment_ids: a segment is a run of equal ids.
    block: tokens of a block.
    max_segments: of a row, at most; a bound on its blocks, of which there are
      `(t - m) // block + m`. By default any number.
    causal: as in `uniform`.

  Example:
    >>> layout = packed(jnp.array([[7, 7, 7, 9, 9]]), block=2, max_segments=2)
    >>> layout.start.tolist(), layout.stop.tolist()
    ([[0, 2, 3]], [[2, 3, 5]])
    >>> layout.own.tolist(), layout.first.tolist()
    ([[0, 0, 1, 2, 2]], [[0, 0, 0, 2, 2]])
  """
  b, t = segment_ids.shape
  m = t if max_segments is None else min(max_segments, t)
  g = (t - m) // block + m
  at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
  cut = segment_ids[:, 1:] != segment_ids[:, :-1]
  edge = jnp.ones((b, 1), bool)
  opens = jnp.concatenate([edge, cut], axis=1)
  closes = jnp.concatenate([cut, edge], axis=1)
  began = jax.lax.cummax(jnp.where(opens, at, 0), axis=1)
  begins = (at - began) % block == 0
  own = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
  first = jax.lax.cummax(jnp.where(opens, own, 0), axis=1)
  # own never falls along a row: a block begins where it first reaches an index.
  ends = jax.vmap(jnp.searchsorted, in_axes=(0, None))(
    own, jnp.arange(g + 1, dtype=jnp.int32)
  ).astype(jnp.int32)
  lost = jnp.cumsum(opens, axis=1, dtype=jnp.int32) > m
  if causal:
    last = own
  else:
    last = jax.lax.cummin(jnp.where(closes, own + 1, t), axis=1, reverse=True)
    at, own = jnp.full_like(at, t), jnp.full_like(own, -1)
  own, last = jnp.where(lost, -1, own), jnp.where(lost, 0, last)
  return BlockLayout(ends[:, :-1], ends[:, 1:], own, first, last, at, lost)


def mark_lost(
  o: Float[Array, "b t n dv"], lse: Float[Array, "b n t"], layout: BlockLayout
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """NaN for tokens of segments past the bound, so that they can't be missed.

  Example:
    >>> layout = packed(jnp.array([[1, 2]]), block=4, max_segments=1)
    >>> o, lse = mark_lost(jnp.ones((1, 2, 1, 1)), jnp.ones((1, 1, 2)), layout)
    >>> lse.tolist()
    [[[1.0, nan]]]
  """
  if layout.lost is None:
    return o, lse
  lost = layout.lost
  return (
    jnp.where(lost[..., None, None], jnp.nan, o),
    jnp.where(lost[:, None], jnp.nan, lse),
  )
