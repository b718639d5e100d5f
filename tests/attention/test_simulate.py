"""Steps of a ring: bytes are the byte model's, work is the call's; by hand."""

import math

import jax.numpy as jnp
import pytest

from isthmus.attention.bench.case import Case
from isthmus.attention.schedule import (
  SCHEDULES,
  choose_schedule,
  directions,
  messages,
)
from isthmus.attention.simulate import BACKWARD, Machine, simulate

pytestmark = pytest.mark.once

H, S, D = 8, 64, 32
SLOW = Machine(flops=1.0, ahead=1.0, behind=1.0)


def sizes(group=1, **more):
  return {
    "q_heads": H,
    "kv_heads": H // group,
    "q_length": S,
    "width": D,
    **more,
  }


def steps_of(schedule, devices, machine=SLOW, **more):
  return simulate(schedule, devices, machine=machine, **sizes(**more))


def possible(schedule, devices, group):
  return schedule != "ulysses" or (H // group) % devices == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_are_the_models_and_work_is_the_calls(schedule, backward):
  for devices in (1, 2, 3, 4, 7, 8):
    for group in (1, 4, 8):
      if not possible(schedule, devices, group):
        continue
      steps = steps_of(schedule, devices, group=group, backward=backward)
      sent = messages(schedule, devices, **sizes(group), backward=backward)
      found = sum(s.ahead for s in steps), sum(s.behind for s in steps)
      # Halves of what goes both ways are rounded one by one.
      assert sum(found) == sum(directions(sent))
      assert found == pytest.approx(directions(sent), abs=2)
      case = Case("dense", 1, S * devices, H, D)
      work = devices * sum(s.compute for s in steps)
      assert work == pytest.approx(case.flops("bwd" if backward else "fwd"))


def test_causal_is_half_the_work_and_all_of_the_bytes():
  whole, half = (steps_of("kv_ring", 4, causal=c) for c in (False, True))
  assert [s.compute for s in half] == [s.compute / 2 for s in whole]
  assert [s.ahead for s in half] == [s.ahead for s in whole]


def test_steps_by_hand():
  """What travels beside which pair; bfloat16, float32 gradients and lse."""
  kv, q, lse = 2 * 2 * S * H * D, 2 * S * H * D, 4 * S * H
  dkv, pair = 2 * kv, 4.0 * S * S * H * D

  def columns(*args, **more):
    steps = steps_of(*args, **more)
    return [[s[i] for s in steps] for i in range(3)]

  assert columns("kv_ring", 4) == [[pair] * 4, [kv, kv, kv, 0], [0] * 4]
  assert columns("kv_ring", 4, backward=True) == [
    [BACKWARD * pair] * 4 + [0],
    # Keys of the next pair, gradients of those before; then home, one ahead.
    [kv, kv, kv + dkv, dkv, dkv],
    [0] * 5,
  ]
  # Two pairs a step; what is opposite comes half from either side.
  assert columns("kv_ring_bidir", 6) == [
    [pair, 2 * pair, 2 * pair, pair],
    [kv, kv, kv / 2, 0],
    [kv, kv, kv / 2, 0],
  ]
  assert columns("token_ring", 4) == [
    [pair] * 4 + [0],
    [0, 0, *[q + lse] * 3],
    [q, q, q, 0, 0],
  ]
  assert columns("token_ring", 4, backward=True) == [
    [BACKWARD * pair] * 4 + [0],
    [0, 0, q, q, q],
    [*[2 * q + 2 * lse] * 3, 0, 0],
  ]
  assert columns("all_gather", 4)[0] == [0, 4 * pair]
  assert columns("all_gather", 4, backward=True)[0] == [
    *(0, 4 * BACKWARD * pair, 0)
  ]


@pytest.mark.parametrize("links", ["both", "one"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_where_compute_is_free_rings_take_their_bytes(links, group):
  """Steady rings: the same order as `choose_schedule` has."""
  machine = Machine(flops=math.inf, ahead=1.0, behind=1.0, links=links)
  for devices in (2, 3, 8, 9):
    chosen = choose_schedule(devices, **sizes(group), links=links)
    took = {
      schedule: sum(
        s.seconds
        for backward in (False, True)
        for s in steps_of(
          schedule, devices, machine, group=group, backward=backward
        )
      )
      for schedule in chosen.bytes
    }
    for schedule, count in chosen.bytes.items():
      one = links == "one" or devices == 2
      if one or schedule != "token_ring":
        assert took[schedule] == pytest.approx(count, abs=8)
      # Its two ways begin and end one or two steps apart.
      assert count <= took[schedule] + 8 <= count * (1 + 3 / devices) + 16


def test_compute_hides_what_is_less():
  for schedule in ("kv_ring", "kv_ring_bidir", "token_ring"):
    fast = Machine(flops=1.0, ahead=math.inf, behind=math.inf)
    alone = steps_of(schedule, 8, fast, backward=True)
    assert all(s.seconds == s.compute for s in alone)
    # At exactly the rate of the busiest step that has compute, no wait.
    rate = max(max(s[1:3]) / s.compute for s in alone if s.compute)
    even = Machine(flops=1.0, ahead=rate, behind=rate)
    steps = steps_of(schedule, 8, even, backward=True)
    assert all(s.seconds == s.compute for s in steps if s.compute)
    less = Machine(flops=1.0, ahead=rate * 0.99, behind=rate * 0.99)
    steps = steps_of(schedule, 8, less, backward=True)
    assert any(s.seconds > s.compute for s in steps if s.compute)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("links", ["both", "one", "ring"])
def test_more_bandwidth_never_takes_longer(schedule, links):
  def took(**rates):
    machine = Machine(**{**base, **rates}, links=links)
    return sum(
      s.seconds
      for b in (False, True)
      for s in steps_of(schedule, 4, machine, backward=b)
    )

  base = {"flops": 1e6, "ahead": 1e3, "behind": 1e3, "latency": 1e-3}
  one = took()
  for name in ("flops", "ahead", "behind"):
    assert took(**{name: base[name] * 2}) <= one
    assert took(**{name: base[name] / 2}) >= one
  both = took(ahead=2e3, behind=2e3)
  assert both < one < took(latency=2e-3) < 2 * one


@pytest.mark.parametrize("devices", [2, 3, 4, 5, 8, 9])
def test_on_a_ring_what_goes_further_loads_every_link(devices):
  machine = Machine(flops=1.0, ahead=1.0, behind=1.0, links="ring")
  far = devices**2 // 4  # the distances of all others, summed
  q, lse, kv = 2 * S * H * D, 4 * S * H, 4 * S * H * D

  def total(schedule, **more):
    steps = steps_of(schedule, devices, machine, **more)
    return sum(s.ahead + s.behind for s in steps)

  assert total("token_ring") == (devices - 1) * q + far * (q + lse)
  want = (devices - 1) * (2 * q + 2 * lse) + far * q
  assert total("token_ring", backward=True) == want
  assert total("kv_ring") == (devices - 1) * kv
  for backward in (False, True):  # neighbours do
    steps = simulate(
      "all_gather", devices, machine=SLOW, **sizes(), backward=backward
    )
    assert total("all_gather", backward=backward) == sum(
      s.ahead + s.behind for s in steps
    )
  # Home is one hop, however long the ring.
  assert total("kv_ring", backward=True) == (devices - 1) * 3 * kv
  if H % devices == 0:
    want = (4 * q + lse) / devices * far
    assert total("ulysses") == pytest.approx(want)
  both = sum(
    s.ahead + s.behind
    for s in steps_of("kv_ring_bidir", devices, machine, backward=True)
  )
  # Moved with every hop but each way's first; then home from where they are.
  ahead = devices // 2 if devices % 2 or devices == 2 else devices // 2 - 1
  behind = 0 if devices == 2 else ahead
  opposite = 0 if devices % 2 or devices == 2 else devices // 2
  hops = sum(max(x - 1, 0) + x for x in (ahead, behind)) + opposite
  assert both == (devices - 1) * kv + hops * 2 * kv


def test_dtype_and_batch_count():
  one = steps_of("kv_ring", 4)
  two = steps_of("kv_ring", 4, dtype=jnp.float32, batch=3)
  assert two[0].ahead == 6 * one[0].ahead
  assert two[0].compute == 3 * one[0].compute


def test_refused():
  with pytest.raises(ValueError, match="ulysses gives each of 3 devices"):
    steps_of("ulysses", 3)
  with pytest.raises(ValueError, match="schedule 'ring'; there are kv_ring,"):
    steps_of("ring", 4)
  for field, value, words in (
    ("flops", 0.0, "flops is 0"),
    ("ahead", -1.0, "ahead is -1"),
    ("behind", math.nan, "behind is nan"),
    ("latency", -1.0, "latency is -1"),
    ("links", "two", "links 'two'"),
  ):
    rates = {"flops": 1.0, "ahead": 1.0, "behind": 1.0, field: value}
    with pytest.raises(ValueError, match=words):
      Machine(**rates)
