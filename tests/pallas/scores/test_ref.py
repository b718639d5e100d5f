"""Reduced logits in XLA."""

import jax.numpy as jnp
import pytest

from isthmus.pallas.scores import ref
from tests.pallas.scores.cases import CASES, check

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", CASES)
def test_equals_all_logits(name, monkeypatch):
  """At once, and in portions of some rows."""
  assert check(ref.reduce_logits, name, jnp.float32)
  monkeypatch.setattr(ref, "SIZE", 2000)
  assert check(ref.reduce_logits, name, jnp.float32)
