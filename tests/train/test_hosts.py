"""Two processes train as one: gloo between them, one folder, one log."""

import functools
import json
import shutil
import signal

import pytest

from isthmus.train.ckpt import restore_params
from tests.train import pair as two
from tests.train.child import TOY, Child

pytestmark = pytest.mark.process
STEPS = 16


def _cut(workdir, folder):
  """A copy of a finished run as it was two steps before its end."""
  shutil.copytree(workdir, folder)
  shutil.rmtree(folder / "ckpt" / str(STEPS))
  return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The toy on four devices: of one process, and of two."""
  folder = tmp_path_factory.mktemp("runs")
  argv = ["--config", f"{TOY}:all", "--workdir", folder / "one"]
  alone = Child(*argv, folder=folder, devices=4)
  pair = two.end(two.start(folder / "two", folder))
  assert alone.wait() == 0, alone.err
  assert "4 x cpu" in alone.err and "4 x cpu" in pair[0].err
  # The first process speaks; the other has nothing to add.
  assert "loss curve" in pair[0].err and "eval/loss" in pair[0].out
  said = pair[1].out.splitlines()
  assert not [x for x in said if not x.startswith("[Gloo]")], said
  for word in ("train", "starting", "loss", "warning"):
    assert word not in pair[1].err, pair[1].err
  return folder


def test_two_processes_train_as_one(runs):
  two.same(runs / "two", runs / "one", STEPS)
  assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
  # The first process reports on the whole of parameters that two hold.
  norms = [
    json.loads((runs / n / "results.json").read_text())["norm"]
    for n in ("one", "two")
  ]
  assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1


def test_saved_by_one_and_resumed_by_two(runs, tmp_path):
  folder = _cut(runs / "one", tmp_path / "run")
  first, _ = two.end(two.start(folder, tmp_path))
  assert "resuming at step 14" in first.err
  two.same(folder, runs / "one", STEPS)


def test_saved_by_two_and_resumed_by_one(runs, tmp_path):
  folder = _cut(runs / "two", tmp_path / "run")
  argv = ["--config", f"{TOY}:all", "--workdir", folder]
  child = Child(*argv, folder=tmp_path, devices=4)
  assert child.wait() == 0, child.err
  assert "resuming at step 14" in child.err
  two.same(folder, runs / "one", STEPS)


def test_stopped_by_sigterm_to_one_then_killed_then_finished(runs, tmp_path):
  workdir = tmp_path / "run"
  start = functools.partial(
    two.start, workdir, tmp_path, "--set", "data.pause=0.05"
  )
  pair = start()
  pair[0].until(functools.partial(two.beyond, workdir, 2))
  pair[1].send(signal.SIGTERM)
  two.end(pair)
  stopped, _ = restore_params(workdir / "ckpt")
  assert 2 < stopped < STEPS
  assert f"stopped at step {stopped}, saved" in pair[0].err
  assert "stopped" not in pair[1].err
  assert two.last(workdir) == stopped

  pair = start()
  pair[0].until(functools.partial(two.beyond, workdir, stopped + 2))
  for child in pair:
    child.kill()

  first, _ = two.end(start())
  assert "resuming at step" in first.err
  two.same(workdir, runs / "one", STEPS)
