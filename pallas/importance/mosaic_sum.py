"""Importance for sm_90 in Pallas Mosaic GPU.

Warpgroups keep one tile of queries, and walk along keys, of which another
warpgroup brings in tiles; each key leaves a number. The probabilities never
leave registers.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas import hopper
from isthmus.pallas.flash.tile import (
  ROWS,
  div,
  drain,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.importance.api import Options as Options

LOG2E = math.log2(math.e)
#: Queries of a tile, and tiles of keys in flight for each warpgroup.
TILE, STAGES = 128, 2


@functools.partial(jax.jit, static_argnames=("lengths", "options"))
def sum_tiles(q, k, lse, *, lengths, options):
  """As `ref.importance`, of padded arrays, of each tile of queries.

  Args:
    q: [b t n d]; t is a multiple of TILE, d of 64.
    k: [b s k d]; s is a multiple of ROWS.
    lse: float32 [b n t], to base 2; inf for none.
    lengths: (queries, keys) that count.
    options: an `Options`.

  Returns:
    float32 [b n t / TILE s].

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    >>> lse = jax.ShapeDtypeStruct((1, 2, 128), "float32")
    >>> run = functools.partial(
    ...   sum_tiles, lengths=(100, 100), options=Options()
    ... )
    >>> jax.eval_shape(run, x, x, lse).shape
    (1, 2, 1, 128)
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  tiles, steps, tile = t // TILE, s // ROWS, (ROWS, TILE)
  workers = 3 if d <= 128 else 2
  slots, factor = workers * STAGES, options.scale * LOG2E
  parts = hopper.walks(b * n * tiles * steps, steps)
  reach = -(-steps // parts)
  shift = lengths[1] - lengths[0]
  columns = plgpu.Layout.WGMMA.reduce(0)
  registers = hopper.registers(workers, hopper.FEW)

  def body(q_ref, k_ref, lse_ref, o_ref, q_smem, k_smem, o_smem3, *rest):
    q_full, k_full, k_free = rest
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    # Heads that read the same keys are neighbours.
    head, rest = rem(item, n), div(item, n)
    queries, rest = rem(rest, tiles), div(rest, tiles)
    begin, batch = rem(rest, parts) * reach, div(rest, parts)
    total = jnp.clip(steps - begin, 0, reach)
    first = queries * TILE
    span = pl.ds(first, TILE)

    @pl.when(wg < workers)
    def _compute():
      plgpu.set_max_registers(registers, action="increase")
      base = lse_ref.at[batch, head, span]
      base = spread(plgpu.load(base, layout=columns, optimized=False), tile, 1)
      plgpu.barrier_wait(q_full)

      @pl.loop(0, div(jnp.maximum(total - wg, 0) + (workers - 1), workers))
      def _(turn):
        slot = rem(turn, STAGES) * workers + wg
        start = (begin + turn * workers + wg) * ROWS
        plgpu.barrier_wait(k_full.at[slot])
        keys = k_smem.at[slot]
        p = product(tile, lambda acc: wgmma(acc, keys, q_smem.T))
        plgpu.barrier_arrive(k_free.at[slot])
        p = jnp.exp2(p * factor - base)
        if options.causal:
          iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, tile, layout=plgpu.Layout.WGMMA
          )
          p = jnp.where(iota(0) + start <= iota(1) + first + shift, p, 0.0)
        o_smem = o_smem3.at[wg, rem(turn, 2)]
        # The numbers of two turns before have been read.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        o_smem[...] = p.sum(axis=1)
        plgpu.commit_smem()
        target = o_ref.at[batch, head, queries, pl.ds(start, ROWS)]
        plgpu.copy_smem_to_gmem(o_smem, target)

      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _load():
      plgpu.set_max_registers(hopper.FEW, action="decrease")
      plgpu.copy_gmem_to_smem(q_ref.at[batch, span, head], q_smem, q_full)

      @pl.loop(0, total)
      def _(step):
        slot, keys = rem(step, slots), pl.ds((begin + step) * ROWS, ROWS)
        pl.when(step >= slots)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        source = k_ref.at[batch, keys, div(head, n // heads)]
        plgpu.copy_gmem_to_smem(source, k_smem.at[slot], k_full.at[slot])

      drain(total, slots, k_free)

  (found,) = launch(
    body,
    (q, k, lse),
    out_type=(jax.ShapeDtypeStruct((b, n, tiles, s), jnp.float32),),
    scratch=(
      tiled((TILE, d), q.dtype),
      tiled((slots, ROWS, d), k.dtype),
      plgpu.SMEM((workers, 2, ROWS), jnp.float32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=slots),
      plgpu.Barrier(num_barriers=slots),
    ),
    items=b * n * tiles * parts,
    threads=workers + 1,
    name="importance",
  )
  return found
