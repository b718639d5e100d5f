"""The choice of blocks by a walk over centroids that keeps the best so far.

Scores of all queries and all blocks, t x g, never are stored: rows and
centroids come in tiles, and a row carries the list of its best blocks, which
is merged with the scores of one tile after another, newest blocks first.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.precision import accumulator, exact_dot

#: Rows (queries times heads of a group) and centroids of a tile.
TILE = (256, 64)


@functools.partial(jax.jit, static_argnames=("top_k", "causal", "tile"))
def choose(
  q: Float[Array, "b t n d"],
  centroids: Float[Array, "b g k d"],
  layout: BlockLayout,
  *,
  top_k: int,
  causal: bool = True,
  tile: tuple[int, int] = TILE,
) -> Int32[Array, "b n t c"]:
  """The blocks that each query reads.

  A causal query reads its own block, and of those before it in its segment
  the top_k - 1 of largest `q . kbar_j`. Otherwise it reads the top_k of its
  whole segment. Of equal scores the later block is taken.

  Args:
    q: queries.
    centroids: of blocks, in q's dtype.
    layout: what each query may choose.
    top_k: number of blocks that a query reads.
    causal: whether queries have a block of their own.
    tile: rows and centroids that meet at once.

  Returns:
    Indices of blocks, the own one first, then by falling score, or, where
    all are taken anyway, the newest first; -1 where there are fewer. There are
    c = top_k places, or as many as can be filled.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> q = jnp.ones((1, 4, 1, 1))
    >>> centroids = jnp.array([3.0, 1, 2, 0]).reshape(1, 4, 1, 1)
    >>> layout = uniform(4, 4, block=1)
    >>> choose(q, centroids, layout, top_k=2)[0, 0].tolist()
    [[0, -1], [1, 0], [2, 0], [3, 0]]
  """
  (b, t, n, _), g = q.shape, centroids.shape[1]
  others = min(top_k - 1 if causal else top_k, g)
  if others == g:
    # Every block is taken: there is nothing to compare.
    found = layout.last[..., None] - 1 - jnp.arange(g, dtype=jnp.int32)
    found = jnp.where(found >= layout.first[..., None], found, -1)
    found = jnp.broadcast_to(found[:, None], (b, n, t, g))
  elif others:
    found = _best(q, centroids, layout, others, tile)
  else:
    found = jnp.zeros((b, n, t, 0), jnp.int32)
  if causal:
    own = jnp.broadcast_to(layout.own[:, None, :, None], (b, n, t, 1))
    found = jnp.concatenate([own, found], axis=-1)
  return found


def _best(q, centroids, layout, count, tile):
  (b, t, n, d), (g, heads) = q.shape, centroids.shape[1:3]
  group = n // heads
  r = min(max(tile[0] // group, 1), t)
  w = min(tile[1], g)
  wide = accumulator(q.dtype)

  # Newest first, in tiles; what fills the last tile has indices below 0.
  centroids = jnp.pad(
    jnp.flip(centroids, axis=1), ((0, 0), (0, -g % w), (0, 0), (0, 0))
  )
  centroids = centroids.reshape(b, -1, w, heads, d).transpose(1, 0, 3, 2, 4)

  def rows(x, fill):
    """[b t ...] -> [tiles b r ...]."""
    x = jnp.pad(
      x, ((0, 0), (0, -t % r), *((0, 0),) * (x.ndim - 2)), constant_values=fill
    )
    return jnp.moveaxis(x.reshape(x.shape[0], -1, r, *x.shape[2:]), 1, 0)

  def meet(_, xs):
    q, first, last = xs
    q = q.reshape(b, r, heads, group, d).swapaxes(1, 2)
    q = q.reshape(b, heads, r * group, d)
    low = jnp.min(jnp.where(first < last, first, g))
    high = jnp.max(last)
    first, last = (
      jnp.repeat(x, group, axis=1)[:, None, :, None] for x in (first, last)
    )

    def step(i, best):
      score, index = best
      k = jax.lax.dynamic_index_in_dim(centroids, i, keepdims=False)
      x = exact_dot("bkrd,bkwd->bkrw", q, k)
      # A sorted order tells -0 from 0, which are equal.
      x = jnp.where(x == 0, 0.0, x)
      j = g - 1 - i * w - jnp.arange(w, dtype=jnp.int32)
      able = (j >= first) & (j < last)
      x = jnp.where(able, x, -jnp.inf)
      j = jnp.broadcast_to(jnp.where(able, j, -1), x.shape)
      score = jnp.concatenate([score, x], axis=-1)
      index = jnp.concatenate([index, j], axis=-1)
      # Of equal scores it takes those that come first: the newer ones.
      score, place = jax.lax.top_k(score, count)
      return score, jnp.take_along_axis(index, place, axis=-1)

    shape = (b, heads, r * group, count)
    best = (
      jax.lax.full_like(q, -jnp.inf, wide, shape=shape),
      jax.lax.full_like(q, -1, jnp.int32, shape=shape),
    )
    _, index = jax.lax.fori_loop(
      (g - high) // w, -(-(g - low) // w), step, best
    )
    return None, index

  xs = (rows(q, 0), rows(layout.first, g), rows(layout.last, 0))
  _, index = jax.lax.scan(meet, None, xs)
  index = index.reshape(-1, b, heads, r, group, count)
  index = index.transpose(1, 2, 4, 0, 3, 5).reshape(b, n, -1, count)
  return index[:, :, :t]
