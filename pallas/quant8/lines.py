"""Arrays as kernels have them: a block a line, as it lies in memory."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from isthmus.pallas.quant8.api import QTensor


def refuse_lines(g: Any, m: QTensor, p: Any = None) -> str | None:
  """Why a step's arrays can't be read line by line, or None.

  Args:
    g, m, p: of `isthmus.pallas.quant8.step.adam`.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> refuse_lines(jnp.ones((8, 300)), zeros((8, 300)))
    'it takes whole blocks of 256, not 300 numbers'
  """
  kinds = (jnp.float32, jnp.bfloat16, jnp.float16)
  for name, x in (("gradients", g), ("parameters", p)):
    if x is not None and x.dtype not in kinds:
      return f"it takes {name} of float32, bfloat16 and float16, not {x.dtype}"
  if m.axis not in (None, -1):
    return f"it takes blocks along the last axis, not {m.axis}"
  length = g.size if m.axis is None else g.shape[-1]
  if length % m.block:
    return f"it takes whole blocks of {m.block}, not {length} numbers"
  return None


def line_by_line(x: Shaped[Array, "..."], block: int) -> Shaped[Array, "l b"]:
  """An array of whole blocks, one a line.

  Example:
    >>> line_by_line(jnp.arange(8).reshape(2, 4), 2).tolist()
    [[0, 1], [2, 3], [4, 5], [6, 7]]
  """
  return x.reshape(-1, block)


def with_parts(
  q: QTensor, codes: Shaped[Array, "..."], absmax: Shaped[Array, "..."]
) -> QTensor:
  """`q` of other codes and scales, given line by line.

  Example:
    >>> from isthmus.pallas.quant8.api import zeros
    >>> q = zeros((2, 4), block=2)
    >>> with_parts(q, jnp.zeros((4, 2), jnp.uint8), jnp.ones(4)).absmax.shape
    (2, 2)
  """
  return QTensor(
    codes.reshape(q.shape),
    absmax.reshape(q.blocks.scales),
    q.map,
    q.block,
    q.axis,
    q.dtype,
  )
