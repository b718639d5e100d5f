"""Reduced scores on Hopper: the Mosaic GPU kernel behind the common call."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.scores.api import Options, offset

#: The widths that the kernel is compiled for; others are padded with zeros.
WIDTHS = (64, 128, 192, 256)
_LOG2E = 1.4426950408889634


def reduce_scores(
  x: Float[Array, "b r h d"],
  y: Float[Array, "b c g d"],
  lse: Float[Array, "b n s"],
  *,
  options: Options,
) -> Float[Array, "b n m r"]:
  """As `isthmus.pallas.scores.ref.reduce_scores`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 100, 2, 40), jnp.bfloat16)
    >>> lse = jax.ShapeDtypeStruct((1, 2, 100), jnp.float32)
    >>> run = lambda x, lse: reduce_scores(x, x, lse, options=Options(32))
    >>> jax.eval_shape(run, x, lse).shape
    (1, 2, 4, 100)
  """
  from isthmus.pallas.flash.tile import ROWS
  from isthmus.pallas.scores.mosaic_reduce import TILE, reduce_tiles

  r, c, side = x.shape[1], y.shape[1], options.side
  by_row = options.queries == "rows"
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * _LOG2E)
  short = -r % ROWS if by_row else -c % TILE
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, short)), constant_values=jnp.inf)
  width = next(x_ for x_ in WIDTHS if x_ >= x.shape[3])

  def padded(z, size):
    ends = ((0, 0), (0, -z.shape[1] % size), (0, 0), (0, width - z.shape[3]))
    return jnp.pad(z, ends)

  found = reduce_tiles(
    padded(x, ROWS),
    padded(y, TILE),
    lse.astype(jnp.float32),
    lengths=(r, c),
    options=options,
  )[:, :, : -(-c // side), :r]
  if options.causal and by_row:
    # What no query of a tile sees was not written.
    first = jnp.arange(found.shape[2], dtype=jnp.int32)[:, None] * side
    row = jnp.arange(r, dtype=jnp.int32) + offset(r, c, options)
    found = jnp.where(first <= row, found, 0.0)
  return found


def refuse(x, y, lse, *, options: Options) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> refuse(x, x, None, options=Options(32))  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  reason = refuse_machine()
  if reason is not None:
    return reason
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {x.dtype}"
  if options.side % 8:
    return f"it takes sides of multiples of 8, not {options.side}"
  if x.shape[3] > WIDTHS[-1]:
    return f"it takes widths up to {WIDTHS[-1]}, not {x.shape[3]}"
  if min(x.size, y.size) == 0:
    return f"it takes no empty arrays: {x.shape}, {y.shape}"
  return None
