"""Re-ttention: the identities of its two steps, schedules and orders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import BlockMask, attention
from isthmus.attention.reshape import (
  band_width,
  dense_steps,
  frame_order,
  reshaped,
  rettention,
)
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once

Q, K, V, *_ = inputs(2, 50, 50, 4, 2, 8)
FULL = attention(Q, K, V)
BAND = np.abs(np.arange(50)[:, None] - np.arange(50)) <= 4


def sums():
  """(rho, R) by explicit sums, in float64."""
  k, v = (np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (K, V))
  x = np.einsum("btnd,bsnd->bnts", np.asarray(Q, np.float64), k) * 8**-0.5
  p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  missed = np.einsum("bnts,bsnd->btnd", np.where(BAND, 0, p), v)
  return np.where(BAND, p, 0).sum(-1), missed


def run(state, *args, **settings):
  args = args or (Q, K, V)
  return rettention(*args, state, **{"window": 4, **settings})


def test_a_dense_step_keeps_the_share_and_what_was_missed():
  o, state = run(reshaped(FULL), dense=True)
  rho, residual = sums()
  np.testing.assert_allclose(o, FULL, atol=1e-6)
  np.testing.assert_allclose(state.ratio, rho, atol=1e-6)
  np.testing.assert_allclose(state.residual, residual, atol=1e-6)
  assert 0 < state.ratio.min() and state.ratio.max() < 0.9


@pytest.mark.parametrize("ratio", [True, False])
def test_the_step_after_it_gives_the_same(ratio):
  """Whatever the ramp is: it comes after."""
  _, state = run(reshaped(FULL), dense=True, ratio=ratio)
  o, later = run(state, dense=False, ratio=ratio)
  np.testing.assert_allclose(o, FULL, atol=1e-6)
  np.testing.assert_array_equal(later.residual, state.residual)
  grown = np.minimum(np.asarray(state.ratio) + np.float32(0.04), 1)
  np.testing.assert_array_equal(later.ratio, grown)
  o, _ = run(later, dense=False, ratio=ratio)
  assert (np.abs(o - FULL).max() > 1e-3) == ratio
  o, _ = run(state, dense=False, ratio=ratio, ramp=0.0)
  np.testing.assert_allclose(o, FULL, atol=1e-6)


def test_the_ratio_stops_at_1_and_a_dense_step_starts_anew():
  _, first = run(reshaped(FULL), dense=True)
  state = first
  for _ in range(30):
    _, state = run(state, dense=False, ramp=0.1)
  assert (np.asarray(state.ratio) == 1).all()
  _, again = run(state, dense=True)
  jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_mask_of_everything_misses_nothing():
  o, state = run(reshaped(FULL), dense=True, window=50)
  np.testing.assert_allclose(state.ratio, 1, atol=1e-6)
  np.testing.assert_allclose(state.residual, 0, atol=1e-6)
  o, _ = run(state, dense=False, window=50)
  np.testing.assert_allclose(o, FULL, atol=1e-6)


def test_the_first_state_is_plain_windowed_attention():
  o, _ = run(reshaped(FULL), dense=False)
  np.testing.assert_allclose(o, attention(Q, K, V, window=4), atol=1e-6)


def test_a_block_mask_is_a_mask_too():
  mask = BlockMask.window((4, 4), 50, block=(16, 16))
  _, state = rettention(Q, K, V, reshaped(FULL), dense=True, mask=mask)
  _, same = run(reshaped(FULL), dense=True)
  np.testing.assert_allclose(state.ratio, same.ratio, atol=1e-6)


def test_it_goes_along_a_scan_and_keeps_no_square():
  """Inputs that drift; each step as if it were called alone."""
  dense = dense_steps(7, first=2, every=3)
  drift = jnp.arange(7.0)[:, None, None, None, None] * 0.05

  def step(state, xs):
    dense, move = xs
    o, state = run(state, Q + move, K, V, dense=dense)
    return state, o

  first = reshaped(FULL)
  last, found = jax.jit(functools.partial(jax.lax.scan, step))(
    first, (jnp.asarray(dense), drift)
  )
  state = first
  for i in range(7):
    state, o = step(state, (bool(dense[i]), drift[i]))
    np.testing.assert_allclose(found[i], o, atol=2e-6)
  np.testing.assert_allclose(last.ratio, state.ratio, atol=2e-6)

  x = jax.ShapeDtypeStruct((1, 8192, 1, 16), jnp.bfloat16)
  f = lambda q, k, v: run(reshaped(v), q, k, v, dense=q[0, 0, 0, 0] > 0)
  memory = jax.jit(f).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8192**2 / 2


def test_schedules():
  assert np.flatnonzero(dense_steps(20)).tolist() == [0, 1, 2, 3, 4, 5, 10, 15]
  found = np.flatnonzero(dense_steps(30, first=15)).tolist()
  assert found == [*range(16), 20, 25]
  assert dense_steps(4, first=4).all()


def test_by_place_a_band_of_frames_is_a_band_of_tokens():
  frames, per_frame, text, width = 3, 10, 2, 2
  order, place = frame_order(frames, per_frame, text=text)
  token = np.arange(text + frames * per_frame)
  of_token = np.where(token < text, -1, (token - text) % per_frame)
  np.testing.assert_array_equal(place, of_token[order])
  assert sorted(order) == token.tolist()
  near = np.abs(place[text:, None] - place[text:]) <= width
  index = np.arange(frames * per_frame)
  apart = np.abs(index[:, None] - index)
  assert near[apart <= width * frames].all()
  assert not near[apart >= (width + 1) * frames].any()


def test_band_width_is_half_of_what_is_kept():
  width = band_width(1024, 0.03125)
  kept = np.abs(np.arange(1024)[:, None] - np.arange(1024)) <= width
  assert kept[500].sum() == 2 * width + 1 == 33
  for bad in (0, 1.5):
    with pytest.raises(ValueError, match="not in"):
      band_width(10, bad)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="nothing makes a mask"):
    rettention(Q, K, V, reshaped(FULL), dense=True)
  with pytest.raises(ValueError, match="the ramp is -1"):
    run(reshaped(FULL), dense=True, ramp=-1.0)
