"""The training loop. There is one; nobody forks it.

New behaviour enters through a task, an optimiser, a data set or a report.
"""

import contextlib
import math
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from isthmus.data.loader import Loader
from isthmus.train import log, mesh, sequence, stop
from isthmus.train.ckpt import Checkpointer
from isthmus.train.config import ConfigError
from isthmus.train.speed import Speed
from isthmus.train.state import TrainState, make_init, make_step

if TYPE_CHECKING:
  from isthmus.train.jobs import Fit


class NonFiniteError(ArithmeticError):
  """A loss, gradient or parameter that is no number; names the step."""


def due(step: int, every: int | None, last: int) -> bool:
  """Whether something done every `every` steps, and at the end, is due.

  `step` counts the steps done; `None` means at the end only, 0 never.

  Example:
    >>> [step for step in range(1, 8) if due(step, 3, last=7)]
    [3, 6, 7]
    >>> [step for step in range(1, 8) if due(step, None, last=7)]
    [7]
  """
  if every == 0:
    return False
  return step == last or (every is not None and step % every == 0)


def _compiler_options(model):
  """What the gradient of the model is compiled with besides XLA's defaults."""
  if "isthmus.nets.reversible" not in sys.modules:
    return None  # no module of the model is: a start need not wait for it
  from isthmus.nets import reversible
  from isthmus.nets.stack import is_reversible

  return reversible.COMPILER_OPTIONS if is_reversible(model) else None


class Run:
  """What a job needs before its first step: mesh, data, shapes, functions.

  Example:
    >>> from isthmus.train.config import load
    >>> run = Run(load("quickstart:smoke"))  # nothing is compiled yet
    >>> run.target.params["norm"]["scale"].shape
    (32,)
  """

  def __init__(self, job: "Fit"):
    self.job = job
    self.mesh = job.mesh.build()
    rows = NamedSharding(self.mesh, mesh.ROWS)
    arrange = sequence.arrangement(job, self.mesh)
    self.train = Loader(
      job.data.open("train"),
      batch_size=job.batch_size,
      seed=job.seed,
      transform=job.transform,
      sharding=rows,
      arrange=arrange,
    )
    self.eval = None
    if job.eval_every != 0:
      self.eval = Loader(
        job.data.open("eval"),
        batch_size=job.eval_batch_size or job.batch_size,
        seed=job.seed,
        shuffle=False,
        sharding=rows,
        arrange=arrange,
      )
    one = {k: np.asarray(v)[None] for k, v in self.train.source[0].items()}
    self.batch = {
      k: jax.ShapeDtypeStruct((job.batch_size, *v.shape[1:]), v.dtype)
      for k, v in (one if arrange is None else arrange(one)).items()
    }
    tx = job.transformation()
    self._init = make_init(
      job.model, job.task, tx, self.batch, seed=job.seed, ema=job.ema
    )
    with jax.set_mesh(self.mesh):
      shapes = jax.eval_shape(self._init)
      if arrange is not None:
        sequence.check(job, shapes, self.batch)
    self.shardings = mesh.shardings(shapes, job.rules, self.mesh)
    self.target = mesh.structs(shapes, self.shardings)
    copied = NamedSharding(self.mesh, PartitionSpec())
    step = make_step(
      job.model, job.task, tx, accumulate=job.accumulate, ema=job.ema
    )
    schedule = job.schedule()

    def train_step(state, batch):
      new, metrics = step(state, batch)
      if schedule is not None:  # here, for outside it would be 12 more kernels
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
      return new, metrics

    self.step = jax.jit(
      train_step,
      donate_argnums=0,
      out_shardings=(self.shardings, copied),
      compiler_options=_compiler_options(job.model),
    )
    self._evaluate = jax.jit(
      lambda p, m, b: job.task.evaluate(job.model, p, m, b),
      out_shardings=copied,
    )
    self._finite = jax.jit(_all_finite, out_shardings=copied)

  def init(self) -> TrainState:
    """The first state, born on the devices it stays on."""
    return jax.jit(self._init, out_shardings=self.shardings)()

  def finite(self, state: TrainState) -> bool:
    """Whether what a model is used with holds numbers only."""
    used = (state.params, state.mutables, state.ema)
    return bool(jax.device_get(self._finite(used)))

  def evaluate(
    self, state: TrainState, asked: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """The task's metrics over the whole evaluation set, once.

    Args:
      state: what to evaluate.
      asked: looked at before each batch; once it is true, None is returned.
    """
    if self.eval is None:
      return {}
    params = state.params if state.ema is None else state.ema
    total: dict[str, float] = {}
    with contextlib.closing(self.eval.once()) as batches:
      for batch in batches:
        if asked():
          return None
        sums = jax.device_get(self._evaluate(params, state.mutables, batch))
        for k, v in sums.items():
          total[k] = total.get(k, 0.0) + float(v)
    return self.job.task.summarize(total)


def fit(job: "Fit", workdir: pathlib.Path) -> dict[str, float]:
  """Trains `job` in `workdir`, from its last good checkpoint if it has one.

  Returns:
    Metrics of the end: `step`, `train/...`, `eval/...`, speed. A run stopped
    by SIGTERM or Ctrl-C has saved its state, and `interrupted` is 1.

  Raises:
    ConfigError: settings that don't fit each other, the data or the devices.
    NonFiniteError: a loss, gradient norm or parameter that is no number.
    CheckpointError: no checkpoint of the folder can be trusted.
    RunError: the disk, the folder or another process was lost on the way.

  Example:
    >>> from isthmus.data.source import Arrays
    >>> from isthmus.nets.mlp import Mlp
    >>> from isthmus.train.jobs import Fit
    >>> from isthmus.train.optim.chain import Optimizer
    >>> from isthmus.train.tasks.classify import Classify
    >>> rows = {
    ...   "image": np.eye(8, dtype=np.float32),
    ...   "label": np.arange(8, dtype=np.int32),
    ... }
    >>> job = Fit(
    ...   model=Mlp(16),
    ...   task=Classify(),
    ...   data=Arrays(train=rows, eval=rows),
    ...   optimizer=Optimizer(),
    ...   steps=2,
    ...   batch_size=8,
    ... )
    >>> results = fit(job, pathlib.Path("run").absolute())
    >>> results["step"], sorted(k for k in results if k.startswith("eval/"))
    (2.0, ['eval/accuracy', 'eval/loss'])
  """
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    asked = stack.enter_context(stop.requests())

    # --- mesh, data, shapes ---
    try:
      run = Run(job)
    except (ValueError, FileNotFoundError, ImportError) as error:
      raise ConfigError(" ".join(str(error).split())) from error
    stack.enter_context(jax.set_mesh(run.mesh))

    # --- state: restored if there is one, else new ---
    ckpt = stack.enter_context(Checkpointer(workdir / "ckpt", keep=job.keep))
    restored = ckpt.restore(run.target)
    start, state = (0, run.init()) if restored is None else restored
    if first:
      count = sum(x.size for x in jax.tree.leaves(run.target.params))
      where = f"resuming at step {start}" if start else "starting"
      log.say(
        f"{where}: {log.si(count)} parameters, {run.mesh.devices.size} x "
        f"{jax.devices()[0].device_kind}, in {workdir}"
      )

    # --- logs ---
    # The run was stopped before an evaluation, or its settings were others.
    owed = bool(start) and due(start, job.eval_every, job.steps)
    owed = owed and not (ckpt.extra(start) or {}).get("evaluated")
    writer = log.Writer(
      workdir, step=start, again="eval" if owed else None, enabled=first
    )
    stack.callback(writer.close)
    bar = log.Bar("train", steps=job.steps, start=start, enabled=first)
    stack.callback(bar.close)
    speed = Speed(run)
    trace = _Trace(job.profile, workdir)
    stack.callback(trace.stop)
    stack.enter_context(stop.ending())

    latest: dict[str, float] = {}
    rates: dict[str, float] = {}
    evaluated: dict[str, float] = {}

    def poisoned(what: str) -> None:
      ckpt.wait()
      last = ckpt.latest()
      raise NonFiniteError(
        f"{what}; "
        + (
          "nothing was saved"
          if last is None
          else f"the last checkpoint is of step {last}"
        )
      )

    def evaluate(step: int) -> bool:
      """False if it was broken off by a request to stop."""
      nonlocal evaluated
      found = run.evaluate(state, lambda: asked.asked)
      if found is not None:
        evaluated = found
        writer.write(step, evaluated, "eval")
      return found is not None

    def finish(step: int, metrics: dict[str, jax.Array]) -> None:
      """Fetches a step's metrics, and stops the run if they are no numbers."""
      nonlocal latest, rates
      latest = {k: float(v) for k, v in jax.device_get(metrics).items()}
      speed.tick(step)
      for name in ("loss", "grad_norm"):
        if not math.isfinite(latest[name]):
          poisoned(f"{name} is {latest[name]} at step {step}")
      if due(step, job.log_every, job.steps):
        fresh = speed.recent()
        latest.update(fresh)
        rates = fresh or rates
        writer.write(step, latest)
      shown = f"loss {latest['loss']:.4f}", speed.text(rates)
      bar.update(step, ", ".join(filter(None, shown)))

    def stopped(step: int) -> dict[str, float]:
      bar.close()
      if first:
        log.say(
          f"stopped at step {step}, saved; the same command goes on from it"
          if step
          else "stopped before the first step; the same command starts it"
        )
      return {"step": float(step), "interrupted": 1.0}

    if asked.asked:
      return stopped(start)
    if owed and not evaluate(start):
      return stopped(start)

    # --- train; a step's metrics are fetched when the next one is under way ---
    pending: tuple[int, dict[str, jax.Array]] | None = None
    done = start
    batches = stack.enter_context(
      contextlib.closing(run.train.iterate(start, job.steps))
    )
    for step, batch in batches:
      trace.before(step, state)
      with jax.transfer_guard("disallow"):
        state, metrics = run.step(state, batch)
      done = step + 1
      if pending is not None:
        finish(*pending)
      pending = (done, metrics)
      halt = asked.at(done) and done < job.steps
      saving = halt or due(done, job.save_every, job.steps)
      evaluating = not halt and due(done, job.eval_every, job.steps)
      if not (saving or evaluating):
        continue
      finish(*pending)  # nothing that isn't known to be finite is saved
      pending = None
      if not run.finite(state):
        poisoned(f"a parameter is not finite after step {done}")
      if evaluating and not evaluate(done):  # before the save: a step that is
        evaluating, saving, halt = False, True, True  # saved has its records
      if saving:
        ckpt.save(done, state, extra={"evaluated": evaluating}, wait=halt)
      if halt:
        return stopped(done)
      speed.pause()
    if pending is not None:
      finish(*pending)

    # --- the end ---
    ckpt.wait()
    bar.close()
    if job.eval_every != 0 and not evaluated:
      again = run.evaluate(state, lambda: asked.asked)
      if again is None:
        return stopped(done)
      evaluated = again
    whole = speed.metrics()
    results = {"step": float(done), **whole}
    results.update(
      {f"train/{k}": v for k, v in latest.items() if k not in whole}
    )
    results.update({f"eval/{k}": v for k, v in evaluated.items()})
    results.update(_memory())
    params = state.params if state.ema is None else state.ema
    if job.report is not None:
      params = _gather(params)
    if first:
      if start == done:  # nothing was left to train: what the run had found
        results = {**log.read_results(workdir), **results}
      if job.report is not None:
        results.update(job.report(job, workdir, params, results))
      picture = log.plot_losses(workdir, workdir.name)
      if picture is not None:
        log.say(f"loss curve: {picture}")
      log.write_results(workdir, results)
    return results


class _Trace:
  """A profiler trace of steps [first, last) on request."""

  def __init__(self, steps: tuple[int, int] | None, workdir: pathlib.Path):
    self._steps, self._path, self._on = steps, workdir / "trace", False

  def before(self, step: int, state: TrainState) -> None:
    """Step `step`, counted from 0, is next."""
    if self._steps is None:
      return
    first, last = self._steps
    if not self._on and first <= step < last:  # a resumed run may start inside
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._path)
      self._on = True
    elif self._on and step >= last:
      jax.block_until_ready(state)
      self.stop()

  def stop(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
      log.say(f"profiler trace: {self._path}")


def _all_finite(tree: Any) -> jax.Array:
  floats = (
    x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)
  )
  return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floats]))


def _gather(params: Any) -> Any:
  """The whole of each array for a report, which one process alone makes."""
  if jax.process_count() == 1:
    return params
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(params, tiled=True)


def _memory() -> dict[str, float]:
  """Peak bytes of the first local device, where its backend counts them."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak_bytes = stats.get("peak_bytes_in_use")
  return {} if peak_bytes is None else {"peak_gib": peak_bytes / 2**30}
