"""Stochastic rounding: right on average, exact where there is nothing to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.train.optim.rounding import (
  round_stochastically,
  stochastic_rounding,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("x", [1.001, -3.3, 1e-5, 12345.6])
def test_the_mean_is_the_number(x):
  y = round_stochastically(jnp.full(40_000, x), jax.random.key(0))
  found = np.unique(np.asarray(y, np.float64))
  assert len(found) == 2 and found[0] < x < found[1]
  mean = np.asarray(y, np.float64).mean()
  assert abs(mean - x) < 4 * (found[1] - found[0]) / 2 / 200


def test_what_bfloat16_holds_stays():
  x = jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf], jnp.float32)
  y = round_stochastically(x, jax.random.key(1))
  np.testing.assert_array_equal(y.astype(jnp.float32), x)
  assert jnp.isnan(
    round_stochastically(jnp.array([jnp.nan]), jax.random.key(1))
  )


def test_an_applied_update_is_the_rounded_sum():
  p = jax.random.normal(jax.random.key(0), (4096,)).astype(jnp.bfloat16)
  u = jax.random.normal(jax.random.key(1), (4096,)) * 1e-3
  tx = stochastic_rounding(3)
  step, _ = tx.update(u, tx.init(p), p)
  got = optax.apply_updates(p, step)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
  want = round_stochastically(p.astype(jnp.float32) + u, key)
  np.testing.assert_array_equal(
    got.astype(jnp.float32), want.astype(jnp.float32)
  )


def test_float32_is_let_through():
  p, u = {"w": jnp.ones(4)}, {"w": jnp.full(4, 1e-9)}
  tx = stochastic_rounding()
  got, state = tx.update(u, tx.init(p), p)
  np.testing.assert_array_equal(got["w"], u["w"])
  assert state.count == 1
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(u, state)
