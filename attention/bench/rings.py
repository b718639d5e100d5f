"""Ring attention on the devices of this machine, beside one of them.

`python -m isthmus.attention.bench.rings --out rings` times every schedule on
all devices, the same sequence on one device, and what is sent alone. Its
rings.json goes onto the plot of the recipe `token_ring`, by
`--set measured=rings/rings.json`.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.attention import attention
from isthmus.attention.bench.case import Case
from isthmus.attention.bench.clock import Clock, build
from isthmus.attention.ring import ring_attention
from isthmus.attention.schedule import (
  SCHEDULES,
  Message,
  choose_schedule,
  directions,
  messages,
)

PASSES = ("fwd", "fwd+bwd")


@dataclasses.dataclass(frozen=True)
class Ring:
  """One measurement.

  Attributes:
    case: the whole sequence, causal, of one row.
    group: query heads of a key head.
    devices: that divide it; 1 for plain attention.
    schedule: "" on one device.
    chosen: whether it is what `choose_schedule` takes.
    which: "fwd" or "fwd+bwd".
    ms: milliseconds of the call.
    sent_ms: of its collectives alone, one step after another; None on one
      device.
    sent_bytes: that leave a device, ahead and behind.
    steps: after one another, in which something is sent.
    peak_bytes: of a device; None if unknown.

  Example:
    >>> case = Case("causal", 1, 1024, 8, 64)
    >>> ring = Ring(case, 1, 2, "kv_ring", True, "fwd", 0.5, 0.1, (8, 0), 1)
    >>> f"{ring.over(0.9):.2f}"
    '1.80'
  """

  case: Case
  group: int
  devices: int
  schedule: str
  chosen: bool
  which: str
  ms: float
  sent_ms: float | None = None
  sent_bytes: tuple[int, int] = (0, 0)
  steps: int = 0
  peak_bytes: int | None = None

  def over(self, alone: float) -> float:
    """Throughput over that of one device, which takes `alone` ms."""
    return alone / self.ms

  def as_dict(self) -> dict[str, Any]:
    """For JSON."""
    flops = self.case.flops(self.which)
    return dataclasses.asdict(self) | {
      "tflops_per_device": flops / self.ms / 1e9 / self.devices
    }


def arrays(
  case: Case, kv_heads: int, mesh: Mesh, dtype: Any
) -> tuple[jax.Array, ...]:
  """(q, k, v, do) of normal numbers, divided over the mesh by tokens.

  Example:
    >>> mesh = Mesh(np.asarray(jax.devices()), "seq")
    >>> case = Case("causal", 1, 8 * mesh.size, 4, 16)
    >>> q, k, v, do = arrays(case, 2, mesh, jnp.float32)
    >>> q.shape[2:], k.shape[2:]
    ((4, 16), (2, 16))
  """
  sharding = NamedSharding(mesh, P(None, "seq"))

  @functools.partial(jax.jit, static_argnums=1, out_shardings=sharding)
  def draw(key, heads):
    shape = (case.batch, case.length, heads, case.width)
    return jax.random.normal(key, shape, dtype)

  heads = (case.heads, kv_heads, kv_heads, case.heads)
  keys = jax.random.split(jax.random.key(0), 4)
  return tuple(draw(key, n) for key, n in zip(keys, heads, strict=True))


def function(which: str, attend: Callable[..., Any]) -> Callable[..., Any]:
  """A pass of (q, k, v, do).

  Example:
    >>> both = function("fwd+bwd", lambda q, k, v: q + k + v)
    >>> [x.tolist() for x in both(1.0, 2.0, 3.0, jnp.ones(()))][0]
    6.0
  """

  def run(q, k, v, do):
    if which == "fwd":
      return (attend(q, k, v),)
    o, back = jax.vjp(attend, q, k, v)
    return o, *back(do)

  return run


def sends(
  sent: Sequence[Message], mesh: Mesh, dtype: Any
) -> tuple[Callable[..., Any], jax.Array]:
  """What is sent and nothing else: a function, and its argument.

  Messages of one step don't wait for each other; a step waits for the one
  before.

  Example:
    >>> mesh = Mesh(np.asarray(jax.devices()), "seq")
    >>> sent = (Message(1, "permute", "k", 1, 64),)
    >>> run, x = sends(sent, mesh, jnp.float32)
    >>> jax.jit(run)(x).shape == (16 * mesh.size,)
    True
  """
  size, width = mesh.size, jnp.dtype(dtype).itemsize
  others = max(1, size - 1)

  def own(m):  # numbers of the array that a device puts in
    if m.collective == "permute":
      return m.bytes // width
    return (
      m.bytes // width // others * (1 if m.collective == "gather" else size)
    )

  most = max(map(own, sent), default=size)
  most += -most % size

  def one(x, m):
    part = x[: own(m)]
    if m.collective == "permute":
      way = m.way or 1
      pairs = [(r, (r + way) % size) for r in range(size)]
      part = jax.lax.ppermute(part, "seq", pairs)
    elif m.collective == "gather":
      part = jax.lax.all_gather(part, "seq", tiled=True)
    elif m.collective == "exchange":
      part = jax.lax.all_to_all(part, "seq", 0, 0, tiled=True)
    else:
      part = jax.lax.psum_scatter(part, "seq", tiled=True)
    return part

  def run(x):
    for step in sorted({m.step for m in sent}):
      got = [one(x, m) for m in sent if m.step == step]
      # The next step's arrays are this one's, all of which have come.
      x, *_ = jax.lax.optimization_barrier((x, *got))
      for part in got:
        n = min(part.size, x.size)
        x = jax.lax.dynamic_update_slice(x, part[:n], (0,))
    return x

  run = jax.shard_map(run, mesh=mesh, in_specs=P("seq"), out_specs=P("seq"))
  draw = jax.jit(
    lambda key: jax.random.normal(key, (most * size,), dtype),
    out_shardings=NamedSharding(mesh, P("seq")),
  )
  return run, draw(jax.random.key(1))


def measure(
  length: int,
  heads: int,
  kv_heads: int,
  width: int,
  *,
  clock: Clock,
  devices: int,
  schedules: Iterable[str] = SCHEDULES,
  passes: Iterable[str] = PASSES,
  impl: str | None = None,
  dtype: Any = jnp.bfloat16,
) -> Iterator[Ring | str]:
  """One device, then every schedule on `devices`, in zigzag.

  Args:
    length: tokens of the sequence.
    heads, kv_heads, width: of q, and of k and v.
    clock: how long.
    devices: of this machine, the first so many.
    schedules: which.
    passes: of `PASSES`.
    impl: of the kernels; by default the best.
    dtype: of the arrays.

  Yields:
    Measurements, and lines that say what couldn't be measured.

  Example:
    >>> small = {"clock": Clock(1, 1e-4), "devices": 1, "passes": ["fwd"]}
    >>> found = list(measure(16, 2, 1, 8, dtype=jnp.float32, **small))
    >>> [(x.devices, x.which) for x in found]
    [(1, 'fwd')]
  """
  case = Case("causal", 1, length, heads, width)
  group = heads // kv_heads
  here = jax.devices()[:devices]
  for which in passes:
    alone = Mesh(np.asarray(here[:1]), "seq")
    plain = functools.partial(attention, causal=True, impl=impl)
    made = _timed(function(which, plain), case, kv_heads, alone, dtype, clock)
    if isinstance(made, str):
      yield f"one device, {length} tokens, {which}: {made}"
    else:
      yield Ring(case, group, 1, "", True, which, made[0], peak_bytes=made[1])
    if devices == 1:
      continue
    mesh = Mesh(np.asarray(here), "seq")
    sizes: dict[str, Any] = {
      "q_heads": heads,
      "kv_heads": kv_heads,
      "q_length": length // devices,
      "width": width,
      "dtype": dtype,
      "causal": True,
    }
    best = choose_schedule(devices, **sizes, gradients=which != "fwd").schedule
    for schedule in schedules:
      attend = functools.partial(
        ring_attention, schedule=schedule, causal=True, impl=impl
      )
      spec = P(None, "seq")
      run = jax.shard_map(
        function(which, attend),
        mesh=mesh,
        in_specs=(spec,) * 4,
        out_specs=(spec,) * (1 if which == "fwd" else 4),
        check_vma=False,
      )
      made = _timed(run, case, kv_heads, mesh, dtype, clock)
      if isinstance(made, str):
        yield f"{schedule} on {devices}, {length} tokens, {which}: {made}"
        continue
      sent = messages(schedule, devices, **sizes)
      after = max((m.step for m in sent), default=0)
      if which != "fwd":
        back = messages(schedule, devices, **sizes, backward=True)
        sent += tuple(m._replace(step=m.step + after) for m in back)
      call, x = sends(sent, mesh, dtype)
      took = clock.seconds_of(build(call, x), [(x,)])
      yield Ring(
        case,
        group,
        devices,
        schedule,
        schedule == best,
        which,
        made[0],
        took * 1e3,
        directions(sent),
        len({m.step for m in sent}),
        made[1],
      )


def _timed(run, case, kv_heads, mesh, dtype, clock):
  """(ms, peak bytes), or why there are none."""
  try:
    given = arrays(case, kv_heads, mesh, dtype)
    program = build(run, *given)
    return clock.seconds_of(program, [given]) * 1e3, program.peak_bytes
  except (NotImplementedError, ValueError) as error:
    return " ".join(str(error).split())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return "out of memory"


def table(rings: Sequence[Ring]) -> str:
  """What was measured, in Markdown; the chosen schedule is bold.

  Example:
    >>> case = Case("causal", 1, 1024, 8, 64)
    >>> one = Ring(case, 1, 1, "", True, "fwd", 1.0)
    >>> two = Ring(case, 1, 2, "kv_ring", True, "fwd", 0.5, 0.1, (8, 0), 1)
    >>> print(table([one, two]).splitlines()[-1])
    | 1024 | 8/8 | fwd | 2 | **kv_ring** | 0.500 | 2.00 | 0.100 | 1 | ...
  """
  lines = [
    "| tokens | heads | pass | devices | schedule | ms | over one | sending"
    " alone, ms | steps | GB ahead / behind | TF/s a device |",
    "|" + "---|" * 11,
  ]
  alone = {_what(r): r.ms for r in rings if r.devices == 1}
  for r in rings:
    name = r.schedule or "attention"
    over = f"{r.over(alone[_what(r)]):.2f}" if _what(r) in alone else "unknown"
    ahead, behind = (x / 1e9 for x in r.sent_bytes)
    cells = [
      str(r.case.length),
      f"{r.case.heads}/{r.case.heads // r.group}",
      r.which,
      str(r.devices),
      f"**{name}**" if r.chosen and r.devices > 1 else name,
      f"{r.ms:.3f}",
      over,
      "" if r.sent_ms is None else f"{r.sent_ms:.3f}",
      str(r.steps),
      f"{ahead:.2f} / {behind:.2f}",
      f"{r.as_dict()['tflops_per_device']:.4g}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _what(r: Ring) -> tuple[Any, ...]:
  return r.case, r.group, r.which


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Example:
    >>> main("--lengths 32 --heads 2/1 --dim 8 --passes fwd --devices 1"
    ...      " --dtype float32 --quick".split())  # on a CPU
    1 x cpu, jax ...
    | tokens | heads | ...
    ...
    0
  """
  parser = argparse.ArgumentParser(
    "python -m isthmus.attention.bench.rings",
    description="Times ring attention, causal and in zigzag, beside one device"
    " and beside what is sent alone.",
  )
  add = parser.add_argument
  numbers = lambda text: [int(x) for x in text.split(",")]
  add("--lengths", type=numbers, default=[32768, 65536, 131072, 262144])
  add("--heads", type=str, default="16/16,32/8", help="query/kv, ...")
  add("--dim", type=int, default=128, help="width of a head")
  add("--devices", type=int, help="default: all")
  add("--schedules", type=str, default=",".join(SCHEDULES))
  add("--passes", type=str, default=",".join(PASSES))
  add("--impl", help="implementation of the kernels; default: the best")
  add("--dtype", default="bfloat16")
  add("--quick", action="store_true", help="short rounds: rough figures")
  add("--out", type=pathlib.Path, help="folder for rings.json and rings.md")
  options = parser.parse_args(argv)
  try:
    heads = [tuple(map(int, x.split("/"))) for x in options.heads.split(",")]
    for q, kv in heads:
      if kv < 1 or q % kv:
        raise ValueError(f"{q} query heads and {kv} kv heads don't fit")
  except ValueError as error:
    parser.error(f"--heads {options.heads}: {error}")
  for name, known in (("schedules", SCHEDULES), ("passes", PASSES)):
    wrong = set(getattr(options, name).split(",")) - set(known)
    if wrong:
      parser.error(f"--{name}: {min(wrong)!r}; there are {', '.join(known)}")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  count = options.devices or len(jax.devices())
  if not 1 <= count <= len(jax.devices()):
    parser.error(f"--devices {count}: this machine has {len(jax.devices())}")
  kind = jax.devices()[0].device_kind
  where = f"{count} x {kind}, jax {jax.__version__}"
  print(where, flush=True)
  rings: list[Ring] = []
  refused: list[str] = []
  clock = Clock(rounds=3, seconds=0.05) if options.quick else Clock()
  if jax.devices()[0].platform == "cpu":
    # Host devices that share threads wait for each other for ever if several
    # calls are under way.
    clock = Clock(slow=0.0)
  for q, kv in heads:
    for length in options.lengths:
      for found in measure(
        length,
        q,
        kv,
        options.dim,
        clock=clock,
        devices=count,
        schedules=options.schedules.split(","),
        passes=options.passes.split(","),
        impl=options.impl,
        dtype=jnp.dtype(options.dtype),
      ):
        if isinstance(found, str):
          refused.append(found)
          print(found, flush=True)
        else:
          rings.append(found)
        _write(options.out, where, rings, refused)
  print(table(rings))
  return 0 if rings else 1


def _write(out, where, rings, refused):
  """After every row, so that a run that is cut short leaves what it has."""
  if out is None:
    return
  out.mkdir(parents=True, exist_ok=True)
  report = {
    "where": where,
    "rows": [r.as_dict() for r in rings],
    "refused": refused,
  }
  (out / "rings.json").write_text(json.dumps(report, indent=1) + "\n")
  text = f"{where}\n\n{table(rings)}\n" + "".join(f"\n{x}\n" for x in refused)
  (out / "rings.md").write_text(text)


if __name__ == "__main__":
  raise SystemExit(main())
