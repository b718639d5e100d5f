"""Attention over chosen blocks, choice and all, beside dense attention."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from isthmus import attention as attend
from isthmus.attention.bench.case import Case
from isthmus.attention.bench.clock import Clock, Program, build
from isthmus.attention.bench.drawn import structured
from isthmus.attention.bench.peers import JAX_PEERS
from isthmus.attention.bench.rows import Refusal
from isthmus.attention.bench.ways import WAYS, Way, kept_mass, kept_share, way

#: (q, k, v) of one row at a length.
Source = Callable[[int], tuple[Any, Any, Any]]
#: What the speed over cuDNN has to be at the shape below, by length; and the
#: share of the time that a choice may take.
WANTED, MOST = {131072: 3.0, 262144: 6.0}, 0.15
_SHAPE = (32, 8, 128)


@dataclasses.dataclass(frozen=True)
class Chosen:
  """One way to choose, measured on one set of arrays.

  Attributes:
    source: where queries and keys come from.
    way: of `WAYS`.
    level: that was asked for, see `isthmus.attention.bench.ways.way`.
    length, heads, kv_heads, width: of the arrays; one row.
    fwd: milliseconds of a forward pass, the choice among it.
    choice: those of the choice by itself; a pass may share work with it.
    kept: blocks read, over those of causal attention.
    mass: of the dense softmax that is kept, the mean over heads and some
      queries.
    head_mass: that of the head with the least.
    dense: milliseconds of causal attention on the same arrays, by name.
    peak_bytes: arguments, results and temporaries; None if unknown.
    digest: SHA-256 of the queries' and keys' bytes.

  Example:
    >>> shape = dict(length=131072, heads=32, kv_heads=8, width=128)
    >>> row = Chosen("drawn", "mass", 0.9, fwd=60.0, choice=6.0, kept=0.05,
    ...              mass=0.95, head_mass=0.9, dense={"cudnn": 240.0}, **shape)
    >>> row.share, row.speeds, row.wanted
    (0.1, {'cudnn': 4.0}, 3.0)
  """

  source: str
  way: str
  level: float
  length: int
  heads: int
  kv_heads: int
  width: int
  fwd: float
  choice: float
  kept: float
  mass: float
  head_mass: float
  dense: dict[str, float] = dataclasses.field(default_factory=dict)
  peak_bytes: int | None = None
  digest: str = ""

  @property
  def share(self) -> float:
    """The choice's time over the pass's."""
    return self.choice / self.fwd

  @property
  def speeds(self) -> dict[str, float]:
    """How fast it is over each dense attention."""
    return {who: ms / self.fwd for who, ms in self.dense.items()}

  @property
  def wanted(self) -> float | None:
    """The speed over cuDNN that is promised of its shape; None if none is."""
    shape = (self.heads, self.kv_heads, self.width)
    return WANTED.get(self.length) if shape == _SHAPE else None

  def line(self) -> str:
    """For a reader."""
    speeds = [f"{x:.3g}x {who}" for who, x in self.speeds.items()]
    if self.wanted is not None and "cudnn" in self.dense:
      speeds.append(f"{self.wanted:g}x cudnn is promised")
    over = f" (above {MOST:.0%})" if self.share > MOST else ""
    return ", ".join(
      [
        f"{self.way}={self.level:g}, {self.source}, S{self.length}"
        f" H{self.heads}/{self.kv_heads} D{self.width}: {self.fwd:.3f} ms",
        f"choice {self.share:.1%}{over}",
        f"{self.kept:.3f} of the blocks",
        f"mass {self.mass:.3f}",
        *speeds,
      ]
    )

  def as_dict(self) -> dict[str, Any]:
    """For JSON, with what follows from the rest."""
    more = {"share": self.share, "speed_over": self.speeds}
    return dataclasses.asdict(self) | more | {"wanted": self.wanted}


def parse(text: str, *, mass: float, share: float) -> tuple[str, float]:
  """(way, level) of "pbs" or "pbs=0.95".

  Args:
    text: the way, with its level or without.
    mass: level of ways that keep a share of the mass.
    share: level of those that keep a share of the context.

  Raises:
    ValueError: no such way, or no number.

  Example:
    >>> parse("pbs", mass=0.9, share=0.1), parse("window=0.2", mass=1, share=1)
    (('pbs', 0.9), ('window', 0.2))
  """
  name, equals, level = text.partition("=")
  if name not in WAYS:
    raise ValueError(f"way {name!r} is none of {', '.join(WAYS)}")
  default = share if WAYS[name] == "context" else mass
  try:
    found = float(level) if equals else default
  except ValueError as error:
    raise ValueError(f"the level of {name} is {level!r}, no number") from error
  way(name, found, block=1, length=1)  # refuses what is out of range
  return name, found


def drawn(
  heads: int, kv_heads: int, width: int, *, seed: int = 0, dtype: Any = None
) -> Source:
  """The source of `structured` arrays.

  Example:
    >>> drawn(4, 2, 16)(64)[0].shape
    (1, 64, 4, 16)
  """
  dtype = jnp.bfloat16 if dtype is None else dtype
  sizes = {"heads": heads, "kv_heads": kv_heads, "width": width}
  return lambda length: structured(seed, length, **sizes, dtype=dtype)


def measure(
  sources: Mapping[str, Source],
  wanted: Sequence[tuple[str, float]],
  lengths: Iterable[int],
  clock: Clock,
  *,
  block: int = 128,
  queries: int = 64,
  peers: Sequence[str] = ("cudnn",),
  seconds: float | None = None,
) -> Iterator[Chosen | Refusal]:
  """Times every way on every source, at every length.

  A program is compiled once for all sources of a shape. Dense attention is
  ours and that of `peers`; a way's arrays are the dense one's.

  Args:
    sources: of queries, keys and values, by name.
    wanted: (way, level), see `parse`.
    lengths: in the order in which they are measured.
    clock: how long.
    block: tokens of a block.
    queries: whose mass is counted, at random places; all of fewer.
    peers: names of `JAX_PEERS`, which are timed on the same arrays.
    seconds: after which nothing new is begun: the rest is refused.

  Example:
    >>> found = measure({"drawn": drawn(2, 1, 16)}, [("mass", 0.9)], [64],
    ...                 Clock(1, 1e-4), block=8, peers=["xla"])
    >>> row, = found
    >>> row.way, list(row.dense), 0 < row.kept < 1 < 2 * row.mass
    ('mass', ['isthmus', 'xla'], True)
  """
  end = None if seconds is None else time.monotonic() + seconds
  named = {peer.name: peer for peer in JAX_PEERS if peer.name in peers}
  absent = {name: peer.absent() for name, peer in named.items()}
  yield from (Refusal(name, why) for name, why in absent.items() if why)
  named = {name: peer for name, peer in named.items() if not absent[name]}
  for length in lengths:
    programs, bases = _Programs(), {}
    ways = [(x, way(*x, block=block, length=length)) for x in wanted]
    for name, make in sources.items():
      run = functools.partial(_base, name, make, length, programs, named, clock)
      for found in _tried(f"dense {name} {length}", run, end):
        if isinstance(found, Refusal):
          yield found
        else:
          bases[found.source] = found
    for (name, level), chosen in ways:
      for source, base in bases.items():
        run = functools.partial(
          _row, name, level, chosen, base, programs, queries, clock
        )
        yield from _tried(f"{name}={level:g} {source} {length}", run, end)


def _tried(task: str, run: Callable[[], Any], end: float | None):
  """What `run` gives, or why it doesn't."""
  if end is not None and time.monotonic() > end:
    yield Refusal(task, "there was no time left")
    return
  try:
    yield from run()
  except Exception as error:
    yield Refusal.of(task, error, ours=True)


class _Programs:
  """Compiled functions, by name and by the shapes of what they take."""

  def __init__(self):
    self.made: dict[Any, Program] = {}

  def __call__(self, name: Any, function, arrays) -> Program:
    key = name, *((x.shape, x.dtype) for x in arrays)
    if key not in self.made:
      self.made[key] = build(function, *arrays)
    return self.made[key]


@dataclasses.dataclass(frozen=True)
class _Base:
  """Arrays, and what dense attention takes on them."""

  source: str
  arrays: tuple[Any, ...]
  dense: dict[str, float]
  digest: str


def _base(source, make, length, programs, named, clock):
  arrays = jax.block_until_ready(make(length))
  (_, t, heads, width), dense = arrays[0].shape, {}
  case, ours = Case("causal", 1, t, heads, width), "isthmus"
  for who in (ours, *named):
    try:
      function = functools.partial(attend.attention, causal=True)
      if who != ours:
        function, _ = named[who].make(case)
      program = programs(who, function, arrays)
      dense[who] = clock.seconds_of(program, [arrays]) * 1e3
    except Exception as error:
      yield Refusal.of(f"{who} {source} {length}", error, ours=who == ours)
  yield _Base(source, arrays, dense, digest(*arrays[:2]))


def _row(name, level, chosen: Way, base: _Base, programs, queries, clock):
  (_, t, heads, width), kv_heads = base.arrays[0].shape, base.arrays[1].shape[2]
  pair = base.arrays[:2]
  places = np.random.default_rng(20).choice(t, min(queries, t), replace=False)
  places = jnp.asarray(np.sort(places), jnp.int32)

  def gauge(q, k, places):
    mask = chosen.select(q, k)
    order = None if chosen.order is None else chosen.order(q, k)
    mass = kept_mass(q, k, mask, order, queries=places)
    return kept_share(mask), jnp.mean(mass, axis=(0, 2))

  which = name, level
  kept, mass = programs((*which, "gauge"), gauge, (*pair, places))(
    *pair, places
  )
  whole = programs((*which, "fwd"), chosen.attend, base.arrays)
  choice = programs((*which, "choice"), chosen.select, pair)
  yield Chosen(
    base.source,
    name,
    level,
    t,
    heads,
    kv_heads,
    width,
    fwd=clock.seconds_of(whole, [base.arrays]) * 1e3,
    choice=clock.seconds_of(choice, [pair]) * 1e3,
    kept=float(kept),
    mass=float(jnp.mean(mass)),
    head_mass=float(jnp.min(mass)),
    dense=base.dense,
    peak_bytes=whole.peak_bytes,
    digest=base.digest,
  )


def digest(*arrays: Shaped[Array, "..."]) -> str:
  """SHA-256 of arrays' bytes, one after the other, in hexadecimal digits.

  Example:
    >>> digest(jnp.zeros(2, jnp.int8))[:8]
    '96a296d2'
  """
  found = hashlib.sha256()
  for array in arrays:
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return found.hexdigest()
