"""A job that finds the largest 3D U-Nets whose training step fits a budget."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from isthmus.attention.bench.clock import Clock
from isthmus.nets.reversible import MODES
from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train import footprint, log
from isthmus.train import workdir as folder
from isthmus.train.footprint import Row
from isthmus.train.metrics.memory import largest, step_bytes
from isthmus.train.stop import requests
from isthmus.train.tasks.segment import Segment

# Figures, as they are found.
_FILE = "limits.json"
#: What is enlarged: a cube's side, layers a level, channels of the first one.
AXES = ("volume", "depth", "width")


class _GivenUp(Exception):
  """There is no time left, or a signal came."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """The largest volume, depth and width of a net within a budget, by mode.

  Found from compiled programs, several at a time. Where the reversible net
  goes beyond the plain one, its step is run, and the plain net's tried. Run
  again in its folder, it goes on with what isn't known yet.

  Attributes:
    net: of which one size at a time is enlarged. Its mode is not read.
    budget: GiB of a step's temporaries: parameters, batch and gradients come
      on top. On a GPU, XLA_PYTHON_CLIENT_MEM_FRACTION has to allow both.
    sides: (z, y, x) of the volume for which depth and width are enlarged.
    channels: of the image.
    most: the longest side, depth and first width that are tried.
    shown: a volume (z, y, x) to tell the memory of too, or None.
    modes, axes: what is searched.
    limit_s: seconds after which nothing more is begun.

  Raises:
    ValueError: an unknown mode or axis, a budget or limit that isn't above 0,
      a `most` below where the search begins.

  Example:
    >>> net = UNet3D(classes=3, widths=(8, 16), depth=2)
    >>> job = Limits(net=net, budget=1.0, most=(64, 4, 16))
    >>> job.ends("volume"), job.resized("plain", "width", 12).widths
    ((4, 64, 2), (12, 24))
  """

  net: UNet3D
  budget: float
  sides: tuple[int, int, int] = (32, 32, 32)
  channels: int = 1
  most: tuple[int, int, int] = (256, 64, 128)
  shown: tuple[int, int, int] | None = None
  modes: tuple[str, ...] = ("reversible", "remat", "plain")
  axes: tuple[str, ...] = AXES
  limit_s: float = 420.0

  def __post_init__(self):
    for name, known in (("modes", MODES), ("axes", AXES)):
      for one in getattr(self, name):
        if one not in known:
          raise ValueError(f"{name}: {one!r} is none of {', '.join(known)}")
    if self.channels < 1:
      raise ValueError(f"channels is {self.channels}; it is at least 1")
    if not self.budget > 0 or not self.limit_s > 0:
      raise ValueError(
        f"budget is {self.budget} GiB, limit_s {self.limit_s}: above 0"
      )
    for axis in self.axes:
      low, high, _ = self.ends(axis)
      if high < low:
        raise ValueError(
          f"most of {axis} is {self.most[AXES.index(axis)]}; the search begins"
          f" at {low}"
        )

  def ends(self, axis: str) -> tuple[int, int, int]:
    """(low, high, step) of the search.

    From 2 voxels in the last level, 1 layer, or half the width, by what the
    levels halve evenly, 1 layer, or a quarter of the width.
    """
    factor, first = 2 ** (len(self.net.widths) - 1), self.net.widths[0]
    low, step = {
      "volume": (2 * factor, factor),
      "depth": (1, 1),
      "width": (max(2, first // 4 * 2), max(2, first // 8 * 2)),
    }[axis]
    return low, low + (self.most[AXES.index(axis)] - low) // step * step, step

  def resized(self, mode: str, axis: str, n: int) -> UNet3D:
    """The net in a mode, with its depth or first width set to n."""
    net = self.net.clone(mode=mode)
    if axis == "depth":
      return net.clone(depth=n)
    if axis == "width":  # the others in proportion, and even
      first = net.widths[0]
      widths = tuple(2 * (w * n // (2 * first)) for w in net.widths)
      return net.clone(widths=widths)
    return net

  def need(self, mode: str, axis: str, n: int) -> float:
    """GiB of a step, with one size set to n."""
    sides = (n, n, n) if axis == "volume" else self.sides
    return self._need(self.resized(mode, axis, n), sides)

  def _need(self, net: UNet3D, sides: tuple[int, ...]) -> float:
    return step_bytes(net, Segment(), (1, *sides, self.channels)) / 2**30

  def largest(
    self, mode: str, axis: str, *, check: Callable[[], None] = lambda: None
  ) -> int:
    """The largest side, depth or first width that fits; 0 if none does.

    `check` is called before each compilation, and may raise.
    """
    low, high, step = self.ends(axis)

    @functools.cache
    def need(n):
      check()
      return self.need(mode, axis, n)

    if need(low) > self.budget:
      return 0
    power = 3 if axis == "volume" else 1
    return largest(
      need, self.budget, low=low, high=high, step=step, power=power
    )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes limits.json figure by figure, and limits.md.

    Returns:
      `MODE/AXIS`; of `shown`, `MODE/gib`; `gain/AXIS`, the reversible net's
      size over the plain one's, of the volume in voxels; of the steps that
      were run, `SIZE/MODE/ran`, 1, or 0 where there was no room, and
      `SIZE/MODE/ms`.
    """
    path = pathlib.Path(workdir).absolute()
    began = time.monotonic()
    with folder.lock(path), requests() as stop:
      folder.record(path, self, source=source or {}, force=force)
      # Settings that were forced may differ from those it was found with.
      found = {} if force else log.read_results(path, _FILE)

      def check():
        if stop.asked or time.monotonic() - began > self.limit_s:
          raise _GivenUp

      try:
        for name, figures in self._figures(found, check):
          try:
            found |= figures()
          except _GivenUp:
            log.say(f"{name}: given up")
          else:
            log.say(f"{name}: {found[name]:g}")
          log.write_json(path / _FILE, found)
      finally:
        text = self.table(found)
        print(text)
        (path / "limits.md").write_text(text + "\n")
    found |= self.gains(found)
    return found | ({"interrupted": 1.0} if stop.asked else {})

  def _figures(
    self, found: dict[str, float], check: Callable[[], None]
  ) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Names and what gives them, of which the later depend on the earlier."""

    def search(mode, axis):
      return float(self.largest(mode, axis, check=check))

    def shown(mode, sides):
      check()
      return self._need(self.net.clone(mode=mode), sides)

    # XLA compiles outside of Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      waiting = {
        f"{mode}/{axis}": pool.submit(search, mode, axis)
        for axis, mode in itertools.product(self.axes, self.modes)
        if f"{mode}/{axis}" not in found
      }
      if self.shown:
        waiting |= {
          f"{mode}/gib": pool.submit(shown, mode, self.shown)
          for mode in self.modes
          if f"{mode}/gib" not in found
        }
      for name, one in waiting.items():
        yield name, lambda name=name, one=one: {name: one.result()}
    for name, net, sides in self.beyond(found):
      if f"{name}/reversible/ran" in found:
        continue

      def execute(name=name, net=net, sides=sides):
        check()
        return self.execute(name, net, sides)

      yield f"{name}/reversible/ran", execute

  def beyond(
    self, found: dict[str, float]
  ) -> list[tuple[str, UNet3D, tuple[int, int, int]]]:
    """(name, net, sides) of what was found to fit the reversible net alone."""
    sizes = []
    ours = found.get("reversible/gib", math.inf)
    if self.shown and ours <= self.budget < found.get("plain/gib", 0.0):
      name = "x".join(map(str, self.shown))
      sizes.append((name, self.net.clone(mode="reversible"), self.shown))
    for axis in self.axes:
      ours = int(found.get(f"reversible/{axis}", 0))
      if ours > found.get(f"plain/{axis}", math.inf):
        sides = (ours, ours, ours) if axis == "volume" else self.sides
        net = self.resized("reversible", axis, ours)
        sizes.append((f"{axis}={ours}", net, sides))
    return sizes

  def execute(
    self, name: str, net: UNet3D, sides: tuple[int, int, int]
  ) -> dict[str, float]:
    """Runs steps on a random volume.

    Of the plain net too where a device has memory of its own: there it is
    told to have no room, or the plan was wrong.
    """
    modes = ["reversible"]
    if (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
      modes.append("plain")
    found = {}
    for mode in modes:
      row = self._measure(net.clone(mode=mode), sides)
      found[f"{name}/{mode}/ran"] = float(row.ms is not None)
      if row.ms is not None:
        found[f"{name}/{mode}/ms"] = row.ms
    return found

  def _measure(self, net: UNet3D, sides: tuple[int, int, int]) -> Row:
    task = Segment()

    def draw(key):
      image = jax.random.normal(key, (1, *sides, self.channels))
      label = jax.random.randint(key, image.shape[:-1], 0, net.classes)
      batch = {"image": image, "label": label}
      variables = dict(task.init(net, batch, key))
      return variables.pop("params"), variables, batch, key

    def step(params, mutables, batch, key):
      loss = lambda params: task.loss(net, params, mutables, batch, key)
      return jax.value_and_grad(loss, has_aux=True)(params)

    row, _ = footprint.measure(
      Row(
        stack="unet3d",
        depth=max(net.depths[0]),
        width=net.widths[0],
        volume=(1, *sides),
        way=net.mode,
      ),
      step,
      jax.eval_shape(draw, jax.random.key(0)),
      lambda: jax.jit(draw)(jax.random.key(0)),
      clock=Clock(rounds=3, seconds=0.0),
    )
    return row

  def gains(self, found: dict[str, float]) -> dict[str, float]:
    """`gain/AXIS`, where the plain net's end was found."""
    gains = {}
    for axis in self.axes:
      ours, plain = (found.get(f"{m}/{axis}") for m in ("reversible", "plain"))
      if ours and plain and plain < self.ends(axis)[1]:
        power = 3 if axis == "volume" else 1
        gains[f"gain/{axis}"] = (ours / plain) ** power
    return gains

  def table(self, found: dict[str, float]) -> str:
    """What was found, in Markdown."""
    lines = [f"| {self.budget:g} GiB | {' | '.join(self.axes)} |"]
    lines.append("|" + "---|" * (len(self.axes) + 1))
    for mode in self.modes:
      row = [mode]
      for axis in self.axes:
        n, (low, high, _) = found.get(f"{mode}/{axis}"), self.ends(axis)
        if n is None:
          row.append("not searched")
        elif n == 0:
          row.append(f"below {low}")
        else:
          row.append(f"{n:g}{' or more' if n == high else ''}")
      lines.append(f"| {' | '.join(row)} |")
    for name, value in self.gains(found).items():
      axis = name.removeprefix("gain/")
      ended = found[f"reversible/{axis}"] < self.ends(axis)[1]
      bound = "" if ended else " at least"
      lines.append(f"\n{axis}, reversible / plain:{bound} {value:.2f}")
    for name, value in found.items():
      if name.rpartition("/")[2] in ("gib", "ran", "ms"):
        lines.append(f"\n{name} {value:.4g}")
    return "\n".join(lines)
