"""Updates by pieces: the same bits, and no block is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import quantise, to_parts
from isthmus.pallas.quant8.ref import written
from isthmus.train.optim.pieces import after, local, piecewise

pytestmark = pytest.mark.once


def double(given, x, q):
  return given * x, written(q, 2 * to_parts(q))


@pytest.mark.parametrize(
  "shape, axis, pieces",
  [
    ((8, 64), -1, 8),
    ((512, 6), -2, 8),
    ((300, 6), -2, 1),  # the last block is short
    ((4, 3, 64), -1, 4),
    ((7, 64), -1, 7),
    ((512,), -1, 8),
    ((8, 64), None, 8),
    ((5, 50), None, 1),
  ],
)
def test_pieces_hold_whole_blocks(shape, axis, pieces):
  x = jax.random.normal(jax.random.key(0), shape)
  q = quantise(x, block=64, axis=axis)
  seen = []

  def counted(given, x, q):
    seen.append(x.size)
    return double(given, x, q)

  run = jax.jit(functools.partial(piecewise, counted, limit=1))
  got = run(3.0, x, q)
  assert x.size == pieces * seen[-1]
  jax.tree.map(np.testing.assert_array_equal, got, jax.jit(double)(3.0, x, q))


def test_few_pieces_where_few_do():
  shapes = []

  def note(given, x):
    shapes.append(x.shape)
    return (x,)

  for limit in (64, 32, 20, 16, 1):
    piecewise(note, None, jnp.ones((8, 8)), limit=limit)
  assert shapes == [(8, 8), (4, 8), (2, 8), (2, 8), (1, 8)]


def test_what_needs_no_memory_is_not_cut():
  shapes = []

  def note(given, x):
    shapes.append(x.shape)
    return (x,)

  small = lambda x: x.size < 64
  for rows in (4, 8):
    local(note, None, limit=16, whole=small)(None, jnp.ones((rows, 8)))
  assert shapes == [(4, 8), (2, 8)]


def test_a_mesh_without_a_spec_takes_parameters_whole():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  f = lambda given, x: (x,)
  with jax.set_mesh(mesh):
    assert local(f, None) is f
  assert local(f, None) is not f


def test_turns_change_nothing():
  x = jnp.arange(3.0)
  np.testing.assert_array_equal(after(x, None), x)
  text = jax.jit(after).lower(x, x).as_text()
  assert "optimization_barrier" in text
