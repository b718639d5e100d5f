"""Stacks: loops and layers written out, kept and recomputed, are equal."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention
from isthmus.nets import Stack, stack_layers, unstack_layers
from isthmus.nets.stack import is_reversible
from isthmus.nets.vision.unet3d import UNet3D

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
DEPTH = 3


class Residual(nn.Module):
  """A block that returns x alone, and may drop and shift."""

  rate: float = 0.0

  @nn.compact
  def __call__(self, x, *, train=False, shift=None):
    h = jnp.tanh(nn.Dense(16, name="up")(x))
    if self.rate:
      h = nn.Dropout(self.rate, name="drop")(h, deterministic=not train)
    x = x + nn.Dense(x.shape[-1], name="down")(h)
    return x if shift is None else x + shift


class Tally(nn.Module):
  """A block with an input and an output of its own."""

  @nn.compact
  def __call__(self, x, *, state):
    y = nn.Dense(x.shape[-1], name="dense")(x) + state["bias"]
    return y, {"state": {"bias": state["bias"] + 1}, "norm": (y**2).sum()}


def make(scan, mode, block=None, **kwargs):
  return Stack(block or Residual(), DEPTH, scan=scan, mode=mode, **kwargs)


def shared_params():
  params = make(True, "plain").init(jax.random.key(1), X)["params"]
  return {True: params, False: unstack_layers(params)}


COMBINATIONS = [(s, m) for s in (True, False) for m in ("plain", "remat")]


def test_all_combinations_have_equal_values_and_gradients():
  params, results = shared_params(), []
  for scan, mode in COMBINATIONS:
    model = make(scan, mode)

    def loss(params, x, shift, model=model):
      y, aux = model.apply({"params": params}, x, shift=shift)
      assert aux == {}
      return (y**2).sum(), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (dp, dx, dshift), y = gradient(params[scan], X, jnp.ones(8))
    results.append((dp if scan else stack_layers(dp), dx, dshift, y))
    assert np.abs(dshift).min() > 0
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
      results[0],
      other,
    )


@pytest.mark.parametrize("scan, mode", COMBINATIONS)
def test_recomputation_is_there_in_mode_remat_only(scan, mode):
  params = shared_params()[scan]
  model = make(scan, mode)

  def loss(params):
    return model.apply({"params": params}, X)[0].sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert ("remat" in text or "checkpoint" in text) == (mode == "remat")
  assert ("scan" in text) == scan


def test_layers_differ():
  params = make(True, "plain").init(jax.random.key(1), X)["params"]
  kernel = params["blocks"]["up"]["kernel"]
  assert kernel.shape == (DEPTH, 8, 16)
  assert (kernel[0] != kernel[1]).any()
  params = make(False, "plain").init(jax.random.key(1), X)["params"]
  assert sorted(params) == ["block_00", "block_01", "block_02"]


@pytest.mark.parametrize("scan, mode", COMBINATIONS)
def test_inputs_and_outputs_of_each_layer(scan, mode):
  model = make(scan, mode, Tally())
  state = {"bias": jnp.arange(DEPTH * 8.0).reshape(DEPTH, 8)}
  layers = {"state": state}
  params = make(True, "plain", Tally()).init(
    jax.random.key(1), X, layers=layers
  )["params"]
  tree = {"params": params if scan else unstack_layers(params)}
  y, aux = jax.jit(lambda p: model.apply(p, X, layers=layers))(tree)
  x = X
  for i in range(DEPTH):
    dense = params["blocks"]["dense"]
    x = x @ dense["kernel"][i] + dense["bias"][i] + state["bias"][i]
    np.testing.assert_allclose(aux["norm"][i], (x**2).sum(), rtol=1e-4)
  np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(aux["state"]["bias"], state["bias"] + 1)
  with pytest.raises(ValueError, match=r"3 layers has the shape \(2, 8\)"):
    model.apply(tree, X, layers={"state": {"bias": jnp.zeros((2, 8))}})


@pytest.mark.parametrize("scan, mode", COMBINATIONS)
def test_dropout_draws_anew_in_each_layer(scan, mode):
  model = make(scan, mode, Residual(rate=0.5))
  params = shared_params()[scan]

  # Zero kernels and a positive bias leave, in `down`, the mask of each layer.
  def run(key, train=True):
    return model.apply(
      {"params": params}, X, train=train, rngs={"dropout": key}
    )[0]

  one, two = jax.random.key(0), jax.random.key(1)
  np.testing.assert_array_equal(run(one), run(one))
  assert (run(one) != run(two)).any()
  np.testing.assert_array_equal(run(one, False), run(two, False))
  masks = masks_of(model, params, one)
  assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


def masks_of(model, params, key):
  """What each layer adds when every hidden unit is tanh(1)."""

  def fill(path, p):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("up/bias"):
      return jnp.ones_like(p)
    if name.endswith("down/kernel"):
      return jnp.broadcast_to(jnp.eye(16, 8), p.shape)
    return jnp.zeros_like(p)

  params = jax.tree.map_with_path(fill, params)
  outs = []
  for last in range(DEPTH):

    def silence(path, p, last=last):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if not name.endswith("down/kernel"):
        return p
      if name.startswith("blocks"):
        return p.at[jnp.arange(DEPTH) != last].set(0)
      return p if name.startswith(f"block_{last:02d}") else p * 0

    only = jax.tree.map_with_path(silence, params)
    y, _ = model.apply(
      {"params": only}, X * 0, train=True, rngs={"dropout": key}
    )
    outs.append(np.asarray(y))
  return outs


def test_memory_grows_slower_with_depth_in_mode_remat():
  x = jnp.ones((8, 64, 32))

  def slope(mode):
    def temp(depth):
      model = Stack(Residual(), depth, mode=mode)
      params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

      def loss(params, x):
        return model.apply({"params": params}, x)[0].sum()

      compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    return (temp(24) - temp(8)) / 16 / x.nbytes

  assert slope("remat") < 0.7 * slope("plain")
  assert slope("remat") < 2  # about its input


class Attend(nn.Module):
  @nn.compact
  def __call__(self, x):
    q = nn.Dense(8, name="q")(x).reshape(*x.shape[:2], 2, 4)
    return x + attention(q, q, q, causal=True).reshape(x.shape)


def test_remat_runs_attention_once_by_default():
  def products(**kwargs):
    model = Stack(Attend(), DEPTH, mode="remat", **kwargs)
    params = model.init(jax.random.key(0), X)["params"]

    def loss(params):
      return model.apply({"params": params}, X)[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

  assert products() < products(policy=None)


def test_conversion_goes_both_ways_at_any_depth():
  params = {"a": shared_params()[True], "b": {"kernel": jnp.ones(3)}}
  apart = unstack_layers(params)
  assert sorted(apart["a"]) == ["block_00", "block_01", "block_02"]
  back = stack_layers(apart)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_order_beyond_ten_layers():
  params = {f"block_{i:02d}": {"w": jnp.full(1, i)} for i in range(120)}
  stacked = stack_layers(params)["blocks"]["w"]
  assert stacked[:, 0].tolist() == list(range(120))
  assert unstack_layers({"blocks": {"w": stacked}}).keys() == params.keys()


def test_bad_settings():
  with pytest.raises(ValueError, match="'reversed' is none of plain, remat"):
    Stack(Residual(), 2, mode="reversed")
  with pytest.raises(ValueError, match="depth is 0"):
    Stack(Residual(), 0)


class Branched(nn.Module):
  """Two branches; f may drop, or keep something beside."""

  rate: float = 0.0
  aux: bool = False
  branches = ("f", "g")

  def setup(self):
    self.up, self.down = nn.Dense(16), nn.Dense(8)
    self.mix = nn.Dense(8)
    self.drop = nn.Dropout(self.rate)

  def f(self, x, *, train=False, shift=None, state=None):
    h = self.drop(jnp.tanh(self.up(x)), deterministic=not train)
    h = self.down(h)
    if shift is not None:
      h = h + shift
    if state is not None:
      return h + state, {"state": state + 1}
    return (h, {"size": h.sum()}) if self.aux else h

  def g(self, x, *, train=False, shift=None, state=None):
    return jnp.sin(self.mix(x))

  def __call__(self, x, **inputs):
    x = x + self.f(x, **inputs)
    return x + self.g(x, **inputs)


TWO = [("plain", {"streams": 2}), ("remat", {"streams": 2}), ("reversible", {})]


def test_two_streams_are_the_same_in_every_mode():
  shift = jax.random.normal(jax.random.key(3), (5, 8))
  one = make(True, "plain", Branched()).init(jax.random.key(1), X)["params"]

  def oracle(params, x, shift):
    x1 = x2 = x
    for i in range(DEPTH):
      own = {"params": jax.tree.map(lambda p, i=i: p[i], params["blocks"])}
      x1 = x1 + Branched().apply(own, x2, shift=shift, method="f")
      x2 = x2 + Branched().apply(own, x1, shift=shift, method="g")
    return (((x1 + x2) / 2) ** 2).sum()

  want = jax.grad(oracle, (0, 1, 2))(one, X, shift)
  for mode, options in [*TWO, ("reversible", {"cache": 0.5})]:
    # On a fine grid: the oracle has none.
    model = make(True, mode, Branched(), grid=20, **options)
    params = model.init(jax.random.key(1), X)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, one)

    def loss(params, x, shift, model=model):
      y, aux = model.apply({"params": params}, x, shift=shift, train=True)
      assert aux == {}
      return (y**2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(params, X, shift)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    jax.tree.map(near, grads, want)
  single = make(True, "plain", Branched())
  apart = (
    single.apply({"params": one}, X)[0] - model.apply({"params": one}, X)[0]
  )
  assert float(jnp.abs(apart).max()) > 1e-3


def test_two_streams_drop_alike_in_every_mode():
  found = []
  for mode, options in TWO:
    model = make(True, mode, Branched(rate=0.5), **options)
    params = model.init(jax.random.key(1), X)["params"]

    def loss(params, key, model=model):
      rngs = {"dropout": key}
      y, _ = model.apply({"params": params}, X, train=True, rngs=rngs)
      return (y**2).sum()

    found.append(jax.grad(loss)(params, jax.random.key(0)))
    assert float(loss(params, jax.random.key(0))) != float(
      loss(params, jax.random.key(1))
    )
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  for grads in found[1:]:
    jax.tree.map(near, grads, found[0])


def test_two_streams_with_an_input_of_each_layer():
  """As a cache is: read and written by a loop, with the same values."""
  model = make(True, "reversible", Branched())
  variables = model.init(jax.random.key(1), X)
  state = jnp.zeros((DEPTH, 2, 5, 8))
  y, aux = model.apply(variables, X, layers={"state": state})
  np.testing.assert_array_equal(aux["state"], state + 1)
  np.testing.assert_allclose(y, model.apply(variables, X)[0], atol=1e-6)


def test_two_streams_refused():
  for match, options in [
    ("mode 'reversible' has 2 streams; streams is 1", {"streams": 1}),
    ("two streams need scan=True", {"scan": False}),
    ("streams is 3; it is 1 or 2", {"streams": 3}),
    ("mode 'plain' has nothing to cache", {"mode": "plain", "cache": 0.5}),
  ]:
    with pytest.raises(ValueError, match=match):
      Stack(Branched(), DEPTH, **{"mode": "reversible", **options})
  with pytest.raises(ValueError, match="two branches; Residual names none"):
    make(True, "reversible").init(jax.random.key(0), X)
  model = make(True, "reversible", Branched(aux=True))
  variables = model.init(jax.random.key(0), X)
  with pytest.raises(ValueError, match="has no aux; f returns size"):
    model.apply(variables, X)


class Wrapped(nn.Module):
  """A model that hands its input on to another, or to one of several."""

  net: nn.Module
  others: tuple[nn.Module, ...] = ()

  def __call__(self, x):
    return self.net(x)


def test_a_reversible_module_is_found_wherever_it_stands():
  plain, back = make(True, "plain"), make(True, "reversible")
  assert is_reversible(back) and not is_reversible(plain)
  assert is_reversible(Wrapped(back)) and not is_reversible(Wrapped(plain))
  assert is_reversible(Wrapped(plain, (plain, Wrapped(back))))
  net = UNet3D(classes=2)
  assert is_reversible(net) and not is_reversible(net.clone(mode="remat"))
