"""The recipe of block attention: its cases, and what its report says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.layer import bound_moba
from isthmus.train.recipes import moba as recipe
from isthmus.train.study import Study

CASES = [
  f"{kind}{taps}"
  for kind in ("dense", "moba-b32", "moba-b64", "moba-b128")
  for taps in ("", "-k3")
]


def test_full_is_of_the_size_that_it_says():
  """At least 60M parameters and 100M bytes each, 8K of context."""
  fits = recipe.get_config("full").grid()
  assert list(fits) == CASES
  for fit in fits.values():
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(fit.model.init, jax.random.key(0), tokens)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == fit.model.param_count() > 60_000_000
    assert fit.data.seq_len == 8192
    assert fit.steps * fit.batch_size * fit.data.seq_len >= 100_000_000


def test_cases_differ_in_their_layers_alone():
  fits = recipe.get_config("full").grid()
  dense = fits["dense"]
  for name, fit in fits.items():
    same = dataclasses.replace(
      fit, model=dense.model, data=dense.data, report=dense.report
    )
    assert same == dense
    assert fit.model.clone(layers=dense.model.layers) == dense.model.clone(
      layers=dense.model.layers
    )
    local, far = fit.model.layers[:2]
    assert local.rope and local.attend.keywords == {"window": (255, 0)}
    assert not far.rope
    assert far.kconv == (3 if name.endswith("-k3") else None)
    assert (bound := bound_moba(far.attend)) is None or (
      bound["block"] * bound["top_k"] == 1024
    )
    assert name.startswith("dense") == (bound is None)


def test_last_layers_may_be_dense():
  (fit,) = recipe.grid(blocks=(), dense_widths=(0,), last=2, depth=4).values()
  assert [x.rope for x in fit.model.layers] == [True, False, True, True]
  assert bound_moba(fit.model.layers[3].attend) is None
  with pytest.raises(ValueError, match="block 48 doesn't divide"):
    recipe.grid(blocks=(48,))
  with pytest.raises(ValueError, match="dense_widths .3,. lack 0"):
    recipe.grid(dense_widths=(3,))


def _results(*excess):
  """Runs of seeds; moba's loss is above the dense one's by its share."""
  dense = [1.0 + 0.1 * i for i in range(len(excess))]
  return {
    case: [
      {
        "eval/loss": loss * (1 + more * (case != "dense")),
        "needle/whole": 0.5,
        "needle/whole/0": 0.25,
        "needle/whole/1": 0.75,
      }
      for loss, more in zip(dense, excess, strict=True)
    ]
    for case in ("dense", "moba-b64")
  }


@pytest.mark.parametrize(
  "excess, verdict",
  [
    ((0.002, 0.001, 0.003), "replicated"),
    ((0.1, 0.12, 0.11), "refuted"),
    ((0.0, 0.04, 0.01), "inconclusive"),
  ],
)
def test_report(excess, verdict, tmp_path):
  figures = recipe.compare(
    Study(grid=dict, seeds=3), tmp_path, _results(*excess)
  )
  mean = np.expm1(np.mean(np.log1p(excess)))
  assert figures["moba-b64/excess"] == pytest.approx(mean)
  assert figures["dense/excess"] == 0 and figures["dense/needle"] == 0.5
  text = (tmp_path / "report.md").read_text()
  assert f"within 1%: {verdict}" in text
  assert "| 0.500 | +0.000 [+0.000, +0.000] |" in text
  assert (tmp_path / "moba.png").stat().st_size > 10_000


def test_report_of_one_seed_has_no_interval(tmp_path):
  recipe.compare(Study(grid=dict, seeds=1), tmp_path, _results(0.02))
  text = (tmp_path / "report.md").read_text()
  assert "+0.0200" in text and "within" not in text
