"""Reduced logits on Hopper: the Mosaic GPU kernel behind the common call."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.hopper import padded, refuse_arrays, refuse_machine
from isthmus.pallas.pool import api as pool
from isthmus.pallas.pool.api import BLOCK
from isthmus.pallas.pool.ref import pool_blocks
from isthmus.pallas.scores.api import Options


def reduce_logits(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  options: Options,
  tokens: Float[Array, "b T n e"] | None = None,
) -> tuple[Any, ...]:
  """As `isthmus.pallas.scores.ref.reduce_logits`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 100, 2, 40), jnp.bfloat16)
    >>> run = lambda x: reduce_logits(x, x, options=Options(32))
    >>> [y.shape for y in jax.eval_shape(run, x)]
    [(1, 2, 4, 100), (1, 2, 100)]
  """
  from isthmus.pallas.flash.tile import ROWS
  from isthmus.pallas.scores.mosaic_reduce import TILE, reduce_tiles

  t, s, side = q.shape[1], k.shape[1], options.side
  beside = (
    tokens is not None
    and options.reduce == "none"
    and pool.refuse(tokens) is None
  )
  reduced, walks, means = reduce_tiles(
    padded(q, ROWS),
    padded(k, TILE),
    tokens if beside else None,
    lengths=(t, s),
    options=options,
  )
  if reduced is not None:
    reduced = reduced[:, :, : -(-s // side), :t]
    if options.causal:
      # What no query of a tile sees was not written.
      first = jnp.arange(reduced.shape[2], dtype=jnp.int32)[:, None] * side
      row = jnp.arange(t, dtype=jnp.int32) + (s - t)
      reduced = jnp.where(first <= row, reduced, -jnp.inf)
  lse = jax.nn.logsumexp(walks[..., :t], axis=2)
  if tokens is None:
    return reduced, lse
  if means is None:
    return reduced, lse, pool_blocks(tokens, BLOCK)
  # A last block that is short is left.
  rest = pool_blocks(tokens[:, means.shape[1] * BLOCK :], BLOCK)
  return reduced, lse, jnp.concatenate([means, rest], axis=1)


def refuse(
  q, k, *, options: Options, tokens: Float[Array, "b T n e"] | None = None
) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> refuse(x, x, options=Options(32))  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  del tokens
  if not options.scale > 0:
    return f"it takes scales above 0, not {options.scale}"
  if options.side % 8:
    return f"it takes sides of multiples of 8, not {options.side}"
  return refuse_machine() or refuse_arrays(q, k)
