"""Attention of listed rows to one key block each, for sm_90 in Mosaic GPU.

A CTA keeps the keys and values of one block and goes through the tiles of
rows that chose it, which lie side by side (see `places`). Its warpgroups take
every other tile and know nothing of each other; each brings in the next tile
while it works on one.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.flash.tile import (
  ROWS,
  div,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
  where_partial,
)

LOG2E = math.log2(math.e)
#: Warpgroups of a CTA, and tiles of a warpgroup in flight.
GROUPS, STAGES = 2, 2


def forward(q, k, v, lists, *, scale):
  """(o, lse) of each listed row over the keys of its tile's block.

  A row that sees none has o = 0 and lse = -inf.

  Args:
    q: [l p d], rows in places; d is a multiple of 64, and that of v.
    k, v: [l g w d], blocks; w is a multiple of 64.
    lists: `BlockTiles` of ROWS places.
    scale: of the logits.

  Returns:
    o [l p d] of q's dtype, lse float32 [l p], natural.

  Example:
    >>> from isthmus.pallas.moba.places import BlockTiles
    >>> shape = jax.ShapeDtypeStruct
    >>> q = shape((1, 128, 64), "bfloat16")
    >>> k = shape((1, 1, 64, 64), "bfloat16")
    >>> tiles, row = shape((1, 2), "int32"), shape((1, 1), "int32")
    >>> lists = BlockTiles(tiles, shape((1, 128), "int32"), tiles, row)
    >>> run = lambda *x: forward(*x, scale=1.0)
    >>> [x.shape for x in jax.eval_shape(run, q, k, k, lists)]
    [(1, 128, 64), (1, 128)]
  """
  (lanes, places, d), (_, g, w, _) = q.shape, k.shape
  dtype, factor, tile = q.dtype, scale * LOG2E, (ROWS, w)

  def body(q_ref, k_ref, v_ref, begin, limit, whole, order, o_ref, lse_ref, *s):
    q_smem2, k_smem, v_smem, lse_smem2, q_full2, kv_full = s
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    # The longest lists of all lanes first: what starts last is short.
    lane = rem(item, lanes)
    block = order[lane, div(item, lanes)]
    first = begin[lane, block] + wg
    mine = div(begin[lane, block + 1] - first + GROUPS - 1, GROUPS)

    @pl.when(begin[lane, block + 1] > begin[lane, block])
    def _():
      @pl.when(wg == 0)
      def _():
        for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
          plgpu.copy_gmem_to_smem(ref.at[lane, block], smem, kv_full)

      def slot_of(i):
        return wg * STAGES + rem(i, STAGES)

      def place_of(i):
        return pl.ds((first + i * GROUPS) * ROWS, ROWS)

      def fetch(i):
        rows = q_ref.at[lane, place_of(i)]
        slot = slot_of(i)
        plgpu.copy_gmem_to_smem(rows, q_smem2.at[slot], q_full2.at[slot])

      @pl.when(mine > 0)
      def _():
        fetch(jnp.int32(0))
        plgpu.barrier_wait(kv_full)

      @pl.loop(0, mine)
      def _(i):
        @pl.when(i + 1 < mine)
        def _():
          # What left through that buffer has been read.
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          fetch(i + 1)

        slot, places_i = slot_of(i), place_of(i)
        q_smem, lse_smem = q_smem2.at[slot], lse_smem2.at[slot]
        plgpu.barrier_wait(q_full2.at[slot])
        x = product(
          tile, lambda acc: wgmma(acc, q_smem, k_smem.transpose((1, 0)))
        )

        def seen():
          key = plgpu.broadcasted_iota(
            jnp.int32, tile, 1, layout=plgpu.Layout.WGMMA
          )
          sees = plgpu.load(
            limit.at[lane, places_i],
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
          )
          return key < spread(sees, tile, 0)

        # A tile is partial, "before step 1", if not all see the whole block.
        step = whole[lane, first + i * GROUPS]
        x = where_partial(1, step, x, -jnp.inf, seen)
        top = x.max(axis=1) * factor
        safe = jnp.where(top == -jnp.inf, 0.0, top)
        p = jnp.exp2(x * factor - spread(safe, tile, 0))
        denominator = p.sum(axis=1)
        low = p.astype(dtype)
        acc = product((ROWS, d), lambda acc: wgmma(acc, low, v_smem))
        inverse = jnp.where(denominator == 0, 0.0, 1 / denominator)
        q_smem[...] = (acc * spread(inverse, acc.shape, 0)).astype(dtype)
        lse = safe * (1 / LOG2E) + jnp.log(denominator)
        lse_smem[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, o_ref.at[lane, places_i])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[lane, places_i])

      plgpu.wait_smem_to_gmem(0)

  slots = GROUPS * STAGES
  return launch(
    body,
    (q, k, v, *lists),
    out_type=(
      jax.ShapeDtypeStruct(q.shape, dtype),
      jax.ShapeDtypeStruct((lanes, places), jnp.float32),
    ),
    scratch=(
      tiled((slots, ROWS, d), dtype),
      tiled((w, d), dtype),
      tiled((w, d), dtype),
      plgpu.SMEM((slots, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=slots),
      plgpu.Barrier(num_arrivals=2),
    ),
    items=lanes * g,
    threads=GROUPS,
    name="moba_forward",
  )
