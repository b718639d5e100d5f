"""A run's folder: one run at a time, one set of settings."""

import dataclasses
import json

import pytest

from isthmus.train import workdir
from isthmus.train.config import ConfigError
from isthmus.train.workdir import WorkdirError
from tests.train import toy

SOURCE = {"config": "toy.py", "set": ["steps=16"]}


def _record(folder, job, *, force=False):
  workdir.record(folder, job, source=SOURCE, force=force)


def test_lock_is_held_and_let_go(tmp_path):
  folder = tmp_path / "new" / "run"
  with workdir.lock(folder):
    with (
      pytest.raises(WorkdirError, match="in use by another run"),
      workdir.lock(folder),
    ):
      raise AssertionError("two runs in one folder")
  with workdir.lock(folder):
    assert folder.is_dir()


def test_lock_is_let_go_by_an_error(tmp_path):
  with pytest.raises(ZeroDivisionError), workdir.lock(tmp_path):
    raise ZeroDivisionError
  with workdir.lock(tmp_path):
    assert tmp_path.is_dir()


def test_record_and_load(tmp_path):
  job = toy.get_config()
  _record(tmp_path, job)
  saved = workdir.load(tmp_path)
  assert saved["config"] == "toy.py" and saved["set"] == ["steps=16"]
  assert saved["resolved"]["model.width"] == "8"
  before = (tmp_path / "config.json").read_bytes()
  _record(tmp_path, job)
  assert (tmp_path / "config.json").read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(model=toy.Net(width=9)), ["model.width = 8, not 9"]),
    (dict(ema=None), ["ema = 0.9, not None"]),
    (dict(batch_size=8, steps=4), ["batch_size = 16, not 8", "and 1 more"]),
    (dict(seed=1), ["seed = 0, not 1"]),
    (dict(transform=dict), ["transform = None, not builtins:dict"]),
  ],
)
def test_other_settings_are_refused(tmp_path, changes, words):
  job = toy.get_config()
  _record(tmp_path, job)
  before = (tmp_path / "config.json").read_text()
  other = dataclasses.replace(job, **changes)
  with pytest.raises(ConfigError) as error:
    _record(tmp_path, other)
  for word in (*words, str(tmp_path), "--force"):
    assert word in str(error.value)
  assert (tmp_path / "config.json").read_text() == before
  _record(tmp_path, other, force=True)
  _record(tmp_path, other)  # and from now on these are the folder's


@pytest.mark.parametrize(
  "changes",
  [
    dict(mesh=toy.Mesh(data=1, model=-1)),
    dict(rules=(("kernel", toy.P("model")),)),
    dict(log_every=7, save_every=None, keep=1),
    dict(profile=(1, 2)),
    dict(report=print),
  ],
)
def test_where_and_how_often_may_change(tmp_path, changes):
  job = toy.get_config()
  _record(tmp_path, job)
  before = (tmp_path / "config.json").read_text()
  _record(tmp_path, dataclasses.replace(job, **changes))
  assert (tmp_path / "config.json").read_text() != before


def test_load_refuses(tmp_path):
  with pytest.raises(WorkdirError, match="holds no run"):
    workdir.load(tmp_path)
  spoilt = ('{"resolved": {}, "config": 3}', '{"resolved": {}, "set": [3]}')
  spoilt += (
    '{"resolved": {"a": 3}}',
    '{"resolved": {}, "set": 3}',
    "[" * 10**5,
  )
  for text in ("{", "[]", "{}", '{"resolved": 3}', "\x00", *spoilt):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match="damaged .* delete it"):
      workdir.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"resolved": {}}))
  assert workdir.load(tmp_path) == {"resolved": {}}
