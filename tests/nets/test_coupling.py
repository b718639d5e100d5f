"""Streams, layers and their way back, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.coupling import (
  Layers,
  combine,
  enter,
  run,
  separate,
  snap,
  sweep,
)


def scale(p, x, *, key, state, aux):
  return p * x, state


def test_streams_lie_on_the_grid():
  x = jax.random.normal(jax.random.key(0), (64,), jnp.bfloat16)
  for grid in (0, 4, 12):
    y, _ = enter((x, x), grid)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y * 2**grid, jnp.round(y * 2**grid))
    assert float(jnp.abs(y - x.astype(jnp.float32)).max()) <= 2.0 ** -(grid + 1)
  free, _ = enter((x, x), None)
  np.testing.assert_array_equal(free, x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_what_is_added_fits_into_the_dtype_it_came_in(dtype):
  """So that a cache of it is exact: large and small values, every grid."""
  sizes = 2.0 ** jnp.arange(-20, 11)
  dx = (jax.random.normal(jax.random.key(0), (999, 31)) * sizes).astype(dtype)
  for grid in (4, 12, 20):
    added = snap(dx, jnp.zeros(()), grid)
    np.testing.assert_array_equal(
      added.astype(dtype).astype(added.dtype), added
    )
    if grid == 4:
      assert int((added != dx.astype(added.dtype)).sum()) > 1000


def test_rounding_has_the_derivative_one():
  slope = jax.grad(lambda z: (snap(z, jnp.zeros(()), 2) ** 2).sum())
  z = jnp.array([0.3, -1.2])
  # 2 snap(z), and of that 2.
  np.testing.assert_array_equal(slope(z), [0.5, -2.5])
  np.testing.assert_array_equal(jax.jacfwd(slope)(z), 2 * np.eye(2))


def test_layers_are_run_and_walked_back():
  w = jnp.array([0.5, 0.25, 2.0])
  stack = Layers.of(scale, scale, (w, w + 1), None, None)
  x = (jnp.array([3.0]), jnp.array([-1.5]))
  x1, x2 = 3.0, -1.5
  want = []
  for f in (0.5, 0.25, 2.0):
    df = f * x2
    x1 += df
    dg = (f + 1) * x1
    x2 += dg
    want.append((df, dg))
  for start in range(4):
    y, _, deltas = run(stack, x, None, grid=12, start=start)
    assert (y[0].item(), y[1].item()) == (x1, x2)
    if start == 3:
      assert deltas is None
    else:
      np.testing.assert_array_equal(
        jnp.concatenate(deltas, -1), np.array(want)[start:]
      )
    ones = jax.tree.map(jnp.ones_like, y)
    back, dx, (df, dg), _ = sweep(
      stack, y, ones, None, deltas, grid=12, start=start
    )
    jax.tree.map(np.testing.assert_array_equal, back, x)
    plain = lambda p, x: sum(
      jax.tree.leaves(
        run(
          stack._replace(arrays=((p[0], None, None), (p[1], None, None))),
          x,
          None,
          grid=12,
          start=3,
        )[0]
      )
    ).sum()
    grads = jax.grad(plain, (0, 1))((w, w + 1), x)
    jax.tree.map(np.testing.assert_allclose, ((df, dg), dx), grads)


def test_deltas_stand_in_for_the_branches():
  """Wrong ones give wrong inputs: they are what is taken away."""
  w = jnp.ones(2)
  stack = Layers.of(scale, scale, (w, w), None, None)
  x = (jnp.ones(1), jnp.zeros(1))
  y, _, deltas = run(stack, x, None, grid=12, start=0)
  wrong = jax.tree.map(lambda d: d + 1, deltas)
  ones = jax.tree.map(jnp.ones_like, y)
  back, *_ = sweep(stack, y, ones, None, wrong, grid=12, start=0)
  assert (back[0].item(), back[1].item()) == (-1.0, -2.0)


def test_floats_are_told_from_the_rest():
  tree = {"a": jnp.ones(2), "b": (jnp.arange(2), jax.random.key(0)), "c": None}
  floats, rest = separate(tree)
  assert len(jax.tree.leaves(floats)) == 1 and len(jax.tree.leaves(rest)) == 2
  again = combine(floats, rest)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  np.testing.assert_array_equal(again["b"][0], tree["b"][0])


def test_a_state_of_another_form_is_refused():
  def grow(p, x, *, key, state, aux):
    return p * x, jnp.zeros(5)

  w = jnp.ones(2)
  stack = Layers.of(grow, scale, (w, w), None, (jnp.zeros((2, 3)), w))
  with pytest.raises(ValueError, match="f returns a state of another form"):
    stack.check((w, w), None, closed=True)
