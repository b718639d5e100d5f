"""Block masks as elements and as a picture, against hand-made ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.block_picture import dense
from isthmus.pallas.flash.lists import listed
from isthmus.pallas.flash.predicate import Positions

pytestmark = pytest.mark.once


def test_dense_asks_the_predicate_in_partial_blocks_alone():
  """Operands by key are of kv heads: each serves two query heads."""
  full = jnp.asarray([[[[1, 0], [0, 0]]] * 4]).astype(bool)
  partial = jnp.asarray([[[[0, 1], [0, 1]]] * 4]).astype(bool)
  places = jnp.asarray([[[9, 9, 0, 5], [9, 9, 3, 9]]], jnp.int32)
  mask = BlockMask(
    listed(full, partial, block=(2, 2)),
    (jnp.asarray([[[0, 1, 2, 5]]], jnp.int32),),
    (places,),
    Positions(None, 0),
    (4, 4),
  )
  first = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
  second = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
  np.testing.assert_array_equal(dense(mask), [[first, first, second, second]])


def test_plot_shows_every_kind_of_block():
  plt = pytest.importorskip("matplotlib.pyplot")
  mask = BlockMask.from_blocks(
    jnp.asarray([[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]).astype(bool),
    block=(8, 8),
    capacity=1,
    causal=True,
  )
  ax = mask.plot()
  # Grey, white; blue and grey; the last row lost a block.
  assert ax.images[0].get_array().tolist() == [[1, 0, 0], [2, 1, 0], [3, 3, 3]]
  assert ax.images[0].get_extent() == [0, 24, 24, 0]
  other = plt.subplots()[1]
  assert mask.plot(ax=other) is other
  plt.close("all")
