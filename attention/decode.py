"""Decoding: a few queries against a long cache, cut into splits.

The time of a step is that of reading the cache once, so all of a GPU has to
read: the keys are cut into splits that are worked on side by side, each giving
an unnormalised output with its statistics, which are merged at the end
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

A matmul of [s, k, d] with k as a batch axis is one that libraries take after a
copy of the cache only. While queries are few it is read as it lies instead:
on a GPU as one matrix [s, k d], against a matrix [k d, n t] of queries that is
0 outside each head's own block (k times the multiplications, by units that
would otherwise wait for memory), elsewhere by products that are summed at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.attention.cache import KVCache
from isthmus.attention.mask import Window, conditions
from isthmus.attention.shard import sharded
from isthmus.pallas.dispatch import platform
from isthmus.pallas.precision import accumulator, exact_dot

# The logit of a key that is not seen; finite, so that differences of logits
# never are NaN.
_NEVER = -1e30
# Columns of the joined matrix of queries, at most. An H100 does 295 bfloat16
# operations while it reads a byte, and a column takes one a byte.
_COLUMNS = 128
# Queries that share a kv head, at most, where products are summed at once.
_SHARING = 16
# Keys of a split, at least, unless told otherwise.
_CHUNK = 256


def decode(
  q: Float[Array, "b t n d"],
  cache: KVCache,
  *,
  causal: bool = True,
  window: Window = None,
  positions: Int32[Array, "#b t"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "n"] | None = None,
  splits: int | None = None,
  return_lse: bool = False,
  shard_axes: Any = None,
) -> Any:
  """Attention of a few tokens to a cache that already holds them.

  What `attention` gives for the cache's keys, values and positions. It holds
  the scores of all keys: t is small, usually 1.

  Args:
    q: queries.
    cache: of one layer. Its empty slots are not seen; they hold finite values,
      as `append` leaves them.
    causal: a query sees keys at positions up to its own.
    window: as in `attention`; of positions.
    positions: of the queries; by default those of the t last slots written.
    scale: default d ** -0.5.
    softcap: bounds the logits, before masking.
    sinks: a logit per head that joins the denominator, and so the lse.
    splits: pieces of the keys that are worked on side by side, a divisor of
      the capacity; by default as many as fill a GPU, and 1 elsewhere.
    return_lse: also return the lse.
    shard_axes: mesh axes that divide batch and heads, as in `attention`.

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t] in float32.

  Raises:
    ValueError: shapes or settings that don't fit.

  Example:
    >>> cache = KVCache.init(batch=1, capacity=8, num_kv_heads=1, head_dim=4)
    >>> cache = cache.append(jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)))
    >>> decode(jnp.ones((1, 1, 2, 4)), cache).shape
    (1, 1, 2, 4)
  """
  _check(q, cache, softcap, splits)
  (b, t, n, d), (s, heads) = q.shape, cache.k.shape[1:3]
  if positions is None:
    start = jnp.maximum(cache.length - t, 0)
    positions = jax.lax.dynamic_slice_in_dim(cache.positions, start, t, 1)
  predicate, at, places = conditions(
    t,
    s,
    causal,
    window,
    q_positions=positions[:, None],
    kv_positions=cache.positions[:, None],
  )
  # Of two dtypes the wider: nothing that is stored or asked is rounded.
  wide = jnp.promote_types(q.dtype, cache.k.dtype)
  arrays = tuple(x.astype(wide) for x in (q, cache.k, cache.v))
  o, lse = sharded(
    functools.partial(
      _decode,
      predicate,
      float(d**-0.5 if scale is None else scale),
      softcap,
      splits,
    ),
    (*arrays, at, places, sinks),
    ("b.n", "b.k", "b.k", "bn", "bk", "n"),
    ("b.n", "bn"),
    sizes=(b, n, heads),
    shard_axes=shard_axes,
  )
  o = o.astype(q.dtype)
  return (o, lse) if return_lse else o


def decode_step(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b t k d"],
  v: Float[Array, "b t k dv"],
  cache: KVCache,
  *,
  positions: Int32[Array, "#b t"] | None = None,
  **settings: Any,
) -> tuple[Any, KVCache]:
  """Appends t tokens to a cache and attends from them to all of it.

  Under jit with the cache donated, the new keys are written in place.

  Args:
    q: queries.
    k, v: keys and values of the same tokens.
    cache: of one layer.
    positions: of the tokens; by default the next ones of the cache. EMPTY
      marks padding, whose output means nothing.
    **settings: of `decode`.

  Returns:
    (what `decode` returns, the longer cache).

  Example:
    >>> step = jax.jit(decode_step, donate_argnums=3)
    >>> cache = KVCache.init(batch=1, capacity=8, num_kv_heads=1, head_dim=4)
    >>> x = jnp.ones((1, 1, 1, 4))
    >>> for _ in range(3):
    ...   o, cache = step(x, x, x, cache)
    >>> o.shape, int(cache.length)
    ((1, 1, 1, 4), 3)
  """
  cache = cache.append(k, v, positions=positions)
  return decode(q, cache, positions=positions, **settings), cache


def _check(q, cache, softcap, splits) -> None:
  if cache.k.ndim != 4:
    raise ValueError(
      f"a cache of keys {cache.k.shape} is not one layer's, which has 4 axes"
    )
  (b, t, n, d), (rows, s, heads, width) = q.shape, cache.k.shape
  if b != rows:
    raise ValueError(f"queries of batch {b}, a cache of batch {rows}")
  if d != width:
    raise ValueError(f"queries of width {d}, a cache of keys of width {width}")
  if n % heads:
    raise ValueError(f"{n} query heads are not a multiple of {heads} kv heads")
  if t > s:
    raise ValueError(f"{t} queries meet a cache of capacity {s}")
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap is {softcap}; it must be above 0")
  if splits is not None and (splits < 1 or s % splits):
    raise ValueError(f"splits {splits} does not divide the capacity {s}")


def _decode(predicate, scale, softcap, splits, q, k, v, at, places, sinks):
  """(o, lse). Columns r are the rows [k g t] of queries, one each."""
  (b, t, n, _), (s, heads, dv) = q.shape, v.shape[1:]
  if splits is None:
    splits = _splits(b, s, heads * dv, _cores())
  if platform() == "gpu" and n * t <= _COLUMNS:
    scores, outputs = _joined(q, k, v)
  elif platform() != "gpu" and n // heads * t <= _SHARING:
    scores, outputs = _summed(q, k, v)
  else:
    scores, outputs = _grouped(q, k, v)

  x = scores() * scale  # [b s k g t]
  if softcap is not None:
    x = softcap * jnp.tanh(x / softcap)
  seen = predicate(
    jnp.arange(t)[:, None],
    jnp.arange(s),
    tuple(y[..., None] for y in at),
    tuple(y[..., None, :] for y in places),
  )
  seen = jnp.broadcast_to(seen, (seen.shape[0], 1, t, s))[:, 0]
  x = jnp.where(jnp.swapaxes(seen, 1, 2)[:, :, None, None], x, _NEVER)

  x = x.reshape(b, splits, s // splits, *x.shape[2:])
  top = jnp.max(x, axis=2)
  p = jnp.exp(x - jnp.where(top < 0.5 * _NEVER, 0.0, top)[:, :, None])
  total, o = jnp.sum(p, axis=2), outputs(p.astype(v.dtype))

  most = jnp.max(top, axis=1)  # [b k g t]
  if sinks is not None:
    sinks = sinks.astype(x.dtype).reshape(heads, -1, 1)
    most = jnp.maximum(most, sinks)
  most = jnp.where(most < 0.5 * _NEVER, 0.0, most)
  weight = jnp.exp(top - most[:, None])
  total = jnp.sum(weight * total, axis=1)
  if sinks is not None:
    total = total + jnp.exp(sinks - most)
  o = jnp.sum(weight[..., None] * o, axis=1)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  lse = jnp.where(empty, -jnp.inf, most + jnp.log(total))
  o = (o / total[..., None]).transpose(0, 3, 1, 2, 4)
  return o.reshape(b, t, n, dv), lse.reshape(b, n, t)


def _grouped(q, k, v):
  """Scores and outputs: matmuls of each kv head, after a copy of the cache."""
  b, t, n, d = q.shape
  q = q.reshape(b, t, k.shape[2], -1, d)

  def outputs(p):
    chunks = v.reshape(*p.shape[:3], *v.shape[2:])
    return exact_dot("bcskgt,bcskd->bckgtd", p, chunks)

  return lambda: exact_dot("bskd,btkgd->bskgt", k, q), outputs


def _summed(q, k, v):
  """The same by products that XLA sums as it makes them."""
  b, t, n, d = q.shape
  q = q.reshape(b, t, k.shape[2], -1, d).transpose(0, 2, 3, 1, 4)
  wide = accumulator(q.dtype)

  def scores():
    products = k.astype(wide)[:, :, :, None, None] * q.astype(wide)[:, None]
    return jnp.sum(products, axis=-1)

  def outputs(p):
    chunks = v.reshape(*p.shape[:3], *v.shape[2:]).astype(wide)
    products = p.astype(wide)[..., None] * chunks[:, :, :, :, None, None]
    return jnp.sum(products, axis=2)

  return scores, outputs


def _joined(q, k, v):
  """The same of all kv heads in one matmul, q being 0 for other heads."""
  (b, t, n, d), (s, heads, dv) = q.shape, v.shape[1:]
  own = jnp.eye(heads, dtype=bool)
  q = q.reshape(b, t, heads, n // heads, d).transpose(0, 2, 4, 3, 1)
  q = jnp.where(own[:, None, :, None, None], q[:, :, :, None], 0)
  q = q.reshape(b, heads * d, n * t)

  def scores():
    x = exact_dot("bsm,bmr->bsr", k.reshape(b, s, heads * d), q)
    return x.reshape(b, s, heads, n // heads, t)

  def outputs(p):
    splits, chunk = p.shape[1:3]
    p = p.reshape(b, splits, chunk, n * t)
    chunks = v.reshape(b, splits, chunk, heads * dv)
    o = exact_dot("bcsr,bcsm->bcrm", p, chunks)
    o = o.reshape(b, splits, heads, n // heads, t, heads, dv)
    return jnp.sum(jnp.where(own[:, None, None, :, None], o, 0), axis=5)

  return scores, outputs


def _splits(b: int, s: int, width: int, cores: int) -> int:
  """A divisor of s: splits that give each core a tile of 128 columns.

  The next divisor above what is needed, if its splits have `_CHUNK` keys.
  """
  needed = -(-cores // (b * -(-width // 128)))
  able = [c for c in range(1, max(s // _CHUNK, 1) + 1) if s % c == 0]
  return min((c for c in able if c >= needed), default=able[-1])


def _cores() -> int:
  """Multiprocessors of a GPU; 1 elsewhere, where splits bring nothing."""
  if platform() != "gpu":
    return 1
  return getattr(jax.local_devices()[0], "core_count", 1)
