"""The suite of every recipe: its smoke variant runs, resumes, and shards.

Adding a recipe adds its name to the list; `suite.py` says what each kind of
job has to show.
"""

import functools

import pytest

from isthmus.train import config
from tests.train.recipes import suite

RECIPES = [
  "adam8bit",
  "hourglass_mlp",
  "moba",
  "moba_snr",
  "pbs_attn",
  "proxy_attn",
  "quickstart",
  "rettention",
  "reversible_memory",
  "reversible_unet3d",
  "sparse_prefill",
  "token_ring",
  "vit_digits",
]

FITS = [name for name in RECIPES if suite.is_fit(name)]
OTHERS = [name for name in RECIPES if name not in FITS]


def test_every_recipe_is_in_the_suite():
  assert sorted(RECIPES) == config.recipe_names()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
  """(folder, results) of a recipe's run on one device, which is run once."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp(name) / "whole"
    return folder, suite.assert_fit_learns(name, folder)

  return run


@pytest.mark.parametrize("name", FITS)
def test_smoke_learns_logs_and_resumes(name, learnt):
  suite.assert_fit_resumes(name, *learnt(name))


@pytest.mark.parametrize("name", FITS)
def test_eight_devices_give_the_loss_of_one(name, learnt, tmp_path):
  _, one = learnt(name)
  suite.assert_fit_splits(name, tmp_path, one["train/loss"])


@pytest.mark.once
@pytest.mark.parametrize("name", OTHERS)
def test_smoke_runs_twice_alike(name, tmp_path):
  suite.assert_job_repeats(name, tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_show_tells_what_it_is(name, capsys):
  suite.assert_shown(name, capsys)


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_settings_are_refused_in_one_line(name, tmp_path, capsys):
  suite.assert_misspelling_is_answered(name, tmp_path / "run", capsys)
  suite.assert_bad_value_is_refused(name, tmp_path / "run", capsys)
