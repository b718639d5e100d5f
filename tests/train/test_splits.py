"""The same eight devices as those of one process, of two, and of four."""

import functools
import re
import socket
import time

import pytest

from tests.train import pair
from tests.train.child import TOY, Child

pytestmark = pytest.mark.process
DEVICES, STEPS = 8, 16


def start(processes, workdir, folder, *more):
  """The toy on eight devices, its parameters split over all of them."""
  argv = ["--config", f"{TOY}:all", "--workdir", workdir, *more]
  devices = DEVICES // processes
  if processes == 1:
    return [Child(*argv, folder=folder, devices=devices)]
  with socket.socket() as s:
    s.bind(("localhost", 0))
    argv += ["--coordinator", f"localhost:{s.getsockname()[1]}"]
  argv += ["--processes", processes]
  return [
    Child(*argv, "--process", i, folder=folder, devices=devices)
    for i in range(processes)
  ]


def run(processes, folder):
  workdir = folder / f"of_{processes}"
  first, *others = pair.end(start(processes, workdir, folder))
  assert f"{DEVICES} x cpu" in first.err and "eval/loss" in first.out
  assert not any("loss" in c.err for c in others)  # one of them speaks
  return workdir


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_are_those_of_one_process(processes, alone, tmp_path):
  pair.same(run(processes, tmp_path), alone, STEPS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return run(1, tmp_path_factory.mktemp("alone"))


def test_of_four_one_is_killed_and_two_go_on(alone, tmp_path):
  """The others name it and end within a minute; the run goes on elsewhere."""
  workdir = tmp_path / "run"
  children = start(4, workdir, tmp_path, "--set", "data.pause=0.1")
  children[0].until(functools.partial(pair.beyond, workdir, 5))
  children[2].kill()
  killed = time.monotonic()
  others = [child for i, child in enumerate(children) if i != 2]
  for child in others:
    assert child.wait(60 - (time.monotonic() - killed)) != 0, child.err
  said = "\n".join(child.err for child in others)
  named = r"stopped sending heartbeats\):\s+2\s|Task 2 heartbeat"
  assert re.search(named, said), said
  # The last steps may be gone; what is there is continued by two processes.
  again = start(2, workdir, tmp_path, "--set", "data.pause=0.1")
  first, _ = pair.end(again)
  assert "resuming at step" in first.err
  pair.same(workdir, alone, STEPS)
