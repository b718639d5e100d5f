"""A step of Adam over moments in eight bits, for sm_90 in Mosaic GPU.

A warp takes a block, a lane a few numbers of it that lie side by side: it
reads codes, gradients and parameters, brings the moments up to date, takes
the step, finds the block's largest magnitudes by shuffles, and writes codes
and parameters where it read them, each once: of donated ones nothing is
copied. There is no table: gathers from registers don't
exist, and codes are found by arithmetic, see `isthmus.pallas.quant8.codec`,
by the quick encoder, so that a number as near to one value as to the next may
take another code than in XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.quant8.api import QTensor, values
from isthmus.pallas.quant8.codec import encode
from isthmus.pallas.quant8.lines import (
  line_by_line,
  refuse_lines,
  with_parts,
)
from isthmus.pallas.quant8.ref import Rates, direction, moved

#: Blocks that the kernel is compiled for; of longer ones, a lane's numbers
#: don't fit its registers.
BLOCKS = (128, 256, 512, 1024)
#: Numbers of a warpgroup: 16 of each array in a thread's registers.
TILE = 2048
#: Numbers that a thread reads at once.
WORD = 4


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
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  block, rows = m.block, _rows(m.block)
  lines = g.size // block
  layout = _layout(plgpu)
  numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in rates])

  # Written where they are read: the moments and, if given, the parameters.
  held = [line_by_line(m.codes, block), m.absmax.reshape(lines)]
  held += [line_by_line(v.codes, block), v.absmax.reshape(lines)]
  held += [] if p is None else [line_by_line(p, block)]
  refs = [jax.new_ref(x) for x in held]

  def body(numbers_ref: Any, g_ref: Any, *refs: Any):
    m_ref, ma_ref, v_ref, va_ref, out_ref = refs  # the last is of p, or of u
    at = pl.ds(jax.lax.axis_index("item") * rows, rows)
    rates = Rates(*(numbers_ref[i] for i in range(len(Rates._fields))))

    def load(ref: Any, layout: Any):
      return plgpu.load(ref.at[at], layout=layout, optimized=False)

    def wide(scale: Any):
      return jax.lax.broadcast_in_dim(scale, (rows, block), [0])

    def moment(codes_ref: Any, scale_ref: Any, map: Any):
      codes = load(codes_ref, layout).astype(jnp.int32)
      return values(codes, wide(load(scale_ref, layout.reduce(1))), map)

    grad = load(g_ref, layout).astype(jnp.float32)
    u, m1, v1 = direction(
      grad, moment(m_ref, ma_ref, m.map), moment(v_ref, va_ref, v.map), rates
    )
    if p is not None:
      u = moved(load(out_ref, layout), u, rates)
    out_ref[at] = u
    for x, map, codes_ref, scale_ref in (
      (m1, m.map, m_ref, ma_ref),
      (v1, v.map, v_ref, va_ref),
    ):
      x = jnp.sqrt(x) if map.root else x
      scale = (jnp.abs(x) if map.signed else x).max(axis=1)
      inverse = 1 / jnp.where(scale > 0, scale, 1.0)
      codes = encode(x * wide(inverse), map, exact=False)
      codes_ref[at] = codes.astype(jnp.uint8)
      scale_ref[at] = scale

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
    ),
  )
  outs = kernel(numbers, line_by_line(g, block), *refs)
  m1, ma, v1, va, *rest = (jax.freeze(x) for x in refs)
  out = (*rest, *outs)[0]
  return out.reshape(g.shape), with_parts(m, m1, ma), with_parts(v, v1, va)


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


def _rows(block: int) -> int:
  """Blocks of a warpgroup."""
  return max(TILE // block, 4)


def _layout(plgpu: Any) -> Any:
  """Rows over warps, and runs of WORD numbers of a row over lanes."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32 * WORD), (WORD,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
  )
