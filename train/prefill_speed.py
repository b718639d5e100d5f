"""How fast attention over chosen blocks is, on drawn and on read arrays."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from isthmus.attention.bench import chosen_view, run
from isthmus.attention.bench.chosen import Chosen, Source, drawn, measure
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.drawn import check_sizes
from isthmus.attention.bench.report import Report
from isthmus.attention.bench.ways import way
from isthmus.data.library import PythonLibrary
from isthmus.data.text import Corpus
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.metrics.capture import (
  capture,
  extended,
  long_text,
  regrouped,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillSpeed:
  """Times every way of choosing beside dense attention.

  On arrays that are drawn (`isthmus.attention.bench.drawn`), and on those with
  which a model attends that reads a long text: documents end to end, positions
  stretched to the longest length (`isthmus.train.metrics.capture.extended`),
  of which shorter lengths are the beginning; heads of several layers side by
  side, of another width (`regrouped`).

  Attributes:
    load: gives (model, params, tokenizer); None: drawn arrays alone.
    corpus: the text, of which the "train" split is read.
    context: tokens that the model was trained for.
    layers: of which the heads are.
    levels: ways, and what each is asked to keep, one after the other.
    lengths: in the order in which they are measured.
    heads, kv_heads, width: of the arrays.
    block: of tokens.
    queries: at random places, whose mass is counted.
    rounds: timed; the median counts.
    round_seconds: of each, about; a slow call is timed once.
    seconds: after which nothing new is begun, the text's reading among them;
      0 for no limit.

  Raises:
    ValueError: sizes that don't fit, an unknown way, a level outside (0, 1].

  Example:
    >>> job = PrefillSpeed(levels={"mass": (0.9,)}, lengths=(1024,))
    >>> job.shape
    'H32/8 D128'
  """

  load: Callable[[], Any] | None = None
  corpus: Corpus = PythonLibrary()
  context: int = 8192
  layers: tuple[int, ...] = (4, 14, 24)
  levels: Mapping[str, tuple[float, ...]]
  lengths: tuple[int, ...] = (131072, 262144, 65536, 32768)
  heads: int = 32
  kv_heads: int = 8
  width: int = 128
  block: int = 128
  queries: int = 64
  rounds: int = 3
  round_seconds: float = 0.1
  seconds: float = 480.0

  def __post_init__(self):
    for name in ("context", "block", "queries", "rounds"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    check_sizes(self.heads, self.kv_heads, self.width)
    if not self.lengths or min(self.lengths) < 4 * self.block:
      raise ValueError(
        f"lengths are {self.lengths}; each is 4 blocks of {self.block} or more"
      )
    for name, level in self.wanted:
      way(name, level, block=self.block, length=max(self.lengths))

  @property
  def wanted(self) -> list[tuple[str, float]]:
    """(way, level) of all that is measured."""
    return [(name, x) for name, xs in self.levels.items() for x in xs]

  @property
  def shape(self) -> str:
    """The heads, for a reader."""
    return f"H{self.heads}/{self.kv_heads} D{self.width}"

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes bench.json, chosen.md and chosen.png into `workdir`.

    Returns:
      Of each source, length T and way `SOURCE/T/WAY=LEVEL/...`: `fwd/ms`,
      `choice/ms`, `kept` and `mass`.
    """
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      results = self.write(path)
      log.write_results(path, results)
      return results

  def write(self, path: pathlib.Path) -> dict[str, float]:
    """What `run` writes, in a folder that is there."""
    began = time.monotonic()
    clock = Clock(rounds=self.rounds, seconds=self.round_seconds)
    settings = {"levels": dict(self.levels), "layers": list(self.layers)}
    report = Report(run.machine(clock), settings)
    log.say(report.where())
    sources = self.sources()
    left = self.seconds - (time.monotonic() - began) if self.seconds else None
    for found in measure(
      sources,
      self.wanted,
      self.lengths,
      clock,
      block=self.block,
      queries=self.queries,
      seconds=left,
    ):
      if isinstance(found, Chosen):
        report.chosen.append(found)
        log.say(found.line())
      else:
        report.refusals.append(found)
        log.say(f"not measured: {found}")
      report.write(path / "bench.json")
    if not report.chosen:
      raise RuntimeError("nothing was measured; bench.json has the reasons")
    lines = chosen_view.verdicts(report.chosen)
    table = chosen_view.table(report.chosen)
    text = "\n\n".join([report.where(), table, *lines])
    print(text)
    (path / "chosen.md").write_text(text + "\n")
    chosen_view.plot(report.chosen, path / "chosen.png", report.where())
    return results(report.chosen)

  def sources(self) -> dict[str, Source]:
    """Of queries, keys and values, by name."""
    found = {"drawn": drawn(self.heads, self.kv_heads, self.width)}
    if self.load is None:
      return found
    model, params, tokenizer = self.load()
    longest = max(self.lengths)
    model = extended(model, longest, context=self.context)
    tokens = long_text(self.corpus, tokenizer, longest)
    arrays = regrouped(
      *capture(model, params, tokens, self.layers),
      heads=self.heads,
      kv_heads=self.kv_heads,
      width=self.width,
      dtype=jnp.bfloat16,
    )
    return found | {"read": lambda length: tuple(x[:, :length] for x in arrays)}


def results(rows: list[Chosen]) -> dict[str, float]:
  """Figures of rows, by name.

  Example:
    >>> row = Chosen("drawn", "mass", 0.9, 64, 2, 1, 16, fwd=2.0, choice=1.0,
    ...              kept=0.5, mass=0.75, head_mass=0.5)
    >>> list(results([row]))[0]
    'drawn/64/mass=0.9/fwd/ms'
  """
  found = {}
  for row in rows:
    name = f"{row.source}/{row.length}/{row.way}={row.level:g}"
    found[f"{name}/fwd/ms"] = row.fwd
    found[f"{name}/choice/ms"] = row.choice
    found[f"{name}/kept"] = row.kept
    found[f"{name}/mass"] = row.mass
  return found
