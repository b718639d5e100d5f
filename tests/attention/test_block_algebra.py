"""Intersections and unions of block masks against those of elements."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.block_algebra import intersection, union
from isthmus.attention.block_mask import BlockMask
from isthmus.pallas.flash.predicate import Band, Segments
from tests.attention.masks import (
  BLOCKS,
  MASKS,
  S,
  T,
  from_blocks,
  same,
  sentence,
  spread,
)

pytestmark = pytest.mark.once


@jax.jit
def _combine(a, b):
  return intersection(a, b), union(a, b)


PAIRS = [
  ("causal", "window", (8, 8)),
  ("causal", "segments", (4, 16)),
  ("full", "strided", (8, 8)),
  ("prefix of each row", "segments", (8, 8)),
  ("block diagonal", "strided", (16, 4)),
]


@pytest.mark.parametrize("first,second,block", PAIRS)
def test_intersections_and_unions(first, second, block):
  """Also of blocks of two sizes."""
  x, y = sentence(first), sentence(second)
  a, b = MASKS[first][0]((8, 8)), MASKS[second][0](block)
  both, either = _combine(a, b)
  same(both, x & y)
  same(either, x | y)
  smaller = (min(8, block[0]), min(8, block[1]))
  assert both.lists.block == either.lists.block == smaller
  assert both.exact and either.exact


def test_operands_of_both_are_taken_once():
  mask = MASKS["segments"][0]((8, 8))
  for one in (mask & mask, mask | mask):
    assert one.predicate == Segments() and len(one.q) == len(one.k) == 1
    same(one, sentence("segments"))


def test_algebra_with_block_lists():
  expected = spread(BLOCKS)
  mask, causal = from_blocks(), MASKS["causal"][0]((8, 8))
  seen = sentence("causal")
  for both in (mask & causal, causal & mask):
    same(both, expected & seen)
    assert both.predicate == Band(None, 0, S - T) and not both.exact
  segments = MASKS["segments"][0]((8, 8))
  same(
    jax.jit(lambda *x: x[0] & x[1] & x[2])(mask, segments, causal),
    expected & seen & sentence("segments"),
  )
  flipped = BlockMask.from_blocks(
    jnp.asarray(~BLOCKS), block=(8, 8), q_length=T, kv_length=S, causal=True
  )
  same(from_blocks(causal=True) | flipped, np.broadcast_to(seen, (2, 2, T, S)))
  same(mask | MASKS["full"][0]((8, 8)), np.ones((2, 2, T, S), bool))


def test_a_union_that_no_predicate_expresses_is_refused():
  with pytest.raises(NotImplementedError, match="block lists under None with"):
    _ = from_blocks() | MASKS["causal"][0]((8, 8))


def test_refusals_name_both_numbers():
  blocks = jnp.ones((1, 2, 3, 4), bool)
  a = BlockMask.from_blocks(blocks, block=(8, 8))
  with pytest.raises(ValueError, match=r"\(24, 32\) and \(32, 32\)"):
    _ = a & BlockMask.causal(32)
  with pytest.raises(ValueError, match=r"blocks of \(8, 8\) don't fit \(8, 12"):
    _ = a & BlockMask.full(24, 32, block=(8, 12))
  with pytest.raises(ValueError, match="masks of heads 2 and 3"):
    _ = a | BlockMask.from_blocks(jnp.ones((1, 3, 3, 4), bool), block=(8, 8))
  for combine in (operator.and_, operator.or_):
    with pytest.raises(TypeError, match="'BlockMask' and 'int'"):
      combine(a, 3)
