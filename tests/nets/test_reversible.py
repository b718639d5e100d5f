"""Reversible stacks: exact, equal to autodiff of the same values, flat."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.reversible import (
  assert_reversible,
  choose_cache,
  reversible_inverse,
  reversible_stack,
)

WIDTH = 16


def norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def make_mlp(dtype=jnp.float32, rate=0.0):
  """A pre-norm MLP, with dropout, scaled by `aux["scale"]` if there is one."""

  def mlp(p, x, *, key, state, aux):
    h = norm(x).astype(dtype) @ p["up"].astype(dtype)
    h = jax.nn.gelu(h)
    if rate:
      h = h * jax.random.bernoulli(key, 1 - rate, h.shape) / (1 - rate)
    h = h @ p["down"].astype(dtype)
    return (h * aux["scale"].astype(dtype) if aux else h), state

  return mlp


def draw(depth, *, width=WIDTH, rows=(3, 5), seed=0):
  """Parameters of f and g, and two different streams."""
  keys = iter(jax.random.split(jax.random.key(seed), 6))

  def params():
    up = jax.random.normal(next(keys), (depth, width, 4 * width))
    down = jax.random.normal(next(keys), (depth, 4 * width, width))
    return {"up": up * width**-0.5, "down": down * 0.25 * width**-0.5}

  pair = [jax.random.normal(next(keys), (*rows, width)) for _ in range(2)]
  return (params(), params()), tuple(pair)


def rel(tree, other):
  """The largest relative difference of two trees' leaves, in L2."""
  apart = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  return max(jax.tree.leaves(jax.tree.map(apart, tree, other)))


def score(y):
  return (y[0] ** 2).mean() + jnp.sin(3 * y[1]).mean()


def gradients(f, params, x, aux=None, **options):
  def loss(params, x, aux):
    y, _ = reversible_stack(f, f, params, x, aux=aux, **options)
    return score(y)

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, x, aux)


def written_out(f, params, x, *, keys, aux, grid):
  """The same stack, without the module under test."""

  def snap(d):
    d = d.astype(jnp.float32)
    low = jnp.round(d * 2**grid) / 2**grid
    return d + jax.lax.stop_gradient(low - d)

  x1, x2 = (snap(s) for s in x)
  for i in range(len(keys)):
    pf, pg = jax.tree.map(lambda leaf, i=i: leaf[i], params)
    d, _ = f(pf, x2, key=keys[i, 0], state=None, aux=aux)
    x1 = x1 + snap(d)
    d, _ = f(pg, x1, key=keys[i, 1], state=None, aux=aux)
    x2 = x2 + snap(d)
  return x1, x2


@pytest.mark.parametrize("cache", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_inverse_is_exact_at_depth_128(dtype, cache):
  params, x = draw(128)
  found = assert_reversible(
    make_mlp(dtype, 0.1),
    make_mlp(dtype, 0.1),
    params,
    x,
    keys=jax.random.key(1),
    cache=cache,
  )
  assert found.error == 0 and found.mismatches == 0
  assert 4 < found.largest < found.limit == 4096


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [0.0, 0.5])
@pytest.mark.parametrize("depth", [48, 128])
def test_the_inverse_is_exact_on_a_gpu(depth, cache):
  params, x = draw(depth, width=512, rows=(4, 256))
  f = make_mlp(jnp.bfloat16)
  found = assert_reversible(f, f, params, x, cache=cache)
  assert found.mismatches == 0 and found.largest > 4


@jax.custom_vjp
def less_one(x):
  """exp(x) - 1."""
  return jnp.exp(x) - 1


less_one.defvjp(lambda x: (jnp.expm1(x), x), lambda x, d: (d * jnp.exp(x),))


def test_a_branch_whose_derivative_rounds_otherwise():
  """Both passes of a gradient compute what the derivative's rule does."""
  x = jax.random.normal(jax.random.key(0), (1000,))
  x = x, x[::-1]
  params = jnp.linspace(0.5, 1.5, 40), jnp.linspace(1.5, 0.5, 40)

  def f(p, x, *, key, state, aux):
    return jnp.sin(less_one(jnp.sin(p * x))), state

  # So fine a grid that a last bit is seen.
  run = lambda x: reversible_stack(f, f, params, x, grid=18)[0]
  unlike = lambda a, b: any((p != q).any() for p, q in zip(a, b, strict=True))
  y, _ = jax.vjp(run, x)
  assert unlike(y, run(x))
  found = assert_reversible(f, f, params, x, grid=18)
  assert found.mismatches == 0 and found.largest < found.limit == 64
  inverse = functools.partial(reversible_inverse, f, f, params, grid=18)
  start = inverse(run(x))
  assert not unlike(start, [jnp.round(s * 2**18) / 2**18 for s in x])
  assert unlike(start, inverse(y))


def test_without_a_grid_the_inverse_drifts():
  """What the grid is for, and that the check can fail."""
  params, x = draw(64)
  f = make_mlp(jnp.bfloat16)
  with pytest.raises(AssertionError, match="inputs differ, by"):
    assert_reversible(f, f, params, x, grid=None)
  found = assert_reversible(f, f, params, x, grid=None, atol=1.0)
  assert found.error > 0 and found.mismatches > 100
  assert found.limit == float("inf")


def test_streams_beyond_the_limit_are_told():
  params, x = draw(2)
  f = make_mlp()
  large = jax.tree.map(lambda s: 40 * s, x)
  with pytest.raises(AssertionError, match="exact below 16: take a smaller"):
    assert_reversible(f, f, params, large, grid=20)
  assert_reversible(f, f, params, large, grid=12)


def test_reversible_inverse_gives_the_inputs():
  params, x = draw(9)
  f, keys = make_mlp(jnp.bfloat16, 0.2), jax.random.key(3)
  aux = {"scale": jnp.linspace(0.5, 1.5, WIDTH)}
  y, _ = reversible_stack(f, f, params, x, keys=keys, aux=aux)
  back = reversible_inverse(f, f, params, y, keys=keys, aux=aux)
  for found, given in zip(back, x, strict=True):
    np.testing.assert_array_equal(found, jnp.round(given * 4096) / 4096)
  other = reversible_inverse(f, f, params, y, keys=jax.random.key(4), aux=aux)
  assert float(jnp.abs(other[0] - back[0]).max()) > 0.1


@functools.cache
def of_autodiff(dtype):
  """Value and gradients: a Python loop's, in bfloat16 mode "plain"'s.

  XLA keeps more bits than bfloat16 has in a loop that it sees whole.
  """
  depth = 7
  params, x = draw(depth)
  f, aux = make_mlp(dtype, 0.2), {"scale": jnp.linspace(0.5, 1.5, WIDTH)}
  keys = jax.random.split(jax.random.key(2), (depth, 2))
  if dtype == jnp.bfloat16:
    return gradients(f, params, x, aux, keys=keys, mode="plain")

  def loss(params, x, aux):
    return score(written_out(f, params, x, keys=keys, aux=aux, grid=12))

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, x, aux)


@pytest.mark.parametrize(
  ("dtype", "mode", "cache", "bound"),
  [
    (jnp.float32, "plain", 0.0, 1e-5),
    (jnp.float32, "remat", 0.0, 1e-5),
    (jnp.float32, "reversible", 0.0, 1e-5),
    (jnp.float32, "reversible", 0.3, 1e-5),
    (jnp.float32, "reversible", 1.0, 1e-5),
    (jnp.bfloat16, "remat", 0.0, 5e-3),
    (jnp.bfloat16, "reversible", 0.0, 5e-3),
    (jnp.bfloat16, "reversible", 0.3, 5e-3),
  ],
)
def test_values_and_gradients_are_those_of_autodiff(dtype, mode, cache, bound):
  """With dropout and conditioning."""
  params, x = draw(7)
  f, aux = make_mlp(dtype, 0.2), {"scale": jnp.linspace(0.5, 1.5, WIDTH)}
  keys = jax.random.split(jax.random.key(2), (7, 2))
  want, grads = of_autodiff(dtype)
  found, mine = gradients(f, params, x, aux, keys=keys, mode=mode, cache=cache)
  np.testing.assert_allclose(found, want, rtol=1e-5)
  assert rel(mine, grads) < bound


def test_a_key_is_split_and_gradients_repeat():
  params, x = draw(4)
  f, key = make_mlp(jnp.bfloat16, 0.5), jax.random.key(0)
  first = gradients(f, params, x, keys=key)
  keys = jax.random.split(key, (4, 2))
  again = gradients(f, params, x, keys=keys)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  other, _ = gradients(f, params, x, keys=keys[::-1])
  assert abs(float(other - first[0])) > 1e-4


def test_cached_and_recomputed_gradients_are_bitwise_equal():
  params, x = draw(6)
  f = make_mlp(jnp.bfloat16)
  whole = gradients(f, params, x)
  for cache in (0.5, 1.0):
    part = gradients(f, params, x, cache=cache)
    jax.tree.map(np.testing.assert_array_equal, part, whole)


def test_state_is_updated_once_and_has_no_gradient():
  """Running means: the new ones, of the old ones, by one forward pass."""
  params, x = draw(3)

  def mlp(p, x, *, key, state, aux):
    h = norm(x) @ p["up"]
    mean = {"mean": 0.9 * state["mean"] + 0.1 * h.mean((0, 1))}
    dx = (jax.nn.gelu(h - h.mean((0, 1))) + state["mean"]) @ p["down"]
    return dx, mean

  state = {"mean": jax.random.normal(jax.random.key(7), (3, 4 * WIDTH))}
  results = {}
  for mode in ("plain", "remat", "reversible"):

    def loss(params, state, mode=mode):
      y, new = reversible_stack(
        mlp, mlp, params, x, state=(state, state), mode=mode
      )
      return score(y) + new[0]["mean"].sum(), new

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (d_params, d_state), new = grad(params, state)
    # The new state is data: nothing flows through it, or into the old one.
    results[mode] = d_params, new
    if mode == "reversible":
      assert not jnp.any(d_state["mean"])
    first = jax.tree.map(lambda leaf: leaf[0], (params[0], state))
    _, want = mlp(first[0], x[1], key=None, state=first[1], aux=None)
    np.testing.assert_allclose(new[0]["mean"][0], want["mean"], atol=1e-4)
    assert float(jnp.abs(new[0]["mean"] - state["mean"]).max()) > 0.05
  for mode in ("remat", "reversible"):
    assert rel(results[mode], results["plain"]) < 1e-5


def test_arrays_that_are_not_floating_point_have_no_gradient():
  """Integers among parameters and aux, and bfloat16 aux summed in float32."""
  depth = 64
  x = (jnp.ones((2, 4)), jnp.ones((2, 4)))
  params = {"w": jnp.ones((depth, 4)), "turn": jnp.arange(depth)}
  aux = {"ids": jnp.arange(2), "shift": jnp.zeros(4, jnp.bfloat16)}

  def add(p, x, *, key, state, aux):
    sign = 1 - 2 * (p["turn"] % 2)
    ids = aux["ids"][:, None]
    return p["w"] * sign + aux["shift"].astype(jnp.float32) + 0 * ids, state

  def loss(w, shift, mode):
    p = params | {"w": w}
    y, _ = reversible_stack(
      add, add, (p, p), x, aux=aux | {"shift": shift}, mode=mode
    )
    return y[0].sum() + 1e-3 * y[1].sum()

  grad = jax.grad(loss, (0, 1))
  a = grad(params["w"], aux["shift"], "reversible")
  b = grad(params["w"], aux["shift"], "plain")
  np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
  # 2 rows, 64 layers: 128.128 a column; in bfloat16 0.002 would be lost.
  np.testing.assert_array_equal(a[1], jnp.full(4, 128.128, jnp.bfloat16))


def test_differentiated_twice():
  params, x = draw(3)
  f = make_mlp()

  def loss(scale, mode):
    y, _ = reversible_stack(f, f, params, x, aux={"scale": scale}, mode=mode)
    return score(y)

  scale = jnp.linspace(0.5, 1.5, WIDTH)
  slope = lambda scale, mode: (jax.grad(loss)(scale, mode) ** 2).sum()
  a, b = (jax.grad(slope)(scale, mode) for mode in ("reversible", "plain"))
  assert float(jnp.abs(b).max()) > 1e-5
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_forward_mode_is_refused_in_words():
  params, x = draw(2)
  f = make_mlp()
  run = lambda x, mode: reversible_stack(f, f, params, x, mode=mode)[0]
  with pytest.raises(TypeError, match="mode 'plain' or 'remat' computes"):
    jax.jvp(functools.partial(run, mode="reversible"), (x,), (x,))
  _, slope = jax.jvp(functools.partial(run, mode="plain"), (x,), (x,))
  assert float(jnp.abs(slope[0]).max()) > 0


def test_vmap():
  params, x = draw(3, rows=(4, 5))
  f = make_mlp()

  def one(x):
    return jax.grad(lambda x: score(reversible_stack(f, f, params, x)[0]))(x)

  rows = [one(jax.tree.map(lambda s, i=i: s[i], x)) for i in range(4)]
  want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
  assert rel(jax.vmap(one)(x), want) < 1e-5


def test_sharded_over_data_and_model():
  """2 x 2 devices: the same gradients, laid out as the parameters are."""
  params, x = draw(4, rows=(4, 5))
  f = make_mlp()
  mesh = jax.make_mesh(
    (2, 2),
    ("data", "model"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )
  spec = {"up": jax.P(None, None, "model"), "down": jax.P(None, "model", None)}
  place = lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s))
  placed = tuple(jax.tree.map(place, p, spec) for p in params)
  rows = jax.tree.map(lambda s: place(s, jax.P("data")), x)
  for cache in (0.0, 0.5):

    def loss(params, x, cache=cache):
      return score(reversible_stack(f, f, params, x, cache=cache)[0])

    grad = jax.jit(jax.grad(loss))
    found = grad(placed, rows)
    assert rel(found, jax.grad(loss)(params, x)) < 1e-5
    for leaf, given in zip(
      jax.tree.leaves(found), jax.tree.leaves(placed), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(given.sharding, leaf.ndim)
    text = grad.lower(placed, rows).compile().as_text()
    assert "all-reduce" in text
    # The weights stay where they are, forwards and backwards.
    assert not re.search(r"f32\[(4,)?16,64\]\S* all-gather", text)


def compiled(depth, *, f=None, width=64, rows=(4, 64), **options):
  params, x = jax.eval_shape(lambda: draw(depth, width=width, rows=rows))
  f = f or make_mlp(jnp.bfloat16)

  def loss(params, x):
    return score(reversible_stack(f, f, params, x, **options)[0])

  return jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()


def temporary(depth, **options):
  """Bytes of temporaries of a gradient."""
  return compiled(depth, **options).memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_depth():
  assert temporary(64) < 1.05 * temporary(16)
  _, x = jax.eval_shape(lambda: draw(64, width=64, rows=(4, 64)))
  streams = 4 * (x[0].size + x[1].size)
  grown = temporary(64, mode="remat") - temporary(16, mode="remat")
  np.testing.assert_allclose(grown, 48 * streams, rtol=0.05)
  assert temporary(64, mode="plain") > 3.5 * temporary(16, mode="plain")


def test_a_cache_takes_the_bytes_it_says():
  f = make_mlp(jnp.bfloat16)
  params, x = draw(32, width=64, rows=(4, 64))
  layer = 2 * 2 * x[0].size  # two branches, two bytes
  assert choose_cache(8 * layer, f, f, params, x) == 0.25
  assert choose_cache(8 * layer - 1, f, f, params, x) == 7 / 32
  assert choose_cache(1e12, f, f, params, x) == 1
  assert choose_cache(0, f, f, params, x) == 0
  grown = temporary(32, cache=0.75) - temporary(32, cache=0.25)
  # XLA of jax 0.10 keeps a second copy of them on a CPU, and some streams more.
  copies, slack = (1, 1.05) if jax.__version_info__ >= (0, 11) else (2, 1.15)
  np.testing.assert_allclose(grown, copies * 16 * layer, rtol=0.05)
  # Nothing else: g is done before f begins, as without a cache.
  limit = temporary(32) + copies * 16 * layer
  assert temporary(32, cache=0.5) < slack * limit


def test_remat_keeps_no_copies_of_parameters():
  """Few rows and much wider layers: all that is kept is small beside them."""
  params, _ = jax.eval_shape(lambda: draw(16, width=128))
  layer = sum(p.size * 4 for p in jax.tree.leaves(params)) // 16
  assert temporary(16, width=128, rows=(1, 1), mode="remat") < 4 * layer


def test_strict_promotion():
  params, x = draw(2)
  f = make_mlp(jnp.bfloat16)
  low = jax.tree.map(lambda s: s.astype(jnp.bfloat16), x)
  scale = {"scale": jnp.ones(WIDTH, jnp.bfloat16)}
  with jax.numpy_dtype_promotion("strict"):
    _, grads = gradients(f, params, low, scale)
  assert grads[1][0].dtype == jnp.bfloat16


def test_one_evaluation_of_each_branch_a_backward_step():
  """A cache spares the last product of each."""

  def mlp(p, x, *, key, state, aux):
    return jnp.tanh(norm(x) @ p["up"]) @ p["down"], state

  params, x = draw(4)
  loss = lambda p: score(reversible_stack(mlp, mlp, p, x)[0])
  # f and g forwards, f and g backwards.
  assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("= tanh ") == 4
  units = {}
  for cache in (0.0, 1.0):
    costs = compiled(8, cache=cache, f=mlp).cost_analysis()
    # Of one pass of each loop, in products of [256, 64] and [64, 256].
    units[cache] = costs["flops"] / (2 * 256 * 64 * 256)
  # 4 forwards; 4 again, 8 for their derivatives; without the last, 2 less.
  assert 16 < units[0.0] < 17, units
  np.testing.assert_allclose(units[0.0] - units[1.0], 2, atol=0.1)


def test_refusals():
  params, x = draw(2)
  f = make_mlp()

  def refused(match, *, error=ValueError, params=params, x=x, f=f, **options):
    with pytest.raises(error, match=match):
      reversible_stack(f, f, params, x, **options)

  refused("mode 'fast' is none of reversible, remat", mode="fast")
  refused("cache is 1.5", cache=1.5)
  refused("mode 'plain' has nothing to cache", mode="plain", cache=0.5)
  refused("a policy is for mode 'remat'", policy=lambda *_: True)
  refused("grid is 24; it is None or in", grid=24)
  refused("keys", error=TypeError, keys=jnp.zeros(2))
  three = jax.random.split(jax.random.key(0), 3)
  refused(r"shape \(3,\); it is \(\) or \(2, 2\)", keys=three)
  refused("hold no array", params=({}, {}))
  short = jax.tree.map(lambda leaf: leaf[:1], params[1])
  refused(r"they are \[\(1,\), \(2,\)\]", params=(params[0], short))
  refused("the streams have the shapes", x=(x[0], x[1][:1]))

  def narrow(p, x, *, key, state, aux):
    return x[..., :1], state

  refused("f adds .* to a stream", f=narrow)
  refused("returns .dx, state., not", f=lambda p, x, *, key, state, aux: x)
  with pytest.raises(ValueError, match="budget is -1 bytes"):
    choose_cache(-1, f, f, params, x)


@pytest.mark.parametrize("transform", [jax.grad, jax.jit])
def test_a_branch_that_closes_over_a_traced_array_is_refused(transform):
  """Its gradient would be zero, and nobody would know."""
  params, x = draw(2)

  def loss(scale, mode):
    def mlp(p, x, *, key, state, aux):
      return jnp.tanh(x @ p["up"]) @ p["down"] * scale, state

    return score(reversible_stack(mlp, mlp, params, x, mode=mode)[0])

  one = jnp.ones(())
  with pytest.raises(ValueError, match=r"f closes over .*pass them as aux"):
    transform(functools.partial(loss, mode="reversible"))(one)
  assert abs(float(jax.grad(loss)(one, "plain"))) > 1e-4


def test_streams_are_float32_at_least_and_gradients_the_inputs_dtype():
  params, x = draw(2)
  f = make_mlp(jnp.bfloat16)
  low = jax.tree.map(lambda s: s.astype(jnp.bfloat16), x)
  y, state = reversible_stack(f, f, params, low)
  assert state is None and y[0].dtype == jnp.float32
  _, (_, dx, _) = gradients(f, params, low)
  assert dx[0].dtype == jnp.bfloat16
