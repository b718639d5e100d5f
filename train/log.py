"""What a run tells: a progress bar, JSONL, TensorBoard, a loss curve."""

import contextlib
import contextvars
import json
import math
import pathlib
import shutil
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

from isthmus.train import manifest
from isthmus.train.board import Board
from isthmus.train.workdir import WorkdirError

METRICS = "metrics.jsonl"
RESULTS = "results.json"


_quiet = contextvars.ContextVar("quiet", default=False)


def say(text: str) -> None:
  """One line for the person at the terminal, on stderr.

  Example:
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...   say("saved")
    saved
  """
  if not _quiet.get() or text.startswith("warning"):
    with contextlib.suppress(OSError):  # a terminal that closed, a pipe's end
      print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
  """Inside it a run shows no bar and says nothing but warnings.

  Example:
    >>> with contextlib.redirect_stderr(sys.stdout), quiet():
    ...   say("one of a hundred runs")
    ...   say("warning: no room")
    warning: no room
  """
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)


def read(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The records of a run's metrics.jsonl; what is no record is left out.

  Example:
    >>> _ = pathlib.Path("metrics.jsonl").write_text('{"step": 1}\\n{"st')
    >>> list(read(pathlib.Path()))  # the last line was cut by a kill
    [{'step': 1}]
  """
  path = workdir / METRICS
  if path.is_file():
    for line in path.read_bytes().split(b"\n"):
      record = _parse(line)
      if record is not None:
        yield record


def _parse(line: bytes) -> dict[str, Any] | None:
  """A record: a step, and figures by name, of which some may be null."""
  try:
    record = json.loads(line.decode())
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or type(record.get("step")) is not int:
    return None
  figures = (v for v in record.values() if v is not None)
  if not all(_is_figure(v) and math.isfinite(v) for v in figures):
    return None  # what isn't finite was written as null
  return record


def _is_figure(value: Any) -> bool:
  """A number that a float holds; JSON's integers have no end."""
  if isinstance(value, int):
    return not isinstance(value, bool) and abs(value) < 2**1023
  return isinstance(value, float)


def _set_aside(path: pathlib.Path, what: str) -> None:
  """Keeps a damaged file under another name, and says so."""
  kept = path.with_name(path.name + ".damaged")
  shutil.copyfile(path, kept)
  say(f"warning: {path}: {what}; the file as it was is kept as {kept.name}")


class Writer:
  """Records metrics by step; on resume, forgets steps after the restored one.

  Args:
    workdir: where metrics.jsonl and the `tensorboard` folder go.
    step: the step the run starts from; later records are dropped.
    again: a prefix whose records of `step` are dropped as well, to be made
      again: a run may have died between them and its next save.
    enabled: False on every process but the first: nothing is written.

  Raises:
    WorkdirError: the folder can't be written to, or its disk is full; also
      when a record is written.

  Example:
    >>> writer = Writer(pathlib.Path())
    >>> writer.write(10, {"loss": 0.5})
    >>> writer.close()
    >>> list(read(pathlib.Path()))
    [{'step': 10, 'train/loss': 0.5}]
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    step: int = 0,
    again: str | None = None,
    enabled: bool = True,
  ):
    self.enabled = enabled
    self._file = self._board = None
    if not enabled:
      return
    path = self._path = workdir / METRICS
    with _refusing(path):
      if path.exists():
        # A last line without its end was cut by a kill; others were whole.
        *lines, _ = path.read_bytes().split(b"\n")
        bad = sum(bool(x.strip()) and _parse(x) is None for x in lines)
        if bad:
          _set_aside(path, f"{bad} of {len(lines)} lines are no records")
      kept = [r for r in read(workdir) if r["step"] <= step]
      if again is not None:
        old = lambda r: any(k.startswith(f"{again}/") for k in r)
        kept = [r for r in kept if r["step"] < step or not old(r)]
      manifest.write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
      self._file = path.open("a", encoding="utf-8")
      try:
        self._board = Board(
          workdir / "tensorboard", purge=step + 1 if step else None
        )
      except ImportError:
        say("TensorBoard files are off: pip install tensorboardX turns them on")

  def write(self, step: int, metrics: dict[str, float], prefix: str = "train"):
    """One record: `{"step": s, "train/loss": x, ...}`."""
    if self._file is None:
      return
    named = {f"{prefix}/{k}": float(v) for k, v in metrics.items()}
    # JSON has no NaN: a figure that isn't one is null.
    record = {k: v if math.isfinite(v) else None for k, v in named.items()}
    with _refusing(self._path):
      self._path.stat()  # an open file outlives its folder
      self._file.write(json.dumps({"step": step, **record}) + "\n")
      self._file.flush()
    if self._board is not None:
      with _refusing(self._board.path):
        self._board.write(step, named)

  def close(self) -> None:
    """Closes the files; what was written is in them already."""
    for file in (self._file, self._board):
      if file is not None:
        with contextlib.suppress(OSError):  # said when it was written
          file.close()


@contextlib.contextmanager
def _refusing(path: pathlib.Path) -> Generator[None, None, None]:
  try:
    yield
  except OSError as error:
    raise WorkdirError(refusal(error, path)) from error


def refusal(error: OSError, path: Any) -> str:
  """What went wrong with a file of the run, and what can be done.

  Example:
    >>> refusal(FileNotFoundError(2, "", "runs/a/metrics.jsonl"), None)
    'runs/a/metrics.jsonl is gone: the folder was deleted or moved ...'
  """
  where = error.filename2 or error.filename or path
  if isinstance(error, FileNotFoundError):
    return (
      f"{where} is gone: the folder was deleted or moved under the run; put it "
      "back, or run again to start anew"
    )
  return (
    f"{where}: {error.strerror or error}; the checkpoints are untouched, make "
    "room or mend access and run again"
  )


def write_results(workdir: pathlib.Path, results: dict[str, float]) -> None:
  """What a run ends with, as results.json.

  Raises:
    WorkdirError: it can't be written; an older one is as it was.

  Example:
    >>> write_results(pathlib.Path(), {"eval/loss": 0.5})
    >>> read_results(pathlib.Path())
    {'eval/loss': 0.5}
  """
  write_json(workdir / RESULTS, results)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file at once.

  Raises:
    WorkdirError: it can't be written; an older one is as it was.

  Example:
    >>> write_json(pathlib.Path("study.json"), {"small": [{"eval/loss": 0.5}]})
    >>> json.loads(pathlib.Path("study.json").read_text())
    {'small': [{'eval/loss': 0.5}]}
  """
  with _refusing(path):
    manifest.write_text(path, json.dumps(value, indent=1) + "\n")


def read_results(
  workdir: pathlib.Path, name: str = RESULTS
) -> dict[str, float]:
  """The figures of a run, so far or at its end; a damaged file is set aside.

  Example:
    >>> read_results(pathlib.Path())  # before a run's end
    {}
  """
  path = workdir / name
  with _refusing(path):
    if not path.exists():
      return {}
    try:
      found = json.loads(path.read_bytes().decode())
      if isinstance(found, dict) and all(map(_is_figure, found.values())):
        return found
    except (ValueError, RecursionError):
      pass
    _set_aside(path, "it holds no results, they are made again")
    return {}


class Bar:
  """The progress bar on a terminal; elsewhere a line at most every 10 s.

  Example:
    >>> with contextlib.redirect_stderr(sys.stdout):  # no terminal
    ...   bar = Bar("train", steps=8, start=0)
    ...   bar.update(8, "loss 0.5")
    ...   bar.close()
    train 8/8 loss 0.5
  """

  EVERY = 10.0  # seconds

  def __init__(
    self, name: str, *, steps: int, start: int, enabled: bool = True
  ):
    self.steps = steps
    self._last = -math.inf
    self._first: tuple[int, float] | None = None
    self._progress = None
    enabled = enabled and not _quiet.get()
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
    """Shows step `step` with a text beside it."""
    if self._progress is not None:
      with contextlib.suppress(OSError):  # its terminal has closed
        self._progress.update(self._row, completed=step, text=text)
      return
    now = time.monotonic()
    if self._enabled and (step >= self.steps or now - self._last >= self.EVERY):
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
    """Leaves the terminal to others."""
    if self._progress is not None:
      with contextlib.suppress(OSError):
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
  """12_300_000 -> '12.3M'.

  Example:
    >>> si(12_300_000), si(0.5)
    ('12.3M', '0.5')
  """
  for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor:
      return f"{value / factor:.3g}{letter}"
  return f"{value:.3g}"


def plot_losses(workdir: pathlib.Path, title: str) -> pathlib.Path | None:
  """Draws loss.png from metrics.jsonl: training loss, and evaluations on it.

  Raises:
    WorkdirError: it can't be written; an older one is as it was.

  Example:
    >>> writer = Writer(pathlib.Path())
    >>> for step in (1, 2, 3):
    ...   writer.write(step, {"loss": 1 / step})
    >>> writer.close()
    >>> plot_losses(pathlib.Path(), "a run").name
    'loss.png'
  """
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
  part = path.with_name("loss.part.png")
  with _refusing(path):
    try:
      figure.savefig(part, dpi=120)
      part.replace(path)
    finally:
      part.unlink(missing_ok=True)
  return path
