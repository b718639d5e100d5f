"""Block routing against sets that are written out, values and gradients."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention, moba, save_attention
from isthmus.attention.moba import OP
from isthmus.pallas.moba import chunked
from tests.attention import cover
from tests.attention.oracle import by_hand, check, inputs
from tests.pallas.moba.sets import mask_of

pytestmark = pytest.mark.once

IMPLS = ("chunked", "xla")


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
  """Each implementation; chunks and tiles so small that there are several."""
  monkeypatch.setitem(chunked.CHUNK, "cpu", (24, 4))
  return request.param


def ids(*lengths):
  """Segment ids [b t]; neighbours differ, the last of a row is not new."""
  rows = [np.repeat(np.arange(len(x)) % max(len(x) - 1, 2), x) for x in lengths]
  return jnp.asarray(np.stack(rows), jnp.int32)


def vjp(function, args, do, dlse):
  """((o, lse), gradients), outside of jit: what is jitted inside is shared."""
  (o, lse), pull = jax.vjp(function, *args)
  return (o, lse), pull((do.astype(o.dtype), dlse.astype(lse.dtype)))


IDS = ids((5, 1, 17, 14), (30, 7))
DRAW = np.random.default_rng(5)

# (b, t, s, n, k, d, dv), settings.
USUAL = (2, 37, 37, 4, 2, 8, 8)
CASES = {
  "one": ((1, 1, 1, 1, 1, 4, 4), {}),
  "causal": (USUAL, {}),
  "centroids": (
    USUAL,
    {"centroids": jnp.asarray(DRAW.standard_normal((2, 10, 2, 8)), "float32")},
  ),
  "one kv head": ((1, 29, 29, 3, 1, 8, 20), {"block": 5, "top_k": 4}),
  "own only": (USUAL, {"top_k": 1}),
  "blocks of one": ((1, 19, 19, 2, 2, 8, 8), {"block": 1, "top_k": 5}),
  "one block": ((1, 19, 19, 2, 2, 8, 8), {"block": 64}),
  "more keys": ((1, 9, 30, 4, 2, 8, 8), {}),
  "one query": ((2, 1, 41, 4, 2, 8, 8), {}),
  "empty rows": ((1, 30, 11, 4, 2, 8, 8), {"top_k": 2}),
  "positions": (
    (2, 6, 22, 4, 2, 8, 8),
    {"q_positions": jnp.asarray([[4, -1, 21, 0, 9, -3], [2] * 6], jnp.int32)},
  ),
  "past the end": (
    (2, 6, 22, 4, 2, 8, 8),
    {
      "q_positions": jnp.asarray(
        [[0, 21, 23, 24, 40, 2**31 - 1], [20, 21, 22, 23, 24, 25]], jnp.int32
      ),
    },
  ),
  "past the end, every block": (
    (1, 2, 12, 2, 1, 8, 8),
    {"top_k": 4, "q_positions": jnp.asarray([[12, 15]], jnp.int32)},
  ),
  "segments": (USUAL, {"segment_ids": IDS}),
  "segments, bound": (USUAL, {"segment_ids": IDS, "max_segments": 4}),
  "every token a segment": (
    (1, 9, 9, 2, 1, 8, 8),
    {"segment_ids": jnp.arange(9, dtype=jnp.int32)[None], "max_segments": 30},
  ),
  "not causal": (USUAL, {"causal": False}),
  "not causal, more keys": (
    (1, 7, 33, 4, 2, 8, 8),
    {"top_k": 2, "causal": False},
  ),
  "not causal, segments": (
    USUAL,
    {"causal": False, "segment_ids": IDS, "max_segments": 4},
  ),
}
CASES = {
  name: (shape, {"block": 4, "top_k": 3, **settings})
  for name, (shape, settings) in CASES.items()
}
#: Those that others hold much of.
SLOW = (
  *("one", "own only", "one block", "more keys", "segments"),
  *("past the end, every block", "every token a segment"),
  "not causal, more keys",
)
# Whose queries all read everything that they may.
WHOLE = (
  *("one", "one block", "past the end, every block"),
  "every token a segment",
)


def both(shape, settings, impl, dtype=jnp.float32, seed=0, coarse=False):
  """((o, lse), gradients): ours, float64, and naively in dtype; the mask.

  Coarse queries and keys have exact scores, so that the choice is the same
  whatever the order of sums.
  """
  b, t, s, n, k, d, dv = shape
  q, key, v, do, dlse = inputs(b, t, s, n, k, d, dv, dtype, seed)
  if coarse:
    q, key = (jnp.round(2 * x) / 2 for x in (q, key))
  known = {x: y for x, y in settings.items() if x != "max_segments"}
  mask = mask_of(q, key, **known)

  def ours(q, k, v):
    return moba(q, k, v, return_lse=True, impl=impl, **settings)

  wide = by_hand((q, key, v), do, dlse, mask)
  low = by_hand((q, key, v), do, dlse, mask, dtype=jnp.dtype(dtype))
  return vjp(ours, (q, key, v), do, dlse), wide, low, mask


@pytest.mark.parametrize(
  "case",
  [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES],
)
def test_equals_the_sets(case, impl):
  ours, wide, low, mask = both(*CASES[case], impl)
  check(ours, wide, low, 2e-5)
  empty = ~mask.any(-1)
  assert empty.any() == (case in ("empty rows", "positions"))
  for x in (ours[0][0], ours[1][0]):
    assert not np.swapaxes(np.asarray(x), 1, 2)[empty].any()
  dense = {**CASES[case][1], "top_k": 99}
  dense.pop("max_segments", None)
  b, t, s, n, k, *_ = CASES[case][0]
  q, key, *_ = inputs(b, t, s, n, k, 8)
  everything = mask_of(q, key, **dense | {"centroids": None})
  assert (mask == everything).all() == (case in WHOLE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", ["causal", "segments, bound"])
def test_low_precision_stays_within_the_rule(case, dtype, impl):
  ours, wide, low, _ = both(*CASES[case], impl, dtype)
  assert ours[0][0].dtype == dtype and ours[0][1].dtype == jnp.float32
  assert {x.dtype for x in ours[1]} == {jnp.dtype(dtype)}
  check(ours, wide, low, 1e-5)


def test_float64(impl):
  shape, settings = CASES["causal"]
  b, t, s, n, k, d, dv = shape
  with jax.enable_x64(True):
    q, key, v, do, dlse = (
      x.astype(jnp.float64) for x in inputs(b, t, s, n, k, d, dv)
    )
    mask = mask_of(q, key, **settings)
    f = functools.partial(moba, return_lse=True, impl=impl, **settings)
    ours = vjp(f, (q, key, v), do, dlse)
    wide = by_hand((q, key, v), do, dlse, mask)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, atol=1e-13)


DENSE = {
  "plain": ((2, 37, 37, 4, 2, 8), {}, {}),
  "more keys": ((1, 9, 30, 4, 1, 8), {}, {}),
  "fewer keys": ((1, 30, 9, 4, 1, 8), {}, {}),
  "segments": (
    (2, 37, 37, 4, 2, 8),
    {"segment_ids": IDS},
    # The dense call knows no runs: give each one an id.
    {"segment_ids": ids((5, 1, 17, 14, 0), (30, 7, 0))},
  ),
  "not causal": ((1, 20, 30, 4, 1, 8), {"causal": False}, {"causal": False}),
}


@pytest.mark.parametrize("case", DENSE)
def test_every_block_chosen_is_dense_attention(case, impl):
  """T1; CASES show that with fewer blocks it is not."""
  shape, settings, dense = DENSE[case]
  q, k, v, do, dlse = inputs(*shape)
  g = -(-k.shape[1] // 4)

  def ours(top_k):
    f = functools.partial(
      moba, block=4, top_k=top_k, return_lse=True, impl=impl, **settings
    )
    return vjp(f, (q, k, v), do, dlse)

  f = functools.partial(attention, return_lse=True, **{"causal": True, **dense})
  want = vjp(f, (q, k, v), do, dlse)
  for top_k in (g, g + 3) if case == "plain" else (g,):
    got = ours(top_k)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_the_own_block_alone_is_attention_within_blocks(impl):
  """T2."""
  q, k, v, do, dlse = inputs(2, 37, 37, 4, 2, 8)
  i = jnp.broadcast_to(jnp.arange(37, dtype=jnp.int32) // 4, (2, 37))
  ours = functools.partial(moba, block=4, top_k=1, return_lse=True, impl=impl)
  local = functools.partial(
    attention, causal=True, segment_ids=i, return_lse=True
  )
  got, want = (vjp(f, (q, k, v), do, dlse) for f in (ours, local))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_future_changes_nothing_before_it(impl):
  """T3, to the last bit: not through keys, nor through centroids."""
  q, k, v, _, _ = inputs(2, 37, 37, 4, 2, 8)
  other = inputs(2, 37, 37, 4, 2, 8, seed=1)
  f = functools.partial(moba, block=4, top_k=3, return_lse=True, impl=impl)
  o, lse = f(q, k, v)
  for cut in (1, 22, 24, 36):
    swapped = (
      x.at[:, cut:].set(y[:, cut:])
      for x, y in zip((q, k, v), other[:3], strict=True)
    )
    o2, lse2 = f(*swapped)
    np.testing.assert_array_equal(o[:, :cut], o2[:, :cut])
    np.testing.assert_array_equal(lse[..., :cut], lse2[..., :cut])
    assert (o[:, cut:] != o2[:, cut:]).any()


def test_segments_do_not_see_each_other(impl):
  """T3: packed rows equal each segment on its own."""
  q, k, v, do, dlse = inputs(2, 37, 37, 4, 2, 8)
  f = functools.partial(moba, block=4, top_k=3, return_lse=True)
  packed = functools.partial(f, segment_ids=IDS, max_segments=4, impl=impl)
  (o, lse), gradients = vjp(packed, (q, k, v), do, dlse)
  start = 0
  for length in (5, 1, 17, 14):
    part = slice(start, start + length)
    start += length
    one = functools.partial(f, impl="xla")
    (o2, lse2), alone = vjp(
      one, [x[:1, part] for x in (q, k, v)], do[:1, part], dlse[:1, :, part]
    )
    np.testing.assert_allclose(o[:1, part], o2, atol=1e-6)
    np.testing.assert_allclose(lse[:1, :, part], lse2, atol=1e-6)
    for x, y in zip(gradients, alone, strict=True):
      np.testing.assert_allclose(x[:1, part], y, atol=2e-6)
  for cut in (5, 6, 23):
    other = [x.at[0, cut:].add(1) for x in (q, k, v)]
    o2, _ = packed(*other)
    np.testing.assert_array_equal(o[0, :cut], o2[0, :cut])
    np.testing.assert_array_equal(o[1], o2[1])
    other = [x.at[0, :cut].add(1) for x in (q, k, v)]
    o2, _ = packed(*other)
    np.testing.assert_allclose(o[0, cut:], o2[0, cut:], atol=1e-6)


def test_of_equal_scores_the_newest_blocks_are_chosen(impl):
  """T5: by a query of zeros, positive or not, and by equal keys."""
  keys = jnp.asarray(DRAW.choice([-1.0, 1.0], (1, 40, 1, 8)), jnp.float32)
  eye = jnp.eye(40)[None, :, None]
  for q, k in (
    (jnp.zeros_like(keys), keys),
    (-jnp.zeros_like(keys), keys),
    (jnp.ones_like(keys), jnp.ones_like(keys)),
  ):
    o = moba(q, k, eye, block=4, top_k=3, impl=impl)[0, :, 0]
    i, j = np.arange(40)[:, None], np.arange(40)
    want = (j <= i) & (j // 4 > i // 4 - 3)
    np.testing.assert_array_equal(np.asarray(o) > 0, want)


def test_no_gradient_through_centroids(impl):
  """T6: and none in k beside that of the keys that are read."""
  q, k, v, do, _ = inputs(2, 37, 37, 4, 2, 8)
  middle = CASES["centroids"][1]["centroids"]

  def loss(q, k, v, centroids=None):
    o = moba(q, k, v, block=4, top_k=3, centroids=centroids, impl=impl)
    return jnp.sum(o * do)

  *_, zero = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, middle)
  assert zero.shape == middle.shape and not np.asarray(zero).any()
  own = jnp.pad(k, ((0, 0), (0, 3), (0, 0), (0, 0))).reshape(2, 10, 4, 2, 8)
  own = own.mean(2)
  given = jax.grad(lambda k: loss(q, k, v, own))(k)
  np.testing.assert_allclose(jax.grad(loss, 1)(q, k, v), given, atol=1e-6)
  assert loss(q, k, v, middle) != loss(q, k, v)


@pytest.mark.parametrize("case", ["causal", "segments"])
def test_repeats_agree_to_the_last_bit(case, impl):
  """T7."""
  (b, t, s, n, k, d, dv), settings = CASES[case]
  q, key, v, do, dlse = inputs(b, t, s, n, k, d, dv)
  f = functools.partial(moba, return_lse=True, impl=impl, **settings)
  first = vjp(f, (q, key, v), do, dlse)
  for _ in range(3):
    again = vjp(f, (q, key, v), do, dlse)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_query_at_its_position_is_that_of_the_whole(impl):
  """Decoding: a buffer with room, NaN where nothing was written."""
  q, k, v, _, _ = inputs(2, 37, 37, 4, 2, 8)
  whole = moba(q, k, v, block=4, top_k=3, impl=impl)
  step = jax.jit(functools.partial(moba, block=4, top_k=3, impl=impl))
  for p in (0, 3, 4, 17, 36):
    room = jnp.arange(48)[:, None, None] > p
    at = ((0, 0), (0, 11), (0, 0), (0, 0))
    ks, vs = (jnp.where(room, jnp.nan, jnp.pad(x, at)) for x in (k, v))
    o = step(q[:, p : p + 1], ks, vs, q_positions=jnp.array([[p]], jnp.int32))
    np.testing.assert_allclose(o, whole[:, p : p + 1], atol=1e-6)


def test_nan_in_padding_does_not_leak(monkeypatch):
  """Padding is a segment of its own, whose tiles hold nothing else."""
  monkeypatch.setitem(chunked.CHUNK, "cpu", (24, 4))
  q, k, v, do, dlse = inputs(2, 37, 37, 4, 2, 8)
  real = jnp.asarray(np.arange(37) < np.array([[30], [9]]))
  f = functools.partial(
    moba,
    block=4,
    top_k=3,
    segment_ids=real.astype(jnp.int32),
    max_segments=4,
    return_lse=True,
  )
  clean = vjp(f, (q, k, v), do, dlse)
  bad = [jnp.where(real[..., None, None], x, jnp.nan) for x in (q, k, v, do)]
  dirty = vjp(f, bad[:3], bad[3], jnp.where(real[:, None], dlse, jnp.nan))
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    a, b = (np.asarray(x) for x in (a, b))
    if a.ndim == 3:
      a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    np.testing.assert_array_equal(a[real], b[real])


def test_segments_past_the_bound_are_nan_and_no_others(impl):
  q, k, v, _, _ = inputs(2, 37, 37, 4, 2, 8)
  f = functools.partial(
    moba, block=4, top_k=3, segment_ids=IDS, return_lse=True, impl=impl
  )
  o, lse = f(q, k, v, max_segments=3)
  whole, _ = f(q, k, v)
  lost = np.zeros((2, 37), bool)
  lost[0, 23:] = True
  np.testing.assert_array_equal(np.isnan(lse), np.stack([lost] * 4, axis=1))
  np.testing.assert_array_equal(np.isnan(o).all((2, 3)), lost)
  np.testing.assert_allclose(o[~lost], whole[~lost], atol=1e-6)


def test_scale_and_the_default_implementation():
  q, k, v, _, _ = inputs(1, 20, 20, 2, 2, 8)
  f = functools.partial(moba, block=4, top_k=2)
  np.testing.assert_allclose(
    f(q, k, v, scale=0.7), f(q * 0.7 * 8**0.5, k, v), atol=1e-5
  )
  text = jax.jit(f).lower(q, k, v).as_text()
  texts = {
    x: jax.jit(functools.partial(f, impl=x)).lower(q, k, v).as_text()
    for x in IMPLS
  }
  assert text == texts["chunked"] != texts["xla"]
  assert OP.names() == ("chunked",)


def test_vmap_equals_a_loop(impl):
  q, k, v, _, _ = inputs(3, 14, 14, 2, 1, 8)

  def one(q, k, v, ids):
    def loss(*x):
      x = (y[None] for y in x)
      o = moba(*x, block=3, top_k=2, segment_ids=ids[None], impl=impl)
      return jnp.sum(jnp.square(o))

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  rows = ids((14,), (5, 9), (1, 6, 7))
  many = jax.jit(jax.vmap(one))(q, k, v, rows)
  for i in range(3):
    single = jax.jit(one)(q[i], k[i], v[i], rows[i])
    for a, b in zip(many, single, strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_over_a_mesh_every_device_has_its_rows_and_heads():
  """No device holds the queries of another: nothing is gathered."""
  mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  q, k, v, do, _ = inputs(2, 37, 37, 4, 2, 8)

  def gradient(q, k, v):
    def loss(*x):
      o = moba(*x, block=4, top_k=2, segment_ids=IDS, max_segments=4)
      return jnp.sum(o * do)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  want = jax.jit(gradient)(q, k, v)
  spec = jax.sharding.PartitionSpec("data", None, "model")
  with jax.set_mesh(mesh):
    given = jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, spec))
    compiled = jax.jit(gradient).lower(*given).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(*given)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert a.sharding.shard_shape(a.shape)[0] == 1


def test_remat_under_the_policy_chooses_once():
  q, k, v, _, _ = inputs(1, 40, 40, 2, 2, 8)

  def count(word, **kwargs):
    f = jax.checkpoint(
      lambda q: moba(q, k, v, block=4, top_k=3).sum(), **kwargs
    )
    return len(re.findall(word, str(jax.make_jaxpr(jax.grad(f))(q))))

  for word in (r" top_k\[", "name=choose"):
    assert count(word, policy=save_attention) == 1
    assert count(word) == 2
  for word in (r"name=_walk\b", "name=_walk_back"):
    assert count(word, policy=save_attention) == 1


BAD = {
  "block": ({"block": 0}, "block is 0"),
  "top_k": ({"top_k": 0}, "top_k is 0"),
  "positions": (
    {"causal": False, "q_positions": jnp.zeros((1, 6), jnp.int32)},
    "without causal",
  ),
  "bound alone": ({"max_segments": 2}, "without segment_ids"),
  "bound": (
    {"max_segments": 0, "segment_ids": jnp.zeros((1, 6), jnp.int32)},
    "max_segments is 0",
  ),
  "both": (
    {
      "q_positions": jnp.zeros((1, 6), jnp.int32),
      "segment_ids": jnp.zeros((1, 6), jnp.int32),
    },
    "q_positions don't go",
  ),
  "centroids": ({"centroids": jnp.zeros((1, 2, 1, 8))}, "centroids has shape"),
  "implementation": ({"impl": "chunky"}, "did you mean 'chunked'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_errors(case):
  settings, message = BAD[case]
  q, k, v, _, _ = inputs(1, 6, 6, 2, 1, 8)
  with pytest.raises(ValueError, match=message):
    moba(q, k, v, **{"block": 2, "top_k": 2, **settings})


def test_segments_need_as_many_queries_as_keys():
  q, k, v, _, _ = inputs(1, 4, 6, 2, 1, 8)
  segments = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match="4 queries and 6 keys"):
    moba(q, k, v, block=2, top_k=2, segment_ids=segments)


# The grids of the two papers' own suites: MoBA's, and FlashMoBA's.
HEADS = ((6, 6), (6, 1), (6, 2))
WIDTHS = (32, 59, 64, 80, 96, 111, 128, 160)
LENGTHS = (
  *((1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512)),
  *((512, 256), (1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)),
  (4096, 4096),
)
DTYPES = ("float16", "bfloat16")


def flash_case(dtype, heads, causal, d, lengths):
  """Rows of random lengths: as packed padding, or as positions."""
  (n, k), (t, s) = heads, lengths
  b = 4 if t * s < 2**20 else 1
  rng = np.random.default_rng(t + d)
  real = rng.integers(max(s // 2, 1), s + 1, b)
  settings = {"block": 64, "top_k": 4, "causal": causal}
  if t == s:
    index = (np.arange(s) >= real[:, None]).astype(np.int32)
    settings |= {"segment_ids": jnp.asarray(index), "max_segments": 2}
  elif causal:
    places = real[:, None] - t + np.arange(t)
    settings["q_positions"] = jnp.asarray(places, jnp.int32)
  ours, wide, low, _ = both(
    (b, t, s, n, k, d, d), settings, None, jnp.dtype(dtype), coarse=True
  )
  assert ours[0][0].dtype == dtype and ours[0][1].dtype == jnp.float32
  check(ours, wide, low, 1e-5)


# Values of each axis in turn, but for the longest.
TURNS = [
  (DTYPES[i % 2], HEADS[i % 3], i not in (3, 5), WIDTHS[i % 8], LENGTHS[i % 8])
  for i in range(8)
]


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_grid_of_lengths_and_widths(turn):
  flash_case(*turn)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "case",
  cover.covering(
    list(itertools.product(DTYPES, HEADS, (True, False), WIDTHS, LENGTHS))
  ),
  ids=str,
)
def test_grid_of_lengths_and_widths_on_gpu(case):
  flash_case(*case)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_grid_of_lengths_and_widths(dtype, heads, causal, d, lengths):
  flash_case(dtype, heads, causal, d, lengths)


def moba_case(b, n, t, block, top_k):
  """bfloat16, against exact values of the same numbers."""
  settings = {"block": block, "top_k": top_k}
  shape = (b, t, t, n, n, 128, 128)
  ours, wide, _, _ = both(shape, settings, None, jnp.bfloat16, coarse=True)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    np.testing.assert_allclose(x, y, atol=2e-2, rtol=2e-2)
    error = np.abs(x - y)
    assert error.max() < 4e-2 and error.mean() < 4e-4


@pytest.mark.parametrize("case", [(1, 2, 512, 128, 2), (2, 1, 1024, 256, 3)])
def test_grid_of_batch_and_blocks(case):
  moba_case(*case)


MOBA = ((1, 4, 7), (1, 2, 4, 8), (512, 1024, 2048), (128, 256, 1024), (2, 3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize(
  "case", cover.covering(list(itertools.product(*MOBA))), ids=str
)
def test_grid_of_batch_and_blocks_on_gpu(case):
  moba_case(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", itertools.product(*MOBA), ids=str)
def test_whole_grid_of_batch_and_blocks(case):
  moba_case(*case)
