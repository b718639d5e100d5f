"""Forward attention for sm_90 in Pallas Mosaic GPU.

Two compute warpgroups own 64 query rows each and share the key tiles that a
third brings in by TMA, reading their indices along the walk. While one does
its softmax the other has the tensor cores (the ping-pong schedule of
FlashAttention-3, https://arxiv.org/abs/2407.08608).
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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
  rem,
  spread,
  tiled,
  wgmma,
)
from isthmus.pallas.flash.walk import band_walk, list_walk

LOG2E = math.log2(math.e)
GROUPS = BLOCK // ROWS  # compute warpgroups


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
  """What may be tuned.

  Attributes:
    block_k: keys of a step; divides BLOCK.
    stages: steps whose keys and values are in flight.
  """

  block_k: int = 128
  stages: int = 2


def forward(q, k, v, plan, options, config):
  """o [b t n dv], and lse [b n t'] with t' a whole number of tiles.

  Args:
    q, k, v: widths are multiples of 64, lengths of 8.
    plan: a `Plan`.
    options: see `isthmus.pallas.flash.api`.
    config: a `ForwardConfig`.
  """
  (b, _, n, d), heads, dv = q.shape, k.shape[2], v.shape[3]
  t, s = plan.lengths
  group, dtype = n // heads, q.dtype
  block_k, stages = config.block_k, config.stages
  tiles, split = pl.cdiv(t, BLOCK), BLOCK // block_k
  softcap, predicate = options.softcap, options.predicate
  factor = (options.scale if softcap is None else softcap) * LOG2E
  length = s if s % BLOCK else None
  tile = (ROWS, block_k)

  def body(q_ref, k_ref, v_ref, refs, o_ref, lse_ref, scratch):
    q_smem2, k_smem, v_smem, o_smem2, lse_smem2, *barriers = scratch
    q_full, k_full, v_full, k_free, v_free, turn = barriers
    wg, item = lax.axis_index("wg"), lax.axis_index("item")
    pair, row = div(item, tiles), tiles - 1 - rem(item, tiles)
    batch, head = div(pair, n), rem(pair, n)
    kv_head = div(head, group)
    if refs["order"] is not None:
      row = entry(refs["order"], batch, head, rem(item, tiles))
    if refs["lists"] is None:
      walk = band_walk(
        row, plan.band, lengths=(t, s), block=(BLOCK, BLOCK), ragged=True
      )
    else:
      walk = list_walk(refs["lists"], batch, head, row)
    partial, total = walk.partial * split, walk.total * split

    def first_key(step):
      return walk.index(div(step, split)) * BLOCK + rem(step, split) * block_k

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < GROUPS)
    def _compute():
      plgpu.set_max_registers(240, action="increase")
      q_smem = q_smem2.at[wg]
      o_smem = q_smem if d == dv else o_smem2.at[wg]
      lse_smem = lse_smem2.at[wg]
      base = row * BLOCK + wg * ROWS
      rows = (batch, pl.ds(base, ROWS), head)
      plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, q_full.at[wg])
      plgpu.barrier_wait(q_full.at[wg])

      @pl.when(total > 0)
      def _():
        plgpu.barrier_wait(k_full.at[0])

      pl.when(wg == 1)(take_turn)

      def step_of(step, carry, *, masked):
        acc, top, denominator = carry
        slot = rem(step, stages)

        def scores(ref):
          wgmma(ref, q_smem, k_smem.at[slot].transpose((1, 0)))
          take_turn()

        x = product(tile, scores)
        plgpu.barrier_arrive(k_free.at[slot])
        if softcap is not None:
          x = jnp.tanh(x * (options.scale / softcap))
        if masked:
          seen = element_mask(
            refs,
            predicate,
            (batch, head, kv_head),
            (base, first_key(step)),
            tile,
            queries=0,
            length=length,
          )
          if seen is not None:
            x = jnp.where(seen, x, -jnp.inf)
        new = jnp.maximum(top, x.max(axis=1) * factor)
        # A row that has seen no key yet stays at -inf.
        safe = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
        fade = jnp.exp2(top - safe)
        p = jnp.exp2(x * factor - spread(safe, tile, 0))
        acc = acc * spread(fade, acc.shape, 0)
        low = p.astype(dtype)
        denominator = denominator * fade + p.sum(axis=1)
        acc, denominator, new, low = lax.optimization_barrier(
          (acc, denominator, new, low)
        )
        plgpu.barrier_arrive(turn)  # the softmax is done
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn)  # the tensor cores are free

        def values(ref):
          wgmma(ref, low, v_smem.at[slot])

          @pl.when(step + 1 < total)
          def _():
            plgpu.barrier_wait(k_full.at[rem(step + 1, stages)])

        acc = accumulate(acc, values)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, new, denominator

      carry = (
        filled((ROWS, dv), 0.0),
        filled((ROWS,), -jnp.inf),
        filled((ROWS,), 0.0),
      )
      if plan.masked(length):
        step = functools.partial(step_of, masked=True)
        carry = lax.fori_loop(0, partial, step, carry)
      step = functools.partial(step_of, masked=False)
      carry = lax.fori_loop(partial, total, step, carry)
      pl.when(wg == 0)(take_turn)

      acc, top, denominator = carry
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
      o_smem[...] = (acc * spread(inverse, acc.shape, 0)).astype(dtype)
      lse_smem[...] = lse
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(o_smem, o_ref.at[rows])
      span = pl.ds(base, ROWS)
      plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, span])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _load():
      plgpu.set_max_registers(24, action="decrease")

      @pl.loop(0, total)
      def _(step):
        slot = rem(step, stages)
        keys = (batch, pl.ds(first_key(step), block_k), kv_head)
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

  return call(
    body,
    (q, k, v),
    plan,
    out_type=(
      jax.ShapeDtypeStruct((*q.shape[:3], dv), dtype),
      jax.ShapeDtypeStruct((b, n, tiles * BLOCK), jnp.float32),
    ),
    scratch=(
      tiled((GROUPS, ROWS, d), dtype),
      tiled((stages, block_k, d), dtype),
      tiled((stages, block_k, dv), dtype),
      tiled((GROUPS, ROWS, dv), dtype) if d != dv else (),
      plgpu.SMEM((GROUPS, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=GROUPS),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
      plgpu.Barrier(num_arrivals=GROUPS),
    ),
    items=b * n * tiles,
    threads=GROUPS + 1,
    name="flash_forward",
  )
