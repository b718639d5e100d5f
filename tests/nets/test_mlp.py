"""Feed-forward layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets import GatedMlp, Mlp

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def kernels(params):
  return {name: p["kernel"] for name, p in params.items()}


def test_mlp_is_its_formula():
  model = Mlp(16)
  params = model.init(jax.random.key(1), X)["params"]
  w = kernels(params)
  expected = jax.nn.gelu(X @ w["up"]) @ w["down"]
  np.testing.assert_allclose(
    model.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-6
  )


def test_gated_mlp_is_its_formula():
  model = GatedMlp(16)
  params = model.init(jax.random.key(1), X)["params"]
  assert {n: k.shape for n, k in kernels(params).items()} == {
    "gate": (8, 16),
    "up": (8, 16),
    "down": (16, 8),
  }

  def formula(params, x):
    w = kernels(params)
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

  def ours(params, x):
    return model.apply({"params": params}, x)

  np.testing.assert_allclose(
    ours(params, X), formula(params, X), rtol=1e-5, atol=1e-6
  )
  a = jax.grad(lambda p, x: (ours(p, x) ** 2).sum(), argnums=(0, 1))(params, X)
  b = jax.grad(lambda p, x: (formula(p, x) ** 2).sum(), argnums=(0, 1))(
    params, X
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
  )


@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
def test_dtypes_initial_size_and_checks(kind):
  model = kind(1024, dtype=jnp.bfloat16, out_scale=0.25)
  x = jnp.ones((1, 1, 256))
  params = model.init(jax.random.key(1), x)["params"]
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  assert model.apply({"params": params}, x).dtype == jnp.bfloat16
  w = kernels(params)
  np.testing.assert_allclose(w["up"].std(), 1 / 16, rtol=0.02)
  np.testing.assert_allclose(w["down"].std(), 0.25 / 32, rtol=0.02)
  with pytest.raises(ValueError, match="hidden is 0"):
    kind(0)
