"""Means of blocks, by a warpgroup of a kernel that mostly waits.

To read tokens is bound by memory, products of few queries are by arithmetic:
beside each other, in one kernel, they take less than one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from isthmus.pallas.compat import store
from isthmus.pallas.flash.tile import div, launch, rem
from isthmus.pallas.pool.api import BLOCK

#: Tokens of a load, of which a block has some, and loads in flight.
ROWS, STAGES = 64, 3
LOADS = BLOCK // ROWS
#: Numbers that a warpgroup reads at once.
CHUNK = 1024
#: Registers of a thread that loads and pools.
SOME = 56


@dataclasses.dataclass(frozen=True)
class Pooling:
  """Which blocks each CTA of a kernel pools.

  They are dealt out in turn, heads of a block side by side; what the last
  turn lacks is the last block again, to the same bits.

  Attributes:
    shape: of the tokens, [b t n d]; d is 64 or 128, t not less than BLOCK.
    items: CTAs.

  Example:
    >>> pooling = Pooling((1, 16384, 32, 128), items=100)
    >>> pooling.blocks, pooling.share
    (4096, 41)
    >>> [int(x) for x in pooling.place(jnp.int32(7), jnp.int32(2))]
    [0, 6, 15]
  """

  shape: tuple[int, int, int, int]
  items: int

  @property
  def blocks(self) -> int:
    """How many whole ones there are, of all heads."""
    b, t, n, _ = self.shape
    return b * (t // BLOCK) * n

  @property
  def share(self) -> int:
    """How many a CTA pools."""
    return -(-self.blocks // self.items)

  def out_type(self, dtype: Any) -> jax.ShapeDtypeStruct:
    """Of the means, [b t // BLOCK n d]."""
    b, t, n, d = self.shape
    return jax.ShapeDtypeStruct((b, t // BLOCK, n, d), dtype)

  def scratch(self, dtype: Any) -> tuple[Any, ...]:
    """Loads, sums, and the loads' barriers."""
    d = self.shape[3]
    return (
      plgpu.SMEM((STAGES, ROWS, d), dtype),
      plgpu.SMEM((2, CHUNK // d, d), jnp.float32),
      plgpu.Barrier(num_barriers=STAGES),
    )

  def place(self, item: Any, index: Any) -> tuple[Any, Any, Any]:
    """(batch, block, head) of a CTA's block of this number."""
    _, t, n, _ = self.shape
    found = jnp.minimum(index * self.items + item, self.blocks - 1)
    rest, head = div(found, n), rem(found, n)
    return div(rest, t // BLOCK), rem(rest, t // BLOCK), head

  def fetch(self, refs: Any, item: Any, load: Any) -> None:
    """Starts a load, of those that a CTA has."""
    x_ref, _, tokens, _, full = refs
    slot = rem(load, STAGES)

    @pl.when(load < self.share * LOADS)
    def _():
      batch, block, head = self.place(item, div(load, LOADS))
      start = block * BLOCK + rem(load, LOADS) * ROWS
      source = x_ref.at[batch, pl.ds(start, ROWS), head]
      plgpu.copy_gmem_to_smem(source, tokens.at[slot], full.at[slot])

  def pool(self, refs: Any, item: Any, index: Any) -> None:
    """The mean of a CTA's block; called for each in turn."""
    _, o_ref, tokens, sums2, full = refs
    rows, d = sums2.shape[1:]
    wide = plgpu.Layout.WG_STRIDED((rows, d), vec_size=CHUNK // 128)
    line = plgpu.Layout.WG_STRIDED((d,), vec_size=1)
    if d < 128:  # two threads have the same
      line = plgpu.Layout.TILED(
        plgpu.Tiling(((d,), (d // 4,), (1,))),
        warp_dims=(-3,),
        lane_dims=(-2, plgpu.Replicated(128 // d)),
        vector_dim=-1,
      )
    total = plgpu.layout_cast(jnp.zeros((rows, d), jnp.float32), wide)
    sums = sums2.at[rem(index, 2)]
    for part in range(LOADS):
      load = index * LOADS + part
      slot = rem(load, STAGES)
      plgpu.barrier_wait(full.at[slot])
      for row in range(0, ROWS, rows):
        x = tokens.at[slot, pl.ds(row, rows)]
        x = plgpu.load(x, layout=wide, optimized=False)
        total = total + x.astype(jnp.float32)
      if part == LOADS - 1:
        sums[...] = total
      # All have read the load, and what they added up can be read; the sums
      # of the block before may still be.
      plgpu.commit_smem()
      self.fetch(refs, item, load + STAGES)
    lines = [
      plgpu.load(sums.at[row], layout=line, optimized=False)
      for row in range(rows)
    ]
    mean = (sum(lines[1:], lines[0]) * (1 / BLOCK)).astype(o_ref.dtype)
    store(o_ref.at[self.place(item, index)], mean)


def beside(
  pooling: Pooling | None,
  refs: Any,
  item: Any,
  total: Any,
  reach: int,
  step: Callable[[Any], None],
) -> None:
  """`step(0)` to `step(total - 1)`, and between them a CTA's share of blocks.

  Args:
    pooling: which blocks; None for none.
    refs: of it, as `launch_beside` gives them.
    item: the CTA.
    total: how often.
    reach: how often at most.
    step: what else the warpgroup does.

  Example:
    >>> run = lambda: beside(None, (), 0, 3, 3, lambda turn: None)
    >>> print(jax.make_jaxpr(run)().eqns[0].params["length"])
    3
  """
  if pooling is None:
    pl.loop(0, total)(step)
    return
  for load in range(STAGES):
    pooling.fetch(refs, item, jnp.int32(load))
  each = -(-pooling.share // reach)

  @pl.loop(0, jnp.maximum(total, -(-pooling.share // each)))
  def _(turn):
    pl.when(turn < total)(lambda: step(turn))
    for i in range(each):
      index = turn * each + i
      pl.when(index < pooling.share)(
        functools.partial(pooling.pool, refs, item, index)
      )


def launch_beside(
  body: Callable[..., None],
  arrays: tuple[Any, ...],
  tokens: Any,
  pooling: Pooling | None,
  *,
  out_type: tuple[Any, ...],
  scratch: tuple[Any, ...],
  **others: Any,
) -> Any:
  """`launch` of `body(*refs, refs)`, the last being what `beside` takes.

  Args:
    body, arrays, out_type, scratch, others: as in `launch`.
    tokens: that are pooled, or None.
    pooling: which blocks, or None.

  Returns:
    As `launch`; with the means, if tokens are pooled.

  Example:
    >>> def copy(x_ref, y_ref, refs):
    ...   y_ref[...] = x_ref[...]
    >>> run = lambda x: launch_beside(
    ...   copy,
    ...   (x,),
    ...   None,
    ...   None,
    ...   out_type=(jax.ShapeDtypeStruct((2,), jnp.int32),),
    ...   scratch=(),
    ...   items=2,
    ...   threads=1,
    ...   name="copy",
    ... )
    >>> jax.eval_shape(run, jnp.arange(2))[0].shape
    (2,)
  """
  more: tuple[tuple[Any, ...], ...] = (), (), ()
  if pooling is not None:
    means = pooling.out_type(tokens.dtype)
    more = (tokens,), (means,), pooling.scratch(tokens.dtype)
  ends = len(arrays), len(out_type), len(scratch)

  def both(*refs):
    own, pooled = [], []
    for count, extra in zip(ends, more, strict=True):
      own += refs[:count]
      pooled += refs[count : count + len(extra)]
      refs = refs[count + len(extra) :]
    body(*own, tuple(pooled))

  return launch(
    both,
    (*arrays, *more[0]),
    out_type=(*out_type, *more[1]),
    scratch=(*scratch, *more[2]),
    **others,
  )
