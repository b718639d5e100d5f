"""A full disk, a read-only one, a folder that goes away under its run.

Fault: no room left right before a checkpoint, its manifest, a record, an
event of TensorBoard's, the results, the plot, a report, or the start: of a
small tmpfs, or by a limit on the size of files where mounting isn't allowed;
a file system that is read-only; a folder that is deleted or moved.
Promised: one line that names the file and the remedy, no traceback, exit 1
(2 where the run hadn't begun). The last good checkpoint is as it was, nothing
half written counts, and with room the same command ends as if nothing had
happened.
"""

import contextlib
import functools
import itertools
import os
import pathlib
import random
import resource
import shutil
import subprocess
import time

import pytest

from isthmus.train import arrays, log, loop, manifest, steps
from isthmus.train.ckpt import Checkpointer
from tests.faults.runs import (
  one_line,
  params,
  reached,
  same_params,
  same_run,
  start,
  told,
)

# --- disks ---


def _mount(*arguments):
  """Whether `mount` did it; it takes root, and a system that allows it."""
  if os.geteuid() != 0 or shutil.which("mount") is None:
    return False
  command = ["mount", *map(str, arguments)]
  return subprocess.run(command, capture_output=True).returncode == 0


class Tmpfs:
  """A file system of 8 MiB."""

  def __init__(self, path: pathlib.Path):
    self.path, self._filler = path, path / "filler"
    path.mkdir()
    self.mounted = _mount("-t", "tmpfs", "-o", "size=8m", "isthmus-test", path)

  def fill(self) -> None:
    with contextlib.suppress(OSError), self._filler.open("ab", 0) as file:
      while True:
        file.write(bytes(4096))

  def free(self) -> None:
    self._filler.unlink()

  def close(self) -> None:
    if self.mounted:
      subprocess.run(["umount", "-l", str(self.path)], check=True)


class Limited:
  """A folder; while it is full, no file can grow in this process."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill(self) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._limit[1]))

  def free(self) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)

  close = free


@pytest.fixture
def disk(tmp_path):
  """A tmpfs where that is allowed, else the limit."""
  made = Tmpfs(tmp_path / "disk")
  if not made.mounted:
    made = Limited(tmp_path / "disk")
  yield made
  made.close()


@pytest.fixture
def limited(tmp_path):
  made = Limited(tmp_path)
  yield made
  made.close()


def _before(monkeypatch, owner, name, call, do):
  """Does something right before a function is called for the n-th time."""
  real, count = getattr(owner, name), itertools.count(1)

  @functools.wraps(real)
  def hooked(*args, **kwargs):
    if next(count) == call:
      do()
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, name, hooked)


# --- full ---

FEW = ("--set", "save_every=None", "--set", "eval_every=0")
# what finds no room: (owner, name, call, words of the line, last good step)
FULL = {
  "arrays": (Checkpointer, "save", 4, ("checkpoint ", "untouched"), 4),
  "manifest": (manifest, "write", 4, ("checkpoint 8 in", "No space"), 6),
  "results": (log, "write_results", 1, ("results.json", "No space"), 16),
  "plot": (log, "plot_losses", 1, ("loss.p", "No space"), 16),
}


def _full(disk, monkeypatch, hook, more=()):
  """The line of a run whose disk was filled at some point."""
  workdir = disk.path / "run"
  with monkeypatch.context() as patch:
    if hook is None:
      workdir.mkdir()
      disk.fill()
    else:
      _before(patch, *hook, disk.fill)
    status, _, err = told("--workdir", workdir, *more)
    if isinstance(disk, Tmpfs):
      left = shutil.disk_usage(disk.path).free
      assert left < 1 << 18, left  # it was full
  disk.free()
  assert status == (2 if hook is None else 1), err
  return one_line(err)


def _says(line, words, disk):
  for word in words:
    if word == "No space" and isinstance(disk, Limited):
      word = "File too large"
    assert word in line, line


@pytest.mark.parametrize("what", FULL)
def test_full(disk, whole, monkeypatch, what):
  *hook, words, good = FULL[what]
  line = _full(disk, monkeypatch, hook)
  _says(line, (*words, "make room", "run again"), disk)
  workdir = disk.path / "run"
  assert params(workdir)[0] >= good
  assert not list(workdir.rglob("*.part*"))
  if good < 16:
    assert not list((workdir / "ckpt").glob("*pending*"))
  assert told("--workdir", workdir)[0] == 0
  same_run(workdir, whole)


def test_full_in_the_middle_of_records(disk, monkeypatch, tmp_path):
  """A page of the tmpfs takes some more of them, and then cuts one."""
  more = (*FEW, "--set", "steps=96")
  line = _full(disk, monkeypatch, (log.Writer, "write", 3), more)
  assert "metrics.jsonl" in line or "tfevents" in line
  _says(line, ("No space", "make room"), disk)
  workdir = disk.path / "run"
  assert not list((workdir / "ckpt").iterdir())
  known = [r["step"] for r in log.read(workdir)]
  assert 2 <= len(known) < 96 and known == list(range(1, len(known) + 1))
  for folder in (workdir, tmp_path / "other"):
    assert told("--workdir", folder, *more)[0] == 0
  same_run(workdir, tmp_path / "other", steps=96)


def test_full_before_it_starts(disk, monkeypatch):
  line = _full(disk, monkeypatch, None)
  _says(line, ("No space",), disk)
  assert told("--workdir", disk.path / "run", "--set", "steps=2")[0] == 0


REPORTING = """
from tests.train import toy


def report(job, workdir, params, results):
  (workdir / "report.txt").write_text("x" * 100_000)
  return {"written": 1.0}

def get_config(variant="one"):
  import dataclasses
  return dataclasses.replace(toy.get_config(), report=report, steps=2)
"""


def test_full_in_a_report(disk, monkeypatch, tmp_path):
  recipe = tmp_path / "reporting.py"
  recipe.write_text(REPORTING)
  argv = ("--config", recipe, "--workdir", disk.path / "run")
  with monkeypatch.context() as patch:
    _before(patch, loop, "_gather", 1, disk.fill)
    status, _, err = told(*argv)
  disk.free()
  assert status == 1
  _says(one_line(err), ("No space", "make room"), disk)
  status, out, err = told(*argv)
  assert status == 0 and "written 1" in out, err
  assert "resuming at step 2" in err


def test_full_by_the_limit_alone(limited, whole, monkeypatch):
  """What everybody can run, and what a quota looks like."""
  hook = (arrays, "write", 4)
  line = _full(limited, monkeypatch, hook, ("--set", "log_every=16"))
  _says(line, ("checkpoint 8 in", "File too large", "make room"), limited)
  assert told("--workdir", limited.path / "run")[0] == 0
  same_params(limited.path / "run", whole)


@pytest.mark.process
@pytest.mark.parametrize(
  "moments", [2, pytest.param(20, marks=pytest.mark.slow)]
)
def test_full_at_any_moment(tmp_path, moments):
  """While a save is being written, mostly: the process ends all the same."""
  random_ = random.Random(moments)
  for i in range(moments):
    disk = Tmpfs(tmp_path / f"disk{i}")
    if not disk.mounted:
      pytest.skip("mounting a tmpfs isn't allowed here")
    try:
      workdir = disk.path / "run"
      more = ["--set", "steps=400", "--set", "data.pause=0.005"]
      child = start(workdir, tmp_path, *more)
      log_ = workdir / "metrics.jsonl"
      child.until(functools.partial(reached, log_, 5))
      time.sleep(random_.uniform(0, 0.15))
      disk.fill()
      assert child.wait(60) == 1, child.err
      one_line(child.err)
      disk.free()
      step, damaged = steps.find(workdir / "ckpt", None)
      assert step and not damaged
      assert step >= _steps(workdir)[-1] - 4
      done = ["--set", f"steps={step + 2}", "--force"]
      assert told("--workdir", workdir, *done)[0] == 0
      assert _steps(workdir) == list(range(1, step + 3))
    finally:
      disk.close()


def _steps(workdir):
  return [r["step"] for r in log.read(workdir) if "train/loss" in r]


# --- read-only ---


def test_read_only(whole, tmp_path):
  """A finished run can be read there, and nothing goes on in it."""
  disk = Tmpfs(tmp_path / "disk")
  if not disk.mounted:
    pytest.skip("mounting a tmpfs isn't allowed here")
  try:
    workdir = shutil.copytree(whole, disk.path / "run")
    shutil.rmtree(workdir / "ckpt" / "16")
    assert _mount("-o", "remount,ro", disk.path)
    before = sorted(p.name for p in workdir.rglob("*"))
    status, _, err = told("--workdir", workdir)
    assert status == 2
    assert "Read-only file system" in one_line(err)
    status, _, err = told("--workdir", disk.path / "new")
    assert status == 2 and "Read-only file system" in one_line(err)
    assert params(workdir)[0] == 14
    assert sorted(p.name for p in workdir.rglob("*")) == before
    assert _mount("-o", "remount,rw", disk.path)
    assert told("--workdir", workdir)[0] == 0
    same_run(workdir, whole)
  finally:
    disk.close()


# --- gone ---

GONE = {
  "record": (loop.Run, "evaluate", 2, FEW[:2]),
  "save": (Checkpointer, "save", 2, ("--set", "log_every=16")),
  "end": (log, "write_results", 1, ()),
}


@pytest.mark.parametrize(
  "how, notices",
  [("deleted", "record"), ("moved", "save"), ("deleted", "end")],
)
def test_a_folder_that_goes_away(whole, tmp_path, monkeypatch, how, notices):
  *hook, more = GONE[notices]
  workdir = tmp_path / "run"

  def go():
    workdir.rename(tmp_path / "elsewhere")  # at once, as rmtree isn't
    if how == "deleted":
      shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)

  with monkeypatch.context() as patch:
    _before(patch, *hook, go)
    status, _, err = told("--workdir", workdir, *more)
  assert status == 1, err
  line = one_line(err)
  assert str(workdir) in line and "deleted or moved under the run" in line
  assert not (workdir / "results.json").exists()
  if how == "moved":  # and put back: nothing was lost
    shutil.rmtree(workdir, ignore_errors=True)
    (tmp_path / "elsewhere").rename(workdir)
  status, _, err = told("--workdir", workdir)
  assert status == 0, err
  same_params(workdir, whole)
  if how == "deleted":  # else under log_every=16 some weren't written
    same_run(workdir, whole)


@pytest.mark.process
@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_folder_deleted_under_a_process(tmp_path, every):
  """At a moment that isn't chosen: saves are in flight."""
  workdir = tmp_path / "run"
  more = ["--set", "steps=4000", "--set", f"save_every={every}"]
  child = start(workdir, tmp_path, *more, "--set", "data.pause=0.002")
  child.until(lambda: reached(workdir / "metrics.jsonl", 5))
  while workdir.exists() and child.process.exitcode is None:
    shutil.rmtree(workdir, ignore_errors=True)
  assert child.wait(60) == 1, child.err
  one_line(child.err)
