"""The ViT: names, formulas, positions, counts, and modes that agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.nets import unstack_layers
from isthmus.nets.vision.vit import ViT, patches
from tests.nets.suite import distance, jit

SIZES = {
  "classes": 7,
  "size": (4, 6),
  "patch": 2,
  "width": 16,
  "depth": 3,
  "num_heads": 2,
}
IMAGE = jax.random.normal(jax.random.key(1), (5, 4, 6, 3))
# Of two streams: what computes the same, with and without storing layers.
MODES = (
  {"mode": "plain", "streams": 2},
  {"mode": "remat", "streams": 2},
  {"mode": "reversible"},
  {"mode": "reversible", "cache": 0.5},
)


def build(**kwargs):
  model = ViT(**{**SIZES, **kwargs})
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  rng = np.random.default_rng(2)  # no parameter is 0, no two alike
  return model, jax.tree.map(
    lambda x: (
      jnp.asarray(rng.normal(0.5, 0.3, x.shape), x.dtype)
      if x.ndim == 1
      else jnp.asarray(rng.normal(0, x.shape[-2] ** -0.5, x.shape), x.dtype)
    ),
    variables,
  )


@functools.cache
def shared():
  return build()


def names(tree):
  return {
    jax.tree_util.keystr(p, simple=True, separator="/"): x.shape
    for p, x in jax.tree.leaves_with_path(tree)
  }


def test_parameter_paths_are_api():
  layer = {
    **{f"attn/{n}/kernel": (16, 16) for n in "qkvo"},
    "mlp/down/kernel": (64, 16),
    "mlp/up/kernel": (16, 64),
    "norm_attn/scale": (16,),
    "norm_mlp/scale": (16,),
  }
  rest = {
    "params/head/bias": (7,),
    "params/head/kernel": (16, 7),
    "params/norm/scale": (16,),
    "params/patchify/kernel": (12, 16),
    "params/positions/embedding": (6, 16),
  }
  assert names(shared()[1]) == rest | {
    f"params/stack/blocks/{n}": (3, *s) for n, s in layer.items()
  }
  flat = ViT(**SIZES, scan=False)
  flat = jax.eval_shape(flat.init, jax.random.key(0), IMAGE)
  assert names(flat) == rest | {
    f"params/stack/block_{i:02d}/{n}": s
    for i in range(3)
    for n, s in layer.items()
  }


@pytest.mark.parametrize(
  "settings",
  [{}, {"channels": 1, "hidden": 5}, {"size": 8, "depth": 1, "classes": 2}],
)
def test_param_count(settings):
  model = ViT(**{**SIZES, **settings})
  image = jnp.zeros((1, *model.sides, model.channels))
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  assert model.param_count() == sum(x.size for x in jax.tree.leaves(variables))


def test_flops_are_those_of_the_lowered_matmuls():
  """Forward dot_generals, tripled."""
  model = ViT(**SIZES, hidden=40, scan=False)
  params = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  jaxpr = jax.make_jaxpr(lambda p: model.apply(p, IMAGE)[0])(params)
  flops = 0
  for eqn in equations(jaxpr.jaxpr):
    if eqn.primitive.name == "dot_general":
      (lhs, _), _ = eqn.params["dimension_numbers"]
      a, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      flops += 2 * np.prod(out) * np.prod([a[i] for i in lhs])
  assert len(IMAGE) * model.flops_per_row(IMAGE.shape[1:]) == 3 * flops


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(sub, "jaxpr", sub)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def test_patches_are_a_strided_convolution():
  kernel = jax.random.normal(jax.random.key(3), (2, 2, 3, 8))
  expected = jax.lax.conv_general_dilated(
    IMAGE, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  ours = patches(IMAGE, 2) @ kernel.reshape(12, 8)
  np.testing.assert_allclose(ours, expected.reshape(5, 6, 8), atol=1e-5)


def test_equals_the_formula():
  """The whole forward pass, written out."""
  model, variables = shared()
  logits, aux = model.apply(variables, IMAGE)
  hidden, expected = written_out(variables["params"])
  np.testing.assert_allclose(aux["hidden"], hidden, atol=2e-5)
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  assert logits.shape == (5, 7)


@jit
def written_out(params):
  p = unstack_layers(params)

  def norm(x, name):
    return name["scale"] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

  squares = [
    IMAGE[:, y : y + 2, x : x + 2].reshape(5, 12)
    for y in (0, 2)
    for x in (0, 2, 4)
  ]
  x = jnp.stack(squares, 1) @ p["patchify"]["kernel"]
  x = x + p["positions"]["embedding"]
  for i in range(3):
    layer = p["stack"][f"block_{i:02d}"]
    w = {n: layer["attn"][n]["kernel"] for n in "qkvo"}
    h = norm(x, layer["norm_attn"])
    q, k, v = ((h @ w[n]).reshape(5, 6, 2, 8) for n in "qkv")
    s = jax.nn.softmax(jnp.einsum("btnd,bsnd->bnts", q, k) / 8**0.5)
    o = jnp.einsum("bnts,bsnd->btnd", s, v)
    x = x + o.reshape(5, 6, 16) @ w["o"]
    h = norm(x, layer["norm_mlp"])
    h = jax.nn.gelu(h @ layer["mlp"]["up"]["kernel"])
    x = x + h @ layer["mlp"]["down"]["kernel"]
  hidden = norm(x, p["norm"])
  head = p["head"]
  return hidden, hidden.mean(1) @ head["kernel"] + head["bias"]


def test_the_order_of_patches_is_in_the_positions_alone():
  """Patches and positions moved alike change nothing; patches alone do."""
  model, variables = shared()
  order = np.array([3, 0, 5, 1, 4, 2])
  grid = IMAGE.reshape(5, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  moved = grid.reshape(5, 6, 2, 2, 3)[:, order].reshape(5, 2, 3, 2, 2, 3)
  moved = moved.transpose(0, 1, 3, 2, 4, 5).reshape(IMAGE.shape)

  def place(table):
    return {
      "params": {**variables["params"], "positions": {"embedding": table}}
    }

  table = variables["params"]["positions"]["embedding"]
  run = jit(lambda v, image: model.apply(v, image)[0])
  whole, nowhere = run(variables, IMAGE), run(place(0 * table), IMAGE)
  same = run(place(table[order]), moved)
  np.testing.assert_allclose(same, whole, atol=2e-5)
  np.testing.assert_allclose(run(place(0 * table), moved), nowhere, atol=2e-5)
  assert np.abs(run(variables, moved) - whole).max() > 1e-2


@functools.cache
def of_mode(dropout=0.0, **kwargs):
  """(logits, gradients) of a net of two streams, in training."""
  model = ViT(**SIZES, dropout=dropout, **kwargs)

  def loss(variables):
    key = jax.random.key(4)
    logits, _ = model.apply(variables, IMAGE, train=True, rngs={"dropout": key})
    picked = jax.nn.log_softmax(logits)[jnp.arange(5), jnp.arange(5)]
    return -picked.mean(), logits

  return jit(jax.grad(loss, has_aux=True))(shared()[1])[::-1]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kwargs", MODES[1:], ids=str)
def test_modes_agree(kwargs, dropout):
  """Logits and gradients; with dropout its masks are drawn alike twice."""
  logits, gradients = of_mode(dropout, **kwargs)
  expected, others = of_mode(dropout, **MODES[0])
  assert distance(logits, expected) < 1e-5
  for (path, a), b in zip(
    jax.tree.leaves_with_path(gradients), jax.tree.leaves(others), strict=True
  ):
    assert distance(a, b) < 1e-5, jax.tree_util.keystr(path)
    assert np.abs(b).max() > 0, jax.tree_util.keystr(path)


def test_dropout_and_streams_are_seen_by_the_comparison():
  plain, _ = of_mode(0.0, **MODES[0])
  assert distance(of_mode(0.2, **MODES[0])[0], plain) > 1e-2
  assert distance(of_mode(0.0, mode="plain")[0], plain) > 1e-2


@pytest.mark.parametrize("kwargs", MODES, ids=str)
def test_modes_have_the_parameters_of_one_stream(kwargs):
  """The same names, shapes and initial values."""
  init = lambda **kw: jit(ViT(**SIZES, **kw).init)(jax.random.key(0), IMAGE)
  one, two = init(), init(**kwargs)
  assert names(one) == names(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_reversible_memory_does_not_grow_with_the_depth():
  """Of temporaries that XLA allots; that of other modes grows."""

  def temporaries(depth, **kwargs):
    model = ViT(
      classes=10,
      size=16,
      patch=2,
      width=32,
      depth=depth,
      num_heads=2,
      dtype=jnp.bfloat16,
      dropout=0.1,
      **kwargs,
    )
    image = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)

    def loss(p, image):
      rngs = {"dropout": jax.random.key(1)}
      return model.apply(p, image, train=True, rngs=rngs)[0].std()

    compiled = jit(jax.grad(loss)).lower(params, image).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  shallow, deep = (temporaries(d, mode="reversible") for d in (4, 16))
  assert deep < 1.05 * shallow, (shallow, deep)
  other = temporaries(16, mode="remat", streams=2)
  assert deep < 0.6 * other, (deep, other)


def test_bfloat16_is_close_and_logits_are_float32():
  model, variables = shared()
  low = model.copy(dtype=jnp.bfloat16)
  a, _ = model.apply(variables, IMAGE)
  b, aux = low.apply(variables, IMAGE)
  assert b.dtype == jnp.float32 and aux["hidden"].dtype == jnp.bfloat16
  assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_strict_promotion():
  """No operation mixes dtypes unawares."""
  model, variables = shared()
  with jax.numpy_dtype_promotion("strict"):
    for kwargs in (
      {"mode": "reversible"},
      {"mode": "plain"},
      {"mode": "plain", "dtype": jnp.bfloat16},
    ):
      low = model.copy(**kwargs)
      grad = jax.grad(lambda v, low=low: low.apply(v, IMAGE)[0].sum())
      for leaf in jax.tree.leaves(jax.eval_shape(grad, variables)):
        assert leaf.dtype == jnp.float32


def test_initial_sizes():
  model = ViT(classes=100, size=64, patch=8, width=256, depth=8, num_heads=4)
  image = jnp.zeros((1, 64, 64, 3))
  params = jit(model.init)(jax.random.key(0), image)["params"]
  blocks = params["stack"]["blocks"]
  spread = {
    "patchify": (params["patchify"]["kernel"], 192**-0.5),
    "positions": (params["positions"]["embedding"], 0.02),
    "head": (params["head"]["kernel"], 0.02),
    "q": (blocks["attn"]["q"]["kernel"], 256**-0.5),
    "o": (blocks["attn"]["o"]["kernel"], 256**-0.5 / 4),
    "up": (blocks["mlp"]["up"]["kernel"], 256**-0.5),
    "down": (blocks["mlp"]["down"]["kernel"], 1024**-0.5 / 4),
  }
  for name, (kernel, std) in spread.items():
    np.testing.assert_allclose(kernel.std(), std, rtol=0.03, err_msg=name)


def test_learns():
  """Which patch is lit: positions and patches both matter."""
  model = ViT(classes=6, size=(4, 6), patch=2, width=16, depth=2, num_heads=2,
              channels=1, mode="reversible")  # fmt: skip
  spots = np.zeros((6, 4, 6, 1), np.float32)
  for i in range(6):
    y, x = divmod(i, 3)
    spots[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 1
  tx, image = optax.adam(1e-2), jnp.asarray(spots)

  def loss(params):
    logits, _ = model.apply({"params": params}, image, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.arange(6)
    ).mean()

  @jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  params = jit(model.init)(jax.random.key(0), image)["params"]
  state, values = tx.init(params), []
  for _ in range(60):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[0] > 1.5 and values[-1] < 0.1, (values[0], values[-1])


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"size": 30, "patch": 4}, "size 30 along y .* patch 4"),
    ({"size": (8, 9)}, "size 9 along x .* patch 2"),
    ({"size": 0}, "size 0 along y"),
    ({"width": 15}, "width 15 .* num_heads 2"),
    ({"classes": 0}, "classes is 0"),
    ({"channels": 0}, "channels is 0"),
    ({"patch": 0}, "patch is 0"),
    ({"depth": 0}, "depth is 0"),
    ({"hidden": 0}, "hidden is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"mode": "reversed"}, "plain, remat"),
    ({"mode": "reversible", "streams": 1}, "streams is 1"),
  ],
)
def test_bad_sizes_are_errors_at_construction(settings, message):
  with pytest.raises(ValueError, match=message):
    ViT(**{**SIZES, **settings})


def test_images_of_another_shape_are_errors():
  model, variables = shared()
  for shape in ((5, 6, 4, 3), (5, 4, 6, 1)):
    with pytest.raises(ValueError, match=r"\(4, 6, 3\); set size and channels"):
      model.apply(variables, jnp.zeros(shape))
  with pytest.raises(ValueError, match=r"\(4, 6, 1\) in a net of \(4, 6, 3\)"):
    model.flops_per_row((4, 6, 1))
