"""Attention in plain XLA and linear memory, on any device.

A scan over query blocks holds a loop over the key blocks that each has to
meet, with the running maximum, sum and output of FlashAttention-2
(arxiv.org/abs/2307.08691). The backward rule walks the same way once, again
from (q, k, v, o, lse) alone, and adds to dk and dv as it goes: in one order,
so that repeats agree to the last bit.

Two kinds of walk share the steps. Without lists, blocks are chunks of this
file's choice, common to all rows and heads, and a chunk that nobody sees is
left out. With lists, each row and head takes its own blocks, some at a time;
the work is that of the longest list.

Scores are [b k g c w]: g query heads of a kv head, c queries, w keys. Keys
come in lanes, [b k l w d], l being 1 where the heads of a group share their
blocks, and g where they don't.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform
from isthmus.pallas.flash import dropout, joint, ref
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.hops import hops
from isthmus.pallas.flash.lists import overflowed
from isthmus.pallas.flash.ref import LSE, NEVER, OUT, may_miss
from isthmus.pallas.precision import accumulator, exact_dot

#: Queries and keys of a chunk on a platform; what has no more scores than a
#: chunk goes to `ref`. On two CPU cores 256 x 256 was the fastest of five, or
#: close to it, from 512 to 4096 tokens. The others' are bounded by memory.
CHUNK = {"cpu": (256, 256), "gpu": (512, 1024), "tpu": (512, 512)}


def attend(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  *,
  options: Options,
  chunk: tuple[int, int] | None = None,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) of `isthmus.attention.attention`, whose checks are done.

  Args:
    q, k, v, extras, options: see `isthmus.pallas.flash.api`.
    chunk: queries and keys of a chunk; by default the platform's. A call
      that has no more scores than a chunk is made whole.

  Example:
    >>> q = k = v = jnp.ones((1, 2048, 1, 8))
    >>> o, lse = attend(q, k, v, Extras(), options=Options())
    >>> o.shape, lse.shape
    ((1, 2048, 1, 8), (1, 1, 2048))
  """
  chunk = chunk or CHUNK.get(platform(), CHUNK["gpu"])
  if q.shape[1] * k.shape[1] <= chunk[0] * chunk[1]:
    return ref.attend(q, k, v, extras, options=options)
  sinks, rest = extras.sinks, extras._replace(sinks=None)
  return _attend(options, chunk, q, k, v, sinks, rest)


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
  chunk: tuple[int, int] | None = None,
) -> tuple[
  Float[Array, "b t n d"], Float[Array, "b s k d"], Float[Array, "b s k dv"]
]:
  """(dq, dk, dv) through these keys, see `isthmus.pallas.flash.ref`.

  Args:
    q, k, v, extras, options, chunk: as in `attend`; sinks are in the lse.
    do, lse, delta: of all keys, see `isthmus.pallas.flash.ref.backward`.

  Example:
    >>> q = k = v = jnp.ones((1, 2048, 1, 8))
    >>> o, lse = attend(q, k, v, Extras(), options=Options())
    >>> rest = (o, lse, joint.delta(o, lse, o, jnp.zeros_like(lse)))
    >>> grads = backward(q, k, v, Extras(), *rest, options=Options())
    >>> [x.shape for x in grads]
    [(1, 2048, 1, 8), (1, 2048, 1, 8), (1, 2048, 1, 8)]
  """
  chunk = chunk or CHUNK.get(platform(), CHUNK["gpu"])
  if q.shape[1] * k.shape[1] <= chunk[0] * chunk[1]:
    return ref.backward(q, k, v, extras, do, lse, delta, options=options)
  return _walk_back(options, chunk, q, k, v, extras, do, lse, delta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, chunk, q, k, v, sinks, extras):
  return _walk(options, chunk, q, k, v, sinks, extras)


def _forward(options, chunk, q, k, v, sinks, extras):
  o, lse = _walk(options, chunk, q, k, v, sinks, extras)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, sinks, extras, o, lse)


def _backward(options, chunk, residuals, cotangents):
  q, k, v, sinks, extras, o, lse = residuals
  do, dlse = cotangents
  delta = joint.delta(o, lse, do, dlse)
  grads = _walk_back(options, chunk, q, k, v, extras, do, lse, delta)
  return *grads, joint.sinks_back(sinks, lse, delta), None


_attend.defvjp(_forward, _backward)


# Compiled once for each set of options: outside of jit, each call would
# compile its loops again.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(options, chunk, q, k, v, sinks, extras):
  t, acc = q.shape[1], accumulator(q.dtype)
  walk = hops(options, extras, q, k, v, chunk)
  strays = may_miss(options, extras, t, k.shape[1])

  def block(_, xs):
    here, q = xs
    b, k, g, c, _ = q.shape
    shape = (b, k, g, c)
    if sinks is None:
      top, total = _full(q, shape, NEVER, acc), _full(q, shape, 0, acc)
    else:
      top = _full(q, shape, 0, acc) + sinks.astype(acc).reshape(1, k, g, 1)
      total = _full(q, shape, 1, acc)
    o = _full(q, (*shape, v.shape[-1]), 0, acc)

    def step(carry, hop):
      top, total, o = carry
      k, v = _clean(hop, strays)
      x, _ = _logits(options, q, k, hop.mask)
      new = jnp.maximum(top, jnp.max(x, axis=-1))
      base = jnp.where(new < 0.5 * NEVER, 0.0, new)
      p, share = jnp.exp(x - base[..., None]), jnp.exp(top - base)
      total = total * share + jnp.sum(p, axis=-1)
      p = _drop(options, p, extras, here, hop).astype(q.dtype)
      o = o * share[..., None] + _lanes(_values, p, v)
      return new, total, o

    top, total, o = walk.loop(step, (top, total, o), here)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return None, ((o / total[..., None]).astype(q.dtype), lse)

  _, (o, lse) = jax.lax.scan(block, None, (walk.blocks, walk.queries(q)))
  o, lse = walk.time_first(o), walk.rows(lse)
  if extras.lists is not None:
    lost = _lost(extras.lists, t, lse.shape)
    lse = jnp.where(lost, jnp.nan, lse)
    o = jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, o)
  return o, lse


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk_back(options, chunk, q, k, v, extras, do, lse, delta):
  t, acc = q.shape[1], lse.dtype
  walk = hops(options, extras, q, k, v, chunk)
  strays = may_miss(options, extras, t, k.shape[1])

  def block(carry, xs):
    here, q, do, top, delta = xs
    dq = _full(q, q.shape, 0, acc)

    def step(carry, hop):
      dq, dk, dv = carry
      k, v = _clean(hop, strays)
      g, y, z = delta, q, do
      if strays and hop.mask is not None:
        # A row that sees none of these passes nothing on, whatever it holds.
        rows = jnp.any(hop.mask, axis=-1)
        rows = jnp.broadcast_to(rows, g.shape)
        y, z = (jnp.where(rows[..., None], x, 0) for x in (q, do))
        g = jnp.where(rows, g, 0)
      x, slope = _logits(options, y, k, hop.mask)
      p = jnp.exp(x - top[..., None])
      kept = _drop(options, p, extras, here, hop).astype(q.dtype)
      dp = _lanes(_scores, z, v)
      dp = _drop(options, dp, extras, here, hop)
      dx = p * (dp - g[..., None]) * options.scale
      if slope is not None:
        dx = dx * slope
      dx = dx.astype(q.dtype)
      dq = dq + _lanes(_values, dx, k)
      dk = hop.add(dk, _to_keys(dx, y, k.shape[2]))
      dv = hop.add(dv, _to_keys(kept, z, k.shape[2]))
      return dq, dk, dv

    dq, *carry = walk.loop(step, (dq, *carry), here)
    return tuple(carry), dq.astype(q.dtype)

  carry = (walk.zeros(k, acc), walk.zeros(v, acc))
  rows = map(walk.split, (joint.weightless(lse), delta))
  xs = (walk.queries(q), walk.queries(do), *rows)
  (dk, dv), dq = jax.lax.scan(block, carry, (walk.blocks, *xs))
  dq = walk.time_first(dq)
  if extras.lists is not None:
    lost = _lost(extras.lists, t, lse.shape)
    dq = jnp.where(jnp.swapaxes(lost, 1, 2)[..., None], jnp.nan, dq)
  return dq, walk.keys_back(dk, k), walk.keys_back(dv, v)


def _full(like, shape, value, dtype):
  """A constant that varies over a mesh as `like` does."""
  return jax.lax.full_like(like, value, dtype, shape=shape)


def _lost(lists, t, shape):
  """[b n t], the rows whose lists overflow."""
  lost = jnp.repeat(overflowed(lists), lists.block[0], axis=2)[..., :t]
  return jnp.broadcast_to(lost, shape)


def _clean(hop, strays):
  """k and v of a hop, zero where none of its queries sees a key.

  0 NaN is NaN, so masked probabilities alone would let padding through.
  """
  k, v, mask = hop.k, hop.v, hop.mask
  if not strays or mask is None:
    return k, v
  keys = jnp.any(mask, axis=3)  # [b|1 k|1 g|1 w]
  if k.shape[2] == 1:
    keys = jnp.any(keys, axis=2, keepdims=True)
  return tuple(jnp.where(keys[..., None], x, 0) for x in (k, v))


def _logits(options, q, k, mask):
  """Masked logits [b k g c w], and the softcap's slope there or None."""
  x = _lanes(_scores, q, k) * options.scale
  slope = None
  if options.softcap is not None:
    unit = jnp.tanh(x / options.softcap)
    x, slope = options.softcap * unit, 1 - jnp.square(unit)
  if mask is not None:
    x = jnp.where(mask, x, NEVER)
  return x, slope


_scores = functools.partial(exact_dot, "bklrd,bklwd->bklrw")
_values = functools.partial(exact_dot, "bklrw,bklwd->bklrd")


def _lanes(product, x, y):
  """`product` of x [b k g c .] and y [b k l w .], heads that share as rows."""
  b, k, g, c, last = x.shape
  x = x.reshape(b, k, y.shape[2], -1, last)
  return product(x, y).reshape(b, k, g, c, -1)


def _to_keys(x, y, lanes):
  """x [b k g c w] turned, by y [b k g c d]: [b k l w d]."""
  x, y = (z.reshape(*z.shape[:2], lanes, -1, z.shape[-1]) for z in (x, y))
  return exact_dot("bklrw,bklrd->bklwd", x, y)


def _drop(options, p, extras, here, hop):
  """Dropout of p [b k g c w]: the same entries for the same key."""
  if extras.dropout_key is None:
    return p
  b, k, g, c, _ = p.shape
  row, head = (0, 0) if extras.first is None else extras.first
  kept = dropout.keep(
    dropout.words(extras.dropout_key),
    row + jnp.arange(b).reshape(b, 1, 1, 1, 1),
    head + jnp.arange(k * g).reshape(k, g, 1, 1),
    here.index * c + jnp.arange(c)[:, None],
    hop.j,
    options.dropout_rate,
  )
  return jnp.where(kept, p / (1 - options.dropout_rate), 0.0)
