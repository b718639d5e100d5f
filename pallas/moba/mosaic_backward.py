"""The gradient of `mosaic_forward` for sm_90, in one pass of five products.

A CTA keeps the keys and values of one block, and sums their gradients, while
the tiles of rows that chose it pass by. Its warpgroups own 64 keys each; what
they find of `dx = p (dp - delta)` meets in shared memory, and they take turns
at the product that gives a tile's rows their dq. Nothing is added to memory
that another CTA adds to: each place gets the dq of its one block.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.flash.tile import (
  ROWS,
  accumulate,
  div,
  drain,
  filled,
  launch,
  product,
  products,
  rem,
  spread,
  tiled,
  wgmma,
)

LOG2E = math.log2(math.e)
#: Tiles in flight.
STAGES = 2


def backward(q, do, k, v, lse, delta, lists, *, scale):
  """(dq, dk, dv) of rows in places, and of blocks.

  Args:
    q, do: [l p d], rows in places, 0 where there is none; d is a multiple of
      64.
    k, v: [l g w d], blocks; w is a multiple of 64.
    lse: float32 [l p], of all that the row reads, to base 2; inf for none.
    delta: float32 [l p], `rowsum(do o) - dlse`.
    lists: `BlockTiles` of ROWS places.
    scale: of the logits.

  Returns:
    dq [l p d] of q's dtype, each place's share, not yet times `scale`;
    dk, dv [l g w d] of k's dtype.

  Example:
    >>> from isthmus.pallas.moba.places import BlockTiles
    >>> shape = jax.ShapeDtypeStruct
    >>> q = shape((1, 128, 64), "bfloat16")
    >>> k, row = shape((1, 1, 64, 64), "bfloat16"), shape((1, 128), "float32")
    >>> tiles, limit = shape((1, 2), "int32"), shape((1, 128), "int32")
    >>> lists = BlockTiles(tiles, limit, tiles, shape((1, 1), "int32"))
    >>> run = functools.partial(backward, scale=1.0)
    >>> [x.shape for x in jax.eval_shape(run, q, q, k, k, row, row, lists)]
    [(1, 128, 64), (1, 1, 64, 64), (1, 1, 64, 64)]
  """
  (lanes, _, d), (_, g, w, _) = q.shape, k.shape
  dtype, factor, tile = q.dtype, scale * LOG2E, (ROWS, ROWS)
  groups = w // ROWS

  def body(q_ref, do_ref, k_ref, v_ref, lse_ref, delta_ref, *rest):
    begin, limit, whole, order, dq_ref, dk_ref, dv_ref, *rest = rest
    k_smem2, v_smem2, q_smem2, do_smem2, dx_smem2, dq_smem2, *rest = rest
    lse_smem2, delta_smem2, *barriers = rest
    kv_full, q_full, do_full, q_free, do_free, dx_full = barriers
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    lane = rem(item, lanes)
    block = order[lane, div(item, lanes)]
    first = begin[lane, block]
    total = begin[lane, block + 1] - first

    def places_of(i):
      return pl.ds((first + i) * ROWS, ROWS)

    @pl.when(wg < groups)
    def _compute():
      plgpu.set_max_registers(240, action="increase")
      k_smem, v_smem, dq_smem = (x.at[wg] for x in (k_smem2, v_smem2, dq_smem2))
      keys = (lane, block, pl.ds(wg * ROWS, ROWS))
      for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
        plgpu.copy_gmem_to_smem(ref.at[keys], smem, kv_full.at[wg])
      plgpu.barrier_wait(kv_full.at[wg])
      along = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(0))

      def step_of(i, carry):
        dk, dv = carry
        slot, half = rem(i, STAGES), rem(i, 2)
        q_smem, do_smem = q_smem2.at[slot], do_smem2.at[slot]
        dx_smem = dx_smem2.at[half]
        plgpu.barrier_wait(q_full.at[slot])
        plgpu.barrier_wait(do_full.at[slot])
        lse = along(lse_smem2.at[slot])

        def weights(x):
          p = jnp.exp2(x * factor - spread(lse, tile, 1))

          def masked(p):
            key = plgpu.broadcasted_iota(
              jnp.int32, tile, 0, layout=plgpu.Layout.WGMMA
            )
            sees = along(limit.at[lane, places_of(i)], optimized=False)
            seen = key + wg * ROWS < spread(sees, tile, 1)
            return jnp.where(seen, p, 0.0)

          partial = whole[lane, first + i] < 1
          return lax.cond(partial, masked, lambda p: p, p)

        p, dp = products(
          tile,
          lambda acc: wgmma(acc, k_smem, q_smem.transpose((1, 0))),
          weights,
          tile,
          lambda acc: wgmma(acc, v_smem, do_smem.transpose((1, 0))),
        )
        low = p.astype(dtype)
        dv = accumulate(dv, lambda acc: wgmma(acc, low, do_smem))
        plgpu.barrier_arrive(do_free.at[slot])
        dx = p * (dp - spread(along(delta_smem2.at[slot]), tile, 1))
        dx = dx.astype(dtype)
        # Two buffers, for a warpgroup may be a step ahead of another.
        dx_smem.at[wg][...] = dx
        plgpu.commit_smem()
        plgpu.barrier_arrive(dx_full)
        dk = accumulate(dk, lambda acc: wgmma(acc, dx, q_smem))
        plgpu.barrier_arrive(q_free.at[slot])
        plgpu.barrier_wait(dx_full)

        @pl.when(wg == rem(i, groups))
        def _():
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)

          def multiply(acc):
            for part in range(groups):
              turned = dx_smem.at[part].transpose((1, 0))
              wgmma(acc, turned, k_smem2.at[part])

          dq = product((ROWS, d), multiply)
          dq_smem[...] = dq.astype(dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(dq_smem, dq_ref.at[lane, places_of(i)])

        return dk, dv

      zero = filled((ROWS, d), 0.0)
      dk, dv = lax.fori_loop(0, total, step_of, (zero, zero))
      plgpu.wait_smem_to_gmem(0)
      # Its own values and its tile of dq are read by none but itself.
      for x, smem, ref in ((dk * scale, dq_smem, dk_ref), (dv, v_smem, dv_ref)):
        smem[...] = x.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref.at[keys])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == groups)
    def _load():
      plgpu.set_max_registers(24, action="decrease")

      @pl.loop(0, total)
      def _(i):
        slot, rows = rem(i, STAGES), (lane, places_of(i))
        for ref, smem, stat_ref, stat_smem, full, free in (
          (q_ref, q_smem2, lse_ref, lse_smem2, q_full, q_free),
          (do_ref, do_smem2, delta_ref, delta_smem2, do_full, do_free),
        ):
          later, gate = i >= STAGES, free.at[slot]
          pl.when(later)(functools.partial(plgpu.barrier_wait, gate))
          gate = full.at[slot]
          plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[slot], gate)
          plgpu.copy_gmem_to_smem(stat_ref.at[rows], stat_smem.at[slot], gate)

      drain(total, STAGES, q_free, do_free)

  keys = jax.ShapeDtypeStruct(k.shape, k.dtype)
  return launch(
    body,
    (q, do, k, v, lse, delta, *lists),
    out_type=(jax.ShapeDtypeStruct(q.shape, dtype), keys, keys),
    scratch=(
      tiled((groups, ROWS, d), dtype),
      tiled((groups, ROWS, d), dtype),
      tiled((STAGES, ROWS, d), dtype),
      tiled((STAGES, ROWS, d), dtype),
      tiled((2, groups, ROWS, ROWS), dtype),
      tiled((groups, ROWS, d), dtype),
      plgpu.SMEM((STAGES, ROWS), jnp.float32),
      plgpu.SMEM((STAGES, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=groups),
      plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
      plgpu.Barrier(num_arrivals=groups),
    ),
    items=lanes * g,
    threads=groups + 1,
    name="moba_backward",
  )
