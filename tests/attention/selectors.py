"""What every selector has to do; each one's test calls `check`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.attention import BlockMask
from isthmus.attention import attention as plain_attention
from tests.attention.oracle import inputs
from tests.jitted import jitted

attention = jitted(plain_attention)
to_dense = jitted(BlockMask.to_dense)

#: (b, t, n, k, d): odd lengths, groups, a row shorter than a block.
SHAPES = ((2, 203, 4, 2, 16), (1, 128, 3, 3, 8), (1, 5, 2, 1, 8))
BLOCK = 16


def blocks_of(mask: BlockMask) -> np.ndarray:
  """Bool [b, n, blocks, blocks], those of which some key is seen."""
  dense = np.asarray(to_dense(mask))
  b, n, t, s = dense.shape
  ends = [(0, 0), (0, 0), (0, -t % BLOCK), (0, -s % BLOCK)]
  dense = np.pad(dense, ends)
  size = dense.shape[2] // BLOCK, dense.shape[3] // BLOCK
  return dense.reshape(b, n, size[0], BLOCK, size[1], BLOCK).any((3, 5))


def check(select, *, whole):
  """True: it is a selector of causal blocks; else an assertion fails.

  Args:
    select: `(q, k, **settings) -> BlockMask`, with blocks of `BLOCK` set.
    whole: settings with which it keeps everything.
  """
  for shape in SHAPES:
    _check(select, whole, shape)
  return True


def _check(select, whole, shape):
  b, t, n, k, d = shape
  q, key, v, *_ = inputs(b, t, t, n, k, d)
  # All that is kept is seen, causally: attention is dense.
  mask = jitted(select)(q, key, **whole)
  causal = np.tril(np.ones((t, t), bool))
  np.testing.assert_array_equal(
    np.broadcast_to(to_dense(mask), (b, n, t, t)),
    np.broadcast_to(causal, (b, n, t, t)),
  )
  np.testing.assert_allclose(
    attention(q, key, v, mask=mask),
    attention(q, key, v, causal=True),
    atol=2e-6,
  )
  # Each query sees itself, and nothing after itself; nothing was dropped.
  traces = []

  @jax.jit
  def f(q, k):
    traces.append(1)
    return select(q, k)

  mask = f(q, key)
  dense = np.broadcast_to(to_dense(mask), (b, n, t, t))
  assert np.einsum("bntt->bnt", dense).all()
  assert not (dense & ~causal).any()
  assert not np.asarray(mask.dropped).any()
  if t > 100:
    assert dense.sum() < np.broadcast_to(causal, dense.shape).sum()
  # The same again, without another trace.
  again = f(*(x + 0 for x in (q, key)))
  for x, y in zip(jax.tree.leaves(mask), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(x, y)
  assert len(traces) == 1


def no_square(select, t=2**14, block=128):
  """Whether nothing in the program is as large as t x t."""
  x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.bfloat16)
  f = functools.partial(select, block=block)
  memory = jax.jit(f).lower(x, x).compile().memory_analysis()
  return memory.temp_size_in_bytes < t * t / 2
