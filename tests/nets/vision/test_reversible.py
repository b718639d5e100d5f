"""Reversible layers of convolutional branches, one level at a time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets import MBConv
from isthmus.nets.reversible import assert_reversible
from isthmus.nets.vision.reversible import ConvBlock, ReversibleBlocks
from tests.nets.suite import distance, jit

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
PAIR = tuple(jax.random.normal(k, (2, 4, 5, 6)) for k in jax.random.split(KEY))


def graded(blocks, made, train=True):
  """(y, what changed, gradients of the parameters and of both streams)."""
  rest = {k: v for k, v in made.items() if k != "params"}

  def loss(params, x):
    y, new = blocks.apply(
      {**rest, "params": params},
      x,
      train=train,
      mutable=list(rest),
      rngs={"dropout": jax.random.key(1)},
    )
    return (y[0] * jnp.cos(y[1])).sum(), (y, new)

  run = jax.grad(loss, argnums=(0, 1), has_aux=True)
  gradients, (y, new) = jit(run)(made["params"], PAIR)
  return y, new, gradients


def apart(a, b):
  flat = lambda tree: np.concatenate(
    [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
  )
  return distance(flat(a), flat(b))


@pytest.mark.parametrize(
  "branch, options, bound",
  [
    pytest.param(
      MBConv(expand=2, se_ratio=0.5, norm="batch", parent=None),
      {"dropout": 0.3, "cache": 0.5},
      1e-5,
      marks=pytest.mark.slow,
    ),
    (MBConv(expand=2, dtype=jnp.bfloat16, parent=None), {}, 5e-3),
    (ConvBlock(parent=None), {"cache": 1.0}, 1e-5),
  ],
  ids=["all", "bfloat16", "conv"],
)
def test_values_gradients_and_statistics_are_autodiff_s(branch, options, bound):
  blocks = ReversibleBlocks(branch, 4, **options)
  made = dict(jit(blocks.init)(KEY, PAIR))
  plain = blocks.clone(mode="plain", cache=0.0)
  ours, theirs = graded(blocks, made), graded(plain, made)
  for found, expected in zip(ours, theirs, strict=True):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert apart(ours[0], theirs[0]) < bound
  assert apart(ours[2], theirs[2]) < bound
  assert ("batch_stats" in made) == bool(jax.tree.leaves(ours[1]))
  for a, b in zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_running_statistics_move_once():
  """Those of the first layer, by formula; without training, not at all."""
  norm = functools.partial(nn.BatchNorm, momentum=0.9)
  blocks = ReversibleBlocks(ConvBlock(norm=norm, parent=None), 2)
  made = dict(jit(blocks.init)(KEY, PAIR))
  old = made["batch_stats"]["f"]["norm"]
  assert old["mean"].shape == (2, 6) and (old["mean"] == 0).all()
  _, new, _ = graded(blocks, made)
  found = new["batch_stats"]["f"]["norm"]
  seen = np.asarray(PAIR[1])
  np.testing.assert_allclose(
    found["mean"][0], 0.1 * seen.mean((0, 1, 2)), rtol=1e-2, atol=1e-5
  )
  np.testing.assert_allclose(
    found["var"][0], 0.9 + 0.1 * seen.var((0, 1, 2)), rtol=1e-3
  )
  assert np.abs(found["mean"][1] - found["mean"][0]).max() > 1e-3
  _, quiet, _ = graded(blocks, made, train=False)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, quiet["batch_stats"], made["batch_stats"])
  )


def test_layers_are_drawn_apart():
  """Of f, of g, and of each layer: no two kernels are alike."""
  blocks = ReversibleBlocks(ConvBlock(parent=None), 3)
  params = jit(blocks.init)(KEY, PAIR)["params"]
  kernels = [
    params[name]["conv"]["kernel"][i] for name in "fg" for i in range(3)
  ]
  for i, a in enumerate(kernels):
    for b in kernels[:i]:
      assert distance(a, b) > 0.5


def test_dropout_takes_whole_channels():
  """With a branch of ones, streams move by 2 or not at all."""

  class Ones(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      return jnp.ones_like(x) * self.param("one", nn.initializers.ones, ())

  blocks = ReversibleBlocks(Ones(), 1, dropout=0.5)
  made = blocks.init(KEY, PAIR)
  y1, y2 = blocks.apply(made, PAIR, train=True, rngs={"dropout": KEY})
  for y, x in zip((y1, y2), PAIR, strict=True):
    moved = np.asarray(y - x)
    one = np.round(moved[:, :1, :1] / 2) * 2
    np.testing.assert_allclose(moved, np.broadcast_to(one, y.shape), atol=1e-3)
    assert {0.0, 2.0} == set(one.ravel().tolist())
  y1, _ = blocks.apply(made, PAIR)
  np.testing.assert_allclose(y1 - PAIR[0], 1, atol=1e-3)


def test_other_collections_are_refused():
  class Counter(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      self.variable("counts", "calls", jnp.zeros, ())
      return x * self.param("one", nn.initializers.ones, ())

  with pytest.raises(ValueError, match="the branch has counts besides params"):
    ReversibleBlocks(Counter(), 2).init(KEY, PAIR)


def test_the_inverse_is_exact_in_a_volume():
  """Where a norm that sums 262,144 values at once would not be alike."""
  depth, channels = 2, 8
  branch = MBConv(expand=2, activation=jax.nn.leaky_relu, parent=None)

  def run(p, x, *, key, state, aux):
    return branch.apply({"params": p}, x), state

  def draw(key):
    small = jnp.zeros((1, 2, 2, 2, channels))
    init = lambda key: branch.init(key, small)["params"]
    return jit(jax.vmap(init))(jax.random.split(key, depth))

  keys = jax.random.split(KEY, 3)
  # A ball in the dark, as a head is.
  side = jnp.linspace(-1, 1, 64) ** 2
  inside = side[:, None, None] + side[:, None] + side < 0.6
  noise = jax.random.normal(keys[0], (2, 1, 64, 64, 64, channels))
  x = inside[..., None] * (1 + 0.2 * noise)
  params = draw(keys[1]), draw(keys[2])
  assert assert_reversible(run, run, params, (x[0], x[1])).mismatches == 0
