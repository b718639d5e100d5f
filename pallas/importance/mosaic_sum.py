"""Importance for sm_90 in Pallas Mosaic GPU.

A warpgroup keeps a tile of queries, and walks along keys; each key leaves a
number. The probabilities never leave registers.
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
  div,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.importance.api import Options as Options

LOG2E = math.log2(math.e)
#: Queries of a tile, tiles of keys in flight, and tiles of keys of a walk.
TILE, STAGES, REACH = 128, 2, 16


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
  parts, factor = -(-steps // REACH), options.scale * LOG2E
  shift = lengths[1] - lengths[0]
  columns = plgpu.Layout.WGMMA.reduce(0)

  def body(q_ref, k_ref, lse_ref, o_ref, q_smem, k_smem2, o_smem2, *barriers):
    q_full, k_full = barriers
    item = lax.axis_index("item")
    # Heads that read the same keys are neighbours.
    head, rest = rem(item, n), div(item, n)
    queries, rest = rem(rest, tiles), div(rest, tiles)
    begin, batch = rem(rest, parts) * REACH, div(rest, parts)
    total = jnp.minimum(steps - begin, REACH)
    first = queries * TILE
    span = pl.ds(first, TILE)

    def fetch(step):
      slot, keys = rem(step, STAGES), pl.ds((begin + step) * ROWS, ROWS)
      source = k_ref.at[batch, keys, div(head, n // heads)]
      plgpu.copy_gmem_to_smem(source, k_smem2.at[slot], k_full.at[slot])

    plgpu.copy_gmem_to_smem(q_ref.at[batch, span, head], q_smem, q_full)
    fetch(jnp.int32(0))
    base = lse_ref.at[batch, head, span]
    base = spread(plgpu.load(base, layout=columns, optimized=False), tile, 1)
    plgpu.barrier_wait(q_full)

    @pl.loop(0, total)
    def _(step):
      pl.when(step + 1 < total)(lambda: fetch(step + 1))
      slot = rem(step, STAGES)
      plgpu.barrier_wait(k_full.at[slot])
      keys = k_smem2.at[slot]
      p = product(tile, lambda acc: wgmma(acc, keys, q_smem.T))
      p = jnp.exp2(p * factor - base)
      if options.causal:
        iota = functools.partial(
          plgpu.broadcasted_iota, jnp.int32, tile, layout=plgpu.Layout.WGMMA
        )
        key = iota(0) + (begin + step) * ROWS
        p = jnp.where(key <= iota(1) + first + shift, p, 0.0)
      # The numbers of two steps before have been read.
      plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
      o_smem2.at[slot][...] = p.sum(axis=1)
      plgpu.commit_smem()
      target = o_ref.at[
        batch, head, queries, pl.ds((begin + step) * ROWS, ROWS)
      ]
      plgpu.copy_smem_to_gmem(o_smem2.at[slot], target)

    plgpu.wait_smem_to_gmem(0)

  (found,) = launch(
    body,
    (q, k, lse),
    out_type=(jax.ShapeDtypeStruct((b, n, tiles, s), jnp.float32),),
    scratch=(
      tiled((TILE, d), q.dtype),
      tiled((STAGES, ROWS, d), k.dtype),
      plgpu.SMEM((STAGES, ROWS), jnp.float32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=STAGES),
    ),
    items=b * n * tiles * parts,
    threads=1,
    name="importance",
  )
  return found
