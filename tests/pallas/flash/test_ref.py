"""The reference under lists of blocks, and what it keeps for backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import Lists, compact
from isthmus.pallas.flash.predicate import Band, Positions
from isthmus.pallas.flash.ref import attend, may_miss
from tests.attention.oracle import oracle, vjp, wide_vjp


def inputs(b, t, s, n, k, d, seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  shapes = [(b, t, n, d), (b, s, k, d), (b, s, k, d), (b, t, n, d), (b, n, t)]
  return [
    jax.random.normal(key, x) for key, x in zip(keys, shapes, strict=True)
  ]


def blocks(b, n, t, s, block, seed=0):
  """Random blocks, full and partial, and the elements that they cover."""
  rng = np.random.default_rng(seed)
  shape = (b, n, -(-t // block[0]), -(-s // block[1]))
  draw = rng.integers(0, 3, shape)
  full, partial = draw == 1, draw == 2

  def expand(x):
    x = x.repeat(block[0], axis=2).repeat(block[1], axis=3)
    return x[:, :, :t, :s]

  lists = Lists(
    *compact(jnp.asarray(full)), *compact(jnp.asarray(partial)), block
  )
  return lists, expand(full), expand(partial)


@pytest.mark.parametrize("shared", [False, True])
def test_lists_and_a_predicate_in_partial_blocks(shared):
  b, t, s, n, k = 2, 11, 14, 4, 2
  q, key, v, do, dlse = inputs(b, t, s, n, k, 8)
  lead = (1, 1) if shared else (b, n)
  lists, full, partial = blocks(*lead, t, s, (4, 3))
  band = Band(None, 0, offset=s - t)
  seen = np.tri(t, s, s - t, dtype=bool)
  mask = np.broadcast_to(full | partial & seen, (b, n, t, s))
  assert (full & ~seen).any() and (partial & ~seen).any()

  def ours(q, k, v):
    options = Options(scale=8**-0.5, predicate=band)
    return attend(q, k, v, Extras(lists=lists), options=options)

  got = vjp(ours, (q, key, v), do, dlse)
  want = wide_vjp(lambda *x: oracle(*x, mask), (q, key, v), do, dlse)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("which", ["full", "partial"])
def test_rows_that_overflow_are_nan_and_no_others(which):
  q, k, v, do, dlse = inputs(1, 8, 8, 2, 1, 4)
  lists, _, _ = blocks(1, 2, 8, 8, (4, 4))
  name = f"{which}_num"
  capacity = getattr(lists, which).shape[-1]
  num = getattr(lists, name).at[0, 1, 0].set(capacity + 1)
  lists = Lists(**{**vars(lists), name: num})

  def ours(q, k, v):
    return attend(q, k, v, Extras(lists=lists), options=Options())

  (o, lse), gradients = vjp(ours, (q, k, v), do, dlse)
  lost = np.zeros((2, 8), bool)
  lost[1, :4] = True
  np.testing.assert_array_equal(np.isnan(lse[0]), lost)
  np.testing.assert_array_equal(np.isnan(o[0]).all(-1), lost.T)
  np.testing.assert_array_equal(np.isnan(o[0]).any(-1), lost.T)
  np.testing.assert_array_equal(np.isnan(gradients[0][0]).any(-1), lost.T)
  assert all(np.isnan(x).any() for x in gradients)


def test_nothing_of_size_ts_is_kept_for_the_backward_pass():
  q, k, v, _, _ = inputs(1, 64, 64, 2, 2, 8)
  causal = functools.partial(
    attend, extras=Extras(), options=Options(predicate=Band(None, 0))
  )
  _, pull = jax.vjp(lambda *x: causal(*x), q, k, v)
  sizes = [x.size for x in jax.tree.leaves(pull)]
  assert sizes and max(sizes) < 64 * 64


def test_may_miss_equals_a_look_at_the_mask():
  widths = (None, 0, 1, 3)
  for t, s, left, right, offset in np.ndindex(4, 4, 4, 4, 5):
    t, s, offset = t + 1, s + 1, offset - 2
    band = Band(widths[left], widths[right], offset)
    mask = band(np.arange(t)[:, None], np.arange(s), (), ())
    mask = np.asarray(mask)
    missed = not (mask.any(0).all() and mask.any(1).all())
    said = may_miss(Options(predicate=band), Extras(), t, s)
    assert said == missed, (t, s, band)
  assert may_miss(Options(predicate=Positions(None, 0)), Extras(), 4, 4)
  assert not may_miss(Options(), Extras(), 4, 4)
