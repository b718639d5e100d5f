"""A job that measures gradients of growing stacks, computed in several ways."""

import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PRNGKeyArray

from isthmus.attention.bench.clock import Clock, Program
from isthmus.train import footprint, log
from isthmus.train import workdir as folder
from isthmus.train.footprint import Row
from isthmus.train.stop import requests


@runtime_checkable
class Problem(Protocol):
  """A stack of layers and its input."""

  @property
  def sizes(self) -> dict[str, Any]:
    """The `stack`, `depth`, `width` and `volume` of a `Row`."""
    ...

  def draw(self, key: PRNGKeyArray) -> tuple[Any, ...]:
    """Random arguments of the gradient."""
    ...

  def gradient(self, way: str) -> Callable[..., Any]:
    """The gradient, computed in that way."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
  """Measures memory and time of every problem's gradient in every way.

  Programs are compiled side by side, and nothing is compiled while one is
  timed. What there is no room or no time for has a row that says so.

  Attributes:
    problems: the most wanted first.
    ways: that which needs least first, for a device tells its peak where it
      rises.
    bases: those of them that the others are compared with.
    rounds: of which the median is taken; each runs all ways of a problem, in
      another order.
    seconds: of each round, about.
    limit_s: seconds after which nothing more is begun.
    together: problems whose programs are all compiled before the first of them
      is timed: more keep more cores at work, fewer have rows sooner.

  Raises:
    ValueError: nothing to measure, rounds, seconds or problems together that
      are none, a base that is no way.

  Example:
    >>> class Sines:
    ...   sizes = dict(stack="sines", depth=2, width=1, volume=(64,))
    ...   def draw(self, key):
    ...     return (jax.random.normal(key, (64,)),)
    ...   def gradient(self, way):
    ...     wrap = {"plain": lambda f: f, "remat": jax.checkpoint}[way]
    ...     f = wrap(lambda x: jax.numpy.sin(jax.numpy.sin(x)).sum())
    ...     return jax.grad(f)
    >>> job = Ladder(problems=(Sines(),), ways=("plain", "remat"),
    ...              bases=("plain",), rounds=1, seconds=0.0)
    >>> results = job.run("runs/sines")
    | stack | L | ...
    >>> sorted(results)[:3]
    ['rows', 'sines/L2/d1/64/plain/mib', 'sines/L2/d1/64/plain/ms']
  """

  problems: tuple[Problem, ...]
  ways: tuple[str, ...]
  bases: tuple[str, ...]
  rounds: int = 5
  seconds: float = 0.1
  limit_s: float = 420.0
  together: int = 4

  def __post_init__(self):
    if not self.problems or not self.ways or self.rounds < 1:
      raise ValueError(
        f"{len(self.problems)} problems, {len(self.ways)} ways, rounds is"
        f" {self.rounds}: each is at least 1"
      )
    if self.seconds < 0 or not self.limit_s > 0:
      raise ValueError(
        f"seconds is {self.seconds}, limit_s {self.limit_s}: at least 0, and"
        " above 0"
      )
    if self.together < 1:
      raise ValueError(f"together is {self.together}; it is at least 1")
    for base in self.bases:
      if base not in self.ways:
        raise ValueError(
          f"bases: {base!r} is none of the ways {', '.join(self.ways)}"
        )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes bench.json row by row, then bench.md and bench.png.

    A run that is stopped keeps its rows; the next one in the folder begins
    anew, for it may find another device.

    Returns:
      `CASE/WAY/mib` and `CASE/WAY/ms` where they were measured, and the number
      of `rows` that were; `interrupted` is 1 if a signal ended it.
    """
    path = pathlib.Path(workdir).absolute()
    rows: list[Row] = []
    with folder.lock(path), requests() as stop:
      folder.record(path, self, source=source or {}, force=force)
      try:
        self._measure(rows, path / "bench.json", stop)
      finally:
        if rows:
          self._tell(rows, path)
    results = {"rows": float(sum(row.ms is not None for row in rows))}
    for row in rows:
      name = f"{row.case}/{row.way}"
      if row.temp_bytes is not None:
        results[f"{name}/mib"] = row.temp_bytes / 2**20
      if row.ms is not None:
        results[f"{name}/ms"] = row.ms
    return results | ({"interrupted": 1.0} if stop.asked else {})

  def _measure(self, rows, path, stop) -> None:
    """Fills rows; after each, what there is so far is written."""
    began = time.monotonic()
    late = lambda: time.monotonic() - began > self.limit_s
    for start in range(0, len(self.problems), self.together):
      group = self.problems[start : start + self.together]
      for draw, plans in self._compile(group, lambda: stop.asked or late()):
        self._time(draw, plans, rows, path, stop, late)

  def _compile(self, problems, ended) -> list[tuple[Future, list[Future]]]:
    """Of each problem `draw`, and of each way what `footprint.plan` returns."""
    key = jax.random.key(0)

    def draw(problem):
      return None if ended() else jax.jit(problem.draw).lower(key).compile()

    def plan(problem, way):
      row = Row(**problem.sizes, way=way)
      if ended():
        return row, None
      shapes = jax.eval_shape(problem.draw, key)
      return footprint.plan(row, problem.gradient(way), shapes)

    began = time.monotonic()
    first, *others = self.ways
    # XLA compiles outside of Python's lock. One way goes ahead: what XLA tunes
    # for its products, the others find.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      plans = [[pool.submit(plan, problem, first)] for problem in problems]
      draws = [pool.submit(draw, problem) for problem in problems]
      wait(itertools.chain(*plans))
      for problem, planned in zip(problems, plans, strict=True):
        planned += [pool.submit(plan, problem, way) for way in others]
    if not ended():
      count, seconds = sum(map(len, plans)), time.monotonic() - began
      log.say(f"{count} programs compiled in {seconds:.0f} s")
    return list(zip(draws, plans, strict=True))

  def _time(self, draw, plans, rows, path, stop, late) -> None:
    """Times a problem's programs."""
    count = len(self.problems) * len(self.ways)
    clock = Clock(rounds=self.rounds, seconds=self.seconds)
    # Drawn once, and where it is told if there is no room.
    arguments = functools.cache(lambda: draw.result()(jax.random.key(0)))
    programs: dict[int, Program] = {}
    for plan in plans:
      row, program = plan.result()
      if stop.asked:
        return
      if not row.note and late():
        row = dataclasses.replace(
          row, note=f"not begun after {self.limit_s:g} s"
        )
      elif program is not None:
        once = dataclasses.replace(clock, rounds=1)
        row, program = footprint.run(row, program, arguments, once)
        if program is not None:
          programs[len(rows)] = program
      rows.append(row)
      footprint.write(rows, path, device=_where())
      log.say(f"{len(rows)}/{count} {row}")
    # Again, side by side: a device slows down as it grows warm.
    if programs:
      times = clock.in_turns(list(programs.values()), [arguments()])
      for n, seconds in zip(programs, times, strict=True):
        rows[n] = dataclasses.replace(rows[n], ms=seconds * 1e3)
      footprint.write(rows, path, device=_where())

  def _tell(self, rows, path) -> None:
    text = footprint.table(rows, self.bases)
    print(text)
    (path / "bench.md").write_text(f"{_where()}\n\n{text}\n")
    footprint.plot(rows, path / "bench.png", _where())


def _where() -> str:
  device = jax.local_devices()[0]
  return f"{device.device_kind} ({device.platform}), jax {jax.__version__}"
