"""`--set model.mode=...`: nets train in every mode, and checkpoints move."""

import json
import shutil

import numpy as np
import pytest

from isthmus.train import cli
from isthmus.train.ckpt import restore_params
from isthmus.train.workdir import load

STEPS, SAVED = 8, 4
OTHER = "--set model.mode=remat --set model.streams=2".split()


def _fit(recipe, workdir, *more):
  argv = ["--config", f"{recipe}:smoke", "--set", "eval_every=0"]
  return cli.main([*argv, "--workdir", str(workdir), *more])


def _losses(workdir):
  """Step -> training loss, the last written."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = map(json.loads, lines)
  return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.mark.parametrize(
  "recipe", [pytest.param("quickstart", marks=pytest.mark.slow), "vit_digits"]
)
def test_trains_reversibly_and_goes_on_in_another_mode(
  recipe, tmp_path, capsys
):
  """Steps 5 to 8 are those of the reversible run, in mode "remat" too."""
  whole, moved = tmp_path / "whole", tmp_path / "moved"
  assert _fit(recipe, whole, "--set", "model.mode=reversible") == 0
  losses = _losses(whole)
  assert sorted(losses) == list(range(1, STEPS + 1))
  values = list(losses.values())
  assert np.isfinite(values).all()
  assert np.mean(values[-2:]) < np.mean(values[:2]) - 0.02, values

  shutil.copytree(whole, moved)
  shutil.rmtree(moved / "ckpt" / str(STEPS))
  capsys.readouterr()
  assert _fit(recipe, moved, *OTHER) == 2  # other settings: never unasked
  error = capsys.readouterr().err
  assert error.count("\n") == 1, error
  assert "model.mode = 'reversible', not 'remat'" in error and "force" in error

  (moved / "metrics.jsonl").unlink()
  assert _fit(recipe, moved, *OTHER, "--force") == 0
  assert load(moved)["resolved"]["model.mode"] == "'remat'"
  again = _losses(moved)
  assert sorted(again) == list(range(SAVED + 1, STEPS + 1))
  for step, loss in again.items():
    assert loss == pytest.approx(losses[step], rel=1e-4), step
  ends = [restore_params(path / "ckpt") for path in (whole, moved)]
  assert [step for step, _ in ends] == [STEPS, STEPS]
