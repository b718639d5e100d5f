"""Block routing in plain XLA and linear memory, on any device.

Queries come in chunks. The choices of a chunk are inverted: the rows of each
key block, from all heads that share it, stand side by side and are cut into
tiles of one block each. A tile gathers its rows, meets the keys of its block,
and leaves (o, lse) of its part in the place of each choice; a row's parts are
gathered and merged. The backward rule goes through the same tiles once: dk
and dv are added to in the order of the tiles, dq is left in places and
gathered. Nothing is scattered but whole windows, one after another, so that
repeats agree to the last bit.

A lane is a kv head of a batch row; lanes take a tile each at a time. Rows are
(query, head of the group), queries ascending.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform
from isthmus.pallas.flash.ref import LSE, NEVER, OUT
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.invert import Inverted, Tiles, invert, tiles
from isthmus.pallas.moba.parts import merged, summed, take
from isthmus.pallas.moba.pool import pool
from isthmus.pallas.moba.rows import chunks
from isthmus.pallas.moba.select import choose
from isthmus.pallas.precision import accumulator, exact_dot

#: Rows of a chunk and of a tile on a platform. A chunk's parts take memory of
#: rows times top_k, and each chunk leaves up to a tile part empty for a block.
CHUNK = {"cpu": (8192, 64), "gpu": (16384, 128), "tpu": (16384, 128)}


def attend(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  extras: Extras,
  *,
  options: Options,
  chunk: tuple[int, int] | None = None,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) of `isthmus.attention.moba`, whose checks are done.

  Args:
    q, k, v, extras, options: see `isthmus.pallas.moba.api`.
    chunk: rows of a chunk and of a tile; by default the platform's.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> extras = Extras(uniform(4, 4, block=2))
    >>> o, lse = attend(q, k, v, extras, options=Options(block=2, top_k=1))
    >>> o.shape, lse.shape
    ((1, 4, 2, 8), (1, 2, 4))
  """
  chunk = chunk or CHUNK.get(platform(), CHUNK["gpu"])
  return _attend(options, chunk, q, k, v, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, chunk, q, k, v, extras):
  choice = _choose(options, q, k, extras)
  return _walk(options, chunk, q, k, v, extras.layout, choice)


def _forward(options, chunk, q, k, v, extras):
  # Under the policy that keeps o, the choice is kept too: made again, it might
  # fall otherwise where scores are close, and not be the one lse is of.
  choice = checkpoint_name(_choose(options, q, k, extras), OUT)
  o, lse = _walk(options, chunk, q, k, v, extras.layout, choice)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, extras.layout, choice, o, lse)


def _backward(options, chunk, residuals, cotangents):
  return *_walk_back(options, chunk, residuals, cotangents), None


_attend.defvjp(_forward, _backward)


def _choose(options, q, k, extras):
  centroids = extras.centroids
  if centroids is None:
    centroids = pool(k, extras.layout, block=options.block)
  return choose(
    q, centroids, extras.layout, top_k=options.top_k, causal=options.causal
  )


def _inputs(parts, layout, choice, size):
  """(at, choice) as rows of chunks, and what finds tiles in a chunk."""
  b, n, t, slots = choice.shape
  at = jnp.broadcast_to(layout.at[..., None], (b, t, n))
  rows = parts.rows(jnp.swapaxes(choice, 1, 2), -1)
  g = layout.start.shape[1]

  def find(choice):
    found = invert(choice, g)
    return found, tiles(found, size=size)

  return parts.rows(at), rows, find


class _Meeting(NamedTuple):
  """One tile of each lane: its rows, and the keys of its block.

  Attributes:
    begin: [l], the tile's first place.
    row: [l, r], rows of the chunk.
    real: [l, r], whether there is such a choice.
    start: [l], the first key.
    mask: [l, r, w], what is seen.
    k, v: [l, w, d], zero where nobody looks, whatever is there.
  """

  begin: Any
  row: Any
  real: Any
  start: Any
  mask: Any
  k: Any
  v: Any


def _meet(
  i, found: Inverted, cut: Tiles, slots, size, block, start, stop, at, k, v
) -> _Meeting:
  """Tile i of each lane."""

  def of(x, index):
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")

  blocks, begin, count = (
    jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
    for x in (cut.block, cut.begin, cut.count)
  )
  # A lane that is through has no block left; its rows are none.
  blocks = jnp.minimum(blocks, start.shape[1] - 1)
  step = jnp.arange(size, dtype=jnp.int32)
  real = step < count
  place = jnp.minimum(begin + step, found.order.shape[1] - 1)
  row = of(found.order, place) // slots
  first = of(start, blocks)
  key = first + jnp.arange(block, dtype=jnp.int32)
  mask = (key < of(stop, blocks))[:, None] & real[..., None]
  mask = mask & (key[:, None] <= of(at, row)[..., None])
  seen = jnp.any(mask, axis=1)[..., None]
  key = jnp.minimum(key, k.shape[1] - 1)[..., None]
  k, v = (jnp.where(seen, of(x, key), 0) for x in (k, v))
  return _Meeting(begin[:, 0], row, real, first[:, 0], mask, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(options, chunk, q, k, v, layout, choice):
  parts, size, acc = chunks(q, k, chunk[0]), chunk[1], accumulator(q.dtype)
  slots, width = choice.shape[3], v.shape[3]
  at, rows, find = _inputs(parts, layout, choice, size)
  start, stop = parts.each(layout.start), parts.each(layout.stop)
  k, v = parts.lanes(k), parts.lanes(v)

  def one(_, xs):
    q, at, choice = xs
    found, cut = find(choice)

    def step(i, left):
      here = _meet(
        i, found, cut, slots, size, options.block, start, stop, at, k, v
      )
      x = _scores(take(q, here.row), here.k) * options.scale
      x = jnp.where(here.mask, x, NEVER)
      top = jnp.max(x, axis=-1, keepdims=True)
      top = jnp.where(top < 0.5 * NEVER, 0.0, top)
      p = jnp.exp(x - top)
      total = jnp.sum(p, axis=-1, keepdims=True)
      o = _values(p.astype(q.dtype), here.v)
      total = jnp.where(total == 0, 1.0, total)
      part = jnp.concatenate([o / total, top + jnp.log(total)], axis=-1)
      return _put(left, part, here.begin)

    shape = (q.shape[0], found.order.shape[1] + size, width + 1)
    left = _full(q, shape, 0, acc)
    left = jax.lax.fori_loop(0, jnp.max(cut.total), step, left)
    place, real = _found(found, slots)
    return None, merged(left[..., :-1], left[..., -1], place, real)

  xs = (parts.rows(q), at, rows)
  _, (o, lse) = jax.lax.scan(one, None, xs)
  return parts.back(o).astype(q.dtype), jnp.swapaxes(parts.back(lse), 1, 2)


def _found(found: Inverted, slots):
  """(place, real) [l, r, c] of a chunk's choices."""
  place = found.place.reshape(found.place.shape[0], -1, slots)
  return place, place < found.offset[:, -1:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk_back(options, chunk, residuals, cotangents):
  """`dX = P (dP - Delta)` with `Delta = rowsum(do o) - dlse`."""
  q, k, v, layout, choice, o, lse = residuals
  do, dlse = cotangents
  parts, size, acc = chunks(q, k, chunk[0]), chunk[1], lse.dtype
  slots, dtype, block = choice.shape[3], q.dtype, options.block
  at, rows, find = _inputs(parts, layout, choice, size)
  start, stop = parts.each(layout.start), parts.each(layout.stop)
  delta = jnp.sum(do.astype(acc) * o.astype(acc), axis=-1)
  delta = delta - jnp.swapaxes(dlse, 1, 2)
  k, v = parts.lanes(k), parts.lanes(v)

  def one(carry, xs):
    q, do, delta, lse, at, choice = xs
    found, cut = find(choice)

    def step(i, carry):
      left, dk, dv = carry
      here = _meet(i, found, cut, slots, size, block, start, stop, at, k, v)
      # What stands where there is no choice has to be nothing, not NaN.
      y, z = (
        jnp.where(here.real[..., None], take(x, here.row), 0) for x in (q, do)
      )
      top, inner = (
        jnp.where(here.real, take(x, here.row), 0)[..., None]
        for x in (lse, delta)
      )
      x = _scores(y, here.k) * options.scale
      p = jnp.exp(jnp.where(here.mask, x, NEVER) - top)
      dx = p * (_scores(z, here.v) - inner) * options.scale
      dx, p = dx.astype(dtype), p.astype(dtype)
      left = _put(left, _values(dx, here.k), here.begin)
      dk = _add(dk, _to_keys(dx, y), here.start)
      return left, dk, _add(dv, _to_keys(p, z), here.start)

    shape = (q.shape[0], found.order.shape[1] + size, q.shape[2])
    left = _full(q, shape, 0, acc)
    left, *carry = jax.lax.fori_loop(
      0, jnp.max(cut.total), step, (left, *carry)
    )
    dq = summed(left, *_found(found, slots))
    return tuple(carry), dq.astype(dtype)

  # The last block's window reaches past the last key.
  carry = tuple(
    _full(x, (x.shape[0], x.shape[1] + block, x.shape[2]), 0, acc)
    for x in (k, v)
  )
  xs = (
    parts.rows(q),
    parts.rows(do),
    parts.rows(delta),
    parts.stats(lse),
    at,
    rows,
  )
  carry, dq = jax.lax.scan(one, carry, xs)

  def keys_back(x):
    x = x[:, :-block].reshape(parts.b, parts.heads, -1, x.shape[2])
    return jnp.swapaxes(x, 1, 2).astype(dtype)

  return parts.back(dq), *map(keys_back, carry)


_scores = functools.partial(exact_dot, "lrd,lwd->lrw")
_values = functools.partial(exact_dot, "lrw,lwd->lrd")
_to_keys = functools.partial(exact_dot, "lrw,lrd->lwd")


def _full(like, shape, value, dtype):
  """A constant that varies over a mesh as `like` does."""
  return jax.lax.full_like(like, value, dtype, shape=shape)


@jax.vmap
def _put(x, part, begin):
  """x [m d] with `part` [r d] from `begin` on."""
  return jax.lax.dynamic_update_slice_in_dim(x, part, begin, 0)


@jax.vmap
def _add(x, part, begin):
  """x [m d] with `part` [r d] added from `begin` on."""
  old = jax.lax.dynamic_slice_in_dim(x, begin, part.shape[0], 0)
  return jax.lax.dynamic_update_slice_in_dim(x, old + part, begin, 0)
