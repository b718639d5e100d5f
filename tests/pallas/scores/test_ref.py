"""Reduced logits in XLA."""

import jax.numpy as jnp
import pytest

from isthmus.pallas.scores import ref
from isthmus.pallas.scores.api import Options
from tests.pallas.scores.cases import CASES, check, check_pooled

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", CASES)
def test_equals_all_logits(name, monkeypatch):
  """At once, and in portions of some rows."""
  assert check(ref.reduce_logits, name, jnp.float32)
  monkeypatch.setattr(ref, "SIZE", 2000)
  assert check(ref.reduce_logits, name, jnp.float32)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale):
  """Those that the kernel refuses, too."""
  q = jnp.ones((1, 4, 1, 1))
  k = jnp.array([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
  found, _ = ref.reduce_logits(q, k, options=Options(2, scale=scale))
  x = [[1.0, 1, 1, 1], [-jnp.inf, -jnp.inf, 3, 3]]
  want = jnp.where(jnp.isinf(jnp.array(x)), -jnp.inf, jnp.array(x) * scale)
  assert (found[0, 0] == want).all()


@pytest.mark.parametrize("reduce", ["none", "sum"])
@pytest.mark.parametrize("t", [300, 100])
def test_blocks_are_pooled_besides(t, reduce):
  shape = 2, t, 4, 24
  assert check_pooled(ref.reduce_logits, shape, jnp.float32, reduce=reduce)
