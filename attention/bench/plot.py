"""A run's rates, drawn: lines over lengths, or bars where there is one."""

import pathlib
from collections.abc import Sequence
from typing import Any

from isthmus.attention.bench.rows import Row


def plot(rows: Sequence[Row], path: pathlib.Path, title: str) -> None:
  """Draws TF/s: a panel for each mask and width, a row for each pass.

  Example:
    >>> from isthmus.attention.bench.case import Case
    >>> rows = [Row("isthmus", True, Case("causal", 1, s, 16, 64), "fwd", 1.0)
    ...         for s in (4096, 8192)]
    >>> plot(rows, pathlib.Path("bench.png"), "an example")
    >>> pathlib.Path("bench.png").stat().st_size > 1000
    True
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(layout="constrained")
  FigureCanvasAgg(figure)
  draw(rows, figure, title)
  part = path.with_name(path.stem + ".part" + path.suffix)
  figure.savefig(part, dpi=110)
  part.replace(path)


def draw(rows: Sequence[Row], figure: Any, title: str) -> None:
  """Puts the panels into a matplotlib figure; in a notebook, one's own.

  Raises:
    ValueError: there are no rows.

  Example:
    >>> from matplotlib.figure import Figure
    >>> from isthmus.attention.bench.case import Case
    >>> figure = Figure()
    >>> row = Row("isthmus", True, Case("causal", 1, 64, 2, 64), "fwd", 1.0)
    >>> draw([row], figure, "an example")
    >>> figure.axes[0].get_title()
    'causal, D 64, fwd'
  """
  if not rows:
    raise ValueError("nothing was measured: there is nothing to draw")
  panels = list(dict.fromkeys((r.case.mask, r.case.width) for r in rows))
  passes = list(dict.fromkeys(r.which for r in rows))
  names = sorted({r.who for r in rows}, key=lambda who: _rank(rows, who))
  colours = {who: f"C{i}" for i, who in enumerate(names)}
  figure.set_size_inches(3.4 * len(panels) + 1, 2.6 * len(passes) + 0.8)
  grid = figure.subplots(len(passes), len(panels), squeeze=False)
  for which, line in zip(passes, grid, strict=True):
    for (mask, width), axes in zip(panels, line, strict=True):
      inside = [
        r
        for r in rows
        if (r.case.mask, r.case.width, r.which) == (mask, width, which)
      ]
      if inside:
        axes.set_title(
          f"{inside[0].case.label}, D {width}, {which}", fontsize=9
        )
        _panel(axes, inside, names, colours)
      else:
        axes.set_axis_off()
  figure.suptitle(title, fontsize=10)


def _rank(rows, who):
  first = next(i for i, r in enumerate(rows) if r.who == who)
  return (not rows[first].ours, first)


def _panel(axes, rows, names, colours):
  lengths = sorted({r.case.length for r in rows})
  names = [who for who in names if any(r.who == who for r in rows)]
  for i, who in enumerate(names):
    points = sorted((r.case.length, r.tflops) for r in rows if r.who == who)
    x, y = zip(*points, strict=True)
    if len(lengths) == 1:
      axes.barh(i, y[0], color=colours[who])
      axes.text(y[0], i, f" {y[0]:.3g}", va="center", fontsize=7)
    else:
      axes.plot(x, y, "o-", color=colours[who], label=who, markersize=3)
  if len(lengths) == 1:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"TF/s at {lengths[0]} tokens", fontsize=8)
  else:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("TF/s", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
