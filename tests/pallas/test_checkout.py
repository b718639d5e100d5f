"""Short names are aliases: one module a file, whichever name is asked for."""

import importlib
import sys

import pytest

from isthmus.pallas import checkout


@pytest.fixture
def aliased(monkeypatch):
  """`nets` as the checkout's alias, undone afterwards."""
  before = dict(sys.modules), list(sys.meta_path)
  for name in [n for n in sys.modules if n.split(".")[0] == "nets"]:
    del sys.modules[name]
  checkout.alias("nets")
  yield
  for name in [n for n in sys.modules if n.split(".")[0] == "nets"]:
    del sys.modules[name]
  sys.modules.update(
    {n: m for n, m in before[0].items() if n not in sys.modules}
  )
  sys.meta_path[:] = before[1]


def test_submodules_are_the_same_objects(aliased):
  short = importlib.import_module("nets.sample.decode")
  long = importlib.import_module("isthmus.nets.sample.decode")
  assert short is long
  assert long.__spec__.name == "isthmus.nets.sample.decode"
  assert importlib.import_module("nets") is importlib.import_module(
    "isthmus.nets"
  )


def test_a_missing_submodule_is_named(aliased):
  with pytest.raises(ModuleNotFoundError, match=r"isthmus\.nets\.nothing"):
    importlib.import_module("nets.nothing")


def test_main_keeps_its_own_spec():
  finder = checkout._Alias("train")
  assert finder.find_spec("train.main") is None  # `python -m` runs the file
  assert finder.find_spec("train.loop").loader is finder
  assert finder.find_spec("training.loop") is None
