"""A job that finds the largest 3D U-Nets whose training step fits a budget."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from isthmus.attention.bench.clock import Clock
from isthmus.nets.reversible import MODES
from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train import footprint, log, manifest
from isthmus.train import workdir as folder
from isthmus.train.footprint import Row
from isthmus.train.metrics.memory import largest, step_bytes
from isthmus.train.stop import requests
from isthmus.train.tasks.segment import Segment

#: What is enlarged: a cube's side, layers a level, channels of the first one.
AXES = ("volume", "depth", "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """The largest volume, depth and width of a net within a budget, by mode.

  Found from compiled programs; a step is run only of the reversible net, on
  volumes that fit it and not the plain one.

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

  def largest(self, mode: str, axis: str) -> int:
    """The largest side, depth or first width that fits; 0 if none does."""
    low, high, step = self.ends(axis)
    need = functools.cache(functools.partial(self.need, mode, axis))
    if need(low) > self.budget:
      return 0
    return largest(need, self.budget, low=low, high=high, step=step)

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
      size over the plain one's, of the volume in voxels; of a step that was
      run, `SHAPE/ran`, 1, or 0 where there was no room, and `SHAPE/ms`.
    """
    path = pathlib.Path(workdir).absolute()
    found: dict[str, float] = {}
    began = time.monotonic()
    with folder.lock(path), requests() as stop:
      folder.record(path, self, source=source or {}, force=force)
      try:
        for name, figure in self._figures(found):
          late = time.monotonic() - began > self.limit_s
          if stop.asked or late:
            log.say(f"{name} and what follows: not begun")
            break
          found |= figure()
          log.say(f"{name}: {found[name]:g}")
          manifest.write_text(path / "limits.json", json.dumps(found, indent=1))
      finally:
        text = self.table(found)
        print(text)
        (path / "limits.md").write_text(text + "\n")
    found |= self.gains(found)
    return found | ({"interrupted": 1.0} if stop.asked else {})

  def _figures(self, found: dict[str, float]) -> Iterator[tuple[str, Any]]:
    """Names and what makes them, of which the later depend on the earlier."""
    for axis, mode in itertools.product(self.axes, self.modes):
      name = f"{mode}/{axis}"
      yield name, lambda m=mode, a=axis, n=name: {n: float(self.largest(m, a))}
    shown = [self.shown] if self.shown else []
    for sides, mode in itertools.product(shown, self.modes):
      name, net = f"{mode}/gib", self.net.clone(mode=mode)
      yield name, lambda m=net, n=name, s=sides: {n: self._need(m, s)}
    for sides in self.only_reversible(found):
      name = "x".join(map(str, sides))
      yield f"{name}/ran", lambda s=sides: self.execute(s)

  def only_reversible(
    self, found: dict[str, float]
  ) -> list[tuple[int, int, int]]:
    """Volumes, of those found, that fit the reversible net alone."""
    volumes = []
    side = int(found.get("reversible/volume", 0))
    if side > found.get("plain/volume", math.inf):
      volumes.append((side, side, side))
    ours = found.get("reversible/gib", math.inf)
    plain = found.get("plain/gib", 0.0)
    if self.shown and ours <= self.budget < plain:
      volumes.append(self.shown)
    return volumes

  def execute(self, sides: tuple[int, int, int]) -> dict[str, float]:
    """Runs steps of the reversible net on a random volume."""
    model, task = self.net.clone(mode="reversible"), Segment()

    def draw(key):
      image = jax.random.normal(key, (1, *sides, self.channels))
      label = jax.random.randint(key, image.shape[:-1], 0, model.classes)
      batch = {"image": image, "label": label}
      variables = dict(task.init(model, batch, key))
      return variables.pop("params"), variables, batch, key

    def step(params, mutables, batch, key):
      loss = lambda params: task.loss(model, params, mutables, batch, key)
      return jax.value_and_grad(loss, has_aux=True)(params)

    row = footprint.measure(
      Row(
        stack="unet3d",
        depth=max(model.depths[0]),
        width=model.widths[0],
        volume=(1, *sides),
        way="reversible",
      ),
      step,
      jax.eval_shape(draw, jax.random.key(0)),
      lambda: jax.jit(draw)(jax.random.key(0)),
      clock=Clock(rounds=3, seconds=0.0),
    )
    name = "x".join(map(str, sides))
    ran = {f"{name}/ran": float(row.ms is not None)}
    return ran if row.ms is None else {**ran, f"{name}/ms": row.ms}

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
