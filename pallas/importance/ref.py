"""Importance in plain XLA, some keys at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.importance.api import Options
from isthmus.pallas.precision import accumulator, exact_dot

#: Probabilities that are there at once.
SIZE = 2**22


def importance(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  lse: Float[Array, "b n t"],
  *,
  options: Options,
) -> Float[Array, "b n s"]:
  """`sum_i P_ij` of each key j, over queries i.

  `P_ij = exp(scale q_i . k_j - lse_i)`; 0 where the query doesn't see the key.
  In float32.

  Args:
    q, k: queries and keys.
    lse: of queries, over all that they see; -inf of what sees none.
    options: see `isthmus.pallas.importance.api`.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> importance(q, k, jnp.zeros((1, 1, 4)), options=Options()).tolist()
    [[[4.0, 3.0, 2.0, 1.0]]]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  some = min(max(SIZE // max(b * n * t, 1), 8), s)
  k = jnp.pad(k, ((0, 0), (0, -s % some), (0, 0), (0, 0)))
  k = jnp.moveaxis(k.reshape(b, -1, some, heads, d), 1, 0)
  q = q.reshape(b, t, heads, n // heads, d)
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(accumulator(q.dtype)))
  query = jnp.arange(t, dtype=jnp.int32)[:, None] + (s - t)
  first = jnp.arange(k.shape[0], dtype=jnp.int32) * some

  def meet(xs):
    first, k = xs
    x = exact_dot("btkgd,brkd->bkgtr", q, k) * options.scale
    p = jnp.exp(x.reshape(b, n, t, some) - lse[..., None])
    if options.causal:
      key = first + jnp.arange(some, dtype=jnp.int32)
      p = jnp.where(key <= query, p, 0)
    return jnp.sum(p, axis=2)

  found = jnp.moveaxis(jax.lax.map(meet, (first, k)), 0, 2)
  return found.reshape(b, n, -1)[..., :s]
