"""Mixture of block attention, beside dense attention of the same shape."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.attention import moba
from isthmus.attention.bench.case import PASSES
from isthmus.attention.bench.clock import Clock, Program, build, inputs
from isthmus.attention.bench.rows import Row
from isthmus.attention.moba import OP

#: Dense bfloat16 FLOPs a second of a device, by a word of its name: makers'
#: figures, without sparsity.
PEAK = {"H100": 989e12, "H200": 989e12}


@dataclasses.dataclass(frozen=True)
class Routing:
  """One problem: causal self-attention over chosen blocks.

  Attributes:
    block, top_k: of `moba`.
    batch, length, heads, width: as in `Case`.

  Example:
    >>> Routing(128, 8, batch=2, length=8192, heads=16, width=128).label
    'moba 128 x 8'
  """

  block: int
  top_k: int
  batch: int
  length: int
  heads: int
  width: int

  @property
  def label(self) -> str:
    """Its name for a reader."""
    return f"moba {self.block} x {self.top_k}"

  @property
  def pairs(self) -> int:
    """Pairs of a query and a key that one head sees."""
    whole, rest = divmod(self.length, self.block)
    own = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
    past = sum(
      min(self.top_k - 1, i) * min(self.block, self.length - i * self.block)
      for i in range(whole + (rest > 0))
    )
    return own + past * self.block

  def flops(self, which: str) -> float:
    """FLOPs of a pass, 4 d for a seen pair, and of scores of all blocks.

    Scores, 2 d for a query and a block before its own, count once.
    """
    blocks = -(-self.length // self.block)
    scores = 2 * self.length * blocks / 2
    rows = self.batch * self.heads * self.width
    seen = 4 * self.pairs * PASSES[which]
    return rows * (seen + (scores if "fwd" in which else 0))


@dataclasses.dataclass(frozen=True)
class Routed:
  """A measurement.

  Attributes:
    routing: what was measured.
    impl: the implementation.
    ms: milliseconds, by pass; "routing" is the choice and what finds the rows
      of each block, which both passes have in them.
    peak_bytes: arguments, results and temporaries, by pass; None if unknown.
    first_seconds: tracing and compiling, by pass.

  Example:
    >>> problem = Routing(128, 8, 2, 8192, 16, 128)
    >>> found = Routed(problem, "mosaic", {"fwd": 1.0}, {}, {})
    >>> print(next(found.lines([], "H100")))
    moba 128 x 8, B2 S8192 H16 D128 fwd mosaic: 1.000 ms, 124 TF/s, ...
  """

  routing: Routing
  impl: str
  ms: dict[str, float]
  peak_bytes: dict[str, int | None]
  first_seconds: dict[str, float]

  def speeds(self, rows: Iterable[Row], which: str) -> dict[str, float]:
    """How fast a pass is over each causal dense one of the same shape."""
    r = self.routing
    shape = (r.batch, r.length, r.heads, r.width)
    return {
      row.who: row.ms / self.ms[which]
      for row in rows
      if row.which == which
      and row.case.mask == "causal"
      and shape
      == (row.case.batch, row.case.length, row.case.heads, row.case.width)
    }

  def lines(self, rows: Iterable[Row], device: str) -> Iterable[str]:
    """For a reader; `rows` are of dense attention."""
    r, rows = self.routing, list(rows)
    where = f"{r.label}, B{r.batch} S{r.length} H{r.heads} D{r.width}"
    peak = next((y for x, y in PEAK.items() if x in device), None)
    for which, ms in self.ms.items():
      line = f"{where} {which} {self.impl}: {ms:.3f} ms"
      if which in PASSES:
        rate = r.flops(which) / ms * 1e3
        line += f", {rate / 1e12:.3g} TF/s"
        line += f", {rate / peak:.0%} of {device}'s peak" if peak else ""
      over = self.speeds(rows, which)
      line += "".join(f", {x:.3g}x {who}" for who, x in over.items())
      size = self.peak_bytes.get(which)
      yield line + (f", {size / 2**20:.0f} MiB" if size is not None else "")

  def as_dict(self) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(self)


def parse(text: str) -> tuple[int, int]:
  """(block, top_k) of "128x8".

  Raises:
    ValueError: it isn't so written.

  Example:
    >>> parse("128x8")
    (128, 8)
  """
  found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
  if not found:
    raise ValueError(f"{text!r} is no block and top_k, such as 128x8")
  return int(found[1]), int(found[2])


def measure(
  routing: Routing,
  clock: Clock,
  passes: Iterable[str] = ("fwd", "fwd+bwd"),
  impl: str | None = None,
  dtype: Any = jnp.bfloat16,
) -> Routed:
  """Times passes, and what goes before them.

  Args:
    routing: the problem.
    clock: how long.
    passes: of "fwd" and "fwd+bwd".
    impl: of `moba`; by default the one it takes.
    dtype: of the arrays.

  Example:
    >>> problem = Routing(8, 2, batch=1, length=32, heads=2, width=8)
    >>> found = measure(problem, Clock(1, 1e-4), ["fwd"])
    >>> found.impl, list(found.ms)  # on a CPU
    ('chunked', ['fwd'])
  """
  r = routing
  sets = inputs(r.batch, r.length, r.heads, r.width, dtype, count=4)
  impl = impl or _runs(r, dtype)

  def forward(q, k, v):
    return moba(q, k, v, block=r.block, top_k=r.top_k, impl=impl)

  def both(do, *args):
    out, pullback = jax.vjp(forward, *args)
    return out, pullback(do)

  functions = {
    "fwd": (forward, [x[:3] for x in sets]),
    "fwd+bwd": (both, [(do, q, k, v) for q, k, v, do in sets]),
  }
  wanted = {which: functions[which] for which in passes if which in functions}
  if impl == "mosaic":
    wanted["routing"] = (_before(r), [x[:2] for x in sets])
  ms, programs = {}, {}
  for which, (function, given) in wanted.items():
    program: Program = build(function, *given[0])
    ms[which] = clock.seconds_of(program, given) * 1e3
    programs[which] = program
  return Routed(
    r,
    impl,
    ms,
    {which: program.peak_bytes for which, program in programs.items()},
    {which: program.first_seconds for which, program in programs.items()},
  )


def _runs(r: Routing, dtype) -> str:
  """The implementation that `moba` takes by itself."""
  from isthmus.pallas.moba.api import Extras, Options
  from isthmus.pallas.moba.layout import uniform

  x = jax.ShapeDtypeStruct((r.batch, r.length, r.heads, r.width), dtype)
  extras = Extras(uniform(r.length, r.length, block=r.block))
  options = Options(r.block, r.top_k)
  rows = OP.explain(x, x, x, extras, options=options)
  return next(row.name for row in rows if row.verdict == "runs")


def _before(r: Routing):
  from isthmus.pallas.moba import mosaic
  from isthmus.pallas.moba.api import Extras, Options
  from isthmus.pallas.moba.layout import uniform

  def run(q, k):
    extras = Extras(uniform(r.length, r.length, block=r.block))
    options = Options(r.block, r.top_k)
    return mosaic.routing(q, k, extras, options=options)

  return run
