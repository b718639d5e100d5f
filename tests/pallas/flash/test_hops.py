"""The blocks of a walk: cut, turned back, and which meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.hops import hops
from isthmus.pallas.flash.lists import listed
from isthmus.pallas.flash.predicate import Band, Positions


def walk_of(t, s, n=4, k=2, chunk=(4, 8), extras=None, predicate=None):
  q, key = jnp.ones((2, t, n, 3)), jnp.ones((2, s, k, 3))
  options = Options(predicate=predicate)
  return hops(options, extras or Extras(), q, key, key, chunk)


@pytest.mark.parametrize("t", [3, 4, 9])
def test_queries_and_rows_come_back(t):
  walk = walk_of(t, 5)
  x = jax.random.normal(jax.random.key(0), (2, t, 4, 3))
  np.testing.assert_array_equal(walk.time_first(walk.queries(x)), x)
  x = jnp.swapaxes(x[..., 0], 1, 2)
  np.testing.assert_array_equal(walk.rows(walk.split(x)), x)


def met(walk, s):
  """[q b k l s]: how often each query block meets each key."""
  count = []
  for i in range(walk.blocks.index.size):
    here = jax.tree.map(lambda x, i=i: x[i], walk.blocks)
    total = walk.zeros(jnp.ones((2, s, 2, 1)), jnp.float32)

    def step(total, hop):
      ones = jnp.ones((*hop.k.shape[:-1], 1))
      if hop.mask is not None:
        seen = hop.mask.any(3)
        ones = jnp.broadcast_to(seen[..., None], ones.shape) * ones
      return hop.add(total, ones)

    total = walk.loop(step, total, here)
    count.append(walk.keys_back(total, jnp.ones(1))[..., 0])
  return np.asarray(jnp.stack(count))


@pytest.mark.parametrize("s", [5, 8, 21])
def test_every_key_is_met_once_without_a_mask(s):
  assert (met(walk_of(9, s), s) == 1).all()


def test_a_band_meets_what_it_shows():
  count = met(walk_of(9, 21, predicate=Band(3, 0)), 21)
  want = np.zeros((3, 21))
  for i in range(9):
    want[i // 4, max(i - 3, 0) : i + 1] = 1
  np.testing.assert_array_equal(
    count, np.broadcast_to(want[:, None, :, None], count.shape)
  )


def test_positions_leave_out_what_no_row_sees():
  """Rows share their chunks: one that only one row sees is met by both."""
  q = jnp.zeros((2, 1, 8), jnp.int32).at[1].set(100)
  k = jnp.arange(32, dtype=jnp.int32)[None, None] * 10
  extras = Extras(q=(q,), k=(k,))
  walk = walk_of(8, 32, extras=extras, predicate=Positions(0, 0))
  assert walk.blocks.partial_num.tolist() == [2, 2]
  assert walk.blocks.partial[:, :2].tolist() == [[0, 1]] * 2
  assert walk.blocks.full_num.tolist() == [0, 0]


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_lists_meet_what_they_name(lead):
  draw = np.random.default_rng(0).random((*lead, 3, 6)) < 0.5
  extras = Extras(lists=listed(jnp.asarray(draw), block=(4, 4)))
  walk = walk_of(10, 22, extras=extras)
  assert walk.times == 2
  count = met(walk, 22)
  seen = np.broadcast_to(draw, (2, 4, 3, 6)).repeat(4, axis=3)[..., :22]
  # Lanes are summed: heads of a group that have lists of their own.
  want = seen.reshape(2, 2, 2, 3, 22)
  want = want.sum(2) if lead[1] == 4 else want[:, :, 0]
  np.testing.assert_array_equal(count, want.transpose(2, 0, 3, 1))
