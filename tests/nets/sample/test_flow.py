"""Flows: their times, solvers on fields with known ends, guidance, states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import rettention
from isthmus.attention.reshape import dense_steps
from isthmus.nets.dit import DiT
from isthmus.nets.sample.flow import (
  flow_times,
  flow_velocity,
  sample_flow,
  shift_time,
)
from tests.nets.suite import jit

pytestmark = pytest.mark.once

NOISE = jax.random.normal(jax.random.key(0), (4, 3))
SPREAD = 0.5


def exact(x, t):
  """The velocity of data that is normal, of standard deviation `SPREAD`.

  x at t is normal with variance `s^2 = (1 - t)^2 SPREAD^2 + t^2`, and
  `E[noise - data | x] = (t - (1 - t) SPREAD^2) x / s^2`.
  """
  t = t.reshape(-1, *(1,) * (x.ndim - 1))
  variance = (1 - t) ** 2 * SPREAD**2 + t**2
  return (t - (1 - t) * SPREAD**2) * x / variance


def test_shifts_form_a_group():
  t = np.linspace(0, 1, 21)
  once = shift_time(t, 3.0)
  np.testing.assert_allclose(once[[0, -1]], [0, 1])
  assert (np.diff(once) > 0).all() and (once[1:-1] > t[1:-1]).all()
  np.testing.assert_allclose(
    shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0), atol=1e-12
  )
  np.testing.assert_allclose(shift_time(once, 1 / 3), t, atol=1e-12)
  np.testing.assert_array_equal(shift_time(t, 1.0), t)


def test_a_shift_moves_the_logarithm_of_the_ratio():
  t = np.linspace(0.05, 0.95, 19)
  snr = lambda t: np.log((1 - t) ** 2 / t**2)
  moved = snr(shift_time(t, 3.0)) - snr(t)
  np.testing.assert_allclose(moved, -2 * np.log(3), atol=1e-12)


def test_times_fall_from_1_to_0():
  times = flow_times(10, shift=2.0)
  assert times.shape == (11,) and times[0] == 1 and times[-1] == 0
  assert (np.diff(times) < 0).all()
  np.testing.assert_allclose(times[5], 2 / 3, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_have_their_order(solver, order, shift):
  """All noise ends at `SPREAD` times itself; errors fall as steps grow."""
  errors = []
  for steps in (16, 32, 64):
    settings = {"steps": steps, "shift": shift, "solver": solver}
    end = jit(functools.partial(sample_flow, exact, **settings))(NOISE)
    errors.append(np.abs(end - SPREAD * NOISE).max())
  gains = np.log2(np.divide(errors[:-1], errors[1:]))
  assert (np.abs(gains - order) < 0.6).all(), (errors, gains)


def test_euler_by_hand():
  times, x = flow_times(5, shift=2.0), np.asarray(NOISE)
  for t, s in zip(times[:-1], times[1:], strict=True):
    x = x + (s - t) * np.asarray(exact(x, np.full(4, t)))
  found = sample_flow(exact, NOISE, steps=5, shift=2.0)
  np.testing.assert_allclose(found, x, atol=1e-5)


def test_a_state_and_its_flags_go_along():
  """Each step sees its own flag and what the step before left."""

  def velocity(x, t, state, dense):
    seen, i = state
    return exact(x, t), (seen.at[i].set(jnp.where(dense, t[0], -t[0])), i + 1)

  flags = np.array([True, False, True, False])
  first = (jnp.zeros(4), jnp.zeros((), jnp.int32))
  end, (seen, count) = sample_flow(
    velocity, NOISE, steps=4, state=first, dense=flags
  )
  assert int(count) == 4
  np.testing.assert_allclose(seen, [1, -0.75, 0.5, -0.25])
  np.testing.assert_array_equal(end, sample_flow(exact, NOISE, steps=4))


SIZES = {"size": 6, "patch": 2, "width": 8, "depth": 2, "num_heads": 2}
X = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
LABEL = jnp.array([2, 0])


@functools.cache
def shared():
  model = DiT(**SIZES, classes=3)
  made = jax.eval_shape(model.init, jax.random.key(0), X, jnp.ones(2))
  rng = np.random.default_rng(2)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype)
  return model, jax.tree.map(draw, made["params"])


def test_guidance_by_hand():
  model, params = shared()
  variables, t = {"params": params}, jnp.array([0.3, 0.6])
  call = jit(model.apply)
  c, u = call(variables, X, t, LABEL)[0], call(variables, X, t)[0]
  assert np.abs(c - u).max() > 1e-3
  velocity = lambda **kw: jit(flow_velocity(model, params, **kw))(X, t)
  np.testing.assert_allclose(velocity(), u, atol=1e-5)
  np.testing.assert_allclose(velocity(label=LABEL), c, atol=1e-5)
  found = velocity(label=LABEL, guidance=3.0)
  np.testing.assert_allclose(found, u + 3 * (c - u), atol=1e-4)
  within = velocity(label=LABEL, guidance=3.0, interval=(0.4, 0.6))
  np.testing.assert_allclose(within[0], c[0], atol=1e-5)
  np.testing.assert_allclose(within[1], found[1], atol=1e-5)


def sampled(dense=None, *, guidance=1.0, keep=None, steps=6):
  """Images, sparse ones if there are flags."""
  model, params = shared()
  given = {}
  if dense is not None:
    model = model.clone(attend=functools.partial(rettention, window=keep))
    rows = len(X) * (2 if guidance != 1.0 else 1)
    given = {"state": model.init_state(rows), "dense": dense}
  velocity = flow_velocity(model, params, label=LABEL, guidance=guidance)
  out = jit(functools.partial(sample_flow, velocity, steps=steps))(X, **given)
  return out if dense is None else out[0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sparse_sampling_with_all_steps_dense_is_the_dense_sampler(guidance):
  want = sampled(guidance=guidance)
  found = sampled(np.ones(6, bool), guidance=guidance, keep=1)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_window_of_everything_is_the_dense_sampler():
  flags = dense_steps(6, first=1, every=3)
  np.testing.assert_allclose(sampled(flags, keep=9), sampled(), atol=1e-4)


def test_sparse_steps_are_near_dense_ones_and_not_them():
  near = np.abs(sampled(dense_steps(6, first=2, every=2), keep=1) - sampled())
  never = np.abs(sampled(np.zeros(6, bool), keep=1) - sampled())
  assert 1e-4 < near.max() and near.mean() < 0.5 * never.mean()


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: shift_time(0.5, 0.0), "factor is 0"),
    (lambda: flow_times(0), "steps is 0"),
    (lambda: sample_flow(exact, X, steps=2, solver="rk4"), "none of euler"),
    (lambda: sample_flow(exact, X, steps=2, state=1), "given together"),
    (
      lambda: sample_flow(
        exact, X, steps=1, state=1, dense=np.ones(1, bool), solver="heun"
      ),
      "twice a step",
    ),
    (lambda: flow_velocity(*shared(), guidance=2.0), "no labels"),
  ],
  ids=["factor", "steps", "solver", "state", "heun", "guidance"],
)
def test_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()
