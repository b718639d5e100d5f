"""Reduced logits for sm_90 in Pallas Mosaic GPU.

Two warpgroups own 64 queries each and share the tiles of keys that a third
brings in. A tile leaves a number for each query and group of its keys, and
nothing is carried from one to the next: sums are told as logarithms, each from
its own largest logit, and are put together afterwards. So a long walk can be
cut anywhere.
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
  drain,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.scores.api import Options as Options

LOG2E = math.log2(math.e)
#: Queries and keys of a tile, warpgroups of its queries, and keys of a walk.
TILE, GROUPS, REACH = 128, 2, 4096


@functools.partial(jax.jit, static_argnames=("lengths", "options"))
def reduce_tiles(q, k, *, lengths, options):
  """What `ref.reduce_logits` reduces, of padded arrays.

  Groups of keys in tiles that a causal mask hides from all of a tile's queries
  are left as they were.

  Args:
    q: [b t n d]; t is a multiple of TILE, d of 64.
    k: [b s k d]; s is a multiple of TILE.
    lengths: (queries, keys) that count.
    options: an `Options`; side is a multiple of 8.

  Returns:
    float32 [b n s / side t]; and, of "max", the lse of each tile of keys,
    [b n s / TILE t].

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    >>> run = functools.partial(
    ...   reduce_tiles, lengths=(100, 100), options=Options(side=32)
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x, x)]
    [(1, 2, 4, 128), (1, 2, 1, 128)]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  side, factor = options.side, options.scale * LOG2E
  tiles, steps, reach = t // TILE, s // TILE, REACH // TILE
  pieces, stages = -(-steps // reach), 3 if d <= 128 else 2
  shift, tile = lengths[1] - lengths[0], (ROWS, TILE)
  # Numbers that a query leaves of a tile, in each output.
  sizes = (TILE // side, 1) if options.reduce == "max" else (TILE // side,)

  def body(q_ref, k_ref, *refs):
    o_refs, (q_smem2, k_smem), smems, barriers = (
      refs[: len(sizes)],
      refs[len(sizes) : len(sizes) + 2],
      refs[len(sizes) + 2 : -3],
      refs[-3:],
    )
    q_full, k_full, k_free = barriers
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    # Where queries see all before them, the last ones have most to do. Heads
    # that read the same keys are neighbours.
    head, rest = rem(item, n), div(item, n)
    begin, rest = rem(rest, pieces) * reach, div(rest, pieces)
    batch, row = rem(rest, b), tiles - 1 - div(rest, b)
    end = jnp.int32(steps)
    if options.causal:
      last = row * TILE + TILE - 1 + shift
      end = jnp.clip(div(jnp.maximum(last, -1) + TILE, TILE), 0, steps)
    total = jnp.clip(end - begin, 0, reach)

    @pl.when((wg < GROUPS) & (total > 0))
    def _compute():
      base = row * TILE + wg * ROWS
      rows, q_smem = pl.ds(base, ROWS), q_smem2.at[wg]
      plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, q_full.at[wg])
      plgpu.barrier_wait(q_full.at[wg])

      @pl.loop(0, total)
      def _(step):
        slot = rem(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        keys = k_smem.at[slot].transpose((1, 0))
        x = product(tile, lambda acc: wgmma(acc, q_smem, keys))
        plgpu.barrier_arrive(k_free.at[slot])
        start = base, (begin + step) * TILE
        x = _visible(x * factor, start, lengths, options)
        found = _reduced(x, options)
        # The numbers of two steps before have been read.
        plgpu.wait_smem_to_gmem(len(sizes), wait_read_only=True)
        turn = rem(step, 2)
        for numbers, smem in zip(found, smems, strict=True):
          for i, number in enumerate(numbers):
            smem.at[wg, turn, i][...] = number * (1 / LOG2E)
        plgpu.commit_smem()
        for size, smem, o_ref in zip(sizes, smems, o_refs, strict=True):
          groups = pl.ds((begin + step) * size, size)
          target = o_ref.at[batch, head, groups, rows]
          plgpu.copy_smem_to_gmem(smem.at[wg, turn], target)

      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _load():
      @pl.loop(0, total)
      def _(step):
        slot = rem(step, stages)
        keys = pl.ds((begin + step) * TILE, TILE)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        source = k_ref.at[batch, keys, div(head, n // heads)]
        plgpu.copy_gmem_to_smem(source, k_smem.at[slot], k_full.at[slot])

      drain(total, stages, k_free)

  return launch(
    body,
    (q, k),
    out_type=tuple(
      jax.ShapeDtypeStruct((b, n, steps * size, t), jnp.float32)
      for size in sizes
    ),
    scratch=(
      tiled((GROUPS, ROWS, d), q.dtype),
      tiled((stages, TILE, d), k.dtype),
      *(plgpu.SMEM((GROUPS, 2, size, ROWS), jnp.float32) for size in sizes),
      plgpu.Barrier(num_barriers=GROUPS),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ),
    items=b * n * tiles * pieces,
    threads=GROUPS + 1,
    name="reduce_logits",
  )


def _visible(x, start, lengths, options):
  """A tile that starts at (query, key), -inf where no key is seen."""
  row, column = start

  def mask(x):
    iota = functools.partial(
      plgpu.broadcasted_iota, jnp.int32, x.shape, layout=plgpu.Layout.WGMMA
    )
    i, j = iota(0) + row, iota(1) + column
    seen = j < lengths[1]
    if options.causal:
      seen = seen & (j <= i + (lengths[1] - lengths[0]))
    return jnp.where(seen, x, -jnp.inf)

  edge = column + TILE > lengths[1]
  if options.causal:
    edge = edge | (column + TILE - 1 > row + (lengths[1] - lengths[0]))
  return lax.cond(edge, mask, lambda x: x, x)


def _reduced(x, options):
  """The numbers of a tile's groups, and of "max" also its lse, to base 2."""
  side = options.side
  parts = [x[:, i : i + side] for i in range(0, TILE, side)]
  tops = [part.max(axis=1) for part in parts]
  if options.reduce == "sum":
    return ([_lse(*each) for each in zip(parts, tops, strict=True)],)
  return tops, [_lse(x, functools.reduce(jnp.maximum, tops))]


def _lse(x, top):
  safe = jnp.where(top == -jnp.inf, 0.0, top)
  total = jnp.exp2(x - spread(safe, x.shape, 0)).sum(axis=1)
  return safe + jnp.log(total) * LOG2E
