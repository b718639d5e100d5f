"""Decoding with a cache equals attention to it, however it is cut."""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.attention import EMPTY, KVCache, attention, decode, decode_step
from tests.nets import suite

# The package's `decode` is the function.
MODULE = importlib.import_module("isthmus.attention.decode")
CAPACITY = 24


def inputs(b=2, t=1, n=6, k=2, d=8, dv=8, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [(b, t, n, d), (b, 20, k, d), (b, 20, k, dv)]
  q, key, v = (
    jax.random.normal(one, shape).astype(dtype)
    for one, shape in zip(keys, shapes, strict=True)
  )
  return q, key, v


def ragged(k, v, capacity=CAPACITY):
  """The second row is shorter: padding before it, and in its middle."""
  cache = KVCache.init(
    batch=k.shape[0],
    capacity=capacity,
    num_kv_heads=k.shape[2],
    head_dim=k.shape[3],
    value_dim=v.shape[3],
    dtype=k.dtype,
  )
  places = np.tile(np.arange(20, dtype=np.int32), (k.shape[0], 1))
  if len(places) > 1:
    places[1] = [*[EMPTY] * 5, *range(6), *[EMPTY] * 2, *range(6, 13)]
  return cache.append(k, v, positions=jnp.asarray(places))


def whole(q, cache, causal=True, **settings):
  """What `attention` gives, positions written out."""
  at = cache.positions[:, 20 - q.shape[1] : 20]
  o, lse = attention(
    q,
    cache.k,
    cache.v,
    causal=causal,
    q_positions=at[:, None],
    kv_positions=cache.positions[:, None],
    return_lse=True,
    impl="xla",
    **settings,
  )
  return o, lse


@pytest.fixture(params=["grouped", "joined", "summed"])
def form(request, monkeypatch):
  """Many queries, few on a GPU, few on a CPU; each is the one that ran."""
  used = []
  for name in ("_grouped", "_joined", "_summed"):
    form = getattr(MODULE, name)
    monkeypatch.setattr(
      MODULE, name, lambda *x, n=name, f=form: used.append(n) or f(*x)
    )
  if request.param == "joined":
    monkeypatch.setattr(MODULE, "platform", lambda: "gpu")
  if request.param == "grouped":
    monkeypatch.setattr(MODULE, "_SHARING", 0)
  yield request.param
  assert set(used) == {f"_{request.param}"}


CASES = {
  "one": ({}, {}),
  "heads of one group": ({"n": 4, "k": 1, "dv": 12}, {}),
  "heads without groups": ({"n": 3, "k": 3, "d": 5}, {"scale": 0.3}),
  "several queries": ({"t": 3, "n": 9, "k": 3}, {}),
  "not causal": ({"t": 3}, {"causal": False}),
  "window": ({"t": 2}, {"window": (4, None)}),
  "softcap, sinks": (
    {"t": 2},
    {"softcap": 0.7, "sinks": jnp.linspace(-2.0, 2.0, 6)},
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_attention(form, case):
  shapes, settings = CASES[case]
  q, k, v = inputs(**shapes)
  cache = ragged(k, v)

  @suite.jit
  def run(q, cache):
    return [
      decode(q, cache, splits=splits, return_lse=True, **settings)
      for splits in (None, 4, 24)
    ]

  want = suite.jit(functools.partial(whole, **settings))(q, cache)
  for got in run(q, cache):
    for a, b in zip(got, want, strict=True):
      assert a.shape == b.shape and a.dtype == b.dtype
      np.testing.assert_allclose(a, b, atol=2e-6)


def test_rows_without_keys_and_far_logits(form):
  """No key: 0 and -inf. Logits of -1e4: none of them is lost to another's."""
  q, k, v = inputs()
  empty = KVCache.init(batch=2, capacity=24, num_kv_heads=2, head_dim=8)
  run = suite.jit(functools.partial(decode, splits=6, return_lse=True))
  o, lse = run(q, empty)
  assert not np.any(o) and np.all(np.isneginf(lse))
  _, lse = run(q, empty, sinks=jnp.arange(6.0))
  np.testing.assert_allclose(lse[..., 0], np.tile(np.arange(6.0), (2, 1)))
  k = k.at[..., 0].set(-1e4)
  q = q.at[..., 0].set(1.0)
  cache = ragged(k, v)
  want = suite.jit(whole)(q, cache)
  assert np.all(want[1] < -3000)
  o, lse = run(q, cache)
  np.testing.assert_allclose(o, want[0], atol=1e-3)
  np.testing.assert_allclose(lse, want[1], rtol=1e-6)


def test_low_precision_is_as_near_as_attention_is(form):
  """Within twice attention's own error, as kernels are."""
  exact = inputs(n=8, k=2, d=32, dv=32)
  q, k, v = (x.astype(jnp.bfloat16) for x in exact)
  cache = ragged(k, v)
  wide = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, cache
  )
  want, lse = suite.jit(whole)(q.astype(jnp.float32), wide)
  theirs = suite.jit(whole)(q, cache)[0].astype(jnp.float32)
  theirs = np.abs(theirs - want).max()
  run = suite.jit(functools.partial(decode, splits=4, return_lse=True))
  o, mine = run(q, cache)
  assert o.dtype == jnp.bfloat16 and mine.dtype == jnp.float32
  assert np.abs(o.astype(jnp.float32) - want).max() <= 2 * theirs + 1e-5
  np.testing.assert_allclose(mine, lse, atol=1e-4)


def test_the_cache_is_not_copied(form, monkeypatch):
  """bfloat16 is multiplied as it is stored; float32 queries widen it."""
  if form == "summed":  # compiled for this machine: nothing of its size is held
    q, k, v = inputs(b=1, d=128, dv=128, n=4, dtype=jnp.bfloat16)
    cache = ragged(k, v, capacity=1000)
    used = jax.jit(decode).lower(q, cache).compile().memory_analysis()
    assert used.temp_size_in_bytes < cache.k.nbytes / 2
    return
  precision = importlib.import_module("isthmus.pallas.precision")
  monkeypatch.setattr(precision, "platform", lambda: "gpu")
  q, k, v = inputs(dtype=jnp.bfloat16)
  cache = ragged(k, v)

  def casts(q):
    text = str(jax.make_jaxpr(lambda q, c: decode(q, c, splits=4))(q, cache))
    assert text.count("preferred_element_type=float32") == 2
    widened = re.findall(r"f32\[([\d,]+)\] = convert_element_type", text)
    return [x for x in widened if f",{CAPACITY},2,8" in f",{x}"]

  assert not casts(q)
  assert len(casts(q.astype(jnp.float32))) == 2
  o = jax.eval_shape(decode, q.astype(jnp.float32), cache)
  assert o.dtype == jnp.float32


# --- steps ---


def test_steps_in_a_loop_equal_the_whole():
  """A prompt, then one token at a time in a scan."""
  _, k, v = inputs()
  q = jax.random.normal(jax.random.key(5), (2, 20, 6, 8))
  want = attention(q, k, v, causal=True)
  cache = KVCache.init(batch=2, capacity=24, num_kv_heads=2, head_dim=8)

  @jax.jit
  def run(cache):
    first, cache = decode_step(q[:, :4], k[:, :4], v[:, :4], cache)

    def step(cache, x):
      o, cache = decode_step(*(y[:, None] for y in x), cache, splits=3)
      return cache, o[:, 0]

    rest = jax.tree.map(lambda x: jnp.swapaxes(x[:, 4:], 0, 1), (q, k, v))
    cache, rest = jax.lax.scan(step, cache, rest)
    return jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], 1), cache

  got, cache = run(cache)
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert int(cache.length) == 20


def test_a_donated_cache_is_written_in_place():
  q, k, v = (x[:, :1] for x in inputs())
  cache = KVCache.init(batch=2, capacity=24, num_kv_heads=2, head_dim=8)
  step = jax.jit(decode_step, donate_argnums=3)
  aliases = step.lower(q, k, v, cache).compile().as_text()
  assert aliases.split("entry_computation")[0].count("alias)") == 4
  _, longer = step(q, k, v, cache)
  assert cache.k.is_deleted() and not longer.k.is_deleted()


def test_positions_are_those_given_or_of_the_last_slots():
  q, k, v = inputs(t=2)
  cache = ragged(k, v)
  at = cache.positions[:, 18:20]
  run = suite.jit(functools.partial(decode, splits=2))
  want = run(q, cache)
  np.testing.assert_allclose(run(q, cache, positions=at), want, atol=1e-6)
  early = run(q, cache, positions=at - 3)
  assert np.abs(early - want).max() > 0.01
  places = jnp.asarray([[20, 21], [13, EMPTY]], jnp.int32)
  step = suite.jit(functools.partial(decode_step, splits=2))
  o, longer = step(q, k[:, :2], v[:, :2], cache, positions=places)
  assert longer.positions[:, 20:22].tolist() == places.tolist()
  want = run(q, longer, positions=places)
  np.testing.assert_allclose(o, want, atol=1e-6)


def test_overflow_is_nan():
  q, k, v = inputs()
  cache = ragged(k, v, capacity=20)
  o, _ = suite.jit(decode_step)(q, k[:, :1], v[:, :1], cache)
  assert np.isnan(o).all()


def test_shapes_that_do_not_fit():
  q, k, v = inputs()
  cache = ragged(k, v)
  for bad, settings, words in (
    (q[:1], {}, "queries of batch 1, a cache of batch 2"),
    (q[..., :4], {}, "width 4, a cache of keys of width 8"),
    (q[:, :, :5], {}, "5 query heads are not a multiple of 2 kv heads"),
    (jnp.zeros((2, 25, 6, 8)), {}, "25 queries meet a cache of capacity 24"),
    (q, {"splits": 5}, "splits 5 does not divide the capacity 24"),
    (q, {"splits": 0}, "splits 0 does not"),
    (q, {"softcap": 0.0}, "softcap is 0.0"),
    (q, {"window": -1}, "width -1"),
  ):
    with pytest.raises(ValueError, match=words):
      decode(bad, cache, **settings)
  stack = KVCache.init(
    batch=2, capacity=24, num_kv_heads=2, head_dim=8, depth=3
  )
  with pytest.raises(ValueError, match="is not one layer's"):
    decode(q, stack)


def test_splits_by_default():
  """A tile for each of 132 cores, of at least 256 keys, a divisor."""
  for b, s, width, want in (
    (1, 32768, 1024, 32),
    (1, 131072, 1024, 32),
    (32, 32768, 1024, 1),
    (8, 32768, 1024, 4),
    (1, 2048, 1024, 8),
    (1, 32768, 128, 128),
    (1, 1000, 128, 2),
    (1, 1021, 128, 1),
    (1, 100, 128, 1),
  ):
    assert MODULE._splits(b, s, width, 132) == want, (b, s, width)
  assert MODULE._splits(1, 32768, 1024, 1) == 1


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4)])
def test_divided_over_a_mesh(sizes):
  """Each device reads its rows and heads of the cache, and moves nothing."""
  q, k, v = inputs(n=8, k=2)
  cache = ragged(k, v)
  want = suite.jit(decode)(q, cache)
  kinds = (AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    sizes, ("data", "model"), axis_types=kinds, devices=jax.devices()[:4]
  )
  rows = NamedSharding(mesh, P("data", None, "model"))
  kv = rows if sizes[1] == 2 else NamedSharding(mesh, P("data"))
  q = jax.device_put(q, rows)
  cache = dataclasses.replace(
    cache, k=jax.device_put(cache.k, kv), v=jax.device_put(cache.v, kv)
  )
  with jax.set_mesh(mesh):
    run = jax.jit(functools.partial(decode, splits=3))
    compiled = run.lower(q, cache).compile()
    assert "shard_map" in str(run.trace(q, cache).jaxpr)
    moves = r"all-gather|all-reduce|all-to-all|collective-permute"
    assert not re.findall(moves, compiled.as_text())
    np.testing.assert_allclose(run(q, cache), want, atol=2e-6)
