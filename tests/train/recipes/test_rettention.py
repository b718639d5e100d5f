"""The recipe rettention: what is compared, and what is said of it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention
from isthmus.nets.dit import DiT
from isthmus.train.recipes import rettention as recipe
from isthmus.train.recipes.rettention import (
  KEEPS,
  WAYS,
  compare,
  psnr,
  windowed,
)

pytestmark = pytest.mark.once


def test_psnr_by_hand():
  truth = np.zeros((2, 4, 4, 1))
  images = truth + np.array([0.1, 0.01])[:, None, None, None]
  assert psnr(images, truth) == pytest.approx((20 + 40) / 2)
  assert psnr(truth, truth) == pytest.approx(100)


def test_the_window_alone_remembers_nothing():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 8))
  run = functools.partial(windowed, q, k, v, "state", window=2)
  for dense, settings in ((True, {}), (False, {"window": 2})):
    o, state = run(dense=dense)
    np.testing.assert_allclose(o, attention(q, k, v, **settings), atol=1e-6)
    assert state == "state"


def job():
  """A net of random parameters, and those."""
  net = DiT(
    size=8, patch=2, width=16, depth=2, num_heads=2, channels=1, classes=10
  )
  x = jnp.zeros((1, 8, 8, 1))
  made = jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones(1))["params"]
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.25, x.shape), x.dtype)
  fit = dataclasses.replace(recipe.get_config("smoke"), model=net)
  return fit, jax.tree.map(draw, made)


def test_compare_writes_figures_a_table_and_a_plot(tmp_path):
  fit, params = job()
  settings = {"rows": 3, "steps": 6, "first": 1, "every": 3, "guidance": 2.0}
  ways = ("window", "ramp-0.04", "cache")
  run = functools.partial(compare, fit, tmp_path, params, {}, **settings)
  found = run(keeps=(0.125,), ways=ways)
  assert json.loads((tmp_path / "rettention.json").read_text()) == found
  for way in ways:
    assert 5 < found[f"0.125/{way}"] < 70, way
  lead = found["0.125/ramp-0.04"] - found["0.125/window"]
  assert found["ramp-0.04_over_window"] == pytest.approx(lead)
  assert abs(lead) > 0.1 and "ramp-0.04_over_ramp-0" not in found
  table = (tmp_path / "rettention.md").read_text()
  # Windows of 3 keys, cut off at both ends; steps 0, 1 and 4.
  assert "3 images of 16 tokens, 6 steps, 3 dense" in table
  assert f"| {100 * 46 / 256:.1f}% |" in table
  assert (tmp_path / "rettention.png").stat().st_size > 10_000
  # A wider window misses less.
  wide = run(keeps=(1.0,), ways=("ramp-0.04",))
  assert wide["1/ramp-0.04"] > found["0.125/ramp-0.04"] + 3
  assert wide["fewer"] == found["fewer"] < 70


def test_verdicts_follow_the_figures():
  figures = {f"{k:g}/{w}": 20.0 for k in KEEPS for w in WAYS} | {"fewer": 30.0}
  for keep, lead in zip(KEEPS, (6.5, 7, 8), strict=True):
    figures[f"{keep:g}/ramp-0.04"] += lead
    figures[f"{keep:g}/ramp-0"] += lead - 1.5
    figures[f"{keep:g}/cache"] += 7
  gains = recipe._gains(figures, KEEPS, tuple(WAYS))
  assert gains == {
    "ramp-0.04_over_window": 6.5,
    "ramp-0.04_over_ramp-0": 1.5,
    "ramp-0.04_over_cache": -0.5,
  }
  text = "\n".join(recipe._table(figures | gains, KEEPS, tuple(WAYS), 196))
  assert "6 dB above window at every share: replicated (least +6.50)" in text
  assert "2 dB above ramp-0 at every share: refuted (least +1.50)" in text
  assert "above a plain cache of the residual at 1 of 3 shares" in text


def test_variants():
  cpu, full = recipe.get_config("cpu"), recipe.get_config("full")
  assert cpu.model.tokens == 196 and full.model.tokens == 1024
  assert recipe.get_config("small").model.tokens == 49
  assert full.model.classes is full.task.classes is None
  image = full.data.open("eval")[0]["image"]
  assert image.shape == (*full.model.sides, full.model.channels)
  pace = recipe.get_config("speed")
  assert (pace.tokens, pace.heads, pace.head_dim) == (17776, 30, 64)
