"""Blocks and what may be chosen, against loops over tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.layout import mark_lost, packed, uniform
from tests.pallas.moba.sets import blocks, runs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("t, s", [(9, 9), (4, 11), (11, 4), (1, 8)])
def test_uniform_blocks(t, s):
  layout = uniform(t, s, block=3)
  where = blocks([(0, s)], 3)
  assert layout.start.tolist() == [[i for i, _, _ in where]]
  assert layout.stop.tolist() == [[j for _, j, _ in where]]
  for i in range(t):
    p = i + s - t
    own = [j for j, (start, stop, _) in enumerate(where) if start <= p < stop]
    assert layout.own[0, i] == (own[0] if own else -1)
    past = [j for j, (_, stop, _) in enumerate(where) if stop <= p - p % 3]
    first, last = int(layout.first[0, i]), int(layout.last[0, i])
    assert list(range(first, last)) == past
    assert layout.at[0, i] == p


def test_positions_past_both_ends():
  places = jnp.array([[-4, -1, 0, 7, 8, 9, 2**31 - 1]], jnp.int32)
  layout = uniform(7, 8, block=3, positions=places)
  assert layout.own.tolist() == [[-1, -1, 0, 2, 2, -1, -1]]
  assert layout.last.tolist() == [[0, 0, 0, 2, 2, 3, 3]]


def test_without_causality_every_block_may_be_chosen():
  layout = uniform(2, 7, block=3, causal=False)
  assert layout.own.tolist() == [[-1, -1]]
  assert layout.first.tolist() == [[0, 0]] and layout.last.tolist() == [[3, 3]]
  assert (layout.at >= 6).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bound", [None, 6, 50])
@pytest.mark.parametrize("block", [1, 3, 4, 40])
def test_packed_blocks(block, bound, causal):
  ids = np.array(
    [[5] * 7 + [2] * 1 + [5] * 9 + [6] * 8, list(range(6)) + [3] * 19]
  )
  ids[1, 5] = 3  # six runs, the fourth of which comes back
  layout = packed(
    jnp.asarray(ids, jnp.int32), block=block, max_segments=bound, causal=causal
  )
  m = min(bound or 25, 25)
  assert layout.start.shape == (2, (25 - m) // block + m)
  assert not layout.lost.any()
  for row in range(2):
    segments = runs(ids[row])
    where = blocks(segments, block)
    real = layout.stop[row] > layout.start[row]
    assert int(real.sum()) == len(where) and real[: len(where)].all()
    found = zip(
      layout.start[row].tolist(), layout.stop[row].tolist(), strict=True
    )
    assert list(found)[: len(where)] == [x[:2] for x in where]
    for i in range(25):
      (number,) = (x for x, (a, z) in enumerate(segments) if a <= i < z)
      mine = [j for j, x in enumerate(where) if x[2] == number]
      (own,) = (j for j in mine if where[j][0] <= i < where[j][1])
      able = [j for j in mine if j < own] if causal else mine
      first, last = int(layout.first[row, i]), int(layout.last[row, i])
      assert list(range(first, last)) == able
      assert layout.own[row, i] == (own if causal else -1)
      assert layout.at[row, i] == i if causal else layout.at[row, i] >= 24


def test_what_is_past_the_bound_is_marked_and_chooses_nothing():
  ids = jnp.array([[1, 1, 2, 2, 3, 3], [1] * 6], jnp.int32)
  layout = packed(ids, block=2, max_segments=2)
  lost = np.array([[0, 0, 0, 0, 1, 1], [0] * 6], bool)
  np.testing.assert_array_equal(layout.lost, lost)
  assert (np.asarray(layout.own)[lost] == -1).all()
  assert (np.asarray(layout.last)[lost] == 0).all()
  assert layout.start.shape == (2, 4)
  o, lse = mark_lost(jnp.ones((2, 6, 1, 3)), jnp.ones((2, 1, 6)), layout)
  np.testing.assert_array_equal(np.isnan(o[:, :, 0, 1]), lost)
  np.testing.assert_array_equal(np.isnan(lse[:, 0]), lost)
