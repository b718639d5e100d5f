"""The optimiser chain against its formula, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.train.optim.chain import Optimizer


def test_schedule_rises_and_falls():
  plan = Optimizer(learning_rate=2.0, warmup=10, final=0.1).schedule(110)
  rates = np.array([float(plan(i)) for i in range(110)])
  np.testing.assert_allclose(rates[0], 0.2, rtol=1e-6)
  np.testing.assert_allclose(rates[9:11], 2.0, rtol=1e-6)
  np.testing.assert_allclose(rates[60], 0.1 * 2 + 0.9, rtol=1e-5)
  assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()
  assert 0.2 <= rates[-1] < 0.21


@pytest.mark.parametrize("decay, last", [("linear", 0.5), ("constant", 1.0)])
def test_other_decays(decay, last):
  plan = Optimizer(
    learning_rate=1.0, warmup=0, decay=decay, final=0.5
  ).schedule(1000)
  assert abs(float(plan(999)) - last) < 1e-3


def test_one_step_by_hand():
  chain = Optimizer(
    scale=optax.identity,
    learning_rate=0.5,
    warmup=0,
    decay="constant",
    weight_decay=0.1,
    clip=1.0,
  )
  tx = chain.build(10)
  params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([4.0])}
  grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}
  updates, _ = tx.update(grads, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  # The norm is 5, so gradients are a fifth; only the kernel decays.
  np.testing.assert_allclose(new["kernel"], [1 - 0.5 * 0.7, 2 - 0.5 * 0.2])
  np.testing.assert_allclose(new["bias"], [4 - 0.5 * 0.8], rtol=1e-6)


def test_default_is_adamw():
  mine = Optimizer(
    learning_rate=0.01, warmup=0, decay="constant", clip=None
  ).build(100)
  theirs = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)
  p = q = {"kernel": jnp.arange(4.0)}
  s, t = mine.init(p), theirs.init(q)
  for i in range(5):
    grads = {"kernel": jax.random.normal(jax.random.key(i), (4,))}
    u, s = mine.update(grads, s, p)
    v, t = theirs.update(grads, t, q)
    p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
  np.testing.assert_allclose(p["kernel"], q["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
  "field",
  [dict(learning_rate=0.0), dict(warmup=-1), dict(clip=0.0), dict(final=1.5)],
)
def test_refused(field):
  with pytest.raises(ValueError, match=next(iter(field))):
    Optimizer(**field)


def test_any_transformation_serves():
  scale = functools.partial(optax.scale_by_lion, b1=0.9)
  tx = Optimizer(scale=scale, weight_decay=0.0).build(10)
  params = {"kernel": jnp.ones(3)}
  updates, _ = tx.update(params, tx.init(params), params)
  assert (updates["kernel"] < 0).all()
