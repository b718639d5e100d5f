"""The kernels of block routing: interpreted on a CPU, and on a Hopper GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import moba
from isthmus.pallas.compat import has_mosaic, interpreted
from isthmus.pallas.moba import mosaic
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.keys import KEYS
from isthmus.pallas.moba.layout import uniform
from tests.attention import test_moba
from tests.attention.oracle import check, inputs

pytestmark = pytest.mark.once

needs_mosaic = pytest.mark.skipif(
  not has_mosaic(), reason="the kernels need jax 0.11"
)

# Two warpgroups, lists of many tiles and of none, blocks cut into pieces.
LARGER = {
  "whole blocks": ((1, 300, 300, 3, 1, 64, 64), {"block": 64, "top_k": 3}),
  "many tiles": ((1, 520, 520, 2, 1, 32, 40), {"block": 128, "top_k": 3}),
  "large blocks": ((1, 400, 400, 2, 2, 64, 64), {"block": 192, "top_k": 2}),
}
SOME = ("causal", "segments, bound")
MORE = {
  **{x: y for x, y in test_moba.CASES.items() if x not in SOME},
  **{x: y for x, y in LARGER.items() if x != "whole blocks"},
  "128 columns": ((1, 200, 200, 2, 1, 128, 128), {"block": 64, "top_k": 2}),
  "top_k of 40": ((1, 130, 130, 1, 1, 8, 8), {"block": 2, "top_k": 40}),
}


def equals_the_sets(case, dtype=jnp.bfloat16):
  """Checks values and gradients; whether o and lse have their dtypes."""
  ours, wide, low, _ = test_moba.both(*case, "mosaic", dtype, coarse=True)
  check(ours, wide, low, 1e-5)
  return ours[0][0].dtype == dtype and ours[0][1].dtype == jnp.float32


@needs_mosaic
@pytest.mark.parametrize("name", SOME)
def test_equals_the_sets(name):
  with interpreted():
    assert equals_the_sets(test_moba.CASES[name])


@needs_mosaic
def test_whole_blocks_equal_the_sets():
  with interpreted():
    assert equals_the_sets(LARGER["whole blocks"], jnp.float16)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_cases_equal_the_sets(name):
  with interpreted():
    assert equals_the_sets(MORE[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SOME, "whole blocks", *MORE])
def test_cases_equal_the_sets_on_gpu(name):
  assert equals_the_sets({**test_moba.CASES, **LARGER, **MORE}[name])


def nan_leaks(impl):
  """Whether NaN in keys that no query sees tells, in a block that one reads."""
  q, k, v, do, dlse = inputs(1, 8, 100, 2, 1, 16, dtype=jnp.bfloat16)
  places = jnp.arange(60, 68, dtype=jnp.int32)[None]
  hole = jnp.arange(100)[None, :, None, None] > 67
  f = functools.partial(
    moba, block=32, top_k=2, q_positions=places, return_lse=True, impl=impl
  )

  def run(k, v):
    (o, lse), pull = jax.vjp(f, q, k, v)
    return o, lse, *pull((do.astype(o.dtype), dlse))

  clean = run(k, v)
  dirty = run(jnp.where(hole, jnp.nan, k), jnp.where(hole, jnp.nan, v))
  # NaN equals nothing, itself included.
  same = (bool((x == y).all()) for x, y in zip(clean, dirty, strict=True))
  return not all(same)


@needs_mosaic
def test_nan_that_no_query_sees_does_not_leak():
  with interpreted():
    assert not nan_leaks("mosaic")


@pytest.mark.gpu
def test_nan_that_no_query_sees_does_not_leak_on_gpu():
  assert not nan_leaks("mosaic")


def shapes(b, t, n, k, d, dtype=jnp.bfloat16):
  q, key = ((b, t, heads, d) for heads in (n, k))
  return [jax.ShapeDtypeStruct(x, dtype) for x in (q, key, key)]


def program(args, options, **how):
  """The gradient's program for a GPU, and the kernels in it."""
  layout = uniform(args[0].shape[1], args[1].shape[1], block=options.block)

  def loss(*args):
    o, lse = mosaic.attend(*args, Extras(layout), options=options)
    return o.astype(jnp.float32).sum() + lse.sum()

  f = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), **how)
  text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  return text, sorted(re.findall(r"moba_(forward|backward|select)", text))


@needs_mosaic
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_each_kernel_is_in_the_cuda_program_once(block, d):
  args = shapes(1, 1024, 4, 2, d)
  _, found = program(args, Options(block=block, top_k=3))
  assert sorted(set(found)) == ["backward", "forward", "select"]


@needs_mosaic
def test_nothing_lowered_is_as_large_as_the_scores_of_blocks():
  t, block = 2**16, 128
  text, _ = program(shapes(1, t, 1, 1, 64), Options(block=block, top_k=8))
  found = re.findall(r"tensor<((?:\d+x)+)(bf16|f32|i32|i1)>", text)
  width = {"bf16": 2, "f32": 4, "i32": 4, "i1": 1}
  sizes = {
    x: int(np.prod([int(y) for y in x[0][:-1].split("x")])) * width[x[1]]
    for x in found
  }
  scores = t * (t // block) * 4
  assert max(sizes.values()) < scores, max(sizes, key=lambda x: sizes[x])


@needs_mosaic
def test_lanes_come_in_groups(monkeypatch):
  """As many as the limit allows; the results are the same."""
  q, k, v, *_ = inputs(2, 70, 70, 2, 2, 16, dtype=jnp.bfloat16)
  f = functools.partial(moba, block=32, top_k=2, impl="mosaic")
  counts, original = [], mosaic.block_tiles

  def block_tiles(places, *args):
    counts.append(places.row.shape[0])
    return original(places, *args)

  monkeypatch.setattr(mosaic, "block_tiles", block_tiles)
  found, limits = [], (2**30, 2 * (140 * 2 + 3 * 64) * 64 * 2, 1)
  with interpreted():
    for limit in limits:
      monkeypatch.setattr(mosaic, "LIMIT", limit)
      mosaic._walk.clear_cache()
      mosaic._arrange.clear_cache()
      found.append(f(q, k, v))
  mosaic._walk.clear_cache()
  mosaic._arrange.clear_cache()
  assert counts == [4, 2, 1]
  for x in found[1:]:
    np.testing.assert_array_equal(*(np.asarray(y) for y in (found[0], x)))


@needs_mosaic
def test_queries_of_a_long_lane_take_turns(monkeypatch):
  """Three turns, the last one short; sums over them are all that may differ."""
  q, k, v, do, dlse = inputs(1, 70, 70, 4, 2, 16, dtype=jnp.bfloat16)
  f = functools.partial(moba, block=24, top_k=2, impl="mosaic", return_lse=True)
  turns, original = [], mosaic.block_tiles

  def block_tiles(places, *args):
    turns.append(places.place.shape[:2])
    return original(places, *args)

  def clear():
    for jitted in (mosaic._walk, mosaic._walk_back, mosaic._arrange):
      jitted.clear_cache()

  monkeypatch.setattr(mosaic, "block_tiles", block_tiles)
  found, rows = [], 2 * 2 * 64 * 2  # group, slots, width, bytes
  with interpreted():
    for turn in (70 * rows, 30 * rows):
      monkeypatch.setattr(mosaic, "TURN", turn)
      clear()
      (o, lse), pull = jax.vjp(f, q, k, v)
      found.append((o, lse, *pull((do.astype(o.dtype), dlse))))
  clear()
  assert turns == [(2, 140)] * 2 + [(2, 48)] * 2
  whole, cut = ([np.asarray(x, np.float32) for x in y] for y in found)
  for x, y in zip(whole[:3], cut[:3], strict=True):
    np.testing.assert_array_equal(x, y)
  for x, y in zip(whole[3:], cut[3:], strict=True):
    np.testing.assert_allclose(x, y, rtol=2**-6, atol=2**-6)


@needs_mosaic
def test_short_blocks_are_cut_for_a_few_lanes_at_a_time(monkeypatch):
  """With what a piece lacks they would be twice the keys of all lanes."""
  monkeypatch.setattr(mosaic, "LIMIT", 1)
  t, heads, size = 1000, 4, KEYS[0]
  text, _ = program(shapes(1, t, heads, heads, 64), Options(size // 2, 3))
  blocks = -(-t // (size // 2))
  assert f"tensor<1x{blocks}x{size}x64xbf16>" in text
  assert f"tensor<{heads}x{blocks}x{size}x64xbf16>" not in text


@needs_mosaic
@pytest.mark.parametrize(
  "how, said",
  [
    ({"dtype": jnp.float32}, "it takes bfloat16 and float16, not float32"),
    ({"d": 160}, "it takes head widths up to 128, not 160"),
    ({"t": 0}, "it takes no empty arrays: (1, 0, 2, 64)"),
    ({"scale": 0.0}, "it takes scales above 0, not 0.0"),
    ({"d": 40}, None),
  ],
)
def test_what_is_refused(how, said):
  scale = how.pop("scale", 1.0) if "scale" in how else 1.0
  how = {"b": 1, "t": 128, "n": 2, "k": 2, "d": 64, **how}
  extras = Extras(uniform(max(how["t"], 1), 128, block=64))
  with interpreted():
    found = mosaic.refuse(
      *shapes(**how), extras, options=Options(64, 2, scale=scale)
    )
  assert found == said or (said and found.startswith(said))


def test_a_machine_without_hopper_is_refused(monkeypatch):
  extras = Extras(uniform(128, 128, block=64))
  ask = lambda: mosaic.refuse(
    *shapes(1, 128, 2, 2, 64), extras, options=Options(64, 2)
  )
  assert "it needs" in ask()
  monkeypatch.setattr(mosaic, "refuse_machine", lambda: None)
  assert ask() is None
