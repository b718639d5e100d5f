"""Block masks of every kind, and what each is by loops over elements."""

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention.block_mask import BlockMask

T, S = 21, 26
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, S))))
IDS = IDS.astype(jnp.int32)
PREFIX = jnp.asarray([3, 12], jnp.int32)
BLOCKS = np.random.default_rng(1).random((2, 2, 3, 4)) < 0.5
# A mask in blocks of a size, and its sentence on positions p, j of a row.
MASKS = {
  "full": (
    lambda block: BlockMask.full(T, S, block=block),
    lambda row, p, j: True,
  ),
  "causal": (
    lambda block: BlockMask.causal(T, S, block=block),
    lambda row, p, j: j <= p,
  ),
  "window": (
    lambda block: BlockMask.window((5, 2), T, S, block=block),
    lambda row, p, j: p - 5 <= j <= p + 2,
  ),
  "window to one side": (
    lambda block: BlockMask.window((None, 3), T, S, block=block),
    lambda row, p, j: j <= p + 3,
  ),
  "segments": (
    lambda block: BlockMask.segments(IDS[:, -T:], IDS, block=block),
    lambda row, p, j: IDS[row, p] == IDS[row, j],
  ),
  "prefix": (
    lambda block: BlockMask.prefix(7, T, S, block=block),
    lambda row, p, j: j <= p or j < 7,
  ),
  "prefix of each row": (
    lambda block: BlockMask.prefix(PREFIX, T, S, block=block),
    lambda row, p, j: j <= p or j < PREFIX[row],
  ),
  "block diagonal": (
    lambda block: BlockMask.block_diagonal(6, T, S, block=block),
    lambda row, p, j: p // 6 == j // 6,
  ),
  "strided": (
    lambda block: BlockMask.strided(9, T, S, width=2, block=block),
    lambda row, p, j: (p - j) % 9 < 2,
  ),
}


def sentence(name):
  """bool [b, 1, T, S] by loops; the last query stands at the last key."""
  seen = MASKS[name][1]
  rows = 2 if name in ("segments", "prefix of each row") else 1
  mask = np.zeros((rows, 1, T, S), bool)
  for row, _, i, j in np.ndindex(mask.shape):
    mask[row, 0, i, j] = seen(row, i + S - T, j)
  return mask


def from_blocks(**kwargs):
  blocks = jnp.asarray(BLOCKS)
  lengths = {"q_length": T, "kv_length": S}
  return BlockMask.from_blocks(blocks, block=(8, 8), **lengths, **kwargs)


def spread(blocks, block=(8, 8)):
  blocks = np.repeat(np.repeat(blocks, block[0], axis=2), block[1], axis=3)
  return blocks[..., :T, :S]


_dense = jax.jit(BlockMask.to_dense)


def same(mask, expected):
  ours = _dense(mask)
  np.testing.assert_array_equal(ours, np.broadcast_to(expected, ours.shape))
  assert ours.shape == (*np.shape(expected)[:2], T, S)
  assert mask.dropped == 0
