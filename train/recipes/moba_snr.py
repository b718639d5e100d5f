"""Retrieval by block routing against the size of its blocks.

Link: https://arxiv.org/abs/2511.11571
Year: 2025
Family: attention
Core: attention/snr.py
Reproduced: the law of the paper's analysis: the ratio of a sought block's lead
  to its noise is gap sqrt(d / 2B), so that smaller blocks, and keys that
  gather what belongs together, make routing find what it looks for. Queries,
  keys and places are drawn; `moba` itself routes; success is counted at equal
  numbers of keys read, and one gap is fitted to each curve.
Simplified: keys are Gaussian, as the law has them: it is tested whether routing
  obeys it, not whether trained models do (the recipe moba asks those). The
  paper gives the failure against one other block; against many it is
  integrated here.
Command: python -m train.main --config moba_snr
Claim: failure is Phi(-gap sqrt(d / 2B)): half the block is worth a factor
  sqrt(2); paper's claim
Result: the law fits, least R^2 .996 (two CPU cores)
Measured: least R^2 of the law over six curves .996 with one gap fitted to each,
  .999 over all points with the true gaps, which the fitted ones have within
  3% (`small`: 256 of 2048 keys read, d 64, 1000 draws a point, two CPU cores,
  jax 0.11.2); `full` not run; measured by us
Check: small: r2 >= 0.95, r2_true >= 0.98; two CPU cores, Python 3.12,
  jax 0.11.2
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import jax

from isthmus.attention.snr import (
  effective_gap,
  failure_rate,
  fit_gap,
  sample_failure,
  signal_to_noise,
)
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.config import choose


def get_config(variant: str = "full") -> "Retrieval":
  """`full`: minutes on a GPU; `small`: on a CPU; `smoke`: seconds."""
  return choose({"full": _full, "small": _small, "smoke": _smoke}, variant)


def _full() -> "Retrieval":
  return Retrieval(trials=4000)


def _small() -> "Retrieval":
  return Retrieval(
    context=2048, budget=256, block=(256, 128, 64, 32, 16), trials=1000
  )


def _smoke() -> "Retrieval":
  return Retrieval(
    context=256,
    budget=64,
    head_dim=16,
    block=(64, 16, 4),
    gaps=(1.0,),
    clusters=(1, 3),
    trials=200,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
  """Counts how often routing finds a block, and fits the law to it.

  Attributes:
    trials: draws a point.
    context: keys that there are.
    budget: keys that are read, so that `budget / block` blocks are.
    head_dim: d.
    block: sizes, which divide context and budget.
    gaps: leads of the sought key, in units of the noise of one `q . k`,
      d ** -0.5 being that.
    clusters: keys of the sought block that belong together.
    lift: of the others among them, as a share of the gap.
    seed: of the draws.

  Raises:
    ValueError: sizes that don't divide, or are none.
  """

  trials: int = 1000
  context: int = 8192
  budget: int = 1024
  head_dim: int = 64
  block: tuple[int, ...] = (512, 256, 128, 64, 32, 16)
  gaps: tuple[float, ...] = (4.0, 8.0, 16.0)
  clusters: tuple[int, ...] = (1, 4)
  lift: float = 0.5
  seed: int = 0

  def __post_init__(self):
    for name in ("trials", "context", "budget", "head_dim"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if not self.block or not self.gaps or not self.clusters:
      raise ValueError("block, gaps and clusters: each has at least one entry")
    for block in self.block:
      if block < 1 or self.budget % block or self.context % block:
        raise ValueError(
          f"block {block} doesn't divide budget {self.budget} and context"
          f" {self.context}"
        )
    if self.budget >= self.context:
      raise ValueError(
        f"budget {self.budget} reads all of a context of {self.context}"
      )
    if not 1 <= min(self.clusters) <= max(self.clusters) <= min(self.block):
      raise ValueError(
        f"clusters {self.clusters} lie in [1, least block {min(self.block)}]"
      )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes retrieval.json, retrieval.md and retrieval.png into `workdir`.

    Returns:
      Of each curve, `gap=G/cluster=M/found_bB`, the share of trials that find
      their block; `.../gap`, the effective gap that was fitted, over the true
      one, and `.../r2` of its law, where the shares differ. `r2`, the least of
      them; `r2_true`, of the law with the true gaps, over all points.
    """
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      points = self.measure()
      results = self.fit(points)
      log.write_json(path / "retrieval.json", results)
      (path / "retrieval.md").write_text(self.table(points) + "\n")
      print(self.table(points))
      self._plot(points, path / "retrieval.png")
      log.write_results(path, results)
      return results

  def sizes(self, block: int) -> dict[str, Any]:
    """Blocks that compete, and those that are read."""
    return {"blocks": self.context // block - 1, "slots": self.budget // block}

  def gap(self, gap: float, cluster: int) -> float:
    """The effective gap of a curve, in `q . k`."""
    unit = gap * self.head_dim**-0.5
    return effective_gap(unit, cluster=cluster, lift=self.lift * unit)

  def law(self, gap: float, block: int) -> float:
    """Share of trials that find their block at an effective gap."""
    snr = signal_to_noise(gap, head_dim=self.head_dim, block=block)
    return 1 - failure_rate(snr, **self.sizes(block))

  def measure(self) -> dict[tuple[float, int], list[float]]:
    """(gap, cluster) -> shares found, by block."""
    key, points = jax.random.key(self.seed), {}
    for gap, cluster in itertools.product(self.gaps, self.clusters):
      unit = gap * self.head_dim**-0.5
      found = []
      for block in self.block:
        key, own = jax.random.split(key)
        lost = sample_failure(
          own,
          gap=unit,
          lift=self.lift * unit,
          cluster=cluster,
          head_dim=self.head_dim,
          block=block,
          trials=self.trials,
          batch=min(self.trials, 20),
          **self.sizes(block),
        )
        found.append(1 - lost)
      points[gap, cluster] = found
    return points

  def fit(self, points: dict[tuple[float, int], list[float]]):
    """The figures that `run` returns."""
    results, each, pairs = {}, [], []
    for (gap, cluster), found in points.items():
      name = f"gap={gap:g}/cluster={cluster}"
      for block, share in zip(self.block, found, strict=True):
        results[f"{name}/found_b{block}"] = share
        pairs.append((share, self.law(self.gap(gap, cluster), block)))
      sizes = [self.sizes(block) for block in self.block]
      fitted, r2 = fit_gap(
        [1 - share for share in found],
        head_dim=self.head_dim,
        block=self.block,
        blocks=[s["blocks"] for s in sizes],
        slots=[s["slots"] for s in sizes],
      )
      if max(found) - min(found) > 0.05:  # else there is nothing to explain
        results[f"{name}/gap"] = fitted / self.gap(gap, cluster)
        results[f"{name}/r2"] = r2
        each.append(r2)
    mean = sum(share for share, _ in pairs) / len(pairs)
    rest = sum((share - law) ** 2 for share, law in pairs)
    spread = sum((share - mean) ** 2 for share, _ in pairs)
    if each:
      results["r2"] = min(each)
    if spread:
      results["r2_true"] = 1 - rest / spread
    return results

  def table(self, points: dict[tuple[float, int], list[float]]) -> str:
    """Shares found beside the law's, in Markdown."""
    lines = [
      f"{self.budget} of {self.context} keys are read, d {self.head_dim},"
      f" {self.trials} trials: found (law), by block",
      "",
      "| gap | cluster | " + " | ".join(map(str, self.block)) + " |",
      "|" + "---|" * (len(self.block) + 2),
    ]
    for (gap, cluster), found in points.items():
      cells = [
        f"{share:.3f} ({self.law(self.gap(gap, cluster), block):.3f})"
        for block, share in zip(self.block, found, strict=True)
      ]
      lines.append(f"| {gap:g} | {cluster} | {' | '.join(cells)} |")
    return "\n".join(lines)

  def _plot(self, points, path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, ((gap, cluster), found) in enumerate(points.items()):
      # 95%, by the normal approximation with 2 trials added to each side.
      share = [(x * self.trials + 2) / (self.trials + 4) for x in found]
      error = [1.96 * math.sqrt(p * (1 - p) / self.trials) for p in share]
      mark: dict[str, Any] = {"color": f"C{i}", "capsize": 2}
      label = f"gap {gap:g}, {cluster} together"
      axes.errorbar(self.block, found, error, fmt="o", label=label, **mark)
      law = [self.law(self.gap(gap, cluster), b) for b in self.block]
      axes.plot(self.block, law, color=f"C{i}", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(self.block, [str(b) for b in self.block])
    axes.minorticks_off()
    axes.set_xlabel(f"block ({self.budget} of {self.context} keys are read)")
    axes.set_ylabel("share of trials that find theirs; lines: the law")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
