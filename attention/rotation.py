"""The schedules of `isthmus.attention.ring`, forward and backward.

A forward pass takes (setting, rank, q, k, v, extra) and returns (o, lse), o
perhaps in float32; a backward pass takes also (do, lse, delta), see
`isthmus.attention.pair.pull`, and returns (dq, dk, dv). `extra` is (who the
queries are, who the keys are, (the mask's blocks, rows that lost some)).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from isthmus.attention import pair
from isthmus.attention.merge import merge
from isthmus.attention.pair import Tokens
from isthmus.attention.schedule import hops
from isthmus.attention.travel import (
  gather,
  scatter,
  to_heads,
  to_tokens,
  tour,
  turn,
)
from isthmus.attention.zigzag import spread
from isthmus.pallas.precision import accumulator

# --- keys and values travel ---


def _kv_forward(setting, rank, q, k, v, extra):
  mine, theirs, (blocks, _) = extra
  plan = _hops(setting, q.shape[1], extra)
  o, lse = pair.attend(
    setting, q, k, v, (mine, theirs), (rank, rank), blocks, same=True
  )
  o = o.astype(lse.dtype)
  for _, shift, there in tour(setting.axis, (k, v, theirs), plan):
    k, v, theirs = there
    if shift % setting.devices in plan.needed:
      ranks = rank, (rank - shift) % setting.devices
      part = pair.attend(setting, q, k, v, (mine, theirs), ranks, blocks)
      o, lse = merge(o, lse, *part)
  return o, lse


def _kv_backward(setting, rank, q, k, v, back, extra):
  mine, theirs, (blocks, _) = extra
  plan, acc = _hops(setting, q.shape[1], extra), accumulator(q.dtype)
  dq, *dkv = _wide(
    acc,
    pair.pull(
      setting, q, k, v, back, (mine, theirs), (rank, rank), blocks, same=True
    ),
  )
  # Gradients of the keys that are here, by the way that they came.
  carried = {}
  for way, shift, there in tour(setting.axis, (k, v, theirs), plan):
    k, v, theirs = there
    if way in carried:
      carried[way] = turn(setting.axis, carried[way], way)
    if shift % setting.devices in plan.needed:
      ranks = rank, (rank - shift) % setting.devices
      more, *part = _wide(
        acc,
        pair.pull(setting, q, k, v, back, (mine, theirs), ranks, blocks),
      )
      dq = dq + more
      part = (
        jax.tree.map(jnp.add, carried[way], part) if way in carried else part
      )
      carried[way] = part
  home = {1: -plan.ahead, -1: plan.behind, 0: setting.devices // 2}
  for way, part in carried.items():
    part = turn(setting.axis, part, home[way])
    dkv = jax.tree.map(jnp.add, dkv, part)
  return dq, *dkv


# --- queries travel ---


def _token_forward(setting, rank, q, k, v, extra):
  mine, theirs, (blocks, _) = extra
  plan = _hops(setting, q.shape[1], extra)
  o, lse = pair.attend(
    setting, q, k, v, (mine, theirs), (rank, rank), blocks, same=True
  )
  o = o.astype(lse.dtype)
  for _, shift, there in tour(setting.axis, (q, mine), plan, reverse=True):
    q, mine = there
    if shift % setting.devices in plan.needed:
      ranks = (rank + shift) % setting.devices, rank
      part = pair.attend(setting, q, k, v, (mine, theirs), ranks, blocks)
      o, lse = merge(o, lse, *turn(setting.axis, part, shift))
  return o, lse


def _token_backward(setting, rank, q, k, v, back, extra):
  mine, theirs, (blocks, _) = extra
  plan, acc = _hops(setting, q.shape[1], extra), accumulator(q.dtype)
  grads = _wide(
    acc,
    pair.pull(
      setting, q, k, v, back, (mine, theirs), (rank, rank), blocks, same=True
    ),
  )
  parts = tour(setting.axis, (q, back, mine), plan, reverse=True)
  for _, shift, (q, back, mine) in parts:
    if shift % setting.devices in plan.needed:
      ranks = (rank + shift) % setting.devices, rank
      dq, dk, dv = pair.pull(
        setting, q, k, v, back, (mine, theirs), ranks, blocks
      )
      dq = turn(setting.axis, dq, shift)
      grads = jax.tree.map(jnp.add, grads, _wide(acc, (dq, dk, dv)))
  return grads


# --- all at once ---


def _gathered(setting, rank, t, k, v, extra):
  """All keys and values in the order of the sequence, and who they are."""
  mine, theirs, (blocks, _) = extra
  order = functools.partial(gather, setting)
  k, v = order(k), order(v)
  ids = None if theirs.ids is None else order(theirs.ids)
  places, own = None, mine.positions
  if own is not None:
    places = order(own)
  elif setting.banded:
    own = spread(rank, setting.devices, setting.layout, t)[None]
    places = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
  who = Tokens(mine.ids, own), Tokens(ids, places)
  return k, v, {"who": who, "ranks": (rank, None), "blocks": blocks}


def _gather_forward(setting, rank, q, k, v, extra):
  k, v, call = _gathered(setting, rank, q.shape[1], k, v, extra)
  return pair.attend(setting, q, k, v, same=True, **call)


def _gather_backward(setting, rank, q, k, v, back, extra):
  k, v, call = _gathered(setting, rank, q.shape[1], k, v, extra)
  dq, dk, dv = pair.pull(setting, q, k, v, back, same=True, **call)
  acc = accumulator(q.dtype)
  return dq, *(scatter(setting, x.astype(acc)) for x in (dk, dv))


def _whole(setting, extra):
  """Who the tokens of the whole sequence are, in its order."""
  mine, theirs, _ = extra

  def every(x):
    return None if x is None else gather(setting, x)

  places = every(mine.positions)
  return Tokens(every(mine.ids), places), Tokens(every(theirs.ids), places)


def _ulysses_forward(setting, rank, q, k, v, extra):
  del rank
  whole = _ordered(setting)
  q, k, v = (to_heads(setting, x) for x in (q, k, v))
  call = {"who": _whole(setting, extra), "ranks": (0, 0), "same": True}
  o, lse = pair.attend(whole, q, k, v, **call)
  lse = to_tokens(setting, jnp.swapaxes(lse, 1, 2))
  return to_tokens(setting, o), jnp.swapaxes(lse, 1, 2)


def _ulysses_backward(setting, rank, q, k, v, back, extra):
  del rank
  whole = _ordered(setting)
  do, lse, delta = back
  q, k, v, do = (to_heads(setting, x) for x in (q, k, v, do))
  lse, delta = (
    jnp.swapaxes(to_heads(setting, jnp.swapaxes(x, 1, 2)), 1, 2)
    for x in (lse, delta)
  )
  back = (do, lse, delta)
  call = {"who": _whole(setting, extra), "ranks": (0, 0), "same": True}
  grads = pair.pull(whole, q, k, v, back, **call)
  return tuple(to_tokens(setting, x) for x in grads)


#: By schedule.
FORWARD = {
  "kv_ring": _kv_forward,
  "kv_ring_bidir": _kv_forward,
  "token_ring": _token_forward,
  "all_gather": _gather_forward,
  "ulysses": _ulysses_forward,
}
BACKWARD = {
  "kv_ring": _kv_backward,
  "kv_ring_bidir": _kv_backward,
  "token_ring": _token_backward,
  "all_gather": _gather_backward,
  "ulysses": _ulysses_backward,
}


def _ordered(setting):
  """The setting of a sequence that one device has, in its order."""
  return dataclasses.replace(setting, devices=1, layout="contiguous")


def _hops(setting, size, extra):
  given = extra[0].positions is not None
  return hops(
    setting.schedule,
    setting.devices,
    size,
    setting.layout,
    *((None, None) if given or not setting.banded else setting.limits),
  )


def _wide(acc, grads):
  return [x.astype(acc) for x in grads]
