"""What a run tells: a progress bar, JSONL, TensorBoard, a loss curve."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from isthmus.train.workdir import WorkdirError

METRICS = "metrics.jsonl"


def say(text: str) -> None:
  """One line for the person at the terminal, on stderr."""
  print(text, file=sys.stderr, flush=True)


def read(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The records of a run's metrics.jsonl; a line cut by a kill is left out."""
  path = workdir / METRICS
  if not path.is_file():
    return
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(record, dict):
      yield record


class Writer:
  """Records metrics by step; on resume, forgets steps after the restored one.

  Args:
    workdir: where metrics.jsonl and the `tensorboard` folder go.
    step: the step the run starts from; later records are dropped.
    enabled: False on every process but the first: nothing is written.

  Raises:
    WorkdirError: the folder can't be written to, or its disk is full; also
      when a record is written.
  """

  def __init__(
    self, workdir: pathlib.Path, *, step: int = 0, enabled: bool = True
  ):
    self.enabled = enabled
    self._file = self._board = None
    if not enabled:
      return
    path = self._path = workdir / METRICS
    with self._refusing():
      kept = [r for r in read(workdir) if r.get("step", 0) <= step]
      part = path.with_suffix(".part")
      part.write_text("".join(json.dumps(r) + "\n" for r in kept))
      part.replace(path)
      self._file = path.open("a")
      try:
        from tensorboardX import SummaryWriter
      except ImportError:
        say("TensorBoard files are off: pip install tensorboardX turns them on")
      else:
        self._board = SummaryWriter(
          str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )

  def write(self, step: int, metrics: dict[str, float], prefix: str = "train"):
    """One record: `{"step": s, "train/loss": x, ...}`."""
    if self._file is None:
      return
    named = {f"{prefix}/{k}": float(v) for k, v in metrics.items()}
    # JSON has no NaN: a figure that isn't one is null.
    record = {k: v if math.isfinite(v) else None for k, v in named.items()}
    with self._refusing():
      self._file.write(json.dumps({"step": step, **record}) + "\n")
      self._file.flush()
    if self._board is not None:
      for name, value in named.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      with contextlib.suppress(OSError):  # said when it was written
        self._file.close()
    if self._board is not None:
      self._board.close()

  @contextlib.contextmanager
  def _refusing(self) -> Generator[None, None, None]:
    try:
      yield
    except OSError as error:
      where = error.filename2 or error.filename or self._path
      raise WorkdirError(f"{where}: {error.strerror or error}") from error


class Bar:
  """The progress bar on a terminal; elsewhere a line at most every 10 s."""

  def __init__(
    self, name: str, *, steps: int, start: int, enabled: bool = True
  ):
    self.steps = steps
    self._last = -math.inf
    self._first: tuple[int, float] | None = None
    self._progress = None
    self._enabled = enabled
    self._name = name
    console = Console(stderr=True)
    if enabled and console.is_terminal:
      self._progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
      )
      self._progress.start()
      self._row = self._progress.add_task(
        name, total=steps, completed=start, text=""
      )

  def update(self, step: int, text: str) -> None:
    if self._progress is not None:
      self._progress.update(self._row, completed=step, text=text)
      return
    now = time.monotonic()
    if self._enabled and (step >= self.steps or now - self._last >= 10):
      self._last = now
      say(f"{self._name} {step}/{self.steps} {text}{self._left(step, now)}")

  def _left(self, step: int, now: float) -> str:
    """Time to the end, by the steps after the first one, which compiles."""
    if self._first is None:
      self._first = step, now
    began, at = self._first
    if not began < step < self.steps:
      return ""
    seconds = (now - at) / (step - began) * (self.steps - step)
    return f", {_clock(seconds)} left"

  def close(self) -> None:
    if self._progress is not None:
      self._progress.stop()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02d}:{seconds:02d}"
    if hours
    else f"{minutes}:{seconds:02d}"
  )


def si(value: float) -> str:
  """12_300_000 -> '12.3M'."""
  for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor:
      return f"{value / factor:.3g}{letter}"
  return f"{value:.3g}"


def plot_losses(workdir: pathlib.Path, title: str) -> pathlib.Path | None:
  """Draws loss.png from metrics.jsonl: training loss, and evaluations on it."""
  series: dict[str, list[tuple[int, float]]] = {}
  for record in read(workdir):
    for name in ("train/loss", "eval/loss"):
      if record.get(name) is not None:
        series.setdefault(name, []).append((record["step"], record[name]))
  if not series:
    return None
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for name, points in series.items():
    steps, values = zip(*points, strict=True)
    few = len(points) < 40
    axes.plot(steps, values, "o-" if few else "-", label=name, linewidth=1.2)
  axes.set_xlabel("step")
  axes.set_ylabel("loss")
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend()
  path = workdir / "loss.png"
  figure.savefig(path, dpi=120)
  return path
