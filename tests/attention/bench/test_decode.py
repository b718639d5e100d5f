"""Decode steps, in bytes of the cache."""

import jax.numpy as jnp
import pytest

from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.decode import Decode, Step, measure

pytestmark = pytest.mark.once


def test_the_rate_is_of_keys_and_values():
  step = Step(batch=2, length=1024, heads=8, kv_heads=4, width=64)
  assert step.bytes == 2 * (2 * 1024 * 4 * 64) * 2
  found = Decode(step, ms=0.001, first_seconds=0.0)
  assert found.rate == pytest.approx(step.bytes / 1e-6)
  assert found.as_dict()["bytes_per_second"] == found.rate
  assert "50% of copying's rate" in found.line(2 * found.rate)


def test_a_step_runs():
  step = Step(batch=2, length=64, heads=4, kv_heads=2, width=16)
  found = measure(step, Clock(rounds=1, seconds=1e-4), jnp.float32)
  assert found.step == step and found.ms > 0 and found.first_seconds > 0
