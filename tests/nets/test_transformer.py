"""The decoder: names, formulas, causality, caches, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.attention import attention
from isthmus.nets import Attention, Decoder, LinearScaling, unstack_layers

TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
SIZES = {"vocab_size": 40, "width": 32, "depth": 3, "num_heads": 4}


def build(seed=0, **kwargs):
  model = Decoder(**{**SIZES, **kwargs})
  return model, jax.jit(model.init)(jax.random.key(seed), TOKENS)


@functools.cache
def shared():
  return build(num_kv_heads=2)


def names(tree):
  return {
    jax.tree_util.keystr(p, simple=True, separator="/"): x.shape
    for p, x in jax.tree.leaves_with_path(tree)
  }


def test_parameter_paths_are_api():
  _, variables = shared()
  layer = {
    "attn/k/kernel": (32, 16),
    "attn/o/kernel": (32, 32),
    "attn/q/kernel": (32, 32),
    "attn/v/kernel": (32, 16),
    "mlp/down/kernel": (128, 32),
    "mlp/gate/kernel": (32, 128),
    "mlp/up/kernel": (32, 128),
    "norm_attn/scale": (32,),
    "norm_mlp/scale": (32,),
  }
  rest = {"params/embed/embedding": (40, 32), "params/norm/scale": (32,)}
  assert names(variables) == rest | {
    f"params/stack/blocks/{n}": (3, *s) for n, s in layer.items()
  }
  flat = Decoder(**SIZES, num_kv_heads=2, scan=False, tied=False)
  flat = jax.eval_shape(flat.init, jax.random.key(0), TOKENS)
  assert names(flat) == rest | {"params/head/kernel": (32, 40)} | {
    f"params/stack/block_{i:02d}/{n}": s
    for i in range(3)
    for n, s in layer.items()
  }


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"num_kv_heads": 1, "head_dim": 6, "hidden": 50},
    {"tied": False, "depth": 1},
  ],
)
def test_param_count(settings):
  model = Decoder(**{**SIZES, **settings})
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert model.param_count() == sum(x.size for x in jax.tree.leaves(variables))


def test_flops_are_those_of_the_lowered_matmuls():
  """Forward dot_generals, tripled; attention's square counts half."""
  model = Decoder(**SIZES, num_kv_heads=2, scan=False)
  params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  jaxpr = jax.make_jaxpr(lambda p: model.apply(p, TOKENS)[0])(params)
  dense, square = 0, 0
  for eqn in equations(jaxpr.jaxpr):
    if eqn.primitive.name == "dot_general":
      (lhs, _), (batch, _) = eqn.params["dimension_numbers"]
      a, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      flops = 2 * np.prod(out) * np.prod([a[i] for i in lhs])
      dense, square = (
        (dense, square + flops) if batch else (dense + flops, square)
      )
  expected = 3 * (dense + square / 2) / TOKENS.size
  assert model.flops_per_token(TOKENS.shape[1]) == expected


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(sub, "jaxpr", sub)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def test_equals_the_formula():
  """The whole forward pass, written out."""
  model, variables = build(num_kv_heads=2, tied=False, logits_softcap=2.0)
  hidden, expected = written_out(variables["params"])
  logits, aux = model.apply(variables, TOKENS)
  np.testing.assert_allclose(aux["hidden"], hidden, atol=2e-5)
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  assert np.abs(logits).max() < 2


@jax.jit
def written_out(params):
  p = unstack_layers(params)

  def norm(x, name):
    return name["scale"] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

  def turn(x):  # complex numbers, one a pair
    z = x[..., :4] + 1j * x[..., 4:]
    angles = jnp.arange(12)[:, None] * 1e4 ** (-jnp.arange(4) / 4)
    z = z * jnp.exp(1j * angles)[None, :, None]
    return jnp.concatenate([z.real, z.imag], -1)

  x = p["embed"]["embedding"][TOKENS]
  for i in range(3):
    layer = p["stack"][f"block_{i:02d}"]
    w = {n: layer["attn"][n]["kernel"] for n in "qkvo"}
    h = norm(x, layer["norm_attn"])
    q = turn((h @ w["q"]).reshape(2, 12, 4, 8))
    k = turn((h @ w["k"]).reshape(2, 12, 2, 8)).repeat(2, axis=2)
    v = (h @ w["v"]).reshape(2, 12, 2, 8).repeat(2, axis=2)
    s = jnp.einsum("btnd,bsnd->bnts", q, k) / 8**0.5
    s = jnp.where(jnp.tri(12, dtype=bool), s, -jnp.inf)
    o = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(s), v)
    x = x + o.reshape(2, 12, 32) @ w["o"]
    w = {n: layer["mlp"][n]["kernel"] for n in ("gate", "up", "down")}
    h = norm(x, layer["norm_mlp"])
    x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
  hidden = norm(x, p["norm"])
  return hidden, 2 * jnp.tanh(hidden @ p["head"]["kernel"] / 2)


def test_rope_scaling_reaches_queries_and_keys():
  """Four times slower, and four times further, is the same."""
  model, variables = shared()
  far = {"positions": 4 * jnp.arange(12)[None]}
  plain, _ = model.apply(variables, TOKENS)
  slow = model.copy(rope_scaling=LinearScaling(4.0))
  same, _ = slow.apply(variables, TOKENS, **far)
  np.testing.assert_allclose(same, plain, atol=2e-5)
  other, _ = model.apply(variables, TOKENS, **far)
  assert np.abs(other - plain).max() > 1e-3


def test_no_token_sees_a_later_one():
  model, variables = shared()
  forward = jax.jit(lambda tokens: model.apply(variables, tokens)[0])
  a = forward(TOKENS)
  b = forward(TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 40))
  np.testing.assert_array_equal(a[:, :7], b[:, :7])
  assert (a[:, 7:] != b[:, 7:]).any(-1).all()


def test_packed_documents_equal_documents_alone():
  model, variables = shared()
  ids = jnp.asarray([[0] * 5 + [1] * 7] * 2)
  packed, _ = model.apply(variables, TOKENS, segment_ids=ids)
  alone = [model.apply(variables, x)[0] for x in (TOKENS[:, :5], TOKENS[:, 5:])]
  np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=2e-5)
  whole, _ = model.apply(variables, TOKENS)
  assert np.abs(whole[:, 5:] - packed[:, 5:]).max() > 1e-3


@pytest.mark.parametrize("scan", [True, False])
def test_cache_gives_the_logits_of_the_whole(scan):
  model, variables = shared()
  if not scan:
    model = model.copy(scan=False)
    variables = {"params": unstack_layers(variables["params"])}
  whole, _ = model.apply(variables, TOKENS)
  cache, start, parts = model.init_cache(batch=2, capacity=14), 0, []
  step = jax.jit(lambda x, c: model.apply(variables, x, cache=c))
  for t in (8, 1, 3):
    logits, aux = step(TOKENS[:, start : start + t], cache)
    cache, start = aux["cache"], start + t
    parts.append(logits)
  assert cache.length.tolist() == [12] * 3
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
  with pytest.raises(ValueError, match="segment_ids and a cache"):
    model.apply(variables, TOKENS, cache=cache, segment_ids=TOKENS)


def test_attend_is_a_field():
  """A mechanism bound by partial replaces attention in every layer."""
  model, variables = shared()
  calls = []

  def local(q, k, v, *, radius, **kwargs):
    calls.append(kwargs)
    return attention(q, k, v, window=(radius, 0), **kwargs)

  near = model.copy(attend=functools.partial(local, radius=2))
  out, _ = near.apply(variables, TOKENS)
  assert calls and calls[0] == {"causal": True}
  plain, _ = model.apply(variables, TOKENS)
  np.testing.assert_allclose(out[:, :3], plain[:, :3], atol=2e-5)
  assert np.abs(out - plain).max() > 1e-3


def test_dropout_in_training_only():
  model, variables = build(dropout=0.3)

  def run(key, train):
    rngs = {"dropout": jax.random.key(key)}
    return model.apply(variables, TOKENS, train=train, rngs=rngs)[0]

  np.testing.assert_array_equal(run(0, True), run(0, True))
  assert (run(0, True) != run(1, True)).any()
  np.testing.assert_array_equal(run(0, False), run(1, False))
  plain = model.copy(dropout=0.0)
  np.testing.assert_array_equal(
    run(0, False), plain.apply(variables, TOKENS)[0]
  )


def test_bfloat16_is_close_and_logits_are_float32():
  model, variables = shared()
  low = model.copy(dtype=jnp.bfloat16)
  a, _ = model.apply(variables, TOKENS)
  b, aux = low.apply(variables, TOKENS)
  assert b.dtype == jnp.float32 and aux["hidden"].dtype == jnp.bfloat16
  assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
  grads = jax.grad(lambda v: low.apply(v, TOKENS)[0].std())(variables)
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_strict_promotion():
  """No operation mixes dtypes unawares."""
  model, variables = shared()
  with jax.numpy_dtype_promotion("strict"):
    for dtype in (jnp.float32, jnp.bfloat16):
      low = model.copy(dtype=dtype, logits_softcap=5.0)
      grad = jax.grad(lambda v, low=low: low.apply(v, TOKENS)[0].sum())
      for leaf in jax.tree.leaves(jax.eval_shape(grad, variables)):
        assert leaf.dtype == jnp.float32
    with pytest.raises(jax.dtypes.TypePromotionError):  # strict indeed
      jnp.ones(1, jnp.bfloat16) + jnp.ones(1, jnp.float32)


def test_initial_sizes():
  model = Decoder(vocab_size=512, width=256, depth=8, num_heads=4, tied=False)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  blocks = params["stack"]["blocks"]
  spread = {
    "embed": (params["embed"]["embedding"], 0.02),
    "head": (params["head"]["kernel"], 256**-0.5),
    "q": (blocks["attn"]["q"]["kernel"], 256**-0.5),
    "o": (blocks["attn"]["o"]["kernel"], 256**-0.5 / 4),
    "up": (blocks["mlp"]["up"]["kernel"], 256**-0.5),
    "down": (blocks["mlp"]["down"]["kernel"], 704**-0.5 / 4),
  }
  for name, (kernel, std) in spread.items():
    np.testing.assert_allclose(kernel.std(), std, rtol=0.03, err_msg=name)
  logits, _ = model.apply({"params": params}, TOKENS)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()
  assert abs(loss - np.log(512)) < 1


def test_learns():
  """A cycle of tokens is learnt in a few steps."""
  model = Decoder(vocab_size=8, width=32, depth=2, num_heads=2)
  tokens = jnp.arange(17)[None] % 8
  tx = optax.adam(1e-2)

  def loss(params):
    logits, _ = model.apply({"params": params}, tokens[:, :-1], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  params = model.init(jax.random.key(0), tokens)["params"]
  state, values = tx.init(params), []
  for _ in range(30):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[0] > 1.5 and values[-1] < 0.05


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"num_kv_heads": 3}, "num_heads 4 .* num_kv_heads 3"),
    ({"num_kv_heads": 0}, "num_kv_heads 0"),
    ({"width": 30}, "width 30 .* num_heads 4"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"depth": 0}, "depth is 0"),
    ({"hidden": 0}, "hidden is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"logits_softcap": 0.0}, "logits_softcap is 0.0"),
    ({"mode": "reversed"}, "plain, remat"),
  ],
)
def test_bad_sizes_are_errors_at_construction(settings, message):
  with pytest.raises(ValueError, match=message):
    Decoder(**{**SIZES, **settings})


def test_attention_checks_its_heads():
  with pytest.raises(ValueError, match="num_heads 4 .* num_kv_heads 3"):
    Attention(4, 3, 8)


def test_a_stable_embedding():
  """Uniform within Xavier's bound; rows normalised in float32, then cast."""
  model, variables = build(stable_embedding=True, dtype=jnp.bfloat16)
  params = variables["params"]
  plain = jax.eval_shape(Decoder(**SIZES).init, jax.random.key(0), TOKENS)
  norm = {f"embed_norm/{name}": (32,) for name in ("scale", "bias")}
  assert names(params) == names(plain["params"]) | norm
  assert sum(x.size for x in jax.tree.leaves(params)) == model.param_count()
  table, bound = params["embed"]["embedding"], (6 / (40 + 32)) ** 0.5
  assert 0.98 * bound < jnp.abs(table).max() <= bound
  np.testing.assert_allclose(table.std(), bound / 3**0.5, rtol=0.05)
  assert abs(float(table.mean())) < 0.03 * bound

  scale = 1 + 0.1 * jax.random.normal(jax.random.key(2), (32,))
  params = params | {"embed_norm": {"scale": scale, "bias": scale - 1}}

  def formula(table):
    x = table[TOKENS]
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * scale + scale - 1

  def ours(table):
    new = params | {"embed": {"embedding": table}}
    return model.apply({"params": new}, TOKENS, method="_embedded")

  want = formula(table)
  assert ours(table).dtype == jnp.bfloat16
  step = 2.0**-8 * jnp.abs(want) + 1e-6  # half a bfloat16's
  assert (jnp.abs(ours(table).astype(jnp.float32) - want) <= step).all()
  w = jax.random.normal(jax.random.key(3), want.shape)
  weigh = lambda f: lambda t: jnp.sum(w * f(t).astype(jnp.float32))
  got = jax.grad(weigh(ours))(table)
  np.testing.assert_allclose(
    got, jax.grad(weigh(formula))(table), rtol=0.02, atol=0.05
  )
