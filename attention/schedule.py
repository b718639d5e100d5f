"""What a ring sends: bytes for every schedule, and the cheapest of them.

Bytes are those that leave one device, for one call, and are exact: what the
compiled program exchanges. Directions are those of a ring of devices: ahead is
r to r + 1. Results that go straight to a device further on count once; so they
do where every device reaches every other.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from isthmus.attention.mask import Window, check_window
from isthmus.attention.zigzag import Layout, reach
from isthmus.pallas.precision import accumulator

#: What `isthmus.attention.ring` can do; of equal bytes, the first is taken.
SCHEDULES = ("kv_ring", "kv_ring_bidir", "token_ring", "all_gather", "ulysses")


class Hops(NamedTuple):
  """How far what travels has to go.

  Attributes:
    needed: the shifts that meet something to compute.
    ahead, behind: hops in either direction, at the same time.
    across: half of what is opposite comes from either neighbour, last.

  Example:
    >>> hops("kv_ring", 4, 8, "contiguous", None, None)
    Hops(needed=(1, 2, 3), ahead=3, behind=0, across=False)
  """

  needed: tuple[int, ...]
  ahead: int
  behind: int
  across: bool = False


class Message(NamedTuple):
  """What a device sends in one collective.

  Attributes:
    step: messages of a step may be under way at the same time.
    collective: "permute", "gather", "scatter" or "exchange".
    what: the array.
    way: 1 ahead, -1 behind, 0 half and half.
    bytes: that leave the device.

  Example:
    >>> Message(1, "permute", "k", 1, 4096).bytes
    4096
  """

  step: int
  collective: Literal["permute", "gather", "scatter", "exchange"]
  what: str
  way: int
  bytes: int


class Choice(NamedTuple):
  """A schedule, and why.

  Attributes:
    schedule: the cheapest.
    reason: in words.
    bytes: of the busier direction, by schedule; those that can run.

  Example:
    >>> Choice("kv_ring", "one device sends nothing", {}).schedule
    'kv_ring'
  """

  schedule: str
  reason: str
  bytes: dict[str, int]


def hops(
  schedule: str,
  devices: int,
  size: int,
  layout: Layout,
  left: int | None,
  right: int | None,
) -> Hops:
  """The hops of a ring, the shorter the less a query sees.

  Args:
    schedule: a ring's.
    devices: P.
    size: tokens of a device.
    layout: how they are divided.
    left, right: how far a query sees; None is no limit.

  Example:
    >>> hops("kv_ring_bidir", 8, 64, "contiguous", None, None)[1:]
    (3, 3, True)
    >>> hops("kv_ring", 8, 64, "contiguous", 64, 0)[1:]  # a causal window
    (1, 0, False)
  """
  needed = reach(devices, size, layout, left, right)
  # Cut the circle of shifts in two between any neighbours.
  cuts = [
    (before, devices - after if after < devices else 0)
    for before, after in zip((0, *needed), (*needed, devices), strict=True)
  ]
  if schedule == "kv_ring_bidir":
    ahead, behind = min(cuts, key=lambda c: (max(c), sum(c), -c[0]))
    if ahead == behind + 1 and 2 * ahead == devices > 2:
      return Hops(needed, behind, behind, across=True)
  else:
    ahead, behind = min(cuts, key=lambda c: (sum(c), -c[0]))
  return Hops(needed, ahead, behind)


def messages(
  schedule: str,
  devices: int,
  *,
  q_heads: int,
  kv_heads: int,
  q_length: int,
  kv_length: int | None = None,
  width: int,
  value_width: int | None = None,
  batch: int = 1,
  dtype: Any = jnp.bfloat16,
  segments: bool = False,
  layout: Layout = "zigzag",
  causal: bool = False,
  window: Window = None,
  backward: bool = False,
) -> tuple[Message, ...]:
  """Everything that a device sends in a forward or a backward pass.

  Args:
    schedule: one of `SCHEDULES`.
    devices: P.
    q_heads, kv_heads: of the call.
    q_length, kv_length: tokens of a device; keys as queries by default.
    width, value_width: of keys and values; equal by default.
    batch: rows.
    dtype: of q, k and v. Gradients of keys travel in `accumulator(dtype)`.
    segments: whether there are segment ids.
    layout, causal, window: as in `ring_attention`; a window makes rings
      shorter.
    backward: of that pass; else of the forward pass.

  Example:
    >>> sizes = {"q_heads": 8, "kv_heads": 2, "q_length": 512, "width": 64}
    >>> sent = messages("kv_ring", 4, **sizes)
    >>> len(sent), sent[0]
    (6, Message(step=1, collective='permute', what='k', way=1, bytes=131072))
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
  dv, s = value_width or width, kv_length or q_length
  narrow, wide = jnp.dtype(dtype).itemsize, accumulator(dtype).itemsize
  q_tokens, k_tokens = batch * q_length * q_heads, batch * s * kv_heads
  size = {
    "q": q_tokens * width * narrow,
    "k": k_tokens * width * narrow,
    "v": k_tokens * dv * narrow,
    "o": q_tokens * dv * narrow,
    "lse": q_tokens * wide,
    "dk": k_tokens * width * wide,
    "dv": k_tokens * dv * wide,
    "q ids": batch * q_length * 4 * segments,
    "k ids": batch * s * 4 * segments,
  }
  size |= {"do": size["o"], "delta": size["lse"], "dq": size["q"]}
  for x in ("k", "v", "k ids"):
    size[f"{x}, first"] = size[x] // s * (s // 2)
    size[f"{x}, rest"] = size[x] - size[f"{x}, first"]
  found: list[tuple[int, Any, str, int]]
  if schedule == "all_gather":
    found = [(1, "gather", x, 0) for x in ("k", "v", "k ids")]
    found += [(2, "scatter", x, 0) for x in ("dk", "dv") if backward]
  elif schedule == "ulysses":
    there, home = ("q", "k", "v"), ("o", "lse")
    if backward:
      there, home = (
        (*there, "do", "lse", "delta"),
        ("dq", "dk, here", "dv, here"),
      )
    size |= {"dk, here": size["k"], "dv, here": size["v"]}
    found = [(1, "exchange", x, 0) for x in there]
    found += [(1, "gather", x, 0) for x in ("q ids", "k ids")]
    found += [(2, "exchange", x, 0) for x in home]
  else:
    left, right = check_window(window) or (None, None)
    right = 0 if causal else right
    plan = hops(schedule, devices, q_length, layout, left, right)
    run = _token_ring if schedule == "token_ring" else _kv_ring
    found = run(plan, devices, backward)
  return tuple(
    Message(step, kind, _name(what), way, _sent(size[what], kind, devices))
    for step, kind, what, way in found
    if size[what] and devices > 1
  )


def directions(sent: tuple[Message, ...]) -> tuple[int, int]:
  """Bytes that a device sends ahead, and behind.

  Example:
    >>> directions((Message(1, "permute", "k", 1, 6),))
    (6, 0)
  """
  both = sum(m.bytes for m in sent if m.way == 0)
  ahead = sum(m.bytes for m in sent if m.way > 0) + both - both // 2
  return ahead, sum(m.bytes for m in sent if m.way < 0) + both // 2


def choose_schedule(
  devices: int,
  *,
  q_heads: int,
  kv_heads: int,
  q_length: int,
  kv_length: int | None = None,
  width: int,
  value_width: int | None = None,
  batch: int = 1,
  dtype: Any = jnp.bfloat16,
  links: Literal["both", "one"] = "both",
  gradients: bool = True,
  layout: Layout = "zigzag",
  causal: bool = False,
  window: Window = None,
) -> Choice:
  """The schedule that sends the fewest bytes, and the reason.

  Compared is the busier direction of the links, forward and backward pass
  together. Of two devices both neighbours are one, so that directions add up.

  Args:
    devices: P.
    q_heads, kv_heads, q_length, kv_length, width, value_width: see `messages`.
    batch, dtype, layout, causal, window: see `messages`.
    links: "both" directions work at the same time, or "one" at a time.
    gradients: count the backward pass too.

  Example:
    >>> sizes = {"q_length": 4096, "width": 128}
    >>> choose_schedule(4, q_heads=32, kv_heads=1, **sizes).schedule
    'kv_ring_bidir'
    >>> print(choose_schedule(4, q_heads=6, kv_heads=6, **sizes).reason)
    token_ring sends the least, 57.2 MB; then kv_ring_bidir, 75.5 MB
  """
  if links not in ("both", "one"):
    raise ValueError(f"links {links!r}; there are both and one")
  if devices == 1:
    return Choice("kv_ring", "one device sends nothing", {})
  found = {}
  for schedule in SCHEDULES:
    if schedule == "ulysses" and (q_heads % devices or kv_heads % devices):
      continue
    sent = ()
    for backward in (False, True)[: 1 + gradients]:
      sent += messages(
        schedule,
        devices,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_length=q_length,
        kv_length=kv_length,
        width=width,
        value_width=value_width,
        batch=batch,
        dtype=dtype,
        layout=layout,
        causal=causal,
        window=window,
        backward=backward,
      )
    ways = directions(sent)
    one = links == "one" or devices == 2
    found[schedule] = sum(ways) if one else max(ways)
  best, second, *_ = sorted(found, key=lambda name: found[name])
  a, b = (f"{found[x] / 1e6:.3g} MB" for x in (best, second))
  reason = f"{best} sends the least, {a}; then {second}, {b}"
  if found[best] == found[second]:
    reason = f"{best} and {second} send the least, {a}; {best} is preferred"
  return Choice(best, reason, found)


def _name(what):
  return what.partition(",")[0]


def _sent(size, kind, devices):
  """Bytes that leave a device, for an array of its own of this size."""
  if kind == "permute":
    return size
  others = size * (devices - 1)
  return others // devices if kind == "exchange" else others


def _kv_ring(plan, devices, backward):
  found = []
  for way, far in ((1, plan.ahead), (-1, plan.behind)):
    met = [s for s in range(1, far + 1) if way * s % devices in plan.needed]
    for step in range(1, far + 1):
      moved = ["k", "v", "k ids"]
      if backward and step > met[0]:
        moved += ["dk", "dv"]
      found += [(step, "permute", what, way) for what in moved]
    if backward and met:
      # Home by the shorter way.
      home = (2 * far > devices) - (2 * far < devices)
      found += [(far + 1, "permute", x, way * home) for x in ("dk", "dv")]
  if plan.across:
    last = plan.ahead + 1
    for x in ("k", "v", "k ids"):
      found += [(last, "permute", f"{x}, {half}", w) for half, w in _HALVES]
    if backward:
      found += [(last + 1, "permute", x, 0) for x in ("dk", "dv")]
  return found


_HALVES = (("first", 1), ("rest", -1))


def _token_ring(plan, devices, backward):
  there = ["q", "q ids"] + ["do", "lse", "delta"] * backward
  home = ["dq"] if backward else ["o", "lse"]
  found = []
  for way, far in ((1, plan.ahead), (-1, plan.behind)):
    for step in range(1, far + 1):
      found += [(step, "permute", what, -way) for what in there]
      if way * step % devices in plan.needed:
        found += [(step, "permute", what, way) for what in home]
  return found
