"""A study: every run once, whatever stops it, and one report at the end."""

import dataclasses
import functools
import json
import shutil

import pytest

from isthmus.train import config, workdir
from isthmus.train.config import ConfigError
from isthmus.train.study import Study
from tests.train import toy
from tests.train.child import Child


def grid(*, steps=4, widths=(4, 8)):
  """Two toys."""
  return {
    f"net/w{width}": dataclasses.replace(
      toy.get_config(),
      model=toy.Net(width=width),
      steps=steps,
      eval_every=None,
      save_every=0,
      report=None,
    )
    for width in widths
  }


def report(study, path, results):
  (path / "seen.json").write_text(json.dumps(results))
  return {"losses": float(sum(len(runs) for runs in results.values()))}


def _study(**kwargs):
  return Study(grid=functools.partial(grid), seeds=2, report=report, **kwargs)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A finished study."""
  path = tmp_path_factory.mktemp("study")
  figures = _study().run(path)
  assert figures == {"runs": 4.0, "losses": 4.0}
  return path


def _began(path):
  """When each run's records were last written."""
  return {p: p.stat().st_mtime_ns for p in path.glob("runs/**/metrics.jsonl")}


def _copy(done, folder):
  shutil.copytree(done, folder)
  return folder


def test_every_case_runs_under_every_seed(done):
  names = sorted(
    p.parent.relative_to(done / "runs").as_posix()
    for p in done.glob("runs/**/results.json")
  )
  assert names == ["net/w4/0", "net/w4/1", "net/w8/0", "net/w8/1"]
  settings = [workdir.load(done / "runs" / name)["resolved"] for name in names]
  assert [s["seed"] for s in settings] == ["0", "1", "0", "1"]
  assert [s["model.width"] for s in settings] == ["4", "4", "8", "8"]
  seen = json.loads((done / "seen.json").read_text())
  assert list(seen) == ["net/w4", "net/w8"]
  losses = {run["eval/loss"] for runs in seen.values() for run in runs}
  assert len(losses) == 4  # each run is another one
  for name in ("results.json", "study.json"):
    assert json.loads((done / name).read_text())


def test_nothing_is_trained_twice(done, tmp_path):
  path = _copy(done, tmp_path / "study")
  before = _began(path)
  assert len(before) == 4
  (path / "seen.json").unlink()
  assert _study().run(path)["runs"] == 4
  assert _began(path) == before and (path / "seen.json").is_file()


def test_what_is_missing_is_trained(done, tmp_path):
  path = _copy(done, tmp_path / "study")
  before = _began(path)
  lost = path / "runs" / "net/w4/1"
  shutil.rmtree(lost)
  (path / "runs" / "net/w8/0" / "results.json").unlink()  # killed at its end
  assert _study().run(path)["runs"] == 4
  again = {p for p, t in _began(path).items() if before.get(p) != t}
  assert {p.parent.name for p in again} == {"0", "1"} and len(again) == 2
  # A run that is made anew gives what it gave.
  new, old = (
    json.loads((p / "study.json").read_text())["net/w4"][1]["eval/loss"]
    for p in (path, done)
  )
  assert new == old


def test_other_settings(done, tmp_path):
  path = _copy(done, tmp_path / "study")
  other = config.override(_study(), ["grid.steps=3"])
  with pytest.raises(ConfigError, match=r"grid.steps = .*, not 3"):
    other.run(path)
  assert other.run(path, force=True)["runs"] == 4
  settings = workdir.load(path / "runs/net/w4/0")["resolved"]
  assert settings["steps"] == "3"
  results = json.loads((path / "runs/net/w4/0/results.json").read_text())
  assert results["step"] == 3


def test_a_run_that_another_process_is_at_is_left_to_it(done, tmp_path, capsys):
  path = _copy(done, tmp_path / "study")
  place = path / "runs" / "net/w8/1"
  shutil.rmtree(place)
  (path / "seen.json").unlink()
  with workdir.lock(place):  # as another process would
    assert _study().run(path) == {"runs": 3.0, "left": 1.0}
  assert not (path / "seen.json").exists()
  err = capsys.readouterr().err
  assert "1 runs are under way in other processes" in err and "net/w8/1" in err
  assert _study().run(path)["runs"] == 4


def test_quiet_but_for_its_own_bar(tmp_path, capsys):
  study = Study(grid=functools.partial(grid, widths=(4,)), seeds=1)
  study.run(tmp_path / "one")
  lines = capsys.readouterr().err.splitlines()
  assert [x for x in lines if x.startswith("one 1/1 net/w4/0")]
  assert not [x for x in lines if "starting" in x or "loss curve" in x], lines


RECIPE = """
import functools
from isthmus.train.study import Study
from tests.train.test_study import grid, report


def get_config(variant="all"):
  return Study(
    grid=functools.partial(grid, steps=40), seeds=3, report=report
  )
"""


@pytest.mark.process
def test_two_processes_share_a_study_and_a_killed_one_is_made_up_for(tmp_path):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(RECIPE)
  argv = ["--config", recipe, "--workdir", tmp_path / "study"]
  pair = [Child(*argv, folder=tmp_path) for _ in range(2)]
  runs = tmp_path / "study" / "runs"
  pair[0].until(lambda: len(list(runs.glob("**/results.json"))) >= 2)
  pair[0].kill()
  assert pair[1].wait() == 0, pair[1].err
  last = Child(*argv, folder=tmp_path)
  assert last.wait() == 0, last.err
  assert "runs 6" in last.out
  assert len(list(runs.glob("**/results.json"))) == 6


def test_refused(tmp_path):
  with pytest.raises(ValueError, match="seeds is 0"):
    Study(grid=grid, seeds=0)
  with pytest.raises(ConfigError, match="holds no case"):
    Study(grid=dict).run(tmp_path)
  for name in ("../up", "a//b", "a b", "/a", ""):
    study = Study(grid=lambda n=name: {n: toy.get_config()})
    with pytest.raises(ConfigError, match="can't be the name of a folder"):
      study.run(tmp_path)
  with pytest.raises(ConfigError, match="grid: width is bad"):
    Study(grid=functools.partial(_broken)).run(tmp_path)
  assert not list(tmp_path.iterdir())


def _broken():
  raise ValueError("width is bad")
