"""The stacks of the memory recipe: one gradient, whatever is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.footprint import table
from isthmus.train.limits import Limits
from isthmus.train.recipes import reversible_memory as recipe


def _gradient(way):
  problem = recipe.Stack("mlp", 4, 8, (2, 4))
  arguments = problem.draw(jax.random.key(0))
  return jax.jit(problem.gradient(way))(*arguments)


@pytest.fixture(scope="module")
def plain():
  return jax.tree.leaves(_gradient("plain"))


@pytest.mark.parametrize(
  "way", ["reversible", "cache-0.69", "remat-sublayer", "remat-block"]
)
def test_every_way_has_the_gradient_of_the_plain_one(way, plain):
  params, dx = _gradient(way)
  assert {leaf.shape[0] for leaf in jax.tree.leaves(params)} == {4}
  for a, b in zip(jax.tree.leaves((params, dx)), plain, strict=True):
    most = float(jnp.abs(b).max())
    assert most > 0
    # The branches multiply in bfloat16.
    np.testing.assert_allclose(a, b, atol=0.03 * most)


@pytest.mark.parametrize(
  "problem",
  [
    recipe.Stack("transformer", 2, 16, (1, 4)),
    recipe.Stack("conv", 1, 4, (1, 2, 2, 2)),
  ],
  ids=lambda p: p.stack,
)
def test_blocks_computed_again_are_the_stacks_values(problem):
  params, x, _ = problem.draw(jax.random.key(0))
  f, g = (recipe._branch(module) for module in problem.modules())
  ours = recipe.run_blocks(f, g, params, x)
  theirs = recipe._run(f, g, params, x, mode="plain")
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-2)
  assert not np.allclose(ours[1], x[1], atol=2e-2)


def test_memory_grows_with_the_depth_unless_layers_are_walked_backwards():
  """A layer is two streams where each is kept, one pair where blocks are."""
  streams = 2 * 64 * 32 * 4

  def grown(way):
    sizes = []
    for depth in (4, 12):
      problem = recipe.Stack("mlp", depth, 32, (1, 64))
      shapes = jax.eval_shape(problem.draw, jax.random.key(0))
      compiled = jax.jit(problem.gradient(way)).lower(*shapes).compile()
      sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    return (sizes[1] - sizes[0]) / 8

  assert grown("reversible") < 0.1 * streams
  assert grown("remat-block") >= 0.9 * streams


def test_variants():
  full = recipe.get_config("full")
  assert full.ways == tuple(recipe.WAYS) and set(recipe.BASES) <= set(full.ways)
  assert {p.stack for p in full.problems} == {"mlp", "transformer", "conv"}
  assert recipe.Stack("mlp", 48, 1024, (16, 1024)) in full.problems
  claims = recipe.get_config("claims")
  assert isinstance(claims, Limits) and claims.shown == (240, 240, 160)
  assert set(recipe.get_config("smoke").ways) <= set(recipe.WAYS)
  assert table([], recipe.BASES).count("remat-block") == 2


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (("lstm", 2, 8, (1, 2)), "'lstm' is none of"),
    (("mlp", 0, 8, (1, 2)), "at least 1"),
    (("transformer", 2, 130, (1, 2)), "130 is no multiple of 128"),
    (("conv", 2, 8, (1, 2)), "2 axes"),
  ],
)
def test_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    recipe.Stack(*sizes)
