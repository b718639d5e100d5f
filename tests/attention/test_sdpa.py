"""Attention against an oracle that is written out, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import (
  EMPTY,
  BlockMask,
  attention,
  explain,
  report,
  save_attention,
)
from isthmus.attention.bench.clock import build
from tests.attention.oracle import (
  check,
  dense_mask,
  inputs,
  oracle,
  segments,
  vjp,
  wide_vjp,
)


def places(b, n, t, high, seed=0):
  draw = np.random.default_rng(seed).integers(0, high, (b, n, t))
  return jnp.asarray(draw, jnp.int32)


def slots(b, k, s):
  """Keys in any order; the last quarter of the slots is empty."""
  rng = np.random.default_rng(1)
  x = np.argsort(rng.random((b, k, s)), axis=-1).astype(np.int32)
  x[..., -(s // 4) :] = EMPTY
  return jnp.asarray(x)


# (b, t, s, n, k, d, dv), settings. Each setting meets lengths that are equal
# and not, and each group size.
CASES = {
  "plain": ((2, 8, 8, 4, 4, 8, 8), {}),
  "one": ((1, 1, 1, 1, 1, 4, 4), {"causal": True}),
  "one query": ((1, 1, 13, 4, 2, 8, 8), {"causal": True}),
  "causal": ((2, 16, 16, 4, 2, 8, 8), {"causal": True}),
  "causal, more keys": ((1, 9, 14, 9, 3, 8, 8), {"causal": True}),
  "causal, empty rows": ((1, 14, 9, 9, 3, 8, 8), {"causal": True}),
  "values wider": ((1, 7, 11, 6, 1, 8, 20), {"causal": True}),
  "values narrower": ((1, 11, 7, 6, 2, 12, 4), {}),
  "window": ((1, 12, 12, 2, 1, 8, 8), {"window": 3}),
  "window 0": ((1, 6, 9, 2, 1, 8, 8), {"window": 0}),
  "window left": ((1, 12, 17, 2, 2, 8, 8), {"window": (4, None)}),
  "window, causal": (
    (1, 12, 12, 3, 3, 8, 8),
    {"window": (5, 2), "causal": True},
  ),
  "window, empty rows": ((1, 17, 6, 2, 1, 8, 8), {"window": (2, 1)}),
  "scale": ((1, 8, 8, 2, 1, 8, 8), {"scale": 0.7, "causal": True}),
  "softcap": ((1, 8, 10, 4, 2, 8, 8), {"softcap": 0.8, "causal": True}),
  "segments": ((2, 12, 12, 4, 2, 8, 8), {"segment_ids": segments(2, 12)}),
  "segments, causal": (
    (2, 12, 12, 9, 3, 8, 8),
    {"segment_ids": segments(2, 12), "causal": True},
  ),
  "segments of both": (
    (2, 12, 9, 4, 2, 8, 8),
    {"segment_ids": segments(2, 12), "kv_segment_ids": segments(2, 9, 5)},
  ),
  "positions a head": (
    (2, 6, 16, 4, 2, 8, 8),
    {
      "causal": True,
      "q_positions": places(2, 4, 6, 16),
      "kv_positions": slots(2, 2, 16),
    },
  ),
  "positions, window": (
    (2, 6, 16, 4, 2, 8, 8),
    {
      "window": (3, 3),
      "q_positions": places(2, 1, 6, 16),
      "kv_positions": slots(1, 2, 16),
    },
  ),
  "queries' positions": (
    (2, 6, 16, 4, 2, 8, 8),
    {"causal": True, "q_positions": places(1, 1, 6, 16)},
  ),
  "empty slots": ((2, 6, 16, 4, 2, 8, 8), {"kv_positions": slots(2, 1, 16)}),
  "everything": (
    (2, 12, 12, 9, 3, 8, 12),
    {
      "causal": True,
      "window": (6, 6),
      "segment_ids": segments(2, 12),
      "q_positions": places(1, 9, 12, 14),
      "kv_positions": slots(2, 1, 12),
      "softcap": 1.5,
      "scale": 0.9,
    },
  ),
}


def both(shape, settings, dtype=jnp.float32, sinks=None, seed=0):
  """((o, lse), gradients): ours, the float64 oracle, the oracle in `dtype`."""
  b, t, s, n, k, d, dv = shape
  settings = dict(settings)
  numbers = {x: settings.pop(x) for x in ("scale", "softcap") if x in settings}
  mask = dense_mask(b, t, s, n, k, **settings)
  q, key, v, do, dlse = inputs(b, t, s, n, k, d, dv, dtype, seed)
  args = (q, key, v) if sinks is None else (q, key, v, sinks)

  def ours(q, k, v, sinks=None):
    return attention(
      q, k, v, sinks=sinks, return_lse=True, **settings, **numbers
    )

  def written(q, k, v, sinks=None):
    return oracle(q, k, v, mask, sinks=sinks, **numbers)

  wide = wide_vjp(written, args, do, dlse)
  low = dtype != jnp.float32
  naive = vjp(written, args, do, dlse) if low else wide
  return vjp(ours, args, do, dlse), wide, naive, mask


@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(case):
  ours, wide, naive, mask = both(*CASES[case])
  check(ours, wide, naive, 1e-5)
  empty = ~mask.any(-1)
  assert empty.any() == ("empty rows" in case or case in HAS_EMPTY)
  assert not np.swapaxes(np.asarray(ours[0][0]), 1, 2)[empty].any()
  assert not np.swapaxes(np.asarray(ours[1][0]), 1, 2)[empty].any()


HAS_EMPTY = ("everything", "segments of both")


@pytest.mark.once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", ["causal, empty rows", "everything"])
def test_low_precision_stays_within_the_rule(case, dtype):
  ours, wide, naive, _ = both(*CASES[case], dtype=dtype)
  assert ours[0][0].dtype == dtype and ours[0][1].dtype == jnp.float32
  check(ours, wide, naive, 1e-5)


def test_statistics_are_float32():
  """In bfloat16 the sum of 512 equal weights would stop at 256."""
  x = jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
  _, lse = attention(x, x, x, return_lse=True)
  np.testing.assert_allclose(lse, np.log(512), rtol=1e-6)


def test_float64():
  with jax.enable_x64(True):
    q, k, v, do, dlse = (
      x.astype(jnp.float64) for x in inputs(1, 5, 7, 4, 2, 8)
    )
    mask = dense_mask(1, 5, 7, 4, 2, causal=True)
    f = functools.partial(attention, causal=True, return_lse=True)
    ours = vjp(f, (q, k, v), do, dlse)
    wide = vjp(lambda *a: oracle(*a, mask), (q, k, v), do, dlse)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("case", ["causal", "causal, empty rows", "everything"])
def test_sinks_join_the_denominator(case):
  shape, settings = CASES[case]
  sinks = jnp.linspace(-1, 2, shape[3])
  ours, wide, naive, mask = both(shape, settings, sinks=sinks)
  check(ours, wide, naive, 1e-5)
  lse = np.asarray(ours[0][1])
  empty = ~mask.any(-1)
  expected = np.broadcast_to(np.asarray(sinks)[None, :, None], lse.shape)
  np.testing.assert_allclose(lse[empty], expected[empty], rtol=1e-6)


def test_gradient_through_a_merge_of_halves_is_that_of_the_whole():
  """What the gradient of lse is for."""
  q, k, v, do, _ = inputs(1, 6, 10, 4, 2, 8)

  def whole(q, k, v):
    return jnp.sum(attention(q, k, v) * do)

  def merged(q, k, v):
    parts = [
      attention(q, k[:, s], v[:, s], return_lse=True)
      for s in (slice(0, 4), slice(4, 10))
    ]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    shares = [jnp.swapaxes(jnp.exp(x - lse), 1, 2)[..., None] for _, x in parts]
    return jnp.sum((parts[0][0] * shares[0] + parts[1][0] * shares[1]) * do)

  a = jax.jit(jax.grad(whole, argnums=(0, 1, 2)))(q, k, v)
  b = jax.jit(jax.grad(merged, argnums=(0, 1, 2)))(q, k, v)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a, b)


@pytest.mark.parametrize("how", ["positions", "segments"])
def test_nan_in_padding_does_not_leak(how):
  """Padding keys that no query sees, padding queries that see no key."""
  q, k, v, do, dlse = inputs(2, 8, 8, 4, 2, 8)
  if how == "positions":
    index = jnp.arange(8, dtype=jnp.int32)[None, None]
    settings = {
      "causal": True,
      "q_positions": jnp.where(index < 6, index, -1),
      "kv_positions": jnp.where(index < 6, index, EMPTY),
    }
  else:
    real = jnp.arange(8) < 6
    settings = {
      "segment_ids": jnp.broadcast_to(jnp.where(real, 0, -1), (2, 8)),
      "kv_segment_ids": jnp.broadcast_to(jnp.where(real, 0, -2), (2, 8)),
    }
  f = functools.partial(attention, return_lse=True, **settings)
  clean = vjp(f, (q, k, v), do, dlse)
  bad = [x.at[:, 6:].set(jnp.nan) for x in (q, k, v, do)]
  dirty = vjp(f, bad[:3], bad[3], dlse.at[:, :, 6:].set(jnp.nan))
  assert not np.isnan(dirty[0][0]).any() and not np.isnan(dirty[0][1]).any()
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    np.testing.assert_array_equal(a, b)
  for gradient in dirty[1]:
    assert not np.asarray(gradient)[:, 6:].any()


@pytest.mark.once
def test_dropout_equals_the_oracle_under_the_same_mask():
  q, k, v, do, dlse = inputs(2, 6, 9, 4, 2, 8)
  key = jax.random.key(7)
  rate = 0.4
  # With v = identity, o is the probabilities: what was kept can be read off.
  eye = jnp.broadcast_to(jnp.eye(9)[None, :, None], (2, 9, 2, 9))
  f = functools.partial(attention, dropout_rate=rate, dropout_key=key)
  p = jnp.swapaxes(attention(q, k, eye), 1, 2)
  kept = jnp.swapaxes(f(q, k, eye), 1, 2)
  keep = np.asarray(kept / p)
  np.testing.assert_allclose(keep[keep > 0], 1 / 0.6, rtol=1e-5)
  assert 0.2 < (keep == 0).mean() < 0.6
  mask = np.ones((2, 4, 6, 9), bool)
  ours = vjp(lambda *a: f(*a, return_lse=True), (q, k, v), do, dlse)
  wide = wide_vjp(lambda *a: oracle(*a, mask, keep=keep), (q, k, v), do, dlse)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert (f(q, k, v) == f(q, k, v)).all()
  other = attention(q, k, v, dropout_rate=rate, dropout_key=jax.random.key(8))
  assert (other != f(q, k, v)).any()


def test_rate_0_ignores_the_key():
  q, k, v, _, _ = inputs(1, 4, 4, 2, 2, 8)
  out = attention(q, k, v, dropout_rate=0.0, dropout_key=jax.random.key(0))
  np.testing.assert_array_equal(out, attention(q, k, v))


def test_vmap_equals_a_loop():
  q, k, v, _, _ = inputs(3, 5, 5, 4, 2, 8)
  ids = segments(3, 5)

  def one(q, k, v, ids):
    def loss(q):
      x = attention(q[None], k[None], v[None], segment_ids=ids[None])
      return jnp.sum(jnp.square(x))

    return jax.value_and_grad(loss)(q)

  many = jax.jit(jax.vmap(one))(q, k, v, ids)
  one = jax.jit(one)
  for i in range(3):
    single = one(q[i], k[i], v[i], ids[i])
    for a, b in zip(many, single, strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


BAD = {
  "heads": ({"n": 4, "k": 3}, {}, "4 query heads .* 3 kv heads"),
  "softcap": ({}, {"softcap": 0.0}, "softcap is 0.0"),
  "rate": ({}, {"dropout_rate": 1.0}, "dropout_rate is 1.0"),
  "key": ({}, {"dropout_rate": 0.5}, "no key"),
  "window": ({}, {"window": (-1, 2)}, "left width -1"),
  "lone segments": (
    {"t": 3},
    {"segment_ids": jnp.zeros((1, 3), jnp.int32)},
    "3 queries and 4 keys",
  ),
  "lone kv segments": (
    {},
    {"kv_segment_ids": jnp.zeros((1, 4), jnp.int32)},
    "without segment_ids",
  ),
  "implementation": ({}, {"impl": "cuddn"}, "did you mean 'cudnn'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_errors(case):
  sizes, settings, message = BAD[case]
  sizes = {"b": 1, "t": 4, "s": 4, "n": 4, "k": 2, "d": 8, **sizes}
  q, k, v, _, _ = inputs(**sizes)
  with pytest.raises(ValueError, match=message):
    attention(q, k, v, **settings)


def test_bad_shapes_are_errors_without_the_type_checker():
  """explain shares the checks, and takes structs that no annotation sees."""
  s = jax.ShapeDtypeStruct
  x = s((2, 4, 4, 8), jnp.float32)
  for bad in [
    (x, s((2, 5, 4, 8), jnp.float32), x),
    (s((3, 4, 4, 8), jnp.float32), x, x),
    (s((2, 4, 4, 16), jnp.float32), x, x),
    (s((2, 4, 4, 8), jnp.bfloat16), x, x),
    (s((2, 4, 8), jnp.float32), x, x),
  ]:
    with pytest.raises(ValueError):
      explain(*bad)
  for name, shape in [
    ("segment_ids", (2, 5)),
    ("sinks", (3,)),
    ("q_positions", (2, 3, 4)),
    ("kv_positions", (2, 4)),
  ]:
    with pytest.raises(ValueError, match=name):
      explain(x, x, x, **{name: s(shape, jnp.int32)})
  with pytest.raises(ValueError, match="not int32"):
    explain(x, x, x, q_positions=s((1, 1, 4), jnp.int16))
  verdicts = {row.name: row.verdict for row in explain(x, x, x)}
  refused = {"mosaic": "refuses", "cudnn": "refuses"}
  assert verdicts == {"chunked": "runs", "xla": "could", **refused}


def test_cudnn_by_name_raises_its_reason_without_a_gpu():
  q, k, v, _, _ = inputs(1, 8, 8, 2, 2, 8, dtype=jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="platform is cpu"):
    attention(q, k, v, impl="cudnn")
  out = attention(q, k, v, impl=("cudnn", "xla"))
  np.testing.assert_array_equal(out, attention(q, k, v, impl="xla"))


def test_report_has_a_winner_for_every_case():
  rows = report()
  cases = {r.case for r in rows}
  assert len(cases) == 4
  for case in cases:
    assert [r.verdict for r in rows if r.case == case].count("runs") == 1
  assert all(r.reason for r in rows if r.verdict == "refuses")


def test_checkpoint_with_the_policy_keeps_out_and_lse():
  """Without it, the forward pass runs again: more products."""
  q, k, v, _, _ = inputs(1, 16, 16, 2, 2, 8)

  def count(**kwargs):
    f = jax.checkpoint(lambda q: attention(q, k, v).sum(), **kwargs)
    return str(jax.make_jaxpr(jax.grad(f))(q)).count("dot_general")

  plain = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v).sum()))(q))
  assert count(policy=save_attention) == plain.count("dot_general")
  assert count() > count(policy=save_attention)


def test_remat_under_the_policy_runs_the_walk_once():
  """Long calls walk along chunks: a loop forward, and one backward."""
  q, k, v, _, _ = inputs(1, 300, 300, 2, 2, 8)

  def count(**kwargs):
    f = jax.checkpoint(
      lambda q: attention(q, k, v, causal=True).sum(), **kwargs
    )
    return str(jax.make_jaxpr(jax.grad(f))(q)).count(" scan[")

  assert count(policy=save_attention) == 2
  assert count() == 3


def test_explain_takes_masks_and_keys_as_they_are():
  s = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
  rows = explain(
    s,
    s,
    s,
    mask=BlockMask.causal(256),
    dropout_rate=0.1,
    dropout_key=jax.random.key(0),
    shard_axes=((), ()),
  )
  reasons = {row.name: row.reason for row in rows}
  assert reasons["mosaic"] and reasons["cudnn"] and not reasons["chunked"]
  with pytest.raises(ValueError, match="'ring'"):
    explain(s, s, s, shard_axes=("ring", ()))


GPU_DEFAULT = {
  "plain": ({}, "bfloat16"),
  "packed": ({"segment_ids": jnp.zeros((1, 256), jnp.int32)}, "bfloat16"),
  "float32": ({}, "float32"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_DEFAULT)
def test_the_default_on_gpu_is_what_explain_says(case):
  """And it is a kernel wherever one takes the call."""
  settings, dtype = GPU_DEFAULT[case]
  q, k, v, _, _ = inputs(1, 256, 256, 4, 4, 64, dtype=jnp.dtype(dtype))
  rows = explain(q, k, v, causal=True, **settings)
  (name,) = [row.name for row in rows if row.verdict == "runs"]
  print(f"{case}: {name} runs")
  assert (name == "chunked") == (dtype == "float32"), rows

  # The programs' texts differ: kernels name the column they are called from.
  by_default, by_name = (
    build(
      functools.partial(attention, causal=True, impl=i, **settings), q, k, v
    )
    for i in (None, name)
  )
  assert by_default.kernels == by_name.kernels
  assert any("mosaic" in k for k in by_name.kernels) == (name == "mosaic")
