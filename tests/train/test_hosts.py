"""Two processes train as one: gloo between them, one folder, one log."""

import functools
import json
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from isthmus.train.ckpt import restore_params
from tests.train.child import TOY, Child, records

pytestmark = pytest.mark.process
STEPS = 16


def _port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def _pair(workdir, folder, *more):
  """The toy on two processes of two devices each."""
  port = _port()
  argv = ["--config", f"{TOY}:all", "--workdir", workdir, *more]
  argv += ["--coordinator", f"localhost:{port}", "--processes", 2]
  return [
    Child(*argv, "--process", i, folder=folder, devices=2) for i in (0, 1)
  ]


def _end(pair):
  for child in pair:
    assert child.wait() == 0, (child.err, [c.err for c in pair])
  return pair


def _last(workdir):
  try:
    found = records(workdir)
  except (OSError, ValueError):  # nothing yet, or half a line
    return 0
  return found[-1]["step"] if found else 0


def _beyond(workdir, step):
  return _last(workdir) > step


def _same(workdir, expected):
  """The losses of another run, each once, and its parameters."""

  def losses(folder):
    return [
      (r["step"], name, r[name])
      for r in records(folder)
      for name in ("train/loss", "eval/loss")
      if name in r
    ]

  mine, others = losses(workdir), losses(expected)
  assert [x[:2] for x in mine] == [x[:2] for x in others]
  np.testing.assert_allclose(
    [x[2] for x in mine], [x[2] for x in others], rtol=1e-5
  )
  (step, params), (last, wanted) = (
    restore_params(folder / "ckpt") for folder in (workdir, expected)
  )
  assert step == last == STEPS
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    params,
    wanted,
  )


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
  pair = _end(_pair(folder / "two", folder))
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
  _same(runs / "two", runs / "one")
  assert len(list((runs / "two" / "tensorboard").iterdir())) == 1
  # The first process reports on the whole of parameters that two hold.
  norms = [
    json.loads((runs / n / "results.json").read_text())["norm"]
    for n in ("one", "two")
  ]
  assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1


def test_saved_by_one_and_resumed_by_two(runs, tmp_path):
  folder = _cut(runs / "one", tmp_path / "run")
  first, _ = _end(_pair(folder, tmp_path))
  assert "resuming at step 14" in first.err
  _same(folder, runs / "one")


def test_saved_by_two_and_resumed_by_one(runs, tmp_path):
  folder = _cut(runs / "two", tmp_path / "run")
  argv = ["--config", f"{TOY}:all", "--workdir", folder]
  child = Child(*argv, folder=tmp_path, devices=4)
  assert child.wait() == 0, child.err
  assert "resuming at step 14" in child.err
  _same(folder, runs / "one")


def test_stopped_by_sigterm_to_one_then_killed_then_finished(runs, tmp_path):
  workdir = tmp_path / "run"
  start = functools.partial(
    _pair, workdir, tmp_path, "--set", "data.pause=0.05"
  )
  pair = start()
  pair[0].until(functools.partial(_beyond, workdir, 2))
  pair[1].send(signal.SIGTERM)
  _end(pair)
  stopped, _ = restore_params(workdir / "ckpt")
  assert 2 < stopped < STEPS
  assert f"stopped at step {stopped}, saved" in pair[0].err
  assert "stopped" not in pair[1].err
  assert _last(workdir) == stopped

  pair = start()
  pair[0].until(functools.partial(_beyond, workdir, stopped + 2))
  for child in pair:
    child.kill()

  first, _ = _end(start())
  assert "resuming at step" in first.err
  _same(workdir, runs / "one")
