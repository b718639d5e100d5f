"""How well a language model reads with its attention over chosen blocks."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.attention.bench.ways import WAYS, way
from isthmus.data.library import PythonLibrary
from isthmus.data.recall import NAMES, Facts
from isthmus.data.text import Corpus, Text
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.metrics.prefill import gauged, measure
from isthmus.train.prefill_speed import PrefillSpeed

#: What is plotted over the share kept, with its label.
METRICS = {
  "mass": "mass kept",
  "perplexity": "perplexity",
  "agreement": "next token as the dense model's",
  "digits": "digits recalled",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
  """Reads held-out text, and facts hidden in it, with each way of choosing.

  Attributes:
    load: gives (model, params, tokenizer).
    corpus: the text, of which the "eval" split is read.
    contexts: tokens of a row, multiples of the block, 4 blocks or more.
    block: of tokens.
    rows: of text, and as many with facts, for each context.
    facts: that are hidden in a row.
    levels: what each way is asked to keep, see `isthmus.attention.bench.ways`.
    queries: of a row, whose mass is counted in each layer; 0 for none.
    equal: shares of the mass at which the ways are compared, see `at_mass`.
    seed: of the facts.
    speed: is run too, if it is given, in the folder `speed`.

  Raises:
    ValueError: sizes that don't fit, an unknown way, a level outside (0, 1].

  Example:
    >>> from isthmus.train.config import load
    >>> job = load("sparse_prefill:smoke", ["rows=2", "contexts=[512]"])
    >>> job.rows, job.contexts
    (2, (512,))
  """

  load: Callable[[], Any]
  corpus: Corpus = PythonLibrary()
  contexts: tuple[int, ...] = (2048, 4096, 8192)
  block: int = 128
  rows: int = 16
  facts: int = 8
  levels: Mapping[str, tuple[float, ...]]
  queries: int = 32
  equal: tuple[float, ...] = ()
  seed: int = 0
  speed: PrefillSpeed | None = None

  def __post_init__(self):
    for name in ("block", "rows", "facts"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if self.queries < 0 or (self.equal and not self.queries):
      raise ValueError(
        f"queries is {self.queries}; it is at least {int(bool(self.equal))}"
      )
    if self.facts > len(NAMES):
      raise ValueError(f"facts is {self.facts}; there are {len(NAMES)} names")
    for t in self.contexts:
      if t % self.block or t < 4 * self.block:
        raise ValueError(
          f"a context of {t} is not 4 or more whole blocks of {self.block}"
        )
    for name, levels in self.levels.items():
      if name not in WAYS:
        raise ValueError(f"way {name!r} is none of {', '.join(WAYS)}")
      if not levels or not 0 < min(levels) <= max(levels) <= 1:
        raise ValueError(f"levels of {name} are {levels}; they lie in (0, 1]")

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes prefill.json, prefill.md and prefill.png into `workdir`.

    Returns:
      The figures of `isthmus.train.metrics.prefill.measure`, of each context T
      `T/dense/...` and `T/WAY=LEVEL/...`; those at equal mass,
      `T/WAY@MASS/...`; those of `speed`, `speed/...`.
    """
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      flat = {}
      model, params, tokenizer = self.load()
      # Before anything is measured: a text may have too few.
      texts = [self.read_rows(length, tokenizer) for length in self.contexts]
      if self.speed is not None:
        (path / "speed").mkdir(exist_ok=True)
        found = self.speed.write(path / "speed")
        flat |= {f"speed/{name}": x for name, x in found.items()}
      results: dict[str, dict[str, float]] = {}
      for length, rows in zip(self.contexts, texts, strict=True):
        dense = None
        for case, attend in self.cases(model, length):
          said, figures = measure(
            model.clone(attend=attend), params, *rows, dense
          )
          dense = said if dense is None else dense
          results[f"{length}/{case}"] = figures
          log.say(line(f"{length}/{case}", figures))
      results |= self._equal(results)
      metrics = next(iter(results.values()))
      table = "\n".join(
        [
          "| case | " + " | ".join(metrics) + " |",
          "|" + "---|" * (len(metrics) + 1),
          *(line(case, one) for case, one in results.items()),
        ]
      )
      print(table)
      (path / "prefill.md").write_text(table + "\n")
      flat |= {
        f"{c}/{n}": x for c, one in results.items() for n, x in one.items()
      }
      log.write_json(path / "prefill.json", flat)
      self._plot(results, path / "prefill.png")
      log.write_results(path, flat)
      return flat

  def read_rows(self, length: int, tokenizer: Any) -> tuple[Any, ...]:
    """(text, weights of its targets, text with facts, marks of answers)."""
    text = Text(self.corpus, tokenizer, seq_len=length, segments=False)
    opened = text.open("eval")
    if len(opened) < 2 * self.rows:
      raise ValueError(
        f"{2 * self.rows} rows of {length} tokens are wanted; the text has"
        f" {len(opened)}"
      )
    at = np.linspace(0, len(opened) - 2, 2 * self.rows).astype(int)
    plain, hay = opened.take(at[::2]), opened.take(at[1::2])
    rng = np.random.default_rng(self.seed)
    hide = Facts(tokenizer, count=self.facts)
    asked = [hide(row, rng) for row in hay["tokens"]]
    hidden, marks = (np.stack(x) for x in zip(*asked, strict=True))
    return plain["tokens"], plain["weights"], hidden, marks

  def cases(self, model: Any, length: int) -> Any:
    """(name, mechanism) of the dense model, and of each way at each level."""
    yield "dense", model.attend
    for name, levels in self.levels.items():
      for level in levels:
        chosen = way(name, level, block=self.block, length=length)
        yield (
          f"{name}={level:g}",
          functools.partial(gauged, way=chosen, queries=self.queries),
        )

  def _equal(self, results) -> dict[str, dict[str, float]]:
    found = {}
    for length in self.contexts:
      for name, levels in self.levels.items():
        cases = [results[f"{length}/{name}={x:g}"] for x in levels]
        for mass in self.equal:
          figures = at_mass(cases, mass)
          if figures is not None:
            found[f"{length}/{name}@{mass:g}"] = figures
    return found

  def _plot(self, results, path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (4 * len(METRICS) + 1.5, 3.4 * len(self.contexts))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(self.contexts), len(METRICS), squeeze=False)
    for length, row in zip(self.contexts, grid, strict=True):
      for axes, (metric, label) in zip(row, METRICS.items(), strict=True):
        level = results[f"{length}/dense"][metric]
        axes.axhline(level, color="black", linewidth=0.8, label="dense")
        for i, (name, levels) in enumerate(self.levels.items()):
          cases = [results[f"{length}/{name}={x:g}"] for x in levels]
          x = [case["kept"] for case in cases]
          y = [case[metric] for case in cases]
          axes.plot(x, y, color=f"C{i}", marker="osv^D"[i % 5], label=name)
        axes.set_xlabel("share of causal blocks kept")
        axes.set_ylabel(label)
        axes.set_title(f"{length} tokens", fontsize=9)
        if metric == "perplexity":
          axes.set_yscale("log")
      row[-1].legend(
        fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1)
      )
    figure.savefig(path, dpi=110)


def at_mass(
  cases: Sequence[Mapping[str, float]], mass: float
) -> dict[str, float] | None:
  """A way's figures where it keeps so much mass, between two of its levels.

  Linear in the mass between the two levels around it; None where no two are.

  Args:
    cases: figures at rising levels, `mass` among them.
    mass: the share.

  Example:
    >>> cases = {"mass": 0.8, "kept": 0.2}, {"mass": 0.9, "kept": 0.4}
    >>> {k: round(x, 3) for k, x in at_mass(cases, 0.85).items()}
    {'mass': 0.85, 'kept': 0.3}
    >>> at_mass(cases, 0.95)
  """
  cases = sorted(cases, key=lambda case: case["mass"])
  for low, high in zip(cases, cases[1:], strict=False):
    if low["mass"] <= mass <= high["mass"] and low["mass"] < high["mass"]:
      part = (mass - low["mass"]) / (high["mass"] - low["mass"])
      return {name: (1 - part) * low[name] + part * high[name] for name in low}
  return None


def line(case: str, figures: Mapping[str, float]) -> str:
  """A line of the table.

  Example:
    >>> line("dense", {"kept": 1.0, "perplexity": 5.8})
    '| dense | 1.000 | 5.800 |'
  """
  return f"| {case} | {' | '.join(f'{x:.3f}' for x in figures.values())} |"
