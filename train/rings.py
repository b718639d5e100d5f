"""Bytes and time of every ring schedule, against devices and shared heads.

By arithmetic, `isthmus.attention.simulate`; what was measured goes onto the
plot.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from isthmus.attention.schedule import SCHEDULES
from isthmus.attention.simulate import Machine, simulate
from isthmus.train import log, rings_view
from isthmus.train import workdir as folder

PASSES = ("fwd", "bwd", "fwd+bwd")


class Point(NamedTuple):
  """One schedule on so many devices.

  Attributes:
    group, devices, schedule: which.
    step_ahead, step_behind: bytes of its busiest step, in either direction.
    ahead, behind: bytes in all.
    seconds: of the pass.
    compute: seconds of the compute alone.
    measured: seconds that it took, or None.

  Example:
    >>> point = Point(1, 4, "kv_ring", 8.0, 0.0, 24.0, 0.0, 0.5, 0.25)
    >>> point.seconds / point.compute
    2.0
  """

  group: int
  devices: int
  schedule: str
  step_ahead: float
  step_behind: float
  ahead: float
  behind: float
  seconds: float
  compute: float
  measured: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rings:
  """Counts bytes and time of every schedule, and finds where they cross.

  Attributes:
    length: tokens of the sequence, which the devices divide.
    devices: how many; a multiple of twice each divides `length`.
    heads: query heads.
    groups: query heads of a key head.
    head_dim: their width.
    dtype: of queries, keys and values.
    causal: half the work, even by zigzag.
    which: "fwd", "bwd" or "fwd+bwd".
    flops: FLOP/s of attention on a device.
    ahead, behind: bytes/s that leave a device in either direction.
    links: "both", "one" or "ring"; see `isthmus.attention.simulate.Machine`.
    latency: seconds of every step in which something is sent.
    measured: JSON with rows that were measured, or "" for none: a list, or
      `{"rows": [...]}`. A row has `devices`, `group`, `schedule`, `which`, `ms`
      and `case` with `length`, `heads`, `width`, `mask`. Times of another
      number of heads are scaled to `heads`, to which bytes and compute are in
      proportion, unless `latency` is set. Rows that differ otherwise are
      counted and left out.

  Raises:
    ValueError: sizes that don't divide, or are none.

  Example:
    >>> job = Rings(length=1024, devices=(4,), heads=8, groups=(1,))
    >>> sent = {p.schedule: p.ahead + p.behind for p in job.points()}
    >>> int(sent["kv_ring"]), int(sent["token_ring"])  # bytes of each device
    (12582912, 7938048)
  """

  length: int = 2**22
  devices: tuple[int, ...]
  heads: int = 32
  groups: tuple[int, ...] = (1, 4, 8)
  head_dim: int = 128
  dtype: str = "bfloat16"
  causal: bool = True
  which: str = "fwd+bwd"
  flops: float = 4e14
  ahead: float = 5e10
  behind: float = 5e10
  links: str = "both"
  latency: float = 0.0
  measured: str = ""

  def __post_init__(self):
    for name in ("length", "heads", "head_dim"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if not self.devices or not self.groups:
      raise ValueError("devices and groups: each has at least one entry")
    for devices in self.devices:
      if devices < 2 or self.length % (2 * devices):
        raise ValueError(
          f"devices {devices}: at least 2, and two chunks for each divide a "
          f"length of {self.length}"
        )
    for group in self.groups:
      if group < 1 or self.heads % group:
        raise ValueError(f"group {group} doesn't divide {self.heads} heads")
    if self.which not in PASSES:
      raise ValueError(f"which {self.which!r}; there are {', '.join(PASSES)}")
    try:
      jnp.dtype(self.dtype)
    except TypeError as error:
      raise ValueError(f"dtype {self.dtype!r} is none") from error
    self.machine()

  def machine(self) -> Machine:
    """The rates."""
    return Machine(
      flops=self.flops,
      ahead=self.ahead,
      behind=self.behind,
      links=self.links,
      latency=self.latency,
    )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes rings.json, rings.md and rings.png into `workdir`.

    Returns:
      `group_break_even/S`: heads per key head at which the token ring's busier
      direction has as many bytes as that of ring S, on the most devices. Of
      each group `group=G/token_ring_over_S`, the greatest and least ratio of
      times as `/most` and `/least`, and `group=G/S/hidden_to`: the most devices
      up to which S takes at most 1.1 times its compute (0 if on none).
      `measured`: points on the plot; `left_out`: rows of other sizes; of
      measured points, `group=G/devices=P/S/measured_over_model`.
    """
    path = pathlib.Path(workdir).absolute()
    rows = self.read()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      points, left_out = place(self.points(), rows)
      results = self.results(points) | {"left_out": float(left_out)}
      log.write_json(path / "rings.json", [p._asdict() for p in points])
      (path / "rings.md").write_text(rings_view.table(self, points) + "\n")
      print(rings_view.digest(self, points))
      rings_view.plot(self, points, path / "rings.png")
      log.write_results(path, results)
      return results

  def points(self) -> list[Point]:
    """Every schedule that can run, by group and devices."""
    return [
      self.point(group, devices, schedule)
      for group in self.groups
      for devices in self.devices
      for schedule in SCHEDULES
      if schedule != "ulysses" or self.heads // group % devices == 0
    ]

  def point(self, group: int, devices: int, schedule: str) -> Point:
    """Bytes and time of one schedule."""
    steps = []
    for name in PASSES[:2]:
      if name in self.which:
        steps += simulate(
          schedule,
          devices,
          machine=self.machine(),
          q_heads=self.heads,
          kv_heads=self.heads // group,
          q_length=self.length // devices,
          width=self.head_dim,
          dtype=jnp.dtype(self.dtype),
          causal=self.causal,
          backward=name == "bwd",
        )
    return Point(
      group,
      devices,
      schedule,
      step_ahead=max(s.ahead for s in steps),
      step_behind=max(s.behind for s in steps),
      ahead=sum(s.ahead for s in steps),
      behind=sum(s.behind for s in steps),
      seconds=sum(s.seconds for s in steps),
      compute=sum(s.compute for s in steps),
    )

  def read(self) -> list[dict[str, Any]]:
    """The rows of `measured`, those of one device left out.

    Raises:
      ValueError: no such file, or a row that isn't one.
    """
    if not self.measured:
      return []
    try:
      rows = json.loads(pathlib.Path(self.measured).read_text())
      rows = rows["rows"] if isinstance(rows, dict) else rows
      rows = [r for r in rows if "devices" in r and r["devices"] > 1]
      for r in rows:
        if r["schedule"] not in SCHEDULES or not r["ms"] > 0:
          raise ValueError(f"schedule {r['schedule']!r} in {r['ms']} ms")
        r["same"] = self.is_mine(r)
        r["seconds"] = r["ms"] / 1e3 * self.heads / r["case"]["heads"]
    except (OSError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"measured {self.measured} has no rows of rings: {error!r}"
      ) from error
    return rows

  def is_mine(self, row: dict[str, Any]) -> bool:
    """Whether a row was measured at this job's sizes, but for its heads."""
    case, mask = row["case"], "causal" if self.causal else "dense"
    sizes = (self.length, self.head_dim, mask, self.which)
    found = (case["length"], case["width"], case["mask"], row["which"])
    heads = case["heads"] == self.heads or not self.latency
    return found == sizes and heads and case.get("batch", 1) == 1

  def busier(self, point: Point) -> float:
    """Bytes of the busier direction; of both where links work one at a time."""
    one = self.links == "one" or point.devices == 2
    return (sum if one else max)((point.ahead, point.behind))

  def break_even(self, points: list[Point], ring: str) -> float:
    """Heads per key head at which a token ring sends what `ring` sends.

    A ring of keys sends as much less as there are fewer of them.
    """
    most = max(self.devices)
    here = {
      p.schedule: p
      for p in points
      if (p.devices, p.group) == (most, self.groups[0])
    }
    ratio = self.busier(here["token_ring"]) / self.busier(here[ring])
    return self.groups[0] / ratio

  def results(self, points: list[Point]) -> dict[str, float]:
    """The figures that `run` returns."""
    found = {}
    for ring in SCHEDULES[:2]:
      found[f"group_break_even/{ring}"] = self.break_even(points, ring)
    for group in self.groups:
      name = f"group={group}"
      of = {
        s: [p for p in points if (p.group, p.schedule) == (group, s)]
        for s in SCHEDULES
      }
      for ring in SCHEDULES[:2]:
        ratios = [
          a.seconds / b.seconds
          for a, b in zip(of["token_ring"], of[ring], strict=True)
        ]
        found[f"{name}/token_ring_over_{ring}/most"] = max(ratios)
        found[f"{name}/token_ring_over_{ring}/least"] = min(ratios)
      for schedule, each in of.items():
        hidden = 0
        for p in sorted(each, key=lambda p: p.devices):
          if p.seconds > 1.1 * p.compute:
            break
          hidden = p.devices
        found[f"{name}/{schedule}/hidden_to"] = float(hidden)
    measured = 0
    for p in points:
      if p.measured is not None:
        name = f"group={p.group}/devices={p.devices}/{p.schedule}"
        found[f"{name}/measured_over_model"] = p.measured / p.seconds
        measured += 1
    return found | {"measured": float(measured)}


def place(
  points: list[Point], rows: list[dict[str, Any]]
) -> tuple[list[Point], int]:
  """Points with what was measured of them, and how many rows are no point's.

  Of rows for one point the last counts.

  Example:
    >>> points = Rings(length=64, devices=(2,), heads=1, groups=(1,)).points()
    >>> row = {"group": 1, "devices": 2, "schedule": "kv_ring", "seconds": 0.5}
    >>> points, left_out = place(points, [row | {"same": True}])
    >>> [p.measured for p in points if p.schedule == "kv_ring"], left_out
    ([0.5], 0)
  """
  found = {
    (r["group"], r["devices"], r["schedule"]): r["seconds"]
    for r in rows
    if r["same"]
  }
  placed = [p._replace(measured=found.get(p[:3])) for p in points]
  on = {p[:3] for p in points}
  return placed, sum(
    not r["same"] or (r["group"], r["devices"], r["schedule"]) not in on
    for r in rows
  )
