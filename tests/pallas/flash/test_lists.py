"""Lists of blocks against loops over the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.flash.lists import (
  Lists,
  compact,
  dropped,
  listed,
  overflowed,
  to_blocks,
  transpose,
)

pytestmark = pytest.mark.once


def _blocks(shape, seed=0, share=0.5):
  """Bool blocks, among them a row of none and a row of all."""
  blocks = np.random.default_rng(seed).random(shape) < share
  blocks[..., 0, :] = False
  blocks[..., -1, :] = True
  return blocks


def _columns(blocks):
  """The indices of each row, by loops."""
  return [
    [j for j, seen in enumerate(row) if seen]
    for row in blocks.reshape(-1, blocks.shape[-1])
  ]


@pytest.mark.parametrize("capacity", [None, 1, 3, 7, 40])
def test_compact(capacity):
  blocks = _blocks((2, 3, 5, 7))
  num, index = jax.jit(compact, static_argnums=1)(blocks, capacity)
  size = min(capacity or 7, 7)
  assert num.dtype == index.dtype == jnp.int32
  assert index.shape == (2, 3, 5, size)
  rows = zip(
    num.ravel().tolist(),
    index.reshape(-1, size).tolist(),
    _columns(blocks),
    strict=True,
  )
  for count, entries, wanted in rows:
    kept = wanted[:size]
    assert count == len(wanted)
    assert entries[: len(kept)] == kept
    # What pads a row is valid, and in its cache already.
    assert set(entries[len(kept) :]) <= {kept[-1] if kept else 0}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [31, 32, 33, 64, 97, 256, 1000])
def test_compact_of_long_rows(size, share):
  """Of one word and of many; words that are full, and ones that are empty."""
  blocks = np.random.default_rng(size).random((40, size)) < share
  blocks[1, : size // 2] = True
  num, index = jax.jit(compact)(blocks)
  for row, (count, entries) in enumerate(zip(num, index, strict=True)):
    wanted = np.flatnonzero(blocks[row])
    assert count == len(wanted)
    last = wanted[-1] if len(wanted) else 0
    padded = np.append(wanted, [last] * (size - len(wanted)))
    np.testing.assert_array_equal(entries, padded)


@pytest.mark.parametrize("kb", [1, 2, 3, 4, 5, 8, 13])
def test_lists_and_blocks_and_back(kb):
  blocks = _blocks((2, 1, 6, kb), seed=kb)
  full = blocks & (np.arange(kb) % 2 == 0)
  lists = listed(jnp.asarray(full), jnp.asarray(blocks & ~full), block=(8, 4))
  ours = jax.jit(to_blocks, static_argnums=1)(lists, kb)
  np.testing.assert_array_equal(ours[0], full)
  np.testing.assert_array_equal(ours[1], blocks & ~full)
  assert to_blocks(listed(jnp.asarray(full), block=(8, 4)), kb)[1] is None


def test_what_pads_a_row_is_ignored():
  """Whatever it holds; an entry counts by its place alone."""
  full = jnp.asarray([[[[0, 3, 0, 1], [2, 0, 0, 0]]]], jnp.int32)
  lists = Lists(jnp.asarray([[[2, 0]]], jnp.int32), full, None, None, (8, 8))
  np.testing.assert_array_equal(
    to_blocks(lists, 4)[0][0, 0], [[1, 0, 0, 1], [0, 0, 0, 0]]
  )


def test_transpose_equals_loops():
  blocks = _blocks((2, 3, 5, 7))
  full = blocks & (np.random.default_rng(1).random(blocks.shape) < 0.5)
  lists = listed(jnp.asarray(full), jnp.asarray(blocks & ~full), block=(8, 4))
  turned = transpose(lists, 7)
  assert turned.block == (4, 8)
  for num, index, wanted in (
    (turned.full_num, turned.full, full),
    (turned.partial_num, turned.partial, blocks & ~full),
  ):
    assert index.shape == (2, 3, 7, 5)
    columns = _columns(wanted.swapaxes(-1, -2))
    entries = zip(
      num.ravel().tolist(), index.reshape(-1, 5).tolist(), strict=True
    )
    assert [row[:count] for count, row in entries] == columns
  twice = to_blocks(transpose(turned, 5), 7)
  np.testing.assert_array_equal(twice[0], full)
  assert transpose(listed(jnp.asarray(full), block=(8, 4)), 7).partial is None


def test_rows_over_capacity_are_marked_and_keep_their_first():
  blocks = _blocks((1, 2, 5, 7))
  lists = listed(
    jnp.asarray(blocks), jnp.asarray(~blocks), block=(8, 4), capacity=(3, 5)
  )
  count = blocks.sum(-1)
  lost = np.maximum(count - 3, 0) + np.maximum(7 - count - 5, 0)
  np.testing.assert_array_equal(dropped(lists), lost)
  np.testing.assert_array_equal(overflowed(lists), lost > 0)
  assert (lost > 0).any() and (lost == 0).any()
  kept = blocks & (blocks.cumsum(-1) <= 3)
  np.testing.assert_array_equal(to_blocks(lists, 7)[0], kept)
  # Every key block is told of the rows that are NaN.
  full, partial = to_blocks(transpose(lists, 7), 5)
  rows = (lost > 0)[..., None, :]
  np.testing.assert_array_equal(full, kept.swapaxes(-1, -2) | rows)
  assert not (partial & (full | rows)).any()
  assert not overflowed(transpose(lists, 7)).any()


def test_rows_that_lost_blocks_before_stay_marked():
  blocks, lost = jnp.zeros((1, 1, 2, 4), bool), jnp.asarray([[[0, 3]]])
  lists = listed(blocks, block=(8, 8), capacity=2, lost=lost)
  assert dropped(lists).tolist() == [[[0, 3]]]
  assert not to_blocks(listed(blocks, block=(8, 8)), 4)[0].any()


def test_vmap_equals_rows_by_themselves():
  blocks = jnp.asarray(_blocks((4, 1, 2, 5, 7)))

  def both(x):
    lists = listed(x, ~x, block=(8, 4), capacity=4)
    return transpose(lists, 7), overflowed(lists)

  ours = jax.vmap(both)(blocks)
  for row in range(4):
    alone = jax.tree.map(lambda x, row=row: x[row], ours)
    jax.tree.map(np.testing.assert_array_equal, alone, both(blocks[row]))
