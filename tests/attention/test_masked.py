"""attention under block masks; repeats and sizes that it has to bear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import BlockMask, attention, explain
from isthmus.pallas.flash import chunked
from isthmus.pallas.flash.lists import Lists
from tests.attention.oracle import (
  check,
  dense_mask,
  inputs,
  oracle,
  segments,
  vjp,
  wide_vjp,
)

pytestmark = pytest.mark.once


def some_blocks(b, n, t, block, seed=0, **kwargs):
  draw = np.random.default_rng(seed).random(
    (b, n, t // block[0], t // block[1])
  )
  return BlockMask.from_blocks(jnp.asarray(draw < 0.5), block=block, **kwargs)


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_a_mask_meets_every_other_condition(impl, monkeypatch):
  """Its blocks, its own predicate, and those of the call."""
  monkeypatch.setitem(chunked.CHUNK, "cpu", (8, 8))
  q, k, v, do, dlse = inputs(2, 32, 32, 4, 2, 8)
  ids, settings = segments(2, 32), {"window": (20, 3)}
  draw = np.random.default_rng(2).random((1, 4, 4, 8)) < 0.6
  mask = BlockMask.from_blocks(jnp.asarray(draw), block=(8, 4))
  mask = mask & BlockMask.segments(ids, block=(8, 4))
  elements = dense_mask(2, 32, 32, 4, 2, segment_ids=ids, **settings)
  elements &= draw.repeat(8, axis=2).repeat(4, axis=3)
  f = functools.partial(
    attention, mask=mask, return_lse=True, impl=impl, **settings
  )
  ours = vjp(f, (q, k, v), do, dlse)
  wide = wide_vjp(lambda *a: oracle(*a, elements), (q, k, v), do, dlse)
  check(ours, wide, wide, 1e-5)
  empty = ~elements.any(-1)
  assert empty.any()
  for x in (ours[0][0], ours[1][0]):
    assert not np.swapaxes(np.asarray(x), 1, 2)[empty].any()


def test_new_lists_of_one_capacity_are_not_traced_again():
  traces = []

  @jax.jit
  def call(q, blocks):
    traces.append(1)
    mask = BlockMask.from_blocks(blocks, block=(8, 8), capacity=3)
    return attention(q, q, q, mask=mask, causal=True), mask.dropped

  @jax.jit
  def with_mask(q, mask):
    traces.append(1)
    return attention(q, q, q, mask=mask)

  q, _, _, _, _ = inputs(1, 32, 32, 2, 2, 8)
  for seed in range(3):
    draw = np.random.default_rng(seed).random((1, 2, 4, 4)) < 0.4
    o, dropped = call(q, jnp.asarray(draw))
    assert np.isnan(o).any() == bool(dropped)
    with_mask(q, some_blocks(1, 2, 32, (8, 8), seed))
  assert len(traces) == 2


def test_too_many_blocks_are_nan_in_their_rows_and_counted():
  q, k, v, do, dlse = inputs(1, 32, 32, 2, 2, 8)
  blocks = jnp.ones((1, 2, 4, 4), bool).at[0, 1, 2].set(False)
  mask = BlockMask.from_blocks(blocks, block=(8, 8), capacity=3)
  assert int(mask.dropped) == 7
  f = functools.partial(attention, mask=mask, return_lse=True)
  (o, lse), (dq, dk, dv) = vjp(f, (q, k, v), do, dlse)
  lost = np.ones((2, 32), bool)
  lost[1, 16:24] = False
  np.testing.assert_array_equal(np.isnan(lse[0]), lost)
  for x in (o, dq):
    np.testing.assert_array_equal(np.isnan(x[0]).all(-1), lost.T)
    np.testing.assert_array_equal(np.isnan(x[0]).any(-1), lost.T)
  assert np.isnan(dk).any() and np.isnan(dv).any()


def test_masks_that_do_not_fit():
  q, k, v, _, _ = inputs(2, 32, 32, 4, 2, 8)
  for mask, message in (
    (BlockMask.causal(40, block=(8, 8)), "40 queries .* 40 keys.* 32 and 32"),
    (some_blocks(3, 1, 32, (8, 8)), "batch 3, and the call's is 2"),
    (some_blocks(1, 2, 32, (8, 8)), "2 heads, .* 4 query heads"),
  ):
    with pytest.raises(ValueError, match=message):
      attention(q, k, v, mask=mask)
  s = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
  with pytest.raises(TypeError, match="mask is a tuple"):
    explain(s, s, s, mask=(s,))


def test_fifty_repeats_agree_to_the_last_bit():
  q, k, v, do, dlse = inputs(2, 40, 40, 4, 2, 16)
  mask = some_blocks(2, 4, 40, (8, 8))
  f = jax.jit(
    lambda *x: vjp(
      functools.partial(attention, mask=mask, causal=True, return_lse=True),
      x,
      do,
      dlse,
    )
  )
  first = jax.tree.map(np.asarray, f(q, k, v))
  for _ in range(50):
    jax.tree.map(np.testing.assert_array_equal, first, f(q, k, v))


def test_more_scores_and_elements_than_int32_counts():
  """What runs here has 2**32 scores, seen through a window; the shapes of
  what is only lowered have 2**32 elements a tensor, and gradients."""
  t, tail = 2**16, 600
  q, k, v, _, _ = inputs(1, t, t, 1, 1, 2)
  f = functools.partial(attention, window=(100, 0), return_lse=True)
  o, lse = jax.jit(f)(q, k, v)
  want = f(*(x[:, -tail:] for x in (q, k, v)))
  at = slice(-tail + 100, None)
  np.testing.assert_allclose(o[:, at], want[0][:, at], atol=1e-5)
  np.testing.assert_allclose(lse[..., at], want[1][..., at], atol=1e-5)

  long = jax.ShapeDtypeStruct((2, 2**20, 16, 128), jnp.bfloat16)
  assert np.prod(long.shape, dtype=np.int64) == 2**32

  def gradients(q, k, v, mask):
    def loss(*x):
      return attention(*x, mask=mask, causal=True).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  blocks = 2**20 // 128
  lists = Lists(
    *(
      jax.ShapeDtypeStruct(shape, jnp.int32)
      for shape in ((2, 16, blocks), (2, 16, blocks, 64))
    ),
    None,
    None,
    (128, 128),
  )
  for mask in (None, BlockMask(lists=lists, lengths=(2**20, 2**20))):
    lowered = jax.jit(gradients).lower(long, long, long, mask)
    shapes = [x.shape for x in jax.tree.leaves(lowered.out_info)]
    assert shapes == [long.shape] * 3
