"""What a warp keeps of its row, written as a list.

Lanes tell each other by ballots which of their numbers are kept: each counts
those before its own, and writes their places. No place is written twice.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.pallas.compat import interpreting
from isthmus.pallas.flash.lists import compact

#: Of a number: it is at the least value kept, it is kept whatever the ties
#: are, and it may be listed.
EQUAL, SURE, LISTED = 1, 2, 4


def write(
  plgpu: Any,
  layout: Any,
  code: Int32[Array, "r m"],
  weight: Float[Array, "r m"],
  have: Float[Array, "r m"],
  target: Float[Array, "r m"],
  num_ref: Any,
  index_ref: Any,
) -> None:
  """Writes (num, index) of rows; what is past the number stays as it is.

  Of equal numbers those are kept before which the sum is less than wanted:
  `have + weight rank < target`.

  Args:
    plgpu: jax.experimental.pallas.mosaic_gpu.
    layout: of the arrays: a row in a warp, some neighbours in a lane.
    code: EQUAL, SURE, LISTED, added up.
    weight: of each number.
    have: what those above the least value sum to, at each number.
    target: what is wanted, at each number.
    num_ref: int32 [r].
    index_ref: int32 [r m].

  Example:
    >>> code = jnp.array([[LISTED, LISTED + EQUAL, LISTED + SURE]])
    >>> one = jnp.ones((1, 3))
    >>> num, index = lists(code, one, one, 2 * one)  # which is what it writes
    >>> num.tolist(), index.tolist()
    ([2], [[1, 2, 0]])
  """
  if interpreting():
    num_ref[...], index_ref[...] = lists(code, weight, have, target)
    return
  ref = plgpu.RefType()
  run = plgpu.inline_mgpu(arg_types=(layout,) * 4 + (ref, ref))(_write)
  run(code, weight, have, target, num_ref, index_ref)


def lists(
  code: Int32[Array, "r m"],
  weight: Float[Array, "r m"],
  have: Float[Array, "r m"],
  target: Float[Array, "r m"],
) -> tuple[Int32[Array, "r"], Int32[Array, "r m"]]:
  """What `write` writes, in XLA; past the number there are zeros.

  Example:
    >>> one, equal = jnp.ones((1, 3)), jnp.full((1, 3), LISTED + EQUAL)
    >>> [x.tolist() for x in lists(equal, one, 0 * one, 2 * one)]
    [[2], [[0, 1, 0]]]
  """
  equal = (code & EQUAL) > 0
  rank = jnp.cumsum(equal, axis=1) - equal
  kept = equal & (have + weight * rank < target)
  kept = (kept | ((code & SURE) > 0)) & ((code & LISTED) > 0)
  num, index = compact(kept)
  valid = jnp.arange(index.shape[1]) < num[:, None]
  return num, jnp.where(valid, index, 0)


def _write(ctx, code, weight, have, target, num_ref, index_ref) -> None:
  """As `write`, a thread's part."""
  from jax.experimental.mosaic.gpu import utils
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, memref, vector

  del ctx
  i32 = ir.IntegerType.get_signless(32)
  f32, spot = ir.F32Type.get(), ir.IndexType.get()

  def asm(text, constraints, *operands):
    return llvm.inline_asm(
      i32, list(operands), text, constraints, has_side_effects=True
    )

  def number(x):
    return utils.c(x, i32)

  def has(x, bit):
    return arith.cmpi(
      arith.CmpIPredicate.ne, arith.andi(x, number(bit)), number(0)
    )

  def count(x):
    return asm("popc.b32 $0, $1;", "=r,r", x)

  def ballot(x):
    text = "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
    text += " vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return asm(text, "=r,r", arith.extui(i32, x))

  def among(bits, own):
    """How many are before each of a lane's numbers, and how many there are."""
    before, total = number(0), number(0)
    for x in bits:
      before = arith.addi(before, count(arith.andi(x, below)))
      total = arith.addi(total, count(x))
    ranks = []
    for x in own:
      ranks.append(before)
      before = arith.addi(before, arith.extui(i32, x))
    return ranks, total

  def at(x):
    return arith.index_castui(spot, x)

  thread = utils.thread_idx()
  lane = arith.andi(thread, number(31))
  row = arith.andi(arith.shrui(thread, number(5)), number(3))
  below = asm("mov.u32 $0, %lanemask_lt;", "=r")
  # What was written before by other lanes comes before what follows.
  utils.warp_barrier()
  ties, length = number(0), number(0)
  steps = [x.registers.reshape(-1) for x in (code, weight, have, target)]
  (word,) = ir.VectorType(steps[0][0].type).shape
  for step, registers in enumerate(zip(*steps, strict=True)):
    codes, weights, haves, targets = (
      [
        vector.extract(x, dynamic_position=[], static_position=[i])
        for i in range(word)
      ]
      for x in registers
    )
    equal = [has(x, EQUAL) for x in codes]
    ranks, more = among([ballot(x) for x in equal], equal)
    kept = []
    for i, rank in enumerate(ranks):
      part = arith.mulf(weights[i], arith.uitofp(f32, arith.addi(ties, rank)))
      lacks = arith.cmpf(
        arith.CmpFPredicate.OLT, arith.addf(haves[i], part), targets[i]
      )
      found = arith.ori(arith.andi(equal[i], lacks), has(codes[i], SURE))
      kept.append(arith.andi(found, has(codes[i], LISTED)))
    ties = arith.addi(ties, more)
    places, more = among([ballot(x) for x in kept], kept)
    for i, (keep, place) in enumerate(zip(kept, places, strict=True)):
      column = arith.addi(
        arith.muli(lane, number(word)), number(step * 32 * word + i)
      )
      with utils.when(keep):
        memref.store(
          column, index_ref, [at(row), at(arith.addi(length, place))]
        )
    length = arith.addi(length, more)
  first = arith.cmpi(arith.CmpIPredicate.eq, lane, number(0))
  with utils.when(first):
    memref.store(length, num_ref, [at(row)])
