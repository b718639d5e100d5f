"""RMSNorm against its formula; norms by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets import RMSNorm
from isthmus.nets.norm import GroupNorm, count_groups, make_norm, rms_norm


def test_formula_and_gradients():
  x = jax.random.normal(jax.random.key(0), (2, 3, 8)) * 3
  scale = jnp.linspace(0.5, 2, 8)

  def formula(x, scale):
    return scale * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)

  ours = jax.vjp(lambda *a: rms_norm(*a, 1e-3), x, scale)
  plain = jax.vjp(formula, x, scale)
  np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5)
  for a, b in zip(ours[1](x), plain[1](x), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_are_float32():
  """Squares of 300 overflow float16, and their sum stops in bfloat16."""
  for dtype in (jnp.float16, jnp.bfloat16):
    x = jnp.full((1, 512), 300, dtype)
    y = RMSNorm().apply({"params": {"scale": jnp.ones(512)}}, x)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float32), 1, rtol=1e-2)


def test_nothing_wide_is_kept():
  """Of a bfloat16 input, no float32 copy is saved for the backward pass."""
  x = jnp.ones((4, 512), jnp.bfloat16)
  _, pull = jax.vjp(lambda x: rms_norm(x, jnp.ones(512), 1e-6), x)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
  assert kept and all(leaf.dtype == jnp.bfloat16 for leaf in kept)


def test_parameters():
  params = RMSNorm(param_dtype=jnp.bfloat16).init(
    jax.random.key(0), jnp.ones((1, 6))
  )["params"]
  assert params["scale"].tolist() == [1] * 6
  assert params["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "channels, groups", [(1, 1), (7, 7), (34, 17), (37, 1), (60, 30), (96, 32)]
)
def test_groups_divide_the_channels(channels, groups):
  assert count_groups(channels) == groups
  layer = make_norm("group", (2, 5, channels))
  x = jax.random.normal(jax.random.key(0), (2, 5, channels)) + 3.0
  y = np.asarray(layer.init_with_output(jax.random.key(0), x)[0])
  parts = y.reshape(2, 5, groups, -1)
  np.testing.assert_allclose(parts.mean((1, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(parts.var((1, 3)), 1, rtol=1e-4)


def test_batch_norm_by_training_and_by_name():
  x = jax.random.normal(jax.random.key(0), (64, 3)) + 3.0
  for norm in ("batch", functools.partial(nn.BatchNorm, momentum=0.5)):
    variables = make_norm(norm, (64, 3)).init(jax.random.key(0), x)
    quiet = make_norm(norm, (64, 3)).apply(variables, x)
    np.testing.assert_allclose(quiet, x, rtol=1e-4)
    y, new = make_norm(norm, (64, 3), train=True).apply(
      variables, x, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)
    share = 0.01 if norm == "batch" else 0.5
    np.testing.assert_allclose(
      new["batch_stats"]["mean"], share * x.mean(0), rtol=1e-4
    )


def test_a_norm_of_another_kind():
  layer = make_norm(RMSNorm, (1, 6), param_dtype=jnp.bfloat16, name="norm")
  assert isinstance(layer, RMSNorm) and layer.param_dtype == jnp.bfloat16
  with pytest.raises(ValueError, match="norm is 'layer'; it is 'group', 'ba"):
    make_norm("layer", (1, 6))
  with pytest.raises(ValueError, match="6 groups of 6 channels at 1 place"):
    make_norm("group", (2, 1, 1, 6))
  assert make_norm("group", (2, 1, 1, 34))  # two channels a group


@pytest.mark.parametrize("shape", [(2, 8), (2, 5, 8), (2, 3, 4, 5, 8)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_is_flax_s(shape, groups):
  x = jax.random.normal(jax.random.key(0), shape) * 3 + 1
  weights = jax.random.normal(jax.random.key(1), (2, 8))
  variables = {"params": {"scale": weights[0], "bias": weights[1]}}
  made = GroupNorm(groups).init(jax.random.key(0), x)
  flax = nn.GroupNorm(groups, use_fast_variance=False)
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, made, flax.init(jax.random.key(0), x))
  )
  ours, theirs = (
    jax.vjp(lambda v, x, n=norm: n.apply(v, x), variables, x)
    for norm in (GroupNorm(groups), flax)
  )
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  near(ours[0], theirs[0])
  jax.tree.map(near, ours[1](x), theirs[1](x))


def test_group_norm_of_a_volume_is_accurate():
  """Far from 0, where one sum of 262,144 float32 loses four digits."""
  x = np.random.default_rng(0).normal(20, 1, (1, 64, 64, 64, 2))
  want = (x - x.mean((1, 2, 3))) / x.std((1, 2, 3))
  layer = GroupNorm(2, eps=0.0)
  y = layer.apply(
    layer.init(jax.random.key(0), jnp.ones((1, 2, 2, 2, 2))),
    jnp.asarray(x, jnp.float32),
  )
  # float32 has 7 digits, and 20 takes one of them.
  assert np.abs(np.asarray(y) - want).max() < 2e-5


def test_group_norm_refuses_groups_that_do_not_divide():
  with pytest.raises(ValueError, match="8 channels in 3 groups"):
    GroupNorm(3).init(jax.random.key(0), jnp.ones((1, 2, 8)))
