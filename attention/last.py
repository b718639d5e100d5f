"""What the last queries of a long row attend to, key by key."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.attention.pooling import REDUCE
from isthmus.attention.sdpa import attention
from isthmus.pallas.scores.api import Options

#: The fewest keys of a piece of a long row.
PIECE = 4096


def last_importance(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  rows: int,
  causal: bool,
  scale: float | None = None,
  impl: Any = None,
) -> Float[Array, "b n s"]:
  """The mean over the last queries of their softmax over keys.

  `a_j = mean_i exp(x_ij - lse_i)`, `x_ij = scale q_i . k_j`, i being the last
  `rows` queries, or all of fewer; in float32.

  Args:
    q: queries, the last of which stands at the last key.
    k: keys.
    rows: how many queries.
    causal: a query sees keys up to its own.
    scale: default d ** -0.5.
    impl: of `isthmus.attention.pooling.REDUCE`, an implementation's name.

  Example:
    >>> q = k = jnp.zeros((1, 4, 1, 8))
    >>> last_importance(q, k, rows=1, causal=True).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
  """
  t, d = q.shape[1], q.shape[3]
  rows, scale = min(rows, t), d**-0.5 if scale is None else scale
  q = q[:, t - rows :]
  lse = _lse(q, k, causal, scale)
  side = min(1 << max(rows - 1, 7).bit_length(), 128)
  options = Options(side, "sum", "columns", causal, float(scale))
  found = REDUCE(k, q, lse, options=options, impl=impl)
  return jnp.sum(found, axis=2) / rows


def _lse(q, k, causal, scale):
  """Of few queries and many keys, whose pieces go side by side."""
  (b, rows, n, d), (s, heads) = q.shape, k.shape[1:3]
  pieces = 1
  while s % (2 * pieces) == 0 and s // (2 * pieces) >= max(PIECE, rows):
    pieces *= 2
  size = s // pieces
  q = jnp.broadcast_to(q[:, None], (b, pieces, rows, n, d))
  q, k = q.reshape(-1, rows, n, d), k.reshape(-1, size, heads, d)
  settings: dict[str, Any] = {"causal": causal, "scale": scale}
  if causal and pieces > 1:
    at = jnp.arange(s, dtype=jnp.int32)
    where = jnp.broadcast_to(at.reshape(pieces, size), (b, pieces, size))
    settings |= {
      "q_positions": at[s - rows :].reshape(1, 1, rows),
      "kv_positions": where.reshape(-1, 1, size),
    }
  # Of the values nothing is wanted.
  lse = attention(q, k, k[..., :1], **settings, return_lse=True)[1]
  return jax.nn.logsumexp(lse.reshape(b, pieces, n, rows), axis=1)
