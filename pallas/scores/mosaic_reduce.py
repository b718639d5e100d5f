"""Reduced scores for sm_90 in Pallas Mosaic GPU.

A warpgroup keeps 64 rows and walks along tiles of columns; or, of a few queries
and many keys, one tile of columns, and walks along the rows. Of each group of
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
#: Columns of a tile, tiles in flight, and tiles of rows on a walk along them.
TILE, STAGES, REACH = 128, 2, 16


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
  few = options.queries == "columns" and y.shape[1] == TILE
  kernel = _along_rows if few else _along_columns
  return kernel(x, y, lse, lengths, options)


def _along_columns(x, y, lse, lengths, options):
  (b, r, h, d), (c, g) = x.shape, y.shape[1:3]
  n, side = max(h, g), options.side
  groups, tiles, steps = TILE // side, r // ROWS, c // TILE
  by_row, tile = options.queries == "rows", (ROWS, side)
  shift = offset(*lengths, options)

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
      own = _base(lse_ref.at[batch, head, rows], tile, 0)
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
        base = own
        if not by_row:
          columns = lse_ref.at[batch, head, pl.ds(first, side)]
          base = _base(columns, tile, 1)
        start = index * ROWS, first
        o_smem.at[group][...] = _numbers(p, base, start, lengths, options)
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


def _along_rows(x, y, lse, lengths, options):
  """Of one tile of columns, which stays while rows go by."""
  (b, r, h, d), (c, g) = x.shape, y.shape[1:3]
  n, side, tiles = max(h, g), options.side, r // ROWS
  groups, parts, tile = c // side, -(-tiles // REACH), (ROWS, side)

  def body(x_ref, y_ref, lse_ref, o_ref, x_smem2, y_smem, o_smem2, *barriers):
    x_full, y_full = barriers
    item = lax.axis_index("item")
    # Heads that read the same keys are neighbours.
    begin, head = div(rem(item, parts * n), n) * REACH, rem(item, n)
    batch = div(item, parts * n)
    total = jnp.minimum(tiles - begin, REACH)

    def fetch(step):
      slot, rows = rem(step, STAGES), pl.ds((begin + step) * ROWS, ROWS)
      source = x_ref.at[batch, rows, div(head, n // h)]
      plgpu.copy_gmem_to_smem(source, x_smem2.at[slot], x_full.at[slot])

    source = y_ref.at[batch, pl.ds(0, c), div(head, n // g)]
    plgpu.copy_gmem_to_smem(source, y_smem, y_full)
    fetch(jnp.int32(0))
    bases = [
      _base(lse_ref.at[batch, head, pl.ds(i * side, side)], tile, 1)
      for i in range(groups)
    ]
    plgpu.barrier_wait(y_full)

    @pl.loop(0, total)
    def _(step):
      pl.when(step + 1 < total)(lambda: fetch(step + 1))
      slot = rem(step, STAGES)
      plgpu.barrier_wait(x_full.at[slot])
      x_smem, o_smem = x_smem2.at[slot], o_smem2.at[slot]
      # The numbers of two steps before have been read.
      plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
      first = (begin + step) * ROWS
      for group in range(groups):
        columns = y_smem.at[pl.ds(group * side, side)]
        p = product(tile, lambda acc, y=columns: wgmma(acc, x_smem, y.T))
        start = first, group * side
        o_smem.at[group][...] = _numbers(
          p, bases[group], start, lengths, options
        )
      plgpu.commit_smem()
      target = o_ref.at[batch, head, pl.ds(0, groups), pl.ds(first, ROWS)]
      plgpu.copy_smem_to_gmem(o_smem, target)

    plgpu.wait_smem_to_gmem(0)

  (found,) = launch(
    body,
    (x, y, lse),
    out_type=(jax.ShapeDtypeStruct((b, n, groups, r), jnp.float32),),
    scratch=(
      tiled((STAGES, ROWS, d), x.dtype),
      tiled((c, d), x.dtype),
      plgpu.SMEM((STAGES, groups, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=STAGES),
      plgpu.Barrier(),
    ),
    items=b * n * parts,
    threads=1,
    name="reduce_scores",
  )
  return found


def _base(ref, tile, axis):
  """The lse of each of a tile's rows, for axis 0, or columns."""
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  return spread(plgpu.load(ref, layout=layout, optimized=False), tile, axis)


def _numbers(p, base, start, lengths, options):
  """Of a tile of products that starts at (row, column), a number a row."""
  iota = functools.partial(
    plgpu.broadcasted_iota, jnp.int32, p.shape, layout=plgpu.Layout.WGMMA
  )
  p = jnp.exp2(p * (options.scale * LOG2E) - base)
  row, column = iota(0) + start[0], iota(1) + start[1]
  seen = column < lengths[1]
  if options.causal:
    by_row = options.queries == "rows"
    key, query = (column, row) if by_row else (row, column)
    seen = seen & (key <= query + offset(*lengths, options))
  p = jnp.where(seen, p, 0.0)
  return p.max(axis=1) if options.reduce == "max" else p.sum(axis=1)
