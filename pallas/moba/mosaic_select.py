"""The choice of blocks for sm_90 in Mosaic GPU: scores that never leave it.

A warpgroup keeps 64 queries of a head and the list of each one's best blocks,
and walks along the centroids from the newest block that one of them may choose
to the oldest. Of each tile, round by round, a row's best remaining score takes
the place of the least one in its list if it is larger. Of equal scores the
newer block thus wins. Indices are float32 within, which is exact.

Products are cheap and rounds are not, so there are two walks. The first one
leaves a row the largest score of each column over all tiles. If `count` of
these reach a level, `count` scores do, and what is below it can't be chosen:
the second walk, which is of rounds, begins with lists of that level. A tile
has as many rounds as one of its rows has scores above its list's least.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.flash.tile import (
  ROWS,
  div,
  filled,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)

#: Centroids of a tile, and tiles in flight.
TILE, STAGES = 64, 2
#: Places of a list that a kernel can keep in registers.
MOST = 64
#: Halvings of the range in which the level of the lists is looked for.
HALVINGS = 8

_NEVER = -1e9  # below any index
_LARGE = 3e38


def spans(first, last, blocks):
  """What the queries of each tile may choose, of `first` to `last`.

  Args:
    first, last: int32 [b|1, t], as in `best`; t is any number.
    blocks: their number.

  Returns:
    int32 [b|1, 4, tiles]: the least `first` and the largest `last` of queries
    that may choose any, then the largest `first` and the least `last` of all,
    between which no query is told from another.

  Example:
    >>> first, last = jnp.array([[0, 0, 1, 5]]), jnp.array([[3, 4, 4, 5]])
    >>> spans(first, last, 8)[0, :, 0].tolist()
    [0, 4, 8, 0]
  """
  ends = ((0, 0), (0, -first.shape[1] % ROWS))

  def tiles(x, fill):
    x = jnp.pad(x, ends, constant_values=fill)
    return x.reshape(x.shape[0], -1, ROWS)

  able = first < last
  return jnp.stack(
    [
      tiles(jnp.where(able, first, blocks), blocks).min(axis=2),
      tiles(jnp.where(able, last, 0), 0).max(axis=2),
      tiles(first, blocks).max(axis=2),
      tiles(last, 0).min(axis=2),
    ],
    axis=1,
  ).astype(jnp.int32)


def best(q, centroids, first, last, span, *, count):
  """The blocks of largest `q . kbar_j` of each query, in no set order.

  Args:
    q: [b t n d]; d is a multiple of 64, t of ROWS.
    centroids: [b g heads d]; g is a multiple of TILE.
    first, last: int32 [b|1, t], the blocks that a query may choose; none if
      first >= last.
    span: int32 [b|1, 4, t / ROWS], of the queries of a tile, see `spans`.
    count: blocks wanted, at most MOST.

  Returns:
    float32 [b n count t], indices; below 0 where there are fewer.

  Example:
    >>> shape = jax.ShapeDtypeStruct
    >>> q = shape((1, 64, 2, 64), "bfloat16")
    >>> row, span = shape((1, 64), "int32"), shape((1, 4, 1), "int32")
    >>> run = functools.partial(best, count=3)
    >>> jax.eval_shape(run, q, q, row, row, span).shape
    (1, 2, 3, 64)
  """
  (b, t, n, d), heads = q.shape, centroids.shape[2]
  tiles, tile = t // ROWS, (ROWS, TILE)
  places = -(-count // 8) * 8
  kept = (ROWS, places)
  # Long lists want more columns than places, or the level is far below them.
  parts = 1 if count <= TILE // 4 else 2
  layout = plgpu.Layout.WGMMA
  iota = functools.partial(plgpu.broadcasted_iota, layout=layout)

  def body(q_ref, k_ref, first_ref, last_ref, span, o_ref, *rest):
    q_smem, k_smem2, o_smem, q_full, k_full = rest
    item = lax.axis_index("item")
    # The longest walks first: those of the last queries of all heads.
    row = tiles - 1 - div(item, b * n)
    batch, head = div(rem(item, b * n), n), rem(item, n)
    kv_head = div(head, n // heads)
    which = 0 if span.shape[0] == 1 else batch
    low, high, inner_low, inner_high = (span[which, i, row] for i in range(4))
    queries, few = pl.ds(row * ROWS, ROWS), high - low <= count
    low = div(low, TILE)
    total = div(high + TILE - 1, TILE) - low
    total = jnp.maximum(total, 0)
    # Who may choose no more than that takes all of them, without a walk.
    total = jnp.where(few, 0, total)

    def base_of(i):
      """The first block of a step's tile; both walks have `total` steps."""
      i = jnp.where(i < total, i, i - total)
      return (low + total - 1 - i) * TILE

    def fetch(i):
      slot, keys = rem(i, STAGES), pl.ds(base_of(i), TILE)
      plgpu.copy_gmem_to_smem(
        k_ref.at[batch, keys, kv_head], k_smem2.at[slot], k_full.at[slot]
      )

    plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem, q_full)
    pl.when(total > 0)(lambda: fetch(jnp.int32(0)))

    def bound(ref):
      at = 0 if ref.shape[0] == 1 else batch
      return plgpu.load(
        ref.at[at, queries], layout=layout.reduce(1), optimized=False
      )

    first, last = bound(first_ref), bound(last_ref)
    plgpu.barrier_wait(q_full)

    def scores(i):
      """Those of a step; -inf where a row may not choose."""
      pl.when(i + 1 < 2 * total)(lambda: fetch(i + 1))
      slot, base = rem(i, STAGES), base_of(i)
      plgpu.barrier_wait(k_full.at[slot])
      k_smem = k_smem2.at[slot]
      x = product(
        tile, lambda acc: wgmma(acc, q_smem, k_smem.transpose((1, 0)))
      )

      def masked(x):
        block = iota(jnp.int32, tile, 1)
        able = block >= spread(first - base, tile, 0)
        able = able & (block < spread(last - base, tile, 0))
        return jnp.where(able, x, -jnp.inf)

      whole = (base >= inner_low) & (base + TILE <= inner_high)
      return lax.cond(whole, lambda x: x, masked, x)

    def climb(i, tops):
      return (*tops[1:], jnp.maximum(tops[0], scores(i)))

    tops = lax.fori_loop(0, total, climb, (filled(tile, -jnp.inf),) * parts)

    def reach(level):
      """How many columns of a row reach a level of its own."""
      level, found = spread(level, tile, 0), filled(tile, 0.0)
      for x in tops:
        found = found + jnp.where(x >= level, 1.0, 0.0)
      return found.sum(axis=1)

    def merge(xs):
      return functools.reduce(jnp.maximum, xs).max(axis=1)

    # Columns without a block are -inf. If there are any, each block has one of
    # its own: more than `count` reach the least, or the row takes all blocks.
    level = -merge([jnp.where(x == -jnp.inf, -jnp.inf, -x) for x in tops])

    def halve(_, carry):
      level, above = carry
      middle = 0.5 * level + 0.5 * above
      enough = reach(middle) >= count
      return jnp.where(enough, middle, level), jnp.where(enough, above, middle)

    level, _ = lax.fori_loop(0, HALVINGS, halve, (level, merge(tops)))
    # Just below, for what equals the level may be chosen.
    level = jnp.minimum(level, _LARGE)
    level = level - jnp.maximum(level, -level) * 2.0**-20 - 1e-37
    every = last - first <= count
    level = jnp.where(every, jnp.inf, level)

    column = iota(jnp.int32, tile, 1).astype(jnp.float32)

    def step(i, carry):
      x, base = scores(total + i), base_of(i).astype(jnp.float32)

      def round_of(_, carry):
        x, score, found = carry
        top = x.max(axis=1)
        hit = jnp.where(x == spread(top, tile, 0), column, _NEVER)
        newest = hit.max(axis=1)
        x = jnp.where(column == spread(newest, tile, 0), -jnp.inf, x)
        least = score.max(axis=1)
        # Of equal scores the older block goes.
        oldest = jnp.where(score == spread(least, kept, 0), found, _NEVER)
        # No place is `_NEVER`: one that is not better takes none.
        oldest = jnp.where(top > -least, oldest.max(axis=1), _NEVER)
        here = found == spread(oldest, kept, 0)
        score = jnp.where(here, spread(-top, kept, 0), score)
        found = jnp.where(here, spread(-newest - base, kept, 0), found)
        return x, score, found

      # The scores above a list's least bound the rounds that change it.
      least = -carry[0].max(axis=1)
      above = jnp.where(x > spread(least, tile, 0), 1.0, 0.0).sum(axis=1)
      rounds = jnp.minimum(above.max().astype(jnp.int32), min(count, TILE))
      _, *carry = lax.fori_loop(0, rounds, round_of, (x, *carry))
      return tuple(carry)

    # Negated, both, so that a largest one is the least and the oldest. Empty
    # places are told apart; those past `count` are never let go.
    place = iota(jnp.int32, kept, 1)
    score = jnp.where(place < count, spread(-level, kept, 0), -jnp.inf)
    found = 1.0 + place.astype(jnp.float32)
    _, found = lax.fori_loop(0, total, step, (score, found))
    for c in range(count):
      here = jnp.where(place == c, -found, _NEVER).max(axis=1)
      newest = last - (1 + c)
      newest = jnp.where(newest >= first, newest, -1).astype(jnp.float32)
      o_smem.at[c][...] = jnp.where(every, newest, here)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, o_ref.at[batch, head, :, queries])
    plgpu.wait_smem_to_gmem(0)

  (found,) = launch(
    body,
    (q, centroids, first, last, span),
    out_type=(jax.ShapeDtypeStruct((b, n, count, t), jnp.float32),),
    scratch=(
      tiled((ROWS, d), q.dtype),
      tiled((STAGES, TILE, d), q.dtype),
      plgpu.SMEM((count, ROWS), jnp.float32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=STAGES),
    ),
    items=b * n * tiles,
    threads=1,
    name="moba_select",
  )
  return found
