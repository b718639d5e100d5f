"""Reduced logits in plain XLA, some rows at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.pool.api import BLOCK
from isthmus.pallas.pool.ref import pool_blocks
from isthmus.pallas.precision import exact_dot
from isthmus.pallas.scores.api import Options

#: Logits that are there at once.
SIZE = 2**22


def reduce_logits(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  options: Options,
  tokens: Float[Array, "b T n e"] | None = None,
) -> tuple[Any, ...]:
  """Of each query and each group of keys one number, and of all keys the lse.

  `max_{j in m} x_ij`, or `log sum_{j in m} exp(x_ij)`, `x_ij = scale q_i . k_j`
  over the keys that query i sees; -inf where it sees none. In float32.

  Args:
    q, k: queries and keys.
    options: see `isthmus.pallas.scores.api`.
    tokens: whose blocks of BLOCK are to be pooled besides.

  Returns:
    (reduced [b n m t] or None, lse [b n t]), `lse_i = log sum_j exp(x_ij)` over
    all that i sees; with tokens, `pool_blocks(tokens, BLOCK)` too.

  Example:
    >>> k = jnp.array([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    >>> reduced, lse = reduce_logits(jnp.ones_like(k), k, options=Options(2))
    >>> reduced[0, 0].tolist()
    [[1.0, 2.0, 2.0, 2.0], [-inf, -inf, 3.0, 4.0]]
    >>> print(lse[0, 0, :2].round(2))
    [1.   2.31]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  side, groups = options.side, -(-s // options.side)
  some = min(max(SIZE // max(b * n * s, 1), 8), t)
  k = jnp.pad(k, ((0, 0), (0, groups * side - s), (0, 0), (0, 0)))
  q = jnp.pad(q, ((0, 0), (0, -t % some), (0, 0), (0, 0)))
  q = jnp.moveaxis(q.reshape(b, -1, some, heads, n // heads, d), 1, 0)
  key = jnp.arange(groups * side, dtype=jnp.int32)
  first = jnp.arange(q.shape[0], dtype=jnp.int32) * some

  def meet(xs):
    first, q = xs
    x = exact_dot("brkgd,bskd->bkgrs", q, k) * options.scale
    seen = key < s
    if options.causal:
      row = first + jnp.arange(some, dtype=jnp.int32)
      seen = seen & (key <= row[:, None] + (s - t))
    x = jnp.where(seen, x.reshape(b, n, some, groups * side), -jnp.inf)
    lse = jax.nn.logsumexp(x, axis=3)
    if options.reduce == "none":
      return None, lse
    x = x.reshape(b, n, some, groups, side)
    reduce = jnp.max if options.reduce == "max" else jax.nn.logsumexp
    return jnp.swapaxes(reduce(x, axis=4), 2, 3), lse

  reduced, lse = jax.lax.map(meet, (first, q))
  if reduced is not None:
    reduced = jnp.moveaxis(reduced, 0, 3).reshape(b, n, groups, -1)[..., :t]
  lse = jnp.moveaxis(lse, 0, 2).reshape(b, n, -1)[..., :t]
  return reduced, lse, *([] if tokens is None else [pool_blocks(tokens, BLOCK)])
