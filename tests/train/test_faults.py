"""What can happen to a run: kill -9, signals, damaged files, NaN, strangers."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from isthmus.data.loader import Loader
from isthmus.train import cli, config, loop
from isthmus.train.ckpt import restore_params
from tests.train.child import TOY, Child, records

STEPS = 16
process = pytest.mark.process


def _run(*arguments):
  """The command line in this process, on one device: its exit status."""
  return cli.main(["--config", str(TOY), *map(str, arguments)])


def _params(workdir):
  step, params = restore_params(workdir / "ckpt")
  return step, jax.tree.map(np.asarray, params)


def _same_run(workdir, reference, *, steps=STEPS):
  """Bit-equal parameters, and each record once, equal in what is learnt."""
  (step, params), (last, expected) = _params(workdir), _params(reference)
  assert step == last == steps
  jax.tree.map(np.testing.assert_array_equal, params, expected)

  def learnt(folder):
    return [
      (r["step"], {k: v for k, v in r.items() if "per_second" not in k})
      for r in records(folder)
    ]

  assert learnt(workdir) == learnt(reference)
  assert [s for s, r in learnt(workdir) if "train/loss" in r] == list(
    range(1, steps + 1)
  )


def _one_line(text):
  lines = [x for x in text.splitlines() if x.startswith("isthmus:")]
  assert len(lines) == 1, text
  assert "Traceback" not in text
  return lines[0]


# --- kill -9 ---


def _reached(log, step, before):
  """Whether a run that is newer than the file `before` has come to a step."""
  if not log.exists() or log.stat().st_ino == before:
    return False  # a run that starts rewrites its records
  last = log.read_text().rpartition("\n")[0].rpartition("\n")[2]
  return bool(last) and json.loads(last)["step"] >= step


def _killed(folder, *, kills, steps, save_every, seed):
  """Kills a run at random moments, each time after it has gone further.

  Returns the folder and how many of the kills fell into a save.
  """
  workdir = folder / f"killed{seed}"
  argv = ["--config", TOY, "--workdir", workdir, "--set", f"steps={steps}"]
  argv += ["--set", f"save_every={save_every}", "--set", "data.pause=0.01"]
  random_ = random.Random(seed)
  cut = 0
  log = workdir / "metrics.jsonl"
  for moment in sorted(random_.sample(range(1, steps - 1), kills)):
    before = log.stat().st_ino if log.exists() else None
    child = Child(*argv, folder=folder)
    child.until(functools.partial(_reached, log, moment, before))
    # A step takes 10 ms and a save about 50.
    time.sleep(random_.uniform(0, 0.06))
    child.kill()
    cut += any((workdir / "ckpt").glob("*.pending"))
  child = Child(*argv, folder=folder)
  assert child.wait() == 0, child.err
  assert "resuming at step" in child.err
  return workdir, cut


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The toy's run in a process of its own: (steps, save_every) -> workdir."""
  folder = tmp_path_factory.mktemp("whole")
  made = {}

  def get(steps=STEPS):
    if steps not in made:
      made[steps] = folder / str(steps)
      argv = ["--config", TOY, "--workdir", made[steps]]
      child = Child(*argv, "--set", f"steps={steps}", folder=folder)
      assert child.wait() == 0, child.err
    return made[steps]

  return get


@process
def test_killed_three_times_is_as_never_killed(tmp_path, uninterrupted):
  workdir, _ = _killed(tmp_path, kills=3, steps=48, save_every=2, seed=1)
  _same_run(workdir, uninterrupted(48), steps=48)


@process
@pytest.mark.slow
def test_killed_twenty_five_times(tmp_path, uninterrupted):
  cut = 0
  for seed in range(5):
    every = 1 + seed % 2
    workdir, more = _killed(
      tmp_path, kills=5, steps=48, save_every=every, seed=seed
    )
    _same_run(workdir, uninterrupted(48), steps=48)
    cut += more
  assert cut  # saves were in flight


def test_an_evaluation_that_dies_is_made_again(whole, tmp_path, monkeypatch):
  """A step is saved when its records are written, not before."""
  real = loop.Run.evaluate

  def dies(self, state):
    if int(jax.device_get(state.step)) == 8:
      raise MemoryError
    return real(self, state)

  monkeypatch.setattr(loop.Run, "evaluate", dies)
  with pytest.raises(MemoryError):
    _run("--workdir", tmp_path / "run")
  monkeypatch.undo()
  assert _run("--workdir", tmp_path / "run") == 0
  _same_run(tmp_path / "run", whole)


# --- signals ---


@process
def test_sigterm_saves_and_the_command_goes_on(tmp_path, uninterrupted):
  """Through a real `python -m isthmus.train.main`."""
  workdir = tmp_path / "run"
  argv = ["-m", "isthmus.train.main", "--config", TOY, "--workdir", workdir]
  argv += ["--set", "data.pause=0.05", "--set", "save_every=None"]
  argv += ["--set", "eval_every=1"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    [sys.executable, *map(str, argv)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
    cwd=tmp_path,
  ) as running:
    for line in running.stderr:
      if line.startswith("train 1/"):
        break
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
  assert running.returncode == 0, err
  assert "SIGTERM: stopping after this step" in err
  assert "saved; the same command goes on" in err
  assert "interrupted 1" in out
  stopped, _ = _params(workdir)
  assert 0 < stopped < STEPS
  assert max(r["step"] for r in records(workdir)) == stopped
  # The same settings again; where they only say how often, others will do.
  child = Child(*argv[2:], folder=tmp_path)
  assert child.wait() == 0, child.err
  assert f"resuming at step {stopped}" in child.err
  evaluated = [r["step"] for r in records(workdir) if "eval/loss" in r]
  assert evaluated == list(range(1, STEPS + 1))  # the stopped step's as well
  (_, params), (_, expected) = _params(workdir), _params(uninterrupted())
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@process
def test_second_ctrl_c_aborts_and_a_second_run_is_refused(tmp_path, capsys):
  workdir = tmp_path / "run"
  argv = ["--config", TOY, "--workdir", workdir, "--set", "data.pause=1.5"]
  child = Child(*argv, folder=tmp_path)
  child.until(lambda: "starting" in child.err)
  # Somebody else's run in the same folder.
  assert _run("--workdir", workdir) == 2
  assert "in use by another run" in _one_line(capsys.readouterr().err)
  child.send(signal.SIGINT)
  child.until(lambda: "Ctrl-C: stopping after this step" in child.err)
  child.send(signal.SIGINT)
  assert child.wait(30) == 130, child.err
  assert "Traceback" not in child.err
  assert not [p for p in (workdir / "ckpt").iterdir() if p.name.isdecimal()]


# --- damage ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The toy's run in this process, on one of its devices."""
  workdir = tmp_path_factory.mktemp("here") / "run"
  assert _run("--workdir", workdir) == 0
  return workdir


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
  assert _run("--workdir", workdir) == 0
  err = capsys.readouterr().err
  warnings = [x for x in err.splitlines() if x.startswith("warning:")]
  assert len(warnings) == 1, err
  assert f"checkpoint {newest}" in warnings[0] and name in warnings[0]
  assert f"resuming at step {newest - 2}" in err
  _same_run(workdir, whole)


def test_nothing_left_to_trust(whole, tmp_path, capsys):
  workdir, newest, name = _copy(whole, tmp_path, damage=_flip)
  _truncate(workdir / "ckpt" / str(newest - 2))
  _empty(workdir / "ckpt" / str(newest - 4))
  assert _run("--workdir", workdir) == 1
  line = _one_line(capsys.readouterr().err)
  assert "no checkpoint to trust" in line and name in line
  for step in (newest, newest - 2, newest - 4):
    assert f"step {step}" in line


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
  assert _run(*arguments) == 1
  line = _one_line(capsys.readouterr().err)
  what = "loss" if kind == "loss" else "grad_norm"
  assert f"{what} is nan at step 4" in line
  assert "the last checkpoint is of step 3" in line
  step, params = _params(workdir)
  assert step == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  assert [r["step"] for r in records(workdir)] == [1, 2, 3]


def test_a_poisoned_update_is_not_saved(tmp_path, capsys):
  """Loss and gradient are fine, Adam's 0 / 0 is not."""
  arguments = ["--workdir", tmp_path / "run", "--set", "save_every=1"]
  assert _run(*arguments, "--set", "optimizer.scale.eps=0") == 1
  line = _one_line(capsys.readouterr().err)
  assert "not finite after step 1; nothing was saved" in line
  assert not list((tmp_path / "run" / "ckpt").iterdir())


# --- other settings ---


def test_other_settings_in_the_same_folder(whole, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  other = ["--workdir", workdir, "--set", "model.dropout=0.5"]
  assert _run(*other) == 2
  line = _one_line(capsys.readouterr().err)
  assert "model.dropout = 0.2, not 0.5" in line and "--force" in line
  # Where it runs and how often it tells may change.
  free = ["--set", "log_every=4", "--set", "mesh.model=1", "--set", "keep=2"]
  assert _run("--workdir", workdir, *free) == 0
  assert _run(*other, "--force") == 0
  settings = json.loads((workdir / "config.json").read_text())["resolved"]
  assert settings["model.dropout"] == "0.5"
