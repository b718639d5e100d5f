"""A step of Adam over moments in eight bits, for TPUs in Pallas.

A program takes some lines of one block each: it reads codes, scales,
gradients and parameters, brings the moments up to date, takes the step, and
writes codes, scales and parameters where it read them, each once. Codes are
found by arithmetic, see `isthmus.pallas.quant8.codec`, for there is no quick
gather of 256 numbers. Interpreted on CPUs and lowered for TPUs; not run on one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.compat import interpreting
from isthmus.pallas.dispatch import platform
from isthmus.pallas.quant8.api import QTensor, to_codes, values
from isthmus.pallas.quant8.lines import (
  line_by_line,
  refuse_lines,
  with_parts,
)
from isthmus.pallas.quant8.ref import Rates, direction, moved

#: Lanes of a register: blocks are multiples of it.
LANES = 128
#: The longest block; of longer ones, 32 lines don't fit a core's memory.
LONGEST = 4096
#: Numbers of a program, in lines of at least 32, which a register of bytes has.
TILE, LINES = 1 << 16, 32


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
  import jax.experimental.pallas.tpu as pltpu

  block, lines = m.block, g.size // m.block
  rows = max(TILE // block, LINES)
  numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in rates])
  line = pl.BlockSpec((rows, block), lambda i: (i, 0))
  scale = pl.BlockSpec((rows, 1), lambda i: (i, 0))
  held = [line_by_line(m.codes, block), m.absmax.reshape(lines, 1)]
  held += [line_by_line(v.codes, block), v.absmax.reshape(lines, 1)]
  held += [] if p is None else [line_by_line(p, block)]
  given = [numbers, line_by_line(g, block), *held]

  def body(numbers_ref: Any, g_ref: Any, *refs: Any):
    m_ref, ma_ref, v_ref, va_ref, *p_ref = refs[:-5]  # the last one if given
    m_out, ma_out, v_out, va_out, out = refs[-5:]
    rates = Rates(*(numbers_ref[i] for i in range(len(Rates._fields))))

    def moment(codes: Any, scale: Any, map: Any):
      return values(codes[...].astype(jnp.int32), scale[...], map)

    u, m1, v1 = direction(
      g_ref[...].astype(jnp.float32),
      moment(m_ref, ma_ref, m.map),
      moment(v_ref, va_ref, v.map),
      rates,
    )
    out[...] = moved(p_ref[0][...], u, rates) if p_ref else u
    for x, map, codes_out, scale_out in (
      (m1, m.map, m_out, ma_out),
      (v1, v.map, v_out, va_out),
    ):
      codes, scale = to_codes(x, map, inner=1, exact=False)
      codes_out[...] = codes.astype(jnp.uint8)
      scale_out[...] = scale

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held[:4]]
  wide = jnp.float32 if p is None else p.dtype
  shapes.append(jax.ShapeDtypeStruct((lines, block), wide))
  m1, ma, v1, va, out = pl.pallas_call(
    body,
    out_shape=shapes,
    grid=(pl.cdiv(lines, rows),),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      *(line, line, scale, line, scale, line)[: len(given) - 1],
    ],
    out_specs=[line, scale, line, scale, line],
    # Written where they are read: what was donated isn't copied.
    input_output_aliases={i + 2: i for i in range(len(held))},
    interpret=interpreting("tpu"),
    name="adam8bit",
  )(*given)
  return out.reshape(g.shape), with_parts(m, m1, ma), with_parts(v, v1, va)


def refuse(
  g: Any, m: QTensor, v: QTensor, rates: Any, p: Any = None
) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> m = zeros((16, 512))
    >>> refuse(jnp.ones((16, 512)), m, m, None)  # on a CPU
    'it needs a TPU, and the platform is cpu'
  """
  del v, rates
  if platform() != "tpu" and not interpreting("tpu"):
    return f"it needs a TPU, and the platform is {platform()}"
  if m.block % LANES or m.block > LONGEST:
    return (
      f"it takes blocks of multiples of {LANES} up to {LONGEST}, not {m.block}"
    )
  reason = refuse_lines(g, m, p)
  if reason is None and not g.size:
    return "it takes no empty arrays"
  return reason
