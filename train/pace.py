"""The time of dense and sparse steps of Re-ttention, in turns."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention.bench.clock import Clock, build, inputs
from isthmus.attention.reshape import (
  band_width,
  dense_steps,
  reshaped,
  rettention,
)
from isthmus.attention.sdpa import attention
from isthmus.nets.dit import DiT
from isthmus.pallas.dispatch import platform
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.config import ConfigError

# The most tokens that a CPU is asked to time.
FEW = 2048


def kept(tokens: int, width: int) -> float:
  """The share of all keys in windows of `width` on either side.

  Example:
    >>> kept(4, 1)  # 2, 3, 3 and 2 of 4
    0.625
  """
  place = np.arange(tokens)
  seen = np.minimum(place, width) + np.minimum(place[::-1], width) + 1
  return float(seen.mean() / tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """Times dense and sparse steps of attention, and of layers around it.

  Attributes:
    sides: of a grid of tokens; the usual ones make CogVideoX-2B's 17,776.
    heads: n.
    head_dim: d.
    depth: layers of the DiT that is timed besides.
    keep: share of the keys in the window.
    steps, first, every: of the schedule whose mean is told.
    dtype: of all.
    clock: how long to measure.
    seed: of the net.

  Raises:
    ValueError: sizes below 1, or a share outside (0, 1].

  Example:
    >>> Pace().tokens, Pace(sides=(16, 16)).tokens
    (17776, 256)
  """

  sides: tuple[int, int] = (176, 101)
  heads: int = 30
  head_dim: int = 64
  depth: int = 2
  keep: float = 0.03125
  steps: int = 50
  first: int = 15
  every: int = 5
  dtype: Any = jnp.bfloat16
  clock: Clock = Clock()
  seed: int = 0

  def __post_init__(self):
    for name in ("heads", "head_dim", "depth", "steps", "every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    band_width(self.tokens, self.keep)

  @property
  def tokens(self) -> int:
    """Of the grid."""
    return self.sides[0] * self.sides[1]

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes pace.json, pace.md and pace.png into `workdir`.

    Returns:
      `attention/CASE/ms` and `layers/CASE/ms`, the cases being `plain`,
      attention that knows of no steps; `dense` and `sparse` steps; `mean`, of
      a schedule; of attention alone also `cudnn` (on a GPU) and `window`. And
      `.../CASE/saved`, the share of the dense time that a case saves: of
      cuDNN's, where it is there, else of plain.

    Raises:
      ConfigError: many tokens on a CPU.
    """
    if platform() == "cpu" and self.tokens > FEW:
      raise ConfigError(
        f"{self.tokens} tokens need a GPU; a CPU times at most {FEW}: set sides"
      )
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      tables = {"attention": self.attention(), "layers": self.layers()}
      figures = {}
      for group, seconds in tables.items():
        base = seconds.get("cudnn", seconds["plain"])
        for case, each in seconds.items():
          figures[f"{group}/{case}/ms"] = 1e3 * each
          figures[f"{group}/{case}/saved"] = 1 - each / base
      log.write_json(path / "pace.json", figures)
      text = "\n".join(self.table(figures))
      print(text)
      (path / "pace.md").write_text(text + "\n")
      self._plot(figures, path / "pace.png")
      log.write_results(path, figures)
      return figures

  def attention(self) -> dict[str, float]:
    """Seconds of each case of attention alone."""
    width = band_width(self.tokens, self.keep)
    size = (1, self.tokens, self.heads, self.head_dim, self.dtype)
    learn = jax.jit(
      lambda q, k, v: rettention(
        q, k, v, reshaped(v), dense=True, window=width
      )[1]
    )
    sets = [(*x, learn(*x)) for x in inputs(*size, count=3)]
    step = functools.partial(rettention, window=width)
    cases = {
      "plain": lambda q, k, v, _: attention(q, k, v),
      "window": lambda q, k, v, _: attention(q, k, v, window=width),
      "dense": functools.partial(step, dense=True),
      "sparse": functools.partial(step, dense=False),
    }
    if platform() == "gpu":
      cases["cudnn"] = lambda q, k, v, _: jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn"
      )
    return self._times(cases, sets)

  def layers(self) -> dict[str, float]:
    """Seconds of each case of a DiT around it."""
    net = DiT(
      size=self.sides,
      patch=1,
      width=self.heads * self.head_dim,
      depth=self.depth,
      num_heads=self.heads,
      channels=16,
      dtype=self.dtype,
      param_dtype=self.dtype,
    )
    x = jax.random.normal(jax.random.key(self.seed), (1, *self.sides, 16))
    t = jnp.full((1,), 0.5)
    made = jax.eval_shape(net.init, jax.random.key(0), x, t)
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(self.seed + 1), len(leaves))
    drawn = [
      (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
    variables = jax.tree.unflatten(tree, drawn)
    width = band_width(self.tokens, self.keep)
    wise = net.clone(attend=functools.partial(rettention, window=width))

    def step(dense):
      return lambda p, x, t, state: wise.apply(
        p, x, t, state=state, dense=dense
      )

    state = jax.jit(step(True))(variables, x, t, wise.init_state(1))[1]["state"]
    cases = {
      "plain": lambda p, x, t, _: net.apply(p, x, t)[0],
      "dense": step(True),
      "sparse": step(False),
    }
    return self._times(cases, [(variables, x, t, state)])

  def _times(self, cases, sets) -> dict[str, float]:
    programs = [build(case, *sets[0]) for case in cases.values()]
    seconds = dict(zip(cases, self.clock.in_turns(programs, sets), strict=True))
    flags = dense_steps(self.steps, first=self.first, every=self.every)
    share = float(flags.mean())
    mean = share * seconds["dense"] + (1 - share) * seconds["sparse"]
    return {**seconds, "mean": mean}

  def table(self, figures: Mapping[str, float]) -> list[str]:
    """Milliseconds and savings, in Markdown."""
    share = kept(self.tokens, band_width(self.tokens, self.keep))
    device = jax.devices()[0].device_kind
    lines = [
      f"{self.tokens} tokens, {self.heads} heads of {self.head_dim},"
      f" {jnp.dtype(self.dtype).name}, {100 * share:.1f}% of the keys;"
      f" {self.depth} layers; {device}, jax {jax.__version__}",
      "",
      "| | ms | saved |",
      "|---|---|---|",
    ]
    for name, value in figures.items():
      if name.endswith("/ms"):
        case = name.removesuffix("/ms")
        saved = 100 * figures[f"{case}/saved"]
        lines.append(f"| {case} | {value:.3f} | {saved:.1f}% |")
    return lines

  def _plot(self, figures, path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = {k[:-3]: v for k, v in figures.items() if k.endswith("/ms")}
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = axes.barh(list(times), list(times.values()))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ms a step, {self.tokens} tokens")
    figure.savefig(path, dpi=110)
