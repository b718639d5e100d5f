"""Importance on Hopper: the Mosaic GPU kernel behind the common call."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.hopper import padded, refuse_arrays, refuse_machine
from isthmus.pallas.importance.api import Options


def importance(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  lse: Float[Array, "b n t"],
  *,
  options: Options,
) -> Float[Array, "b n s"]:
  """As `isthmus.pallas.importance.ref.importance`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 100, 2, 40), jnp.bfloat16)
    >>> lse = jax.ShapeDtypeStruct((1, 2, 100), jnp.float32)
    >>> run = lambda x, lse: importance(x, x, lse, options=Options())
    >>> jax.eval_shape(run, x, lse).shape
    (1, 2, 100)
  """
  from isthmus.pallas.flash.tile import ROWS
  from isthmus.pallas.importance.mosaic_sum import LOG2E, TILE, sum_tiles

  t, s = q.shape[1], k.shape[1]
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(jnp.float32) * LOG2E)
  ends = ((0, 0), (0, 0), (0, -t % TILE))
  found = sum_tiles(
    padded(q, TILE),
    padded(k, ROWS),
    jnp.pad(lse, ends, constant_values=jnp.inf),
    lengths=(t, s),
    options=options,
  )
  return jnp.sum(found, axis=2)[..., :s]


def refuse(q, k, lse, *, options: Options) -> str | None:
  """Why the kernel can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> refuse(x, x, None, options=Options())  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  del lse, options
  return refuse_machine() or refuse_arrays(q, k)
