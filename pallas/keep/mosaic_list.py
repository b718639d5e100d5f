"""The best numbers of a warp's row, found and written as a list.

The least number kept lies between two bounds that are brought together by
halves, a sum over the row for each, until one number is left between them. A
lane holds neighbours of its row: which of its numbers are kept are bits of a
word or a few, whose places follow from the counts of the lanes before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.pallas.compat import interpreting
from isthmus.pallas.flash.lists import compact

#: A sum that exceeds another by less than this many of the least number there
#: may be in between has one number more.
_ONE = 1.5


def write(
  plgpu: Any,
  layout: Any,
  bits: Int32[Array, "r m"],
  target: Float[Array, "r"],
  forced: Int32[Array, "r"],
  ends: Int32[Array, "r"],
  num_ref: Any,
  index_ref: Any,
  *,
  count: bool,
) -> None:
  """Writes (num, index) of rows; what is past the number stays as it is.

  Args:
    plgpu: jax.experimental.pallas.mosaic_gpu.
    layout: of `bits`: a row in a warp, neighbours in a lane, four in a vector.
    bits: of numbers that are not negative; -1 where none may be kept.
    target: what the weights of those kept must reach; none are if it is <= 0.
    forced: is listed in any case.
    ends: what is listed is below it.
    num_ref: int32 [r].
    index_ref: int32 [r m].
    count: numbers weigh 1, not what they are.

  Example:
    >>> bits = jnp.array([[3, 1, -1, 2]])
    >>> row = jnp.zeros((1,), jnp.int32)
    >>> args = bits, row + 2.0, row - 1, row + 4  # which is what it writes
    >>> [x.tolist() for x in lists(*args, count=True)]
    [[2], [[0, 3, 0, 0]]]
  """
  if interpreting():
    found = lists(bits, target, forced, ends, count=count)
    num_ref[...], index_ref[...] = found
    return
  ref, rows = plgpu.RefType(), layout.reduce(1)

  @plgpu.inline_mgpu(arg_types=(layout, rows, rows, rows, ref, ref))
  def run(ctx, bits, target, forced, ends, num_ref, index_ref):
    del ctx
    numbers = _elements(bits)
    (target,), (forced,), (ends,) = map(_elements, (target, forced, ends))
    _Warp(numbers, count).write(target, forced, ends, num_ref, index_ref)

  run(bits, target, forced, ends, num_ref, index_ref)


def lists(
  bits: Int32[Array, "r m"],
  target: Float[Array, "r"],
  forced: Int32[Array, "r"],
  ends: Int32[Array, "r"],
  *,
  count: bool,
) -> tuple[Int32[Array, "r"], Int32[Array, "r m"]]:
  """What `write` writes, the same way in XLA; past the number there are zeros.

  Example:
    >>> row, bits = jnp.zeros((1,), jnp.int32), jnp.full((1, 3), 7)
    >>> found = lists(bits, row + 2.0, row - 1, row + 3, count=True)
    >>> [x.tolist() for x in found]  # of equal ones the first
    [[2], [[0, 1, 0]]]
  """
  low, high, have = between(bits, target, count=count)
  low, high, have, target = (x[:, None] for x in (low, high, have, target))
  sure, equal = bits >= high, (bits >= low) & (bits < high)
  rank = (jnp.cumsum(equal, axis=1) - equal).astype(jnp.float32)
  equal = equal & (have + _weight(low, count) * rank < target)
  place = jnp.arange(bits.shape[1], dtype=jnp.int32)
  kept = ((sure | equal) & (target > 0)) | (place == forced[:, None])
  num, index = compact(kept & (place < ends[:, None]))
  return num, jnp.where(place < num[:, None], index, 0)


def between(
  bits: Int32[Array, "r m"], target: Float[Array, "r"], *, count: bool
) -> tuple[Int32[Array, "r"], Int32[Array, "r"], Float[Array, "r"]]:
  """(low, high, have): numbers of `high` or more are kept, which sum to `have`.

  Those from `low` on reach the target, so that some are kept that lie between;
  they are alike, or one. If all don't reach it, both are the least number.

  Example:
    >>> bits, target = jnp.array([[3, 8, 9, 1]]), jnp.array([3.0])
    >>> [x.tolist() for x in between(bits, target, count=True)]
    [[3], [5], [2.0]]
  """

  def sum_from(least):
    weight = _weight(bits, count)
    return jnp.sum(jnp.where(bits >= least[:, None], weight, 0.0), axis=1)

  def open_(state):
    low, high, more, have = state
    return (high - low > 1) & (more - have >= _ONE * _weight(low, count))

  def halve(state):
    low, high, more, have = state
    middle = low + (high - low) // 2
    total = sum_from(middle)
    up, going = total >= target, open_(state)
    low, more = (
      jnp.where(going & up, a, b) for a, b in ((middle, low), (total, more))
    )
    high, have = (
      jnp.where(going & ~up, a, b) for a, b in ((middle, high), (total, have))
    )
    return low, high, more, have

  none = jnp.iinfo(jnp.int32).max
  low = jnp.min(jnp.where(bits < 0, none, bits), axis=1)
  total = sum_from(low)
  high = jnp.where(total < target, low, jnp.max(bits, axis=1) + 1)
  have = jnp.where(total < target, total, 0.0)
  state = low, high, total, have
  low, high, _, have = jax.lax.while_loop(
    lambda state: jnp.any(open_(state)), halve, state
  )
  return low, high, have


def _weight(bits, count):
  if count:
    return jnp.ones_like(bits, jnp.float32)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _elements(x):
  """The numbers of an array that are a thread's, in their order."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import vector

  found = []
  for register in x.registers.reshape(-1):
    (size,) = ir.VectorType(register.type).shape
    found += [
      vector.extract(register, dynamic_position=[], static_position=[i])
      for i in range(size)
    ]
  return found


class _Warp:
  """What a thread does for its row, and how the lanes of a warp tell others."""

  def __init__(self, bits, count):
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    self.bits, self.count = bits, count
    self.utils, self.arith, self.llvm = utils, arith, llvm
    self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    self.spot, self.bool = ir.IndexType.get(), ir.IntegerType.get_signless(1)
    thread = utils.thread_idx()
    self.lane = arith.andi(thread, self.number(31))
    warp = arith.shrui(thread, self.number(5))
    self.row = arith.andi(warp, self.number(3))

  def number(self, x):
    return self.utils.c(x, self.i32)

  def asm(self, type_, text, constraints, *operands):
    return self.llvm.inline_asm(type_, list(operands), text, constraints)

  def is_(self, relation, a, b):
    predicate = getattr(self.arith.CmpIPredicate, relation)
    return self.arith.cmpi(predicate, a, b)

  def below(self, a, b):
    return self.arith.cmpf(self.arith.CmpFPredicate.OLT, a, b)

  def loop(self, state, going, step):
    """`while going(*state): state = step(*state)`."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import scf

    types = [x.type for x in state]
    loop = scf.WhileOp(types, list(state))
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
      scf.condition(going(*before.arguments), list(before.arguments))
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
      scf.yield_(list(step(*after.arguments)))
    return list(loop.results)

  def shuffle(self, how, x, by):
    """x of another lane, and whether there is one."""
    clamp = "0" if how == "up" else "31"
    text = "{ .reg .pred p; "
    text += f"shfl.sync.{how}.b32 $0|p, $2, {by}, {clamp}, 0xffffffff; "
    text += "selp.b32 $1, 1, 0, p; }"
    pair = self.llvm.StructType.get_literal([self.i32, self.i32])
    found: Any = self.llvm.inline_asm(
      pair, [x], text, "=r,=r,r", has_side_effects=True
    )
    return [self.llvm.extractvalue(self.i32, found, [i]) for i in range(2)]

  def across(self, x, add):
    """A number of each lane, added up; the same in all lanes."""
    cast = x.type != self.i32
    for by in (16, 8, 4, 2, 1):
      raw = self.arith.bitcast(self.i32, x) if cast else x
      other, _ = self.shuffle("bfly", raw, by)
      x = add(x, self.arith.bitcast(x.type, other) if cast else other)
    return x

  def before(self, x):
    """What the numbers of the lanes before add up to."""
    total = x
    for by in (1, 2, 4, 8, 16):
      other, some = self.shuffle("up", total, by)
      total = self.arith.addi(total, self.arith.muli(other, some))
    return self.arith.subi(total, x)

  def sum_from(self, least):
    """The weights of all numbers that are not less."""
    text = "{ .reg .pred p; setp.ge.s32 p, $2, $3; mov.f32 $0, $1; "
    sums = [self.utils.c(0.0, self.f32)] * min(4, len(self.bits))
    for i, x in enumerate(self.bits):
      sums[i % len(sums)] = self.asm(
        self.f32,
        text + "@p add.f32 $0, $0, $4; }",
        "=f,f,r,r,f",
        sums[i % len(sums)],
        x,
        least,
        self.weight(x),
      )
    return self.across(_fold(self.arith.addf, sums), self.arith.addf)

  def weight(self, bits):
    if self.count:
      return self.utils.c(1.0, self.f32)
    return self.arith.bitcast(self.f32, bits)

  def between(self, target):
    """As `between`."""
    a = self.arith
    # Unsigned, -1 is more than any.
    low = self.across(_fold(a.minui, self.bits), a.minui)
    low = a.minui(low, self.number(2**31 - 1))
    top = self.across(_fold(a.maxsi, self.bits), a.maxsi)
    total = self.sum_from(low)
    short = self.below(total, target)
    high = a.select(short, low, a.addi(top, self.number(1)))
    have = a.select(short, total, self.utils.c(0.0, self.f32))

    def going(low, high, more, have):
      apart = self.is_("sgt", a.subi(high, low), self.number(1))
      least = a.mulf(self.weight(low), self.utils.c(_ONE, self.f32))
      one = self.below(a.subf(more, have), least)
      return a.andi(apart, a.xori(one, self.utils.c(1, self.bool)))

    def halve(low, high, more, have):
      half = a.shrui(a.subi(high, low), self.number(1))
      middle = a.addi(low, half)
      total = self.sum_from(middle)
      less = self.below(total, target)
      return (
        a.select(less, low, middle),
        a.select(less, middle, high),
        a.select(less, more, total),
        a.select(less, total, have),
      )

    low, high, _, have = self.loop((low, high, total, have), going, halve)
    return low, high, have

  def words(self, least):
    """Which of a lane's numbers are not less, as bits."""
    text = "{ .reg .pred p; setp.ge.s32 p, $2, $3; mov.b32 $0, $1; "
    found = []
    for first in range(0, len(self.bits), 32):
      word = self.number(0)
      for i, x in enumerate(self.bits[first : first + 32]):
        bit = f"@p or.b32 $0, $0, {1 << i:#x}; }}"
        word = self.asm(self.i32, text + bit, "=r,r,r,r", word, x, least)
      found.append(word)
    return found

  def counted(self, words):
    counts = [self.asm(self.i32, "popc.b32 $0, $1;", "=r,r", x) for x in words]
    return _fold(self.arith.addi, counts)

  def first(self, words, some):
    """The first `some` bits of words."""
    a, left, found = self.arith, some, []
    for word in words:

      def going(left, rest, kept):
        del kept
        some = self.is_("sgt", left, self.number(0))
        return a.andi(some, self.is_("ne", rest, self.number(0)))

      def take(left, rest, kept):
        less = a.andi(rest, a.subi(rest, self.number(1)))
        kept = a.ori(kept, a.xori(rest, less))
        return a.subi(left, self.number(1)), less, kept

      left, _, kept = self.loop((left, word, self.number(0)), going, take)
      found.append(kept)
    return found

  def below_word(self, place, i):
    """The bits of a word that stand for numbers of the lane before a place."""
    a, size = self.arith, min(len(self.bits) - 32 * i, 32)
    bits = a.subi(place, self.number(32 * i))
    bits = a.minsi(a.maxsi(bits, self.number(0)), self.number(size))
    # A shift by all of a word's bits gives none.
    return self.asm(
      self.i32,
      "{ .reg .b32 x; shl.b32 x, 0xffffffff, $1; not.b32 $0, x; }",
      "=r,r",
      bits,
    )

  def write(self, target, forced, ends, num_ref, index_ref):
    from jaxlib.mlir.dialects import memref

    a = self.arith
    low, high, have = self.between(target)
    sure, reached = self.words(high), self.words(low)
    equal = [a.xori(x, y) for x, y in zip(reached, sure, strict=True)]
    # Of those that are alike, as many as are wanted still.
    count = self.counted(equal)
    rank, weight = self.before(count), self.weight(low)

    def lacks(rank):
      part = a.mulf(weight, a.uitofp(self.f32, rank))
      return self.below(a.addf(have, part), target)

    end = a.addi(rank, count)
    (last,) = self.loop(
      (rank,),
      lambda x: a.andi(self.is_("slt", x, end), lacks(x)),
      lambda x: (a.addi(x, self.number(1)),),
    )
    equal = self.first(equal, a.subi(last, rank))
    own = a.muli(self.lane, self.number(len(self.bits)))
    forced, ends = a.subi(forced, own), a.subi(ends, own)
    some = self.below(self.utils.c(0.0, self.f32), target)
    after = a.addi(forced, self.number(1))
    kept = []
    for i, (x, y) in enumerate(zip(sure, equal, strict=True)):
      best = a.select(some, a.ori(x, y), self.number(0))
      one = a.xori(self.below_word(after, i), self.below_word(forced, i))
      kept.append(a.andi(a.ori(best, one), self.below_word(ends, i)))
    place = self.before(self.counted(kept))
    # What was written before by other lanes comes before what follows.
    self.utils.warp_barrier()

    def at(x):
      return a.index_castui(self.spot, x)

    for i, word in enumerate(kept):

      def put(place, rest, i=i):
        bit = self.asm(
          self.i32,
          "{ .reg .b32 x; brev.b32 x, $1; clz.b32 $0, x; }",
          "=r,r",
          rest,
        )
        column = a.addi(a.addi(own, self.number(32 * i)), bit)
        memref.store(column, index_ref, [at(self.row), at(place)])
        less = a.andi(rest, a.subi(rest, self.number(1)))
        return a.addi(place, self.number(1)), less

      place, _ = self.loop(
        (place, word),
        lambda _, rest: self.is_("ne", rest, self.number(0)),
        put,
      )
    # The last lane's end is the row's.
    with self.utils.when(self.is_("eq", self.lane, self.number(31))):
      memref.store(place, num_ref, [at(self.row)])


def _fold(add, numbers):
  """Added up in pairs."""
  while len(numbers) > 1:
    pairs = [numbers[i : i + 2] for i in range(0, len(numbers), 2)]
    numbers = [add(*x) if len(x) == 2 else x[0] for x in pairs]
  return numbers[0]
