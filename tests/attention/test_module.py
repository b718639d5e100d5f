"""The module is its projections around one call, written out here."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isthmus.nets
from isthmus.attention import (
  EMPTY,
  Attention,
  BlockMask,
  KVCache,
  attention,
)
from isthmus.attention import module as source
from isthmus.nets import RMSNorm, rope, rotation
from tests.nets import suite

X = jax.random.normal(jax.random.key(0), (2, 6, 16))
KV = jax.random.normal(jax.random.key(1), (2, 9, 12))


def build(seed=2, *, inputs=None, **fields):
  """A layer of 4 heads on 2, and parameters of which none is 0."""
  layer = Attention(4, 2, 8, **fields)
  inputs = inputs or {}
  shapes = jax.eval_shape(layer.init, jax.random.key(0), X, **inputs)
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  drawn = [
    jax.random.normal(key, leaf.shape) / 4 + (leaf.ndim == 1)
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  return layer, jax.tree.unflatten(tree, drawn)


def shapes(variables):
  return {
    jax.tree_util.keystr(p, simple=True, separator="/"): x.shape
    for p, x in jax.tree.leaves_with_path(variables["params"])
  }


def written_out(variables, kv=None, norm=False, turn=None, **settings):
  """The projections; attention's own arguments are passed on."""
  p = variables["params"]
  kv = X if kv is None else kv

  def heads(name, x, count):
    y = x @ p[name]["kernel"] + p[name].get("bias", 0)
    return y.reshape(*x.shape[:2], count, -1)

  def scaled(name, x):
    if not norm:
      return x
    size = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    return x / size * p[name]["scale"]

  q, k = scaled("q_norm", heads("q", X, 4)), scaled("k_norm", heads("k", kv, 2))
  if turn is not None:
    q, k = turn(q), turn(k)
  o = attention(q, k, heads("v", kv, 2), **{"causal": True, **settings})
  return o.reshape(2, 6, -1) @ p["o"]["kernel"] + p["o"].get("bias", 0)


TURN = jax.tree_util.Partial(
  rope, turn=rotation(jnp.arange(6)[None], head_dim=8)
)
IDS = jnp.asarray([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4]])
KV_IDS = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 2, 2], [4, 3, 4, 3, 4, 4, 3, 3, 3]])
PLACES = jnp.asarray([[5, 2, 3, 0, 1, 4]], jnp.int32)
SPARSE = BlockMask.window((1, 0), 6, block=(2, 2))

# fields, inputs of the call, what the written-out form is told besides.
CASES = {
  "plain": ({}, {}, {}),
  "not causal": ({"causal": False}, {}, {"causal": False}),
  "values narrower": ({"value_dim": 5}, {}, {}),
  "window, scale, softcap": (
    {"window": (2, None), "scale": 0.9, "softcap": 0.5},
    {},
    {"window": (2, None), "scale": 0.9, "softcap": 0.5},
  ),
  "biases": ({"qkv_bias": True, "out_bias": True}, {}, {}),
  "norms": ({"qk_norm": RMSNorm}, {"turn": TURN}, {"norm": True, "turn": TURN}),
  "segments": ({}, {"segment_ids": IDS}, {"segment_ids": IDS}),
  "positions": (
    {},
    {"positions": PLACES},
    {"q_positions": PLACES[:, None], "kv_positions": PLACES[:, None]},
  ),
  "mask": (
    {"causal": False},
    {"mask": SPARSE},
    {"causal": False, "mask": SPARSE},
  ),
  "cross": (
    {"causal": False},
    {"kv": KV, "segment_ids": IDS, "kv_segment_ids": KV_IDS},
    {
      "causal": False,
      "kv": KV,
      "segment_ids": IDS,
      "kv_segment_ids": KV_IDS,
    },
  ),
}


@functools.cache
def plain():
  layer, variables = build()
  return suite.jit(layer.apply)(variables, X)[0]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case):
  fields, inputs, told = CASES[case]
  layer, variables = build(**fields, inputs=inputs)
  got, aux = suite.jit(lambda v: layer.apply(v, X, **inputs))(variables)
  want = suite.jit(lambda v: written_out(v, **told))(variables)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert aux == {}
  if case != "plain":
    other = plain()
    assert got.shape != other.shape or np.abs(got - other).max() > 1e-3


def test_sinks_are_learned():
  layer, variables = build(sinks=True)

  def call(sinks):
    changed = {"params": {**variables["params"], "sinks": sinks}}
    return layer.apply(changed, X)[0]

  sinks = variables["params"]["sinks"]
  want = suite.jit(lambda v, s: written_out(v, sinks=s))(variables, sinks)
  np.testing.assert_allclose(suite.jit(call)(sinks), want, atol=1e-5)
  slope = suite.jit(jax.grad(lambda s: call(s).sum()))(sinks)
  assert slope.shape == (4,) and np.all(np.abs(slope) > 1e-4)
  start = suite.jit(layer.init)(jax.random.key(0), X)["params"]["sinks"]
  np.testing.assert_array_equal(start, np.zeros(4))


def test_turns_of_keys_that_come_from_elsewhere():
  layer, variables = build(causal=False, inputs={"kv": KV})

  def call(**inputs):
    return layer.apply(variables, X, kv=KV, **inputs)[0]

  plain = call()
  assert np.abs(call(turn=TURN) - plain).max() > 1e-3  # queries alone
  flip = jnp.negative
  np.testing.assert_allclose(call(turn=flip, kv_turn=flip), plain, atol=1e-5)
  assert np.abs(call(kv_turn=flip) - plain).max() > 1e-3


def test_parameter_names_and_shapes_are_api():
  wide = build(
    value_dim=5, qkv_bias=True, out_bias=True, sinks=True, qk_norm=RMSNorm
  )
  assert shapes(wide[1]) == {
    "q/kernel": (16, 32),
    "q/bias": (32,),
    "k/kernel": (16, 16),
    "k/bias": (16,),
    "v/kernel": (16, 10),
    "v/bias": (10,),
    "o/kernel": (20, 16),
    "o/bias": (16,),
    "q_norm/scale": (8,),
    "k_norm/scale": (8,),
    "sinks": (4,),
  }
  assert set(shapes(build()[1])) == {f"{n}/kernel" for n in "qkvo"}
  assert isthmus.nets.Attention is Attention


def test_out_scale_and_kinds():
  layer = Attention(
    4, 2, 64, out_scale=0.1, dtype=jnp.bfloat16, param_dtype=jnp.float32
  )
  (y, _), variables = suite.jit(layer.init_with_output)(jax.random.key(0), X)
  kernels = {n: variables["params"][n]["kernel"] for n in "qo"}
  np.testing.assert_allclose(kernels["q"].std(), 16**-0.5, rtol=0.1)
  np.testing.assert_allclose(kernels["o"].std(), 0.1 * 256**-0.5, rtol=0.1)
  assert y.dtype == jnp.bfloat16 and kernels["q"].dtype == jnp.float32


# --- the mechanism ---


def test_the_mechanism_is_a_field_and_is_told_what_is_set():
  seen = []

  def record(q, k, v, **settings):
    seen.append(settings)
    return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)

  for fields, inputs, names in (
    ({}, {}, {"causal"}),
    ({"window": 2, "scale": 1.0}, {}, {"causal", "window", "scale"}),
    ({"sinks": True}, {"mask": SPARSE}, {"causal", "sinks", "mask"}),
    ({"dropout": 0.1}, {}, {"causal"}),
    (
      {"dropout": 0.1},
      {"train": True, "rngs": {"dropout": jax.random.key(0)}},
      {"causal", "dropout_rate", "dropout_key"},
    ),
  ):
    layer, variables = build(**fields)
    layer.clone(attend=record).apply(variables, X, **inputs)
    assert set(seen.pop()) == names
  assert not seen


def test_dropout_in_training_only():
  layer, variables = build(dropout=0.5)
  np.testing.assert_allclose(
    suite.jit(layer.apply)(variables, X)[0], plain(), atol=1e-6
  )

  @suite.jit
  def train(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return layer.apply(variables, X, train=True, rngs=rngs)[0]

  np.testing.assert_array_equal(train(0), train(0))
  assert np.abs(train(0) - train(1)).max() > 0.01
  assert np.abs(train(0) - plain()).max() > 0.01
  with pytest.raises(Exception, match="dropout"):
    layer.apply(variables, X, train=True)


# --- caches ---


@pytest.mark.parametrize(
  "fields, by",
  [
    ({}, "decode"),
    (
      {"window": (3, None), "softcap": 0.5, "scale": 0.9, "sinks": True},
      "decode",
    ),
    ({"attend": functools.partial(attention, window=(3, None))}, "decode"),
    ({"attend": functools.partial(attention, impl="xla")}, "attention"),
    ({"attend": lambda *x, **y: attention(*x, **y)}, "attention"),
    ({"value_dim": 5}, "decode"),
  ],
  ids=["plain", "settings", "bound", "bound to impl", "other", "narrow"],
)
def test_a_cache_gives_the_rows_of_the_whole(fields, by, monkeypatch):
  """Of a prompt, and then token by token, by `decode` where it may."""
  calls = []
  monkeypatch.setattr(
    source,
    "decode",
    lambda *x, f=source.decode, **y: calls.append(1) or f(*x, **y),
  )
  layer, variables = build(**fields)
  want, _ = suite.jit(layer.apply)(variables, X)
  cache = KVCache.init(
    batch=2,
    capacity=8,
    num_kv_heads=2,
    head_dim=8,
    value_dim=fields.get("value_dim"),
  )
  step = suite.jit(lambda x, cache: layer.apply(variables, x, cache=cache))
  parts = []
  for start, stop in ((0, 4), (4, 5), (5, 6)):
    y, aux = step(X[:, start:stop], cache)
    cache = aux["cache"]
    parts.append(y)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
  assert int(cache.length) == 6
  assert bool(calls) == (by == "decode")


def test_a_long_prompt_and_a_mask_are_read_by_attention(monkeypatch):
  monkeypatch.setattr(source, "decode", None)  # can't be called
  layer, variables = build()
  x = jnp.concatenate([X, X], 1)
  cache = KVCache.init(batch=2, capacity=16, num_kv_heads=2, head_dim=8)
  assert x.shape[1] > source.FEW
  apply = suite.jit(layer.apply)
  want, _ = apply(variables, x)
  got, _ = apply(variables, x, cache=cache)
  np.testing.assert_allclose(got, want, atol=1e-5)
  mask = BlockMask.causal(6, 16, block=(2, 2))
  shown, _ = apply(variables, X, cache=cache, mask=mask)
  assert np.abs(shown - want[:, :6]).max() < 1e-5


def test_ragged_rows():
  """The second row is padded to the left; its tokens are as if alone."""
  layer, variables = build()
  cache = KVCache.init(batch=2, capacity=8, num_kv_heads=2, head_dim=8)
  places = jnp.asarray([[0, 1, 2, 3, 4, 5], [EMPTY, EMPTY, 0, 1, 2, 3]])
  apply = suite.jit(layer.apply)
  got, aux = apply(variables, X, cache=cache, positions=places)
  whole, _ = apply(variables, X)
  alone, _ = apply(variables, X[1:, 2:])
  np.testing.assert_allclose(got[0], whole[0], atol=1e-5)
  np.testing.assert_allclose(got[1:, 2:], alone, atol=1e-5)
  assert aux["cache"].positions[1, :6].tolist() == places[1].tolist()


# --- refusals ---


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"value_dim": 0}, "value_dim is 0"),
    ({"window": (-1, 0)}, "left width -1"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
  ],
)
def test_bad_fields_are_errors_at_construction(fields, words):
  sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
  with pytest.raises(ValueError, match=words):
    Attention(**{**sizes, **fields})


def test_inputs_that_exclude_each_other():
  layer, variables = build()
  cache = KVCache.init(batch=2, capacity=8, num_kv_heads=2, head_dim=8)
  for inputs, words in (
    ({"cache": cache, "segment_ids": IDS}, "segment_ids and a cache"),
    ({"cache": cache, "kv": X}, "kv and a cache"),
    ({"kv": X, "positions": PLACES}, "kv and positions"),
    ({"kv_turn": TURN}, "kv_turn is given without kv"),
    ({"kv_segment_ids": IDS}, "kv_segment_ids is given without kv"),
  ):
    with pytest.raises(ValueError, match=words):
      layer.apply(variables, X, **inputs)


def test_norms_of_flax_serve_too():
  layer, variables = build(qk_norm=nn.LayerNorm, dtype=jnp.bfloat16)
  assert jax.eval_shape(layer.apply, variables, X)[0].dtype == jnp.bfloat16
  assert shapes(variables)["q_norm/bias"] == (8,)
