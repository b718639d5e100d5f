"""Reduced logits for sm_90 in Pallas Mosaic GPU.

Four warpgroups own 64 queries each, of heads that read the same keys, and a
fifth brings in tiles of these. Of a tile each query leaves a number for every
group of its keys; of all tiles of a walk, the logarithm of a sum, which are put
together afterwards. So a long walk can be cut anywhere. The fifth may pool
blocks of other tokens meanwhile.
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
  filled,
  product,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.pool.mosaic_beside import (
  SOME,
  Pooling,
  beside,
  launch_beside,
)
from isthmus.pallas.scores.api import Options as Options

LOG2E = math.log2(math.e)
#: Keys of a tile.
TILE = 128


@functools.partial(jax.jit, static_argnames=("lengths", "options"))
def reduce_tiles(q, k, tokens=None, *, lengths, options):
  """What `ref.reduce_logits` reduces, of padded arrays.

  Groups of tiles that a causal mask hides from all queries that are side by
  side are left as they were.

  Args:
    q: [b t n d]; t is a multiple of ROWS, d of 64.
    k: [b s k d]; s is a multiple of TILE.
    tokens: whose whole blocks are pooled meanwhile, as `Pooling` takes them,
      or None; only with reduce "none", for lack of memory.
    lengths: (queries, keys) that count.
    options: an `Options`; side is a multiple of 8.

  Returns:
    float32 [b n s / side t], or None if none is wanted; the lse of each walk,
    [b n walks t]; and the means of the blocks, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), "bfloat16")
    >>> run = functools.partial(
    ...   reduce_tiles, lengths=(100, 100), options=Options(side=32)
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x, x) if y]
    [(1, 2, 4, 128), (1, 2, 1, 128)]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  group, steps, per = n // heads, s // TILE, TILE // options.side
  shift, tile = lengths[1] - lengths[0], (ROWS, TILE)
  # Of 64 queries of a head each; heads that read the same keys are neighbours.
  units = t // ROWS * group
  workers = 4 if units > 2 and d <= 128 else 2
  stages = 3 if d <= 128 else 2
  parts = -(-units // workers)
  share = _seen(*lengths) if options.causal else 1
  walks = hopper.walks(b * heads * parts * steps * share, steps)
  reach, items = -(-steps // walks), b * heads * parts * walks
  pooling = None if tokens is None else Pooling(tokens.shape, items)
  few = hopper.FEW if pooling is None else SOME
  registers = hopper.registers(workers, few)
  numbers = options.reduce != "none"

  def body(q_ref, k_ref, *rest):
    o_ref, *rest = rest if numbers else (None, *rest)
    lse_ref, q_smem2, k_smem, lse_smem2, q_full, k_full, k_free, *rest = rest
    o_smem3, pooled = rest if numbers else (None, *rest)
    wg, cta = lax.axis_index("wg"), lax.axis_index("item")
    kv_head, item = rem(cta, heads), div(cta, heads)
    walk, item = rem(item, walks), div(item, walks)
    # Where queries see all before them, the last ones have most to do.
    batch, part = rem(item, b), parts - 1 - div(item, b)
    begin, end = walk * reach, jnp.int32(steps)

    def unit(i):
      """(head, first query) of a worker; the last ones may be the same."""
      found = jnp.minimum(part * workers + i, units - 1)
      return kv_head * group + rem(found, group), div(found, group) * ROWS

    if options.causal:
      last = unit(workers - 1)[1] + ROWS - 1 + shift
      end = jnp.clip(div(jnp.maximum(last, -1) + TILE, TILE), 0, steps)
    total = jnp.clip(end - begin, 0, reach)

    @pl.when(wg < workers)
    def _compute():
      plgpu.set_max_registers(registers, action="increase")
      (head, base), q_smem = unit(wg), q_smem2.at[wg]
      rows = pl.ds(base, ROWS)
      plgpu.copy_gmem_to_smem(
        q_ref.at[batch, rows, head], q_smem, q_full.at[wg]
      )
      plgpu.barrier_wait(q_full.at[wg])

      def meet(step, carry, masked):
        slot = rem(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        keys = k_smem.at[slot].transpose((1, 0))
        x = product(tile, lambda acc: wgmma(acc, q_smem, keys))
        plgpu.barrier_arrive(k_free.at[slot])
        if masked:
          x = _visible(x, (base, (begin + step) * TILE), lengths, options)
        found, carry = _reduced(x, *carry, options)
        if o_ref is None or o_smem3 is None:
          return carry
        o_smem = o_smem3.at[wg, rem(step, 2)]
        # The numbers of two tiles before have been read.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for i, number in enumerate(found):
          o_smem.at[i][...] = number * (1 / LOG2E)
        plgpu.commit_smem()
        groups = pl.ds((begin + step) * per, per)
        plgpu.copy_smem_to_gmem(o_smem, o_ref.at[batch, head, groups, rows])
        return carry

      carry = filled((ROWS,), -jnp.inf), filled((ROWS,), 0.0)
      # Tiles that are seen whole come first, and need no mask.
      whole = lengths[1] // TILE
      if options.causal:
        whole = jnp.minimum(div(jnp.maximum(base + shift + 1, 0), TILE), whole)
      whole = jnp.clip(whole - begin, 0, total)
      for masked, ends in ((False, (0, whole)), (True, (whole, total))):
        carry = lax.fori_loop(
          *ends, functools.partial(meet, masked=masked), carry
        )
      top, denominator = carry
      lse_smem2.at[wg][...] = _finite(top) * (1 / LOG2E) + jnp.log(denominator)
      plgpu.commit_smem()
      target = lse_ref.at[batch, head, walk, rows]
      plgpu.copy_smem_to_gmem(lse_smem2.at[wg], target)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == workers)
    def _load():
      plgpu.set_max_registers(few, action="decrease")

      def fetch(step):
        slot = rem(step, stages)
        keys = pl.ds((begin + step) * TILE, TILE)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        source = k_ref.at[batch, keys, kv_head]
        plgpu.copy_gmem_to_smem(source, k_smem.at[slot], k_full.at[slot])

      beside(pooling, pooled, cta, total, reach, fetch)
      drain(total, stages, k_free)

  found = launch_beside(
    body,
    (q, k),
    tokens,
    pooling,
    out_type=(
      *((jax.ShapeDtypeStruct((b, n, steps * per, t), jnp.float32),) * numbers),
      jax.ShapeDtypeStruct((b, n, walks, t), jnp.float32),
    ),
    scratch=(
      tiled((workers, ROWS, d), q.dtype),
      tiled((stages, TILE, d), k.dtype),
      plgpu.SMEM((workers, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=workers),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
      *((plgpu.SMEM((workers, 2, per, ROWS), jnp.float32),) * numbers),
    ),
    items=items,
    threads=workers + 1,
    name="reduce_logits",
  )
  reduced, *found = found if numbers else (None, *found)
  walks, *means = found
  return reduced, walks, *(means or [None])


def _seen(queries, keys):
  """What part of all pairs a causal mask shows."""
  if queries > keys:
    return keys / (2 * queries)
  return 1 - queries / (2 * keys)


def _visible(x, start, lengths, options):
  """A tile that starts at (query, key), -inf where no key is seen."""
  iota = functools.partial(
    plgpu.broadcasted_iota, jnp.int32, x.shape, layout=plgpu.Layout.WGMMA
  )
  i, j = iota(0) + start[0], iota(1) + start[1]
  seen = j < lengths[1]
  if options.causal:
    seen = seen & (j <= i + (lengths[1] - lengths[0]))
  return jnp.where(seen, x, -jnp.inf)


def _reduced(x, top, denominator, options):
  """A tile's numbers, and what is carried, with it; to base 2.

  Products are scaled where they are subtracted from, in one instruction.
  """
  side, factor = options.side, options.scale * LOG2E

  def sums(x, top):
    return jnp.exp2(x * factor - spread(top, x.shape, 0)).sum(axis=1)

  if options.reduce == "none":
    side = TILE
  parts = [x[:, i : i + side] for i in range(0, TILE, side)]
  numbers = [part.max(axis=1) * factor for part in parts]
  if options.reduce == "sum":
    tops = [_finite(number) for number in numbers]
    numbers = [
      top + jnp.log(sums(*each)) * LOG2E
      for top, *each in zip(tops, parts, tops, strict=True)
    ]
  new = functools.reduce(jnp.maximum, numbers, top)
  safe = _finite(new)
  denominator = denominator * jnp.exp2(top - safe)
  if options.reduce == "sum":
    for number in numbers:
      denominator = denominator + jnp.exp2(number - safe)
  else:
    denominator = denominator + sums(x, safe)
  return numbers, (new, denominator)


def _finite(top):
  """Of a row that has seen no key yet, 0."""
  return jnp.where(top == -jnp.inf, 0.0, top)
