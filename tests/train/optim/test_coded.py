"""The sweep: parameters one after another, each with its own moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import QTensor, to_parts
from isthmus.pallas.quant8.maps import SIGNED
from isthmus.pallas.quant8.ref import written
from isthmus.train.optim.coded import CodedState, coded, fused
from isthmus.train.optim.codes import Codes

pytestmark = pytest.mark.once

PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.full((3,), 2.0)}


def add(given, g, m):
  """Moments gather gradients; updates are given times those."""
  if isinstance(m, QTensor):
    new = to_parts(m) + m.blocks.split(g)
    return given * m.blocks.merge(new), written(m, new)
  return given * (m + g), m + g


def test_moments_stay_with_their_parameters():
  tx = coded(add, lambda count: 10.0 * count, {"mu": SIGNED}, Codes())
  state = tx.init(PARAMS)
  for i in (1, 2):
    u, state = jax.jit(tx.update)(PARAMS, state)
    for name, p in PARAMS.items():
      np.testing.assert_allclose(u[name], 10 * i * i * p, rtol=1e-6)
  assert isinstance(state, CodedState) and int(state.count) == 2
  moment = state.moments["mu"]
  assert moment.codes["w"].dtype == jnp.uint8
  assert moment.absmax["b"] is None
  np.testing.assert_allclose(moment.codes["b"], 4.0)
  np.testing.assert_allclose(moment.absmax["w"], 2.0)


def test_a_fused_optimiser_moves_parameters():
  def leaf(given, p, g, m):
    u, m = add(given, g, m)
    return p - u, m

  optimizer = fused(leaf, lambda count: 0.5 * count, {"mu": SIGNED}, Codes())
  params, state = jax.jit(optimizer.step)(
    PARAMS, PARAMS, optimizer.init(PARAMS)
  )
  jax.tree.map(
    lambda x, p: np.testing.assert_allclose(x, p / 2, rtol=1e-6), params, PARAMS
  )
  assert int(state.count) == 1


@pytest.mark.parametrize("wide", [True, False])
def test_updates_have_the_dtype_asked_for(wide):
  tx = coded(add, lambda count: 1.0, {"mu": SIGNED}, Codes(), wide=wide)
  g = {"w": jnp.ones((64, 128), jnp.bfloat16)}
  u, _ = tx.update(g, tx.init(g))
  assert u["w"].dtype == (jnp.float32 if wide else jnp.bfloat16)
