"""The suite of every recipe: its smoke variant runs, resumes, and shards.

Adding a recipe adds its name to the list.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from isthmus.train import config
from isthmus.train.ckpt import restore_params
from isthmus.train.mesh import Mesh

RECIPES = [
  "quickstart",
]


def test_every_recipe_is_in_the_suite():
  assert sorted(RECIPES) == config.recipe_names()


def _load(name, *overrides):
  return config.load(f"{name}:smoke", overrides)


def _params(workdir):
  return restore_params(workdir / "ckpt")


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_learns_logs_and_resumes(name, tmp_path, monkeypatch):
  job = _load(name, "mesh.data=1", "mesh.fsdp=1")
  job = dataclasses.replace(job, mesh=OneDevice())
  whole = job.run(tmp_path / "whole")
  assert whole["step"] == job.steps
  assert all(math.isfinite(v) for v in whole.values()), whole
  records = [
    json.loads(line)
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  ]
  losses = [r["train/loss"] for r in records if "train/loss" in r]
  assert losses[-1] < losses[0]
  assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000

  # Stopped by a signal after the first checkpoint, and started again.
  _stop_after(monkeypatch, job.steps // 2)
  first = job.run(tmp_path / "cut")
  assert first["interrupted"] == 1.0 and first["step"] < job.steps
  monkeypatch.undo()
  again = job.run(tmp_path / "cut")
  assert again["step"] == job.steps
  for key in whole:
    if "loss" in key:
      assert again[key] == whole[key], key
  step, expected = _params(tmp_path / "whole")
  same, params = _params(tmp_path / "cut")
  assert step == same == job.steps
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_eight_devices_give_the_loss_of_one(name, tmp_path):
  job = _load(name, "save_every=0", "eval_every=0")
  one = dataclasses.replace(job, mesh=OneDevice()).run(tmp_path / "one")
  eight = job.run(tmp_path / "eight")
  assert eight["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)


class OneDevice(Mesh):
  """The first device alone, whatever there is."""

  def build(self, devices=None):
    return super().build(jax.devices()[:1])


def _stop_after(monkeypatch, steps):
  """Sends this process SIGTERM once `steps` batches were taken."""
  import os
  import signal

  from isthmus.data import loader

  real = loader.Loader.iterate

  def iterate(self, start, stop=None):
    for step, batch in real(self, start, stop):
      if step == steps:
        os.kill(os.getpid(), signal.SIGTERM)
      yield step, batch

  monkeypatch.setattr(loader.Loader, "iterate", iterate)
