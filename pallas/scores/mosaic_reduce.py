"""Reduced logits for sm_90 in Pallas Mosaic GPU.

A tile of queries is kept by four warpgroups, and a fifth brings in tiles of
keys: two take those of even number, 64 queries each, and two the others. Of a
tile each query leaves a number for every group of its keys; of all tiles that
a warpgroup has met, the logarithm of a sum, which are put together afterwards.
So a long walk can be cut anywhere.
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
  filled,
  launch,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.scores.api import Options as Options

LOG2E = math.log2(math.e)
#: Queries and keys of a tile, and keys of a walk.
TILE, REACH = 128, 4096
#: Warpgroups that share a tile of keys, and that take turns at tiles.
GROUPS, TURNS = 2, 2
#: Registers of a thread that only loads, and of all threads of a CTA.
FEW, ALL = 24, 65536


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
    float32 [b n s / side t]; and the lse of each turn of a walk,
    [b n walks TURNS t].

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    >>> run = functools.partial(
    ...   reduce_tiles, lengths=(100, 100), options=Options(side=32)
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x, x)]
    [(1, 2, 4, 128), (1, 2, 1, 2, 128)]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  side, factor = options.side, options.scale * LOG2E
  tiles, steps, reach = t // TILE, s // TILE, REACH // TILE
  walks, per = -(-steps // reach), TILE // side
  # A slot is of even or of odd tiles only.
  stages = 2 * TURNS if d <= 128 else TURNS
  shift, tile, workers = lengths[1] - lengths[0], (ROWS, TILE), GROUPS * TURNS
  registers = ALL // (128 * (workers + 1)) // 8 * 8 * (workers + 1) - FEW
  registers = registers // workers // 8 * 8

  def body(q_ref, k_ref, o_ref, lse_ref, q_smem2, k_smem, o_smem3, *rest):
    lse_smem2, q_full, k_full, k_free = rest
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    # Heads that read the same keys are neighbours. Where queries see all
    # before them, the last ones have most to do.
    head, item = rem(item, n), div(item, n)
    walk, item = rem(item, walks), div(item, walks)
    batch, row = rem(item, b), tiles - 1 - div(item, b)
    begin, end = walk * reach, jnp.int32(steps)
    if options.causal:
      last = row * TILE + TILE - 1 + shift
      end = jnp.clip(div(jnp.maximum(last, -1) + TILE, TILE), 0, steps)
    total = jnp.clip(end - begin, 0, reach)

    @pl.when((wg < workers) & (total > 0))
    def _compute():
      plgpu.set_max_registers(registers, action="increase")
      half, turn = rem(wg, GROUPS), div(wg, GROUPS)
      base = row * TILE + half * ROWS
      rows, q_smem = pl.ds(base, ROWS), q_smem2.at[half]

      @pl.when(turn == 0)
      def _():
        source = q_ref.at[batch, rows, head]
        plgpu.copy_gmem_to_smem(source, q_smem, q_full.at[half])

      plgpu.barrier_wait(q_full.at[half])

      def meet(i, carry):
        step = i * TURNS + turn
        slot = rem(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        keys = k_smem.at[slot].transpose((1, 0))
        x = product(tile, lambda acc: wgmma(acc, q_smem, keys))
        plgpu.barrier_arrive(k_free.at[slot])
        start = base, (begin + step) * TILE
        x = _visible(x * factor, start, lengths, options)
        numbers, carry = _reduced(x, *carry, options)
        o_smem = o_smem3.at[wg, rem(i, 2)]
        # The numbers of two tiles before have been read.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for j, number in enumerate(numbers):
          o_smem.at[j][...] = number * (1 / LOG2E)
        plgpu.commit_smem()
        groups = pl.ds((begin + step) * per, per)
        plgpu.copy_smem_to_gmem(o_smem, o_ref.at[batch, head, groups, rows])
        return carry

      start = filled((ROWS,), -jnp.inf), filled((ROWS,), 0.0)
      count = div(total + TURNS - 1 - turn, TURNS)
      top, denominator = lax.fori_loop(0, count, meet, start)
      safe = jnp.where(top == -jnp.inf, 0.0, top)
      lse_smem2.at[wg][...] = safe * (1 / LOG2E) + jnp.log(denominator)
      plgpu.commit_smem()
      target = lse_ref.at[batch, head, walk, turn, rows]
      plgpu.copy_smem_to_gmem(lse_smem2.at[wg], target)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _load():
      plgpu.set_max_registers(FEW, action="decrease")

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
    out_type=(
      jax.ShapeDtypeStruct((b, n, steps * per, t), jnp.float32),
      jax.ShapeDtypeStruct((b, n, walks, TURNS, t), jnp.float32),
    ),
    scratch=(
      tiled((GROUPS, ROWS, d), q.dtype),
      tiled((stages, TILE, d), k.dtype),
      plgpu.SMEM((workers, 2, per, ROWS), jnp.float32),
      plgpu.SMEM((workers, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=GROUPS),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ),
    items=b * n * tiles * walks,
    threads=workers + 1,
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


def _reduced(x, top, denominator, options):
  """A tile's numbers, and what is carried, with it; to base 2."""
  side = options.side
  parts = [x[:, i : i + side] for i in range(0, TILE, side)]
  numbers = [part.max(axis=1) for part in parts]
  if options.reduce == "sum":
    numbers = [_lse(*each) for each in zip(parts, numbers, strict=True)]
  new = functools.reduce(jnp.maximum, numbers, top)
  # A row that has seen no key yet stays at -inf.
  safe = jnp.where(new == -jnp.inf, 0.0, new)
  denominator = denominator * jnp.exp2(top - safe)
  if options.reduce == "sum":
    for number in numbers:
      denominator = denominator + jnp.exp2(number - safe)
  else:
    denominator += jnp.exp2(x - spread(safe, x.shape, 0)).sum(axis=1)
  return numbers, (new, denominator)


def _lse(x, top):
  safe = jnp.where(top == -jnp.inf, 0.0, top)
  total = jnp.exp2(x - spread(safe, x.shape, 0)).sum(axis=1)
  return safe + jnp.log(total) * LOG2E
