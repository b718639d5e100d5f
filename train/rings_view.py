"""What `isthmus.train.rings` counts, as tables in Markdown and a plot."""

import pathlib
from typing import TYPE_CHECKING, Any

from isthmus.attention.schedule import SCHEDULES

if TYPE_CHECKING:
  from isthmus.train.rings import Point, Rings


def _head(job: "Rings", points: "list[Point]") -> str:
  """What the tables are of, in a paragraph."""
  done = sum(p.measured is not None for p in points)
  even = [f"{job.break_even(points, x):.3g} ({x})" for x in SCHEDULES[:2]]
  return (
    f"{job.length} tokens, {job.heads} heads of {job.head_dim},"
    f" {job.dtype}, {'causal, ' * job.causal}{job.which};"
    f" {job.flops / 1e12:g} TF/s, {job.ahead / 1e9:g} GB/s ahead and"
    f" {job.behind / 1e9:g} behind, links {job.links}. Arithmetic;"
    f" measured: {f'{done} points' if done else 'not run'}. The token ring"
    " sends as much as a ring of keys where a key head has "
    + " or ".join(even)
    + " query heads; with more it sends more."
  )


def digest(job: "Rings", points: "list[Point]") -> str:
  """Seconds by schedule, in bold the least, within 0.1%; first what it is of.

  The token ring's break-even is of the most devices.

  Example:
    >>> from isthmus.train.rings import Rings
    >>> job = Rings(length=1024, devices=(4,), heads=8, groups=(1,), flops=1e9)
    >>> print(digest(job, job.points()).splitlines()[-1][:29])
    | 1 | 4 | 1.879 | **1.879** |
  """
  lines = [
    _head(job, points),
    "",
    f"| group | devices | compute, s | {' | '.join(SCHEDULES)} |",
    "|" + "---|" * (3 + len(SCHEDULES)),
  ]
  for group in job.groups:
    for devices in job.devices:
      here = [p for p in points if (p.group, p.devices) == (group, devices)]
      best = min(p.seconds for p in here)
      cells = {p.schedule: f"{p.seconds:.4g}" for p in here}
      for p in here:
        if p.seconds <= best * (1 + 1e-3):
          cells[p.schedule] = f"**{cells[p.schedule]}**"
      cells = [cells.get(s, "heads") for s in SCHEDULES]
      compute = f"{here[0].compute:.4g}"
      lines.append(f"| {group} | {devices} | {compute} | {' | '.join(cells)} |")
  return "\n".join(lines)


def table(job: "Rings", points: "list[Point]") -> str:
  """The digest, and the bytes of every point.

  Example:
    >>> from isthmus.train.rings import Rings
    >>> job = Rings(length=1024, devices=(4,), heads=8, groups=(1,))
    >>> print(table(job, job.points()).splitlines()[-1])
    | 1 | 4 | ulysses | 0.7926 / 0.7926 | 2.172 / 2.172 | 4.814e-05 | not run |
  """
  lines = [
    digest(job, points),
    "",
    "MB on a device's links, ahead / behind:",
    "",
    "| group | devices | schedule | busiest step | in all | s | measured |",
    "|" + "---|" * 7,
  ]
  for p in points:
    step, whole = (
      f"{a / 1e6:.4g} / {b / 1e6:.4g}"
      for a, b in ((p.step_ahead, p.step_behind), (p.ahead, p.behind))
    )
    took = "not run" if p.measured is None else f"{p.measured:.4g}"
    lines.append(
      f"| {p.group} | {p.devices} | {p.schedule} | {step} | {whole}"
      f" | {p.seconds:.4g} | {took} |"
    )
  return "\n".join(lines)


def plot(job: "Rings", points: "list[Point]", path: pathlib.Path) -> None:
  """Time over compute against devices, and bytes against shared heads.

  Example:
    >>> from isthmus.train.rings import Rings
    >>> job = Rings(length=1024, devices=(2, 4), heads=8, groups=(1,))
    >>> plot(job, job.points(), pathlib.Path("rings.png"))
    >>> pathlib.Path("rings.png").stat().st_size > 1000
    True
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = len(job.groups) + 1
  figure = Figure(figsize=(3.2 * columns, 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  *panels, last = figure.subplots(1, columns)
  for axes in panels[1:]:
    axes.sharey(panels[0])
  for group, axes in zip(job.groups, panels, strict=True):
    for i, schedule in enumerate(SCHEDULES):
      each = sorted(
        (p for p in points if (p.group, p.schedule) == (group, schedule)),
        key=lambda p: p.devices,
      )
      mark: dict[str, Any] = {"color": f"C{i}", "label": schedule}
      line = [(p.devices, p.seconds / p.compute) for p in each]
      if line:
        axes.plot(*zip(*line, strict=True), ".-", linewidth=1, **mark)
      for p in each:
        if p.measured is not None:
          y = p.measured / p.compute
          axes.plot(p.devices, y, "x", color=f"C{i}", markersize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"query heads a key head: {group}", fontsize=9)
    axes.set_xlabel("devices")
  panels[0].set_ylabel(f"time of {job.which} over that of its compute")
  panels[0].legend(fontsize=7)
  ends = (1, max(8, *job.groups))
  for i, ring in enumerate(SCHEDULES[:2]):
    even = job.break_even(points, ring)
    label = f"over {ring}: {even:.3g}"
    last.plot(ends, [x / even for x in ends], color=f"C{i}", label=label)
    last.plot([even], [1.0], "o", color=f"C{i}")
  last.axhline(1, color="grey", linewidth=1, linestyle="--")
  last.set_xscale("log", base=2)
  last.set_yscale("log", base=2)
  last.xaxis.set_major_formatter("{x:g}")
  last.yaxis.set_major_formatter("{x:g}")
  last.set_title("bytes of the token ring; break-even", fontsize=9)
  last.set_xlabel("query heads a key head")
  last.legend(fontsize=7)
  done = any(p.measured is not None for p in points)
  figure.suptitle(
    f"{job.length} tokens; lines are arithmetic, "
    + ("crosses are measured" if done else "measured: not run"),
    fontsize=9,
  )
  figure.savefig(path, dpi=120)
