"""A step of Adam over moments in eight bits, for sm_90 in Mosaic GPU.

A warp takes a block, a lane a few numbers of it that lie side by side: it
reads codes, gradients and parameters, brings the moments up to date, takes
the step, finds the block's largest magnitudes by shuffles, and writes codes
and parameters where it read them, each once: of donated ones nothing is
copied. A step is a matter of bytes only while each number takes few
instructions: codes are looked up in a table that stays in the cache, and found
by the quick encoder, see `isthmus.pallas.quant8.codec`, so that a number as
near to one value as to the next may take another code than in XLA.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.pallas.compat import interpreting
from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.quant8.api import QTensor
from isthmus.pallas.quant8.codec import decode, encode
from isthmus.pallas.quant8.lines import (
  line_by_line,
  refuse_lines,
  with_parts,
)
from isthmus.pallas.quant8.maps import Map, table
from isthmus.pallas.quant8.ref import Move, Rates, moved

#: Blocks that the kernel is compiled for; of longer ones, a lane's numbers
#: don't fit its registers.
BLOCKS = (128, 256, 512, 1024)
#: Numbers of a warpgroup: 16 of each array in a thread's registers.
TILE = 2048
#: Numbers that a thread reads at once, of long enough blocks.
WORD = 4
#: Whether codes are looked up, or read by arithmetic.
LOOKUP = True


def adam(
  g: Float[Array, "..."],
  m: QTensor,
  v: QTensor,
  rates: Rates,
  p: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "..."], QTensor, QTensor]:
  """One step; see `isthmus.pallas.quant8.step.adam`.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> from isthmus.pallas.quant8.ref import rates
    >>> g, m = jnp.ones((16, 512)), zeros((16, 512))
    >>> u, *_ = jax.eval_shape(lambda g, m: adam(g, m, m, rates(1)), g, m)
    >>> u.shape
    (16, 512)
  """
  block, lines = m.block, g.size // m.block
  factors = jnp.stack([jnp.asarray(x, jnp.float32) for x in _factors(rates)])
  out, m1, ma, v1, va = _lines(
    factors,
    line_by_line(g, block),
    (line_by_line(m.codes, block), m.absmax.reshape(lines)),
    (line_by_line(v.codes, block), v.absmax.reshape(lines)),
    None if p is None else line_by_line(p, block),
    maps=(m.map, v.map),
    looked=LOOKUP,
  )
  return out.reshape(g.shape), with_parts(m, m1, ma), with_parts(v, v1, va)


# Parameters of one size are many: the kernel is traced and lowered once.
@functools.partial(jax.jit, static_argnames=("maps", "looked"))
def _lines(factors, g, m, v, p, *, maps, looked):
  """The step of lines, each a block.

  Args:
    factors: float32, the `Factors`.
    g: [lines block].
    m, v: codes [lines block] and scales [lines].
    p: as g, or None.
    maps: of the first and the second moment.
    looked: `LOOKUP`.

  Returns:
    p or the updates, codes and scales of m, and of v.
  """
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  lines, block = g.shape
  m_map, v_map = maps
  rows, layout = _rows(block), _layout(plgpu, block)
  tables = [jnp.asarray(_values(table(map), map)) for map in maps]
  read, inverse = _functions(plgpu, (rows, block), layout, looked)
  # Written where they are read: the moments and, if given, the parameters.
  refs = [jax.new_ref(x) for x in (*m, *v, *([] if p is None else [p]))]

  def body(
    factors_ref: Any, m_table: Any, v_table: Any, g_ref: Any, *refs: Any
  ):
    m_ref, ma_ref, v_ref, va_ref, out_ref = refs  # the last is of p, or of u
    at = pl.ds(jax.lax.axis_index("item") * rows, rows)

    def load(ref: Any, layout: Any):
      return plgpu.load(ref.at[at], layout=layout, optimized=False)

    def wide(scale: Any):
      return jax.lax.broadcast_in_dim(scale, (rows, block), [0])

    # All that comes from afar is asked for before any of it is needed.
    g, m_codes, v_codes = (load(x, layout) for x in (g_ref, m_ref, v_ref))
    m_scale, v_scale = (load(x, layout.reduce(1)) for x in (ma_ref, va_ref))
    old = None if p is None else load(out_ref, layout)
    by = Factors(*(factors_ref[i] for i in range(len(Factors._fields))))
    _hold(plgpu)

    g = g.astype(jnp.float32)
    m1 = read(m_codes, m_table, m_map) * wide(by.m * m_scale) + by.g * g
    v_scale = by.v * (jnp.square(v_scale) if v_map.root else v_scale)
    v1 = read(v_codes, v_table, v_map) * wide(v_scale) + by.square * g * g
    root = jnp.sqrt(v1)
    u = m1 * inverse(by.root * root + by.eps)
    if old is not None:
      u = moved(old, u, Move(by.learning_rate, by.weight_decay))
    out_ref[at] = u
    for x, map, codes_ref, scale_ref in (
      (m1, m_map, m_ref, ma_ref),
      (root if v_map.root else v1, v_map, v_ref, va_ref),
    ):
      scale = (jnp.abs(x) if map.signed else x).max(axis=1)
      # Its square is the inverse; a division is a call.
      part = jax.lax.rsqrt(jnp.where(scale > 0, scale, 1.0))
      codes = encode(x * wide(part * part), map, exact=False)
      codes_ref[at] = codes.astype(jnp.uint8)
      _store(plgpu, scale_ref.at[at], scale)

  out = jax.ShapeDtypeStruct((lines, block), jnp.float32)
  kernel = plgpu.kernel(
    body,
    out_type=() if p is not None else (out,),
    grid=(lines // rows,),
    grid_names=("item",),
    kernel_name="adam8bit",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      # Warps don't wait for each other: what one writes, it alone has read.
      unsafe_no_auto_barriers=True,
    ),
  )
  outs = kernel(factors, *tables, g, *refs)
  out = outs[0] if p is None else jax.freeze(refs[4])
  return (out, *(jax.freeze(x) for x in refs[:4]))


def refuse(
  g: Any, m: QTensor, v: QTensor, rates: Any, p: Any = None
) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> m = zeros((16, 512))
    >>> refuse(jnp.ones((16, 512)), m, m, None)  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  del v, rates
  reason = refuse_machine()
  if reason is not None:
    return reason
  if m.block not in BLOCKS:
    return f"it takes blocks of {BLOCKS}, not {m.block}"
  reason = refuse_lines(g, m, p)
  if reason is not None:
    return reason
  rows = _rows(m.block)
  if not g.size or g.size // m.block % rows:
    return (
      f"it takes blocks of {m.block} by {rows}, not {g.size // m.block} of them"
    )
  return None


class Factors(NamedTuple):
  """`Rates` as the kernel multiplies by them, so that it does so less often.

  Attributes:
    m, v: of the old moments.
    g, square: of the gradient and its square in the new ones.
    root, eps: of the second moment's root, and what is added: the new first
      moment over the sum is the direction.
    learning_rate, weight_decay: of `Rates`.

  Example:
    >>> Factors._fields[:2]
    ('m', 'v')
  """

  m: Any
  v: Any
  g: Any
  square: Any
  root: Any
  eps: Any
  learning_rate: Any
  weight_decay: Any


def _factors(rates: Rates) -> Factors:
  return Factors(
    rates.b1,
    rates.b2,
    (1 - rates.b1) * rates.clip,
    (1 - rates.b2) * jnp.square(rates.clip),
    rates.scale2 / rates.scale1,
    rates.eps / rates.scale1,
    rates.learning_rate,
    rates.weight_decay,
  )


def _rows(block: int) -> int:
  """Blocks of a warpgroup."""
  return max(TILE // block, 4)


def _layout(plgpu: Any, block: int) -> Any:
  """Rows over warps, and runs of numbers of a row over lanes."""
  word = min(WORD, block // 32)
  return plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32 * word), (word,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
  )


def _values(x: Any, map: Map) -> Any:
  """What values of a map stand for, before the scale."""
  return x * x if map.root else x


def _store(plgpu: Any, ref: Any, x: Any) -> None:
  """Stores less than whole sectors of memory, which jax asks for from 0.12."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, x, optimized=False)
  else:
    ref[...] = x


def _hold(plgpu: Any) -> None:
  """Keeps compilers from moving loads down to where they are needed."""
  if interpreting():
    return

  @plgpu.inline_mgpu()
  def barrier(ctx: Any):
    from jax.experimental.mosaic.gpu import utils

    del ctx
    utils.warp_barrier()

  barrier()


def _functions(
  plgpu: Any, shape: tuple[int, int], layout: Any, looked: bool
) -> Any:
  """(codes, table, map) -> values; x -> 1 / x; as one instruction each."""
  import jax.experimental.mosaic.gpu as mgpu

  def read(codes: Any, table: Any, map: Any):
    del table
    return _values(decode(codes.astype(jnp.int32), map), map)

  if interpreting():
    return read, jnp.reciprocal
  wide = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

  def mapped(x: Any, f: Any):
    registers = np.empty(x.registers.shape, object)
    for at, register in np.ndenumerate(x.registers):
      registers[at] = _each(register, f)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=x.layout, _is_signed=None
    )

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=wide)
  def looked_up(ctx: Any, codes: Any, table: Any):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    del ctx
    index = ir.IndexType.get()
    return mapped(
      codes, lambda x: memref.load(table, [arith.index_castui(index, x)])
    )

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=wide)
  def inverse(ctx: Any, x: Any):
    from jaxlib.mlir.dialects import llvm

    del ctx
    return mapped(
      x,
      lambda x: llvm.inline_asm(
        x.type, [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f"
      ),
    )

  if looked:
    return lambda codes, table, map: looked_up(codes, table), inverse
  return read, inverse


def _each(register: Any, f: Any) -> Any:
  """A register of float32: f of each number of a register."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import vector

  (count,) = ir.VectorType(register.type).shape
  numbers = [
    f(vector.extract(register, dynamic_position=[], static_position=[i]))
    for i in range(count)
  ]
  return vector.from_elements(
    ir.VectorType.get((count,), ir.F32Type.get()), numbers
  )
