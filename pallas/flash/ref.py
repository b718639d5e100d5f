"""Attention in plain XLA with t x s scores: runs everywhere, takes everything.

The backward rule is that of FlashAttention-2 (arxiv.org/abs/2307.08691): it
keeps (o, lse) and recomputes the probabilities, so that nothing of size t x s
outlives a layer. Inside, heads come before time, and the g query heads that
share a kv head are rows of one matmul: [b, k, g t, d] x [b, k, s, d].
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from isthmus.pallas.dispatch import platform
from isthmus.pallas.flash import dropout, joint
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import Lists, overflowed, to_blocks
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.precision import exact_dot

# What the forward rule calls its results, for policies of jax.checkpoint.
OUT, LSE = "attention_out", "attention_lse"

# The logit of a key that is not seen; finite, so that differences of logits
# never are NaN. Rows whose largest logit is below half of it are empty.
NEVER = -1e30


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
    >>> options = Options(predicate=Band(None, 0))
    >>> o, lse = attend(q, k, v, Extras(), options=options)
    >>> o.shape, lse.shape
    ((1, 4, 2, 8), (1, 2, 4))
  """
  sinks, rest = extras.sinks, extras._replace(sinks=None)
  return _attend(options, q, k, v, sinks, rest)


def backward(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  do: Float[Array, "b t n dv"],
  lse: Float[Array, "b n t"],
  delta: Float[Array, "b n t"],
  *,
  options: Options,
) -> tuple[
  Float[Array, "b t n d"], Float[Array, "b s k d"], Float[Array, "b s k dv"]
]:
  """(dq, dk, dv) through these keys, of queries that may see others too.

  `P = exp(x - lse)`, `dX = P (do . v - delta)`: with the lse over all keys,
  these are the shares that the keys at hand have in the gradients. Rows that
  see none of them have none.

  Args:
    q, k, v, extras, options: of `attend`; sinks are in the lse already.
    do: the cotangent of o.
    lse: over all keys, and the sinks if there are any.
    delta: of the same, see `isthmus.pallas.flash.joint`.

  Example:
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> o, lse = attend(q, k, v, Extras(), options=Options())
    >>> rest = (o, lse, joint.delta(o, lse, o, jnp.zeros_like(lse)))
    >>> dq, dk, dv = backward(q, k, v, Extras(), *rest, options=Options())
    >>> dv[0, :, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
  """
  mask, _ = _mask(options, q, k, extras)
  t, dtype = q.shape[1], q.dtype
  strays = may_miss(options, extras, t, k.shape[1])
  q, k, v = _heads_first(q, k, v)
  do = _rows_first(do, k.shape[1])
  if strays:
    q, k, v = _clean(mask, q, k, v)
    # A row without keys passes nothing on, whatever its cotangents hold.
    do = jnp.where(_to_rows(jnp.any(mask, axis=-1), q), do, 0)
  x, slope = _logits(options, q, k, mask, t)
  top = joint.weightless(lse).reshape(x.shape[:-1])
  delta = delta.reshape(x.shape[:-1])
  p = jnp.exp(x - top[..., None])
  square = (*q.shape[:3], x.shape[-1])
  kept = _drop(options, p, extras).astype(dtype)
  dv = exact_dot("bkrs,bkrd->bksd", kept.reshape(square), do)
  dp = exact_dot("bkrd,bksd->bkrs", do, v).reshape(x.shape)
  dp = _drop(options, dp, extras)
  dx = p * (dp - delta[..., None]) * options.scale
  if slope is not None:
    dx = dx * slope
  dx = dx.astype(dtype).reshape(square)
  dq = exact_dot("bkrs,bksd->bkrd", dx, k).astype(dtype)
  dk = exact_dot("bkrs,bkrd->bksd", dx, q).astype(dtype)
  dk, dv = (jnp.swapaxes(y.astype(dtype), 1, 2) for y in (dk, dv))
  return _time_first(dq, t), dk, dv


def may_miss(options: Options, extras: Extras, t: int, s: int) -> bool:
  """Whether some query may see no key, or some key no query.

  Only then can there be padding, and NaN in it.

  Example:
    >>> first = Options(predicate=Band(None, 0, offset=0))
    >>> may_miss(first, Extras(), 4, 4), may_miss(first, Extras(), 3, 4)
    (False, True)
  """
  band = options.predicate
  if extras.lists is not None:
    return True
  if band is None:
    return False
  if not isinstance(band, Band):
    return True
  left = t + s if band.left is None else band.left
  right = t + s if band.right is None else band.right
  first, last = band.offset, band.offset + t - 1
  queries = first + right >= 0 and last - left <= s - 1
  keys = first - left <= 0 and last + right >= s - 1
  return not (queries and keys and left + right >= 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, extras):
  mask, lost = _mask(options, q, k, extras)
  (b, t, n, _), dtype = q.shape, q.dtype
  strays = may_miss(options, extras, t, k.shape[1])
  q, k, v = _heads_first(q, k, v)
  if strays:
    q, k, v = _clean(mask, q, k, v)
  x, _ = _logits(options, q, k, mask, t)
  top = jnp.max(x, axis=-1)
  if sinks is not None:
    sinks = _per_row(sinks, top)
    top = jnp.maximum(top, sinks)
  top = jnp.where(top < 0.5 * NEVER, 0.0, top)
  p = jnp.exp(x - top[..., None])
  total = jnp.sum(p, axis=-1)
  if sinks is not None:
    total = total + jnp.exp(sinks - top)
  p = _drop(options, p, extras).astype(dtype)
  o = exact_dot("bkrs,bksd->bkrd", p.reshape(*q.shape[:3], -1), v)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  o = o / total.reshape(*q.shape[:3], 1)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  if lost is not None:
    lse = jnp.where(lost, jnp.nan, lse)
    o = jnp.where(_to_rows(lost, q), jnp.nan, o)
  return _time_first(o.astype(dtype), t), lse.reshape(b, n, t)


def _forward(options, q, k, v, sinks, extras):
  o, lse = _attend(options, q, k, v, sinks, extras)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, sinks, extras, o, lse)


def _backward(options, residuals, cotangents):
  q, k, v, sinks, extras, o, lse = residuals
  do, dlse = cotangents
  delta = joint.delta(o, lse, do, dlse)
  grads = backward(q, k, v, extras, do, lse, delta, options=options)
  return *grads, joint.sinks_back(sinks, lse, delta), None


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


def _mask(options, q, k, extras):
  """The element mask [b|1 k|1 g|1 t s], and the rows that lost keys.

  Each is None if there is none.
  """
  (_, t, _, _), (_, s, heads, _) = q.shape, k.shape
  mask = lost = None
  if options.predicate is not None:
    i, j = jnp.arange(t)[:, None], jnp.arange(s)
    mask = options.predicate(
      i,
      j,
      tuple(group(x, heads)[..., None] for x in extras.q),
      tuple(x[:, :, None, None, :] for x in extras.k),
    )
  if extras.lists is not None:
    full, partial, lost = _dense(extras.lists, t, s, heads)
    if partial is None:
      mask = full
    else:
      mask = full | (partial if mask is None else partial & mask)
  if mask is None:
    return None, None
  lead = ((1,) * (5 - mask.ndim) + mask.shape)[:3]
  mask = jnp.broadcast_to(mask, (*lead, t, s))
  if platform() == "cpu":
    # Fused into the exponential, the comparisons keep it from being
    # vectorised: a factor of five on the softmax.
    mask = jax.lax.optimization_barrier(mask)
  return mask, lost


def _dense(
  lists: Lists, t: int, s: int, heads: int
) -> tuple[Bool[Array, "..."], Bool[Array, "..."] | None, Bool[Array, "..."]]:
  """Elements of full and of partial blocks; rows whose lists overflow."""
  bq, bk = lists.block

  def rows(x):
    return group(jnp.repeat(x, bq, axis=2)[:, :, :t], heads)

  def elements(x):
    return jnp.repeat(rows(x), bk, axis=-1)[..., :s]

  full, partial = to_blocks(lists, -(-s // bk))
  partial = None if partial is None else elements(partial)
  return elements(full), partial, rows(overflowed(lists))


def group(
  x: Shaped[Array, "b n ..."], num_kv_heads: int
) -> Shaped[Array, "b k g ..."]:
  """[b, n|1, ...] -> [b, k|1, g|1, ...]: query head n reads kv head n // g.

  Example:
    >>> group(jnp.ones((1, 6, 5)), 2).shape, group(jnp.ones((1, 1, 5)), 2).shape
    ((1, 2, 3, 5), (1, 1, 1, 5))
  """
  b, n = x.shape[:2]
  lead = (b, 1, 1) if n == 1 else (b, num_kv_heads, n // num_kv_heads)
  return x.reshape(*lead, *x.shape[2:])


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
  x = exact_dot("bkrd,bksd->bkrs", q, k) * options.scale
  x = x.reshape(b, heads, rows // t, t, k.shape[2])
  slope = None
  if options.softcap is not None:
    unit = jnp.tanh(x / options.softcap)
    x, slope = options.softcap * unit, 1 - jnp.square(unit)
  if mask is not None:
    x = jnp.where(mask, x, NEVER)
  return x, slope


def _drop(options, p, extras):
  """Dropout of p [b k g t s]: the same entries for the same key."""
  if extras.dropout_key is None:
    return p
  b, k, g, t, s = p.shape
  row, head = (0, 0) if extras.first is None else extras.first
  kept = dropout.keep(
    dropout.words(extras.dropout_key),
    row + jnp.arange(b).reshape(b, 1, 1, 1, 1),
    head + jnp.arange(k * g).reshape(k, g, 1, 1),
    jnp.arange(t)[:, None],
    jnp.arange(s),
    options.dropout_rate,
  )
  return jnp.where(kept, p / (1 - options.dropout_rate), 0.0)
