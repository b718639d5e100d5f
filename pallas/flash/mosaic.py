"""Attention on Hopper: the Mosaic GPU kernels behind one differentiable call.

Dense attention is the walk along all tiles, causal and windowed attention a
walk along a range of them, and everything else a walk along lists. What is
done here, in XLA, is small: lists of tiles, their order by falling work, and
`delta = rowsum(do o) - dlse`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from isthmus.pallas.flash import joint
from isthmus.pallas.flash import lists as listing
from isthmus.pallas.flash import plan as planning
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.flash.ref import LSE, OUT, may_miss
from isthmus.pallas.hopper import WIDTHS, refuse_machine

#: Tokens of a listed tile, of queries and of keys; `tile.BLOCK`, which can't be
#: imported where jax has no Mosaic GPU.
BLOCK = 128
# Tiles that a list of tiles is taken to name, if it has room for more: how many
# are known only when it runs.
_USUAL = 16


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
    >>> x = jax.ShapeDtypeStruct((1, 130, 2, 40), jnp.bfloat16)
    >>> run = lambda x: attend(x, x, x, Extras(), options=Options())
    >>> [y.shape for y in jax.eval_shape(run, x)]
    [(1, 130, 2, 40), (1, 2, 130)]
  """
  value_width = v.shape[3]
  width, wide = _widths(q, v)
  q, k, v = _widen(q, width), _widen(k, width), _widen(v, wide)
  sinks, rest = extras.sinks, extras._replace(sinks=None)
  o, lse = _attend(options, q, k, v, sinks, rest)
  return o[..., :value_width], lse


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
  """(dq, dk, dv) through these keys, see `isthmus.pallas.flash.ref.backward`.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 130, 2, 40), jnp.bfloat16)
    >>> rows = jax.ShapeDtypeStruct((1, 2, 130), jnp.float32)
    >>> run = lambda x, rows: backward(
    ...   x, x, x, Extras(), x, rows, rows, options=Options()
    ... )
    >>> [y.shape for y in jax.eval_shape(run, x, rows)]
    [(1, 130, 2, 40), (1, 130, 2, 40), (1, 130, 2, 40)]
  """
  from isthmus.pallas.flash.configs import configs

  d, value_width = q.shape[3], v.shape[3]
  width, wide = _widths(q, v)
  q, k, v, do = (
    _widen(x, size)
    for x, size in ((q, width), (k, width), (v, wide), (do, wide))
  )
  config = configs(width, wide)
  dq, dk, dv = _walk_back(options, config, q, k, v, extras, do, lse, delta)
  return dq[..., :d], dk[..., :d], dv[..., :value_width]


def refuse(q, k, v, extras: Extras, *, options: Options) -> str | None:
  """Why the kernels can't take a call, or None.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> refuse(x, x, x, Extras(), options=Options())  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  reason = refuse_machine()
  if reason is not None:
    return reason
  return refuse_call(q, k, v, extras, options)


def refuse_call(q, k, v, extras: Extras, options: Options) -> str | None:
  """What the kernels can't take on any machine.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
    >>> refuse_call(x, x, x, Extras(), Options())
    'it takes bfloat16 and float16, not float32'
  """
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {q.dtype}"
  if options.dropout_rate:
    return f"it does not take dropout ({options.dropout_rate})"
  if not options.scale > 0:
    return f"it takes scales above 0, not {options.scale}"
  width = max(q.shape[3], v.shape[3])
  if width > WIDTHS[-1]:
    return f"it takes head widths up to {WIDTHS[-1]}, not {width}"
  if extras.lists is not None:
    block = extras.lists.block
    if block[0] % BLOCK or block[1] % BLOCK:
      return f"it takes blocks of multiples of {BLOCK} tokens, not {block}"
  if min(q.size, k.size, v.size) == 0:
    return f"it takes no empty arrays: {q.shape}, {k.shape}, {v.shape}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, extras):
  from isthmus.pallas.flash.configs import configs

  config = configs(q.shape[3], v.shape[3])
  return _walk(options, config, q, k, v, sinks, extras)


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

_LOG2E = 1.4426950408889634


# A model's layers differ in nothing that these two are compiled for: under jit
# they are traced and lowered once, which takes seconds, not once a layer.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(options, config, q, k, v, sinks, extras):
  from isthmus.pallas.flash.mosaic_forward import fitted, forward

  b, t, n, _ = q.shape
  k, v = _clean_keys(options, q, k, v, extras)
  plan = _plan(options, q, k, extras, sinks)
  arrays = (_even(x) for x in (q, k, v))
  fit = fitted(config.forward, b * n, t, plan.lists is not None)
  o, lse = forward(*arrays, plan, options, fit)
  return o[:, :t], lse[..., :t]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk_back(options, config, q, k, v, extras, do, lse, delta):
  from isthmus.pallas.flash.mosaic_backward import (
    backward_keys,
    backward_queries,
  )

  t, s, width = q.shape[1], k.shape[1], q.shape[3]
  k, v = _clean_keys(options, q, k, v, extras)
  if _rows_miss(options, extras, t, s):
    # A row without keys passes nothing on, whatever it and do hold.
    rows = jnp.swapaxes(jnp.isneginf(lse), 1, 2)[..., None]
    q, do = jnp.where(rows, 0, q), jnp.where(rows, 0, do)
  short = [(0, 0), (0, 0), (0, -t % BLOCK)]
  lse2 = jnp.pad(joint.weightless(lse) * _LOG2E, short, constant_values=jnp.inf)
  plan = _plan(options, q, k, extras, None)
  turned = _transposed(plan, k.shape[2])
  arrays = (*(_even(x) for x in (q, k, v, do)), lse2, jnp.pad(delta, short))
  dq = backward_queries(*arrays, plan, options, config.queries)
  keys = functools.partial(backward_keys, *arrays, turned, options, config.keys)
  if width > 128:
    (dk,), (dv,) = keys(wanted=("dk",)), keys(wanted=("dv",))
  else:
    dk, dv = keys()
  return dq[:, :t], dk[:, :s], dv[:, :s]


def _rows_miss(options, extras, t, s):
  """Whether a tile that is walked may hold a row without keys."""
  lists = extras.lists
  if lists is not None and lists.partial is None:
    return False  # listed tiles are seen whole, by each of their rows
  return may_miss(options, extras, t, s)


def _plan(options, q, k, extras, sinks):
  """How query tiles walk along key tiles."""
  from isthmus.pallas.flash.tile import Plan
  from isthmus.pallas.flash.walk import band_steps

  predicate, t, s = options.predicate, q.shape[1], k.shape[1]
  if sinks is not None:
    sinks = sinks.astype(jnp.float32)
  if extras.lists is None and (
    predicate is None or isinstance(predicate, Band)
  ):
    band = predicate or Band(None, None)
    return Plan((t, s), band=band, sinks=sinks, steps=band_steps(band, (t, s)))
  lists = planning.tiles(
    extras.lists,
    predicate,
    extras.q,
    extras.k,
    t=t,
    s=s,
    block=(BLOCK, BLOCK),
    num_heads=q.shape[2],
  )
  return Plan(
    (t, s),
    lists=lists,
    order=_order(_work(lists)),
    q=tuple(_whole(x) for x in extras.q),
    k=tuple(_whole(x) for x in extras.k),
    sinks=sinks,
    steps=min(_USUAL, sum(listing.capacities(lists))),
  )


def _transposed(plan, heads):
  """How key tiles walk along query tiles."""
  from isthmus.pallas.flash.mosaic_backward import transposed
  from isthmus.pallas.flash.tile import Plan

  if plan.lists is None:
    return Plan(plan.lengths, band=transposed(plan.band))
  lists = listing.transpose(plan.lists, -(-plan.lengths[1] // BLOCK))
  work = _work(lists)
  if work.shape[1] > 1:  # a kv head walks for all its query heads
    work = work.reshape(work.shape[0], heads, -1, work.shape[2]).sum(axis=2)
  return Plan(plan.lengths, lists=lists, order=_order(work), q=plan.q, k=plan.k)


def _work(lists):
  work = lists.full_num
  return work if lists.partial is None else work + lists.partial_num


def _order(work):
  """Rows by falling work, so that what starts last is short."""
  return jnp.argsort(-work, axis=-1).astype(jnp.int32)


def _clean_keys(options, q, k, v, extras):
  """Keys and values, those that no query tile may see being 0.

  0 NaN is NaN, so masked probabilities alone would let padding through. Of
  tiles that are not listed nothing is read, so that lists hide no padding.
  """
  everywhere = extras._replace(lists=None)
  if options.predicate is None or not may_miss(
    options, everywhere, q.shape[1], k.shape[1]
  ):
    return k, v
  some, _ = planning.classify(
    options.predicate,
    extras.q,
    extras.k,
    t=q.shape[1],
    s=k.shape[1],
    block=(BLOCK, 1),
    num_heads=q.shape[2],
  )
  seen = jnp.any(some, axis=2)  # [b|1, n|1, s]
  if seen.shape[1] > 1:
    seen = seen.reshape(seen.shape[0], k.shape[2], -1, seen.shape[2]).any(
      axis=2
    )
  seen = jnp.swapaxes(seen, 1, 2)[..., None]
  return jnp.where(seen, k, 0), jnp.where(seen, v, 0)


def _whole(x: Any) -> Any:
  """Operands padded to whole tiles; masks of lengths hide what is added."""
  return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % BLOCK)])


def _even(x):
  """Tokens padded to a multiple of 8, the rows that TMA copies at once."""
  short = -x.shape[1] % 8
  return jnp.pad(x, [(0, 0), (0, short), (0, 0), (0, 0)]) if short else x


def _width(width: int) -> int:
  return next(x for x in WIDTHS if x >= width)


def _widths(q, v):
  """Of the kernels: queries' and values'."""
  width, wide = _width(q.shape[3]), _width(v.shape[3])
  if max(width, wide) > 128:  # one buffer serves queries, then outputs
    width = wide = max(width, wide)
  return width, wide


def _widen(x, width):
  short = width - x.shape[3]
  return jnp.pad(x, [(0, 0)] * 3 + [(0, short)]) if short else x
