"""Modulated blocks: the norm by hand, gates, and a state that goes along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention
from isthmus.nets.mlp import Mlp
from isthmus.nets.modulated import AdaBlock, StepAttention, modulated_norm

X = jax.random.normal(jax.random.key(0), (2, 5, 16))
C = jax.random.normal(jax.random.key(1), (2, 16))


def test_the_norm_by_hand():
  x = np.asarray(X, np.float64) + 3
  shift, scale = C, 2 * C
  y = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  want = y * (1 + np.asarray(scale)[:, None]) + np.asarray(shift)[:, None]
  found = modulated_norm(X + 3, shift, scale, 0.0)
  np.testing.assert_allclose(found, want, atol=2e-5)
  low = modulated_norm((X + 3).astype(jnp.bfloat16), shift, scale, 0.0)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(jnp.float32), want, atol=0.15)


def test_attention_is_that_of_the_kernels():
  layer = StepAttention(num_heads=2, head_dim=8)
  (y, aux), variables = layer.init_with_output(jax.random.key(2), X)
  w = {n: p["kernel"] for n, p in variables["params"].items()}
  q, k, v = ((X @ w[n]).reshape(2, 5, 2, 8) for n in "qkv")
  want = attention(q, k, v).reshape(2, 5, 16) @ w["o"]
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert aux == {}


def count(q, k, v, state, *, dense):
  """A mechanism that counts its calls, and tells the dense ones."""
  return jnp.where(dense, q, v), {"calls": state["calls"] + 1}


def test_a_state_comes_and_goes():
  layer = StepAttention(num_heads=2, head_dim=8, attend=count)
  given = {"state": {"calls": jnp.zeros(())}, "dense": True}
  (y, aux), variables = layer.init_with_output(jax.random.key(2), X, **given)
  w = {n: p["kernel"] for n, p in variables["params"].items()}
  np.testing.assert_allclose(y, X @ w["q"] @ w["o"], atol=1e-5)
  given = {"state": aux["state"], "dense": False}
  y, aux = layer.apply(variables, X, **given)
  np.testing.assert_allclose(y, X @ w["v"] @ w["o"], atol=1e-5)
  assert float(aux["state"]["calls"]) == 2
  for half in ({"state": given["state"]}, {"dense": True}):
    with pytest.raises(ValueError, match="together"):
      layer.apply(variables, X, **half)


def block(attend=attention):
  attn = StepAttention(2, head_dim=8, attend=attend)
  return AdaBlock(attn, Mlp(32), width=16, eps=0.0)


def test_a_new_block_is_the_identity_and_gates_open_it():
  """The formula, with each of the six parts of the condition in its place."""
  model = block()
  (y, aux), variables = model.init_with_output(jax.random.key(2), X, c=C)
  np.testing.assert_array_equal(y, X)
  params = dict(variables["params"])
  for i, name in enumerate(("modulate_attn", "modulate_mlp")):
    rng = np.random.default_rng(i)
    params[name] = {
      "kernel": jnp.asarray(rng.normal(0, 0.3, (16, 48)), jnp.float32),
      "bias": jnp.asarray(rng.normal(0, 0.3, 48), jnp.float32),
    }
  y, aux = model.apply({"params": params}, X, c=C)

  def parts(name):
    p = params[name]
    return np.split(np.asarray(C @ p["kernel"] + p["bias"])[:, None], 3, -1)

  def norm(x, shift, scale):
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    return (1 + scale) * (x - mean) / std + shift

  shift, scale, gate = parts("modulate_attn")
  h = jnp.asarray(norm(np.asarray(X), shift, scale))
  attn, _ = model.attn.apply({"params": params["attn"]}, h)
  x = np.asarray(X) + gate * np.asarray(attn)
  shift, scale, gate = parts("modulate_mlp")
  h = jnp.asarray(norm(x, shift, scale))
  x = x + gate * np.asarray(model.mlp.apply({"params": params["mlp"]}, h))
  np.testing.assert_allclose(y, x, atol=1e-4)
  assert aux == {} and np.abs(y - X).max() > 0.1


def test_a_block_hands_a_state_on():
  given = {"state": {"calls": jnp.zeros(())}, "dense": True}
  (_, aux), _ = block(count).init_with_output(
    jax.random.key(2), X, c=C, **given
  )
  assert float(aux["state"]["calls"]) == 1
