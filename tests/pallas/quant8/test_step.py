"""The op: what it refuses, and who runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8 import step
from isthmus.pallas.quant8.api import zeros
from isthmus.pallas.quant8.maps import ROOT
from isthmus.pallas.quant8.ref import rates

G = jnp.ones((4, 512))


def moments(shape=(4, 512), block=256):
  return zeros(shape, block=block), zeros(shape, map=ROOT, block=block)


def test_a_cpu_runs_the_reference():
  rows = step.ADAM.explain(G, *moments(), rates(1))
  assert {r.name: r.verdict for r in rows}["xla"] == "runs"
  u, *_ = step.adam(G, *moments(), rates(1))
  np.testing.assert_allclose(u, 1.0, rtol=1e-5)


def test_shapes_and_blocks_agree_or_are_refused():
  with pytest.raises(ValueError, match=r"m is \(4, 8\)"):
    step.adam(G, *moments((4, 8)), rates(1))
  with pytest.raises(ValueError, match=r"p is \(512,\)"):
    step.adam(G, *moments(), rates(1), G[0])
  m, v = moments()[0], moments(block=128)[1]
  with pytest.raises(ValueError, match="m is cut into"):
    step.adam(G, m, v, rates(1))
