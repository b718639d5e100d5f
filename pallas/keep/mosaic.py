"""The best of each row on Hopper: a row is read once, and stays in a warp.

A lane holds a few numbers of its warp's row in registers. The bits of floats
that are not negative rise with their values: the least value kept is found bit
by bit, by a sum over the row for each, which takes shuffles and no memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Num

from isthmus.pallas.compat import interpreting
from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.keep.api import Options

#: The longest row that a warp's registers hold, and what is added at a time.
MOST, STEP = 4096, 128
#: Rows of a warpgroup.
ROWS = 4
_LOG2E = math.log2(math.e)


def keep(
  x: Float[Array, "*#lead m"],
  target: Num[Array, "*#lead"],
  limit: Int32[Array, "*#lead"],
  *,
  options: Options,
) -> Bool[Array, "*lead m"]:
  """As `isthmus.pallas.keep.ref.keep`, but for the order of sums.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 8, 300), jnp.float32)
    >>> rows = jnp.zeros((2, 8), jnp.int32)
    >>> run = lambda x: keep(x, rows, rows, options=Options("value"))
    >>> jax.eval_shape(run, x).shape
    (2, 8, 300)
  """
  m = x.shape[-1]
  lead = jnp.broadcast_shapes(x.shape[:-1], jnp.shape(target), limit.shape)
  rows, own = math.prod(lead), x.shape[:-1]
  if own != lead and (own[-1:] != lead[-1:] or lead[-1] % ROWS):
    # Rows of a warpgroup lie side by side.
    x, own = jnp.broadcast_to(x, (*lead, m)), lead
  ends = (0, -rows % ROWS)

  def flat(z, dtype):
    return jnp.pad(jnp.broadcast_to(z, lead).reshape(-1).astype(dtype), ends)

  x = x.reshape(-1, m).astype(jnp.float32)
  x = jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, -m % STEP)))
  starts = jnp.arange(math.prod(own), dtype=jnp.int32).reshape(own)
  starts = flat(starts, jnp.int32)[::ROWS]
  found = _rows(
    x,
    flat(target, jnp.float32),
    flat(jnp.minimum(limit, m), jnp.int32),
    starts,
    weigh=options.weigh,
  )
  return found[:rows, :m].reshape(*lead, m) != 0


def refuse(x: Any, target: Any, limit: Any, *, options: Options) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((4, 128), jnp.float32)
    >>> refuse(x, None, None, options=Options("one"))  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  del target, limit, options
  reason = refuse_machine()
  if reason is not None:
    return reason
  if x.shape[-1] > MOST:
    return f"it takes rows of up to {MOST}, not {x.shape[-1]}"
  if not x.size:
    return f"it takes no empty arrays: {x.shape}"
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"it takes float32 and shorter, not {x.dtype}"
  return None


@functools.partial(jax.jit, static_argnames="weigh")  # lowered once a model
def _rows(x, target, limit, starts, *, weigh):
  """1 where a number is kept, else 0.

  Args:
    x: float32 [r m]; r is a multiple of ROWS, m of STEP.
    target, limit: [rows], a multiple of ROWS.
    starts: int32 [rows / ROWS], the first of ROWS rows of x.
    weigh: of `Options`.

  Returns:
    uint8 [rows m].
  """
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  rows, m = target.shape[0], x.shape[1]
  shape = (ROWS, m)
  word = STEP // 32
  layout = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, STEP), (word,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
  )
  bits_of, value_of = _bitcasts(plgpu, shape, layout)

  def body(
    x_ref: Any, target_ref: Any, limit_ref: Any, starts: Any, o_ref: Any
  ):
    item = jax.lax.axis_index("item")
    at = pl.ds(item * ROWS, ROWS)

    def load(ref: Any, at: Any, layout: Any):
      return plgpu.load(ref.at[at], layout=layout, optimized=False)

    def wide(row: Any):
      return jax.lax.broadcast_in_dim(row, shape, [0])

    def within(z: Any, other: Any):
      return jnp.where(allowed, z, other)

    x = load(x_ref, pl.ds(starts[item], ROWS), layout)
    target = load(target_ref, at, layout.reduce(1))
    place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    allowed = place < wide(load(limit_ref, at, layout.reduce(1)))
    if weigh == "softmax":
      x = within(x, -3e38)
      x = within(jnp.exp2((x - wide(x.max(axis=1))) * _LOG2E), 0.0)
      target = target * x.sum(axis=1)
    # Those of -0 are a negative number's; those of no candidate reach no bits
    # that are looked for. Values are the same registers, read as floats.
    bits = within(jnp.maximum(bits_of(x), 0), -1)
    weight = 1.0 if weigh == "one" else value_of(bits)

    def sum_of(these: Any):
      return jnp.where(these, weight, 0.0).sum(axis=1)

    def enough(least: Any):
      return sum_of(bits >= wide(least)) >= target

    least = _largest(enough, target, 31)
    # Of those at the least value, as many as are wanted still.
    above, equal = bits > wide(least), bits == wide(least)
    have = sum_of(above)

    def lacking(end: Any):
      return have + sum_of(equal & (place < wide(end))) < target

    end = _largest(lacking, target, m.bit_length())
    kept = above | (equal & (place <= wide(end)))
    kept = kept & (wide(target) > 0)
    o_ref[at] = kept.astype(jnp.uint8)

  (found,) = plgpu.kernel(
    body,
    out_type=(jax.ShapeDtypeStruct((rows, m), jnp.uint8),),
    grid=(rows // ROWS,),
    grid_names=("item",),
    kernel_name="keep",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      # Warps don't wait for each other: each has a row of its own.
      unsafe_no_auto_barriers=True,
    ),
  )(x, target, limit, starts)
  return found


def _largest(holds: Any, like: Any, bits: int):
  """The largest number of so many bits that `holds`, by row."""

  def settle(_, carry):
    least, step = carry
    more = least + step
    least = jnp.where(holds(more), more, least)
    return least, jax.lax.shift_right_logical(step, jnp.int32(1))

  least, step = jnp.zeros_like(like, jnp.int32), jnp.int32(2 ** (bits - 1))
  return jax.lax.fori_loop(0, bits, settle, (least, step))[0]


def _bitcasts(plgpu: Any, shape: tuple[int, int], layout: Any) -> Any:
  """float32 -> the same bits as int32, and back."""
  if interpreting():
    cast = jax.lax.bitcast_convert_type
    return lambda x: cast(x, jnp.int32), lambda x: cast(x, jnp.float32)

  def into(dtype: Any):
    wide = plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=wide)
    def cast(ctx: Any, x: Any):
      from jaxlib.mlir import ir

      del ctx
      if dtype == jnp.int32:
        integer = ir.IntegerType.get_signless(32)
        return x.bitcast(integer, output_is_signed=True)
      return x.bitcast(ir.F32Type.get())

    return cast

  return into(jnp.int32), into(jnp.float32)
