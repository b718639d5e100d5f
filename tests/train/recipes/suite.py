"""The suite of every recipe: what its smoke variant must do.

Each function takes a recipe as `--config` does, a name or a path, without its
variant. What a job has to show depends on its kind: a Fit learns, resumes and
splits over devices; any other repeats itself.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest

from isthmus.data import loader
from isthmus.train import cli, config
from isthmus.train.ckpt import restore_params
from isthmus.train.config import ConfigError
from isthmus.train.jobs import Bench, Fit
from isthmus.train.mesh import Mesh


class OneDevice(Mesh):
  """The first device alone, whatever there is."""

  def build(self, devices=None):
    return super().build(jax.devices()[:1])


def load(recipe: str, *overrides: str) -> Any:
  return config.load(f"{recipe}:smoke", overrides)


def is_fit(recipe: str) -> bool:
  return isinstance(load(recipe), Fit)


def assert_finite(results: dict[str, float]) -> None:
  assert results, "a run without results"
  bad = {k: v for k, v in results.items() if not math.isfinite(v)}
  assert not bad, f"not finite: {bad}"


# --- a Fit ---


def assert_fit_learns(recipe: str, folder: pathlib.Path) -> dict[str, float]:
  """Trains into `folder`: finite figures, a falling loss, a curve."""
  job = dataclasses.replace(load(recipe), mesh=OneDevice())
  whole = job.run(folder)
  assert whole["step"] == job.steps
  assert_finite(whole)
  records = [
    json.loads(line)
    for line in (folder / "metrics.jsonl").read_text().splitlines()
  ]
  losses = [r["train/loss"] for r in records if "train/loss" in r]
  few = max(1, len(losses) // 4)  # one batch may be easier than another
  first, last = np.mean(losses[:few]), np.mean(losses[-few:])
  assert last < first, f"the loss went from {first:.4g} to {last:.4g}"
  assert (folder / "loss.png").stat().st_size > 1000
  return whole


def assert_fit_resumes(
  recipe: str, whole: pathlib.Path, results: dict[str, float]
) -> None:
  """Stopped by a signal half way and started again, it ends the same.

  Args:
    recipe: the recipe.
    whole: the folder of the run that was never stopped.
    results: its figures.
  """
  job = dataclasses.replace(load(recipe), mesh=OneDevice())
  folder = whole.parent / "cut"
  with pytest.MonkeyPatch.context() as patch:
    _stop_after(patch, job.steps // 2)
    first = job.run(folder)
  assert first["interrupted"] == 1.0 and first["step"] < job.steps
  again = job.run(folder)
  assert again["step"] == job.steps
  for key in results:
    if "loss" in key:
      assert again[key] == results[key], (
        f"{key} is {again[key]} after a stop, {results[key]} without"
      )
  step, expected = restore_params(whole / "ckpt")
  same, params = restore_params(folder / "ckpt")
  assert step == same == job.steps
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def assert_fit_splits(
  recipe: str, folder: pathlib.Path, alone: float | None = None
) -> None:
  """On all devices it has the loss that it has on one.

  Args:
    recipe: the recipe.
    folder: where it runs.
    alone: the last loss on one device, if it is known.
  """
  job = load(recipe, "save_every=0", "eval_every=0")
  if alone is None:
    one = dataclasses.replace(job, mesh=OneDevice()).run(folder / "one")
    alone = one["train/loss"]
  many = job.run(folder / "many")["train/loss"]
  assert many == pytest.approx(alone, rel=1e-3), (
    f"a loss of {many} on {jax.device_count()} devices, {alone} on one"
  )


# --- any other job ---


def assert_job_repeats(recipe: str, folder: pathlib.Path) -> None:
  """Run again it gives the same figures; of times (`/ms`), the same names.

  A study is run again in its folder, with one of its runs lost.
  """
  job = load(recipe)
  first = job.run(folder / "first")
  assert_finite(first)
  again = folder / "again"
  if hasattr(job, "runs"):
    again = folder / "first"
    shutil.rmtree(again / "runs" / next(iter(job.runs())))
  second = job.run(again)
  assert second.keys() == first.keys(), f"{list(second)}, then {list(first)}"
  if isinstance(job, Bench):
    assert_finite(second)
    return
  different = {
    k: (first[k], second[k])
    for k in first
    if first[k] != second[k] and not k.endswith("/ms")
  }
  assert not different, f"run twice, these differ: {different}"


# --- every recipe ---


def assert_shown(recipe: str, capsys: Any) -> None:
  """`isthmus show` tells what it is."""
  assert cli.main(["show", recipe]) == 0
  shown = capsys.readouterr().out
  for word in (recipe, "reproduced", "command", "measured"):
    assert word in shown, f"{word} is not in:\n{shown}"


def assert_misspelling_is_answered(
  recipe: str, workdir: pathlib.Path, capsys: Any
) -> None:
  """A field or variant with a letter missing: one line, the right one named."""
  field = max((f.name for f in dataclasses.fields(load(recipe))), key=len)
  run = ["--config", f"{recipe}:smoke", "--workdir", str(workdir), "--set"]
  for argv, right in (
    ([*run, f"{field[:-1]}=1"], field),
    (["--config", f"{recipe}:smok", "--workdir", str(workdir)], "smoke"),
  ):
    capsys.readouterr()
    assert cli.main(argv) == 2, f"{argv} is not refused"
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert right in captured.err, f"{right!r} is not named: {captured.err}"
    assert not workdir.exists(), f"{argv} left {workdir}"
  with pytest.raises(ConfigError, match="smoke"):
    config.load(f"{recipe}:smok")


def assert_bad_value_is_refused(
  recipe: str, workdir: pathlib.Path, capsys: Any
) -> None:
  """Whole numbers that are words, or far below zero: one line, no folder."""
  job = load(recipe)
  names = [f.name for f in dataclasses.fields(job) if f.type is int]
  assert names, f"{type(job).__name__} has no field of whole numbers"
  for value in ("plenty", "-7"):
    capsys.readouterr()
    setting = f"{names[0]}={value}"
    argv = ["--config", f"{recipe}:smoke", "--set", setting]
    assert cli.main([*argv, "--workdir", str(workdir)]) == 2, setting
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert names[0] in error and value in error, error
    assert not workdir.exists(), f"{setting} left {workdir}"


def _stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
  """Sends this process SIGTERM once `steps` batches were taken."""
  real = loader.Loader.iterate

  def iterate(self, start, stop=None):
    for step, batch in real(self, start, stop):
      if step == steps:
        os.kill(os.getpid(), signal.SIGTERM)
      yield step, batch

  patch.setattr(loader.Loader, "iterate", iterate)
