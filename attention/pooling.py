"""Scores of blocks: of mean queries and keys, and of tiles of a softmax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator, exact_dot


def pool_blocks(
  x: Float[Array, "b t n d"], block: int
) -> Float[Array, "b m n d"]:
  """Sums of blocks over `block`, also of a last block that is short.

  In float32, rounded to the dtype of x.

  Args:
    x: tokens.
    block: of how many.

  Example:
    >>> x = jnp.array([1.0, 3, 8]).reshape(1, 3, 1, 1)
    >>> pool_blocks(x, 2).ravel().tolist()
    [2.0, 4.0]
  """
  b, t, n, d = x.shape
  padded = jnp.pad(x, ((0, 0), (0, -t % block), (0, 0), (0, 0)))
  total = jnp.sum(
    padded.reshape(b, -1, block, n, d), axis=2, dtype=accumulator(x.dtype)
  )
  return (total / block).astype(x.dtype)


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
  q = q.reshape(b, m, heads, n // heads, d)
  return exact_dot("bmkud,bgkd->bkumg", q, k).reshape(b, n, m, g) * scale


#: Queries that meet all keys at once.
ROWS = 512


def tile_softmax(
  q: Float[Array, "b r n d"],
  k: Float[Array, "b r k d"],
  *,
  side: int,
  reduce: Callable[..., Any] = jnp.max,
  scale: float,
) -> Float[Array, "b n m m"]:
  """A causal softmax, of each tile of `side` queries and keys one number.

  `reduce_{i in m, j in g} P_ij`, `P_ij = exp(x_ij) / sum_{j <= i} exp(x_ij)`,
  `x_ij = scale q_i . k_j`. In float32; some rows at a time, so that P never
  is. What a last tile lacks is 0.

  Args:
    q, k: of self-attention.
    side: of a tile.
    reduce: `jnp.max` or `jnp.sum`.
    scale: of the logits.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> tile_softmax(q, k, side=2, scale=1.0).tolist()
    [[[[1.0, 0.0], [0.3333333432674408, 0.3333333432674408]]]]
  """
  (b, length, n, d), heads = q.shape, k.shape[2]
  tiles = -(-length // side)
  some = min(max(ROWS // side, 1), tiles)
  rows = some * side
  ends = tiles * side - length
  key = jnp.arange(tiles * side, dtype=jnp.int32)
  k = jnp.pad(k, ((0, 0), (0, ends), (0, 0), (0, 0)))
  q = jnp.pad(q, ((0, 0), (0, -length % rows), (0, 0), (0, 0)))
  q = jnp.moveaxis(q.reshape(b, -1, rows, heads, n // heads, d), 1, 0)
  first = jnp.arange(len(q), dtype=jnp.int32) * rows

  def meet(xs):
    first, q = xs
    x = exact_dot("brkud,bskd->bkurs", q, k) * scale
    at = first + jnp.arange(rows, dtype=jnp.int32)[:, None]
    p = jax.nn.softmax(jnp.where(key <= at, x, -jnp.inf), axis=-1)
    p = jnp.where((at < length) & (key < length), p, 0.0)
    p = p.reshape(b, n, some, side, tiles, side)
    return reduce(p, axis=(3, 5))

  found = jax.lax.map(meet, (first, q))
  found = jnp.moveaxis(found, 0, 2).reshape(b, n, -1, tiles)
  return found[:, :, :tiles]
