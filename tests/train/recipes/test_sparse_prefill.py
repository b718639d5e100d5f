"""The recipe of prefills over chosen blocks: its ways, rows and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.permute import pbs_select, reorder
from isthmus.attention.sdpa import attention
from isthmus.data.recall import NAMES
from isthmus.train.metrics.prefill import gauged, measure
from isthmus.train.recipes import sparse_prefill as recipe
from isthmus.train.recipes.sparse_prefill import LEVELS, way

pytestmark = pytest.mark.once

BLOCK, T = 16, 256


def drawn():
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((1, T, 4, 8), (1, T, 2, 8), (1, T, 2, 8))
  q, k, v = (
    2 * jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)
  )
  return q, k, v


@pytest.mark.parametrize("name", LEVELS)
def test_the_mask_that_is_counted_is_the_one_attended_by(name):
  q, k, v = drawn()
  both = way(name, 0.5, block=BLOCK, length=T)
  mask, o = both["select"](q, k), both["attend"](q, k, v, causal=True)
  assert mask.lists.block == (BLOCK, BLOCK)
  others = {}
  if name.startswith("pbs"):
    if name == "pbs":
      k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    _, order = pbs_select(q, k, block=BLOCK, segment=2 * BLOCK, threshold=0.5)
    k, v = reorder(k, order), reorder(v, order)
    others = {"kv_positions": order}
  want = attention(q, k, v, mask=mask, causal=True, **others)
  np.testing.assert_allclose(o, want, rtol=1e-5, atol=1e-5)
  dense = attention(*drawn(), causal=True)
  assert np.abs(o - dense).max() > 0.05


@pytest.mark.parametrize("name", LEVELS)
def test_more_is_kept_at_higher_levels_and_all_at_1(name):
  q, k, v = drawn()
  densities = []
  for level in (0.25, 0.5, 1.0):
    both = way(name, level, block=BLOCK, length=T)
    densities.append(float(both["select"](q, k).density))
  assert densities[0] < densities[1] < densities[2]
  # Causal blocks are 136 of 256; a segment of two, permuted, is read whole.
  whole = 136 + 8 * name.startswith("pbs")
  assert densities[2] * 256 == pytest.approx(whole)
  o = both["attend"](q, k, v, causal=True)
  dense = attention(q, k, v, causal=True)
  np.testing.assert_allclose(o, dense, rtol=1e-5, atol=1e-5)


def test_rows_are_held_out_text_each_used_once():
  job = dataclasses.replace(recipe.get_config("smoke"), rows=3)
  text, weights, hidden, marks = job._rows(256, recipe.tiny()[2])
  assert text.shape == hidden.shape == marks.shape == (3, 257)
  assert weights.shape == (3, 256)
  assert len({row.tobytes() for row in (*text, *hidden[:, :16])}) == 6
  assert set(marks[0]) == {0, 1, 2}
  again = job._rows(256, recipe.tiny()[2])
  np.testing.assert_array_equal(hidden, again[2])
  with pytest.raises(ValueError, match="rows of 256 tokens are wanted"):
    dataclasses.replace(job, rows=10**6)._rows(256, recipe.tiny()[2])


def test_a_way_in_a_decoder_changes_what_it_says():
  model, params, tokenizer = recipe.tiny()
  job = recipe.get_config("smoke")
  rows = job._rows(256, tokenizer)
  cases = dict(job._cases(model, 256))
  assert list(cases) == ["dense", "window=0.25", "mass=0.5", "pbs=0.5",
                         "proxy=0.5"]  # fmt: skip
  said, dense = measure(model, params, *rows)
  assert cases["dense"] is model.attend and cases["pbs=0.5"].func is gauged
  _, found = measure(model.clone(attend=cases["mass=0.5"]), params, *rows, said)
  assert 0.3 < found["kept"] < 0.9 < 1.0 == dense["kept"]
  assert found["agreement"] < dense["agreement"] == 1.0


def test_smoke_writes_a_table_and_a_figure(tmp_path):
  results = recipe.get_config("smoke").run(tmp_path)
  assert results["256/dense/kept"] == 1.0 > results["256/window=0.25/kept"]
  table = (tmp_path / "prefill.md").read_text().splitlines()
  assert len(table) == 2 + 5 and table[2].startswith("| 256/dense | 1.000 |")
  assert (tmp_path / "prefill.png").stat().st_size > 10_000


def test_variants_need_no_weights_to_be_built():
  full, small = recipe.get_config("full"), recipe.get_config("small")
  assert max(full.contexts) == 8192 and small.block == 64
  assert set(full.levels) == set(LEVELS) > set(small.levels)
  assert full.facts <= len(NAMES)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"block": 0}, "block is 0"),
    ({"rows": 0}, "rows is 0"),
    ({"facts": 9}, "facts is 9"),
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
