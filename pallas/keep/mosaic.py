"""The best of each row on Hopper: a row is read once, and stays in a warp.

A lane holds neighbours of its warp's row in registers, as bits: those of floats
that are not negative rise with their values. Of a row of which only a start may
be kept, no more than that is looked at.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Num

from isthmus.pallas.compat import interpreting
from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.keep.api import Options
from isthmus.pallas.keep.mosaic_list import write

#: The longest row that a warp's registers hold, and what is added at a time.
MOST, STEP = 4096, 128
#: Rows of a warpgroup, and the parts of a row that are left out or looked at.
ROWS, PARTS = 4, 4
_SIZES = range(1, PARTS + 1)
_LOG2E = math.log2(math.e)


def keep(
  x: Float[Array, "*#lead m"],
  target: Num[Array | np.ndarray, "*#lead"],
  limit: Int32[Array | np.ndarray, "*#lead"],
  forced: Int32[Array | np.ndarray, "*#lead"],
  ends: Int32[Array | np.ndarray, "*#lead"],
  *,
  options: Options,
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead m"]]:
  """As `isthmus.pallas.keep.ref.keep`; past the number there are zeros.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 8, 300), jnp.float32)
    >>> rows = jnp.zeros((2, 8), jnp.int32)
    >>> run = lambda x: keep(x, *(rows,) * 4, options=Options("value"))
    >>> [found.shape for found in jax.eval_shape(run, x)]
    [(2, 8), (2, 8, 300)]
  """
  m, own = x.shape[-1], x.shape[:-1]
  limit = _least(limit, m)
  given = target, limit, forced, _least(ends, limit)
  lead = jnp.broadcast_shapes(own, *map(jnp.shape, given))
  rows = math.prod(lead)
  if own != lead and (own[-1:] != lead[-1:] or lead[-1] % ROWS):
    # Rows of a warpgroup lie side by side.
    x, own = jnp.broadcast_to(x, (*lead, m)), lead

  def flat(z, dtype=jnp.int32):
    space = _space(z)
    z = space.broadcast_to(z, lead).reshape(-1).astype(dtype)
    return space.pad(z, (0, -rows % ROWS))

  x = x.reshape(-1, m).astype(jnp.float32)
  x = jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, -m % STEP)))
  starts = np.arange(math.prod(own), dtype=np.int32).reshape(own)
  limits = flat(limit)
  num, index = _rows(
    x,
    flat(starts)[::ROWS],
    limits.reshape(-1, ROWS).max(axis=1),
    flat(target, jnp.float32),
    limits,
    *map(flat, given[2:]),
    weigh=options.weigh,
  )
  return num[:rows].reshape(lead), index[:rows, :m].reshape(*lead, m)


def refuse(x: Any, *_: Any, options: Options) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((4, 128), jnp.float32)
    >>> refuse(x, options=Options("one"))  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  del options
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
def _rows(x, starts, need, target, limit, forced, ends, *, weigh):
  """(num, index) of rows, see `keep`.

  Args:
    x: float32 [r m]; r is a multiple of ROWS, m of STEP.
    starts: int32 [rows / ROWS], the first of ROWS rows of x.
    need: int32 [rows / ROWS], how far ROWS rows are looked at.
    target: float32 [rows], a multiple of ROWS.
    limit, forced, ends: int32 [rows].
    weigh: of `Options`.

  Returns:
    int32 [rows] and [rows m].
  """
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  rows, m = target.shape[0], x.shape[1]
  widths = sorted({-(-m * i // (PARTS * STEP)) * STEP for i in _SIZES})

  def body(x_ref: Any, starts: Any, need: Any, *refs: Any):
    *row_refs, num_ref, index_ref = refs
    item = jax.lax.axis_index("item")
    at = pl.ds(item * ROWS, ROWS)
    zeros = jnp.zeros((ROWS, m), jnp.int32)
    index_ref[at] = plgpu.layout_cast(zeros, _layout(plgpu, STEP))
    for low, width in zip((-1, *widths), widths, strict=False):

      @pl.when((need[item] > low) & (need[item] <= width))
      def _(width=width):
        start = pl.ds(0, width)
        _settle(
          plgpu,
          weigh,
          x_ref.at[pl.ds(starts[item], ROWS), start],
          [ref.at[at] for ref in row_refs],
          num_ref.at[at],
          index_ref.at[at, start],
        )

  return plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((rows,), jnp.int32),
      jax.ShapeDtypeStruct((rows, m), jnp.int32),
    ),
    grid=(rows // ROWS,),
    grid_names=("item",),
    kernel_name="keep",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      # Warps don't wait for each other: each has a row of its own.
      unsafe_no_auto_barriers=True,
    ),
  )(x, starts, need, target, limit, forced, ends)


def _space(*arrays: Any) -> Any:
  """numpy for arrays of numpy, which stay constants, or jax.numpy."""
  constants = (np.ndarray, np.generic, int)
  return np if all(isinstance(x, constants) for x in arrays) else jnp


def _least(a: Any, b: Any) -> Any:
  return _space(a, b).minimum(a, b)


def _layout(plgpu: Any, width: int) -> Any:
  """Of rows of a warpgroup: one a warp, neighbours in a lane, by fours."""
  lanes, vector = ((ROWS, width), (width // 32,)), (4,)
  whole = width == STEP  # a lane's part is a vector
  return plgpu.Layout.TILED(
    plgpu.Tiling(lanes if whole else (*lanes, vector)),
    warp_dims=(-3 if whole else -4,),
    lane_dims=(-2 if whole else -3,),
    vector_dim=-1,
  )


def _settle(plgpu, weigh, x_ref, row_refs, num_ref, index_ref) -> None:
  """The rows of a warpgroup, as far as the refs go."""
  shape = index_ref.shape
  layout = _layout(plgpu, shape[1])

  def load(ref: Any, layout: Any):
    return plgpu.load(ref, layout=layout, optimized=False)

  def wide(row: Any):
    return jax.lax.broadcast_in_dim(row, shape, [0])

  def within(z: Any, other: Any):
    return jnp.where(allowed, z, other)

  x = load(x_ref, layout)
  target, limit, *more = (load(ref, layout.reduce(1)) for ref in row_refs)
  place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
  allowed = place < wide(limit)
  if weigh == "softmax":
    x = within(x, -3e38)
    x = within(jnp.exp2((x - wide(x.max(axis=1))) * _LOG2E), 0.0)
    target = target * x.sum(axis=1)
  # Those of -0 are a negative number's.
  bits = within(jnp.maximum(_bits(plgpu, x, layout), 0), -1)
  count = weigh == "one"
  write(plgpu, layout, bits, target, *more, num_ref, index_ref, count=count)


def _bits(plgpu: Any, x: Any, layout: Any) -> Any:
  """float32 -> the same bits as int32."""
  if interpreting():
    return jax.lax.bitcast_convert_type(x, jnp.int32)
  wide = plgpu.ShapeDtypeStruct(x.shape, jnp.int32, layout=layout)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=wide)
  def cast(ctx: Any, x: Any):
    from jaxlib.mlir import ir

    del ctx
    integer = ir.IntegerType.get_signless(32)
    return x.bitcast(integer, output_is_signed=True)

  return cast(x)
