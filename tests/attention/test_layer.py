"""Attention with chosen blocks and convolved keys: by hand, and by a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import (
  EMPTY,
  Attention,
  BlockMask,
  KVCache,
  attention,
  moba,
)
from isthmus.attention.kconv import KeyConvCache, kconv
from isthmus.attention.layer import check_cache, init_cache
from isthmus.attention.moba_cache import MobaCache
from isthmus.nets import RMSNorm, rope, rotation
from tests.nets import suite

pytestmark = pytest.mark.once

T = 14
X = jax.random.normal(jax.random.key(0), (2, T, 16))
BLOCKS = functools.partial(moba, block=3, top_k=2)
IDS = jnp.asarray([[0] * 8 + [1] * 6, [3] * 2 + [4] * 12])


def build(**fields):
  """A layer of 4 heads on 2, and parameters of which none is small."""
  layer = Attention(4, 2, 8, **fields)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), X)
  rng = np.random.default_rng(1)
  draw = lambda x: jnp.asarray(rng.standard_normal(x.shape) / 3, x.dtype)
  return layer, jax.tree.map(draw, shapes)


def written_out(variables, attend, segment_ids=None, norm=False, **settings):
  p = variables["params"]
  q, k, v = (
    (X @ p[name]["kernel"]).reshape(2, T, -1, 8) for name in ("q", "k", "v")
  )
  if "k_conv" in p:
    k = kconv(k, p["k_conv"]["kernel"], segment_ids=segment_ids)
  if norm:
    q, k = (
      x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p[n]["scale"]
      for x, n in ((q, "q_norm"), (k, "k_norm"))
    )
  if segment_ids is not None:
    settings["segment_ids"] = segment_ids
  o = attend(q, k, v, causal=True, **settings)
  return o.reshape(2, T, -1) @ p["o"]["kernel"]


CASES = {
  "moba": ({"attend": BLOCKS}, {}, {}),
  "moba, scale": ({"attend": BLOCKS, "scale": 0.9}, {}, {"scale": 0.9}),
  "moba, kconv": ({"attend": BLOCKS, "kconv": 3}, {}, {}),
  "kconv, norm": ({"kconv": 5, "qk_norm": RMSNorm}, {}, {"norm": True}),
  "segments": (
    {"attend": BLOCKS, "kconv": 3},
    {"segment_ids": IDS},
    {"segment_ids": IDS},
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case):
  fields, inputs, told = CASES[case]
  layer, variables = build(**fields)
  got, aux = suite.jit(lambda v: layer.apply(v, X, **inputs))(variables)
  assert aux == {}
  attend = fields.get("attend", attention)
  want = suite.jit(lambda v: written_out(v, attend, **told))(variables)
  np.testing.assert_allclose(got, want, atol=1e-5)
  plain = suite.jit(lambda v: written_out(v, attention))(
    {"params": {n: variables["params"][n] for n in "qkvo"}}
  )
  assert np.abs(got - plain).max() > 1e-2


def test_parameters():
  _, variables = build(attend=BLOCKS, kconv=3)
  assert set(variables["params"]) == {"q", "k", "v", "o", "k_conv"}
  assert variables["params"]["k_conv"]["kernel"].shape == (3, 2, 8)


def test_a_bound_on_segments_counts_where_there_are_some():
  layer, variables = build(attend=functools.partial(BLOCKS, max_segments=1))
  free = layer.clone(attend=BLOCKS)
  got, want = (x.apply(variables, X)[0] for x in (layer, free))
  np.testing.assert_array_equal(got, want)
  got, _ = layer.apply(variables, X, segment_ids=IDS)
  assert np.isnan(got[0, 8:]).all() and np.isfinite(got[0, :8]).all()


# --- caches ---


def by_steps(layer, variables, parts, places=None, turned=True):
  """Rows of all tokens, the cache having been filled part by part."""

  @suite.jit
  def step(x, at, cache):
    turn = rotation(at, head_dim=8)
    inputs = {"turn": jax.tree_util.Partial(rope, turn=turn)} if turned else {}
    y, aux = layer.apply(variables, x, positions=at, cache=cache, **inputs)
    return y, aux["cache"]

  cache = layer.init_cache(batch=2, capacity=T + 1)
  start, out = 0, []
  for t in parts:
    at = jnp.arange(start, start + t, dtype=jnp.int32)[None]
    at = at if places is None else places[:, start : start + t]
    y, cache = step(X[:, start : start + t], at, cache)
    out.append(y)
    start += t
  return jnp.concatenate(out, 1), cache


@pytest.mark.parametrize(
  "fields",
  [
    {"attend": BLOCKS},
    {"attend": BLOCKS, "kconv": 3, "scale": 0.9},
    {"attend": functools.partial(BLOCKS, impl="xla", max_segments=3)},
    {"kconv": 5},
    {"kconv": 3, "attend": functools.partial(attention, window=(4, 0))},
  ],
  ids=["moba", "moba, kconv", "moba, impl", "kconv", "kconv, window"],
)
def test_a_cache_gives_the_rows_of_the_whole(fields):
  layer, variables = build(**fields)
  turn = jax.tree_util.Partial(
    rope, turn=rotation(jnp.arange(T)[None], head_dim=8)
  )
  want, _ = suite.jit(lambda v: layer.apply(v, X, turn=turn))(variables)
  for parts in ([9, *[1] * 5], [2, 3, 9]):
    got, cache = by_steps(layer, variables, parts)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert int(cache.length) == T


def test_ragged_rows():
  """A prompt padded to the right; its tokens are as if alone."""
  layer, variables = build(attend=BLOCKS, kconv=3)
  real = [*range(6), *range(10, T)]
  places = np.full((2, T), EMPTY, np.int32)
  places[0, real], places[1] = np.arange(T - 4), np.arange(T)
  got, _ = by_steps(
    layer, variables, [10, 1, 1, 2], jnp.asarray(places), turned=False
  )
  apply = suite.jit(layer.apply)
  whole, _ = apply(variables, X)
  alone, _ = apply(variables, X[:1, jnp.asarray(real)])
  np.testing.assert_allclose(got[1], whole[1], atol=1e-5)
  np.testing.assert_allclose(got[:1, jnp.asarray(real)], alone, atol=1e-5)
  assert np.isfinite(got).all()


def test_dense_decode_reads_all_keys():
  """The prompt chooses blocks, the tokens after it read everything."""
  layer, variables = build(attend=BLOCKS, dense_decode=True)
  got, cache = by_steps(layer, variables, [9, *[1] * 5], turned=False)
  chosen, dense = (
    suite.jit(lambda v, a=a: written_out(v, a))(variables)
    for a in (BLOCKS, attention)
  )
  np.testing.assert_allclose(got[:, :9], chosen[:, :9], atol=1e-5)
  np.testing.assert_allclose(got[:, 9:], dense[:, 9:], atol=1e-5)
  assert np.abs(dense - chosen)[:, 9:].max() > 1e-2
  at = jnp.full((1, 1), T + 1, jnp.int32)
  y, _ = layer.apply(variables, X[:, :1], positions=at, cache=cache)
  assert np.isnan(y).all()


def test_caches_are_of_the_layer():
  sizes = {"batch": 2, "capacity": 9}
  plain = Attention(4, 2, 8, value_dim=5, dtype=jnp.bfloat16)
  cache = plain.init_cache(**sizes)
  assert isinstance(cache, KVCache) and cache.v.shape == (2, 9, 2, 5)
  assert cache.k.dtype == jnp.bfloat16
  blocks = plain.clone(attend=BLOCKS).init_cache(**sizes, dtype=jnp.float32)
  assert isinstance(blocks, MobaCache) and blocks.block == 3
  assert blocks.k.dtype == jnp.float32 and blocks.sums.shape == (2, 3, 2, 8)
  both = plain.clone(attend=BLOCKS, kconv=4).init_cache(**sizes)
  assert isinstance(both, KeyConvCache) and isinstance(both.cache, MobaCache)
  assert both.tail.shape == (2, 3, 2, 8)


# --- refusals ---


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"window": 3}, "moba has no window; window is 3"),
    ({"window": 0}, "moba has no window; window is 0"),
    ({"softcap": 2.0}, "moba has no softcap; softcap is 2.0"),
    ({"dropout": 0.1}, "moba has no dropout; dropout is 0.1"),
    ({"sinks": True}, "moba has no sinks; sinks is True"),
    ({"attend": moba}, "moba's block is None"),
    ({"attend": functools.partial(moba, block=3)}, "moba's top_k is None"),
    ({"attend": functools.partial(moba, block=0, top_k=1)}, "block is 0"),
    (
      {"attend": functools.partial(BLOCKS, causal=False)},
      "moba in a layer is bound to causal",
    ),
    ({"attend": attention, "dense_decode": True}, "dense_decode is of moba"),
    ({"kconv": 0}, "kconv is 0"),
  ],
)
def test_bad_fields_are_errors_at_construction(fields, words):
  with pytest.raises(ValueError, match=words):
    Attention(4, 2, 8, **{"attend": BLOCKS, **fields})


def test_inputs_that_moba_and_kconv_do_not_take():
  blocks, variables = build(attend=BLOCKS)
  conv, others = build(kconv=3)
  cache = blocks.init_cache(batch=2, capacity=T)
  places = jnp.arange(T, dtype=jnp.int32)[None]
  mask = BlockMask.causal(T, T, block=(2, 2))
  loose = blocks.clone(causal=False)
  for layer, params, inputs, words in (
    (blocks, variables, {"kv": X}, "moba is of a row's own keys"),
    (conv, others, {"kv": X}, "kconv is of a row's own keys"),
    (blocks, variables, {"positions": places}, "positions need a cache"),
    (conv, others, {"positions": places}, "kconv takes tokens as they stand"),
    (blocks, variables, {"mask": mask}, "moba has no mask"),
    (loose, variables, {"cache": cache}, "causal is False"),
    (conv, others, {"cache": cache}, "KeyConvCache, not a MobaCache"),
  ):
    with pytest.raises(ValueError, match=words):
      layer.apply(params, X, **inputs)


def test_caches_of_other_layers_are_refused():
  sizes = {"batch": 2, "capacity": 9, "num_kv_heads": 2, "head_dim": 8}
  for own, asked, words in (
    ({}, {"block": 3}, "reads a MobaCache, not a KVCache"),
    ({"block": 3}, {}, "reads a KVCache, not a MobaCache"),
    ({"block": 3}, {"block": 4}, "moba's block is 4, the cache's 3"),
    ({"kconv": 3}, {"kconv": 5}, "kconv 5 meets a cache for 3"),
    ({"kconv": 3}, {}, "reads a KVCache, not a KeyConvCache"),
    ({"kconv": 3}, {"kconv": 3, "block": 2}, "reads a MobaCache"),
  ):
    with pytest.raises(ValueError, match=words):
      check_cache(init_cache(**own, **sizes), **asked)
  check_cache(init_cache(block=3, kconv=3, **sizes), block=3, kconv=3)
