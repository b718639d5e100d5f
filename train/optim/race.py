"""One step of an optimiser timed beside others', on parameters alone."""

import dataclasses
import importlib
import math
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from isthmus.attention.bench.clock import Clock, copy_rate
from isthmus.pallas.dispatch import platform, prefer
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.fuse import advance
from isthmus.train.optim.quant8 import adamw8bit

RATE = 1e-4
DECAY = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
  """Times a step of optax.adamw, of `adamw8bit`, and of torchao's AdamW8bit.

  Steps are jitted and their parameters and states donated; each goes on from
  the last. All optimisers take turns, in another order every round. On a GPU
  `adamw8bit` is also timed without its kernel; torchao where torch finds a
  GPU, and both can be imported.

  Attributes:
    models: name -> a decoder, of which only the parameters are made.
    dtype: of parameters and gradients.
    codes: of the states in eight bits; by default those of every parameter
      that is large enough, tables too.
    rounds: of which the median is taken.
    calls: steps of each in a round.

  Raises:
    ValueError: no model, or a count below 1.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=64, width=64, depth=1, num_heads=2)
    >>> Race(models={"tiny": model}).least("tiny", "optax.adamw")
    1611008
  """

  models: Mapping[str, nn.Module]
  dtype: Any = jnp.float32
  codes: Codes = Codes(whole=None)
  rounds: int = 7
  calls: int = 10

  def __post_init__(self):
    if not self.models or self.rounds < 1 or self.calls < 1:
      raise ValueError(
        f"{len(self.models)} models, {self.rounds} rounds, {self.calls} calls:"
        " each is at least 1"
      )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes race.json, race.md and race.png into `workdir`.

    Returns:
      `MODEL/OPTIMISER/ms`, and `MODEL/ratio/ms` of `adamw8bit` to optax.
    """
    path = pathlib.Path(workdir).absolute()
    rows: list[dict[str, Any]] = []
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      copied = copy_rate(Clock(rounds=3, seconds=0.01)) / 1e9
      for name in self.models:
        rows += self._ours(name)
        rows.append(self._torchao(name))
        _compare(rows, name)
        log.write_json(
          path / "race.json",
          {"device": _where(), "copy_gbps": copied, "rows": rows},
        )
      text = _table(rows, copied)
      print(text)
      (path / "race.md").write_text(text + "\n")
      _plot(rows, path / "race.png")
    results = {}
    for row in rows:
      if row["ms"] is not None:
        results[f"{row['model']}/{row['optimiser']}/ms"] = row["ms"]
        if row["optimiser"] == "adamw8bit":
          results[f"{row['model']}/ratio/ms"] = row["ratio"]
    return results

  def shapes(self, name: str) -> Any:
    """The parameters of a model, as ShapeDtypeStructs."""
    found = jax.eval_shape(
      self.models[name].init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype), found["params"]
    )

  def least(self, name: str, optimiser: str) -> int:
    """Bytes that a step must move: gradients read, the rest also written."""
    shapes = self.shapes(name)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    state = 2 * count * 4
    if optimiser != "optax.adamw":
      state = self.codes.state_bytes(shapes)
    elif self.dtype != jnp.float32:
      state = 2 * count * jnp.dtype(self.dtype).itemsize
    return 3 * count * jnp.dtype(self.dtype).itemsize + 2 * state

  def _row(self, name, optimiser, seconds=None, peak=None, note="") -> dict:
    least = self.least(name, optimiser)
    return {
      "model": name,
      "optimiser": optimiser,
      "ms": None if seconds is None else seconds * 1e3,
      "bytes": least,
      "gbps": None if seconds is None else least / seconds / 1e9,
      "ratio": None,
      "peak_gib": None if peak is None else peak / 2**30,
      "note": note,
    }

  def _ours(self, name) -> list[dict[str, Any]]:
    shapes = self.shapes(name)
    key = jax.random.key(0)
    params = jax.jit(lambda key: _draw(key, shapes, 0.02))
    gradients = jax.jit(lambda key: _draw(key, shapes, 1e-3))(key)
    whole = adamw8bit(RATE, weight_decay=DECAY, codes=self.codes)
    plain = optax.adamw(RATE, weight_decay=DECAY)
    kinds: list[tuple[str, Any, tuple[str, ...]]] = [
      ("optax.adamw", plain, ()),
      ("adamw8bit", whole, ()),
    ]
    if platform() == "gpu":
      kinds.append(("adamw8bit, xla", whole, ("xla",)))
    names, runs, held, peaks = [], [], [], []
    for kind, tx, preferred in kinds:
      both = params(key)
      both = both, jax.jit(tx.init)(both)
      run, peak = _compiled(tx, both, gradients, preferred)
      names.append(kind)
      runs.append(run)
      held.append(both)
      peaks.append(peak)

    def call(n):
      def many():
        for _ in range(self.calls):
          held[n] = runs[n](held[n], gradients)
        jax.block_until_ready(held[n])

      return many

    times = self._in_turns([call(n) for n in range(len(runs))])
    return [
      self._row(name, *row) for row in zip(names, times, peaks, strict=True)
    ]

  def _in_turns(self, calls: list[Callable[[], None]]) -> list[float]:
    """Seconds of a step of each; what is compiled or warmed up isn't timed."""
    for call in calls:
      call()
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(self.rounds):
      order = list(range(len(calls)))
      random.Random(round_).shuffle(order)
      for n in order:
        began = time.perf_counter()
        calls[n]()
        times[n].append((time.perf_counter() - began) / self.calls)
    return [statistics.median(t) for t in times]

  def _torchao(self, name) -> dict[str, Any]:
    """A row of the peer, or why there is none."""
    kind = "torchao.AdamW8bit"
    try:
      torch: Any = importlib.import_module("torch")
      peer: Any = importlib.import_module("torchao.optim")
    except ImportError as error:
      return self._row(name, kind, note=f"not installed: {error.name}")
    if not torch.cuda.is_available():
      return self._row(name, kind, note="torch finds no GPU")
    dtype = getattr(torch, jnp.dtype(self.dtype).name)
    torch.cuda.reset_peak_memory_stats()
    params = []
    for x in jax.tree.leaves(self.shapes(name)):
      p = torch.randn(x.shape, dtype=dtype, device="cuda").mul_(0.02)
      params.append(torch.nn.Parameter(p))
      params[-1].grad = torch.randn_like(p).mul_(1e-3)
    optimizer = peer.AdamW8bit(params, lr=RATE, weight_decay=DECAY)

    def many():
      for _ in range(self.calls):
        optimizer.step()
      torch.cuda.synchronize()

    (seconds,) = self._in_turns([many])
    peak = torch.cuda.max_memory_allocated()
    del params, optimizer
    torch.cuda.empty_cache()
    return self._row(name, kind, seconds, peak)


def _draw(key, shapes, size):
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten(
    size * jax.random.normal(k, x.shape, x.dtype)
    for k, x in zip(keys, leaves, strict=True)
  )


def _compiled(tx, both, gradients, preferred):
  """The step, and the most bytes that it holds at once; None if unknown."""

  def step(both, gradients):
    return advance(tx, both[0], gradients, both[1])

  lower = jax.jit(step, donate_argnums=0).lower
  if preferred:
    with prefer(*preferred):
      run = lower(both, gradients).compile()
  else:
    run = lower(both, gradients).compile()
  found = run.memory_analysis()
  if found is None:
    return run, None
  return run, (
    found.temp_size_in_bytes
    + found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )


def _compare(rows, name) -> None:
  """`ratio`: the time beside optax's."""
  mine = [row for row in rows if row["model"] == name]
  base = next(row["ms"] for row in mine if row["optimiser"] == "optax.adamw")
  for row in mine:
    row["ratio"] = None if row["ms"] is None else row["ms"] / base


def _table(rows, copied) -> str:
  lines = [
    f"{_where()}; a copy moves {copied:.0f} GB/s",
    "",
    "| parameters | optimiser | ms | GB/s of the least bytes | to optax |"
    " peak GiB |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    cells = [row["note"], "", "", ""]
    if row["ms"] is not None:
      peak = row["peak_gib"]
      cells = [
        f"{row['ms']:.3f}",
        f"{row['gbps']:.0f}",
        f"{row['ratio']:.3f}",
        "" if peak is None else f"{peak:.2f}",
      ]
    first = [row["model"], row["optimiser"]]
    lines.append("| " + " | ".join(first + cells) + " |")
  return "\n".join(lines)


def _plot(rows, path) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = [row for row in rows if row["ms"] is not None]
  figure = Figure(figsize=(7, 1 + 0.4 * len(shown)), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.barh(
    [f"{row['model']}, {row['optimiser']}" for row in shown],
    [row["ms"] for row in shown],
  )
  axes.invert_yaxis()
  axes.set_xlabel("ms a step")
  axes.set_title(_where())
  figure.savefig(path, dpi=120)


def _where() -> str:
  device = jax.local_devices()[0]
  return f"{device.device_kind} ({device.platform}), jax {jax.__version__}"
