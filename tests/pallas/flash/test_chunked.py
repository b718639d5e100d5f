"""Attention by chunks against the reference, in linear memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash import chunked, ref
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import Lists, listed
from isthmus.pallas.flash.predicate import (
  EMPTY,
  Band,
  Both,
  Positions,
  Segments,
)
from tests.attention.oracle import inputs, vjp

T, S, N, K = 37, 45, 6, 2
RNG = np.random.default_rng(0)


def ints(high, *shape):
  return jnp.asarray(RNG.integers(0, high, shape), jnp.int32)


def lists(b, n, t, s, block, seed=0):
  draw = np.random.default_rng(seed).integers(
    0, 4, (b, n, -(-t // block[0]), -(-s // block[1]))
  )
  return listed(jnp.asarray(draw == 1), jnp.asarray(draw == 2), block=block)


def slots(b, k, s):
  x = np.argsort(RNG.random((b, k, s)), axis=-1).astype(np.int32)
  x[..., -(s // 3) :] = EMPTY
  return jnp.asarray(x)


BAND = Band(None, 0, S - T)
SEGMENTS = {
  "q": (jnp.sort(ints(4, 2, 1, T)),),
  "k": (jnp.sort(ints(4, 2, 1, S)),),
}
CASES = {
  "plain": ({}, {}),
  "causal": ({"predicate": BAND}, {}),
  "window": ({"predicate": Band(5, 3, S - T)}, {}),
  "far window": ({"predicate": Band(None, -20, 0)}, {}),
  "segments": ({"predicate": Segments()}, SEGMENTS),
  "segments, causal": ({"predicate": Both(BAND, Segments())}, SEGMENTS),
  "positions": (
    {"predicate": Positions(None, 0)},
    {"q": (ints(S, 2, N, T),), "k": (slots(2, K, S),)},
  ),
  "softcap": ({"predicate": BAND, "softcap": 0.7}, {}),
  "sinks": (
    {"predicate": Band(4, 2, -3)},
    {"sinks": jnp.linspace(-1, 2, N)},
  ),
  "dropout": (
    {"predicate": BAND, "dropout_rate": 0.3},
    {"dropout_key": jax.random.key(3), "first": jnp.array([2, 12])},
  ),
  "lists": ({}, {"lists": lists(2, N, T, S, (8, 4))}),
  "lists, causal": ({"predicate": BAND}, {"lists": lists(2, N, T, S, (8, 4))}),
  "lists of all heads": (
    {"predicate": BAND, "softcap": 2.0},
    {"lists": lists(1, 1, T, S, (16, 16)), "sinks": jnp.ones(N)},
  ),
  "lists of rows, positions": (
    {"predicate": Both(Positions(7, 9), Segments())},
    {
      "lists": lists(2, 1, T, S, (8, 8)),
      "q": (ints(S, 1, N, T), SEGMENTS["q"][0]),
      "k": (slots(1, K, S), SEGMENTS["k"][0]),
    },
  ),
  "lists of heads, dropout": (
    {"predicate": Segments(), "dropout_rate": 0.5},
    {
      "lists": lists(1, N, T, S, (8, 8)),
      "dropout_key": jax.random.key(1),
      **SEGMENTS,
    },
  ),
}


def run(attend, case, dtype=jnp.float32, bad=False, **kwargs):
  options, extras = CASES[case]
  options = Options(scale=0.4, **options)
  q, k, v, do, dlse = inputs(2, T, S, N, K, 8, 12, dtype)
  sinks = extras.get("sinks")
  rest = Extras(**{x: y for x, y in extras.items() if x != "sinks"})

  def call(q, k, v, *sinks):
    given = rest._replace(sinks=sinks[0] if sinks else None)
    return attend(q, k, v, given, options=options, **kwargs)

  if bad:
    (q, do), (k, v) = (
      [jnp.where(mask[..., None], x, jnp.nan) for x in xs]
      for mask, xs in zip(
        partners(options, rest), ((q, do), (k, v)), strict=True
      )
    )
  args = (q, k, v) if sinks is None else (q, k, v, sinks)
  return vjp(call, args, do, dlse)


def partners(options, extras):
  """[b t n] and [b s k]: who has anyone to see, or to be seen by."""
  x = jnp.zeros((2, T, N, 1))
  mask, _ = ref._mask(options, x, jnp.zeros((2, S, K, 1)), extras)
  if mask is None:
    return jnp.ones((2, T, N), bool), jnp.ones((2, S, K), bool)
  mask = np.broadcast_to(mask, (2, K, N // K, T, S))
  queries = mask.any(-1).reshape(2, N, T).swapaxes(1, 2)
  return queries, mask.any((2, 3)).swapaxes(1, 2)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
  """Values and gradients; chunks are wider than high in half of the cases."""
  chunk = (8, 16) if list(CASES).index(case) % 2 else (16, 8)
  ours = run(chunked.attend, case, chunk=chunk)
  want = run(ref.attend, case)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)


PADDED = ("segments", "positions", "sinks", "lists, causal", "far window")


@pytest.mark.parametrize("case", PADDED)
def test_nan_where_nobody_looks_does_not_leak(case):
  ours = run(chunked.attend, case, bad=True, chunk=(8, 16))
  clean = run(chunked.attend, case, chunk=(8, 16))
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(clean), strict=True):
    np.testing.assert_array_equal(x, y)


def test_low_precision_has_float32_statistics():
  (o, lse), (dq, dk, dv) = run(
    chunked.attend, "causal", jnp.bfloat16, chunk=(8, 16)
  )
  assert lse.dtype == jnp.float32
  assert {x.dtype for x in (o, dq, dk, dv)} == {jnp.dtype("bfloat16")}
  x = jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
  _, lse = chunked.attend(
    x, x, x, Extras(), options=Options(), chunk=(128, 128)
  )
  np.testing.assert_allclose(lse, np.log(512), rtol=1e-6)


def test_what_one_chunk_covers_is_left_to_the_reference(monkeypatch):
  called = []
  attend = ref.attend

  def counted(*args, **kwargs):
    called.append(args[0].shape)
    return attend(*args, **kwargs)

  monkeypatch.setattr(ref, "attend", counted)
  for t in (256, 257):
    x = jnp.ones((1, t, 1, 8))
    chunked.attend(x, x, x, Extras(), options=Options())
  assert called == [(1, 256, 1, 8)]


@pytest.mark.parametrize("which", ["full", "partial"])
def test_rows_that_overflow_are_nan_and_no_others(which):
  q, k, v, do, dlse = inputs(1, 32, 32, 2, 1, 4)
  given = lists(1, 2, 32, 32, (8, 8))
  num = getattr(given, f"{which}_num")
  num = num.at[0, 1, 2].set(getattr(given, which).shape[-1] + 1)
  given = dataclasses.replace(given, **{f"{which}_num": num})

  def ours(q, k, v):
    extras = Extras(lists=given)
    return chunked.attend(q, k, v, extras, options=Options(), chunk=(8, 8))

  (o, lse), (dq, dk, dv) = vjp(ours, (q, k, v), do, dlse)
  lost = np.zeros((2, 32), bool)
  lost[1, 16:24] = True
  np.testing.assert_array_equal(np.isnan(lse[0]), lost)
  for x in (o, dq):
    np.testing.assert_array_equal(np.isnan(x[0]).all(-1), lost.T)
    np.testing.assert_array_equal(np.isnan(x[0]).any(-1), lost.T)
  assert np.isnan(dk).any() and np.isnan(dv).any()


def test_lists_without_places():
  """Capacities of 0: nothing is seen, or what there was is lost."""
  q, k, v, _, _ = inputs(1, 32, 32, 2, 1, 4)
  num = jnp.zeros((1, 1, 4), jnp.int32)
  index = jnp.zeros((1, 1, 4, 0), jnp.int32)
  for count, want in ((0, -np.inf), (1, np.nan)):
    extras = Extras(lists=Lists(num + count, index, None, None, (8, 8)))
    _, lse = chunked.attend(q, k, v, extras, options=Options(), chunk=(8, 8))
    np.testing.assert_array_equal(lse, np.full((1, 2, 32), want))


def test_new_lists_of_a_capacity_are_not_traced_again():
  traces = []

  @jax.jit
  def call(q, k, v, seen):
    traces.append(1)
    extras = Extras(lists=listed(seen, block=(16, 16)))
    return chunked.attend(q, k, v, extras, options=Options(), chunk=(16, 16))

  q, k, v, _, _ = inputs(1, 64, 64, 2, 2, 8)
  for seed in range(3):
    seen = jnp.asarray(np.random.default_rng(seed).random((1, 2, 4, 4)) < 0.5)
    o, _ = call(q, k, v, seen)
    extras = Extras(lists=listed(seen, block=(16, 16)))
    want, _ = ref.attend(q, k, v, extras, options=Options())
    np.testing.assert_allclose(o, want, atol=1e-5)
  assert len(traces) == 1


def steps(monkeypatch, call):
  """How many pairs of blocks a call meets, counted as it runs."""
  count = []
  original = chunked._logits

  def logits(*args):
    jax.debug.callback(lambda: count.append(1))
    return original(*args)

  monkeypatch.setattr(chunked, "_logits", logits)
  jax.block_until_ready(call())
  jax.effects_barrier()
  return len(count)


@pytest.mark.parametrize(
  "predicate, expected",
  [(None, 16), (Band(None, 0), 10), (Band(7, 0), 7), (Segments(), 4)],
)
def test_chunks_that_nobody_sees_are_left_out(monkeypatch, predicate, expected):
  x = jnp.ones((2, 64, 2, 8))
  # A scale of its own, so that no compiled walk is taken from the cache.
  options = Options(scale=0.123, predicate=predicate)
  ids = jnp.arange(64, dtype=jnp.int32)[None, None] // 16
  packed = isinstance(predicate, Segments)
  extras = Extras(q=(ids,), k=(ids,)) if packed else Extras()
  found = steps(
    monkeypatch,
    lambda: chunked.attend(x, x, x, extras, options=options, chunk=(16, 16)),
  )
  assert found == expected


def test_the_work_of_lists_is_that_of_the_longest(monkeypatch):
  seen = np.zeros((2, 2, 4, 4), bool)
  seen[0, 0, 0, :3] = seen[1, 1, 0, 2] = seen[0, 1, 3, 1] = True
  extras = Extras(lists=listed(jnp.asarray(seen), block=(16, 16)))
  x, options = jnp.ones((2, 64, 2, 8)), Options(scale=0.321)
  found = steps(
    monkeypatch,
    lambda: chunked.attend(x, x, x, extras, options=options, chunk=(16, 16)),
  )
  assert found == 3 + 1


def test_memory_is_linear_in_the_length():
  """Temporary bytes of values and gradients; t x s scores would be 16 times."""

  def temporary(t, extras, options):
    shape = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)

    def gradients(q, k, v, extras):
      def loss(*x):
        return chunked.attend(*x, extras, options=options)[0].sum()

      return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    compiled = jax.jit(gradients).lower(*[shape] * 3, extras(t)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def some(t):
    index = jax.ShapeDtypeStruct((1, 2, t // 128, 8), jnp.int32)
    num = jax.ShapeDtypeStruct((1, 2, t // 128), jnp.int32)
    return Extras(lists=Lists(num, index, num, index, (128, 128)))

  causal = Options(predicate=Band(None, 0))
  for extras in (lambda t: Extras(), some):
    bytes_ = [temporary(t, extras, causal) for t in (2048, 4096, 8192)]
    assert bytes_[1] < 2.2 * bytes_[0] and bytes_[2] < 2.2 * bytes_[1], bytes_
    assert bytes_[2] < 8192 * 8192 / 2


def test_vmap_equals_a_loop():
  q, k, v, _, _ = inputs(2, 24, 24, 2, 1, 8)
  ids = jnp.asarray([[0] * 10 + [1] * 14, [0] * 20 + [3] * 4], jnp.int32)

  def one(q, k, v, ids):
    ids = (ids[None, None],)

    def loss(*x):
      x = (y[None] for y in x)
      extras = Extras(q=ids, k=ids)
      options = Options(predicate=Both(Band(None, 0), Segments()))
      o, _ = chunked.attend(*x, extras, options=options, chunk=(8, 8))
      return jnp.sum(jnp.square(o))

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  many = jax.jit(jax.vmap(one))(q, k, v, ids)
  one = jax.jit(one)
  for i in range(2):
    single = one(q[i], k[i], v[i], ids[i])
    for a, b in zip(many, single, strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_repeats_agree_to_the_last_bit():
  first = jax.tree.map(np.asarray, run(chunked.attend, "lists", chunk=(8, 8)))
  for _ in range(3):
    again = run(chunked.attend, "lists", chunk=(8, 8))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_within_a_shard_map_that_checks():
  """Carries of the loops have to vary over the mesh as the arrays do."""
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, _, _, _, _ = inputs(2, 24, 24, 2, 2, 8)
  options = Options(predicate=Band(None, 0))

  def loss(x):
    o, lse = chunked.attend(x, x, x, Extras(), options=options, chunk=(8, 8))
    return jnp.sum(o * jnp.swapaxes(lse, 1, 2)[..., None])

  gradient = jax.grad(loss)
  spec = jax.sharding.PartitionSpec("data")
  divided = jax.jit(
    jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec)
  )
  np.testing.assert_allclose(divided(x), gradient(x), atol=1e-5)
