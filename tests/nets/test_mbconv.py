"""Inverted bottlenecks against plain convolutions and their formulas."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets import MBConv, SqueezeExcite
from isthmus.nets.mbconv import round8
from tests.nets.suite import distance

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
IMAGE = jax.random.normal(KEY, (2, 6, 7, 8))
VOLUME = jax.random.normal(KEY, (2, 4, 6, 5, 8))


class Identity(nn.Module):
  """Where a norm would be."""

  param_dtype: type = jnp.float32

  def __call__(self, x):
    return x


linear = functools.partial(MBConv, norm=Identity, activation=lambda x: x)


def init(block, x, seed=1):
  return block.init(jax.random.key(seed), x)


def count(variables):
  return sum(p.size for p in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("x", [IMAGE, VOLUME], ids=["2d", "3d"])
@pytest.mark.parametrize(
  "options, taps, dense",
  [
    # (inside, filter's parameters, matrix products' parameters) by formula.
    ({}, lambda k: k * 32, 8 * 32 + 32 * 8),
    ({"expand": 1.5, "kernel": 5}, lambda k: k * 12, 2 * 8 * 12),
    ({"expand": None}, lambda k: k * 8, 8 * 8),
    ({"fused": True}, lambda k: k * 8 * 32, 32 * 8),
    ({"depthwise": False}, lambda k: 0, 8 * 32 + 32 * 8),
    (
      {"se_ratio": 0.5, "features": 12},
      lambda k: k * 32,
      8 * 32 + 32 * 12 + (32 * 16 + 16) + (16 * 32 + 32),
    ),
  ],
  ids=["plain", "kernel", "narrow", "fused", "dense", "excited"],
)
def test_parameters_and_flops_by_formula(x, options, taps, dense):
  block = MBConv(**options)
  rank = x.ndim - 2
  y, variables = jax.eval_shape(block.init_with_output, KEY, x)
  features = options.get("features", 8)
  assert y.shape == (*x.shape[:-1], features)
  inside = int((options.get("expand", 4) or 1) * 8)
  filters = taps(options.get("kernel", 3) ** rank)
  stages = 2 - (
    options.get("expand", 4) is None
    or options.get("fused", False)
    or not options.get("depthwise", True)
  )
  norms = 2 * (stages * inside + features)
  assert count(variables) == dense + filters + norms
  places = math.prod(x.shape[1:-1])
  products = places * (dense + filters)
  if "se_ratio" in options:  # once a row, and without its biases
    once = 2 * 32 * 16
    products -= places * (once + 16 + 32) - once
  assert block.flops_per_row(x.shape[1:]) == 6 * products


@pytest.mark.parametrize("options", [{}, {"fused": True}])
@pytest.mark.parametrize(
  "x, strides, space",
  [
    (IMAGE, 2, (3, 4)),
    (IMAGE, (1, 3), (6, 3)),
    (VOLUME, 2, (2, 3, 3)),
    (VOLUME, (1, 2, 2), (4, 3, 3)),
  ],
)
def test_strides(options, x, strides, space):
  """Of the filter: every s-th of what it gives without."""
  full, block = linear(**options), linear(strides=strides, **options)
  odd = x[:, : 2 * ((x.shape[1] - 1) // 2) + 1]  # "SAME" is then centred
  y, variables = jax.jit(block.init_with_output)(KEY, x)
  assert y.shape == (2, *space, 8)
  assert block.flops_per_row(x.shape[1:]) < full.flops_per_row(x.shape[1:])
  if strides == 2:
    x = odd[:, :, : 2 * ((x.shape[2] - 1) // 2) + 1]
    x = x[..., : 2 * ((x.shape[-2] - 1) // 2) + 1, :]
    step = (slice(None), *(slice(None, None, 2),) * (x.ndim - 2))
    np.testing.assert_allclose(
      block.apply(variables, x),
      full.apply(variables, x)[step],
      rtol=1e-4,
      atol=1e-5,
    )


@pytest.mark.parametrize("x", [IMAGE, VOLUME], ids=["2d", "3d"])
def test_depthwise_is_grouped(x):
  """A channel inside is filtered by itself: zero its projection, it is gone."""
  block = linear(expand=None)
  variables = init(block, x)
  variables["params"]["project"]["kernel"] = jnp.eye(8)
  moved = x.at[..., 3].add(jax.random.normal(KEY, x.shape[:-1]))
  change = block.apply(variables, moved) - block.apply(variables, x)
  apart = np.abs(change).max(axis=tuple(range(x.ndim - 1)))
  assert apart[3] > 0.1 and (np.delete(apart, 3) == 0).all()


@pytest.mark.parametrize("x", [IMAGE, VOLUME], ids=["2d", "3d"])
def test_fused_is_the_two_first_convolutions_composed(x):
  """When all is linear: W_tch = expand_ch depthwise_th."""
  block, fused = linear(strides=2), linear(strides=2, fused=True)
  variables = init(block, x)
  params = dict(variables["params"])
  narrow, filters = params.pop("expand"), params.pop("depthwise")
  kernel = narrow["kernel"] * filters["kernel"]  # [*k, 1, h] -> [*k, c, h]
  params["expand"] = {"kernel": kernel}
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, init(fused, x)["params"]
  )
  np.testing.assert_allclose(
    fused.apply({"params": params}, x),
    block.apply(variables, x),
    rtol=1e-4,
    atol=1e-4,
  )


def group_norm(x, layer, groups):
  parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  mean = parts.mean((1, 3), keepdims=True)
  var = parts.var((1, 3), keepdims=True)
  y = ((parts - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape)
  return y * layer["scale"] + layer["bias"]


def formula(params, x):
  """A residual MBConv of 48 channels inside, excited, in jax.lax."""
  p = params
  h = x @ p["expand"]["kernel"]
  h = jax.nn.silu(group_norm(h, p["expand_norm"], 24))
  h = jax.lax.conv_general_dilated(
    h,
    p["depthwise"]["kernel"],
    (1, 1, 1),
    "SAME",
    dimension_numbers=("NZYXC", "ZYXIO", "NZYXC"),
    feature_group_count=48,
  )
  h = jax.nn.silu(group_norm(h, p["depthwise_norm"], 24))
  z = h.mean((1, 2, 3), keepdims=True)
  z = z @ p["excite"]["squeeze"]["kernel"] + p["excite"]["squeeze"]["bias"]
  z = jax.nn.silu(z) @ p["excite"]["excite"]["kernel"]
  h = h * jax.nn.sigmoid(z + p["excite"]["excite"]["bias"])
  return x + group_norm(h @ p["project"]["kernel"], p["project_norm"], 8)


def test_values_and_gradients_are_the_formula_s_in_float64():
  """The float32 block as well, to its own precision."""
  block = MBConv(expand=6, se_ratio=0.25, residual=True)
  variables = init(block, VOLUME)
  rng = np.random.default_rng(0)
  draw = lambda p: p + 0.3 * rng.standard_normal(p.shape)
  params = jax.tree.map(draw, jax.tree.map(np.asarray, variables["params"]))
  dy = rng.standard_normal(VOLUME.shape)

  def graded(call, dtype):
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
    y, pull = jax.vjp(call, cast(params), cast(np.asarray(VOLUME)))
    return y, *pull(cast(dy))

  with jax.enable_x64(True):
    wide = block.clone(dtype=jnp.float64)
    exact = jax.jit(lambda: graded(formula, jnp.float64))()
    ours = jax.jit(
      lambda: graded(lambda p, x: wide.apply({"params": p}, x), jnp.float64)
    )()
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(ours))
    for error in jax.tree.leaves(jax.tree.map(distance, ours, exact)):
      assert error < 1e-9
  narrow = jax.jit(
    lambda: graded(lambda p, x: block.apply({"params": p}, x), jnp.float32)
  )()
  for error in jax.tree.leaves(jax.tree.map(distance, narrow, exact)):
    assert error < 1e-4


def test_one_array_is_kept_for_each_convolution():
  """Not what norms and activations gave: x, and what three of them gave."""
  block = MBConv(expand=4, dtype=jnp.bfloat16)
  x = VOLUME.astype(jnp.bfloat16)
  variables = init(block, x)
  _, pull = jax.vjp(
    lambda p, x: block.apply({"params": p}, x), variables["params"], x
  )
  kept = [k for k in jax.tree.leaves(pull) if k.size >= x.size]
  assert all(k.dtype == jnp.bfloat16 for k in kept)
  sizes = sorted({(k.size // x.size) for k in kept})
  assert sizes == [1, 4]
  assert sum(k.size for k in kept) <= (1 + 4 + 4 + 4 + 4 + 1) * x.size


# --- batch normalisation ---


@pytest.mark.parametrize(
  "norm, momentum",
  [("batch", 0.99), (functools.partial(nn.BatchNorm, momentum=0.5), 0.5)],
  ids=["name", "partial"],
)
def test_running_statistics_move_once(norm, momentum):
  block = MBConv(norm=norm, depthwise=False)
  x = IMAGE + 2.0
  variables = init(block, x)
  assert set(variables["batch_stats"]) == {"expand_norm", "project_norm"}

  def loss(params):
    y, new = block.apply(
      {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
    )
    return (y**2).sum(), new["batch_stats"]

  _, new = jax.grad(loss, has_aux=True)(variables["params"])
  h = np.asarray(x @ variables["params"]["expand"]["kernel"])
  found = new["expand_norm"]
  mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
  np.testing.assert_allclose(
    found["mean"], (1 - momentum) * mean, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    found["var"], momentum + (1 - momentum) * var, rtol=1e-4
  )
  quiet = block.apply(variables, x, mutable=["batch_stats"])[1]
  assert jax.tree.all(
    jax.tree.map(
      np.array_equal, quiet, {"batch_stats": variables["batch_stats"]}
    )
  )


# --- excitation ---


def test_open_gates_change_nothing():
  layer = SqueezeExcite(4)
  variables = init(layer, VOLUME)
  assert not np.allclose(layer.apply(variables, VOLUME), VOLUME, rtol=0.1)
  excite = variables["params"]["excite"]
  excite["kernel"] = jnp.zeros_like(excite["kernel"])
  excite["bias"] = jnp.full_like(excite["bias"], 100.0)
  np.testing.assert_array_equal(layer.apply(variables, VOLUME), VOLUME)
  excite["bias"] = excite["bias"].at[2].set(-100.0)
  y = np.asarray(layer.apply(variables, VOLUME))
  assert (y[..., 2] == 0).all() and (y[..., 3] == VOLUME[..., 3]).all()


def test_the_squeeze_is_a_mean_over_space_summed_in_float32():
  """Of 4096 ones bfloat16 would count 256."""
  layer = SqueezeExcite(1, activation=lambda z: z, gate=lambda z: z)
  params = {
    "squeeze": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)},
    "excite": {"kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)},
  }
  x = jnp.ones((1, 16, 16, 16, 2), jnp.bfloat16)
  y = jnp.asarray(layer.apply({"params": params}, x))
  assert y.dtype == jnp.bfloat16 and y.min() == y.max() == 2


def test_round8():
  """Sizes of the published nets: 96, 192, 384 and 768 inside, a quarter."""
  assert [round8(n / 4) for n in (96, 192, 384, 768)] == [24, 48, 96, 192]
  assert [round8(n) for n in (0.5, 11.9, 12, 20)] == [8, 8, 16, 24]


# --- what is refused ---


@pytest.mark.parametrize(
  "options, message",
  [
    ({"kernel": 0}, "kernel is 0; it must be at least 1"),
    ({"strides": (2, 0)}, r"strides is \(2, 0\); it must be at least 1"),
    ({"features": 0}, "features is 0; it must be above 0"),
    ({"expand": 0}, "expand is 0; it must be above 0"),
    ({"se_ratio": -1.0}, "se_ratio is -1.0; it must be above 0"),
    ({"norm": "layer"}, "norm is 'layer'; it is 'group', 'batch'"),
    ({"fused": True, "expand": None}, "expand is None and fused=True"),
    ({"depthwise": False, "expand": None}, "expand is None and depthwise=Fa"),
    ({"depthwise": False, "strides": 2}, "strides are 2 and depthwise=False"),
    ({"residual": True, "strides": 2}, "a residual with strides 2; set"),
  ],
)
def test_what_can_not_be_built_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    MBConv(**options)


@pytest.mark.parametrize(
  "options, x, message",
  [
    (
      {"residual": True, "features": 6},
      IMAGE,
      "a residual of 6 features onto 8 channels",
    ),
    ({"expand": 1.3}, IMAGE, "expand is 1.3, times 8 channels is 10.4"),
    ({"kernel": (3, 3)}, VOLUME, r"kernel is \(3, 3\); x has 3 axes of space"),
    ({"strides": (2, 2, 2)}, IMAGE, r"strides is \(2, 2, 2\); x has 2 axes"),
    ({}, IMAGE[:, :1, :1], "32 groups of 32 channels at 1 place"),
  ],
)
def test_what_does_not_fit_is_refused(options, x, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(MBConv(**options).init, KEY, x)


def test_one_place_is_enough_for_another_norm():
  x = IMAGE[:, :1, :1]
  assert MBConv(norm="batch").init_with_output(KEY, x)[0].shape == x.shape


def test_hidden_below_one_is_refused():
  with pytest.raises(ValueError, match="hidden is 0; it must be at least 1"):
    SqueezeExcite(0)
