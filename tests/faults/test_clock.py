"""A clock that jumps, stands or runs backwards; odd times of files; places.

Fault: the time of day jumps by years in both directions at every look; the
times of a checkpoint's files are equal, in the future or in the wrong order;
another time zone and a locale without UTF-8.
Promised: nothing depends on the time of day. Speeds and the time left are
finite and not negative, records are in order, TensorBoard's files too, saves
don't time out, and which checkpoint is the newest is a matter of its step.
"""

import math
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from isthmus.train import log, steps
from tests.faults.runs import one_line, params, run, same_run, told
from tests.train.child import TOY, records
from tests.train.test_board import boards, events

YEAR = 365 * 24 * 3600.0


@pytest.fixture
def stormy(monkeypatch):
  """`time.time` and `time.time_ns` jump at every look, by up to 30 years."""
  random_, real = random.Random(0), time.time
  looks = []

  def jumps():
    looks.append(real() + random_.choice([0, -1, 1, -30, 30]) * YEAR)
    return looks[-1]

  monkeypatch.setattr(time, "time", jumps)
  monkeypatch.setattr(time, "time_ns", lambda: int(jumps() * 1e9))
  return looks


def test_a_clock_that_jumps(whole, tmp_path, stormy, capsys, monkeypatch):
  monkeypatch.setattr(log.Bar, "EVERY", 0.0)
  workdir = tmp_path / "run"
  assert run("--workdir", workdir, "--set", "steps=10") == 0
  assert run("--workdir", workdir, "--force") == 0  # resumed at 10
  assert len(stormy) > 50
  found = records(workdir)
  for record in found:
    for name, value in record.items():
      assert math.isfinite(value), (name, value)
      if "per_second" in name:
        assert value > 0, record
  numbers = [r["step"] for r in found]
  assert numbers == sorted(numbers)
  err = capsys.readouterr().err
  left = [x for x in err.splitlines() if x.endswith(" left")]
  assert left and not [x for x in left if "-" in x.rpartition(",")[2]], err
  assert params(workdir)[0] == 16
  files = boards(workdir / "tensorboard")
  assert len(files) == 2
  for path in files:
    times = [e.wall_time for e in events(path)]
    assert times == sorted(times)
  firsts = [e.step for p in files for e in events(p)[1:2]]
  assert firsts == sorted(firsts)


def test_resumed_before_it_was_saved(whole, tmp_path, monkeypatch):
  """The clock was set back by 30 years in between."""
  workdir = shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(workdir / "ckpt" / "16")
  real = time.time
  monkeypatch.setattr(time, "time", lambda: real() - 30 * YEAR)
  assert run("--workdir", workdir) == 0
  same_run(workdir, whole)
  older, newer = boards(workdir / "tensorboard")  # as TensorBoard reads them
  assert older.name == boards(whole / "tensorboard")[0].name
  assert [e.step for e in events(newer)][1] == 15


@pytest.mark.parametrize("order", ["equal", "future", "backwards", "zero"])
def test_the_newest_checkpoint_is_the_highest_step(whole, tmp_path, order):
  workdir = shutil.copytree(whole, tmp_path / "run")
  there = steps.finished(workdir / "ckpt")
  assert there == [12, 14, 16]
  for i, step in enumerate(there):
    moment = {
      "equal": 1e9,
      "future": time.time() + 10 * YEAR * (3 - i),
      "backwards": 1e9 - i * 1000,
      "zero": 0,
    }[order]
    folder = workdir / "ckpt" / str(step)
    for path in [*folder.rglob("*"), folder]:
      os.utime(path, (moment, moment))
  assert steps.find(workdir / "ckpt", None) == (16, [])
  assert params(workdir)[0] == 16
  shutil.rmtree(workdir / "ckpt" / "16")
  status, _, err = told("--workdir", workdir)
  assert status == 0 and "resuming at step 14" in err
  same_run(workdir, whole)
  assert steps.finished(workdir / "ckpt") == [12, 14, 16]


@pytest.mark.process
@pytest.mark.slow
def test_another_place(tmp_path, uninterrupted):
  """A time zone 45 minutes off, and a locale that knows ASCII alone."""
  workdir = tmp_path / "run"
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TZ": "Pacific/Chatham",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
  }
  argv = ["-m", "isthmus.train.main", "--config", TOY, "--workdir", workdir]
  done = subprocess.run(
    [sys.executable, *map(str, argv)],
    capture_output=True,
    env=environment,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert b"Traceback" not in done.stderr
  same_run(workdir, uninterrupted())


def test_a_name_that_the_locale_cannot_spell(tmp_path):
  """As such a locale hands it over; nothing is written."""
  status, _, err = told("--workdir", tmp_path / "L\udcc3\udca4ufe")
  assert status == 2 and "PYTHONUTF8=1" in one_line(err)
  assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_ascii(whole, tmp_path):
  assert run("--workdir", tmp_path / "Läufe é") == 0
  same_run(tmp_path / "Läufe é", whole)
