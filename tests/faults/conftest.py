"""Runs that nothing happened to."""

import pytest

from tests.faults.runs import STEPS, run, start


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
  """The toy's run in a process of its own: steps -> workdir."""
  folder = tmp_path_factory.mktemp("whole")
  made = {}

  def get(steps=STEPS):
    if steps not in made:
      made[steps] = folder / str(steps)
      child = start(made[steps], folder, "--set", f"steps={steps}")
      assert child.wait() == 0, child.err
    return made[steps]

  return get


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """The toy's run in this process, on one of its devices."""
  workdir = tmp_path_factory.mktemp("here") / "run"
  assert run("--workdir", workdir) == 0
  return workdir
