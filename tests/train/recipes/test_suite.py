"""The suite of recipes can fail: a broken recipe for each of its checks."""

import pytest

from tests.train.recipes import suite

FIT = '''
import dataclasses
import itertools
import jax
import optax
from isthmus.train.mesh import Mesh
from isthmus.train.tasks.classify import Classify
from tests.train import toy

_calls = itertools.count()


class Drifting(toy.Noise):
  """Labelled noise, other noise each time it is opened."""

  def open(self, split):
    source = super().open(split)
    shift = next(_calls) if split == "train" else 0
    source.arrays["label"][:] = (source.arrays["label"] + shift) % 4
    return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerDevice(toy.Fragile):
  """A loss that counts devices."""

  def loss(self, *args):
    loss, aux = super().loss(*args)
    mesh = jax.sharding.get_abstract_mesh()
    return loss * max(1, mesh.shape["data"]), aux


def get_config(variant="full"):
  job = toy.get_config()
  job = dataclasses.replace(
    job, mesh=Mesh(), steps=8, save_every=4, eval_every=0
  )
  changes = {
    "sound": {},
    "uphill": {"optimizer": optax.sgd(-0.05)},
    "drifting": {"data": Drifting()},
    "per device": {"task": PerDevice()},
  }
  return dataclasses.replace(job, **changes[DEFECT])
'''

OTHER = '''
import dataclasses
import math
import pathlib
import jax
import jax.numpy as jnp
from isthmus.train.jobs import Bench, Case

_calls = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
  """A job of one figure."""

  start: int = 1

  def __post_init__(self):
    if DEFECT != "careless" and self.start < 0:
      raise ValueError(f"start is {self.start}; it is at least 0")

  def run(self, workdir, *, source=None, force=False):
    _calls.append(workdir)
    if DEFECT == "not finite":
      return {"count": math.nan}
    if DEFECT == "other names":
      return {f"count/{len(_calls)}": 1.0}
    return {"count": self.start + len(_calls) * (DEFECT == "drifting")}


def _case():
  return Case(function=jax.jit(jnp.sin), arguments=lambda: (jnp.ones(4),))


def get_config(variant="full"):
  if DEFECT != "any variant" and variant not in ("full", "smoke"):
    raise ValueError(f"no variant {variant!r}; did you mean 'smoke'?")
  if DEFECT == "a bench":
    return Bench(cases={"sin": _case}, rounds=1, calls=1)
  return Count()
'''


@pytest.fixture
def recipe(tmp_path):
  """`recipe(text, defect)` writes a recipe; its path."""

  def write(text, defect):
    path = tmp_path / "recipe.py"
    path.write_text(f"DEFECT = {defect!r}\n{text}")
    return str(path)

  return write


def test_sound_recipes_pass(recipe, tmp_path, capsys):
  path = recipe(OTHER, "none")
  suite.assert_job_repeats(path, tmp_path / "run")
  suite.assert_misspelling_is_answered(path, tmp_path / "no", capsys)
  suite.assert_bad_value_is_refused(path, tmp_path / "no", capsys)
  suite.assert_job_repeats(recipe(OTHER, "a bench"), tmp_path / "bench")


def test_a_fit_that_goes_uphill_is_found(recipe, tmp_path):
  with pytest.raises(AssertionError, match="the loss went from"):
    suite.assert_fit_learns(recipe(FIT, "uphill"), tmp_path / "whole")


def test_a_fit_that_resumes_otherwise_is_found(recipe, tmp_path):
  path = recipe(FIT, "drifting")
  results = suite.assert_fit_learns(path, tmp_path / "whole")
  with pytest.raises(AssertionError, match="loss is .* after a stop"):
    suite.assert_fit_resumes(path, tmp_path / "whole", results)


def test_a_fit_that_counts_devices_is_found(recipe, tmp_path):
  with pytest.raises(AssertionError, match="on 8 devices"):
    suite.assert_fit_splits(recipe(FIT, "per device"), tmp_path)


@pytest.mark.parametrize(
  "defect, message",
  [
    ("not finite", "not finite: .'count"),
    ("other names", "then"),
    ("drifting", "run twice, these differ: .'count"),
  ],
)
def test_a_job_that_does_not_repeat_itself_is_found(
  recipe, tmp_path, defect, message
):
  with pytest.raises(AssertionError, match=message):
    suite.assert_job_repeats(recipe(OTHER, defect), tmp_path / "run")


def test_carelessness_is_found(recipe, tmp_path, capsys):
  with pytest.raises(AssertionError, match="start=-7"):
    path = recipe(OTHER, "careless")
    suite.assert_bad_value_is_refused(path, tmp_path / "run", capsys)
  with pytest.raises(AssertionError, match="smok.* is not refused"):
    path = recipe(OTHER, "any variant")
    suite.assert_misspelling_is_answered(path, tmp_path / "run", capsys)
