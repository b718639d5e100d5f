"""`python -m isthmus.pallas.tune OP`: measures what a kernel is best built by.

Every candidate is compiled and timed on the GPU that is there, on random
data; the fastest go into the table of its device kind, see
`isthmus.pallas.table`. Nothing is tuned while a program is traced or runs.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.pallas import table
from isthmus.pallas.compat import has_mosaic

WIDTHS = (64, 128, 192, 256)
LENGTH, CHANNELS = 8192, 2048
# What another candidate must be faster by to displace the rule of thumb.
MARGIN = 0.01

_HELP = f"""\
Times candidates of the Mosaic attention kernels for head widths
{", ".join(map(str, WIDTHS))}: causal, bfloat16, {LENGTH} tokens, {CHANNELS}
channels; and writes the table of this device kind. With --quick: widths 64
and 128 alone, in fewer rounds."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to build a kernel.

  Attributes:
    width: of heads.
    which: a field of `isthmus.pallas.flash.configs.Configs`.
    config: what it is built by.

  Example:
    >>> from isthmus.pallas.flash.configs import guess
    >>> print(Candidate(64, "keys", guess(64).keys))
    64 keys 64, 4
  """

  width: int
  which: str
  config: Any

  def __str__(self):
    values = dataclasses.asdict(self.config).values()
    return f"{self.width} {self.which} {', '.join(map(str, values))}"


@dataclasses.dataclass(frozen=True)
class Row:
  """What came of a candidate: milliseconds, or why there are none.

  Example:
    >>> Row(candidates((64,))[0], ms=0.5).skipped is None
    True
  """

  candidate: Candidate
  ms: float | None = None
  skipped: str | None = None


def candidates(widths: Iterable[int]) -> list[Candidate]:
  """What is tried; for each kernel the rule of thumb comes first.

  Example:
    >>> found = candidates((128,))
    >>> len(found), str(found[0])
    (20, '128 forward 128, 2, True, 2')
  """
  from isthmus.pallas.flash.configs import allowed, guess
  from isthmus.pallas.flash.mosaic_backward import BackwardConfig
  from isthmus.pallas.flash.mosaic_forward import ForwardConfig

  blocks, product = (128, 64), itertools.product
  backward = [BackwardConfig(*x) for x in product(blocks, (1, 2, 4))]
  found = []
  for width in widths:
    groups = allowed(width)["groups"]
    forward = product(blocks, (2, 4), (True, False), groups)
    tried = {
      "forward": [ForwardConfig(*x) for x in forward],
      "queries": backward,
      "keys": backward,
    }
    for which, configs in tried.items():
      first = getattr(guess(width), which)
      rest = [config for config in configs if config != first]
      found += [Candidate(width, which, config) for config in (first, *rest)]
  return found


def build(candidate: Candidate) -> Callable[[], Any]:
  """The candidate's kernel, compiled, as a call without arguments.

  Raises:
    Exception: whatever keeps it from being built.

  Example:
    >>> build(candidates((64,))[0])  # on a CPU
    Traceback (most recent call last):
    ValueError: ...
  """
  from isthmus.pallas.flash import mosaic_backward, mosaic_forward
  from isthmus.pallas.flash.api import Options
  from isthmus.pallas.flash.predicate import Band
  from isthmus.pallas.flash.tile import Plan

  width, config = candidate.width, candidate.config
  band = Band(None, 0)
  options = Options(scale=width**-0.5, predicate=band)
  plan = Plan((LENGTH, LENGTH), band=band)
  turned = Plan((LENGTH, LENGTH), band=mosaic_backward.transposed(band))
  keys = mosaic_backward.backward_keys

  def run(q, k, v, do, lse, delta):
    if candidate.which == "forward":
      return mosaic_forward.forward(q, k, v, plan, options, config)
    arrays = (q, k, v, do, lse, delta)
    if candidate.which == "queries":
      return mosaic_backward.backward_queries(*arrays, plan, options, config)
    if width > 128:  # as in isthmus.pallas.flash.mosaic
      parts = (("dk",), ("dv",))
      return [
        keys(*arrays, turned, options, config, wanted=part) for part in parts
      ]
    return keys(*arrays, turned, options, config)

  shapes = jax.eval_shape(functools.partial(_draw, width))
  compiled = jax.jit(run).lower(*shapes).compile()
  return lambda: compiled(*_arrays(width))


@functools.lru_cache(maxsize=1)
def _arrays(width: int) -> tuple[jax.Array, ...]:
  return jax.jit(_draw, static_argnums=0)(width)


def _draw(width: int) -> tuple[jax.Array, ...]:
  """q, k, v, do, the base-2 lse that normal q and k have, and delta."""
  heads = CHANNELS // width
  keys = jax.random.split(jax.random.key(0), 5)
  shape = (1, LENGTH, heads, width)
  arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]]
  rows = (1, heads, LENGTH)
  lse = jnp.log2(jnp.arange(1, LENGTH + 1, dtype=jnp.float32)) + math.log2(
    math.sqrt(math.e)
  )
  delta = 0.1 * jax.random.normal(keys[4], rows)
  return (*arrays, jnp.broadcast_to(lse, rows), delta)


@dataclasses.dataclass(frozen=True)
class Timer:
  """Milliseconds of a call: the median over rounds of many calls each.

  Example:
    >>> Timer(rounds=2, calls=3)(lambda: jnp.zeros(3)) > 0
    True
  """

  rounds: int = 9
  calls: int = 20

  def __call__(self, call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(self.rounds):
      start = time.perf_counter()
      out = None
      for _ in range(self.calls):
        out = call()
      jax.block_until_ready(out)
      times.append((time.perf_counter() - start) / self.calls)
    return 1e3 * statistics.median(times)


def sweep(
  found: Sequence[Candidate],
  timer: Callable[[Callable[[], Any]], float],
  build: Callable[[Candidate], Callable[[], Any]] = build,
  tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
  """Builds the candidates of a width side by side, then times one by one.

  Example:
    >>> rows = sweep(candidates((64,))[:2], lambda call: call(), lambda c: int)
    >>> [row.ms for row in rows]
    [0, 0]
  """
  rows = []
  for _, group in itertools.groupby(found, lambda c: c.width):
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      built = [(c, pool.submit(build, c)) for c in group]
    for candidate, future in built:
      try:
        row = Row(candidate, ms=timer(future.result()))
      except Exception as error:  # whatever the compiler or the driver says
        reason = str(error).strip() or type(error).__name__
        row = Row(candidate, skipped=reason.splitlines()[0][:200])
      rows.append(row)
      tell(row)
  return rows


def best(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
  """The fastest of each width and kernel, as a table says it.

  The first candidate stays unless another is faster by `MARGIN`. A width of
  which some kernel could not be timed is left out.

  Example:
    >>> best([Row(c, ms=1.0) for c in candidates((64,))])["64"]["keys"]
    {'block': 64, 'stages': 4}
  """
  found: dict[str, dict[str, Any]] = {}
  lost = set()
  key = lambda row: (row.candidate.width, row.candidate.which)
  for (width, which), group in itertools.groupby(rows, key):
    times = {row.candidate.config: row.ms or math.inf for row in group}
    first, winner = next(iter(times)), min(times, key=lambda c: times[c])
    if times[winner] == math.inf:
      lost.add(str(width))
    if times[winner] > times[first] * (1 - MARGIN):
      winner = first
    found.setdefault(str(width), {})[which] = dataclasses.asdict(winner)
  return {width: x for width, x in found.items() if width not in lost}


def record(rows: Sequence[Row], kind: str, command: str) -> dict[str, Any]:
  """The table: what is best, and where each figure comes from.

  Example:
    >>> rows = [Row(c, ms=1.0) for c in candidates((64,))]
    >>> record(rows, "abacus", "tune flash")["times"][0]
    {'width': 64, 'kernel': 'forward', 'block_k': 128, ..., 'ms': 1.0}
  """
  return {
    "device": kind,
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
    "command": command,
    "case": f"causal bfloat16 b1 t{LENGTH} s{LENGTH}, {CHANNELS} channels",
    "best": best(rows),
    "times": [
      {
        "width": row.candidate.width,
        "kernel": row.candidate.which,
        **dataclasses.asdict(row.candidate.config),
        **(
          {"skipped": row.skipped}
          if row.ms is None
          else {"ms": round(row.ms, 4)}
        ),
      }
      for row in rows
    ],
  }


def write(file: pathlib.Path, found: dict[str, Any]) -> None:
  """Writes a table, whole or not at all; a line for each time.

  Example:
    >>> write(pathlib.Path("flash.json"), {"best": {}, "times": [{"ms": 1.0}]})
    >>> print(pathlib.Path("flash.json").read_text())
    {
      "best": {},
      "times": [
        {"ms": 1.0}
      ]
    }
    <BLANKLINE>
  """
  times = ",\n".join("    " + json.dumps(x) for x in found["times"])
  text = json.dumps({**found, "times": []}, indent=2)
  text = text.replace('"times": []', f'"times": [\n{times}\n  ]')
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_name(file.name + ".part")
  part.write_text(text + "\n")
  part.replace(file)


def refuse() -> str | None:
  """Why nothing can be measured here, or None.

  Example:
    >>> print(refuse())  # on a CPU
    it needs ...
  """
  from isthmus.pallas.hopper import refuse_machine

  reason = refuse_machine()
  if reason is None and not has_mosaic():
    reason = f"it needs jax 0.11, and this is {jax.__version__}"
  return reason


class _Parser(argparse.ArgumentParser):
  """Errors are one line."""

  def error(self, message):
    self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; the status: 0, 1 if a width has no entry, 2 if refused.

  Example:
    >>> main(["flash", "--quick"])  # on a CPU
    Traceback (most recent call last):
    SystemExit: 2
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = _Parser(
    "python -m isthmus.pallas.tune",
    description=_HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("op", choices=("flash",), metavar="OP", help="flash")
  parser.add_argument("--out", type=pathlib.Path, metavar="FILE")
  parser.add_argument("--quick", action="store_true")
  options = parser.parse_args(argv)
  if reason := refuse():
    parser.error(f"{options.op} can't be tuned here: {reason}")
  kind = table.device_kind()
  widths = (64, 128) if options.quick else WIDTHS
  timer = Timer(rounds=3) if options.quick else Timer()
  rows = _shown(candidates(widths), timer)
  command = f"{parser.prog} {shlex.join(argv)}"
  found = record(rows, kind, command)
  file = options.out or table.destination(kind, options.op)
  write(file, found)
  print(f"wrote {file}")
  missing = [str(x) for x in widths if str(x) not in found["best"]]
  if missing:
    print(f"no entry for width {', '.join(missing)}: see what was skipped")
  return 1 if missing else 0


def _shown(found, timer) -> list[Row]:
  """`sweep` with a bar; every time is printed as it is known."""
  from rich.console import Console
  from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

  columns = (*Progress.get_default_columns(), MofNCompleteColumn())
  console = Console(soft_wrap=True)
  with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
    task = progress.add_task("building and timing", total=len(found))

    def tell(row):
      said = row.skipped if row.ms is None else f"{row.ms:.4f} ms"
      console.print(f"{row.candidate}: {said}", highlight=False, markup=False)
      progress.advance(task)

    return sweep(found, timer, build, tell)


if __name__ == "__main__":
  sys.exit(main())
