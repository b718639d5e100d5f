"""Forward attention for sm_90 in Pallas Mosaic GPU.

Two or three compute warpgroups own 64 query rows each and share the key tiles
that one more brings in by TMA, reading their indices along the walk. Where
walks are short a CTA takes several, and what the next one begins with is loaded
while the last one ends.

The schedule is that of FlashAttention-3 (https://arxiv.org/abs/2407.08608):
within a warpgroup the softmax of a step runs while the values of the step
before are being added, and with `ping_pong` they take turns at the tensor
cores.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.flash.api import Options as Options
from isthmus.pallas.flash.items import chunk, each_item, rounds
from isthmus.pallas.flash.tile import (
  BLOCK,
  ROWS,
  accumulate,
  call,
  div,
  drain,
  element_mask,
  filled,
  product,
  products,
  rem,
  spread,
  tiled,
  wgmma,
  where_partial,
)
from isthmus.pallas.flash.tile import Plan as Plan
from isthmus.pallas.flash.walk import query_tile

LOG2E = math.log2(math.e)
GROUPS = BLOCK // ROWS  # compute warpgroups of a listed tile
# Of a thread that computes and of one that loads, by compute warpgroups.
_REGISTERS = {2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
  """What may be tuned.

  Attributes:
    block_k: keys of a step; divides BLOCK.
    stages: steps whose keys and values are in flight.
    ping_pong: whether the warpgroups take turns at the tensor cores.
    groups: compute warpgroups, of ROWS queries each; along lists, whose tiles
      are for two, there are two. Three have registers for heads up to 64.

  Example:
    >>> ForwardConfig(stages=4)
    ForwardConfig(block_k=128, stages=4, ping_pong=True, groups=2)
  """

  block_k: int = 128
  stages: int = 2
  ping_pong: bool = True
  groups: int = GROUPS


def fitted(
  config: ForwardConfig, pairs: int, t: int, lists: bool
) -> ForwardConfig:
  """The config, with two warpgroups unless more take fewer rounds of CTAs.

  One CTA of three takes longer, and more of the last tile is past the end.
  Along lists there are two, which take no turns: at width 64 and 1/8 of the
  blocks on an H100 381 TF/s, with turns 366.

  Args:
    config: whose `groups` may be too many.
    pairs: batches x heads.
    t: queries.
    lists: whether the kernel walks along lists, whose tiles are for two.

  Example:
    >>> three = ForwardConfig(groups=3)
    >>> [fitted(three, 16, t, False).groups for t in (128, 1024, 8192)]
    [2, 2, 3]
  """
  of = lambda groups: rounds(pairs * pl.cdiv(t, groups * ROWS))
  if lists:
    return dataclasses.replace(config, groups=GROUPS, ping_pong=False)
  fewer = of(config.groups) < of(GROUPS)
  return config if fewer else dataclasses.replace(config, groups=GROUPS)


def forward(q, k, v, plan, options, config):
  """o [b t n dv], and lse [b n t'] with t' a whole number of tiles.

  Args:
    q, k, v: widths are multiples of 64, lengths of 8.
    plan: a `Plan`.
    options: see `isthmus.pallas.flash.api`.
    config: a `ForwardConfig`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)
    >>> run = lambda x: forward(
    ...   x, x, x, Plan((200, 200)), Options(), ForwardConfig()
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x)]
    [(1, 200, 2, 64), (1, 2, 256)]
  """
  (b, _, n, d), heads, dv = q.shape, k.shape[2], v.shape[3]
  t, s = plan.lengths
  group, dtype = n // heads, q.dtype
  block_k, stages = config.block_k, config.stages
  groups = config.groups if plan.lists is None else GROUPS
  side = groups * ROWS  # queries of a tile
  tiles, split = pl.cdiv(t, side), BLOCK // block_k
  softcap, predicate = options.softcap, options.predicate
  factor = (options.scale if softcap is None else softcap) * LOG2E
  length = s if s % BLOCK else None
  masked = plan.masked(length)
  tile = (ROWS, block_k)

  items = b * n * tiles
  each = chunk(items, plan.steps) if max(d, dv) <= 128 else 1
  registers = _REGISTERS[groups]
  # Else the outputs leave through the memory of the queries.
  staged = each > 1 or d != dv

  def body(q_ref, k_ref, v_ref, refs, o_ref, lse_ref, scratch):
    q_smem2, k_smem, v_smem, o_smem2, lse_smem2, *barriers = scratch
    q_full, q_free, k_full, v_full, k_free, v_free, turn = barriers
    wg = lax.axis_index("wg")

    def first_key(walk, step):
      return walk.index(div(step, split)) * BLOCK + rem(step, split) * block_k

    def steps_of(walk):
      # A row of tiles without keys takes one tile, and masks all of it.
      return jnp.maximum(walk.total * split, 1)

    def take_turn(wg):
      if config.ping_pong:
        plgpu.barrier_wait(turn.at[wg])

    def pass_turn(wg):
      if config.ping_pong:
        plgpu.barrier_arrive(turn.at[rem(wg + 1, groups)])

    q_smem, lse_smem = q_smem2.at[wg], lse_smem2.at[wg]
    o_smem = o_smem2.at[wg] if staged else q_smem

    def attend(i, item, done):
      batch, head, row, walk = query_tile(refs, plan, n, item, side)
      kv_head = div(head, group)
      partial, total = walk.partial * split, steps_of(walk)
      none = walk.total == 0
      base = row * side + wg * ROWS
      plgpu.barrier_wait(q_full)

      def seen_of(step):
        return element_mask(
          refs,
          predicate,
          (batch, head, kv_head),
          (base, first_key(walk, step)),
          tile,
          queries=0,
          length=length,
        )

      def softmax(x, top, denominator, masked):
        """(p, fade, new top, new denominator) of the rows after these keys."""
        new = jnp.maximum(top, x.max(axis=1) * factor)
        # A row that has seen no key yet stays at -inf.
        safe = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
        fade = jnp.exp2(top - safe)
        p = jnp.exp2(x * factor - spread(safe, tile, 0))
        denominator = denominator * fade + p.sum(axis=1)
        return p.astype(dtype), fade, new, denominator

      def logits(x, step):
        if softcap is not None:
          x = jnp.tanh(x * (options.scale / softcap))
        if masked:
          seen = lambda: seen_of(step)
          x = where_partial(partial, step, x, -jnp.inf, seen)
        return x

      def scores(slot):
        return lambda acc: wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0)))

      def first_step():
        slot = rem(done, stages)
        plgpu.barrier_wait(k_full.at[slot])
        take_turn(wg)

        def multiply(acc):
          scores(slot)(acc)
          pass_turn(wg)

        x = product(tile, multiply)
        plgpu.barrier_arrive(k_free.at[slot])
        nothing = lambda _: filled(tile, -jnp.inf)
        x = lax.cond(none, nothing, lambda x: x, logits(x, jnp.int32(0)))
        top, denominator = filled((ROWS,), -jnp.inf), filled((ROWS,), 0.0)
        low, _, top, denominator = softmax(x, top, denominator, True)
        return filled((ROWS, dv), 0.0), low, top, denominator

      def step_of(step, carry):
        """The scores of this step, while the values of the last are added."""
        acc, low, top, denominator = carry
        slot, last = rem(done + step, stages), rem(done + step - 1, stages)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[last])
        take_turn(wg)

        def values(acc):
          wgmma(acc, low, v_smem.at[last])
          pass_turn(wg)

        def use(x):
          plgpu.barrier_arrive(k_free.at[slot])
          return softmax(logits(x, step), top, denominator, masked)

        used, acc = products(tile, scores(slot), use, acc, values)
        plgpu.barrier_arrive(v_free.at[last])
        low, fade, top, denominator = used
        return acc * spread(fade, acc.shape, 0), low, top, denominator

      carry = lax.fori_loop(1, total, step_of, first_step())
      acc, low, top, denominator = carry
      plgpu.barrier_arrive(q_free)
      last = rem(done + total - 1, stages)
      plgpu.barrier_wait(v_full.at[last])
      acc = accumulate(acc, lambda acc: wgmma(acc, low, v_smem.at[last]))
      plgpu.barrier_arrive(v_free.at[last])

      if refs["sinks"] is not None:
        sink = refs["sinks"][head] * LOG2E
        new = jnp.maximum(top, sink)
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        fade = jnp.exp2(top - safe)
        denominator = denominator * fade + jnp.exp2(sink - safe)
        acc, top = acc * spread(fade, acc.shape, 0), new
      inverse = jnp.where(denominator == 0, 0.0, 1 / denominator)
      lse = top * (1 / LOG2E) + jnp.log(denominator)
      if refs["lists"] is not None:
        poison = jnp.where(walk.overflow, jnp.float32(jnp.nan), jnp.float32(0))
        inverse, lse = inverse + poison, lse + poison
      acc = acc * spread(inverse, acc.shape, 0)
      # What no key was seen for may be 0 NaN by now.
      empty = spread(denominator == 0, acc.shape, 0)
      if each > 1:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      o_smem[...] = jnp.where(empty, 0.0, acc).astype(dtype)
      lse_smem[...] = lse
      plgpu.commit_smem()
      span = pl.ds(base, ROWS)
      plgpu.copy_smem_to_gmem(o_smem, o_ref.at[batch, span, head])
      plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, span])
      return done + total

    def load(i, item, done):
      batch, head, row, walk = query_tile(refs, plan, n, item, side)
      kv_head, total = div(head, group), steps_of(walk)

      def queries():
        pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
        for part in range(groups):
          span = pl.ds(row * side + part * ROWS, ROWS)
          q_tile = q_ref.at[batch, span, head]
          plgpu.copy_gmem_to_smem(q_tile, q_smem2.at[part], q_full)

      @pl.loop(0, total)
      def _(step):
        # As many keys first as have room before the last item is done.
        pl.when(step == stages - 1)(queries)
        slot = rem(done + step, stages)
        keys = (batch, pl.ds(first_key(walk, step), block_k), kv_head)
        later = done + step >= stages
        pl.when(later)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(
          k_ref.at[keys], k_smem.at[slot], k_full.at[slot]
        )
        pl.when(later)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(
          v_ref.at[keys], v_smem.at[slot], v_full.at[slot]
        )

      pl.when(total < stages)(queries)
      return done + total

    @pl.when(wg < groups)
    def _compute():
      plgpu.set_max_registers(registers[0], action="increase")
      pl.when(wg == groups - 1)(lambda: pass_turn(wg))
      each_item(items, each, attend)
      plgpu.wait_smem_to_gmem(0)
      pl.when(wg == 0)(lambda: take_turn(wg))

    @pl.when(wg == groups)
    def _load():
      plgpu.set_max_registers(registers[1], action="decrease")
      total = each_item(items, each, load)
      drain(total, stages, k_free, v_free)
      plgpu.barrier_wait(q_free)

  return call(
    body,
    (q, k, v),
    plan,
    out_type=(
      jax.ShapeDtypeStruct((*q.shape[:3], dv), dtype),
      jax.ShapeDtypeStruct((b, n, tiles * side), jnp.float32),
    ),
    scratch=(
      tiled((groups, ROWS, d), dtype),
      tiled((stages, block_k, d), dtype),
      tiled((stages, block_k, dv), dtype),
      tiled((groups, ROWS, dv), dtype) if staged else (),
      plgpu.SMEM((groups, ROWS), jnp.float32),
      plgpu.Barrier(num_arrivals=groups),
      plgpu.Barrier(num_arrivals=groups),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
      plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
      plgpu.Barrier(num_barriers=groups),
    ),
    items=pl.cdiv(items, each),
    threads=groups + 1,
    name="flash_forward",
  )
