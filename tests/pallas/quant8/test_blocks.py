"""Cutting into blocks and back, for any shape, axis and size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.blocks import Blocks

pytestmark = pytest.mark.once

CASES = [
  ((8, 512), 256, -1),
  ((8, 512), 4, -2),
  ((5, 300), 64, -1),
  ((300, 5), 64, -2),
  ((2, 3, 40), 16, -2),
  ((7,), 256, -1),
  ((5, 300), 64, None),
  ((), 64, None),
  ((0, 4), 64, -2),
]


@pytest.mark.parametrize("shape, size, axis", CASES)
def test_blocks_are_runs_of_numbers(shape, size, axis):
  blocks = Blocks(shape, size, axis)
  x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  parts = blocks.split(x)
  np.testing.assert_array_equal(blocks.merge(parts), x)
  got = parts.sum(axis=blocks.inner)
  assert got.shape == blocks.scales
  line = np.asarray(x).reshape(-1) if axis is None else np.asarray(x)
  at = 0 if axis is None else axis
  cuts = np.arange(size, line.shape[at], size)
  want = [p.sum(axis=at) for p in np.split(line, cuts, axis=at)]
  if x.size:
    np.testing.assert_array_equal(got, np.stack(want, axis=at))


def test_no_number_moves_between_rows():
  """Along an axis, whole rows cut off before are those cut off after."""
  x = jnp.arange(6 * 512.0).reshape(6, 512)
  whole = Blocks((6, 512), 256, -1).split(x)
  part = Blocks((2, 512), 256, -1).split(x[2:4])
  np.testing.assert_array_equal(whole[2:4], part)


@pytest.mark.parametrize(
  "size, axis, said",
  [
    (0, -1, "block is 0"),
    (96, -1, "block is 96; it is a power of two"),
    (64, 1, "axis is 1"),
    (64, -3, "axis is -3"),
  ],
)
def test_what_is_no_cut_is_refused(size, axis, said):
  with pytest.raises(ValueError, match=said):
    Blocks((4, 4), size, axis)


def test_batches_keep_their_axes():
  """Under vmap, an axis counted from the end is the same one."""
  x = jnp.arange(3 * 4 * 512.0).reshape(3, 4, 512)
  blocks = Blocks((4, 512), 128, -1)
  got = jax.vmap(blocks.split)(x)
  np.testing.assert_array_equal(got, Blocks(x.shape, 128, -1).split(x))
