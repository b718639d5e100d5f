"""What choosing blocks brings, as a table and drawn."""

import pathlib
from collections.abc import Sequence
from typing import Any

from isthmus.attention.bench.chosen import MOST, Chosen


def table(rows: Sequence[Chosen]) -> str:
  """Markdown: a line for each row, the fastest of a source and length bold.

  Example:
    >>> shape = dict(length=8192, heads=32, kv_heads=8, width=128)
    >>> row = Chosen("drawn", "mass", 0.9, fwd=2.0, choice=0.1, kept=0.25,
    ...              mass=0.97, head_mass=0.95, dense={"cudnn": 4.0}, **shape)
    >>> print(table([row]))
    | source | tokens | way | ms | choice | blocks | mass | worst head | cudnn |
    |---|---|---|---|---|---|---|---|---|
    | drawn | 8192 | **mass=0.9** | 2.000 | 5.0% | 0.250 | 0.970 | 0.950 | ...
  """
  dense = list(dict.fromkeys(who for row in rows for who in row.dense))
  head = ["source", "tokens", "way", "ms", "choice", "blocks", "mass",
          "worst head", *dense]  # fmt: skip
  lines = [head, ["---"] * len(head)]
  for row in rows:
    group = [
      r.fwd for r in rows if (r.source, r.length) == (row.source, row.length)
    ]
    mark = "**" if row.fwd == min(group) else ""
    speeds = row.speeds
    lines.append(
      [
        row.source,
        str(row.length),
        f"{mark}{row.way}={row.level:g}{mark}",
        f"{row.fwd:.3f}",
        f"{row.share:.1%}",
        f"{row.kept:.3f}",
        f"{row.mass:.3f}",
        f"{row.head_mass:.3f}",
        *(f"{speeds[who]:.2f}x" if who in speeds else "" for who in dense),
      ]
    )
  texts = [f"| {' | '.join(line)} |" for line in lines]
  texts[1] = "|" + "|".join(lines[1]) + "|"
  return "\n".join(texts)


def verdicts(rows: Sequence[Chosen]) -> list[str]:
  """Whether what is promised holds, a line for each source and length.

  Of the ways that keep at least 0.9 of the mass, as it is counted, the fastest
  is compared with cuDNN.

  Example:
    >>> shape = dict(length=131072, heads=32, kv_heads=8, width=128)
    >>> row = Chosen("drawn", "mass", 0.9, fwd=60.0, choice=6.0, kept=0.05,
    ...              mass=0.95, head_mass=0.9, dense={"cudnn": 240.0}, **shape)
    >>> print(verdicts([row])[0])
    drawn, 131072 tokens: mass=0.9 is 4x cudnn, choice 10.0%: 3x promised, holds
  """
  found = []
  for source, length in dict.fromkeys((r.source, r.length) for r in rows):
    group = [
      r
      for r in rows
      if (r.source, r.length) == (source, length)
      and r.wanted is not None
      and r.mass >= 0.9
      and "cudnn" in r.dense
    ]
    if not group:
      continue
    row = min(group, key=lambda r: r.fwd)
    wanted, speed = row.wanted or 0.0, row.speeds["cudnn"]
    holds = speed >= wanted and row.share <= MOST
    found.append(
      f"{source}, {length} tokens: {row.way}={row.level:g} is"
      f" {speed:.3g}x cudnn, choice {row.share:.1%}:"
      f" {wanted:g}x promised, {'holds' if holds else 'does not hold'}"
    )
  return found


def plot(rows: Sequence[Chosen], path: pathlib.Path, title: str) -> None:
  """Draws speeds, shares of the choice and blocks kept over lengths.

  A column of panels for each source. Speeds are over cuDNN, or over our dense
  attention where that wasn't timed.

  Example:
    >>> shape = dict(length=8192, heads=32, kv_heads=8, width=128)
    >>> row = Chosen("drawn", "mass", 0.9, fwd=2.0, choice=0.1, kept=0.25,
    ...              mass=0.97, head_mass=0.95, dense={"cudnn": 4.0}, **shape)
    >>> plot([row], pathlib.Path("chosen.png"), "an example")
    >>> pathlib.Path("chosen.png").stat().st_size > 1000
    True
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if not rows:
    raise ValueError("nothing was measured: there is nothing to draw")
  sources = list(dict.fromkeys(row.source for row in rows))
  names = list(dict.fromkeys((row.way, row.level) for row in rows))
  peer = "cudnn" if any("cudnn" in row.dense for row in rows) else "isthmus"
  figure = Figure(figsize=(4.6 * len(sources), 9), layout="constrained")
  FigureCanvasAgg(figure)
  grid = figure.subplots(3, len(sources), squeeze=False)
  for column, source in enumerate(sources):
    for i, (name, level) in enumerate(names):
      line = sorted(
        (
          r for r in rows if (r.source, r.way, r.level) == (source, name, level)
        ),
        key=lambda r: r.length,
      )
      label = f"{name}={level:g}"
      mark: dict[str, Any] = {"color": f"C{i}", "marker": "osv^D"[i % 5]}
      over = [(r.length, r.speeds[peer]) for r in line if peer in r.dense]
      if over:
        grid[0, column].plot(*zip(*over, strict=True), label=label, **mark)
      lengths = [r.length for r in line]
      grid[1, column].plot(lengths, [r.share for r in line], **mark)
      grid[2, column].plot(lengths, [r.kept for r in line], **mark)
    grid[0, column].axhline(1, color="grey", linewidth=0.8)
    if peer == "cudnn":
      promised = [(r.length, r.wanted) for r in rows if r.wanted is not None]
      for length, speed in dict.fromkeys(promised):
        grid[0, column].plot(length, speed, "k_", markersize=14)
    grid[1, column].axhline(MOST, color="black", linestyle="--", linewidth=0.8)
    grid[0, column].set_title(source, fontsize=9)
    for axes in grid[:, column]:
      axes.set_xscale("log", base=2)
      axes.set_xlabel("tokens", fontsize=8)
    grid[2, column].set_yscale("log")
    if over := grid[0, column].get_legend_handles_labels()[0]:
      grid[0, column].legend(handles=over, fontsize=6)
  grid[0, 0].set_ylabel(f"speed over {peer}")
  grid[1, 0].set_ylabel("share of the choice in the time")
  grid[2, 0].set_ylabel("share of causal blocks read")
  figure.suptitle(title, fontsize=9)
  part = path.with_name(path.stem + ".part" + path.suffix)
  figure.savefig(part, dpi=110)
  part.replace(path)
