"""Decoding: one query a row against a cache, as a share of copying's rate."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from isthmus.attention import KVCache, decode
from isthmus.attention.bench.clock import Clock, build, inputs


@dataclasses.dataclass(frozen=True)
class Step:
  """A decode step.

  Attributes:
    batch: rows, each with one query.
    length: keys in the cache, all of them in use.
    heads: query heads.
    kv_heads: key heads.
    width: of a head.

  Example:
    >>> Step(batch=8, length=32768, heads=32, kv_heads=8, width=128).bytes
    1073741824
  """

  batch: int
  length: int
  heads: int
  kv_heads: int
  width: int

  @property
  def bytes(self) -> int:
    """Keys and values, 2 bytes each: what a step can't but read."""
    return 4 * self.batch * self.length * self.kv_heads * self.width


@dataclasses.dataclass(frozen=True)
class Decode:
  """A measured step.

  Attributes:
    step: what was measured.
    ms: milliseconds of a step.
    first_seconds: tracing and compiling.

  Example:
    >>> step = Step(batch=8, length=32768, heads=32, kv_heads=8, width=128)
    >>> print(Decode(step, ms=0.5, first_seconds=1.0).line(rate=3e12))
    decode, B8 S32768 H32/8 D128: 0.500 ms, 2.15 TB/s, 72% of copying's rate
  """

  step: Step
  ms: float
  first_seconds: float

  @property
  def rate(self) -> float:
    """Bytes of the cache a second."""
    return self.step.bytes / self.ms * 1e3

  def line(self, rate: float) -> str:
    """For a reader; `rate` is what copying reaches, in bytes a second."""
    s = self.step
    shape = f"B{s.batch} S{s.length} H{s.heads}/{s.kv_heads} D{s.width}"
    return (
      f"decode, {shape}: {self.ms:.3f} ms, {self.rate / 1e12:.3g} TB/s, "
      f"{self.rate / rate:.0%} of copying's rate"
    )

  def as_dict(self) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(self) | {"bytes_per_second": self.rate}


def measure(step: Step, clock: Clock, dtype: Any = jnp.bfloat16) -> Decode:
  """Times a step against a full cache.

  Example:
    >>> step = Step(batch=1, length=64, heads=2, kv_heads=1, width=16)
    >>> measure(step, Clock(rounds=1, seconds=1e-4)).ms > 0
    True
  """
  b, n = step.batch, step.heads
  ((q,),) = inputs(b, 1, n, step.width, dtype, count=1)[:1]
  places = jnp.broadcast_to(jnp.arange(step.length), (b, step.length))
  given = [
    (q, KVCache(k, v, places, jnp.int32(step.length)))
    for k, v in inputs(
      b, step.length, step.kv_heads, step.width, dtype, count=2
    )
  ]
  program = build(decode, *given[0])
  seconds = clock.seconds_of(program, given)
  return Decode(step, seconds * 1e3, program.first_seconds)
