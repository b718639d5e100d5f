"""Lookups and projections against plain indexing and matmuls."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.nets import ops
from isthmus.nets.ops import embed_lookup, project
from isthmus.pallas import precision
from isthmus.train.mesh import Mesh


@pytest.mark.parametrize("one_hot", [True, False])
def test_lookup_and_its_gradient(one_hot, monkeypatch):
  monkeypatch.setattr(ops, "_ONE_HOT_ROWS", 100 if one_hot else 0)
  table = jax.random.normal(jax.random.key(0), (10, 4))
  tokens = jnp.asarray([[3, 3, 0], [9, 3, 1]])
  do = jax.random.normal(jax.random.key(1), (2, 3, 4))
  x, pull = jax.vjp(lambda w: embed_lookup(w, tokens), table)
  np.testing.assert_array_equal(x, np.asarray(table)[np.asarray(tokens)])
  expected = np.zeros((10, 4), np.float32)
  np.add.at(expected, np.asarray(tokens), np.asarray(do))
  np.testing.assert_allclose(pull(do)[0], expected, rtol=1e-6)
  text = str(jax.make_jaxpr(pull)(do))
  assert ("scatter" in text) != one_hot and ("dot_general" in text) == one_hot


@pytest.mark.parametrize("one_hot", [True, False])
def test_lookup_on_a_mesh(one_hot, monkeypatch):
  """The table is gathered, and its gradient summed; no activation is sent."""
  monkeypatch.setattr(ops, "_ONE_HOT_ROWS", 100 if one_hot else 0)
  table = jax.random.normal(jax.random.key(0), (10, 4))
  tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 10)
  do = jax.random.normal(jax.random.key(2), (8, 6, 4))

  def run(table, tokens, do):
    x, pull = jax.vjp(lambda w: embed_lookup(w, tokens), table)
    return x, pull(do)[0]

  want = jax.jit(run)(table, tokens, do)
  mesh = Mesh(data=2, fsdp=2, seq=2).build()
  specs = P(None, "fsdp"), P(("data", "fsdp")), P(("data", "fsdp"), "seq")
  args = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip((table, tokens, do), specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    call = jax.jit(run).lower(*args).compile()
  for x, y in zip(call(*args), want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  text = call.as_text()
  gathered = re.findall(r"= \(?(\w+\[[\d,]*\])\S* all-gather", text)
  assert gathered == ["f32[10,4]"] and "all-to-all" not in text


@pytest.mark.parametrize("one_hot", [True, False])
def test_lookup_sums_in_float32(one_hot, monkeypatch):
  """512 bfloat16 ones added one by one would stop at 256."""
  monkeypatch.setattr(ops, "_ONE_HOT_ROWS", 100 if one_hot else 0)
  table = jnp.zeros((4, 2), jnp.bfloat16)
  tokens = jnp.zeros((1, 512), jnp.int32)
  _, pull = jax.vjp(lambda w: embed_lookup(w, tokens), table)
  (gradient,) = pull(jnp.ones((1, 512, 2), jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16
  assert gradient.tolist() == [[512, 512], [0, 0], [0, 0], [0, 0]]
  text = str(jax.make_jaxpr(pull)(jnp.ones((1, 512, 2), jnp.bfloat16)))
  assert "f32[4,2]" in text  # XLA may widen a scatter on a CPU by itself


def test_lookup_outside_the_table_is_nan():
  x = embed_lookup(jnp.zeros((4, 2)), jnp.asarray([[4, 0]]))
  assert np.isnan(x[0, 0]).all() and not np.isnan(x[0, 1]).any()


def test_project_and_its_gradients():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 3, 4))
  kernel = jax.random.normal(keys[1], (4, 5))
  dy = jax.random.normal(keys[2], (2, 3, 5))
  ours = jax.vjp(lambda *a: project(*a, dtype=jnp.float32), x, kernel)
  plain = jax.vjp(lambda a, b: a @ b, x, kernel)
  np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5, atol=1e-6)
  for a, b in zip(ours[1](dy), plain[1](dy), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_project_multiplies_bfloat16_both_ways(monkeypatch):
  """All three matmuls; their sums, and the kernel's gradient, stay float32."""
  monkeypatch.setattr(precision, "platform", lambda: "gpu")
  x = jnp.ones((1, 3, 4), jnp.bfloat16)
  kernel = jnp.ones((4, 5))

  def loss(x, kernel):
    y = project(x, kernel, dtype=jnp.bfloat16)
    assert y.dtype == jnp.float32
    return y.sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel)
  dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  assert len(dots) >= 2
  for dot in dots:
    assert all(v.aval.dtype == jnp.bfloat16 for v in dot.invars)
    assert dot.outvars[0].aval.dtype == jnp.float32
  assert [a.dtype for a in jaxpr.out_avals] == [jnp.bfloat16, jnp.float32]
