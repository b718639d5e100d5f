"""Re-ttention: sparse attention that remembers what dense steps saw.

Link: https://arxiv.org/abs/2505.22918
Year: 2025
Family: attention
Core: attention/reshape.py
Reproduced: the method without training, in a sampler of 20 steps of which the
  first five and every fifth after them are dense: images of a diffusion
  transformer trained here, by the share of keys in the window of all layers,
  against the dense sampler's from the same noise. Beside it the window alone,
  ramps of the share by 0.04, 0.01 and 0 a step, a plain cache of the residual,
  and as many steps as are dense and no others. `speed` times both kinds of step
  at CogVideoX-2B's size (17,776 tokens, 30 heads of 64).
Simplified: digits of 49 or 196 tokens (`small`, `cpu`) and crops of photographs
  of 1,024 (`full`) instead of CogVideoX, PixArt and Hunyuan-DiT; PSNR alone.
  `speed` is of random queries and keys, its window is over all tokens, those of
  text included, which the authors always keep, and its two layers are ours.
  `cpu` has not been run.
Command: python -m train.main --config rettention:small
Claim: 27.96 dB to the dense sampler's videos at 3.1% of the keys, more than 92%
  of attention's and 45% of all time saved on an H100; paper's claim
Result: 20 dB above the window alone and 2 to 11 above a plain cache, at 1,024
  tokens (one H200); a sparse step is 90% under cuDNN (H100, H200)
Measured: `full`, a net of 1,024 tokens after 6,000 steps on crops of
  photographs, seed 0, one H200, jax 0.11.2; dB to the dense sampler's 32 images
  with 3.2, 6.2, 12.2% of the keys in the window: the window alone 13.0, 16.4,
  20.8; Re-ttention with a ramp of 0.04 37.1, 38.6, 40.8, of 0.01 31.9, 33.7,
  36.1, of 0 30.0, 32.0, 34.5; a plain cache of the residual 26.0, 36.5, 38.8; 8
  dense steps without any between them 24.5. So it is 6 dB above the window at
  every share: replicated, least +19.9; the ramp of 0.04 is worth 2 dB over
  none: replicated, least +6.2; it is above a plain cache at all three. `small`,
  16 images of 49 tokens, the same: the window 16.0, 18.8, 22.2 (2.0, 6.0, 13.8%
  of the keys); ramps 31.6, 31.8, 32.3; 30.6, 30.8, 31.5; 30.0, 30.4, 31.2; the
  cache 29.9, 32.1, 35.8; dense steps alone 33.9: there the ramp is worth 1.1 to
  1.6 dB, and the cache is better but at the least share. One net each. Two CPU
  cores, jax 0.11.2. `speed`, ms of attention, jax 0.11.2. One H100 80GB: cuDNN
  5.74, ours 5.44, a sparse step 0.57 (90.0% less than cuDNN; the window alone
  0.47), a dense step 5.82, the mean of the schedule 2.88 (50% less). One H200:
  cuDNN 5.79, ours 5.66, sparse 0.56 (90.3%), the window 0.48, dense 6.06, the
  mean 2.98 (48.5%); two layers, with plain attention 17.2, a sparse step 6.8
  (61% less), the mean of the schedule 11.7 (32% less, where the paper has 45%
  of all time): what is left is matrix products; measured by us
Check: small: ramp-0.04_over_window >= 6, 0.03125/ramp-0.04 = 31.6 +- 2;
  two CPU cores, Python 3.12, jax 0.11.2
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.attention.reshape import band_width, dense_steps, rettention
from isthmus.attention.sdpa import attention
from isthmus.data.mnist import Mnist5k
from isthmus.data.photos import Photographs
from isthmus.nets.dit import DiT
from isthmus.nets.sample.flow import flow_velocity, sample_flow
from isthmus.train import log
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.mesh import P
from isthmus.train.optim.chain import Optimizer
from isthmus.train.pace import Pace, kept
from isthmus.train.tasks.flow import FlowMatching

RULES = (
  (r"attn/(q|k|v)/kernel$", P("fsdp", "model")),
  (r"attn/o/kernel$", P("model", "fsdp")),
  (r"mlp/up/kernel$", P("fsdp", "model")),
  (r"mlp/down/kernel$", P("model", "fsdp")),
)
KEEPS = (0.03125, 0.0625, 0.125)
# In dB; what the first is above the second by, set before the runs.
BOUNDS = {("ramp-0.04", "window"): 6.0, ("ramp-0.04", "ramp-0"): 2.0}


def get_config(variant: str = "cpu") -> Fit | Pace:
  """`small`, `cpu`: minutes; `smoke`: seconds; `full`, `speed`: a GPU."""
  return choose(
    {
      "small": lambda: _cpu(patch=4, steps=1200),
      "cpu": _cpu,
      "smoke": _smoke,
      "full": _full,
      "speed": Pace,
    },
    variant,
  )


def _cpu(patch: int = 2, steps: int = 400) -> Fit:
  return Fit(
    model=DiT(
      size=28,
      patch=patch,
      width=64,
      depth=4,
      num_heads=4,
      channels=1,
      classes=10,
    ),
    task=FlowMatching(classes=10),
    data=Mnist5k(),
    optimizer=Optimizer(
      learning_rate=2e-3, warmup=50, final=0.0, weight_decay=0.01
    ),
    steps=steps,
    batch_size=32,
    eval_batch_size=100,
    ema=0.98,
    rules=RULES,
    save_every=100,
    log_every=20,
    report=compare,
  )


def _smoke() -> Fit:
  return Fit(
    model=DiT(
      size=28,
      patch=4,
      width=32,
      depth=2,
      num_heads=4,
      channels=1,
      classes=10,
    ),
    task=FlowMatching(classes=10),
    data=Mnist5k(),
    optimizer=Optimizer(learning_rate=1e-2, warmup=2),
    steps=8,
    batch_size=64,
    eval_batch_size=500,
    rules=RULES,
    log_every=1,
    save_every=4,
  )


def _full() -> Fit:
  return Fit(
    model=DiT(
      size=64,
      patch=2,
      width=384,
      depth=12,
      num_heads=6,
      dtype=jnp.bfloat16,
    ),
    task=FlowMatching(),
    data=Photographs(size=64, stride=16),
    optimizer=Optimizer(learning_rate=4e-4, warmup=500, weight_decay=0.01),
    steps=6000,
    batch_size=64,
    ema=0.999,
    rules=RULES,
    save_every=2000,
    report=functools.partial(compare, rows=32),
  )


# --- quality ---


def windowed(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b t n d"],
  v: Float[Array, "b t n d"],
  state: Any,
  *,
  dense: Any,
  window: int,
) -> tuple[Float[Array, "b t n d"], Any]:
  """A dense step, or one of a window alone; the state stays as it was."""
  o = jax.lax.cond(
    dense,
    lambda: attention(q, k, v),
    lambda: attention(q, k, v, window=window),
  )
  return o, state


#: What a sparse step does, by name.
WAYS = {
  "window": windowed,
  "ramp-0.04": functools.partial(rettention, ramp=0.04),
  "ramp-0.01": functools.partial(rettention, ramp=0.01),
  "ramp-0": functools.partial(rettention, ramp=0.0),
  "cache": functools.partial(rettention, ratio=False),
}


def compare(
  job: Fit,
  workdir: pathlib.Path,
  params: Any,
  results: dict[str, float],
  *,
  rows: int = 16,
  steps: int = 20,
  first: int = 5,
  every: int = 5,
  keeps: tuple[float, ...] = KEEPS,
  ways: tuple[str, ...] = tuple(WAYS),
  guidance: float = 1.0,
  seed: int = 0,
) -> dict[str, float]:
  """rettention.json, .md and .png: PSNR to the dense sampler's images.

  Args:
    job, workdir, params, results: of the run.
    rows: images, their classes in turns.
    steps: of the sampler.
    first, every: of `dense_steps`.
    keeps: shares of keys, see `band_width`.
    ways: of `WAYS`.
    guidance: see `flow_velocity`.
    seed: of the noise.

  Returns:
    In dB `KEEP/WAY`, and `fewer`, of the dense steps' number of steps alone.
  """
  del results
  net, task = job.model, job.task
  assert isinstance(net, DiT) and isinstance(task, FlowMatching)
  shape = (rows, *net.sides, net.channels)
  noise = jax.random.normal(jax.random.key(seed), shape)
  label = None if net.classes is None else jnp.arange(rows) % net.classes
  flags = dense_steps(steps, first=first, every=every)

  def sample(net, steps, flags=None):
    @jax.jit
    def run(params, noise):
      velocity = flow_velocity(net, params, label=label, guidance=guidance)
      if flags is None:
        return task.decode(sample_flow(velocity, noise, steps=steps))
      state = net.init_state(rows * (1 if guidance == 1.0 else 2))
      given = {"state": state, "dense": flags}
      return task.decode(sample_flow(velocity, noise, steps=steps, **given)[0])

    return np.asarray(run(params, noise))

  pictures = {"dense": sample(net, steps)}
  truth = pictures["dense"]
  figures = {"fewer": psnr(sample(net, int(flags.sum())), truth)}
  for keep in keeps:
    width = band_width(net.tokens, keep)
    for way in ways:
      attend = functools.partial(WAYS[way], window=width)
      images = sample(net.clone(attend=attend), steps, flags)
      figures[f"{keep:g}/{way}"] = psnr(images, truth)
      if keep == min(keeps):
        pictures[way] = images
  figures |= _gains(figures, keeps, ways)
  log.write_json(workdir / "rettention.json", figures)
  head = (
    f"{rows} images of {net.tokens} tokens, {steps} steps, {flags.sum()} dense:"
    " PSNR in dB to the dense sampler's"
  )
  text = "\n".join([head, "", *_table(figures, keeps, ways, net.tokens)])
  print(text)
  (workdir / "rettention.md").write_text(text + "\n")
  _plot(figures, keeps, ways, pictures, workdir / "rettention.png")
  return figures


def psnr(
  images: Float[np.ndarray, "b y x c"], truth: Float[np.ndarray, "b y x c"]
) -> float:
  """Mean over images of `10 log10(1 / mse)`, at most 100."""
  mse = np.square(images - truth).mean((1, 2, 3))
  return float(-10 * np.log10(np.maximum(mse, 1e-10)).mean())


def _gains(figures, keeps, ways) -> dict[str, float]:
  """The least of each of `BOUNDS`' differences, and the cache's lead."""
  pairs = {f"{a}_over_{b}": (a, b) for a, b in BOUNDS}
  pairs["ramp-0.04_over_cache"] = ("ramp-0.04", "cache")
  return {
    name: min(figures[f"{k:g}/{a}"] - figures[f"{k:g}/{b}"] for k in keeps)
    for name, (a, b) in pairs.items()
    if a in ways and b in ways
  }


def _table(figures, keeps, ways, tokens) -> list[str]:
  lines = [f"| keys | {' | '.join(ways)} |", "|" + "---|" * (len(ways) + 1)]
  for keep in keeps:
    cells = " | ".join(f"{figures[f'{keep:g}/{way}']:.2f}" for way in ways)
    share = kept(tokens, band_width(tokens, keep))
    lines.append(f"| {100 * share:.1f}% | {cells} |")
  lines += ["", f"The dense steps' number of steps: {figures['fewer']:.2f} dB."]
  for (a, b), bound in BOUNDS.items():
    least = figures.get(f"{a}_over_{b}")
    if least is not None:
      word = "replicated" if least >= bound else "refuted"
      lines.append(
        f"* {a} is {bound:g} dB above {b} at every share: {word} (least"
        f" {least:+.2f})"
      )
  both = [
    (figures[f"{keep:g}/ramp-0.04"], figures[f"{keep:g}/cache"])
    for keep in keeps
    if {"ramp-0.04", "cache"} <= set(ways)
  ]
  if both:
    wins = sum(a > b for a, b in both)
    lines.append(
      f"* ramp-0.04 is above a plain cache of the residual at {wins} of"
      f" {len(both)} shares"
    )
  return lines


def _plot(figures, keeps, ways, pictures, path: pathlib.Path) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
  for i, way in enumerate(ways):
    values = [figures[f"{keep:g}/{way}"] for keep in keeps]
    percent = [100 * keep for keep in keeps]
    left.plot(percent, values, color=f"C{i}", marker="osv^D"[i % 5], label=way)
  left.axhline(
    figures["fewer"], color="gray", linewidth=0.8, label="fewer steps"
  )
  left.set_xscale("log", base=2)
  left.set_xticks([100 * k for k in keeps], [f"{100 * k:g}" for k in keeps])
  left.minorticks_off()
  left.set_xlabel("keys in the window, %")
  left.set_ylabel("PSNR to the dense sampler's images, dB")
  left.legend(
    fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0)
  )
  few = min(8, len(pictures["dense"]))
  bands = [np.concatenate(list(x[:few]), axis=1) for x in pictures.values()]
  sheet = np.concatenate(bands)
  side = len(bands[0])
  right.imshow(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet,
               cmap="gray", vmin=0, vmax=1)  # fmt: skip
  right.set_xticks([])
  right.set_yticks(side * (np.arange(len(pictures)) + 0.5), list(pictures))
  right.set_title(f"{100 * min(keeps):g}% of the keys", fontsize=10)
  figure.savefig(path, dpi=110)
