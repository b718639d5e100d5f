"""Steps a second, model FLOP/s, and the share of what a device can do."""

import collections
import math
import time
from typing import Any

import jax

from isthmus.train import log, peak

#: Seconds of training that a rate is of, at least: the clock is read when a
#: step's figures arrive, and of single steps that is early for some.
SHORTEST = 0.5


class Speed:
  """Steps a second of training: compiling, saving, evaluating left out.

  By a clock that only goes forward, whatever is done to the time of day.

  Args:
    run: a `Run` of `isthmus.train.loop`.

  Example:
    >>> from isthmus.train.config import load
    >>> from isthmus.train.loop import Run
    >>> speed = Speed(Run(load("quickstart:smoke")))
    >>> speed.tick(0)
    >>> time.sleep(0.01)
    >>> speed.tick(1)
    >>> figures = speed.metrics()
    >>> "tokens_per_second" in figures, "mfu_measured" in figures
    (True, True)
  """

  def __init__(self, run: Any):
    shapes = {k: v.shape for k, v in run.batch.items()}
    job = run.job
    self.unit, self.units, self.flops = job.task.throughput(job.model, shapes)
    devices = run.mesh.devices.size
    device = jax.local_devices()[0]
    self._sheet = peak.datasheet(device)
    self._ceiling = None if math.isnan(self.flops) else peak.measure(device)
    self._scale = 1.0 / devices
    self._mark: tuple[int, float] | None = None
    self._steps, self._seconds = 0, 0.0
    self._taken = collections.deque([self.take()])

  def tick(self, step: int) -> None:
    """Step `step` is done."""
    now = time.perf_counter()
    if self._mark is not None:
      self._steps += step - self._mark[0]
      self._seconds += now - self._mark[1]
    self._mark = (step, now)

  def pause(self) -> None:
    """What comes until the next tick isn't training."""
    self._mark = None

  def take(self) -> tuple[int, float]:
    """(steps, seconds) so far; a caller keeps them to measure a window."""
    return self._steps, self._seconds

  def metrics(self, since: tuple[int, float] = (0, 0.0)) -> dict[str, float]:
    """Rates since `since`, which is what `take` gave then; or of all."""
    steps, seconds = self._steps - since[0], self._seconds - since[1]
    if not steps or seconds <= 0:
      return {}
    rate = steps / seconds
    out = {
      "steps_per_second": rate,
      f"{self.unit}_per_second": rate * self.units,
    }
    if not math.isnan(self.flops):
      each = rate * self.flops * self._scale
      out["model_tflops_per_device"] = each / 1e12
      if self._ceiling:
        out["mfu_measured"] = each / self._ceiling
      if self._sheet:
        out["mfu_datasheet"] = each / self._sheet
    return out

  def recent(self) -> dict[str, float]:
    """Rates since the last call, or since an earlier one.

    It is the latest that is `SHORTEST` ago, or the first of all.
    """
    while (
      len(self._taken) > 1 and self._seconds - self._taken[1][1] >= SHORTEST
    ):
      self._taken.popleft()
    found = self.metrics(self._taken[0])
    self._taken.append(self.take())
    return found

  def text(self, metrics: dict[str, float]) -> str:
    """The figures of `metrics` that a progress bar has room for."""
    rate = metrics.get(f"{self.unit}_per_second")
    if rate is None:
      return ""
    parts = [f"{log.si(rate)} {self.unit}/s"]
    if "model_tflops_per_device" in metrics:
      parts.append(f"{metrics['model_tflops_per_device']:.3g} TF/s")
    for name in ("datasheet", "measured"):
      if f"mfu_{name}" in metrics:
        parts.append(f"MFU {metrics[f'mfu_{name}']:.0%} of {name}")
        break
    return ", ".join(parts)
