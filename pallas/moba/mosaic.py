"""Block routing on Hopper: the Mosaic GPU kernels behind one call.

A kernel finds the blocks of each query. What follows is in the order of
blocks: rows are gathered to the places of their choices, one kernel goes
through the rows of each block, and a row gathers and merges what it finds in
its places. Gathers and kernels read and write every place a few times, which
is most of the time; nothing of it is larger than LIMIT, for lanes (the kv
heads of batch rows) come in groups, one after another.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from isthmus.pallas.compat import has_mosaic, interpreting
from isthmus.pallas.flash.mosaic import refuse_device
from isthmus.pallas.flash.ref import LSE, OUT
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.moba.parts import merged, summed, taken
from isthmus.pallas.moba.places import Places, arrange, block_tiles, split
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.rows import chunks
from isthmus.pallas.moba.select import choose

#: Bytes of the rows of a group of lanes, in places.
LIMIT = 2**30
#: Rows of a tile; `tile.ROWS`, which can't be imported without Mosaic GPU.
ROWS = 64
#: Keys of a block that the kernels are compiled for. Larger ones are split.
KEYS = (64, 128)
#: The widths that they are compiled for; others are padded with zeros.
WIDTHS = (64, 128)

_LOG2E = 1.4426950408889634


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
    >>> x = jax.ShapeDtypeStruct((1, 130, 2, 40), jnp.bfloat16)
    >>> extras = Extras(uniform(130, 130, block=64))
    >>> options = Options(block=64, top_k=2)
    >>> run = lambda x: attend(x, x, x, extras, options=options)
    >>> [y.shape for y in jax.eval_shape(run, x)]
    [(1, 130, 2, 40), (1, 2, 130)]
  """
  value_width = v.shape[3]
  width = max(q.shape[3], value_width)
  width = next(x for x in WIDTHS if x >= width)
  q, k, v = (_widen(x, width) for x in (q, k, v))
  if extras.centroids is not None:
    extras = extras._replace(centroids=_widen(extras.centroids, width))
  o, lse = _attend(options, q, k, v, extras)
  return o[..., :value_width], lse


def refuse(q, k, v, extras: Extras, *, options: Options) -> str | None:
  """Why the kernels can't take a call, or None.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> extras, options = Extras(uniform(128, 128, block=64)), Options(64, 2)
    >>> refuse(x, x, x, extras, options=options)  # on a CPU
    'it needs an NVIDIA Hopper GPU, and the platform is cpu'
  """
  if not has_mosaic():
    return f"it needs jax 0.11, and this is {jax.__version__}"
  if not interpreting():
    reason = refuse_device()
    if reason is not None:
      return reason
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {q.dtype}"
  if not options.scale > 0:
    return f"it takes scales above 0, not {options.scale}"
  width = max(q.shape[3], v.shape[3])
  if width > WIDTHS[-1]:
    return f"it takes head widths up to {WIDTHS[-1]}, not {width}"
  if min(q.size, k.size, v.size) == 0:
    return f"it takes no empty arrays: {q.shape}, {k.shape}, {v.shape}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, extras):
  return _walk(options, q, k, v, extras.layout, _choose(options, q, k, extras))


def _forward(options, q, k, v, extras):
  # Kept with o under its policy, as in `chunked`.
  choice = checkpoint_name(_choose(options, q, k, extras), OUT)
  o, lse = _walk(options, q, k, v, extras.layout, choice)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, extras.layout, choice, o, lse)


def _backward(options, residuals, cotangents):
  return *_walk_back(options, residuals, cotangents), None


_attend.defvjp(_forward, _backward)


def _choose(options, q, k, extras) -> Int32[Array, "b n t c"]:
  """As `select.choose`, chosen blocks in any order."""
  from isthmus.pallas.moba.mosaic_select import MOST, TILE, best

  layout, causal, top_k = extras.layout, options.causal, options.top_k
  centroids = extras.centroids
  if centroids is None:
    centroids = pool(k, layout, block=options.block)
  g, count = centroids.shape[1], top_k - causal
  if not 0 < count < g or count > MOST:
    return choose(q, centroids, layout, top_k=top_k, causal=causal)
  first, last = layout.first, layout.last
  ends = ((0, 0), (0, -q.shape[1] % ROWS))
  able = first < last
  span = jnp.stack(
    [
      jnp.pad(jnp.where(able, first, g), ends, constant_values=g)
      .reshape(first.shape[0], -1, ROWS)
      .min(axis=2),
      jnp.pad(jnp.where(able, last, 0), ends)
      .reshape(last.shape[0], -1, ROWS)
      .max(axis=2),
    ],
    axis=1,
  )
  found = best(
    _longer(q, ROWS),
    _longer(centroids, TILE),
    jnp.pad(first, ends),
    jnp.pad(last, ends),
    span.astype(jnp.int32),
    count=count,
  )[..., : q.shape[1]]
  found = jnp.where(found < 0, -1, found).astype(jnp.int32)
  found = jnp.swapaxes(found, 2, 3)
  if causal:
    own = layout.own[:, None, :, None]
    own = jnp.broadcast_to(own, (*found.shape[:3], 1))
    found = jnp.concatenate([own, found], axis=-1)
  return found


@functools.partial(jax.jit, static_argnums=0)
def _walk(options, q, k, v, layout, choice):
  from isthmus.pallas.moba.mosaic_forward import forward

  parts, rows, blocks = _inputs(options, q, k, layout, choice)

  def some(q, k, v, *rows):
    places, lists = _lists(rows, k)
    o, lse = forward(taken(q, places.row), k, v, lists, scale=options.scale)
    o, lse = merged(o, lse, places.place, places.real)
    return o.astype(q.dtype), lse

  args = (parts.rows(q)[0], blocks.keys(k), blocks.keys(v), *rows)
  o, lse = _groups(some, args)
  return parts.back(o[None]), jnp.swapaxes(parts.back(lse[None]), 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _walk_back(options, residuals, cotangents):
  from isthmus.pallas.moba.mosaic_backward import backward

  q, k, v, layout, choice, o, lse = residuals
  do, dlse = cotangents
  parts, rows, blocks = _inputs(options, q, k, layout, choice)
  delta = jnp.einsum(
    "btnd,btnd->bnt", *(x.astype(jnp.float32) for x in (do, o))
  )
  stats = jnp.stack([lse * _LOG2E, delta - dlse], axis=-1)

  def some(q, do, stats, k, v, *rows):
    places, lists = _lists(rows, k)
    lse = taken(stats[..., 0], places.row, jnp.inf)
    q, do = taken(q, places.row), taken(do, places.row)
    delta = taken(stats[..., 1], places.row)
    dq, dk, dv = backward(q, do, k, v, lse, delta, lists, scale=options.scale)
    dq = summed(dq, places.place, places.real) * options.scale
    return dq.astype(q.dtype), dk, dv

  args = (
    parts.rows(q)[0],
    parts.rows(do)[0],
    parts.stats(stats)[0],
    blocks.keys(k),
    blocks.keys(v),
    *rows,
  )
  dq, dk, dv = _groups(some, args)
  return parts.back(dq[None]), blocks.back(dk), blocks.back(dv)


class _Blocks:
  """Keys as blocks of a size that kernels take, and back."""

  def __init__(self, parts, start, stop, seen, size, aligned, s):
    self.parts, self.start, self.stop, self.seen = parts, start, stop, seen
    self.size, self.aligned, self.s = size, aligned, s

  def keys(self, x):
    """[b s k d] -> [l g w d], 0 where there is no key that anyone sees."""
    x = self.parts.lanes(x)
    d = x.shape[2]
    if self.aligned:
      # 0 NaN is NaN, so probabilities of 0 alone would let it through.
      there = jnp.arange(self.s) < self.parts.each(self.seen)
      x = jnp.where(there[..., None], x, 0)
      ends = self.start.shape[1] * self.size - self.s
      x = jnp.pad(x, ((0, 0), (0, ends), (0, 0)))
    else:
      index = self.start[..., None] + jnp.arange(self.size, dtype=jnp.int32)
      stop = jnp.minimum(self.stop, self.parts.each(self.seen))
      there = (index < stop[..., None]).reshape(x.shape[0], -1)
      x = taken(x, jnp.where(there, index.reshape(there.shape), self.s))
    return x.reshape(x.shape[0], -1, self.size, d)

  def back(self, x):
    """[l g w d] -> [b s k d], 0 for a key of no block."""
    lanes, g, _, d = x.shape
    x = x.reshape(lanes, -1, d)
    if self.aligned:
      x = x[:, : self.s]
    else:
      key = jnp.arange(self.s, dtype=jnp.int32)
      find = functools.partial(jnp.searchsorted, side="right")
      block = jax.vmap(find, in_axes=(0, None))(self.stop, key)
      start = jnp.take_along_axis(self.start, block, axis=1, mode="clip")
      index = block * self.size + key - start
      x = taken(x, jnp.where(block < g, index, x.shape[1]))
    x = x.reshape(self.parts.b, self.parts.heads, self.s, d)
    return jnp.swapaxes(x, 1, 2)


def _inputs(options, q, k, layout: BlockLayout, choice):
  """The chunk of all rows; (choice, at, start, stop) of lanes; the blocks."""
  b, t, n, _ = q.shape
  parts, block = chunks(q, k, t * n), options.block
  size = next((x for x in KEYS if x >= block), KEYS[-1])
  choice, start, stop = split(
    choice, layout.start, layout.stop, block=block, size=size
  )
  start, stop = parts.each(start), parts.each(stop)
  at = jnp.broadcast_to(layout.at[..., None], (b, t, n))
  rows = (
    parts.rows(jnp.swapaxes(choice, 1, 2), -1)[0],
    parts.rows(at)[0],
    start,
    stop,
  )
  aligned = layout.lost is None and block % size == 0
  last = jnp.max(layout.at, axis=1, keepdims=True)
  seen = jnp.minimum(last, k.shape[1] - 1) + 1
  return (
    parts,
    rows,
    _Blocks(parts, start, stop, seen, size, aligned, k.shape[1]),
  )


def _lists(rows, k) -> tuple[Places, tuple]:
  places = arrange(*rows, tile=ROWS)
  return places, block_tiles(places, ROWS, k.shape[2])


def _groups(function, args):
  """function(*args), lanes in as few groups as LIMIT allows."""
  q, k, choice = args[0], args[-6], args[-4]
  lanes, entries = q.shape[0], choice.shape[1] * choice.shape[2]
  size = (entries + k.shape[1] * ROWS) * q.shape[2] * q.dtype.itemsize
  most = max(LIMIT // size, 1)
  some = max(x for x in range(1, lanes + 1) if lanes % x == 0 and x <= most)
  if some == lanes:
    return function(*args)
  args = [x.reshape(-1, some, *x.shape[1:]) for x in args]
  out = jax.lax.map(lambda args: function(*args), args)
  return tuple(x.reshape(lanes, *x.shape[2:]) for x in out)


def _longer(x, size):
  """Tokens padded to a multiple of `size`."""
  short = -x.shape[1] % size
  return jnp.pad(x, [(0, 0), (0, short), (0, 0), (0, 0)]) if short else x


def _widen(x, width):
  short = width - x.shape[3]
  return jnp.pad(x, [(0, 0)] * 3 + [(0, short)]) if short else x
