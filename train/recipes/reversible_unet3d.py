"""A 3D U-Net with reversible MBConv blocks, on a brain.

Link: https://arxiv.org/abs/2104.09648
Year: 2021
Family: vision
Core: nets/vision/unet3d.py
Reproduced: the partially reversible 3D U-Net with MBConv blocks, trained with
  its layers computed backwards and, at the same seed, with all of them kept:
  the Dice of both on voxels that were not trained on. The largest volume,
  depth and width within a budget are the recipe `reversible_memory`'s.
Simplified: nilearn's MNI152 template (one head, the mean of 152, at 1 mm; grey
  and white matter) for BraTS. Its halves mirror each other exactly, so that a
  left half would hold out nothing of the right one: held out is the front, 64
  of 233 planes. Patches of 64^3, widths 16, 32, 64, depth 4, expansion 2, 120
  steps of Adam without augmentation; cross-entropy is added to the soft Dice,
  over exclusive classes. `full` is of BraTS, its three regions and soft Dice
  alone, and not run.
Command: python -m train.main --config reversible_unet3d:pair
Claim: at a fixed memory volumes up to 3 times as large, or 25% more depth, or
  twice the channels of the same net that keeps its activations; paper's claim
Result: Dice 0.915 on the held-out front, reversible and plain alike to the last
  digit (two CPU cores)
Measured: one seed, mean Dice of grey and white matter on held-out patches
  0.927 and on the whole front by overlapping windows 0.915, reversible and
  plain alike: the logged losses of the two runs are equal to the last digit.
  Two CPU cores, Python 3.12, jax 0.11.2; measured by us. The three
  claims: see `reversible_memory`
Check: cpu: eval/dice = 0.927 +- 0.02, volume/dice = 0.915 +- 0.02; two CPU
  cores, Python 3.12, jax 0.11.2
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from isthmus.data.brats import BratsFolder, regions
from isthmus.data.volume import BrainVolume
from isthmus.nets.vision.sliding import sliding_window
from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.metrics.dice import hard_dice
from isthmus.train.optim.chain import Optimizer
from isthmus.train.study import Results, Study
from isthmus.train.tasks.segment import Segment

NAMES = ("background", "grey", "white")
# Its front: 64 of 233 planes along y, a patch deep.
HELD_OUT = 64 / 233
FRONT = (189, 64, 197)
# What "the same Dice" means; set before the runs.
NEAR = 0.01


def get_config(variant: str = "cpu") -> Fit | Study:
  """`cpu`: minutes; `pair`: it in two modes; `smoke`; `full`: BraTS, a GPU."""
  return choose(
    {
      "cpu": _cpu,
      "pair": lambda: Study(
        grid=functools.partial(pair, steps=120), seeds=1, report=compare
      ),
      "smoke": _smoke,
      "full": _full,
    },
    variant,
  )


def pair(*, steps: int, size: int = 64, stride: int = 32) -> dict[str, Fit]:
  """One run that computes its layers backwards, one that keeps them."""
  job = _cpu(steps=steps, size=size, stride=stride)
  return {
    mode: dataclasses.replace(job, model=job.model.clone(mode=mode))
    for mode in ("reversible", "plain")
  }


def _cpu(steps: int = 120, size: int = 64, stride: int = 32) -> Fit:
  return Fit(
    model=UNet3D(classes=len(NAMES), widths=(16, 32, 64), depth=4, expand=2),
    task=Segment(names=NAMES, cross_entropy=1.0),
    data=BrainVolume(size=size, stride=stride, eval_fraction=HELD_OUT),
    optimizer=Optimizer(learning_rate=5e-3, warmup=10, weight_decay=1e-2),
    steps=steps,
    batch_size=1,
    save_every=40,
    log_every=5,
    report=show,
  )


def _smoke() -> Fit:
  return Fit(
    # These blocks compile in half the time of MBConv.
    # On a fine grid, so that sums in another order, as of several devices,
    # round to neighbours that are near.
    model=UNet3D(
      classes=len(NAMES), widths=(4, 8), depth=2, block="conv", grid=18
    ),
    task=Segment(names=NAMES, cross_entropy=1.0),
    data=BrainVolume(size=16, foreground=0.5, eval_fraction=HELD_OUT),
    optimizer=Optimizer(learning_rate=2e-2, warmup=2),
    steps=6,
    batch_size=8,
    save_every=3,
    log_every=1,
  )


def _full() -> Fit:
  return Fit(
    model=UNet3D(classes=3, dtype=jnp.bfloat16),
    task=Segment(regions=regions, names=("WT", "TC", "ET")),
    # 155 planes don't halve four times: two patches of 144 overlap.
    data=BratsFolder("brats", size=(144, 240, 240)),
    optimizer=Optimizer(learning_rate=1e-4, weight_decay=1e-5),
    steps=20_000,
    batch_size=1,
    save_every=1000,
  )


# --- what the runs say ---


def show(
  job: Fit, workdir: pathlib.Path, params: Any, results: dict[str, float]
) -> dict[str, float]:
  """slice.png, and the Dice over all of the front by overlapping windows."""
  data = job.data
  assert isinstance(data, BrainVolume)
  whole = dataclasses.replace(data, size=FRONT, stride=None, foreground=0.0)
  front = whole.open("eval")[0]
  image, label = front["image"], front["label"]

  @jax.jit
  def predict(params, image):
    logits = sliding_window(
      lambda x: job.model.apply({"params": params}, x),
      image,
      window=data.size,
    )
    return logits.argmax(-1)

  found = np.asarray(predict(params, jnp.asarray(image)), np.int32)
  figures = _dice(found, label)
  # Where the front's two tissues are both there and most of them.
  y = int(np.argmax((label > 0).sum((0, 2))))
  _plot(
    {
      "T1-weighted image": image[:, y, :, 0],
      "truth": label[:, y],
      f"prediction, Dice {figures['volume/dice']:.3f}": found[:, y],
    },
    workdir / "slice.png",
  )
  return figures


def compare(
  study: Study, workdir: pathlib.Path, results: Results
) -> dict[str, float]:
  """report.md: the Dice of both modes, and whether they are the same."""
  kinds = ("volume/dice", "eval/dice", "eval/loss")
  figures = {
    f"{mode}/{kind}": sum(run[kind] for run in runs) / len(runs)
    for mode, runs in results.items()
    for kind in kinds
  }
  modes = tuple(results)
  lines = [f"| mode | {' | '.join(kinds)} |", "|---|---|---|---|"]
  for mode in modes:
    row = " | ".join(f"{figures[f'{mode}/{kind}']:.4f}" for kind in kinds)
    lines.append(f"| {mode} | {row} |")
  for kind in kinds[:2]:
    apart = [
      abs(a[kind] - b[kind])
      for a, b in zip(*(results[mode] for mode in modes), strict=True)
    ]
    figures[f"{kind}_difference"] = max(apart)
    verdict = "replicated" if max(apart) <= NEAR else "refuted"
    lines.append(
      f"\n{kind} within {NEAR} for every seed: {verdict} ({max(apart):.4f})"
    )
  text = "\n".join(lines)
  print(text)
  (workdir / "report.md").write_text(text + "\n")
  return figures


def _dice(
  found: Int[np.ndarray, "z y x"], label: Int[np.ndarray, "z y x"]
) -> dict[str, float]:
  tissues = range(1, len(NAMES))
  values = hard_dice(
    [float(((found == i) & (label == i)).sum()) for i in tissues],
    [float((found == i).sum()) for i in tissues],
    [float((label == i).sum()) for i in tissues],
  )
  named = zip(NAMES[1:], values, strict=True)
  return {
    "volume/dice": sum(values) / len(values),
    **{f"volume/dice/{name}": value for name, value in named},
  }


def _plot(
  pictures: dict[str, Float[np.ndarray, "z x"] | Int[np.ndarray, "z x"]],
  path: pathlib.Path,
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.colors import ListedColormap
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.2), layout="constrained")
  FigureCanvasAgg(figure)
  tissue = ListedColormap(["black", "tab:gray", "white"])
  for i, (title, picture) in enumerate(pictures.items()):
    axes = figure.add_subplot(1, len(pictures), i + 1)
    last = len(NAMES) - 1 if i else None
    axes.imshow(
      picture,
      cmap=tissue if i else "gray",
      vmin=0,
      vmax=last,
      origin="lower",
      interpolation="nearest",
    )
    axes.set_title(title, fontsize=10)
    axes.axis("off")
  figure.savefig(path, dpi=90)
