"""Damage: spoilt checkpoints, numbers that are none, other settings.

Fault: a flipped bit, a lost byte, an empty step, all of them at once; a loss,
gradient or update that is NaN; an evaluation that dies; other settings.
Promised: damage is named in one line and walked past to the last good step,
whose run ends as if nothing had happened; if nothing can be trusted, exit 1
and nothing is deleted. Nothing that isn't finite is saved: exit 1 and the
step. A folder of other settings: exit 2.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from isthmus.data.loader import Loader
from isthmus.train import config, loop
from tests.faults.runs import one_line, params, run, same_run
from tests.train.child import TOY, records


def _copy(whole, tmp_path, *, damage):
  """A copy of a run that was at step 14, whose newest save is spoilt."""
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  newest = max(int(p.name) for p in (workdir / "ckpt").iterdir())
  spoilt = workdir / "ckpt" / str(newest)
  return workdir, newest, damage(spoilt)


def _largest(folder):
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: (p.parent.name == "d", p.stat().st_size))


def _flip(folder):
  path = _largest(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  return path.name


def _truncate(folder):
  path = _largest(folder)
  path.write_bytes(path.read_bytes()[:-1])
  return path.name


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()
  return "empty"


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty])
def test_damage_is_named_and_walked_past(whole, tmp_path, capsys, damage):
  workdir, newest, name = _copy(whole, tmp_path, damage=damage)
  assert run("--workdir", workdir) == 0
  err = capsys.readouterr().err
  warnings = [x for x in err.splitlines() if x.startswith("warning:")]
  assert len(warnings) == 1, err
  assert f"checkpoint {newest}" in warnings[0] and name in warnings[0]
  assert f"resuming at step {newest - 2}" in err
  same_run(workdir, whole)


def test_nothing_left_to_trust(whole, tmp_path, capsys):
  workdir, newest, name = _copy(whole, tmp_path, damage=_flip)
  _truncate(workdir / "ckpt" / str(newest - 2))
  _empty(workdir / "ckpt" / str(newest - 4))
  assert run("--workdir", workdir) == 1
  line = one_line(capsys.readouterr().err)
  assert "no checkpoint to trust" in line and name in line
  for step in (newest, newest - 2, newest - 4):
    assert f"step {step}" in line


def test_an_evaluation_that_dies_is_made_again(whole, tmp_path, monkeypatch):
  """A step is saved when its records are written, not before."""
  real = loop.Run.evaluate

  def dies(self, state, *more):
    if int(jax.device_get(state.step)) == 8:
      raise MemoryError
    return real(self, state, *more)

  monkeypatch.setattr(loop.Run, "evaluate", dies)
  with pytest.raises(MemoryError):
    run("--workdir", tmp_path / "run")
  monkeypatch.undo()
  assert run("--workdir", tmp_path / "run") == 0
  same_run(tmp_path / "run", whole)


# --- numbers that are none ---


def _poisoned(poison):
  """The first step, counted from 1, whose batch holds an example."""
  job = config.load(str(TOY), [])
  loader = Loader(
    job.data.open("train"), batch_size=job.batch_size, seed=job.seed
  )
  return 1 + next(s for s in range(99) if poison in loader.indices(s))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_the_run(tmp_path, capsys, kind):
  workdir = tmp_path / "run"
  poison = next(i for i in range(96) if _poisoned(i) == 4)
  arguments = ["--workdir", workdir, "--set", f"data.poison={poison}"]
  arguments += ["--set", f"task.nan={kind}", "--set", "save_every=1"]
  assert run(*arguments) == 1
  line = one_line(capsys.readouterr().err)
  what = "loss" if kind == "loss" else "grad_norm"
  assert f"{what} is nan at step 4" in line
  assert "the last checkpoint is of step 3" in line
  step, saved = params(workdir)
  assert step == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))
  assert [r["step"] for r in records(workdir)] == [1, 2, 3]


def test_a_poisoned_update_is_not_saved(tmp_path, capsys):
  """Loss and gradient are fine, Adam's 0 / 0 is not."""
  arguments = ["--workdir", tmp_path / "run", "--set", "save_every=1"]
  assert run(*arguments, "--set", "optimizer.scale.eps=0") == 1
  line = one_line(capsys.readouterr().err)
  assert "not finite after step 1; nothing was saved" in line
  assert not list((tmp_path / "run" / "ckpt").iterdir())


# --- other settings ---


def test_other_settings_in_the_same_folder(whole, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  other = ["--workdir", workdir, "--set", "model.dropout=0.5"]
  assert run(*other) == 2
  line = one_line(capsys.readouterr().err)
  assert "model.dropout = 0.2, not 0.5" in line and "--force" in line
  # Where it runs and how often it tells may change.
  free = ["--set", "log_every=4", "--set", "mesh.model=1", "--set", "keep=2"]
  assert run("--workdir", workdir, *free) == 0
  assert run(*other, "--force") == 0
  settings = json.loads((workdir / "config.json").read_text())["resolved"]
  assert settings["model.dropout"] == "0.5"
