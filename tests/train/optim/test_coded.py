"""The sweep: parameters one after another, each with its own moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import QTensor, to_parts
from isthmus.pallas.quant8.maps import SIGNED
from isthmus.pallas.quant8.ref import Move, written
from isthmus.train.optim.coded import CodedState, coded
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


def move(given, how, p, g, m):
  u, m = add(given, how.clip * g, m)
  return p - how.learning_rate * (u + how.weight_decay * p), m


@pytest.mark.parametrize("move", [None, move], ids=("leaf", "move"))
def test_parameters_are_moved_each_in_its_way(move):
  tx = coded(add, lambda count: 0.5 * count, {"mu": SIGNED}, Codes(), move=move)
  how = [Move(0.5, 0.0, 0.5), Move(0.5, 0.25, 0.5)]  # of b, of w
  params, state = jax.jit(tx.take)(PARAMS, PARAMS, tx.init(PARAMS), how)
  np.testing.assert_allclose(params["b"], 2 * (1 - 0.125), rtol=1e-6)
  np.testing.assert_allclose(params["w"], 1 - 0.25, rtol=1e-6)
  assert int(state.count) == 1


def test_what_is_done_in_place_does_not_wait():
  def text(in_place):
    tx = coded(
      add, lambda count: count, {"mu": SIGNED}, Codes(), in_place=in_place
    )
    return jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS)).as_text()

  seen = []

  def in_place(g, m, *, divided=False):
    seen.append(type(m))
    return True

  assert "optimization_barrier" in text(None)
  assert "optimization_barrier" not in text(in_place)
  assert QTensor in seen


@pytest.mark.parametrize("wide", [True, False])
def test_updates_have_the_dtype_asked_for(wide):
  tx = coded(add, lambda count: 1.0, {"mu": SIGNED}, Codes(), wide=wide)
  g = {"w": jnp.ones((64, 128), jnp.bfloat16)}
  u, _ = tx.update(g, tx.init(g))
  assert u["w"].dtype == (jnp.float32 if wide else jnp.bfloat16)
