"""Signals at any moment: start-up, compiling, saves, evaluation, the end.

Fault: SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGSTOP with SIGCONT, one or many of
them, at random moments.
Promised: once the run listens, the first of them is answered in one line and
the run ends with 0 and its state saved, after the step it is in or, if it is
evaluating, after the batch; an evaluation that was broken off is made again.
A second Ctrl-C aborts with 130, a third doesn't wait for a save that is being
written. Before the run listens, or after it has ended, a signal ends the
process as it ends any; there, and for the second one, Python's Ctrl-C may fall
into a callback that prints and forgets it: press again. Either way the folder
is good, and the same command goes on to the same result. What the shell told
to ignore (nohup) is ignored.
"""

import collections
import contextlib
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from isthmus.train import loop, steps
from tests.faults.runs import (
  STEPS,
  params,
  reached,
  run,
  same_params,
  same_run,
  start,
)
from tests.train.child import TOY, Child, records

process = pytest.mark.process


def _loud(*argv, **kwargs):
  """A real `python -m isthmus.train.main`."""
  command = [sys.executable, "-m", "isthmus.train.main", *map(str, argv)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(command, env=environment, **kwargs)


# --- one signal ---


@process
def test_sigterm_saves_and_the_command_goes_on(tmp_path, uninterrupted):
  """Through a real `python -m isthmus.train.main`."""
  workdir = tmp_path / "run"
  argv = ["--config", TOY, "--workdir", workdir, "--set", "data.pause=0.05"]
  argv += ["--set", "save_every=None", "--set", "eval_every=1"]
  with _loud(
    *argv,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
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
  stopped, _ = params(workdir)
  assert 0 < stopped < STEPS
  assert max(r["step"] for r in records(workdir)) == stopped
  # The same settings again; where they only say how often, others will do.
  child = Child(*argv, folder=tmp_path)
  assert child.wait() == 0, child.err
  assert f"resuming at step {stopped}" in child.err
  evaluated = [r["step"] for r in records(workdir) if "eval/loss" in r]
  assert evaluated == list(range(1, STEPS + 1))  # the stopped step's as well
  same_params(workdir, uninterrupted())


def _during(monkeypatch, owner, name, call, number):
  """Sends a signal right before a function is called for the n-th time."""
  real, count = getattr(owner, name), collections.Counter()

  def hooked(*args, **kwargs):
    count[0] += 1
    if count[0] == call:
      signal.raise_signal(number)
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, name, hooked)


# moment: (owner, function, call, the step that the run stops at)
MOMENTS = {
  "building": (loop, "make_step", 1, 0),
  "the restore": (loop.Checkpointer, "restore", 1, 0),
  "the first compilation": (loop.Run, "init", 1, 0),
  "a save": (loop.Checkpointer, "save", 2, 5),
  "an evaluation": (loop.Run, "evaluate", 2, 8),
  "the last evaluation": (loop.Run, "evaluate", 4, 16),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_in(whole, tmp_path, monkeypatch, capsys, moment):
  *where, step = MOMENTS[moment]
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    _during(patch, *where, signal.SIGTERM)
    assert run("--workdir", workdir) == 0
  found = capsys.readouterr()
  assert "interrupted 1" in found.out
  if step:
    assert f"stopped at step {step}, saved" in found.err
    assert params(workdir)[0] == step
  else:
    assert "stopped before the first step" in found.err
  assert run("--workdir", workdir) == 0
  same_run(workdir, whole)


def test_dies_after_an_evaluation_that_was_made_up_for(
  whole, tmp_path, monkeypatch
):
  """Stopped before it, evaluated when resumed, killed before a save."""
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    _during(patch, loop.Run, "evaluate", 2, signal.SIGTERM)
    assert run("--workdir", workdir) == 0  # step 8

  def dies(*_, **__):
    raise MemoryError

  with monkeypatch.context() as patch:
    patch.setattr(loop.Checkpointer, "save", dies)
    with pytest.raises(MemoryError):
      run("--workdir", workdir)
  assert [r["step"] for r in records(workdir) if "eval/loss" in r] == [4, 8]
  assert run("--workdir", workdir) == 0
  same_run(workdir, whole)


@process
def test_a_long_evaluation_does_not_hold_it_up(tmp_path, uninterrupted):
  """Of 1,000 batches a second apart, none is waited for but the first."""
  workdir = tmp_path / "run"
  recipe = tmp_path / "slow.py"
  recipe.write_text(SLOW)
  child = Child("--config", recipe, "--workdir", workdir, folder=tmp_path)
  child.until(lambda: (tmp_path / "evaluating").exists())
  began = time.perf_counter()
  child.send(signal.SIGTERM)
  assert child.wait(30) == 0, child.err
  assert time.perf_counter() - began < 10
  assert "stopped at step 4, saved" in child.err
  assert run("--workdir", workdir, "--force") == 0
  same_run(workdir, uninterrupted())


SLOW = """
import dataclasses, pathlib, time
from tests.train import toy

class Source(toy.ArraySource):
  def take(self, indices):
    pathlib.Path(__file__).with_name("evaluating").touch()
    time.sleep(1.0)
    return super().take(indices)

class Noise(toy.Noise):
  def open(self, split):
    found = super().open(split)
    return found if split == "train" else Source(found.arrays)

def get_config(variant="one"):
  return dataclasses.replace(
    toy.get_config(), data=Noise(held_out=1000), eval_batch_size=1
  )
"""


@process
def test_second_ctrl_c_aborts(tmp_path):
  workdir = tmp_path / "run"
  child = start(workdir, tmp_path, "--set", "data.pause=1.5")
  child.until(lambda: "starting" in child.err)
  child.send(signal.SIGINT)
  child.until(lambda: "Ctrl-C: stopping after this step" in child.err)
  child.send(signal.SIGINT)
  assert child.wait(30) == 130, child.err
  assert "Traceback" not in child.err
  assert not [p for p in (workdir / "ckpt").iterdir() if p.name.isdecimal()]


@process
def test_a_terminal_that_closes(tmp_path, uninterrupted):
  """SIGHUP comes, and writing to the terminal fails from then on."""
  workdir = tmp_path / "run"
  ours, theirs = pty.openpty()
  argv = ["--config", TOY, "--workdir", workdir, "--set", "data.pause=0.05"]
  running = _loud(
    *argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
  )
  os.close(theirs)
  shown = b""
  while not reached(workdir / "metrics.jsonl", 3):
    assert running.poll() is None, shown
    shown += os.read(ours, 1 << 16)  # its bar moves ten times a second
  os.close(ours)
  running.send_signal(signal.SIGHUP)
  running.wait(60)
  stopped, _ = params(workdir)
  assert 3 <= stopped < STEPS  # saved, although nobody could be told
  child = Child(*argv, folder=tmp_path)
  assert child.wait() == 0, child.err
  same_run(workdir, uninterrupted())


@process
def test_stopped_and_continued(tmp_path, uninterrupted):
  """SIGSTOP and SIGCONT: it sleeps, and nothing else."""
  workdir = tmp_path / "run"
  child = start(workdir, tmp_path, "--set", "data.pause=0.02")
  child.until(lambda: reached(workdir / "metrics.jsonl", 2))
  for _ in range(5):
    child.send(signal.SIGSTOP)
    time.sleep(0.1)
    child.send(signal.SIGCONT)
    time.sleep(0.03)
  assert child.wait() == 0, child.err
  same_run(workdir, uninterrupted())


# --- storms ---

POLITE = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ALL = (*POLITE, signal.SIGINT)


def _storm(folder, seed, kinds, *, count):
  """Signals at random until the run is at its end, which it comes to."""
  random_ = random.Random(seed)
  workdir = folder / f"storm{seed}"
  more = ["--set", "data.pause=0.01"]
  ends, sent, child = collections.Counter(), 0, None
  while sent < count:
    if child is None:
      child = start(workdir, folder, *more)
      # From its first moments to its last ones.
      time.sleep(random_.uniform(0, 1.2))
    for _ in range(random_.choice([1, 1, 2, 5])):
      if child.process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
          child.send(random_.choice(kinds))
          sent += 1
        time.sleep(random_.choice([0, 0.001, 0.05]))
    if random_.random() < 0.7:
      status = child.wait(60)
      ends[status] += 1
      _is_good(workdir, child, status)
      child = None
  if child is not None:
    _is_good(workdir, child, child.wait(60))
  last = start(workdir, folder, *more)
  assert last.wait() == 0, last.err
  return workdir, ends


def _is_good(workdir, child, status):
  """How a run may end: stopped, or aborted, or before it listened."""
  # A Ctrl-C of Python's own may fall into a callback of jax's, which says so.
  lost = child.err.count("Exception ignored in")
  # Not the line of its traceback that raised it, which is indented.
  raised = re.findall("^KeyboardInterrupt", child.err, re.MULTILINE)
  assert len(raised) == lost, child.err
  assert child.err.count("Traceback") == lost, child.err
  listened = "resuming" in child.err or "starting" in child.err
  died = status in [-s for s in ALL]
  assert status in (0, 130) or died, (status, child.err)
  if status == 0:
    assert listened
  if status != 0 and not died:
    assert "isthmus:" not in child.err
  if (workdir / "ckpt").is_dir():
    found, damaged = steps.find(workdir / "ckpt", None)
    assert not damaged
    if "saved" in child.err:
      assert f"stopped at step {found}, saved" in child.err


@process
@pytest.mark.parametrize(
  "count", [10, pytest.param(50, marks=pytest.mark.slow)]
)
def test_a_storm(tmp_path, uninterrupted, count):
  workdir, ends = _storm(tmp_path, count, ALL, count=count)
  assert set(ends) <= {0, 130, *(-s for s in ALL)}
  same_run(workdir, uninterrupted())


@process
@pytest.mark.slow
def test_ctrl_c_again_and_again(tmp_path, uninterrupted):
  workdir, ends = _storm(tmp_path, 7, (signal.SIGINT,), count=50)
  assert set(ends) <= {0, 130, -signal.SIGINT}
  same_run(workdir, uninterrupted())


@process
@pytest.mark.slow
def test_signals_while_python_and_jax_are_loaded(tmp_path, uninterrupted):
  """The real command, from its first instruction on: it ends, in no harm."""
  workdir = tmp_path / "run"
  random_ = random.Random(0)
  ends = collections.Counter()
  argv = ["--config", TOY, "--workdir", workdir]
  for i in range(20):
    with _loud(
      *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
      time.sleep(random_.uniform(0, 6))
      number = ALL[i % len(ALL)]
      running.send_signal(number)
      _, err = running.communicate(timeout=60)
    ends[running.returncode] += 1
    assert running.returncode in (0, 1, 130, -number), err
    if running.returncode == 1:  # Ctrl-C before a line of ours is run
      assert "KeyboardInterrupt" in err, err
  print(dict(ends))
  child = Child(*argv, folder=tmp_path)
  assert child.wait() == 0, child.err
  same_run(workdir, uninterrupted())
