"""Importance in XLA."""

import jax.numpy as jnp
import pytest

from isthmus.pallas.importance import ref
from tests.pallas.importance.cases import CASES, check, check_blind

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", CASES)
def test_equals_all_sums(name, monkeypatch):
  """At once, and in portions of some keys."""
  assert check(ref.importance, name, jnp.float32)
  monkeypatch.setattr(ref, "SIZE", 2000)
  assert check(ref.importance, name, jnp.float32)


def test_a_query_that_sees_nothing_gives_nothing():
  assert check_blind(ref.importance, jnp.float32)
