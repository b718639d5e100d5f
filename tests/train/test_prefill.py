"""Prefills over chosen blocks: rows, cases, what is equal, and refusals."""

import dataclasses

import numpy as np
import pytest

from isthmus.train.metrics.prefill import gauged, measure
from isthmus.train.prefill import at_mass
from isthmus.train.recipes import sparse_prefill as recipe

pytestmark = pytest.mark.once


def test_rows_are_held_out_text_each_used_once():
  job = dataclasses.replace(recipe.get_config("smoke"), rows=3)
  text, weights, hidden, marks = job.read_rows(256, recipe.tiny()[2])
  assert text.shape == hidden.shape == marks.shape == (3, 257)
  assert weights.shape == (3, 256)
  assert len({row.tobytes() for row in (*text, *hidden[:, :16])}) == 6
  assert set(marks[0]) == {0, 1, 2}
  again = job.read_rows(256, recipe.tiny()[2])
  np.testing.assert_array_equal(hidden, again[2])
  with pytest.raises(ValueError, match="rows of 256 tokens are wanted"):
    dataclasses.replace(job, rows=10**6).read_rows(256, recipe.tiny()[2])


def test_a_way_in_a_decoder_changes_what_it_says():
  model, params, tokenizer = recipe.tiny()
  job = recipe.get_config("smoke")
  rows = job.read_rows(256, tokenizer)
  cases = dict(job.cases(model, 256))
  assert list(cases) == ["dense", "window=0.25", "mass=0.5", "pbs=0.5",
                         "proxy=0.5"]  # fmt: skip
  said, dense = measure(model, params, *rows)
  assert cases["dense"] is model.attend and cases["pbs=0.5"].func is gauged
  _, found = measure(model.clone(attend=cases["mass=0.5"]), params, *rows, said)
  assert 0.3 < found["kept"] < 0.9 < 1.0 == dense["kept"]
  assert 0.4 < found["mass"] < 0.95 < 1.0 == dense["mass"]
  assert found["agreement"] < dense["agreement"] == 1.0


def test_a_run_writes_a_table_with_what_is_equal_and_a_figure(tmp_path):
  job = dataclasses.replace(
    recipe.get_config("smoke"),
    levels={"window": (0.1, 0.6)},
    equal=(0.7, 0.01),
    contexts=(256, 192),
  )
  found = job.run(tmp_path)
  # A window of as much of a context is in other blocks of a shorter one.
  assert found["192/window=0.6/kept"] != found["256/window=0.6/kept"]
  assert found["192/dense/perplexity"] != found["256/dense/perplexity"]
  assert found["256/dense/kept"] == 1.0 > found["256/window=0.1/kept"]
  low, high = (found[f"256/window={x}/mass"] for x in (0.1, 0.6))
  assert found["256/window@0.7/mass"] == pytest.approx(0.7) and low < 0.7 < high
  assert found["256/window@0.7/kept"] < found["256/window=0.6/kept"]
  assert not any("@0.01" in name for name in found)
  table = (tmp_path / "prefill.md").read_text().splitlines()
  assert len(table) == 2 + 2 * 4 - 1 and table[2].startswith(
    "| 256/dense | 1.000 |"
  )
  assert (tmp_path / "prefill.png").stat().st_size > 10_000


def test_equal_mass_is_between_the_levels_around_it():
  cases = [
    {"mass": m, "kept": k} for m, k in ((0.9, 0.5), (0.5, 0.1), (0.7, 0.2))
  ]
  assert at_mass(cases, 0.8)["kept"] == pytest.approx(0.35)
  assert at_mass(cases, 0.6)["kept"] == pytest.approx(0.15)
  assert at_mass(cases, 0.5)["kept"] == 0.1
  assert at_mass(cases, 0.4) is None is at_mass(cases, 0.95)
  assert at_mass(cases[:1], 0.9) is None


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"block": 0}, "block is 0"),
    ({"rows": 0}, "rows is 0"),
    ({"facts": 9}, "facts is 9"),
    ({"queries": -1}, "queries is -1"),
    ({"queries": 0, "equal": (0.9,)}, "it is at least 1"),
    ({"contexts": (96,)}, "a context of 96 is not 4 or more"),
    ({"contexts": (260,)}, "a context of 260"),
    ({"levels": {"masses": (0.5,)}}, "'masses' is none of window"),
    ({"levels": {"mass": (0.5, 1.5)}}, "lie in"),
    ({"levels": {"mass": ()}}, "lie in"),
  ],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(recipe.get_config("smoke"), **fields)
