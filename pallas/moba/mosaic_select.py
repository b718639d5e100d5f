"""The choice of blocks for sm_90 in Mosaic GPU: scores that never leave it.

A warpgroup keeps 64 queries of a head and the list of each one's best blocks,
and walks along the centroids from the newest block that one of them may choose
to the oldest. Of each tile, round by round, a row's best remaining score takes
the place of the least one in its list if it is larger. Of equal scores the
newer block thus wins. Indices are float32 within, which is exact.
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

_NEVER = -1e9  # below any index


def best(q, centroids, first, last, span, *, count):
  """The blocks of largest `q . kbar_j` of each query, in no set order.

  Args:
    q: [b t n d]; d is a multiple of 64, t of ROWS.
    centroids: [b g heads d]; g is a multiple of TILE.
    first, last: int32 [b|1, t], the blocks that a query may choose; none if
      first >= last.
    span: int32 [b|1, 2, t / ROWS], the least `first` and the largest `last`
      of the queries of a tile that may choose any; equal if there are none.
    count: blocks wanted, at most MOST.

  Returns:
    float32 [b n count t], indices; below 0 where there are fewer.

  Example:
    >>> shape = jax.ShapeDtypeStruct
    >>> q = shape((1, 64, 2, 64), "bfloat16")
    >>> row, span = shape((1, 64), "int32"), shape((1, 2, 1), "int32")
    >>> run = functools.partial(best, count=3)
    >>> jax.eval_shape(run, q, q, row, row, span).shape
    (1, 2, 3, 64)
  """
  (b, t, n, d), heads = q.shape, centroids.shape[2]
  tiles, tile = t // ROWS, (ROWS, TILE)
  places = -(-count // 8) * 8
  kept = (ROWS, places)
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
    low, high = span[which, 0, row], span[which, 1, row]
    queries = pl.ds(row * ROWS, ROWS)
    low = div(low, TILE)
    total = div(high + TILE - 1, TILE) - low
    total = jnp.maximum(total, 0)

    def fetch(i):
      slot = rem(i, STAGES)
      keys = pl.ds((low + total - 1 - i) * TILE, TILE)
      plgpu.copy_gmem_to_smem(
        k_ref.at[batch, keys, kv_head], k_smem2.at[slot], k_full.at[slot]
      )

    plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem, q_full)
    pl.when(total > 0)(lambda: fetch(jnp.int32(0)))

    def bound(ref):
      at = 0 if ref.shape[0] == 1 else batch
      x = plgpu.load(
        ref.at[at, queries], layout=layout.reduce(1), optimized=False
      )
      return spread(x, tile, 0)

    first, last = bound(first_ref), bound(last_ref)
    plgpu.barrier_wait(q_full)

    def step(i, carry):
      pl.when(i + 1 < total)(lambda: fetch(i + 1))
      slot = rem(i, STAGES)
      plgpu.barrier_wait(k_full.at[slot])
      k_smem = k_smem2.at[slot]
      x = product(
        tile, lambda acc: wgmma(acc, q_smem, k_smem.transpose((1, 0)))
      )
      block = iota(jnp.int32, tile, 1) + (low + total - 1 - i) * TILE
      x = jnp.where((block >= first) & (block < last), x, -jnp.inf)
      index = block.astype(jnp.float32)

      def round_of(_, carry):
        x, score, found = carry
        top = x.max(axis=1)
        hit = jnp.where(x == spread(top, tile, 0), index, _NEVER)
        newest = hit.max(axis=1)
        x = jnp.where(index == spread(newest, tile, 0), -jnp.inf, x)
        least = -(-score).max(axis=1)
        # Of equal scores the older block goes.
        oldest = jnp.where(score == spread(least, kept, 0), -found, _NEVER)
        oldest = -oldest.max(axis=1)
        top = jnp.where(top > least, top, -jnp.inf)
        better = spread(top, kept, 0) > score
        here = better & (found == spread(oldest, kept, 0))
        score = jnp.where(here, spread(top, kept, 0), score)
        found = jnp.where(here, spread(newest, kept, 0), found)
        return x, score, found

      _, *carry = lax.fori_loop(0, min(count, TILE), round_of, (x, *carry))
      return tuple(carry)

    # Empty places are told apart; those past `count` are never let go.
    place = iota(jnp.int32, kept, 1)
    score = jnp.where(place < count, filled(kept, -jnp.inf), jnp.inf)
    found = -1.0 - place.astype(jnp.float32)
    _, found = lax.fori_loop(0, total, step, (score, found))
    for c in range(count):
      here = jnp.where(place == c, found, _NEVER)
      o_smem.at[c][...] = here.max(axis=1)
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
