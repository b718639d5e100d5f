"""Two runs in one folder, and the lock of a run that was killed.

Fault: a second run is started in a folder that is in use; the process that
held the folder was killed.
Promised: the second is refused at once, exit 2 and one line, and the first
isn't disturbed; a killed run's lock is gone with it.
"""

import time

import pytest

from isthmus.train import workdir as folder
from tests.faults.runs import one_line, reached, run, same_run, start, told

process = pytest.mark.process


@process
def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path, uninterrupted):
  workdir = tmp_path / "run"
  first = start(workdir, tmp_path, "--set", "data.pause=0.1")
  first.until(lambda: reached(workdir / "metrics.jsonl", 1))
  began = time.perf_counter()
  status, _, err = told("--workdir", workdir)
  assert time.perf_counter() - began < 10
  assert status == 2 and "in use by another run" in one_line(err)
  # Other settings change nothing about it, and neither does force.
  status, _, err = told("--workdir", workdir, "--set", "seed=1", "--force")
  assert status == 2 and "in use by another run" in one_line(err)
  assert first.process.exitcode is None
  assert first.wait() == 0, first.err
  same_run(workdir, uninterrupted())


@process
def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path, uninterrupted):
  workdir = tmp_path / "run"
  first = start(workdir, tmp_path, "--set", "data.pause=0.1")
  first.until(lambda: reached(workdir / "metrics.jsonl", 3))
  first.kill()
  assert (workdir / ".lock").exists()
  assert run("--workdir", workdir, "--set", "data.pause=0.1") == 0
  same_run(workdir, uninterrupted())


def test_a_lock_file_that_is_somebodys_text(tmp_path, whole):
  """What is in the file says nothing; holding it does."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / ".lock").write_text("pid 1\n")
  assert run("--workdir", workdir) == 0
  same_run(workdir, whole)
  with folder.lock(workdir):
    assert told("--workdir", workdir)[0] == 2
