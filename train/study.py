"""A grid of training runs, several seeds each, and what they say together."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from isthmus.train import log
from isthmus.train import workdir as folder
from isthmus.train.config import ConfigError, flatten
from isthmus.train.jobs import Fit

#: Case -> the results of its run under each seed.
Results = Mapping[str, Sequence[Mapping[str, float]]]
#: (study, workdir, results) -> figures.
Report = Callable[["Study", pathlib.Path, Results], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Trains every case of a grid under several seeds, then reports on them.

  Each run has a folder of its own, `runs/CASE/SEED` below the study's. One
  that has ended is not run again, so a study that was stopped goes on where it
  was. Several processes may be started in one folder, on one machine or on
  several that share it: each takes the runs that no other has, and the one
  that ends the last run makes the report.

  Attributes:
    grid: a function without arguments that gives the cases, name -> Fit; with
      settings as keywords of a `functools.partial`, `--set grid.steps=100`
      changes all of them at once. A name is a path: words of letters, digits,
      `_`, `-` and `.` between slashes.
    seeds: runs of each case; the first has its Fit's own seed, the next ones
      count up from it.
    report: `(study, workdir, results) -> figures`: plots, tables, statements;
      results[case][i] are those of the i-th seed.

  Example:
    >>> import functools
    >>> from isthmus.train.config import load
    >>> def grid(steps):
    ...   return {
    ...     f"width{width}": load(
    ...       "quickstart:smoke", [f"model.width={width}", f"steps={steps}"]
    ...     )
    ...     for width in (32, 64)
    ...   }
    >>> study = Study(grid=functools.partial(grid, steps=4), seeds=2)
    >>> list(study.runs())
    ['width32/0', 'width64/0', 'width32/1', 'width64/1']
  """

  grid: Callable[[], Mapping[str, Fit]]
  seeds: int = 3
  report: Report | None = None

  def __post_init__(self):
    if self.seeds < 1:
      raise ValueError(f"seeds is {self.seeds}; it is at least 1")

  def runs(self) -> dict[str, Fit]:
    """Every run, `CASE/SEED` -> Fit, in the order they are taken.

    Raises:
      ConfigError: a grid that is empty or can't be built.
    """
    try:
      cases = dict(self.grid())
      runs = {
        f"{case}/{i}": dataclasses.replace(fit, seed=fit.seed + i)
        # Seed by seed: a study that is cut short has seen every case, and the
        # second seed finds the first one's programs compiled.
        for i in range(self.seeds)
        for case, fit in cases.items()
      }
    except (ValueError, TypeError) as error:
      raise ConfigError(f"grid: {' '.join(str(error).split())}") from error
    if not runs:
      raise ConfigError("grid: it holds no case")
    for name in runs:
      if not all(map(_is_word, name.split("/"))):
        raise ConfigError(f"grid: {name!r} can't be the name of a folder")
    return runs

  def run(
    self,
    workdir: str | pathlib.Path,
    *,
    source: dict[str, Any] | None = None,
    force: bool = False,
  ) -> dict[str, float]:
    """Trains what is left to train in `workdir`, then reports.

    Args:
      workdir: the study's folder; made if missing.
      source: how the command line builds this job again.
      force: go on although the folder's study has other settings; its runs
        with other settings are trained anew.

    Returns:
      The report's figures and `runs`, the number of them. `interrupted` is 1
      if it was stopped by a signal, `left` the number of runs that other
      processes are still at.

    Raises:
      ConfigError: settings that can't be used, or several jax processes.
      WorkdirError: a folder that can't be used.
    """
    if jax.process_count() > 1:
      raise ConfigError(
        "the runs of a study each use one process: start the same command "
        "several times instead of as one job of several processes"
      )
    path = pathlib.Path(workdir).absolute()
    runs = self.runs()
    with folder.lock(path, wait=60):
      folder.record(path, self, source=source or {}, force=force)
    bar = log.Bar(path.name, steps=len(runs), start=0)
    ended: dict[str, dict[str, float]] = {}
    try:
      for name, fit in runs.items():
        place = path / "runs" / name
        found = _ended(place, fit)
        if found is None:
          try:
            found = _train(place, fit, force=force)
          except folder.BusyError:
            continue
        if found.get("interrupted"):
          log.say(f"stopped in {name}; the same command goes on from there")
          return {"runs": float(len(ended)), "interrupted": 1.0}
        ended[name] = found
        bar.update(len(ended), name)
    finally:
      bar.close()
    for name, fit in runs.items():  # others may have ended theirs since
      if name not in ended:
        found = _ended(path / "runs" / name, fit)
        if found is not None:
          ended[name] = found
    left = [name for name in runs if name not in ended]
    if left:
      log.say(
        f"{len(left)} runs are under way in other processes, which will "
        f"report ({left[0]}, ...)"
      )
      return {"runs": float(len(ended)), "left": float(len(left))}
    with folder.lock(path, wait=60):
      return self._report(path, ended)

  def _report(
    self, path: pathlib.Path, ended: dict[str, dict[str, float]]
  ) -> dict[str, float]:
    results: dict[str, list[dict[str, float]]] = {}
    for name in self.runs():
      results.setdefault(name.rpartition("/")[0], []).append(ended[name])
    log.write_json(path / "study.json", results)
    figures = {"runs": float(len(ended))}
    if self.report is not None:
      figures.update(self.report(self, path, results))
    log.write_results(path, figures)
    return figures


def _train(place: pathlib.Path, fit: Fit, *, force: bool) -> dict[str, float]:
  if force:  # results of other settings are not to be taken for this run's
    with folder.lock(place):
      (place / log.RESULTS).unlink(missing_ok=True)
  with log.quiet():
    results = fit.run(place, force=force)
  # A grid is many programs, each used in one run.
  jax.clear_caches()
  return results


def _ended(place: pathlib.Path, fit: Fit) -> dict[str, float] | None:
  """The results of a run of these settings that has ended."""
  try:
    if folder.differing(folder.load(place)["resolved"], flatten(fit)):
      return None
    results = json.loads((place / log.RESULTS).read_text())
  except (folder.WorkdirError, OSError, ValueError):
    return None
  return dict(results) if isinstance(results, dict) else None


def _is_word(word: str) -> bool:
  plain = word.replace("_", "").replace("-", "").replace(".", "")
  return plain.isalnum() and plain.isascii()
