"""Block routing against a cache: few queries, each reads its blocks alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.attention.mask import EMPTY
from isthmus.attention.moba import moba
from isthmus.attention.moba_cache import MobaCache, is_lost
from isthmus.pallas.precision import accumulator, exact_dot


def moba_decode(
  q: Float[Array, "b t n d"],
  cache: MobaCache,
  *,
  top_k: int,
  positions: Int32[Array, "#b t"] | None = None,
  scale: float | None = None,
  return_lse: bool = False,
) -> Any:
  """`moba` of a few tokens to a cache that already holds them.

  Queries meet the cache's running centroids; of the keys, only the top_k
  blocks of each query are read: `t n top_k block` of them, whatever the
  cache's length.

  Args:
    q: queries.
    cache: of one layer; its `block` is moba's.
    top_k: blocks that a query reads, its own among them.
    positions: of the queries; by default those of the t last slots written.
      EMPTY marks padding, whose output means nothing.
    scale: default d ** -0.5.
    return_lse: also return the lse.

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t] in float32. NaN
    for positions past the capacity.

  Raises:
    ValueError: shapes or settings that don't fit.

  Example:
    >>> cache = MobaCache.init(
    ...   batch=1, capacity=8, num_kv_heads=1, head_dim=4, block=2
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (1, 7, 1, 4))
    >>> o = moba_decode(x[:, -1:], cache.append(x, x), top_k=2)
    >>> whole = moba(x, x, x, block=2, top_k=2)
    >>> bool(jnp.allclose(o, whole[:, -1:], atol=1e-6))
    True
  """
  _check(q, cache, top_k)
  (b, t, n, d), heads = q.shape, cache.k.shape[2]
  if positions is None:
    start = jnp.maximum(cache.length - t, 0)
    positions = jax.lax.dynamic_slice_in_dim(cache.kv.positions, start, t, 1)
  lost = jnp.broadcast_to(is_lost(cache, positions), (b, t))
  positions = jnp.broadcast_to(positions, (b, t))
  positions = jnp.where((positions == EMPTY) | lost, 0, positions)
  wide = accumulator(q.dtype)

  # Keys of each query, one slot each: its blocks' positions, in any order.
  chosen = _choose(q, cache, positions, top_k)  # [b n t c]
  place = chosen[..., None] * cache.block + jnp.arange(cache.block)
  able = (chosen >= 0)[..., None] & (place <= positions[:, None, :, None, None])
  place = place.reshape(b, n, -1)
  slot = jnp.take_along_axis(
    cache.slots[:, None], jnp.clip(place, 0, cache.capacity - 1), axis=2
  ).reshape(b, n, t, -1)
  seen = able.reshape(slot.shape) & (slot >= 0)
  head = (jnp.arange(n) // (n // heads))[:, None, None]
  read = jax.vmap(lambda x, slot: x[slot, head])
  k, v = (read(x, jnp.maximum(slot, 0)) for x in (cache.kv.k, cache.kv.v))

  x = exact_dot("btnd,bntmd->bntm", q, k.astype(q.dtype))
  x = x * (d**-0.5 if scale is None else scale)
  x = jnp.where(seen, x, -jnp.inf)
  lse = jax.nn.logsumexp(x, axis=-1)
  empty = lse == -jnp.inf
  p = jnp.exp(x - jnp.where(empty, 0, lse)[..., None])
  p = jnp.where(seen, p, 0).astype(q.dtype)
  v = jnp.where(seen[..., None], v.astype(q.dtype), 0)
  o = exact_dot("bntm,bntmd->btnd", p, v)
  o = jnp.where(lost[..., None, None], jnp.nan, o).astype(q.dtype)
  lse = jnp.where(lost[:, None], jnp.nan, lse).astype(wide)
  return (o, lse) if return_lse else o


def moba_prefill(
  q: Float[Array, "b t n d"],
  cache: MobaCache,
  *,
  top_k: int,
  positions: Int32[Array, "#b t"],
  **settings: Any,
) -> Float[Array, "b t n dv"]:
  """`moba` of many tokens to a cache that already holds them.

  Keys are copied into the order of their positions first.

  Args:
    q: queries.
    cache: of one layer.
    top_k: blocks that a query reads.
    positions: of the queries; EMPTY marks padding, whose output means nothing.
    **settings: `scale` and `impl` of `moba`.

  Returns:
    o of q's dtype; NaN for positions past the capacity.

  Example:
    >>> cache = MobaCache.init(
    ...   batch=1, capacity=8, num_kv_heads=1, head_dim=4, block=2
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (1, 7, 1, 4))
    >>> places = jnp.arange(7, dtype=jnp.int32)[None]
    >>> cache = cache.append(x, x)
    >>> moba_prefill(x, cache, top_k=2, positions=places).shape
    (1, 7, 1, 4)
  """
  _check(q, cache, top_k)
  lost = is_lost(cache, positions)
  k, v = (x.astype(q.dtype) for x in cache.ordered())
  o = moba(
    q,
    k,
    v,
    block=cache.block,
    top_k=top_k,
    q_positions=jnp.where((positions == EMPTY) | lost, 0, positions),
    centroids=cache.centroids(),
    **settings,
  )
  return jnp.where(lost[..., None, None], jnp.nan, o)


def _choose(q, cache, positions, top_k):
  """Blocks [b n t c], the own one first; -1 where there are fewer."""
  b, t, n, d = q.shape
  centroids = cache.centroids().astype(q.dtype)
  g, heads = centroids.shape[1:3]
  own = jnp.broadcast_to((positions // cache.block)[:, None], (b, n, t))
  others = min(top_k - 1, g)
  if not others:
    return own[..., None]
  x = exact_dot(
    "btkud,bgkd->bkutg", q.reshape(b, t, heads, n // heads, d), centroids
  ).reshape(b, n, t, g)
  past = jnp.arange(g) < own[..., None]
  past = past & (cache.counts > 0)[:, None, None]
  # A sorted order tells -0 from 0, which are equal.
  x = jnp.where(past, jnp.where(x == 0, 0.0, x), -jnp.inf)
  # Of equal scores top_k takes the first: backwards, the newest.
  x, index = jax.lax.top_k(jnp.flip(x, axis=-1), others)
  index = jnp.where(x > -jnp.inf, g - 1 - index, -1)
  return jnp.concatenate([own[..., None], index], axis=-1)


def _check(q, cache, top_k) -> None:
  (b, _, n, d), (rows, _, heads, width) = q.shape, cache.k.shape
  if (b, d) != (rows, width):
    raise ValueError(f"queries {q.shape} meet a cache of keys {cache.k.shape}")
  if n % heads:
    raise ValueError(f"{n} query heads are not a multiple of {heads} kv heads")
  if top_k < 1:
    raise ValueError(f"top_k is {top_k}; it must be at least 1")
