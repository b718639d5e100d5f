"""Arrays of a call as rows of chunks and lanes, and back.

A lane is a kv head of a batch row. Its rows are (query, head of the group),
queries ascending.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num


class Chunks(NamedTuple):
  """How many there are of what; `c` queries make a chunk.

  Example:
    >>> parts = Chunks(b=1, t=3, n=2, heads=1, c=2)
    >>> x = jnp.arange(6).reshape(1, 3, 2)
    >>> parts.rows(x, -1).tolist()
    [[[0, 1, 2, 3]], [[4, 5, -1, -1]]]
    >>> bool((parts.back(parts.rows(x)) == x).all())
    True
  """

  b: int
  t: int
  n: int
  heads: int
  c: int

  @property
  def group(self) -> int:
    """Query heads of a kv head."""
    return self.n // self.heads

  def rows(
    self, x: Num[Array, "b t n *rest"], fill: Any = 0
  ) -> Num[Array, "chunks l r *rest"]:
    """To rows; what the last chunk lacks is `fill`."""
    rest = x.shape[3:]
    ends = ((0, 0), (0, -self.t % self.c), *((0, 0),) * (x.ndim - 2))
    x = jnp.pad(x, ends, constant_values=fill)
    x = x.reshape(self.b, -1, self.c, self.heads, self.group, *rest)
    x = jnp.moveaxis(x, (1, 3), (0, 2))
    return x.reshape(-1, self.b * self.heads, self.c * self.group, *rest)

  def stats(
    self, x: Num[Array, "b n t *rest"], fill: Any = 0
  ) -> Num[Array, "chunks l r *rest"]:
    """To rows."""
    return self.rows(jnp.swapaxes(x, 1, 2), fill)

  def back(
    self, x: Num[Array, "chunks l r *rest"]
  ) -> Num[Array, "b t n *rest"]:
    """From rows."""
    rest = x.shape[3:]
    x = x.reshape(-1, self.b, self.heads, self.c, self.group, *rest)
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(self.b, -1, self.n, *rest)[:, : self.t]

  def lanes(self, x: Num[Array, "b s k d"]) -> Num[Array, "l s d"]:
    """Keys or values of each lane."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])

  def flat(
    self, lane: Int32[Array, " l"], row: Int32[Array, "l e"]
  ) -> Int32[Array, "l e"]:
    """Where rows of lanes are in an array [b t n] that is laid flat.

    A row past the last one is past the end of that array. There is one chunk.
    """
    batch, head = (x[:, None] for x in jnp.divmod(lane, self.heads))
    query, member = jnp.divmod(row, self.group)
    index = (batch * self.t + query) * self.n + head * self.group + member
    return jnp.where(query < self.t, index, self.b * self.t * self.n)

  def each(self, x: Num[Array, "#b g"]) -> Num[Array, "l g"]:
    """What is of a batch row, for each lane."""
    x = jnp.broadcast_to(x[:, None], (self.b, self.heads, x.shape[1]))
    return x.reshape(-1, x.shape[2])


def chunks(
  q: Num[Array, "b t n d"], k: Num[Array, "b s k d"], rows: int
) -> Chunks:
  """Chunks of at most `rows` rows, or of one query.

  Example:
    >>> x = jnp.ones((1, 100, 4, 8))
    >>> chunks(x, x[:, :, :2], 64).c
    32
  """
  (b, t, n, _), heads = q.shape, k.shape[2]
  return Chunks(b, t, n, heads, max(min(rows * heads // n, t), 1))
