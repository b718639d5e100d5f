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

from isthmus.pallas.flash.ref import LSE, OUT
from isthmus.pallas.hopper import refuse_machine
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.keys import Blocks, pieces
from isthmus.pallas.moba.layout import BlockLayout
from isthmus.pallas.moba.parts import merged, summed
from isthmus.pallas.moba.places import Places, arrange, block_tiles, split
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.rows import chunks
from isthmus.pallas.moba.select import choose

#: Bytes of the rows of a group of lanes, in places.
LIMIT = 2**30
#: Bytes of the choices of a lane, as rows, beyond which its queries take turns.
TURN = 2**31
#: Rows of a tile; `tile.ROWS`, which can't be imported without Mosaic GPU.
ROWS = 64
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
  reason = refuse_machine()
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
  choice = _choose(options, q, k, extras)
  places = _arrange(options, q, k, extras.layout, choice)
  return _walk(options, q, k, v, extras.layout, places)


def _forward(options, q, k, v, extras):
  # Kept with o under its policy, as in `chunked`; places are made of it again.
  choice = checkpoint_name(_choose(options, q, k, extras), OUT)
  places = _arrange(options, q, k, extras.layout, choice)
  o, lse = _walk(options, q, k, v, extras.layout, places)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, extras.layout, places, o, lse)


def _backward(options, residuals, cotangents):
  return *_walk_back(options, residuals, cotangents), None


_attend.defvjp(_forward, _backward)


def routing(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  extras: Extras,
  *,
  options: Options,
) -> tuple[Int32[Array, "b n t c"], Places]:
  """The choice and its places: all that goes before the first product of rows.

  `attend` does the same in groups of lanes. This is for those who measure it.

  Args:
    q, k, extras, options: as in `attend`; the width is one of `WIDTHS`.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    >>> extras, options = Extras(uniform(128, 128, block=64)), Options(64, 2)
    >>> run = lambda x: routing(x, x, extras, options=options)
    >>> jax.eval_shape(run, x)[0].shape
    (1, 2, 128, 2)
  """
  choice = _choose(options, q, k, extras)
  return choice, _arrange(options, q, k, extras.layout, choice)


def _choose(options, q, k, extras) -> Int32[Array, "b n t c"]:
  """As `select.choose`, chosen blocks in any order."""
  from isthmus.pallas.moba.mosaic_select import MOST, TILE, best, spans

  layout, causal, top_k = extras.layout, options.causal, options.top_k
  centroids = extras.centroids
  if centroids is None:
    centroids = pool(k, layout, block=options.block)
  g, count = centroids.shape[1], top_k - causal
  if not 0 < count < g or count > MOST:
    return choose(q, centroids, layout, top_k=top_k, causal=causal)
  first, last = layout.first, layout.last
  ends = ((0, 0), (0, -q.shape[1] % ROWS))
  found = best(
    _longer(q, ROWS),
    _longer(centroids, TILE),
    jnp.pad(first, ends),
    jnp.pad(last, ends),
    spans(first, last, g),
    count=count,
  )[..., : q.shape[1]]
  found = jnp.where(found < 0, -1, found).astype(jnp.int32)
  if causal:
    own = layout.own[:, None, None]
    own = jnp.broadcast_to(own, (*found.shape[:2], 1, found.shape[3]))
    found = jnp.concatenate([own, found], axis=2)
  # What turns and joins at once reads one number at a time.
  return jnp.swapaxes(jax.lax.optimization_barrier(found), 2, 3)


@functools.partial(jax.jit, static_argnums=0)
def _arrange(options, q, k, layout: BlockLayout, choice) -> Places:
  """The places of all lanes; those of a lane may be sorted apart."""
  (b, t, n, _), (size, _) = q.shape, pieces(options)
  parts = _parts(q, k, choice.shape[3] * pieces(options)[1])
  choice, start, stop = split(
    choice, layout.start, layout.stop, block=options.block, size=size
  )
  at = jnp.broadcast_to(layout.at[..., None], (b, t, n))
  rows = parts.rows(jnp.swapaxes(choice, 1, 2), -1), parts.rows(at)
  each = (
    jnp.broadcast_to(parts.each(x), (len(rows[0]), *parts.each(x).shape))
    for x in (start, stop)
  )
  # The turns of a lane side by side.
  rows = tuple(
    jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for x in (*rows, *each)
  )
  # Of sorting: numbers and their places, twice, and what follows from them.
  cost = 40 * rows[0][0].size
  return Places(*_groups(functools.partial(arrange, tile=ROWS), rows, cost))


@functools.partial(jax.jit, static_argnums=0)
def _walk(options, q, k, v, layout, places):
  from isthmus.pallas.moba.mosaic_forward import forward

  parts, blocks = chunks(q, k, q.size), Blocks(options, q, k, layout)
  flat = q.reshape(-1, q.shape[3])

  def some(lane, places, k, v, bounds):
    k, v = blocks.cut(k, bounds), blocks.cut(v, bounds)

    def one(carry, turn):
      i, places = turn
      lists = block_tiles(places, ROWS, k.shape[2])
      rows = _rows(flat, _index(parts, lane, i, places))
      o, lse = forward(rows, k, v, lists, scale=options.scale)
      o, lse = merged(o, lse, places.place, places.real)
      return carry, (o.astype(q.dtype), lse)

    return _in_turns(one, (), places, parts)[1]

  keys, values = blocks.keys(k), blocks.keys(v)
  lane = jnp.arange(len(keys), dtype=jnp.int32)
  args = (lane, _by_lane(places, lane), keys, values, blocks.bounds)
  o, lse = _groups(some, args, _cost(places, q))
  return parts.back(o[None]), jnp.swapaxes(parts.back(lse[None]), 1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _walk_back(options, residuals, cotangents):
  from isthmus.pallas.moba.mosaic_backward import backward

  q, k, v, layout, places, o, lse = residuals
  do, dlse = cotangents
  parts, blocks = chunks(q, k, q.size), Blocks(options, q, k, layout)
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  delta = delta - jnp.swapaxes(dlse, 1, 2)
  stats = jnp.stack([jnp.swapaxes(lse, 1, 2) * _LOG2E, delta], axis=-1)
  flat_q, flat_do, stats = (x.reshape(-1, x.shape[3]) for x in (q, do, stats))

  def some(lane, places, k, v, bounds, at):
    k, v = blocks.cut(k, bounds), blocks.cut(v, bounds)

    def one(carry, turn):
      i, places = turn
      lists = block_tiles(places, ROWS, k.shape[2])
      index = _index(parts, lane, i, places)
      q, do = _rows(flat_q, index), _rows(flat_do, index)
      lse, delta = jnp.moveaxis(_rows(stats, index), -1, 0)
      # No row is in a place that no key is seen from: nothing may pass there.
      lse = jnp.where(places.limit > 0, lse, jnp.inf)
      dq, *found = backward(q, do, k, v, lse, delta, lists, scale=options.scale)
      dq = summed(dq, places.place, places.real) * options.scale
      if carry:
        found = [
          x + y.astype(x.dtype) for x, y in zip(carry, found, strict=True)
        ]
      return tuple(found), dq.astype(q.dtype)

    # Turns add up in float32; a single one is its own sum.
    turns = places.row.shape[1]
    zero = [jnp.zeros(x.shape, jnp.float32) for x in (k, v) if turns > 1]
    (dk, dv), dq = _in_turns(one, tuple(zero), places, parts)
    dk, dv = (blocks.joined(x.astype(k.dtype), at) for x in (dk, dv))
    return dq, dk, dv

  keys, values = blocks.keys(k), blocks.keys(v)
  lane = jnp.arange(len(keys), dtype=jnp.int32)
  places_of = _by_lane(places, lane)
  args = (lane, places_of, keys, values, blocks.bounds, blocks.keys_at())
  dq, dk, dv = _groups(some, args, _cost(places, q))
  return parts.back(dq[None]), blocks.back(dk), blocks.back(dv)


def _parts(q, k, slots):
  """Chunks whose choices, as rows of one lane, take no more than TURN."""
  (_, t, n, d), heads = q.shape, k.shape[2]
  size = n // heads * slots * d * q.dtype.itemsize
  turns = min(-(-t * size // TURN), t)
  return chunks(q, k, -(-t // turns) * n // heads)


def _by_lane(places, lane):
  """[l turns, ...] -> [l, turns, ...]."""
  return jax.tree.map(lambda x: x.reshape(len(lane), -1, *x.shape[1:]), places)


def _index(parts, lane, i, places):
  """Where the rows of a lane's turn i are; past the end if there are none."""
  rows, row = places.place.shape[1], places.row
  there = row < rows
  return parts.flat(lane, jnp.where(there, i * rows + row, parts.t * parts.n))


def _in_turns(one, carry, places, parts):
  """(carry, rows of lanes) of `one(carry, (i, places))`, turn by turn."""
  places = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), places)
  turns = len(places.row)
  if turns == 1:
    first = jax.tree.map(lambda x: x[0], places)
    return one(carry, (0, first))
  index = jnp.arange(turns, dtype=jnp.int32)
  carry, found = jax.lax.scan(one, carry, (index, places))

  def rows(x):
    x = jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return x[:, : parts.t * parts.group]

  return carry, jax.tree.map(rows, found)


def _rows(x, index):
  """x [m d] at index [l p], 0 past its end."""
  return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _cost(places, q):
  """Bytes of a lane's rows in places."""
  return places.row.shape[1] * q.shape[3] * q.dtype.itemsize


def _groups(function, args, cost):
  """function(*args), lanes in as few groups as LIMIT allows at `cost` each."""
  lanes = jax.tree.leaves(args)[0].shape[0]
  most = max(LIMIT // cost, 1)
  some = max(x for x in range(1, lanes + 1) if lanes % x == 0 and x <= most)
  if some == lanes:
    return function(*args)
  args = jax.tree.map(lambda x: x.reshape(-1, some, *x.shape[1:]), args)
  out = jax.lax.map(lambda args: function(*args), args)
  return jax.tree.map(lambda x: x.reshape(lanes, *x.shape[2:]), tuple(out))


def _longer(x, size):
  """Tokens padded to a multiple of `size`."""
  short = -x.shape[1] % size
  return jnp.pad(x, [(0, 0), (0, short), (0, 0), (0, 0)]) if short else x


def _widen(x, width):
  short = width - x.shape[3]
  return jnp.pad(x, [(0, 0)] * 3 + [(0, short)]) if short else x
