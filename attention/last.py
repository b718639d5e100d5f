"""What the last queries of a long row attend to, key by key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator, exact_dot

#: Keys that are met at once.
CHUNK = 8192


def last_importance(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  rows: int,
  keys: int,
  causal: bool,
  scale: float | None = None,
  chunk: int = CHUNK,
) -> Float[Array, "b n m"]:
  """The mean over the last queries of their softmax over the first keys.

  `a_j = mean_i exp(x_ij) / sum_{j < keys} exp(x_ij)`, `x_ij = scale q_i . k_j`,
  i being the last `rows` queries, or all of fewer. In float32, a chunk of keys
  at a time, twice.

  Args:
    q: queries, the last of which stands at the last key.
    k: keys.
    rows: how many queries.
    keys: how many keys; m.
    causal: a query sees keys up to its own.
    scale: default d ** -0.5.
    chunk: keys that are met at once.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> last_importance(q, k, rows=1, keys=4, causal=True).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
  """
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  rows = min(rows, t)
  scale = d**-0.5 if scale is None else scale
  q = q[:, t - rows :].reshape(b, rows, heads, n // heads, d)
  step = min(chunk, keys)
  k = jnp.pad(k[:, :keys], ((0, 0), (0, -keys % step), (0, 0), (0, 0)))
  k = jnp.moveaxis(k.reshape(b, -1, step, heads, d), 1, 0)
  first = jnp.arange(len(k), dtype=jnp.int32) * step
  at = jnp.arange(s - rows, s, dtype=jnp.int32)[:, None]

  def logits(first, k):
    x = exact_dot("brkgd,bskd->bkgrs", q, k) * scale
    key = first + jnp.arange(step, dtype=jnp.int32)
    seen = key < keys
    if causal:
      seen = seen & (key <= at)
    return jnp.where(seen, x, -jnp.inf)

  def join(lse, xs):
    found = jax.nn.logsumexp(logits(*xs), axis=-1)
    return jnp.logaddexp(lse, found), None

  wide = accumulator(q.dtype)
  shape = (b, heads, n // heads, rows)
  lse = jax.lax.full_like(q, -jnp.inf, wide, shape=shape)
  lse, _ = jax.lax.scan(join, lse, (first, k))

  def share(_, xs):
    p = jnp.exp(logits(*xs) - lse[..., None])
    return None, jnp.mean(p, axis=3)

  _, found = jax.lax.scan(share, None, (first, k))
  return jnp.moveaxis(found, 0, 3).reshape(b, n, -1)[..., :keys]
