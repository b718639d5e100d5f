"""The race of optimisers: its bytes by hand, its files, what it refuses."""

import json

import flax.linen as nn
import jax.numpy as jnp
import pytest

from isthmus.train.config import load
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.race import Race

pytestmark = pytest.mark.once

COUNT = 18528  # numbers of the smoke variant's decoder


def test_a_race_is_run_and_told(tmp_path, capsys):
  results = load("adam8bit:speed_smoke").run(tmp_path)
  assert set(results) == {
    f"small/{name}/ms" for name in ("optax.adamw", "adamw8bit", "ratio")
  }
  assert all(x > 0 for x in results.values())
  found = json.loads((tmp_path / "race.json").read_text())
  plain, coded, peer = found["rows"]
  assert (plain["ratio"], coded["ratio"]) == (1.0, results["small/ratio/ms"])
  for row in (plain, coded):
    assert row["gbps"] * row["ms"] == pytest.approx(row["bytes"] / 1e6)
  # A state of 32 bits is donated and written in place, or would count twice.
  held = 16 * COUNT / 2**30
  assert held <= plain["peak_gib"] < 1.5 * held
  assert peer["optimiser"] == "torchao.AdamW8bit"
  assert peer["ms"] is not None or peer["note"]
  text = (tmp_path / "race.md").read_text()
  assert text in capsys.readouterr().out and "| small | adamw8bit |" in text
  assert (tmp_path / "race.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "dtype, codes, plain, coded",
  [
    # 16384 numbers in blocks of 256, and 64 that are kept whole.
    (jnp.float32, {}, 28, 12 + 4 * (1 + 4 / 256)),
    (jnp.bfloat16, {}, 14, 6 + 4 * (1 + 4 / 256)),
    (jnp.float32, {"min_size": 2**20}, 28, 28),
  ],
)
def test_least_bytes(dtype, codes, plain, coded):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      self.param("w", nn.initializers.zeros, (64, 256))
      self.param("b", nn.initializers.zeros, (64,))

  race = Race(models={"net": Net()}, dtype=dtype, codes=Codes(**codes))
  assert race.least("net", "optax.adamw") == plain * (16384 + 64)
  small = 12 if dtype == jnp.float32 else 6
  assert race.least("net", "adamw8bit") == 16384 * coded + 64 * (small + 16)


def test_counts_are_positive():
  for wrong in ({"models": {}}, {"rounds": 0}, {"calls": 0}):
    with pytest.raises(ValueError, match="each is at least 1"):
      Race(**{"models": {"x": nn.Dense(2)}} | wrong)
