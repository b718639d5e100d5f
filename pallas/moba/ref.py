"""Block routing with t x g scores and t x s logits: plain, and an oracle.

The choice becomes operands of an element mask, under which the reference of
dense attention runs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.pallas.flash import api as flash
from isthmus.pallas.flash import ref
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.precision import exact_dot


@dataclasses.dataclass(frozen=True)
class Chosen:
  """A key is seen if its block is among the query's, and not after `at`.

  Operands are, by query, its `slots` blocks and `at`; by key, its block.

  Example:
    >>> at, block = jnp.array([[2], [2]]), jnp.array([[0], [1]])
    >>> keys = jnp.array([0, 0, 1, 1])
    >>> print(Chosen(1)(0, jnp.arange(4), (block, at), (keys,)).astype(int))
    [[1 1 0 0]
     [0 0 1 0]]
  """

  slots: int

  @property
  def operands(self) -> tuple[int, int]:
    """How many per-query and per-key arrays it takes."""
    return self.slots + 1, 1

  def __call__(self, i, j, q, k):
    *blocks, at = q
    (block,) = k
    seen = jnp.zeros((), bool)
    for one in blocks:
      seen = seen | (one == block)
    return seen & (j <= at)

  def tiles(self, i, j, q, k):
    """Some are seen if a block may be; that all are is not said."""
    *blocks, at = q
    (block,) = k
    some = jnp.zeros((), bool)
    for one in blocks:
      some = some | ((one.low <= block.high) & (one.high >= block.low))
    some = some & (j.low <= at.high)
    return some, jnp.zeros_like(some)


def attend(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  *,
  options: Options,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) of `isthmus.attention.moba`, whose checks are done.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> extras = Extras(uniform(4, 4, block=2))
    >>> o, lse = attend(q, k, v, extras, options=Options(block=2, top_k=1))
    >>> o.shape, lse.shape
    ((1, 4, 2, 8), (1, 2, 4))
  """
  layout, s = extras.layout, k.shape[1]
  centroids = extras.centroids
  if centroids is None:
    centroids = pool(k, layout, block=options.block)
  choice = jax.lax.stop_gradient(
    choose_plainly(
      q, centroids, layout, top_k=options.top_k, causal=options.causal
    )
  )
  # Keys past the last block that the bound allows have index g, as unused
  # places have -1: they meet nothing.
  block = jax.vmap(
    lambda stop: jnp.searchsorted(stop, jnp.arange(s), side="right")
  )(layout.stop).astype(jnp.int32)
  return ref.attend(
    q,
    k,
    v,
    flash.Extras(
      q=(*jnp.moveaxis(choice, -1, 0), layout.at[:, None]),
      k=(block[:, None],),
    ),
    options=flash.Options(
      scale=options.scale, predicate=Chosen(choice.shape[-1])
    ),
  )


def choose_plainly(
  q: Float[Array, "b t n d"],
  centroids: Float[Array, "b g k d"],
  layout: BlockLayout,
  *,
  top_k: int,
  causal: bool = True,
) -> Int32[Array, "b n t c"]:
  """`isthmus.pallas.moba.select.choose` by one sort of all scores.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> q, centroids = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1, 1))
    >>> layout = uniform(3, 3, block=1)
    >>> choose_plainly(q, centroids, layout, top_k=2)[0, 0].tolist()
    [[0, -1], [1, 0], [2, 1]]
  """
  (b, t, n, d), (g, heads) = q.shape, centroids.shape[1:3]
  q = q.reshape(b, t, heads, n // heads, d)
  x = exact_dot("btkud,bgkd->bkutg", q, centroids).reshape(b, n, t, g)
  j = jnp.arange(g, dtype=jnp.int32)
  first, last, own = (
    y[:, None, :, None] for y in (layout.first, layout.last, layout.own)
  )
  x = jnp.where(x == 0, 0.0, x)
  x = jnp.where((j >= first) & (j < last), x, -jnp.inf)
  index = jnp.argsort(x, axis=-1, descending=False, stable=True)
  index = jnp.flip(index, axis=-1).astype(jnp.int32)
  x = jnp.take_along_axis(x, index, axis=-1)
  found = jnp.where(x > -jnp.inf, index, -1)
  found = found[..., : top_k - 1 if causal else top_k]
  if causal:
    own = jnp.broadcast_to(own, (b, n, t, 1))
    found = jnp.concatenate([own, found], axis=-1)
  return found
