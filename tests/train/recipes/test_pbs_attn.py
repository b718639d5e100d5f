"""The recipe of permuted keys: what it compares, and at what mass."""

import pytest

from isthmus.train.recipes import pbs_attn as recipe

pytestmark = pytest.mark.once


def test_keys_in_order_are_the_control_everywhere():
  for variant in ("full", "small", "smoke"):
    job = recipe.get_config(variant)
    assert {"pbs", "unpermuted"} <= set(job.levels)
    # The same thresholds, so that what differs is the order.
    assert len(set(job.levels.values())) == 1 and job.equal
  speed = recipe.get_config("full").speed
  assert {"pbs", "pbs-kv", "unpermuted"} <= set(speed.levels)
  assert set(speed.levels.values()) == {(0.9,)}


@pytest.mark.slow
def test_smoke_compares_at_equal_mass(tmp_path):
  found = recipe.get_config("smoke").run(tmp_path)
  for name in ("pbs", "unpermuted"):
    assert found[f"256/{name}@0.9/mass"] == pytest.approx(0.9)
    assert 0 < found[f"256/{name}@0.9/kept"] < 1.2
