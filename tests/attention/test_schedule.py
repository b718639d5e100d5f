"""Bytes: the model against what compiled programs exchange, and the choice."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.attention import choose_schedule, ring_attention
from isthmus.attention.schedule import (
  SCHEDULES,
  Message,
  directions,
  hops,
  messages,
)

pytestmark = pytest.mark.once

KINDS = {
  "collective-permute": "permute",
  "all-gather": "gather",
  "reduce-scatter": "scatter",
  "all-to-all": "exchange",
}
B, SIZE, N, K, D, DV = 2, 6, 8, 8, 8, 4


def exchanged(text, devices):
  """(collective, bytes that leave a device) of a compiled program."""
  found = Counter()
  for line in text.splitlines():
    match = re.search(r"= (.*?) ([a-z-]+?)(-start)?\(", line)
    if not match or match[2] not in KINDS:
      assert not re.search(r" (all-reduce|send|ragged)[a-z-]*\(", line), line
      continue
    kind = KINDS[match[2]]
    sizes = []
    for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", match[1]):
      bits = int(re.sub("[a-z]", "", dtype))
      sizes.append(np.prod([int(x) for x in shape.split(",")]) * bits // 8)
    size = int(sum(sizes))
    if kind == "gather":
      size = size * (devices - 1) // devices
    if kind == "scatter":  # the result is a share
      size = size * (devices - 1)
    if kind == "exchange":
      size = size * (devices - 1) // devices
    found[kind, size] += 1
  return found


def compiled(devices, dtype, heads=(N, K), grad=False, ids=False, **settings):
  """The program of one device; its input is divided already."""
  mesh = Mesh(np.array(jax.devices()[:devices]), ("seq",))
  spec = P(None, "seq")
  n, k = heads

  def run(q, k, v, ids):
    more = {} if ids is None else {"segment_ids": ids}
    return ring_attention(q, k, v, return_lse=True, **more, **settings)

  out = (spec, P(None, None, "seq"))
  call = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=out)

  def pulled(q, k, v, do, ids):
    _, back = jax.vjp(lambda *x: call(*x, ids)[0], q, k, v)
    return back(do)

  def struct(dtype, *shape):
    here = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

  t = SIZE * devices
  args = [struct(dtype, B, t, *x) for x in ((n, D), (k, D), (k, DV))]
  do, ids = struct(dtype, B, t, n, DV), struct(jnp.int32, B, t) if ids else None
  f = jax.jit(pulled if grad else call)
  args = (*args, do, ids) if grad else (*args, ids)
  return f.lower(*args).compile().as_text()


def modelled(schedule, devices, dtype, heads=(N, K), backward=False, **more):
  return messages(
    schedule,
    devices,
    q_heads=heads[0],
    kv_heads=heads[1],
    q_length=SIZE,
    width=D,
    value_width=DV,
    batch=B,
    dtype=dtype,
    backward=backward,
    **more,
  )


def count(sent):
  return Counter((m.collective, m.bytes) for m in sent)


@pytest.mark.parametrize(
  "devices, schedule, settings",
  [
    (8, "kv_ring", {"causal": True}),
    (8, "kv_ring_bidir", {"layout": "contiguous"}),
    (4, "kv_ring_bidir", {"causal": True, "window": (7, 0)}),
    (4, "kv_ring", {"layout": "contiguous", "causal": True, "window": (9, 0)}),
    (4, "token_ring", {"causal": True}),
    (4, "all_gather", {"causal": True}),
    (4, "ulysses", {"causal": True}),
    (2, "kv_ring_bidir", {}),
  ],
  ids=str,
)
def test_the_program_exchanges_what_the_model_says(devices, schedule, settings):
  """Each collective and its bytes, forward alone and with the backward pass."""
  dtype = jnp.float32
  model = functools.partial(modelled, schedule, devices, dtype, **settings)
  forward, backward = model(), model(backward=True)
  settings = {"schedule": schedule, **settings}
  text = compiled(devices, dtype, **settings)
  assert exchanged(text, devices) == count(forward)
  text = compiled(devices, dtype, grad=True, **settings)
  assert exchanged(text, devices) == count(forward) + count(backward)


@pytest.mark.parametrize("schedule", ["kv_ring", "token_ring"])
def test_narrow_arrays_stay_narrow_and_ids_go_along(schedule):
  """float16 keys, float32 gradients of keys; GQA; segments."""
  devices, heads = 3, (8, 2)
  model = functools.partial(
    modelled, schedule, devices, jnp.float16, heads, segments=True
  )
  text = compiled(
    devices, jnp.float16, heads, grad=True, ids=True, schedule=schedule
  )
  assert exchanged(text, devices) == count(model()) + count(
    model(backward=True)
  )


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_the_last_rotation_is_left_out(devices):
  """P - 1 of each tensor; in the backward pass dk and dv come home by one."""
  for schedule in SCHEDULES[:3]:
    sent = Counter(m.what for m in modelled(schedule, devices, jnp.bfloat16))
    moved = {"q", "o", "lse"} if schedule == "token_ring" else {"k", "v"}
    # Of what is opposite, each half is one message.
    halves = schedule == "kv_ring_bidir" and devices == 8
    assert sent == dict.fromkeys(moved, devices - 1 + halves)
    sent = Counter(
      m.what
      for m in modelled(schedule, devices, jnp.bfloat16, backward=True)
      if m.what in ("dk", "dv", "dq")
    )
    assert set(sent.values()) == {devices - 1}


def test_bytes_by_hand():
  """Of one hop, in bytes: bfloat16 arrays, float32 gradients and lse."""
  s, h, hk, d = 6, 8, 2, 8

  def sent(schedule, devices, backward=False):
    return directions(
      messages(
        schedule,
        devices,
        q_heads=h,
        kv_heads=hk,
        q_length=s,
        width=d,
        backward=backward,
      )
    )

  kv, q, lse = s * hk * d, s * h * d, 4 * s * h
  assert sent("kv_ring", 4) == (3 * 4 * kv, 0)
  assert sent("kv_ring", 4, True) == (3 * 12 * kv, 0)
  for devices in (3, 4, 8, 9):
    each = devices - 1
    assert sent("kv_ring_bidir", devices) == (each * 2 * kv,) * 2
    assert sent("kv_ring_bidir", devices, True) == (each * 6 * kv,) * 2
  # Queries one way, results the other.
  assert sent("token_ring", 4) == (3 * (2 * q + lse), 3 * 2 * q)
  assert sent("token_ring", 4, True) == (3 * 2 * q, 3 * (4 * q + 2 * lse))
  assert sum(sent("all_gather", 4)) == 3 * 4 * kv
  assert sum(sent("all_gather", 4, True)) == 3 * 12 * kv
  assert sum(sent("ulysses", 2)) == (4 * q + 4 * kv + lse) // 2


def test_one_device_sends_nothing():
  assert all(not modelled(x, 1, jnp.float32) for x in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_hops_reach_what_is_needed_and_no_further(schedule, layout):
  for devices in (1, 2, 3, 4, 8, 16):
    for left in (None, 0, 3, 8, 20):
      for right in (None, 0, 3, 20):
        plan = hops(schedule, devices, 4, layout, left, right)
        met = {*range(1, plan.ahead + 1)}
        met |= {devices - i for i in range(1, plan.behind + 1)}
        met |= {devices // 2} if plan.across else set()
        assert set(plan.needed) <= met
        assert len(met) == plan.ahead + plan.behind + plan.across
        for far, shift in (
          (plan.ahead, plan.ahead),
          (plan.behind, devices - plan.behind),
        ):
          assert far == 0 or plan.across or shift in plan.needed


def test_windows_shorten_rings():
  """One hop for a window of one device; zigzag has neighbours on both sides."""
  for devices in (8, 1024):
    assert hops("kv_ring", devices, 64, "contiguous", 64, 0)[1:3] == (1, 0)
    assert hops("token_ring", devices, 64, "zigzag", 32, 0)[1:3] == (1, 1)


@pytest.mark.parametrize(
  "devices, heads, more, want",
  [
    # Queries are as small as keys: they go one way, results the other.
    (4, (6, 6), {}, "token_ring"),
    (8, (9, 9), {"links": "one"}, "token_ring"),
    # Keys are smaller.
    (4, (8, 2), {}, "kv_ring_bidir"),
    (8, (8, 4), {}, "kv_ring_bidir"),
    (4, (9, 3), {"links": "one"}, "kv_ring"),
    (2, (8, 1), {}, "kv_ring"),
    # Heads divide, and there are many devices.
    (8, (32, 8), {}, "ulysses"),
    # A window that reaches one device back.
    (8, (32, 8), {"window": (64, 0), "causal": True}, "kv_ring"),
    (1, (8, 8), {}, "kv_ring"),
  ],
)
def test_choice(devices, heads, more, want):
  n, k = heads
  choice = choose_schedule(
    devices, q_heads=n, kv_heads=k, q_length=512, width=64, **more
  )
  assert choice.schedule == want, choice
  if devices > 1:
    assert choice.bytes[want] == min(choice.bytes.values())
    assert want in choice.reason
    assert ("ulysses" in choice.bytes) == (k % devices == 0)


def test_forward_alone_may_choose_another():
  """In the backward pass gradients of keys weigh twice as much as keys."""
  sizes = {"q_heads": 3, "kv_heads": 3, "q_length": 64, "width": 64}
  both = choose_schedule(5, **sizes)
  alone = choose_schedule(5, gradients=False, **sizes)
  assert (both.schedule, alone.schedule) == ("token_ring", "kv_ring_bidir")


def test_auto_is_the_choice():
  """What runs by default sends what the chosen schedule sends."""
  sizes = {"q_heads": 6, "kv_heads": 6, "q_length": SIZE, "width": D}
  sizes |= {"value_width": DV, "dtype": jnp.float32, "causal": True}
  chosen = choose_schedule(4, **sizes).schedule
  assert chosen == "kv_ring_bidir"  # the lse of so narrow heads is much
  text = compiled(4, jnp.float32, (6, 6), causal=True)
  want = modelled(chosen, 4, jnp.float32, (6, 6), causal=True)
  assert exchanged(text, 4) == count(want)


def test_refusals():
  sizes = {"q_heads": 3, "kv_heads": 3, "q_length": 64, "width": 64}
  with pytest.raises(ValueError, match="schedule 'ring'; there are kv_ring,"):
    messages("ring", 4, **sizes)


def test_directions_share_what_has_none():
  sent = (
    Message(1, "gather", "k", 0, 5),
    Message(1, "permute", "k", -1, 7),
  )
  assert directions(sent) == (3, 9)
