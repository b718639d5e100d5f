"""Attention by the Mosaic kernels: values, gradients, refusals, lowering.

Where there is no GPU the kernels are interpreted, a few small calls each of
which takes seconds; lowering for CUDA needs no GPU either.
"""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import save_attention
from isthmus.pallas import hopper
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.flash import mosaic
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import listed
from isthmus.pallas.flash.plan import restrict
from isthmus.pallas.flash.predicate import (
  EMPTY,
  Band,
  Both,
  Positions,
  Segments,
)
from tests.attention import cover
from tests.attention.oracle import close
from tests.pallas.flash.hopper import (
  Call,
  equals_oracle,
  lowered,
  on,
  shapes,
)

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernels need jax 0.11"
)
BLOCK = (128, 128)


def causal(t, s):
  return Band(None, 0, s - t)


def blocks(*lead, seed=3):
  """(full, partial) blocks, some rows with none and some with all."""
  kind = np.random.default_rng(seed).integers(0, 3, lead)
  kind[..., 0, :] = 0
  return jnp.asarray(kind == 1), jnp.asarray(kind == 2)


def segments(b, t, seed=0):
  cuts = np.random.default_rng(seed).random((b, 1, t)) < 0.03
  return jnp.asarray(np.cumsum(cuts, axis=-1), jnp.int32)


def slots(k, s):
  """Key positions in any order, a third of the slots empty, by head."""
  x = np.argsort(np.random.default_rng(1).random((1, k, s)), axis=-1)
  for head in range(k):
    x[:, head, (np.arange(s // 3) - 40 * head) % s] = EMPTY
  return jnp.asarray(x, jnp.int32)


def queries(n, t, s):
  x = np.random.default_rng(2).integers(0, s, (1, n, t))
  return jnp.asarray(x, jnp.int32)


def listing(call, *lead, block=BLOCK, seed=3):
  """The call with lists of its own; full blocks satisfy its predicate."""
  (t, s), extras = call.lengths, call.extras
  lists = restrict(
    listed(*blocks(*lead, seed=seed), block=block),
    call.predicate,
    extras.q,
    extras.k,
    t=t,
    s=s,
    num_heads=call.heads[0],
  )
  return dataclasses.replace(call, extras=extras._replace(lists=lists))


CALLS = {
  "causal, odd lengths, groups of 3, empty rows": Call(
    (203, 113), (6, 2), predicate=causal(203, 113)
  ),
  "lists of heads, causal": listing(
    Call((200, 300), predicate=causal(200, 300)), 1, 2, 2, 3, seed=22
  ),
  "segments, causal": Call(
    (190, 190),
    (1, 1),
    predicate=Both(Band(None, 0), Segments()),
    extras=Extras(q=(segments(1, 190),), k=(segments(1, 190),)),
  ),
  "softcap, sinks, wider values": Call(
    (100, 128),
    widths=(40, 100),
    predicate=causal(100, 128),
    softcap=1.5,
    extras=Extras(sinks=jnp.array([-0.5, 1.5])),
  ),
}
MORE = {
  "everything": Call((128, 256), (1, 1), (128, 128)),
  "one query": Call((1, 300), (4, 2)),
  "float16": Call((130, 140), predicate=causal(130, 140), dtype=jnp.float16),
  "window, rows of a batch": Call(
    (384, 384), (2, 2), predicate=Band(100, 20), b=2
  ),
  "window apart from the queries": Call(
    (300, 300), (1, 1), predicate=Band(200, -150)
  ),
  "192 columns": Call((128, 192), (1, 1), (192, 192), causal(128, 192)),
  "256 columns, narrower values": Call(
    (128, 192), (2, 1), (256, 192), causal(128, 192)
  ),
  "lists of all heads": Call(
    (384, 512),
    (4, 2),
    extras=Extras(lists=listed(blocks(1, 1, 3, 4)[0], block=BLOCK)),
  ),
  "lists of large blocks, segments": listing(
    Call(
      (512, 512),
      (2, 1),
      predicate=Segments(),
      extras=Extras(q=(segments(1, 512),), k=(segments(1, 512),)),
    ),
    *(1, 2, 2, 2),
    block=(256, 256),
    seed=5,
  ),
  "sinks alone, empty rows": Call(
    (256, 130),
    (2, 2),
    predicate=causal(256, 130),
    extras=Extras(sinks=jnp.array([0.5, 2.0])),
  ),
}


def padded(lengths=(140, 200), heads=(4, 2)):
  """Positions; the slots that are empty hold NaN."""
  (t, s), (n, k) = lengths, heads
  where = slots(k, s)
  call = Call(
    lengths,
    heads,
    predicate=Positions(None, 0),
    extras=Extras(q=(queries(n, t, s),), k=(where,)),
  )
  (q, key, v), *_ = call.arrays()
  hole = jnp.swapaxes(where == EMPTY, 1, 2)[..., None]
  return call, (q, jnp.where(hole, jnp.nan, key), jnp.where(hole, jnp.nan, v))


def check_padding(*sizes):
  call, args = padded(*sizes)
  ours = call.vjp(args)
  mask = equals_oracle(call, ours)
  heads = call.heads[1]
  unseen = ~mask.reshape(heads, -1, call.lengths[1]).any(axis=1).T
  assert np.isnan(np.asarray(args[1], np.float64)[0, unseen]).any()
  assert not unseen.all(axis=1).all() and unseen.any(axis=0).all()
  for x in ours[1][1:]:
    assert (x[0, unseen] == 0).all()


def check_window():
  """NaN in keys outside of every window, in a tile with keys inside."""
  call = Call((64, 256), (1, 1), predicate=Band(50, 0, 192))
  (q, k, v), *_ = call.arrays()
  unseen = ~call.mask().any(axis=(0, 1, 2))
  assert unseen[128:].any() and not unseen[128:].all()
  hole = jnp.asarray(unseen)[None, :, None, None]
  k, v = jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.nan, v)
  equals_oracle(call, call.vjp((q, k, v)))


def check_long_tiles():
  """NaN in keys that no query sees; tiles of 192 queries, some without keys."""
  call = Call((380, 400), (1, 1), predicate=Band(50, 0, -100))
  (q, k, v), *_ = call.arrays()
  unseen = ~call.mask().any(axis=(0, 1, 2))
  assert unseen[256:384].any() and not unseen[256:384].all()
  hole = jnp.asarray(unseen)[None, :, None, None]
  k, v = jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.nan, v)
  with three_warpgroups():
    mask = equals_oracle(call, call.vjp((q, k, v)))
  assert not mask[:, :, :100].any() and mask[:, :, 100:].any(-1).all()


def check_unlisted():
  """NaN in a block of keys that no list has, and in one of queries without."""
  full = np.zeros((1, 1, 3, 3), bool)
  full[0, 0, ::2, 0] = full[0, 0, 2, 2] = True
  lists = listed(jnp.asarray(full), block=BLOCK)
  call = Call((384, 384), (1, 1), extras=Extras(lists=lists))
  args, do, _ = call.arrays()
  hole = (jnp.arange(384) // 128 == 1)[None, :, None, None]
  *args, do = (jnp.where(hole, jnp.nan, x) for x in (*args, do))
  mask = equals_oracle(call, call.vjp(args, do))
  assert not mask[..., 128:256].any() and mask[..., 256:].any()
  assert not mask[:, :, 128:256].any() and mask[:, :, 256:].any()


def check_partly_empty():
  """NaN in queries without keys, of a listed tile in which others have some."""
  call = Call((256, 256), (1, 1), predicate=Band(None, 0, -64))
  blocks = jnp.ones((1, 1, 2, 2), bool)
  lists = restrict(
    listed(blocks, block=BLOCK), call.predicate, t=256, s=256, num_heads=1
  )
  call = dataclasses.replace(call, extras=Extras(lists=lists))
  (q, k, v), do, _ = call.arrays()
  hole = (jnp.arange(256) < 64)[None, :, None, None]
  q, do = jnp.where(hole, jnp.nan, q), jnp.where(hole, jnp.nan, do)
  mask = equals_oracle(call, call.vjp((q, k, v), do))
  assert not mask[:, :, :64].any() and mask[:, :, 64:].any(-1).all()
  assert lists.partial_num.tolist() == [[[1, 2]]]


@pytest.fixture
def two_processors(monkeypatch):
  """A GPU so small that its two CTAs take several tiles each."""
  jax.clear_caches()
  monkeypatch.setattr(hopper, "PROCESSORS", 2)
  yield
  jax.clear_caches()


def overflowing(lengths=(256, 256), heads=(2, 1)):
  """Lists that are too short for the last query block of the last head."""
  full = np.zeros((1, heads[0], lengths[0] // 128, lengths[1] // 128), bool)
  full[..., 0] = True
  full[0, -1, -1] = True
  lists = listed(jnp.asarray(full), block=BLOCK, capacity=1)
  return Call(lengths, heads, extras=Extras(lists=lists))


def check_overflow(*sizes):
  """NaN in the rows that lost keys, and in the gradients of what they see."""
  call = overflowing(*sizes)
  (o, lse), (dq, dk, dv) = call.vjp()
  lost = np.zeros(lse.shape, bool)
  lost[0, -1, -128:] = True
  rows = lost.swapaxes(1, 2)
  assert (np.isnan(lse) == lost).all()
  assert (np.isnan(o).all(-1) == rows).all()
  assert (np.isnan(o).any(-1) == rows).all()
  assert np.isnan(dq[rows]).all() and not np.isnan(dq[~rows]).any()
  assert np.isnan(dk[:, :, -1]).all() and np.isnan(dv[:, :, -1]).all()


@needs_mosaic
@pytest.mark.parametrize("name", CALLS)
def test_equals_oracle(name):
  mask = equals_oracle(CALLS[name])
  assert not mask.all()
  lists = CALLS[name].extras.lists
  if lists is not None:
    assert lists.full_num.any() and lists.partial_num.any()
  if "empty rows" in name:
    assert not mask.any(-1).all()


SEVERAL = {
  "narrow": CALLS["causal, odd lengths, groups of 3, empty rows"],
  "sinks, wider values": dataclasses.replace(
    CALLS["softcap, sinks, wider values"], lengths=(200, 128)
  ),
  "lists, 128 columns": dataclasses.replace(
    CALLS["lists of heads, causal"], widths=(128, 128)
  ),
  "an odd number of tiles": Call((100, 130), (11, 1), predicate=Band(60, 0)),
  "three warpgroups": Call((400, 130), predicate=Band(None, 0, -64)),
}


@contextlib.contextmanager
def three_warpgroups(used=True):
  """Asserts that the forward kernel was built for three, or for two alone."""
  from isthmus.pallas.flash import mosaic_forward

  groups, forward = set(), mosaic_forward.forward

  def watched(*args):
    groups.add(args[-1].groups)
    return forward(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mosaic_forward, "forward", watched)
    yield
  assert groups == {3 if used else 2}


def check_several(name):
  from isthmus.pallas.flash import mosaic_forward

  taken, each_item = [], mosaic_forward.each_item

  def watched(items, each, function):
    taken.append(each)
    return each_item(items, each, function)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mosaic_forward, "each_item", watched)
    with three_warpgroups(name == "three warpgroups"):
      assert equals_oracle(SEVERAL[name]).any()
  assert taken and min(taken) > 1


@needs_mosaic
@pytest.mark.parametrize("name", SEVERAL)
def test_several_tiles_a_cta(name, two_processors):
  check_several(name)


@needs_mosaic
def test_nan_in_empty_slots_does_not_leak():
  check_padding()


@needs_mosaic
def test_nan_in_blocks_that_no_list_has_does_not_leak():
  check_unlisted()


@needs_mosaic
def test_nan_in_empty_rows_of_listed_tiles_does_not_leak():
  check_partly_empty()


def test_keys_are_copied_only_where_the_predicate_hides_some():
  """Lists alone hide nothing that is read."""
  x, lists = jnp.zeros((1, 256, 1, 64)), overflowing().extras.lists
  for band, kept in ((Band(None, 0, 0), True), (Band(50, 0, 192), False)):
    k, v = mosaic._clean_keys(
      Options(predicate=band), x, x, x, Extras(lists=lists)
    )
    assert (k is x) == (v is x) == kept


@needs_mosaic
def test_nan_outside_of_every_window_does_not_leak():
  check_window()


@needs_mosaic
def test_nan_outside_of_the_windows_of_long_tiles_does_not_leak(two_processors):
  check_long_tiles()


@needs_mosaic
def test_rows_whose_list_overflowed_are_nan():
  check_overflow()


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_equals_oracle_more(name):
  assert equals_oracle(MORE[name]).any()


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("case", cover.cases("mosaic", 512), ids=str)
def test_cover_interpreted(case):
  with interpreted():
    assert cover.check(case, "mosaic")


def tensors(text):
  """The shapes in a lowered program."""
  found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
  return {tuple(map(int, x[:-1].split("x"))) for x in found}


def gradients(call):
  def run(args, do, dlse):
    out, pull = jax.vjp(call.function(), *args)
    return out, pull((do, dlse))

  return run


ONE_PASS = ["flash_backward_dk_dv", "flash_backward_dq", "flash_forward"]
TWO = [
  *("flash_backward_dk", "flash_backward_dq", "flash_backward_dv"),
  "flash_forward",
]


@needs_mosaic
@pytest.mark.parametrize(
  "widths, kernels",
  [
    ((64, 64), ONE_PASS),
    ((128, 128), ONE_PASS),
    ((192, 192), TWO),
    ((256, 256), TWO),
    ((64, 128), ONE_PASS),
  ],
)
def test_each_kernel_is_in_the_cuda_program_once(widths, kernels):
  call = Call((300, 500), (4, 2), widths, causal(300, 500))
  text, found = lowered(gradients(call), *shapes(call))
  assert found == kernels
  assert max(map(math.prod, tensors(text))) < 4 * 512 * 256


@needs_mosaic
def test_layers_alike_are_lowered_once():
  """A kernel takes a second, and a decoder of written-out layers has many."""
  call = Call((256, 256), (2, 2), predicate=causal(256, 256))
  args, *_ = shapes(call)

  def three(q, k, v):
    for _ in range(3):
      q = mosaic.attend(q, k, v, Extras(), options=call.options)[0]
    return q.astype(jnp.float32).sum()

  assert lowered(jax.grad(three, (0, 1, 2)), *args)[1] == ONE_PASS


@needs_mosaic
def test_what_is_lowered_has_no_t_times_s_array():
  t = s = 4096
  ids = jax.ShapeDtypeStruct((1, 1, t), jnp.int32)
  full, partial = (jax.ShapeDtypeStruct((1, 2, 32, 32), bool),) * 2

  def run(args, do, dlse, ids, full, partial):
    call = Call(
      (t, s),
      (2, 1),
      predicate=Both(Band(None, 0), Segments()),
      extras=Extras(
        lists=listed(full, partial, block=BLOCK), q=(ids,), k=(ids,)
      ),
    )
    return gradients(call)(args, do, dlse)

  call = Call((t, s), (2, 1))
  text, found = lowered(run, *shapes(call), ids, full, partial)
  assert found == ONE_PASS
  assert max(map(math.prod, tensors(text))) <= t * 2 * 64
  assert t * 2 * 64 < t * s / 16


@needs_mosaic
def test_lowers_with_64_bit_numbers():
  """Indices stay int32 in kernels; weak types must not widen them."""
  with jax.enable_x64(True):
    call = dataclasses.replace(
      CALLS["lists of heads, causal"], softcap=2.0, widths=(64, 64)
    )
    assert jnp.arange(3).dtype == jnp.int64
    args, do, dlse = shapes(call)
    dlse = jax.ShapeDtypeStruct(dlse.shape, jnp.float32)
    assert lowered(gradients(call), args, do, dlse)[1] == ONE_PASS


@needs_mosaic
def test_lowers_under_vmap():
  call = Call((256, 256), predicate=causal(256, 256))
  stacked = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes(call)
  )
  _, found = lowered(jax.vmap(gradients(call)), *stacked)
  assert found == ONE_PASS


@needs_mosaic
def test_remat_by_the_policy_runs_the_forward_kernel_once():
  """Plain remat runs it again; the policy keeps o and lse instead."""
  call = Call((256, 256), (2, 2), predicate=causal(256, 256))
  args, *_ = shapes(call)

  def loss(wrap):
    def layer(q, k, v):
      # Something that is made again, so that there is something to remat.
      return jnp.sin(call.function()(jnp.sin(q), k, v)[0])

    def total(*args):
      return wrap(layer)(*args).astype(jnp.float32).sum()

    return jax.value_and_grad(total, (0, 1, 2))

  keep = lambda f: jax.checkpoint(f, policy=save_attention)
  counts = {
    name: lowered(loss(wrap), *args)[1].count("flash_forward")
    for name, wrap in (
      ("none", lambda f: f),
      ("policy", keep),
      ("plain", jax.checkpoint),
    )
  }
  assert counts == {"none": 1, "policy": 1, "plain": 2}


def refusal(dtype=jnp.bfloat16, widths=(64, 64), lengths=(128, 128), **how):
  (t, s), (d, dv) = lengths, widths
  lists = how.pop("lists", None)
  arrays = ((1, t, 2, d), (1, s, 2, d), (1, s, 2, dv))
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in arrays]
  extras = Extras(lists=lists)
  with interpreted():
    return mosaic.refuse(*arrays, extras, options=Options(**how))


@needs_mosaic
@pytest.mark.parametrize(
  "how, said",
  [
    ({"dtype": jnp.float32}, "it takes bfloat16 and float16, not float32"),
    ({"dropout_rate": 0.25}, "it does not take dropout (0.25)"),
    ({"scale": 0.0}, "it takes scales above 0, not 0.0"),
    ({"scale": -1.0}, "it takes scales above 0, not -1.0"),
    ({"widths": (64, 257)}, "it takes head widths up to 256, not 257"),
    ({"widths": (300, 64)}, "it takes head widths up to 256, not 300"),
    (
      {"lists": listed(jnp.ones((1, 1, 2, 1), bool), block=(64, 128))},
      "it takes blocks of multiples of 128 tokens, not (64, 128)",
    ),
    (
      {"lengths": (0, 128)},
      "it takes no empty arrays: (1, 0, 2, 64), (1, 128, 2, 64), "
      "(1, 128, 2, 64)",
    ),
    ({}, None),
    ({"dtype": jnp.float16, "widths": (256, 32), "softcap": 3.0}, None),
  ],
)
def test_what_is_refused(how, said):
  assert refusal(**how) == said


def ask():
  x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  return mosaic.refuse(x, x, x, Extras(), options=Options())


def test_a_machine_without_hopper_is_refused(monkeypatch):
  assert "it needs" in ask()
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert ask() is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CALLS, *MORE])
def test_equals_oracle_on_gpu(name):
  assert equals_oracle({**CALLS, **MORE}[name]).any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEVERAL)
def test_several_tiles_a_cta_on_gpu(name, two_processors):
  check_several(name)


@pytest.mark.gpu
def test_padding_of_long_tiles_on_gpu(two_processors):
  check_long_tiles()


@pytest.mark.gpu
def test_padding_and_overflow_on_gpu():
  check_padding((1000, 1500), (4, 2))
  check_unlisted()
  check_partly_empty()
  check_overflow((1024, 1024), (4, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "lists", "segments"])
def test_fifty_repeats_are_bitwise_equal(kind):
  t, extras, predicate = 4096, Extras(), Band(None, 0)
  if kind == "lists":
    predicate = None
    full, partial = blocks(1, 8, t // 128, t // 128)
    extras = Extras(lists=listed(full, partial, block=BLOCK))
  if kind == "segments":
    ids = segments(1, t)
    predicate, extras = Both(predicate, Segments()), Extras(q=(ids,), k=(ids,))
  call = Call((t, t), (8, 2), (128, 128), predicate, extras=extras)
  arrays = call.arrays()
  run = jax.jit(gradients(call))
  bits = lambda out: [np.asarray(x).tobytes() for x in jax.tree.leaves(out)]
  first = bits(run(*arrays))
  assert len(set(first)) == 5
  for _ in range(49):
    assert bits(run(*arrays)) == first


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
  """Forward at 2**31 elements and more; rows of the last heads by hand."""
  t, n, d = 2**17 + 64, 130, 128
  assert t * n * d > 2**31

  @jax.jit
  def draw(key):
    heads = lambda key: jax.random.normal(key, (t, d), jnp.bfloat16)
    x = jax.lax.map(heads, jax.random.split(key, n))
    return jnp.moveaxis(x, 0, 1)[None]

  q, k, v = map(draw, jax.random.split(jax.random.key(0), 3))
  options = Options(scale=d**-0.5, predicate=Band(None, 0))
  attend = jax.jit(
    lambda *args: mosaic.attend(*args, Extras(), options=options)
  )
  o, lse = attend(q, k, v)

  @jax.jit
  def by_rows(q, k, v, rows, factor):
    cast = lambda x: x.astype(factor.dtype)
    x = jnp.einsum("td,sd->ts", cast(q), cast(k), precision="highest")
    x = jnp.where(jnp.arange(t) <= rows[:, None], x * factor, -jnp.inf)
    p = cast(jax.nn.softmax(x, axis=-1))
    o = jnp.einsum("ts,sd->td", p, cast(v), precision="highest")
    return o, jax.nn.logsumexp(x, axis=-1)

  for head in (0, n // 2, n - 1):
    for start in (0, t // 2, t - 128):
      rows = jnp.arange(start, start + 128)
      given = q[0, rows, head], k[0, :, head], v[0, :, head], rows
      wide = by_rows(*given, jnp.float32(d**-0.5))
      low = by_rows(*given, jnp.bfloat16(d**-0.5))
      close(o[0, rows, head], np.asarray(wide[0]), low[0], 2, 1e-5)
      wide = np.asarray(wide[1])
      close(lse[0, head, rows], wide, wide, 0, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "segments"])
def test_temporary_memory_is_linear_on_gpu(kind):
  """Twice the tokens take at most about twice the temporaries."""

  def temporaries(t):
    ids = jnp.zeros((1, 1, t), jnp.int32)
    extras, predicate = Extras(), Band(None, 0)
    if kind == "segments":
      predicate = Both(predicate, Segments())
      extras = Extras(q=(ids,), k=(ids,))
    call = Call((t, t), (8, 2), (128, 128), predicate, extras=extras)
    compiled = jax.jit(gradients(call)).lower(*shapes(call)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporaries(16384), temporaries(32768)
  assert 0 < small and large <= 2.2 * small
  # A quarter of the float32 scores of one head.
  assert large < 4 * 32768**2 / 4


@pytest.mark.gpu
def test_new_lists_of_one_capacity_do_not_compile_anew():
  call = Call((1024, 1024), (4, 2))
  args, *_ = call.arrays()
  traced = []

  @jax.jit
  def run(args, lists):
    traced.append(1)
    return mosaic.attend(*args, Extras(lists=lists), options=call.options)

  with on():
    found = [
      run(args, listed(*blocks(1, 4, 8, 8, seed=seed), block=BLOCK))
      for seed in range(3)
    ]
  assert len(traced) == 1
  assert (found[0][0] != found[1][0]).any()
