"""Attention in plain XLA: runs everywhere, takes every argument.

The backward rule is that of FlashAttention-2 (arxiv.org/abs/2307.08691): it
keeps (o, lse) and recomputes the probabilities, so that nothing of size t x s
outlives a layer. Inside, heads come before time, and the g query heads that
share a kv head are rows of one matmul: [b, k, g t, d] x [b, k, s, d].
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from isthmus.attention.mask import visible
from isthmus.pallas.dispatch import platform
from isthmus.pallas.precision import dot

# What the forward rule calls its results, for policies of jax.checkpoint.
OUT, LSE = "attention_out", "attention_lse"

# The logit of a key that is not seen; finite, so that differences of logits
# never are NaN. Rows whose largest logit is below half of it are empty.
_NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Options:
  """What an implementation of attention is told besides arrays; hashable.

  Example:
    >>> Options(causal=True, window=(128, 0)).return_lse
    False
  """

  causal: bool = False
  window: tuple[int | None, int | None] | None = None
  scale: float = 1.0
  softcap: float | None = None
  dropout_rate: float = 0.0
  return_lse: bool = False


class Extras(NamedTuple):
  """The optional arrays of a call; None where not given.

  Example:
    >>> extras = Extras(segment_ids=jnp.array([[1, 1, 2]]))
    >>> [name for name, x in extras._asdict().items() if x is not None]
    ['segment_ids']
  """

  segment_ids: Any = None
  kv_segment_ids: Any = None
  q_positions: Any = None
  kv_positions: Any = None
  sinks: Any = None
  dropout_key: Any = None


def attend(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  *,
  options: Options,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) of `isthmus.attention.attention`, whose checks are done.

  Example:
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> o, lse = attend(q, k, v, Extras(), options=Options(causal=True))
    >>> o.shape, lse.shape
    ((1, 4, 2, 8), (1, 2, 4))
  """
  sinks, rest = extras.sinks, extras._replace(sinks=None)
  return _attend(options, q, k, v, sinks, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, extras):
  mask = _mask(options, q, k, extras)
  (b, t, n, _), dtype = q.shape, q.dtype
  strays = mask if _unseen(options, q, k, extras) else None
  q, k, v = _heads_first(q, k, v)
  if strays is not None:
    q, k, v = _clean(strays, q, k, v)
  x, _ = _logits(options, q, k, mask, t)
  top = jnp.max(x, axis=-1)
  if sinks is not None:
    sinks = _per_row(sinks, top)
    top = jnp.maximum(top, sinks)
  top = jnp.where(top < 0.5 * _NEVER, 0.0, top)
  p = jnp.exp(x - top[..., None])
  total = jnp.sum(p, axis=-1)
  if sinks is not None:
    total = total + jnp.exp(sinks - top)
  p = _drop(options, p, extras.dropout_key).astype(dtype)
  o = dot("bkrs,bksd->bkrd", p.reshape(*q.shape[:3], -1), v)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  o = o / total.reshape(*q.shape[:3], 1)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  return _time_first(o.astype(dtype), t), lse.reshape(b, n, t)


def _forward(options, q, k, v, sinks, extras):
  o, lse = _attend(options, q, k, v, sinks, extras)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, sinks, extras, o, lse)


def _backward(options, residuals, cotangents):
  """`dX = P (dP - Delta)` with `Delta = rowsum(do o) - dlse`."""
  q, k, v, sinks, extras, o, lse = residuals
  do, dlse = cotangents
  mask = _mask(options, q, k, extras)
  t, dtype, acc = q.shape[1], q.dtype, lse.dtype
  strays = mask if _unseen(options, q, k, extras) else None
  q, k, v = _heads_first(q, k, v)
  do, o = (_rows_first(x, k.shape[1]) for x in (do, o))
  if strays is not None:
    q, k, v = _clean(strays, q, k, v)
    # A row without keys passes nothing on, whatever its cotangents hold.
    do = jnp.where(_to_rows(jnp.any(strays, axis=-1), q), do, 0)
  dlse = jnp.where(jnp.isneginf(lse), 0.0, dlse)
  top = jnp.where(jnp.isneginf(lse), 0.0, lse)

  x, slope = _logits(options, q, k, mask, t)
  top, dlse = (y.reshape(x.shape[:-1]) for y in (top, dlse))
  p = jnp.exp(x - top[..., None])
  delta = jnp.sum(do.astype(acc) * o.astype(acc), axis=-1)
  delta = delta.reshape(x.shape[:-1]) - dlse
  square = (*q.shape[:3], x.shape[-1])
  kept = _drop(options, p, extras.dropout_key).astype(dtype)
  dv = dot("bkrs,bkrd->bksd", kept.reshape(square), do)
  dp = dot("bkrd,bksd->bkrs", do, v).reshape(x.shape)
  dp = _drop(options, dp, extras.dropout_key)
  dx = p * (dp - delta[..., None]) * options.scale
  if slope is not None:
    dx = dx * slope
  dx = dx.astype(dtype).reshape(square)
  dq = dot("bkrs,bksd->bkrd", dx, k).astype(dtype)
  dk = dot("bkrs,bkrd->bksd", dx, q).astype(dtype)
  dsinks = None
  if sinks is not None:
    share = jnp.exp(_per_row(sinks, top) - top)
    dsinks = -jnp.sum(share * delta, axis=(0, 3))
    dsinks = dsinks.reshape(sinks.shape).astype(sinks.dtype)
  dq = _time_first(dq, t)
  dk, dv = (jnp.swapaxes(y.astype(dtype), 1, 2) for y in (dk, dv))
  return dq, dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)


def _heads_first(q, k, v):
  """q as [b, k, g t, d]; k and v as [b, k, s, d]."""
  return (
    _rows_first(q, k.shape[2]),
    jnp.swapaxes(k, 1, 2),
    jnp.swapaxes(v, 1, 2),
  )


def _rows_first(x, num_kv_heads):
  """[b, t, n, d] -> [b, k, g t, d]."""
  b, t, n, d = x.shape
  x = x.reshape(b, t, num_kv_heads, n // num_kv_heads, d)
  return x.transpose(0, 2, 3, 1, 4).reshape(b, num_kv_heads, -1, d)


def _time_first(x, t):
  """[b, k, g t, d] -> [b, t, n, d]."""
  b, heads, rows, d = x.shape
  x = x.reshape(b, heads, rows // t, t, d).transpose(0, 3, 1, 2, 4)
  return x.reshape(b, t, -1, d)


def _per_row(sinks, like):
  """[n] -> [1, k, g, 1], beside `like` [b, k, g, t]."""
  return sinks.astype(like.dtype).reshape(1, *like.shape[1:3], 1)


def _to_rows(x, q):
  """[b|1, k|1, g|1, t] -> [b, k, g t, 1], beside q [b, k, g t, d]."""
  b, heads, rows, _ = q.shape
  t = x.shape[-1]
  x = jnp.broadcast_to(x, (b, heads, rows // t, t))
  return x.reshape(b, heads, rows, 1)


def _mask(options, q, k, extras) -> Bool[Array, "#b #k #g t s"] | None:
  mask = visible(
    lengths=(q.shape[1], k.shape[1]),
    num_kv_heads=k.shape[2],
    causal=options.causal,
    window=options.window,
    segment_ids=extras.segment_ids,
    kv_segment_ids=extras.kv_segment_ids,
    q_positions=extras.q_positions,
    kv_positions=extras.kv_positions,
  )
  if mask is not None and platform() == "cpu":
    # Fused into the exponential, the comparisons keep it from being
    # vectorised: a factor of five on the softmax.
    mask = jax.lax.optimization_barrier(mask)
  return mask


def _unseen(options, q, k, extras) -> bool:
  """Whether some query may see no key, or some key no query."""
  if options.causal and q.shape[1] > k.shape[1]:
    return True
  vectors = extras._replace(sinks=None, dropout_key=None)
  return options.window is not None or any(x is not None for x in vectors)


def _clean(mask, q, k, v):
  """Zeros for queries and keys that take no part, whatever they hold.

  0 NaN is NaN, so masked probabilities alone would let padding through.
  """
  q = jnp.where(_to_rows(jnp.any(mask, axis=-1), q), q, 0)
  keys = jnp.any(mask, axis=(2, 3))[..., None]  # [b|1, k|1, s, 1]
  return q, jnp.where(keys, k, 0), jnp.where(keys, v, 0)


def _logits(options, q, k, mask, t):
  """Masked logits [b k g t s], and the softcap's slope there or None."""
  b, heads, rows, _ = q.shape
  x = dot("bkrd,bksd->bkrs", q, k) * options.scale
  x = x.reshape(b, heads, rows // t, t, k.shape[2])
  slope = None
  if options.softcap is not None:
    unit = jnp.tanh(x / options.softcap)
    x, slope = options.softcap * unit, 1 - jnp.square(unit)
  if mask is not None:
    x = jnp.where(mask, x, _NEVER)
  return x, slope


def _drop(options, p, key):
  """Dropout of p [b k g t s]: the same entries for the same key."""
  if key is None:
    return p
  keep = 1 - options.dropout_rate
  kept = jax.random.bernoulli(key, keep, p.shape)
  return jnp.where(kept, p / keep, 0.0)
