"""How fast a whole decoder reads a prompt, its attention over chosen blocks."""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention.bench import run
from isthmus.attention.bench.clock import Clock, build
from isthmus.attention.bench.ways import kept_share, way
from isthmus.attention.sdpa import attention
from isthmus.nets.lm.llama import decoder
from isthmus.pallas.dispatch import platform
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.prefill_speed import PrefillSpeed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillDeep:
  """Times the prefill of a Llama up to its next token, by each way of choosing.

  Weights are drawn, and with them queries and keys would attend to everything
  alike. So every layer attends with the same arrays of a `PrefillSpeed`, to
  which a thousandth of its own are added: all of a layer's work is done, the
  choice among it, and each layer reads about the share of blocks that those
  arrays make a way read. The time is that of a model with such queries and
  keys; what it says is nothing.

  Attributes:
    arrays: where queries and keys come from, the ways, and how long to time.
    source: of its sources, "drawn" or "read".
    width, depth, hidden, vocab_size: of the decoder; its heads are the arrays'.
    dtype: of weights and of what is multiplied.

  Raises:
    ValueError: sizes below 1, no such source.

  Example:
    >>> arrays = PrefillSpeed(levels={"mass": (0.9,)}, lengths=(32768,))
    >>> job = PrefillDeep(arrays=arrays, source="drawn")
    >>> round(job.model(attention).param_count() / 1e9, 2)
    8.03
  """

  arrays: PrefillSpeed
  source: str = "read"
  width: int = 4096
  depth: int = 32
  hidden: int = 14336
  vocab_size: int = 128256
  dtype: Any = jnp.bfloat16

  def __post_init__(self):
    for name in ("width", "depth", "hidden", "vocab_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    known = ("drawn",) if self.arrays.load is None else ("drawn", "read")
    if self.source not in known:
      raise ValueError(f"source {self.source!r} is none of {', '.join(known)}")

  def model(self, attend: Any) -> Any:
    """The decoder, with a mechanism of attention."""
    return decoder(
      {
        "model_type": "llama",
        "hidden_size": self.width,
        "intermediate_size": self.hidden,
        "num_hidden_layers": self.depth,
        "num_attention_heads": self.arrays.heads,
        "num_key_value_heads": self.arrays.kv_heads,
        "head_dim": self.arrays.width,
        "vocab_size": self.vocab_size,
        "rope_theta": 5e5,
      },
      attend=attend,
      dtype=self.dtype,
      param_dtype=self.dtype,
    )

  def params(self) -> Any:
    """Drawn weights: normal of variance 1 / inputs; norms of 1."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(
      self.model(attention).init, jax.random.key(0), tokens
    )["params"]

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):
      x = jax.random.normal(key, shape, self.dtype)
      return x * jnp.asarray(shape[-2] ** -0.5, self.dtype)

    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
      jnp.ones(x.shape, self.dtype)
      if path[-1].key == "scale"
      else draw(key, x.shape)
      for key, (path, x) in zip(keys, leaves, strict=True)
    )

  def prefill(self, attend: Any) -> Any:
    """`f(params, tokens, q, k, trace)` -> logits of the next token [1 v]."""

    def call(params, tokens, q, k, trace):
      own = functools.partial(_held, arrays=(q, k), trace=trace, attend=attend)
      model = self.model(own)
      _, aux = model.apply({"params": params}, tokens)
      last = aux["hidden"][:, -1:]
      return model.apply({"params": params}, last, method="project")[:, 0]

    return call

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes deep.json, deep.md and deep.png into `workdir`.

    Returns:
      Of each length T `T/dense/ms`, on a GPU `T/cudnn/ms`, and of each way
      `T/WAY=LEVEL/ms` and `.../kept`, the share of causal blocks that are
      read.
    """
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      began, results = time.monotonic(), {}
      clock = Clock(self.arrays.rounds, self.arrays.round_seconds)
      machine = run.machine(clock)
      make = self.arrays.sources()[self.source]
      params = self.params()
      for length in self.arrays.lengths:
        results |= self._length(length, make(length), params, clock, began)
        log.write_json(path / "deep.json", {"machine": machine} | results)
      if not results:
        raise RuntimeError("nothing was measured: see what was said")
      title = f"{machine['device']}, jax {machine['jax']}, {self.source}"
      text = f"{title}\n\n{table(results)}"
      print(text)
      (path / "deep.md").write_text(text + "\n")
      _plot(results, path / "deep.png", title)
      log.write_results(path, results)
      return results

  def _length(self, length, arrays, params, clock, began) -> dict[str, float]:
    q, k, _ = arrays
    tokens = np.random.default_rng(0).integers(
      self.vocab_size, size=(1, length)
    )
    given = (
      params,
      jnp.asarray(tokens, jnp.int32),
      q.astype(self.dtype),
      k.astype(self.dtype),
      jnp.asarray(1e-3, self.dtype),
    )
    cases: dict[str, tuple[Any, Any]] = {"dense": (attention, None)}
    if platform() == "gpu":
      cases["cudnn"] = (_cudnn, None)
    for name, level in self.arrays.wanted:
      chosen = way(name, level, block=self.arrays.block, length=length)
      cases[f"{name}={level:g}"] = (chosen.attend, chosen.select)
    found, limit = {}, self.arrays.seconds
    for name, (attend, select) in cases.items():
      if limit and time.monotonic() - began > limit:
        log.say(f"{length}/{name}: there was no time left")
        continue
      try:
        program = build(self.prefill(attend), *given)
        ms = clock.seconds_of(program, [given]) * 1e3
      except Exception as error:
        log.say(f"{length}/{name}: {type(error).__name__}: {error}")
        continue
      found[f"{length}/{name}/ms"] = ms
      if select is not None:
        kept = jax.jit(lambda q, k, f=select: kept_share(f(q, k)))(q, k)
        found[f"{length}/{name}/kept"] = float(kept)
      log.say(f"{length}/{name}: {ms:.1f} ms")
    return found


def _held(q, k, v, *, arrays, trace, attend, **settings):
  """Attends with other queries and keys, and a trace of the layer's own."""
  q, k = (a + trace * x for a, x in zip(arrays, (q, k), strict=True))
  return attend(q, k, v, **settings)


def _cudnn(q, k, v, *, causal=True):
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="cudnn"
  )


def table(results: dict[str, float]) -> str:
  """Markdown: a line for each length and case, with the speed over dense.

  Example:
    >>> found = {"64/dense/ms": 4.0, "64/mass=0.9/ms": 2.0}
    >>> print(table(found | {"64/mass=0.9/kept": 0.25}))
    | tokens | case | ms | blocks | over dense | over cudnn |
    |---|---|---|---|---|---|
    | 64 | dense | 4.0 | 1.000 | 1.00x |  |
    | 64 | mass=0.9 | 2.0 | 0.250 | 2.00x |  |
  """
  lines = [
    "| tokens | case | ms | blocks | over dense | over cudnn |",
    "|---|---|---|---|---|---|",
  ]
  for name, ms in results.items():
    length, case, metric = name.split("/")
    if metric != "ms":
      continue
    over = [
      f"{results[base] / ms:.2f}x" if base in results else ""
      for base in (f"{length}/dense/ms", f"{length}/cudnn/ms")
    ]
    kept = results.get(f"{length}/{case}/kept", 1.0)
    lines.append(
      f"| {length} | {case} | {ms:.1f} | {kept:.3f} | {' | '.join(over)} |"
    )
  return "\n".join(lines)


def _plot(results, path, title) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.5, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  names = [name.split("/") for name in results if name.endswith("/ms")]
  for i, case in enumerate(dict.fromkeys(case for _, case, _ in names)):
    lengths = sorted(int(t) for t, one, _ in names if one == case)
    y = [results[f"{t}/{case}/ms"] for t in lengths]
    axes.plot(lengths, y, color=f"C{i}", marker="osv^D"[i % 5], label=case)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xlabel("tokens")
  axes.set_ylabel("ms to the next token")
  axes.legend(fontsize=7)
  figure.suptitle(title, fontsize=9)
  figure.savefig(path, dpi=110)
