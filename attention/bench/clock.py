"""Times of compiled functions: many calls under way at once, one wait.

A call is timed as a program is used: dispatched while earlier ones still run.
Inputs are random; zeros draw less power, and so run faster than data does.
"""

import dataclasses
import math
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# An L2 cache of 50 MB, twice over: smaller inputs are taken in turns.
_CACHE = 1e8


@dataclasses.dataclass(frozen=True)
class Clock:
  """How long to measure.

  Attributes:
    rounds: of which the median is taken.
    seconds: of each round, about.
    slow: seconds; a call that takes longer has one round, of one call.

  Example:
    >>> x = jnp.ones(1000)
    >>> double = build(lambda x: x + x, x)
    >>> Clock(rounds=3, seconds=1e-3).seconds_of(double, [(x,)]) > 0
    True
  """

  rounds: int = 5
  seconds: float = 0.1
  slow: float = 1.0

  def seconds_of(
    self, program: Callable[..., Any], sets: Sequence[tuple[Any, ...]]
  ) -> float:
    """Seconds of a call: the median of the rounds, over `sets` in turns."""
    return self.in_turns([program], sets)[0]

  def in_turns(
    self,
    programs: Sequence[Callable[..., Any]],
    sets: Sequence[tuple[Any, ...]],
  ) -> list[float]:
    """`seconds_of` each program; every round runs all, in another order.

    A device that grows warm, and slower, so favours none of them.

    Example:
      >>> double = build(lambda x: x + x, jnp.ones(9))
      >>> times = Clock(rounds=3, seconds=1e-3).in_turns(
      ...   [double, double], [(jnp.ones(9),)]
      ... )
      >>> len(times)
      2
    """
    calls = [self._calls(program, sets) for program in programs]
    times: list[list[float]] = [[] for _ in programs]
    # The times of slow calls vary little.
    rounds = 1 if 0 in calls else self.rounds
    calls = [max(n, 1) for n in calls]
    for round_ in range(rounds):
      order = list(range(len(programs)))
      random.Random(round_).shuffle(order)
      for n in order:
        start = time.perf_counter()
        out = None
        for i in range(calls[n]):
          out = programs[n](*sets[i % len(sets)])
        jax.block_until_ready(out)
        times[n].append((time.perf_counter() - start) / calls[n])
    return [statistics.median(t) for t in times]

  def _calls(self, program, sets) -> int:
    """How many calls fill a round, told after one of each of `sets`.

    0 if one takes more than `slow`.
    """
    for arguments in sets:
      jax.block_until_ready(program(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(program(*sets[0]))
    once = time.perf_counter() - start
    if once > self.slow:
      return 0
    # Two under way at once tell more of a short call.
    start = time.perf_counter()
    jax.block_until_ready([program(*sets[0]) for _ in range(2)])
    once = (time.perf_counter() - start) / 2
    return min(1000, max(1, math.ceil(self.seconds / max(once, 1e-6))))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, and what compiling it told.

  Attributes:
    call: the function.
    first_seconds: tracing and compiling.
    peak_bytes: arguments, results and temporaries together; None if unknown.
    temp_bytes: the temporaries alone; None if unknown.
    kernels: custom calls, by name, with how often each stands in the program.

  Example:
    >>> program = build(lambda x: 2 * x, jnp.ones(3))
    >>> print(program(jnp.ones(3)), program.first_seconds > 0)
    [2. 2. 2.] True
  """

  call: Callable[..., Any]
  first_seconds: float
  peak_bytes: int | None
  temp_bytes: int | None
  kernels: dict[str, int]

  def __call__(self, *arguments):
    return self.call(*arguments)


def build(function: Callable[..., Any], *arguments: Any) -> Program:
  """Compiles `function` for these arguments.

  Example:
    >>> program = build(lambda x: x @ x, jnp.ones((64, 64)))
    >>> program.peak_bytes >= 2 * 64 * 64 * 4, program.kernels
    (True, {})
  """
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  peak = temp = None
  if memory is not None:
    temp = int(memory.temp_size_in_bytes)
    peak = (
      temp
      + int(memory.argument_size_in_bytes)
      + int(memory.output_size_in_bytes)
      - int(memory.alias_size_in_bytes)
    )
  return Program(
    compiled, seconds, peak, temp, kernels(compiled.as_text() or "")
  )


def kernels(hlo: str) -> dict[str, int]:
  """The custom calls of a compiled program's text, and how many of each.

  A Pallas kernel is named after its place in the trace, the others after
  what they call.

  Example:
    >>> kernels('a = f32[] custom-call(b), custom_call_target="x$y"')
    {'x$y': 1}
  """
  found = Counter()
  for line in hlo.splitlines():
    target = re.search(r'custom_call_target="([^"]+)"', line)
    if target:
      place = re.search(r'op_name="([^"]+)"', line)
      pallas = "mosaic" in target[1] or "triton" in target[1]
      inner = place[1].split("/")[-2:] if place and pallas else []
      found["/".join([target[1], *inner])] += 1
  return dict(found)


def inputs(
  batch: int, length: int, heads: int, width: int, dtype: Any, *, count: int
) -> list[tuple[jax.Array, ...]]:
  """Sets of `count` normal arrays [b t n d]; more sets where they are small.

  Example:
    >>> sets = inputs(1, 16, 2, 8, jnp.bfloat16, count=3)
    >>> len(sets), len(sets[0]), sets[0][0].shape
    (4, 3, (1, 16, 2, 8))
  """
  shape = (batch, length, heads, width)
  size = count * math.prod(shape) * jnp.dtype(dtype).itemsize
  number = min(4, max(1, math.ceil(_CACHE / size)))
  draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
  return [
    tuple(draw(key) for key in jax.random.split(jax.random.key(i), count))
    for i in range(number)
  ]


def copy_rate(clock: Clock) -> float:
  """Bytes a second of reading and writing a large array, both counted.

  Example:
    >>> copy_rate(Clock(rounds=1, seconds=1e-3)) > 1e8
    True
  """
  accelerator = jax.local_devices()[0].platform != "cpu"
  x = jnp.ones((1 << 29 if accelerator else 1 << 22,), jnp.bfloat16)
  program = build(lambda x: x + 1, x)
  return 2 * x.nbytes / clock.seconds_of(program, [(x,)])
