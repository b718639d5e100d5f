"""Reduced scores in plain XLA, some rows at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator, exact_dot
from isthmus.pallas.scores.api import Options, offset

#: Probabilities that are there at once.
SIZE = 2**22


def reduce_scores(
  x: Float[Array, "b r h d"],
  y: Float[Array, "b c g d"],
  lse: Float[Array, "b n s"],
  *,
  options: Options,
) -> Float[Array, "b n m r"]:
  """`reduce_{j in m} P_ij` of each row i and each group m of columns.

  `P_ij = exp(scale x_i . y_j - lse)`, lse being that of the query among the
  two; 0 where the query doesn't see the key. There are n = max(h, g) heads,
  those of the other array being shared among equal numbers of them.

  Args:
    x, y: rows and columns.
    lse: of queries; their logarithms of all that they see.
    options: see `isthmus.pallas.scores.api`.

  Example:
    >>> x = jnp.zeros((1, 4, 2, 8))
    >>> lse = jnp.zeros((1, 2, 4))
    >>> found = reduce_scores(x, x, lse, options=Options(2, "sum"))
    >>> found[0, 0].tolist()
    [[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 1.0, 2.0]]
  """
  (b, r, h, d), (c, g) = x.shape, y.shape[1:3]
  n, side = max(h, g), options.side
  by_row = options.queries == "rows"
  groups = -(-c // side)
  some = min(max(SIZE // max(b * n * c, 1), 8), r)
  wide = accumulator(x.dtype)
  shared = min(h, g)
  y = y.reshape(b, c, shared, g // shared, d)
  y = jnp.pad(y, ((0, 0), (0, groups * side - c), (0, 0), (0, 0), (0, 0)))
  x = jnp.pad(x, ((0, 0), (0, -r % some), (0, 0), (0, 0)))
  x = x.reshape(b, -1, some, shared, h // shared, d)
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse.astype(wide))
  length = x.shape[1] * some if by_row else groups * side
  lse = jnp.pad(
    lse,
    ((0, 0), (0, 0), (0, length - lse.shape[2])),
    constant_values=jnp.inf,
  )
  column = jnp.arange(groups * side, dtype=jnp.int32)
  first = jnp.arange(x.shape[1], dtype=jnp.int32) * some
  shift = offset(r, c, options)

  def meet(xs):
    first, x, lse = xs
    p = exact_dot("brshd,bcsgd->bshgrc", x, y) * options.scale
    p = p.reshape(b, n, some, groups * side)
    row = first + jnp.arange(some, dtype=jnp.int32)[:, None]
    seen = column < c
    if options.causal:
      key, query = (column, row) if by_row else (row, column)
      seen = seen & (key <= query + shift)
    lse = lse[..., None] if by_row else lse[:, :, None]
    p = jnp.where(seen, jnp.exp(p - lse), 0)
    p = p.reshape(b, n, some, groups, side)
    p = p.max(axis=4) if options.reduce == "max" else p.sum(axis=4)
    return jnp.swapaxes(p, 2, 3)

  if by_row:
    lse = jnp.moveaxis(lse.reshape(b, n, -1, some), 2, 0)
  else:
    lse = jnp.broadcast_to(lse, (len(first), *lse.shape))
  found = jax.lax.map(meet, (first, jnp.moveaxis(x, 1, 0), lse))
  found = jnp.moveaxis(found, 0, 3).reshape(b, n, groups, -1)
  return found[..., :r]
