"""How long a ring's steps take: bytes over links, or the compute beside them.

A step takes `max(compute, bytes / bandwidth of each direction)`. Bytes are
those of `isthmus.attention.schedule`; here each message is put beside the
compute that doesn't wait for it:

* what goes round is fetched while the pair before it is computed;
* a token ring's results travel while the next pair is computed;
* gradients of keys travel while the next addends to them are computed;
* the way home, the last result and all of `all_gather` and `ulysses` are
  beside nothing.

It is arithmetic: one rate at all sizes, no contention, nothing measured.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from isthmus.attention.schedule import Hops, Message, hops, messages

#: FLOPs of a backward pass over those of the forward pass.
BACKWARD = 2.5

# What a token ring sends straight back, forward and backward.
_HOME = (("o", "lse"), ("dq",))
_hops = functools.lru_cache(hops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """What a device computes and sends in a second.

  Attributes:
    flops: FLOP/s of attention.
    ahead, behind: bytes/s that leave a device in either direction.
    links: "both" directions work at the same time and every device reaches
      every other, as the byte model has it; "one" direction at a time, as at a
      switch, where both leave by one port; "ring", where only neighbours have
      a link and what goes further loads every link on its shorter way.
    latency: seconds of a step in which anything is sent.

  Raises:
    ValueError: rates that are not above 0, or other links.

  Example:
    >>> Machine(flops=4e14, ahead=5e10, behind=5e10).links
    'both'
  """

  flops: float
  ahead: float
  behind: float
  links: str = "both"
  latency: float = 0.0

  def __post_init__(self):
    for name in ("flops", "ahead", "behind"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} is {getattr(self, name)}; it is above 0")
    if not self.latency >= 0:
      raise ValueError(f"latency is {self.latency}; it is at least 0")
    if self.links not in ("both", "one", "ring"):
      raise ValueError(f"links {self.links!r}; there are both, one and ring")

  def send(self, ahead: float, behind: float, devices: int) -> float:
    """Seconds for so many bytes; of two devices both ways lead to one.

    Example:
      >>> Machine(flops=1.0, ahead=2.0, behind=1.0).send(6, 4, 8)
      4.0
    """
    if not ahead and not behind:
      return 0.0
    ways = ahead / self.ahead, behind / self.behind
    one = self.links == "one" or devices == 2
    return self.latency + (sum(ways) if one else max(ways))


class Step(NamedTuple):
  """What happens at the same time.

  Attributes:
    compute: seconds of it.
    ahead, behind: bytes on a link in either direction.
    seconds: until both are done.

  Example:
    >>> Step(0.5, 100.0, 0.0, 1.0).seconds
    1.0
  """

  compute: float
  ahead: float
  behind: float
  seconds: float


def simulate(
  schedule: str,
  devices: int,
  *,
  machine: Machine,
  q_heads: int,
  kv_heads: int,
  q_length: int,
  width: int,
  batch: int = 1,
  dtype: Any = jnp.bfloat16,
  causal: bool = False,
  backward: bool = False,
) -> tuple[Step, ...]:
  """The steps of a forward or a backward pass on every device.

  Causal work is even, as zigzag makes it: each pair of devices has half the
  pairs of tokens.

  Args:
    schedule: one of `isthmus.attention.schedule.SCHEDULES`.
    devices: P.
    machine: rates.
    q_heads, kv_heads, q_length, width, batch, dtype: as in `messages`.
    causal: half the work.
    backward: of that pass; else of the forward pass.

  Raises:
    ValueError: a schedule that there isn't, or heads that "ulysses" can't
      divide.

  Example:
    >>> machine = Machine(flops=1e12, ahead=1e9, behind=1e9)
    >>> sizes = {"q_heads": 8, "kv_heads": 2, "q_length": 512, "width": 64}
    >>> steps = simulate("kv_ring", 4, machine=machine, **sizes)
    >>> len(steps), steps[0].ahead, steps[3].ahead
    (4, 262144, 0)
  """
  if schedule == "ulysses" and (q_heads % devices or kv_heads % devices):
    raise ValueError(
      f"ulysses gives each of {devices} devices some heads, and there are "
      f"{q_heads} query heads and {kv_heads} kv heads"
    )
  sent = messages(
    schedule,
    devices,
    q_heads=q_heads,
    kv_heads=kv_heads,
    q_length=q_length,
    width=width,
    batch=batch,
    dtype=dtype,
    backward=backward,
  )
  plan = Hops((), 0, 0)
  if schedule not in ("all_gather", "ulysses"):
    plan = _hops(schedule, devices, q_length, "contiguous", None, None)
  work = 4 * batch * q_length**2 * q_heads * width / (1 + bool(causal))
  work *= BACKWARD if backward else 1
  pairs = _pairs(schedule, devices, plan)
  loads: dict[int, list[float]] = {}
  for message in sent:
    back = schedule == "token_ring" and message.what in _HOME[backward]
    load = loads.setdefault(_beside(schedule, message, back), [0, 0])
    way, size = message.way, message.bytes
    if machine.links == "ring":
      way, size = _passed(message, back, plan, devices)
    first = size * (way > 0) if way else size - size // 2
    load[0] += first
    load[1] += size - first
  steps = []
  for i in range(max([len(pairs), *(i + 1 for i in loads)])):
    compute = (pairs[i] if i < len(pairs) else 0) * work / machine.flops
    ahead, behind = loads.get(i, (0, 0))
    seconds = max(compute, machine.send(ahead, behind, devices))
    steps.append(Step(compute, ahead, behind, seconds))
  return tuple(steps)


def _pairs(schedule, devices, plan):
  """Pairs of devices that one device computes, by step."""
  if schedule in ("all_gather", "ulysses"):
    return [0, devices] if devices > 1 else [devices]
  found = [1] + [0] * max(plan.ahead, plan.behind)
  for far in (plan.ahead, plan.behind):
    for step in range(1, far + 1):
      found[step] += 1
  return [*found, 1] if plan.across else found


def _beside(schedule: str, message: Message, back: bool) -> int:
  """The step in which a message travels."""
  if schedule in ("all_gather", "ulysses"):
    return 2 * (message.step - 1)  # before the compute, or after it
  if back:
    return message.step + 1
  if message.what in ("dk", "dv"):
    return message.step
  return message.step - 1


def _passed(message, back, plan, devices):
  """(way, bytes) on the links between neighbours."""
  way, size = message.way, message.bytes
  if message.collective == "exchange":
    return way, size * (devices**2 // 4) / (devices - 1)  # all distances
  if back:
    shift = message.step
    if 2 * shift >= devices:  # the other way is shorter, or as short
      way = -way if 2 * shift > devices else 0
    return way, size * min(shift, devices - shift)
  if (
    message.collective == "permute"
    and message.what in ("dk", "dv")
    and message.step > plan.ahead
  ):
    # Home, by the way that the model says.
    return way, size * min(message.step - 1, devices + 1 - message.step)
  return way, size
