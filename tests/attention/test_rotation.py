"""The schedules as functions of a device; values are held by test_ring.py."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from isthmus.attention.pair import Setting, Tokens
from isthmus.attention.rotation import BACKWARD, FORWARD
from isthmus.attention.schedule import SCHEDULES
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once

NOBODY = (Tokens(), Tokens(), (None, None))
SPEC = P(None, "seq")


def on_four(function, out):
  mesh = Mesh(np.array(jax.devices()[:4]), "seq")
  return jax.shard_map(
    lambda *x: function(jax.lax.axis_index("seq"), *x),
    mesh=mesh,
    in_specs=SPEC,
    out_specs=out,
  )


def test_every_schedule_goes_both_ways():
  assert set(FORWARD) == set(BACKWARD) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_are_in_float32(schedule):
  """Of bfloat16 arrays: o before it is rounded once, dk and dv."""
  setting = Setting("seq", 4, schedule, "contiguous")
  q, k, v, do, _ = inputs(1, 16, 16, 4, 4, 8, dtype=jnp.bfloat16)
  rows = jnp.zeros((1, 16, 4))

  def forward(rank, q, k, v):
    o, lse = FORWARD[schedule](setting, rank, q, k, v, NOBODY)
    return o, jnp.swapaxes(lse, 1, 2)

  def backward(rank, q, k, v, do, lse, delta):
    back = (do, *(jnp.swapaxes(x, 1, 2) for x in (lse, delta)))
    return BACKWARD[schedule](setting, rank, q, k, v, back, NOBODY)

  o, lse = jax.eval_shape(on_four(forward, SPEC), q, k, v)
  args = (q, k, v, do, rows, rows)
  dq, dk, dv = jax.eval_shape(on_four(backward, SPEC), *args)
  ring, own = schedule.endswith(("ring", "bidir")), schedule != "ulysses"
  assert lse.dtype == jnp.float32
  assert (o.dtype == jnp.float32) == (dq.dtype == jnp.float32) == ring
  assert (dk.dtype == jnp.float32) == (dv.dtype == jnp.float32) == own


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_parts_do_not_wait_for_what_is_sent_next(schedule):
  """No send needs a result that is computed after the one before it."""
  setting = Setting("seq", 4, schedule, "contiguous")
  q, k, v, *_ = inputs(1, 16, 16, 4, 4, 8)
  run = functools.partial(FORWARD[schedule], setting)
  text = on_four(lambda *x: run(*x, NOBODY)[0], SPEC)
  (call,) = jax.make_jaxpr(text)(q, k, v).eqns
  inner, made, parts = call.params["jaxpr"], {}, 0
  for eqn in inner.eqns:
    before = set()
    for x in eqn.invars:
      if not isinstance(x, jax.extend.core.Literal):
        before |= made.get(x, set())
    if eqn.primitive.name == "custom_vjp_call":
      before, parts = before | {parts}, parts + 1
    if eqn.primitive.name == "ppermute":
      # Keys and queries go on at once; results wait for their part alone.
      assert len(before) <= (schedule == "token_ring")
    made |= dict.fromkeys(eqn.outvars, before)
  assert parts == 4
