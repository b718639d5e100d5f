"""What a kernel can pool beside something else."""

from typing import Any

import jax.numpy as jnp

#: Tokens of a block.
BLOCK = 128


def refuse(x: Any) -> str | None:
  """Why a kernel can't pool the blocks of x on the way, or None.

  Args:
    x: [b t n d], or its shape and dtype.

  Example:
    >>> refuse(jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.float16)) is None
    True
    >>> refuse(jax.ShapeDtypeStruct((1, 256, 2, 96), jnp.float16))
    'it pools widths of 64 and 128, not 96'
  """
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it pools bfloat16 and float16, not {x.dtype}"
  if x.shape[3] not in (64, 128):
    return f"it pools widths of 64 and 128, not {x.shape[3]}"
  if x.shape[1] < BLOCK or not x.size:
    return f"there is no whole block in {x.shape}"
  return None
