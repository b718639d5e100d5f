"""Memory and time of a gradient, beside other ways to compute it.

Memory is what XLA plans for the compiled program besides inputs and outputs;
time is the median of executed calls, the first left out.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from isthmus.attention.bench.clock import Clock, Program, build
from isthmus.train import manifest

#: What is said of a program that the device has no room for.
FULL = "out of memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One way to compute one gradient.

  Attributes:
    stack: what the layers are.
    depth: number of layers.
    width: channels.
    volume: rows and positions, such as (16, 1024).
    way: what is kept for the backward pass.
    temp_bytes: planned temporaries; None if it wasn't compiled.
    device_bytes: the device's own peak, inputs and outputs included; None
      where the backend doesn't tell, or it was higher before.
    ms: milliseconds of a call; None if it didn't run.
    note: why a figure is missing.

  Example:
    >>> row = Row(stack="mlp", depth=12, width=64, volume=(2, 8), way="plain")
    >>> row.case
    'mlp/L12/d64/2x8'
  """

  stack: str
  depth: int
  width: int
  volume: tuple[int, ...]
  way: str
  temp_bytes: int | None = None
  device_bytes: int | None = None
  ms: float | None = None
  note: str = ""

  @property
  def case(self) -> str:
    """What all ways have alike."""
    sizes = "x".join(map(str, self.volume))
    return f"{self.stack}/L{self.depth}/d{self.width}/{sizes}"

  def __str__(self) -> str:
    mib, ms = _text(self.temp_bytes, 2**20), _text(self.ms)
    figures = [f"{mib} MiB"] * bool(mib) + [f"{ms} ms"] * bool(ms)
    told = ", ".join(figures + [self.note] * bool(self.note))
    return f"{self.case} {self.way}: {told}"


def measure(
  row: Row,
  function: Callable[..., Any],
  shapes: tuple[Any, ...],
  arguments: Callable[[], tuple[Any, ...]],
  *,
  clock: Clock,
) -> tuple[Row, Program | None]:
  """(the row with its figures, the program).

  Where there is no room the row has a note, and there is no program.

  Args:
    row: without figures.
    function: what is compiled and called.
    shapes: of its arguments. It is compiled from them, so that its memory is
      known where the arguments themselves don't fit.
    arguments: makes them; random, for kernels run faster on zeros.
    clock: how long to measure.

  Raises:
    JaxRuntimeError: whatever fails for another reason than memory.

  Example:
    >>> row = Row(stack="sum", depth=1, width=1, volume=(8,), way="plain")
    >>> one = jax.ShapeDtypeStruct((8,), jnp.float32)
    >>> found, _ = measure(row, jnp.sin, (one,), lambda: (jnp.ones(8),),
    ...                    clock=Clock(rounds=1, seconds=0.0))
    >>> found.ms > 0, found.note
    (True, '')
  """
  row, program = plan(row, function, shapes)
  return (row, None) if program is None else run(row, program, arguments, clock)


def plan(
  row: Row, function: Callable[..., Any], shapes: tuple[Any, ...]
) -> tuple[Row, Program | None]:
  """The first half of `measure`: compiles, and runs nothing.

  Raises:
    JaxRuntimeError: whatever fails for another reason than memory.

  Example:
    >>> row = Row(stack="sum", depth=1, width=1, volume=(8,), way="plain")
    >>> found, program = plan(row, jnp.sin, (jnp.ones(8),))
    >>> found.temp_bytes, found.ms, program(jnp.zeros(8)).sum().item()
    (0, None, 0.0)
  """
  try:
    program = build(function, *shapes)
  except _FAILURES as error:
    return _full(row, error), None
  return dataclasses.replace(row, temp_bytes=program.temp_bytes), program


def run(
  row: Row,
  program: Program,
  arguments: Callable[[], tuple[Any, ...]],
  clock: Clock,
) -> tuple[Row, Program | None]:
  """The second half of `measure`.

  Raises:
    JaxRuntimeError: whatever fails for another reason than memory.

  Example:
    >>> row = Row(stack="sum", depth=1, width=1, volume=(8,), way="plain")
    >>> row, program = plan(row, jnp.sin, (jnp.ones(8),))
    >>> found, _ = run(row, program, lambda: (jnp.ones(8),),
    ...                Clock(rounds=1, seconds=0.0))
    >>> found.ms > 0
    True
  """
  try:
    before = _peak()
    seconds = clock.seconds_of(program, [arguments()])
  except _FAILURES as error:
    return _full(row, error), None
  after = _peak()
  grown = after is not None and before is not None and after > before
  row = dataclasses.replace(
    row, ms=seconds * 1e3, device_bytes=after if grown else None
  )
  return row, program


_FAILURES = (jax.errors.JaxRuntimeError, MemoryError)


def _full(row: Row, error: Exception) -> Row:
  """The row of what there is no room for; other errors are raised."""
  text = str(error)
  if isinstance(error, MemoryError) or (
    "RESOURCE_EXHAUSTED" in text or FULL in text.lower()
  ):
    return dataclasses.replace(row, note=FULL)
  raise error


def _peak() -> int | None:
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")


def ratio(row: Row, rows: Sequence[Row], way: str, figure: str) -> float | None:
  """A figure of a row over that of another way; None where one is missing.

  Args:
    row: above the line.
    rows: where the row below it is found, of the same case.
    way: of the row below it.
    figure: "temp_bytes" or "ms".

  Example:
    >>> a, b = (Row(stack="mlp", depth=1, width=1, volume=(1,), way=way, ms=ms)
    ...         for way, ms in (("plain", 3.0), ("remat", 4.0)))
    >>> ratio(a, [a, b], "remat", "ms")
    0.75
  """
  for other in rows:
    if (other.case, other.way) == (row.case, way):
      a, b = getattr(row, figure), getattr(other, figure)
      return a / b if a is not None and b else None
  return None


def table(rows: Sequence[Row], bases: Sequence[str]) -> str:
  """The rows in Markdown, with a column for the ratio to each of `bases`.

  Example:
    >>> row = Row(stack="mlp", depth=2, width=8, volume=(4, 16), way="plain",
    ...           temp_bytes=3 * 2**20, note="out of memory")
    >>> print(table([row], ["plain"]))
    | stack | L | d | volume | way | MiB | / plain | ms | / plain | device ...
    |---|---|---|---|---|---|---|---|---|---|---|
    | mlp | 2 | 8 | 4x16 | plain | 3 | 1 |  |  |  | out of memory |
  """
  over = [f"/ {base}" for base in bases]
  head = ["stack", "L", "d", "volume", "way", "MiB", *over, "ms", *over]
  head += ["device MiB", "note"]
  lines = [head]
  for row in rows:
    sizes = "x".join(map(str, row.volume))
    line = [row.stack, str(row.depth), str(row.width), sizes, row.way]
    for figure, unit in (("temp_bytes", 2**20), ("ms", 1)):
      line.append(_text(getattr(row, figure), unit))
      line += [_text(ratio(row, rows, b, figure)) for b in bases]
    lines.append([*line, _text(row.device_bytes, 2**20), row.note])
  texts = [f"| {' | '.join(line)} |" for line in lines]
  texts.insert(1, "|" + "---|" * len(head))
  return "\n".join(texts)


def _text(value: float | None, unit: float = 1) -> str:
  """Three digits at least."""
  if value is None:
    return ""
  value /= unit
  return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write(rows: Sequence[Row], path: pathlib.Path, **more: Any) -> None:
  """Replaces a JSON file by these rows and what else is to be said.

  Example:
    >>> row = Row(stack="mlp", depth=1, width=1, volume=(1,), way="plain")
    >>> write([row], pathlib.Path("bench.json"), device="cpu")
    >>> found = json.loads(pathlib.Path("bench.json").read_text())
    >>> found["device"], found["rows"][0]["way"]
    ('cpu', 'plain')
  """
  found = {**more, "rows": [dataclasses.asdict(row) for row in rows]}
  manifest.write_text(path, json.dumps(found, indent=1) + "\n")


def plot(rows: Sequence[Row], path: pathlib.Path, title: str) -> None:
  """Memory and time against depth: a column of panels for each stack.

  Of the widths and volumes of a stack, that with the most depths is drawn.

  Raises:
    ValueError: there are no rows.

  Example:
    >>> rows = [Row(stack="mlp", depth=d, width=8, volume=(4, 16), way="plain",
    ...             temp_bytes=d * 2**20, ms=1.0 * d) for d in (2, 4)]
    >>> plot(rows, pathlib.Path("bench.png"), "an example")
    >>> pathlib.Path("bench.png").stat().st_size > 1000
    True
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if not rows:
    raise ValueError("nothing was measured: there is nothing to draw")
  stacks = list(dict.fromkeys(row.stack for row in rows))
  ways = list(dict.fromkeys(row.way for row in rows))
  figure = Figure(figsize=(4.5 * len(stacks), 7), layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(title, fontsize=10)
  panels = figure.subplots(2, len(stacks), squeeze=False)
  for column, stack in enumerate(stacks):
    drawn = _longest([row for row in rows if row.stack == stack])
    sizes = "x".join(map(str, drawn[0].volume))
    panels[0, column].set_title(f"{stack}, d {drawn[0].width}, {sizes}")
    for axes, name, unit, label in (
      (panels[0, column], "temp_bytes", 2**20, "temporaries, MiB"),
      (panels[1, column], "ms", 1, "a gradient, ms"),
    ):
      for i, way in enumerate(ways):
        points = sorted(
          (row.depth, getattr(row, name) / unit)
          for row in drawn
          if row.way == way and getattr(row, name) is not None
        )
        if points:
          axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=way)
      axes.set_xlabel("layers")
      axes.set_ylabel(label)
      axes.set_ylim(bottom=0)
      axes.grid(alpha=0.3)
      if axes.lines:
        axes.legend(fontsize=7)
  part = path.with_name(path.stem + ".part" + path.suffix)
  figure.savefig(part, dpi=110)
  part.replace(path)


def _longest(rows: Sequence[Row]) -> list[Row]:
  """The rows of that width and volume which has the most depths."""
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    groups.setdefault((row.width, row.volume), []).append(row)
  return max(groups.values(), key=lambda g: len({row.depth for row in g}))
