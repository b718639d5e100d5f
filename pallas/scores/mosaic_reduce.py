"""Reduced scores for sm_90 in Pallas Mosaic GPU.

A warpgroup keeps 64 rows and walks along tiles of columns. Of each group of
columns every row leaves one number; the probabilities never leave registers.
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
from isthmus.pallas.scores.api import Options as Options
from isthmus.pallas.scores.api import offset

LOG2E = math.log2(math.e)
#: Columns of a tile, and tiles in flight.
TILE, STAGES = 128, 2


@functools.partial(jax.jit, static_argnames=("lengths", "options"))
def reduce_tiles(x, y, lse, *, lengths, options):
  """As `ref.reduce_scores`, of padded arrays.

  Where rows are queries, groups of columns that a causal mask hides from all
  of a row's tile are left as they were.

  Args:
    x: [b r h d]; r is a multiple of ROWS, d of 64.
    y: [b c g d]; c is a multiple of TILE.
    lse: float32 [b n s], of the padded queries, to base 2; inf for none.
    lengths: (rows, columns) that count.
    options: an `Options`; side is a multiple of 8.

  Returns:
    float32 [b n c / side r].

  Example:
    >>> shape = jax.ShapeDtypeStruct
    >>> x = shape((1, 128, 2, 64), "bfloat16")
    >>> lse = shape((1, 2, 128), "float32")
    >>> run = functools.partial(
    ...   reduce_tiles, lengths=(100, 100), options=Options(side=32)
    ... )
    >>> jax.eval_shape(run, x, x, lse).shape
    (1, 2, 4, 128)
  """
  (b, r, h, d), (c, g) = x.shape, y.shape[1:3]
  n, side = max(h, g), options.side
  groups, tiles, steps = TILE // side, r // ROWS, c // TILE
  by_row, tile = options.queries == "rows", (ROWS, side)
  shift = offset(*lengths, options)
  factor, layout = options.scale * LOG2E, plgpu.Layout.WGMMA
  iota = functools.partial(
    plgpu.broadcasted_iota, jnp.int32, tile, layout=layout
  )
  load = functools.partial(plgpu.load, optimized=False)

  def body(x_ref, y_ref, lse_ref, o_ref, x_smem, y_smem2, o_smem2, *barriers):
    x_full, y_full = barriers
    item = lax.axis_index("item")
    # Where rows see all before them, the last ones have most to do.
    index = tiles - 1 - div(item, b * n)
    batch, head = div(rem(item, b * n), n), rem(item, n)
    rows = pl.ds(index * ROWS, ROWS)
    total = jnp.int32(steps)
    if options.causal and by_row:
      last = index * ROWS + ROWS - 1 + shift
      total = jnp.clip(div(jnp.maximum(last, -1) + TILE, TILE), 0, steps)

    def fetch(step):
      slot, columns = rem(step, STAGES), pl.ds(step * TILE, TILE)
      source = y_ref.at[batch, columns, div(head, n // g)]
      plgpu.copy_gmem_to_smem(source, y_smem2.at[slot], y_full.at[slot])

    source = x_ref.at[batch, rows, div(head, n // h)]
    plgpu.copy_gmem_to_smem(source, x_smem, x_full)
    pl.when(total > 0)(lambda: fetch(jnp.int32(0)))
    own = None
    if by_row:
      own = load(lse_ref.at[batch, head, rows], layout=layout.reduce(1))
      own = spread(own, tile, 0)
    plgpu.barrier_wait(x_full)

    @pl.loop(0, total)
    def _(step):
      pl.when(step + 1 < total)(lambda: fetch(step + 1))
      slot = rem(step, STAGES)
      plgpu.barrier_wait(y_full.at[slot])
      o_smem = o_smem2.at[slot]
      # The numbers of two steps before have been read.
      plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
      for group in range(groups):
        y_smem = y_smem2.at[slot, pl.ds(group * side, side)]
        first = step * TILE + group * side
        p = product(tile, lambda acc, y=y_smem: wgmma(acc, x_smem, y.T))
        if by_row:
          base = own
        else:
          base = load(
            lse_ref.at[batch, head, pl.ds(first, side)],
            layout=layout.reduce(0),
          )
          base = spread(base, tile, 1)
        p = jnp.exp2(p * factor - base)
        row, column = iota(0) + index * ROWS, iota(1) + first
        seen = column < lengths[1]
        if options.causal:
          key, query = (column, row) if by_row else (row, column)
          seen = seen & (key <= query + shift)
        p = jnp.where(seen, p, 0.0)
        found = p.max(axis=1) if options.reduce == "max" else p.sum(axis=1)
        o_smem.at[group][...] = found
      plgpu.commit_smem()
      target = o_ref.at[batch, head, pl.ds(step * groups, groups), rows]
      plgpu.copy_smem_to_gmem(o_smem, target)

    plgpu.wait_smem_to_gmem(0)

  (found,) = launch(
    body,
    (x, y, lse),
    out_type=(jax.ShapeDtypeStruct((b, n, c // side, r), jnp.float32),),
    scratch=(
      tiled((ROWS, d), x.dtype),
      tiled((STAGES, TILE, d), x.dtype),
      plgpu.SMEM((STAGES, groups, ROWS), jnp.float32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=STAGES),
    ),
    items=b * n * tiles,
    threads=1,
    name="reduce_scores",
  )
  return found
