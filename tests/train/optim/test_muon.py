"""Muon: orthogonal updates, stacked layers one by one, Adam for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.muon import scale_by_muon


def _update(params, grads, **kwargs):
  tx = scale_by_muon(**kwargs)
  return tx.update(grads, tx.init(params), params)[0]


def test_updates_of_matrices_are_near_orthogonal():
  grads = {"up": {"kernel": jax.random.normal(jax.random.key(0), (16, 64))}}
  update = _update(grads, grads)["up"]["kernel"]
  singular = np.linalg.svd(np.asarray(update), compute_uv=False) / 2.0
  assert (0.5 < singular).all() and (singular < 1.5).all()
  given = np.linalg.svd(np.asarray(grads["up"]["kernel"]), compute_uv=False)
  assert given.max() / given.min() > singular.max() / singular.min()
  assert jnp.vdot(update, grads["up"]["kernel"]) > 0  # not yet descending


def test_stacked_layers_are_taken_one_by_one():
  stacked = jax.random.normal(jax.random.key(1), (3, 8, 8))
  stacked = stacked * jnp.array([1.0, 10.0, 100.0])[:, None, None]
  whole = _update({"kernel": stacked}, {"kernel": stacked})["kernel"]
  for i in range(3):
    one = _update({"kernel": stacked[i]}, {"kernel": stacked[i]})["kernel"]
    np.testing.assert_allclose(whole[i], one, atol=1e-5)


def test_the_rest_is_adam_with_nesterov_momentum():
  params = {"embedding": jnp.ones((4, 4)), "scale": jnp.ones(4)}
  grads = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(2), p.shape), params
  )
  ours = _update(params, grads, share=0.5)
  adam = optax.scale_by_adam(b1=0.9, b2=0.95, nesterov=True)
  theirs, _ = adam.update(grads, adam.init(params), params)
  for name in params:
    np.testing.assert_allclose(ours[name], 0.5 * theirs[name], rtol=1e-4)


def test_descends_in_the_chain():
  tx = Optimizer(
    scale=scale_by_muon, learning_rate=0.05, warmup=0, weight_decay=0.0
  ).build(100)
  target = jax.random.normal(jax.random.key(3), (6, 6))
  params = {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}

  def loss(p):
    return jnp.square(p["kernel"] + p["bias"] - target).sum()

  state = tx.init(params)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  first = loss(params)
  for _ in range(100):
    params, state = step(params, state)
  assert loss(params) < 0.05 * first
