"""Scores of blocks: of mean queries and keys, and of tiles of a softmax."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.pool.ref import pool_blocks as pool_blocks
from isthmus.pallas.precision import exact_dot
from isthmus.pallas.scores import mosaic
from isthmus.pallas.scores.api import Options


def block_scores(
  q: Float[Array, "b m n d"], k: Float[Array, "b g k d"], scale: float
) -> Float[Array, "b n m g"]:
  """`scale q_m . k_g` of each query head with its kv head, in float32.

  Args:
    q, k: a row for each block.
    scale: of the logits.

  Example:
    >>> q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 3, 2, 8))
    >>> block_scores(q, k, 0.5).shape
    (1, 4, 2, 3)
  """
  (b, m, n, d), (g, heads) = q.shape, k.shape[1:3]
  # As they are wanted of the product, whose result is by far the largest.
  q = jnp.swapaxes(q, 1, 2).reshape(b, heads, n // heads * m, d)
  k = jnp.swapaxes(k, 1, 2)
  return exact_dot("bkmd,bkgd->bkmg", q, k).reshape(b, n, m, g) * scale


def tile_softmax(
  q: Float[Array, "b r n d"],
  k: Float[Array, "b r k d"],
  *,
  side: int,
  reduce: str = "max",
  scale: float,
  impl: Any = None,
) -> Float[Array, "b n m m"]:
  """A causal softmax, of each tile of `side` queries and keys one number.

  `reduce_{i in m, j in g} P_ij`, `P_ij = exp(x_ij - lse_i)`,
  `x_ij = scale q_i . k_j`. In float32; P never is. What a last tile lacks
  is 0.

  Args:
    q, k: of self-attention.
    side: of a tile; divides 128.
    reduce: "max" or "sum".
    scale: of the logits.
    impl: of `LOGITS`, an implementation's name.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> found = tile_softmax(q, k, side=2, scale=1.0)
    >>> jnp.round(found, 3).tolist()
    [[[[1.0, 0.0], [0.3330000042915344, 0.3330000042915344]]]]
  """
  (b, length, n, _), tiles = q.shape, -(-q.shape[1] // side)
  options = Options(side, reduce, scale=float(scale))
  found, lse = LOGITS(q, k, options=options, impl=impl)
  # Every query sees itself, so that each lse is a number.
  found = jnp.exp(found - lse[:, :, None])
  found = jnp.pad(
    found, ((0, 0), (0, 0), (0, 0), (0, tiles * side - length))
  ).reshape(b, n, tiles, tiles, side)
  found = found.max(axis=4) if reduce == "max" else found.sum(axis=4)
  return jnp.swapaxes(found, 2, 3)


#: `isthmus.pallas.scores.ref.reduce_logits` and what else does it.
LOGITS = Op(
  "reduce_logits",
  (
    Impl("mosaic", mosaic.reduce_logits, mosaic.refuse),
    Impl("xla", "isthmus.pallas.scores.ref:reduce_logits"),
  ),
  {"gpu": ("mosaic", "xla"), "cpu": ("xla",), "tpu": ("xla",)},
)
