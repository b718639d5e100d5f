"""Measures the contenders of a case, pass by pass."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from isthmus import attention as attend
from isthmus.attention.bench.case import BLOCK, Case
from isthmus.attention.bench.clock import (
  Clock,
  Program,
  build,
  copy_rate,
  inputs,
)
from isthmus.attention.bench.peers import Contender
from isthmus.attention.bench.rows import Refusal, Row


def measure(
  case: Case,
  contenders: Sequence[Contender],
  passes: Sequence[str],
  clock: Clock,
  dtype: Any = jnp.bfloat16,
) -> Iterator[Row | Refusal]:
  """Each pass of each contender on the same arrays.

  "bwd" compiles the pullback by itself, with what the forward pass kept as
  arguments; a row whose backward program holds a kernel of the forward one
  says so.

  Example:
    >>> from isthmus.attention.bench.peers import isthmus
    >>> case = Case("causal", 1, 32, 2, 8)
    >>> found = measure(case, [isthmus("xla")], ["fwd", "bwd"], Clock(1, 1e-4))
    >>> [(row.who, row.which) for row in found]
    [('isthmus xla', 'fwd'), ('isthmus xla', 'bwd')]
  """
  sets = inputs(case.batch, case.length, case.heads, case.width, dtype, count=4)
  for contender in contenders:
    name, ours = contender.name, contender.ours
    try:
      function, operands = contender.make(case)
    except Exception as error:
      yield Refusal.of(name, error, case, ours=ours)
      continue
    forward = {}
    for which in passes:
      try:
        program, given = _program(which, function, operands, sets)
        seconds = clock.seconds_of(program, given)
      except Exception as error:
        yield Refusal.of(name, error, case, which, ours=ours)
        continue
      if which == "fwd":
        forward = program.kernels
      yield Row(
        name,
        ours,
        case,
        which,
        ms=seconds * 1e3,
        peak_bytes=program.peak_bytes,
        temp_bytes=program.temp_bytes,
        first_seconds=program.first_seconds,
        kernels=program.kernels,
        note=_again(which, forward, program.kernels),
      )
      del program, given


def _program(which, function, operands, sets) -> tuple[Program, list[Any]]:
  """The compiled pass, and its arguments by set."""
  if which == "fwd":
    given = [(q, k, v, *operands) for q, k, v, _ in sets]
    return build(function, *given[0]), given

  def vjp(q, k, v, *operands):
    return jax.vjp(lambda *qkv: function(*qkv, *operands), q, k, v)

  if which == "fwd+bwd":
    given = [(do, q, k, v, *operands) for q, k, v, do in sets]

    def both(do, *rest):
      out, pullback = vjp(*rest)
      return out, pullback(do)

    return build(both, *given[0]), given
  kept = jax.jit(vjp)
  given = [(kept(q, k, v, *operands)[1], do) for q, k, v, do in sets]
  return build(lambda pullback, do: pullback(do), *given[0]), given


def _again(which, forward, kernels) -> str:
  shared = sorted(set(forward) & set(kernels)) if which == "bwd" else []
  return f"runs the forward's {', '.join(shared)} again" if shared else ""


@dataclasses.dataclass(frozen=True)
class Build:
  """What making a sparse case's mask costs, inside jit.

  Attributes:
    case: whose blocks it is made of.
    ms: of `BlockMask.from_blocks`, from a bool array on the device.
    dense_ms: of the causal forward pass at the same shape, or None if it
      wasn't measured.

  Example:
    >>> build = Build(Case("sparse8", 1, 512, 2, 64), ms=0.1, dense_ms=4.0)
    >>> build.share
    0.025
  """

  case: Case
  ms: float
  dense_ms: float | None = None

  @property
  def share(self) -> float | None:
    """The cost over a causal forward pass."""
    return None if self.dense_ms is None else self.ms / self.dense_ms


def mask_build(case: Case, clock: Clock, rows: Sequence[Row]) -> Build:
  """Times `BlockMask.from_blocks` on a case's blocks.

  The share is of the fastest of our causal forward passes in `rows`.

  Example:
    >>> found = mask_build(Case("sparse8", 1, 512, 2, 64), Clock(1, 1e-4), [])
    >>> found.ms > 0, found.share
    (True, None)
  """
  blocks = jnp.asarray(case.blocks)

  def make(blocks):
    return attend.BlockMask.from_blocks(blocks, block=(BLOCK, BLOCK))

  program = build(make, blocks)
  seconds = clock.seconds_of(program, [(blocks,)])
  causal = dataclasses.replace(case, mask="causal")
  dense = [
    row.ms
    for row in rows
    if row.ours and row.case == causal and row.which == "fwd"
  ]
  return Build(case, seconds * 1e3, min(dense, default=None))


def machine(clock: Clock) -> dict[str, Any]:
  """What the run runs on, and how fast that copies.

  Example:
    >>> machine(Clock(rounds=1, seconds=1e-3))["platform"]
    'cpu'
  """
  device = jax.local_devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.local_device_count(),
    "jax": jax.__version__,
    "backend": " ".join(device.client.platform_version.split()),
    "copy_bytes_per_second": copy_rate(clock),
    "compilation_cache": jax.config.jax_compilation_cache_dir,
  }
