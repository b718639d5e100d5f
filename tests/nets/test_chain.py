"""Different blocks in a row: a stack written out, with fields of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from isthmus.nets import MlpBlock, Stack
from isthmus.nets.chain import Chain
from tests.nets import suite

X = jax.random.normal(jax.random.key(0), (2, 8))


class Shift(nn.Module):
  """x + w by, with aux."""

  scale: float

  @nn.compact
  def __call__(self, x, *, by=None, twice=False):
    w = self.param("w", nn.initializers.ones, (x.shape[-1],))
    y = x if by is None else x + self.scale * w * by
    return (y + y if twice else y), {"said": jnp.float32(self.scale)}


def test_equal_blocks_are_a_stack():
  stack = Stack(MlpBlock(16), depth=3, scan=False)
  variables = suite.jit(stack.init)(jax.random.key(1), X)
  chain = Chain((MlpBlock(16),) * 3)
  same = suite.jit(chain.init)(jax.random.key(1), X)
  assert jax.tree.structure(same) == jax.tree.structure(variables)
  for a, b in zip(*map(jax.tree.leaves, (same, variables)), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(
    chain.apply(same, X)[0], stack.apply(variables, X)[0], rtol=1e-6
  )


def test_blocks_get_their_own_inputs_and_give_their_own_aux():
  chain = Chain((Shift(2.0), Shift(3.0)))
  variables = chain.init(jax.random.key(0), X)
  y, aux = chain.apply(variables, X, layers={"by": (None, 5.0)}, twice=True)
  np.testing.assert_allclose(y, 4 * X + 30, rtol=1e-6)
  assert [float(x) for x in aux["said"]] == [2.0, 3.0]


def test_remat_computes_the_same_again():
  def loss(mode, policy=None):
    chain = Chain((MlpBlock(16), MlpBlock(24)), mode=mode, policy=policy)
    return lambda v: jnp.sum(chain.apply(v, X)[0] ** 2)

  variables = Chain((MlpBlock(16), MlpBlock(24))).init(jax.random.key(0), X)
  want = suite.jit(jax.grad(loss("plain")))(variables)
  got = suite.jit(jax.grad(loss("remat")))(variables)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  text = str(jax.make_jaxpr(loss("remat"))(variables))
  plain = str(jax.make_jaxpr(loss("plain"))(variables))
  assert text.count("remat") == plain.count("remat") + 2


def test_refusals():
  for build, words in (
    (lambda: Chain(()), "at least 1 block"),
    (lambda: Chain((Shift(1.0),), mode="reversible"), "'reversible' is none"),
    (
      lambda: Chain((Shift(1.0),)).init(
        jax.random.key(0), X, layers={"by": (1.0, 2.0)}
      ),
      "2 inputs 'by' for 1 blocks",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      build()
