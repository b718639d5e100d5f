"""Decoders of several kinds of layers: patterns, caches, counts, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import KVCache, attention, moba
from isthmus.attention.kconv import KeyConvCache
from isthmus.attention.moba_cache import MobaCache
from isthmus.nets import Decoder
from isthmus.nets.lm.hybrid import HybridDecoder, Layer, take_turns
from isthmus.nets.sample.decode import generate
from tests.nets import suite

T = 14
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 24)
SIZES = {"vocab_size": 24, "width": 32, "num_heads": 4, "num_kv_heads": 2}
LOCAL = Layer(functools.partial(attention, window=(3, 0)))
FAR = Layer(functools.partial(moba, block=3, top_k=2), rope=False, kconv=3)
LAYERS = take_turns(LOCAL, FAR, depth=3, last=1)


def build(layers=LAYERS, **kwargs):
  return HybridDecoder(depth=len(layers), layers=layers, **SIZES, **kwargs)


@functools.cache
def shared():
  """A model, and parameters so large that the context matters."""
  model = build()
  params = suite.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  return model, jax.tree.map(lambda x: 4 * x, params)


@functools.partial(suite.jit, static_argnums=0)
def whole(model, params, tokens, **inputs):
  return model.apply({"params": params}, tokens, **inputs)[0]


def test_plain_layers_are_a_decoder():
  plain = Decoder(depth=2, scan=False, **SIZES)
  variables = suite.jit(plain.init)(jax.random.key(0), TOKENS)
  model = build((Layer(), Layer()))
  same = suite.jit(model.init)(jax.random.key(0), TOKENS)
  assert jax.tree.structure(same) == jax.tree.structure(variables)
  for a, b in zip(*map(jax.tree.leaves, (same, variables)), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(
    whole(model, same["params"], TOKENS),
    whole(plain, same["params"], TOKENS),
    rtol=1e-5,
    atol=1e-5,
  )
  assert model.flops_per_token(12) == plain.flops_per_token(12)
  assert model.param_count() == plain.param_count()


@pytest.mark.parametrize(
  "change",
  [
    {"rope": True},
    {"kconv": None},
    {"attend": attention},
    {"attend": functools.partial(moba, block=3, top_k=3)},
  ],
  ids=["rope", "kconv", "dense", "top_k"],
)
def test_every_field_of_a_layer_counts(change):
  model, params = shared()
  far = Layer(**{"attend": FAR.attend, "rope": False, "kconv": 3, **change})
  other = build(take_turns(LOCAL, far, depth=3, last=1))
  if far.kconv is None:
    attn = dict(params["stack"]["block_01"]["attn"])
    del attn["k_conv"]
    block = {**params["stack"]["block_01"], "attn": attn}
    params = {**params, "stack": {**params["stack"], "block_01": block}}
  got = whole(other, params, TOKENS)
  assert np.abs(got - whole(model, shared()[1], TOKENS)).max() > 1e-2


def test_without_positions_a_far_layer_is_blind_to_order():
  """A dense layer without rotation sees a set: what the flag does."""
  blind = build((Layer(rope=False),))
  params = suite.jit(blind.init)(jax.random.key(0), TOKENS)["params"]
  swapped = TOKENS.at[:, :2].set(TOKENS[:, 1::-1])
  a, b = (whole(blind, params, x)[:, 2:] for x in (TOKENS, swapped))
  np.testing.assert_allclose(a, b, atol=1e-5)
  seeing = build((Layer(),))
  a, b = (whole(seeing, params, x)[:, 2:] for x in (TOKENS, swapped))
  assert np.abs(a - b).max() > 1e-5 or (TOKENS[:, 0] == TOKENS[:, 1]).all()


def test_no_token_sees_a_later_one_or_another_document():
  model, params = shared()
  changed = TOKENS.at[:, 9:].set((TOKENS[:, 9:] + 1) % 24)
  a, b = (whole(model, params, x)[:, :9] for x in (TOKENS, changed))
  np.testing.assert_array_equal(a, b)
  ids = jnp.asarray([[1] * 5 + [2] * 9] * 2)
  packed = whole(model, params, TOKENS, segment_ids=ids)
  for part in (slice(0, 5), slice(5, T)):
    alone = whole(model, params, TOKENS[:, part])
    np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-4)


def test_cache_gives_the_logits_of_the_whole():
  model, params = shared()

  @suite.jit
  def step(tokens, cache):
    logits, aux = model.apply({"params": params}, tokens, cache=cache)
    return logits, aux["cache"]

  cache, start, parts = model.init_cache(batch=2, capacity=T), 0, []
  kinds = [type(x) for x in cache]
  assert kinds == [KVCache, KeyConvCache, KVCache]
  assert isinstance(cache[1].cache, MobaCache)
  for t in (9, 1, 1, 1, 2):
    logits, cache = step(TOKENS[:, start : start + t], cache)
    parts.append(logits)
    start += t
  want = whole(model, params, TOKENS)
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), want, rtol=1e-4, atol=1e-4
  )
  assert [int(x.length) for x in cache] == [T] * 3


def test_generates_what_whole_passes_do():
  """Ragged prompts too: a padded row continues as it does alone."""
  model, params = shared()
  key = jax.random.key(0)
  prompt, lengths = TOKENS[:, :10], jnp.asarray([7, 10])
  out = generate(
    model,
    params,
    prompt,
    length=4,
    key=key,
    temperature=0,
    prompt_lengths=lengths,
  )
  for row, t in enumerate(lengths.tolist()):
    tokens = jnp.zeros((1, T), jnp.int32).at[:, :t].set(prompt[row, :t])
    for i in range(t, t + 4):
      new = jnp.argmax(whole(model, params, tokens)[0, i - 1])
      tokens = tokens.at[0, i].set(new)
    assert out[row].tolist() == tokens[0, t : t + 4].tolist()


def test_remat_has_the_same_gradient():
  model, params = shared()

  def slope(mode):
    again = model.clone(mode=mode)
    call = lambda p: again.apply({"params": p}, TOKENS)[0].std()
    return suite.jit(jax.grad(call))(params)

  for a, b in zip(
    *map(jax.tree.leaves, (slope("plain"), slope("remat"))), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    assert np.abs(a).max() > 0


def test_counts():
  model, params = shared()
  assert model.param_count() == sum(x.size for x in jax.tree.leaves(params))
  assert Layer(FAR.attend).keys_read(9) == np.mean(
    # 3 of the own block, and one block of the past.
    [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 3.5, 4.5, 5.5]
  )
  assert LOCAL.keys_read(6) == np.mean([0.5, 1.5, 2.5, 3.5, 3.5, 3.5])
  keys = LOCAL.keys_read(12) + FAR.keys_read(12) + 6.0
  plain = Decoder(depth=3, **SIZES).flops_per_token(12)
  less = 12 * 4 * 8 * (3 * 6.0 - keys)
  assert less > 0 and model.flops_per_token(12) == plain - less


def test_patterns():
  assert take_turns(LOCAL, FAR, depth=5, last=2) == (
    *(LOCAL, FAR, LOCAL),
    *(Layer(), Layer()),
  )
  assert take_turns(FAR, depth=2) == (FAR, FAR)
  for call, words in (
    (lambda: take_turns(depth=3), "no kind"),
    (lambda: take_turns(FAR, depth=3, last=4), "last is 4"),
  ):
    with pytest.raises(ValueError, match=words):
      call()


@pytest.mark.parametrize(
  "change, words",
  [
    ({"layers": (LOCAL,)}, "1 layers are given for a depth of 2"),
    ({"attend": functools.partial(attention)}, "each of the layers"),
    ({"scan": True}, "scan is True"),
    ({"streams": 2}, "streams is 2"),
    ({"mode": "reversible"}, "'reversible' is none of plain, remat"),
    ({"cache": 0.5}, "nothing to cache"),
  ],
)
def test_bad_fields_are_errors_at_construction(change, words):
  fields = {"depth": 2, "layers": (LOCAL, FAR), **SIZES, **change}
  with pytest.raises(ValueError, match=words):
    HybridDecoder(**fields)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"attend": moba}, "moba's block is None"),
    ({"attend": functools.partial(moba, block=2, top_k=0)}, "top_k is 0"),
    ({"dense_decode": True}, "dense_decode is of moba"),
    ({"kconv": 0}, "kconv is 0"),
  ],
)
def test_bad_layers_are_errors_at_construction(fields, words):
  with pytest.raises(ValueError, match=words):
    Layer(**fields)
