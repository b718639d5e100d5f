"""Backward attention for sm_90 in Pallas Mosaic GPU, in two passes.

`dx = p (dp - delta)`, with p recomputed from the logsumexp. The first pass
holds queries and walks along keys for dq; the second holds keys and walks
along queries for dk and dv. No pass adds to memory that another CTA adds to,
so that the result is the same every time; the price is 7 products for 5.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from isthmus.pallas.flash.api import Options as Options
from isthmus.pallas.flash.mosaic_forward import GROUPS, LOG2E
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.tile import (
  BLOCK,
  ROWS,
  accumulate,
  call,
  div,
  drain,
  element_mask,
  entry,
  filled,
  product,
  products,
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.flash.tile import Plan as Plan
from isthmus.pallas.flash.walk import band_walk, list_walk, query_tile


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
  """What may be tuned.

  Attributes:
    block: tokens of a step: keys for dq, queries for dk and dv.
    stages: steps in flight.

  Example:
    >>> BackwardConfig()
    BackwardConfig(block=64, stages=4)
  """

  block: int = 64
  stages: int = 4


def _weights(x, lse, options, axis, seen):
  """p and the softcap's slope, or None, of the raw products x."""
  factor, slope = options.scale * LOG2E, None
  if options.softcap is not None:
    x = jnp.tanh(x * (options.scale / options.softcap))
    factor, slope = options.softcap * LOG2E, 1 - x * x
  p = jnp.exp2(x * factor - spread(lse, x.shape, axis))
  return (p if seen is None else jnp.where(seen, p, 0.0)), slope


def backward_queries(q, k, v, do, lse, delta, plan, options, config):
  """dq, of q's shape.

  Args:
    q, k, v, do: widths are multiples of 64, lengths of 8.
    lse: float32 [b n t'], to base 2; inf for rows that pass nothing on.
    delta: float32 [b n t'], `rowsum(do o) - dlse`.
    plan: a `Plan` of key tiles for query tiles.
    options: see `isthmus.pallas.flash.api`.
    config: a `BackwardConfig`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> rows = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    >>> plan, how = Plan((128, 128)), BackwardConfig()
    >>> run = lambda x, rows: backward_queries(
    ...   *(x, x, x, x, rows, rows), plan, Options(), how
    ... )
    >>> jax.eval_shape(run, x, rows).shape
    (1, 128, 2, 64)
  """
  (b, _, n, d), heads, dv = q.shape, k.shape[2], v.shape[3]
  t, s = plan.lengths
  group, dtype = n // heads, q.dtype
  block, stages = config.block, config.stages
  tiles, split = pl.cdiv(t, BLOCK), BLOCK // block
  length = s if s % BLOCK else None
  tile = (ROWS, block)

  def body(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, refs, dq_ref, *rest
  ):
    (scratch,) = rest
    q_smem2, do_smem2, k_smem, v_smem, *barriers = scratch
    q_full, k_full, v_full, k_free, v_free = barriers
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    batch, head, row, walk = query_tile(refs, plan, n, item)
    kv_head = div(head, group)
    partial, total = walk.partial * split, walk.total * split

    def first_key(step):
      return walk.index(div(step, split)) * BLOCK + rem(step, split) * block

    @pl.when(wg < GROUPS)
    def _compute():
      plgpu.set_max_registers(240, action="increase")
      q_smem, do_smem = q_smem2.at[wg], do_smem2.at[wg]
      base = row * BLOCK + wg * ROWS
      rows, span = (batch, pl.ds(base, ROWS), head), pl.ds(base, ROWS)
      plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, q_full.at[wg])
      plgpu.copy_gmem_to_smem(do_ref.at[rows], do_smem, q_full.at[wg])
      load = functools.partial(
        plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
      )
      lse = load(lse_ref.at[batch, head, span])
      delta = load(delta_ref.at[batch, head, span])
      plgpu.barrier_wait(q_full.at[wg])

      def step_of(step, dq, *, masked):
        slot = rem(step, stages)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(v_full.at[slot])
        seen = None
        if masked:
          seen = element_mask(
            refs,
            options.predicate,
            (batch, head, kv_head),
            (base, first_key(step)),
            tile,
            queries=0,
            length=length,
          )
        (p, slope), dp = products(
          tile,
          lambda acc: wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0))),
          lambda x: _weights(x, lse, options, 0, seen),
          tile,
          lambda acc: wgmma(acc, do_smem, v_smem.at[slot].transpose((1, 0))),
        )
        plgpu.barrier_arrive(v_free.at[slot])
        dx = p * (dp - spread(delta, tile, 0))
        dx = (dx if slope is None else dx * slope).astype(dtype)
        dq = accumulate(dq, lambda ref: wgmma(ref, dx, k_smem.at[slot]))
        plgpu.barrier_arrive(k_free.at[slot])
        return dq

      dq = filled((ROWS, d), 0.0)
      if plan.masked(length):
        step = functools.partial(step_of, masked=True)
        dq = lax.fori_loop(0, partial, step, dq)
      step = functools.partial(step_of, masked=False)
      dq = lax.fori_loop(partial, total, step, dq)
      q_smem[...] = (dq * options.scale).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _load():
      plgpu.set_max_registers(24, action="decrease")

      @pl.loop(0, total)
      def _(step):
        slot = rem(step, stages)
        keys = (batch, pl.ds(first_key(step), block), kv_head)
        later = step >= stages
        pl.when(later)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(
          k_ref.at[keys], k_smem.at[slot], k_full.at[slot]
        )
        pl.when(later)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(
          v_ref.at[keys], v_smem.at[slot], v_full.at[slot]
        )

      drain(total, stages, k_free, v_free)

  (dq,) = call(
    body,
    (q, k, v, do, lse, delta),
    plan,
    out_type=(jax.ShapeDtypeStruct(q.shape, dtype),),
    scratch=(
      tiled((GROUPS, ROWS, d), dtype),
      tiled((GROUPS, ROWS, dv), dtype),
      tiled((stages, block, d), dtype),
      tiled((stages, block, dv), dtype),
      plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ),
    items=b * n * tiles,
    threads=GROUPS + 1,
    name="flash_backward_dq",
  )
  return dq


def backward_keys(
  q, k, v, do, lse, delta, plan, options, config, *, wanted=("dk", "dv")
):
  """The wanted ones of (dk, dv), of the shapes of k and v.

  The query heads that share a kv head are walked one after the other, so that
  their sum is made in registers. Above 128 columns both sums don't fit there:
  then each is wanted by a call of its own.

  Args:
    wanted: what is returned, in this order.
    plan: a `Plan` of query tiles for key tiles; its band is transposed.
    q, k, v, do, lse, delta, options, config: as in `backward_queries`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> rows = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    >>> plan, how = Plan((128, 128)), BackwardConfig()
    >>> run = lambda x, rows: backward_keys(
    ...   *(x, x, x, x, rows, rows), plan, Options(), how
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x, rows)]
    [(1, 128, 2, 64), (1, 128, 2, 64)]
  """
  (b, _, n, d), heads, dv = q.shape, k.shape[2], v.shape[3]
  t, s = plan.lengths
  group, dtype = n // heads, q.dtype
  block, stages = config.block, config.stages
  tiles, split = pl.cdiv(s, BLOCK), BLOCK // block
  tile = (ROWS, block)
  with_dk, with_dv = "dk" in wanted, "dv" in wanted

  def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, refs, *rest):
    *out_refs, scratch = rest
    k_smem2, v_smem2, q_smem, do_smem, lse_smem, delta_smem, *barriers = scratch
    k_full, q_full, do_full, q_free, do_free = barriers
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    pair, row = div(item, tiles), rem(item, tiles)
    batch, kv_head = div(pair, heads), rem(pair, heads)
    if refs["order"] is not None:
      row = entry(refs["order"], batch, kv_head, row)

    def walk_of(head):
      if refs["lists"] is None:
        return band_walk(
          row, plan.band, lengths=(s, t), block=(BLOCK, BLOCK), ragged=False
        )
      return list_walk(refs["lists"], batch, head, row)

    def first_query(walk, step):
      return walk.index(div(step, split)) * BLOCK + rem(step, split) * block

    def heads_loop(function, carry):
      """Over the group's heads; function(head, walk, done, carry)."""

      def one(member, state):
        done, carry = state
        head = kv_head * group + member
        walk = walk_of(head)
        carry = function(head, walk, done, carry)
        return done + walk.total * split, carry

      if group == 1:
        return one(0, (jnp.int32(0), carry))[1]
      return lax.fori_loop(0, group, one, (jnp.int32(0), carry))[1]

    @pl.when(wg < GROUPS)
    def _compute():
      plgpu.set_max_registers(240, action="increase")
      k_smem = k_smem2.at[wg]
      v_smem: Any = v_smem2.at[wg] if with_dk else None
      base = row * BLOCK + wg * ROWS
      rows = (batch, pl.ds(base, ROWS), kv_head)
      plgpu.copy_gmem_to_smem(k_ref.at[rows], k_smem, k_full.at[wg])
      if with_dk:
        plgpu.copy_gmem_to_smem(v_ref.at[rows], v_smem, k_full.at[wg])
      plgpu.barrier_wait(k_full.at[wg])
      load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(0))

      def along(head, walk, done, carry):
        def step_of(step, carry, *, masked):
          sums = dict(zip(wanted, carry, strict=True))
          slot = rem(done + step, stages)
          q, do = q_smem.at[slot], do_smem.at[slot]
          plgpu.barrier_wait(q_full.at[slot])
          plgpu.barrier_wait(do_full.at[slot])
          lse = load(lse_smem.at[slot])
          seen = None
          if masked:
            seen = element_mask(
              refs,
              options.predicate,
              (batch, head, kv_head),
              (first_query(walk, step), base),
              tile,
              queries=1,
              length=None,
            )
          logits = lambda acc: wgmma(acc, k_smem, q.transpose((1, 0)))
          use = lambda x: _weights(x, lse, options, 1, seen)
          if with_dk:
            values = lambda acc: wgmma(acc, v_smem, do.transpose((1, 0)))
            (p, slope), dp = products(tile, logits, use, tile, values)
          else:
            p, slope = use(product(tile, logits))
          if with_dv:
            low = p.astype(dtype)
            sums["dv"] = accumulate(sums["dv"], lambda acc: wgmma(acc, low, do))
          plgpu.barrier_arrive(do_free.at[slot])
          if with_dk:
            dx = p * (dp - spread(load(delta_smem.at[slot]), tile, 1))
            dx = (dx if slope is None else dx * slope).astype(dtype)
            sums["dk"] = accumulate(sums["dk"], lambda acc: wgmma(acc, dx, q))
          plgpu.barrier_arrive(q_free.at[slot])
          return tuple(sums.values())

        partial, total = walk.partial * split, walk.total * split
        if plan.masked(None):
          step = functools.partial(step_of, masked=True)
          carry = lax.fori_loop(0, partial, step, carry)
        step = functools.partial(step_of, masked=False)
        return lax.fori_loop(partial, total, step, carry)

      widths = {"dk": d, "dv": dv}
      carry = tuple(filled((ROWS, widths[name]), 0.0) for name in wanted)
      carry = heads_loop(along, carry)
      # The results leave through the buffers of what has been used up.
      buffers: dict[str, Any] = {
        "dk": k_smem,
        "dv": v_smem if with_dk else k_smem,
      }
      for name, x in zip(wanted, carry, strict=True):
        x = x * options.scale if name == "dk" else x
        buffers[name][...] = x.astype(dtype)
      plgpu.commit_smem()
      for name, out_ref in zip(wanted, out_refs, strict=True):
        plgpu.copy_smem_to_gmem(buffers[name], out_ref.at[rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _load():
      plgpu.set_max_registers(24, action="decrease")

      def along(head, walk, done, carry):
        @pl.loop(0, walk.total * split)
        def _(step):
          slot = rem(done + step, stages)
          first = first_query(walk, step)
          span = pl.ds(first, block)
          queries, stats = (batch, span, head), (batch, head, span)
          later = done + step >= stages
          pl.when(later)(lambda: plgpu.barrier_wait(q_free.at[slot]))
          full = q_full.at[slot]
          plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem.at[slot], full)
          plgpu.copy_gmem_to_smem(lse_ref.at[stats], lse_smem.at[slot], full)
          pl.when(later)(lambda: plgpu.barrier_wait(do_free.at[slot]))
          full = do_full.at[slot]
          plgpu.copy_gmem_to_smem(do_ref.at[queries], do_smem.at[slot], full)
          plgpu.copy_gmem_to_smem(
            delta_ref.at[stats], delta_smem.at[slot], full
          )

        return carry + walk.total * split

      total = heads_loop(along, jnp.int32(0))
      drain(total, stages, q_free, do_free)

  return call(
    body,
    (q, k, v, do, lse, delta),
    plan,
    out_type=tuple(
      jax.ShapeDtypeStruct((k if name == "dk" else v).shape, dtype)
      for name in wanted
    ),
    scratch=(
      tiled((GROUPS, ROWS, d), dtype),
      tiled((GROUPS, ROWS, dv), dtype) if with_dk else (),
      tiled((stages, block, d), dtype),
      tiled((stages, block, dv), dtype),
      plgpu.SMEM((stages, block), jnp.float32),
      plgpu.SMEM((stages, block), jnp.float32),
      plgpu.Barrier(num_arrivals=1 + with_dk, num_barriers=GROUPS),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ),
    items=b * heads * tiles,
    threads=GROUPS + 1,
    name="flash_backward_" + "_".join(wanted),
  )


def transposed(band: Band) -> Band:
  """The band as keys see it.

  Example:
    >>> transposed(Band(None, 0, offset=3))
    Band(left=0, right=None, offset=-3)
  """
  return Band(band.right, band.left, -band.offset)
