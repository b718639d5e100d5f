"""Jobs: what a recipe returns and the command line runs.

Each is a frozen dataclass with `run(workdir) -> dict[str, float]`.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from isthmus.data.source import Dataset
from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.mesh import Mesh, Rules
from isthmus.train.optim.chain import Optimizer
from isthmus.train.tasks.task import Task

#: (job, workdir, params, results) -> more results.
Report = Callable[
  ["Fit", pathlib.Path, Any, dict[str, float]], dict[str, float]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """Trains a model.

  Attributes:
    model: a Linen module.
    task: what is minimised and evaluated (`isthmus.train.tasks`).
    data: a data set with the splits `train` and `eval` (`isthmus.data`).
    optimizer: an `Optimizer`, or any optax transformation.
    steps: optimiser steps.
    batch_size: rows of a step, over all devices and micro-batches.
    mesh: devices along each axis.
    rules: (regex on a parameter's path, PartitionSpec of its last axes).
    seed: of the parameters, the order of the data, dropout.
    accumulate: micro-batches a step.
    ema: decay of the running average of the parameters, or None; with one,
      evaluation and generation use the average.
    transform: `(example, rng) -> example`, on training rows only.
    eval_every: steps between evaluations; None: at the end; 0: never.
    eval_batch_size: rows of an evaluation batch; None: `batch_size`.
    log_every: steps between records.
    save_every: steps between checkpoints; None: at the end; 0: never, but
      for a run that is stopped.
    keep: newest checkpoints kept.
    profile: (first, last) steps of a profiler trace, counted from 0, `last`
      left out; or None.
    report: what to make of the finished run: comparisons, plots, samples.

  Example:
    >>> from isthmus.data.source import Arrays
    >>> from isthmus.nets.mlp import Mlp
    >>> from isthmus.train.tasks.classify import Classify
    >>> rows = {
    ...   "image": np.eye(8, dtype=np.float32),
    ...   "label": np.arange(8, dtype=np.int32),
    ... }
    >>> job = Fit(
    ...   model=Mlp(16),  # as many logits as inputs
    ...   task=Classify(),
    ...   data=Arrays(train=rows, eval=rows),
    ...   optimizer=Optimizer(learning_rate=0.1),
    ...   steps=20,
    ...   batch_size=8,
    ... )
    >>> results = job.run("runs/identity")
    >>> results["step"], results["eval/accuracy"]
    (20.0, 1.0)
  """

  model: nn.Module
  task: Task
  data: Dataset
  optimizer: Optimizer | optax.GradientTransformation
  steps: int
  batch_size: int
  mesh: Mesh = Mesh()
  rules: Rules = ()
  seed: int = 0
  accumulate: int = 1
  ema: float | None = None
  transform: Callable[..., Any] | None = None
  eval_every: int | None = None
  eval_batch_size: int | None = None
  log_every: int = 10
  save_every: int | None = None
  keep: int = 3
  profile: tuple[int, int] | None = None
  report: Report | None = None

  def __post_init__(self):
    for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    for name in ("save_every", "eval_every"):
      value = getattr(self, name)
      if value is not None and value < 0:
        raise ValueError(f"{name} is {value}; it is at least 0, or None")
    if self.eval_batch_size is not None and self.eval_batch_size < 1:
      raise ValueError(f"eval_batch_size is {self.eval_batch_size}; at least 1")
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"batch_size {self.batch_size} is not divisible by accumulate "
        f"{self.accumulate}"
      )
    if self.ema is not None and not 0 <= self.ema < 1:
      raise ValueError(f"ema is {self.ema}; it is at least 0 and below 1")
    if self.profile is not None:
      first, last = self.profile
      if not 0 <= first < last <= self.steps:
        raise ValueError(
          f"profile is ({first}, {last}), not a range of {self.steps} steps"
        )
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed is {self.seed}; it is between 0 and 2^32 - 1")

  def transformation(self) -> optax.GradientTransformation:
    """The optax transformation for a run of `steps` steps."""
    if isinstance(self.optimizer, Optimizer):
      return self.optimizer.build(self.steps)
    return self.optimizer

  def schedule(self) -> optax.Schedule | None:
    """The learning rate by step, where the optimiser tells it."""
    if isinstance(self.optimizer, Optimizer):
      return self.optimizer.schedule(self.steps)
    return None

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Trains in `workdir`; goes on from a checkpoint that is there.

    Args:
      workdir: folder of the checkpoints, logs and plots; made if missing.
      source: how the command line builds this job again.
      force: go on although the folder's run has other settings.
    """
    from isthmus.train.loop import fit

    path = pathlib.Path(workdir).absolute()
    if jax.process_index() != 0:  # the first process holds the folder
      return fit(self, path)
    with folder.lock(path):
      folder.record(path, self, source=source or {}, force=force)
      return fit(self, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
  """Samples text from a trained model.

  Attributes:
    model: the Linen module that was trained.
    tokenizer: of `isthmus.data.text`, with `encode` and `decode`.
    prompt: the text to go on from.
    length: tokens to generate.
    temperature: 0 is greedy.
    top_k, top_p: keep the k likeliest tokens, or the fewest whose
      probability reaches p; None keeps all.
    seed: of the samples.
    step: the checkpoint; None is the last good one.

  Example:
    >>> from isthmus.data.tokenizer import Bytes
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=257, width=8, depth=1, num_heads=2)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> job = Generate(model=model, tokenizer=Bytes(), prompt="def ", length=5)
    >>> len(job.text(params)) <= 5  # untrained, so it writes noise
    True
  """

  model: nn.Module
  tokenizer: Any
  prompt: str = ""
  length: int = 200
  temperature: float = 0.8
  top_k: int | None = None
  top_p: float | None = 0.95
  seed: int = 0
  step: int | None = None

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"length is {self.length}; it is at least 1")
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f"temperature is {self.temperature}; it is at least 0")
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k is {self.top_k}; it is at least 1, or None")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it is above 0 and at most 1")

  def run(self, workdir: str | pathlib.Path) -> dict[str, float]:
    """Prints the prompt and what follows it to stdout."""
    from isthmus.train.ckpt import restore_params

    path = pathlib.Path(workdir).absolute()
    step, params = restore_params(path / "ckpt", step=self.step)
    began = time.perf_counter()
    text = self.text(jax.tree.map(jax.numpy.asarray, params))
    print(self.prompt + text)
    return {
      "step": float(step),
      "tokens_per_second": self.length / (time.perf_counter() - began),
    }

  def text(self, params: Any) -> str:
    """The continuation of the prompt under `params`."""
    from isthmus.nets.sample.decode import generate

    pieces = self.tokenizer.encode([("prompt", self.prompt)])
    prompt = [tokens for tokens, _ in pieces]
    ids = np.concatenate([[self.tokenizer.start], *prompt]).astype(np.int32)
    out = generate(
      self.model,
      params,
      jax.numpy.asarray(ids[None]),
      length=self.length,
      key=jax.random.key(self.seed),
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
    )
    return self.tokenizer.decode(np.asarray(out)[0, -self.length :].tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One thing to time: a function of arrays, and the work it does.

  Attributes:
    function: called with `arguments()`; jitted by the caller if it should be.
    arguments: makes the arrays; random, for kernels run faster on zeros.
    flops: floating-point operations of a call, or None.
    bytes: bytes a call must move, or None.

  Example:
    >>> def squares():
    ...   return jax.random.normal(jax.random.key(0), (2, 64, 64))
    >>> case = Case(function=jnp.dot, arguments=squares, flops=2 * 64**3)
    >>> case.function(*case.arguments()).shape
    (64, 64)
  """

  function: Callable[..., Any]
  arguments: Callable[[], tuple[Any, ...]]
  flops: float | None = None
  bytes: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """Times cases side by side, in turn, and prints a table.

  Attributes:
    cases: name -> a function that builds the Case, so that nothing is
      allocated before its turn.
    rounds: times the whole list is gone through; the median is reported.
    calls: calls timed together in a round.

  Example:
    >>> def product():
    ...   return Case(
    ...     function=jnp.dot,
    ...     arguments=lambda: (jnp.eye(64), jnp.eye(64)),
    ...     flops=2 * 64**3,
    ...   )
    >>> results = Bench(cases={"product": product}, rounds=1).run("runs/bench")
    product ... ms ... TF/s
    >>> sorted(results)
    ['product/ms', 'product/tflops']
  """

  cases: Mapping[str, Callable[[], Case]]
  rounds: int = 5
  calls: int = 10

  def __post_init__(self):
    if not self.cases or self.rounds < 1 or self.calls < 1:
      raise ValueError(
        f"{len(self.cases)} cases, {self.rounds} rounds, {self.calls} calls: "
        "each is at least 1"
      )

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Writes bench.json into `workdir`; returns milliseconds by case."""
    path = pathlib.Path(workdir).absolute()
    with folder.lock(path):
      built = {name: build() for name, build in self.cases.items()}
      inputs = {name: case.arguments() for name, case in built.items()}
      for name, case in built.items():  # compiles; never timed
        jax.block_until_ready(case.function(*inputs[name]))
      seconds: dict[str, list[float]] = {name: [] for name in built}
      for _ in range(self.rounds):
        for name, case in built.items():
          began = time.perf_counter()
          for _ in range(self.calls):
            out = case.function(*inputs[name])
          jax.block_until_ready(out)
          seconds[name].append((time.perf_counter() - began) / self.calls)
      results = {}
      log.say(f"on {jax.devices()[0].device_kind}, median of {self.rounds}")
      for name, case in built.items():
        median = statistics.median(seconds[name])
        results[f"{name}/ms"] = median * 1e3
        line = f"{name:32s} {median * 1e3:10.3f} ms"
        if case.flops:
          results[f"{name}/tflops"] = case.flops / median / 1e12
          line += f" {case.flops / median / 1e12:8.1f} TF/s"
        if case.bytes:
          results[f"{name}/gbps"] = case.bytes / median / 1e9
          line += f" {case.bytes / median / 1e9:8.1f} GB/s"
        print(line)
      (path / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
      return results
