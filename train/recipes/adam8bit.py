"""A language model trained by Adam with states of eight bits.

Link: https://arxiv.org/abs/2110.02861
Year: 2021
Family: optimisation
Core: train/optim/quant8.py
Reproduced: the optimiser: both moments as codes of a dynamic map with a scale
  for each block, embeddings in 32 bits, a decoder of 27M parameters on 33M
  bytes of Python's own source (about 10M, gone through 3.4 times). Of the
  second moment its root is kept and small ones are not written as 0;
  `--set optimizer.scale.second=plain` is the published scheme. `ablation`: the
  paper's, from 32 bits to linear codes with one scale a tensor, then a dynamic
  map, blocks of 2048, a stable embedding, and the root, each with what came
  before, and 32 bits with a stable embedding; three learning rates, three
  seeds, by the same decoder. `speed`: one step of 252M and 992M parameters
  beside optax.adamw's, and torchao's.
Simplified: a decoder of bytes for the paper's of words; betas 0.9 and 0.95, and
  clipping, in every run. Before the stable embedding the table has codes too.
Command: python -m train.main --config adam8bit
Claim: perplexity of a 209M model within noise of 32-bit Adam, with 75% less
  optimiser memory; paper's claim
Result: a step of 252M parameters in .61 of optax.adamw's time, of 992M in .70
  (H100); naive 8-bit diverged in 9 runs of 9, 32 bits in none (H200)
Measured: `speed`, one step of float32 parameters in place beside the others in
  one run, jax 0.11.2, ms, over optax.adamw. One H100 80GB, nothing else on the
  machine: 252M optax.adamw 2.48, adamw8bit 1.52 (0.614), in plain XLA 7.15,
  torchao's AdamW8bit 6.48; 992M 11.87, 8.35 (0.703), 42.0, 29.5, which that
  card, soon held back by its heat, took longer for than another (optax 9.35).
  One H200, jobs on the machine's other GPUs: 252M 1.80, 1.34 (0.746), 6.38,
  7.22; 992M 6.66, 4.48 (0.673), 25.7, 18.7. By the least bytes it would be
  0.57: of that floor the kernel takes 1.08 times at 252M, optax.adamw itself
  being at 85% of the H100's bandwidth. Peaks of parameters, gradients and
  states: 252M 3.75 GiB and 2.35, 992M 14.78 and 9.27. `ablation`, 63 runs on
  H200s, jax 0.11.2, three seeds; runs that diverged, and the mean held-out loss
  of the others in nats a byte, at 1e-3, 3e-3, 1e-2. 32 bits: none, .728, .824,
  1.440. Linear codes, one scale a tensor: all nine. Dynamic codes: none, .729,
  1.254, 1.785. Blocks: none, .727, .926, 1.446. Stable embedding: none, .746,
  1.012, 1.542. The root: none, .747, .991, 1.483; 32 bits with a stable
  embedding none, .746, 1.029, 1.596. So naive 8-bit diverges where 32 bits
  never do: replicated; a dynamic map alone mends that, with a worse loss from
  3e-3 on; blocks are as good as 32 bits at 1e-3 (.727 +-.003, .728 +-.003) and
  at 1e-2: replicated; a stable embedding is no gain here, with 32 bits neither
  (+.018 at 1e-3): refuted at this size. 95% intervals of means are +-.002 to
  .009 at 1e-3 and to +-.5 at 3e-3. `full`: not run; measured by us
Check: none
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax.numpy as jnp
import optax

from isthmus.data.library import PythonLibrary
from isthmus.data.text import Text
from isthmus.nets.transformer import Decoder
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.config import choose
from isthmus.train.jobs import Fit
from isthmus.train.loop import NonFiniteError
from isthmus.train.mesh import P
from isthmus.train.metrics.interval import interval
from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.quant8 import scale_by_adam8bit
from isthmus.train.optim.race import Race
from isthmus.train.study import Results, Study
from isthmus.train.tasks.lm import NextToken

# Rows are split; blocks lie along the last axis, as the kernel has them.
RULES = ((r"(attn|mlp)/\w+/kernel$", P("fsdp", None)),)
# One scale a tensor, whatever its size.
WHOLE = 2**30
# Each scheme is the one before with one thing changed; None is 32 bits. The
# last is the first with a stable embedding, to tell its part.
_TENSOR = {"flat": True, "block": WHOLE, "whole": None}
_BLOCKS = {"flat": True, "block": 2048, "whole": None}
_STABLE = {"flat": True, "block": 2048}
SCHEMES: dict[str, dict[str, Any] | None] = {
  "adam32": None,
  "linear": {"first": "linear", "second": "linear", "codes": _TENSOR},
  "dynamic": {"second": "plain", "codes": _TENSOR},
  "blocks": {"second": "plain", "codes": _BLOCKS},
  "stable": {"second": "plain", "codes": _STABLE},
  "root": {"second": "sqrt", "codes": _STABLE},
  "adam32-stable": None,
}
_WITH_STABLE = ("stable", "root", "adam32-stable")
# Nats a byte: what held-out source has by the frequencies of its bytes alone.
FREQUENCIES = 3.15
# Nats a byte that a run may end above the best it was evaluated at.
RISE = 0.5


def get_config(variant: str = "full") -> "Fit | Study | Race":
  """`full`, `ablation`, `speed`: an H100; `small`; two of `smoke`.

  `full` is one run, about a minute. `ablation` is 63 of them, by estimate 80 s
  each with what is compiled: nine calls of 10 minutes, each of which goes on
  where the last was stopped (`timeout -s INT 570 isthmus ...`). `small` is an
  ablation in a quarter of an hour on a CPU; `ablation_smoke` and `speed_smoke`
  are seconds.
  """
  return choose(
    {
      "full": _full,
      "smoke": _smoke,
      "ablation": _ablation,
      "small": _small,
      "ablation_smoke": _ablation_smoke,
      "speed": _speed,
      "speed_smoke": _speed_smoke,
    },
    variant,
  )


def _full() -> Fit:
  return Fit(
    model=Decoder(
      vocab_size=257,
      width=512,
      depth=8,
      num_heads=8,
      hidden=1536,  # whole blocks: the kernel takes no others
      dtype=jnp.bfloat16,
    ),
    task=NextToken(segments=False),
    data=Text(
      corpus=PythonLibrary(eval_fraction=0.08), seq_len=1024, segments=False
    ),
    optimizer=_optimizer(learning_rate=1e-3, warmup=100, block=256),
    steps=2000,
    batch_size=16,
    rules=RULES,
    save_every=500,
  )


def _smoke() -> Fit:
  return Fit(
    model=Decoder(vocab_size=257, width=32, depth=2, num_heads=4),
    task=NextToken(),
    data=Text(corpus=PythonLibrary(eval_fraction=0.002), seq_len=64),
    optimizer=_optimizer(learning_rate=1e-2, warmup=2, block=32, min_size=0),
    steps=8,
    batch_size=8,
    rules=RULES,
    log_every=1,
    save_every=4,
  )


def _optimizer(*, learning_rate: float, warmup: int, **codes: Any) -> Optimizer:
  return Optimizer(
    scale=functools.partial(
      scale_by_adam8bit, b2=0.95, codes=Codes(rules=RULES, **codes)
    ),
    learning_rate=learning_rate,
    warmup=warmup,
  )


def _ablation() -> Study:
  return Study(
    grid=functools.partial(
      grid,
      rates=(1e-3, 3e-3, 1e-2),
      sizes={"width": 512, "depth": 8, "num_heads": 8, "hidden": 1536},
      dtype=jnp.bfloat16,
      save_every=500,
    ),
    report=tell,
  )


def _small() -> Study:
  return Study(
    grid=functools.partial(
      grid,
      rates=(3e-3, 3e-2),
      sizes={"width": 64, "depth": 1, "num_heads": 4},
      seq_len=64,
      eval_fraction=0.01,
      steps=100,
      batch_size=16,
      warmup=10,
    ),
    report=tell,
  )


def _ablation_smoke() -> Study:
  return Study(
    grid=functools.partial(
      grid,
      rates=(1e-2,),
      schemes=("adam32", "blocks"),
      sizes={"width": 32, "depth": 1, "num_heads": 4, "hidden": 64},
      seq_len=32,
      eval_fraction=0.002,
      steps=2,
      batch_size=8,
    ),
    seeds=2,
    report=tell,
  )


def _speed() -> Race:
  sizes: dict[str, Any] = {"vocab_size": 32768, "num_heads": 16}
  return Race(
    models={
      "252M": Decoder(width=1024, depth=17, hidden=2816, **sizes),
      "992M": Decoder(width=2048, depth=18, hidden=5632, **sizes),
    }
  )


def _speed_smoke() -> Race:
  model = Decoder(vocab_size=64, width=32, depth=1, num_heads=2, hidden=128)
  return Race(models={"small": model}, rounds=2, calls=1)


# --- the ablation ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Fit):
  """A run whose end may be that it diverges: the figure `diverged`, 0 or 1.

  It has if a loss, gradient or parameter was no number; if its last evaluation
  is above `FREQUENCIES`, which takes no model; or above the least one of the
  run by more than `RISE`.
  """

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    try:
      return super().run(workdir, source=source, force=force)
    except NonFiniteError as error:
      log.say(str(error))
    results, path = {"diverged": 1.0}, pathlib.Path(workdir).absolute()
    with folder.lock(path):
      log.write_results(path, results)
    return results


def judge(
  job: Fit, workdir: pathlib.Path, params: Any, results: dict[str, float]
) -> dict[str, float]:
  """`diverged` of a run that came to its end; see `Trial`."""
  del job, params
  losses = [r["eval/loss"] for r in log.read(workdir) if r.get("eval/loss")]
  last = results["eval/loss"]
  least = min([last, *losses])
  return {"diverged": float(last > FREQUENCIES or last > least + RISE)}


def grid(
  *,
  rates: tuple[float, ...],
  sizes: dict[str, Any],
  schemes: tuple[str, ...] = tuple(SCHEMES),
  dtype: Any = jnp.float32,
  seq_len: int = 1024,
  eval_fraction: float = 0.08,
  steps: int = 2000,
  batch_size: int = 16,
  warmup: int = 100,
  save_every: int = 0,
) -> dict[str, Fit]:
  """`SCHEME/lrRATE` -> Trial.

  Args:
    rates: learning rates, of every scheme.
    sizes: of the decoder. Its layers are written out: a tensor is one layer's.
    schemes: of `SCHEMES`.
    dtype: of the decoder.
    seq_len, eval_fraction: of the text.
    steps, batch_size, warmup, save_every: the same for every run.
  """
  trials = {}
  for scheme, rate in itertools.product(schemes, rates):
    settings = SCHEMES[scheme]
    scale = functools.partial(optax.scale_by_adam, b1=0.9, b2=0.95)
    if settings is not None:
      settings = settings | {"codes": Codes(**settings["codes"])}
      scale = functools.partial(scale_by_adam8bit, b2=0.95, **settings)
    trials[f"{scheme}/lr{rate:g}"] = Trial(
      model=Decoder(
        vocab_size=257,
        dtype=dtype,
        scan=False,
        stable_embedding=scheme in _WITH_STABLE,
        **sizes,
      ),
      task=NextToken(segments=False),
      data=Text(
        corpus=PythonLibrary(eval_fraction=eval_fraction),
        seq_len=seq_len,
        segments=False,
      ),
      optimizer=Optimizer(scale=scale, learning_rate=rate, warmup=warmup),
      steps=steps,
      batch_size=batch_size,
      eval_every=max(steps // 10, 1),
      log_every=max(steps // 100, 1),
      save_every=save_every,
      report=judge,
    )
  return trials


def tell(
  study: Study, workdir: pathlib.Path, results: Results
) -> dict[str, float]:
  """ablation.json, report.md, ablation.png; figures of each case."""
  rows, figures = [], {}
  for case, runs in results.items():
    scheme, rate = case.split("/lr")
    ended = [run["eval/loss"] for run in runs if not run["diverged"]]
    row: dict[str, Any] = {
      "scheme": scheme,
      "learning_rate": float(rate),
      "runs": len(runs),
      "diverged": len(runs) - len(ended),
      "loss": sum(ended) / len(ended) if ended else None,
      "losses": ended,
    }
    if len(ended) > 1:
      row["low"], row["high"] = interval(ended)[1:]
    rows.append(row)
    figures[f"{case}/diverged"] = row["diverged"] / len(runs)
    if ended:
      figures[f"{case}/loss"] = row["loss"]
  log.write_json(workdir / "ablation.json", rows)
  rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
  lines = [
    f"Held-out loss, nats a byte, of runs that did not diverge; {study.seeds}"
    " seeds, 95% intervals. A run has diverged if a loss, gradient or parameter"
    f" was no number, if it ends above {FREQUENCIES} (the frequencies of bytes"
    f" alone), or more than {RISE} above its own best evaluation.",
    "",
    "| scheme | "
    + " | ".join(f"diverged, loss at {r:g}" for r in rates)
    + " |",
    "|---|" + "---|" * len(rates),
  ]
  for scheme, cells in itertools.groupby(rows, key=lambda row: row["scheme"]):
    lines.append(f"| {scheme} | " + " | ".join(map(_cell, cells)) + " |")
  text = "\n".join(lines)
  print(text)
  (workdir / "report.md").write_text(text + "\n")
  _plot(rows, rates, workdir / "ablation.png")
  return figures


def _cell(row: dict[str, Any]) -> str:
  text = f"{row['diverged']}/{row['runs']}"
  if row["loss"] is None:
    return text
  text += f", {row['loss']:.3f}"
  return text + (
    f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
  )


def _plot(
  rows: list[dict[str, Any]], rates: list[float], path: pathlib.Path
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 4), layout="constrained")
  FigureCanvasAgg(figure)
  share, loss = figure.subplots(1, 2)
  schemes = list(dict.fromkeys(row["scheme"] for row in rows))
  for i, rate in enumerate(rates):
    found = [row for row in rows if row["learning_rate"] == rate]
    shift = (i - (len(rates) - 1) / 2) / (len(rates) + 1)
    at = [schemes.index(row["scheme"]) + shift for row in found]
    shares = [row["diverged"] / row["runs"] for row in found]
    share.bar(
      at, shares, 1 / (len(rates) + 1), color=f"C{i}", label=f"rate {rate:g}"
    )
    for x, row in zip(at, found, strict=True):
      loss.plot([x] * len(row["losses"]), row["losses"], "o", color=f"C{i}")
  share.set_ylim(0, 1)
  share.set_ylabel("share of runs that diverged")
  share.legend()
  loss.set_ylabel("held-out loss of the others, nats a byte")
  for axes in (share, loss):
    axes.set_xticks(range(len(schemes)), schemes, rotation=30)
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
