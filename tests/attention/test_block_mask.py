"""Block masks against loops over elements, alone and within `attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention
from isthmus.attention.block_mask import BlockMask
from isthmus.pallas.flash.lists import to_blocks
from isthmus.pallas.flash.predicate import Segments
from tests.attention.masks import (
  BLOCKS,
  IDS,
  MASKS,
  S,
  T,
  from_blocks,
  same,
  sentence,
  spread,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", MASKS)
def test_constructors(name):
  expected = sentence(name)
  assert expected.any()
  block = (4, 8)
  mask = MASKS[name][0](block)
  assert mask.lists.block == block and mask.lengths == (T, S)
  same(mask, expected)
  full = to_blocks(mask.lists, -(-S // block[1]))[0]
  assert (expected | ~spread(np.asarray(full), block)).all()


@pytest.mark.parametrize("causal", [False, True])
def test_from_blocks(causal):
  expected = spread(BLOCKS)
  if causal:
    expected = expected & sentence("causal")
  mask = jax.jit(lambda: from_blocks(causal=causal))()
  same(mask, expected)
  assert (mask.lists.partial is not None) == causal


def test_lists_are_as_short_as_the_mask_allows():
  """A window's don't grow with the length."""
  mask = BlockMask.window((256, 0), 128 * 50)
  assert mask.lists.full.shape == mask.lists.partial.shape == (1, 1, 50, 4)
  assert mask.dropped == 0
  assert BlockMask.causal(1280).lists.partial.shape == (1, 1, 10, 2)


def test_rows_over_capacity_are_nan_and_counted():
  """In outputs and gradients; the other rows are as they were."""
  count = BLOCKS.sum(-1)
  assert (count > 2).any() and (count <= 2).any()
  mask, whole = from_blocks(capacity=2), from_blocks()
  assert mask.dropped == np.maximum(count - 2, 0).sum()
  assert mask.dropped.dtype == jnp.int32
  lost = np.repeat(count > 2, 8, axis=2)[..., :T]  # [b, n, t]
  q = jax.random.normal(jax.random.key(0), (2, T, 2, 8))
  k, v = jax.random.normal(jax.random.key(1), (2, 2, S, 2, 8))

  @jax.jit
  def run(mask):
    o, lse = attention(q, k, v, mask=mask, return_lse=True)
    call = lambda q, k, v: attention(q, k, v, mask=mask).sum()
    return o, lse, *jax.grad(call, (0, 1, 2))(q, k, v)

  (o, lse, dq, dk, dv), (o2, lse2, dq2, dk2, _) = run(mask), run(whole)
  np.testing.assert_array_equal(np.isnan(lse), lost)
  rows = lost.swapaxes(1, 2)
  for ours, theirs in ((o, o2), (dq, dq2)):
    assert np.isnan(ours[rows]).all() and np.isfinite(theirs).all()
    np.testing.assert_allclose(ours[~rows], theirs[~rows], atol=1e-6)
  np.testing.assert_allclose(lse[~lost], lse2[~lost], atol=1e-6)
  # A key lacks what the NaN rows would add, whichever they dropped.
  keys = np.broadcast_to(lost.any(-1)[:, None, :, None], dk.shape)
  for ours in (dk, dv):
    np.testing.assert_array_equal(np.isnan(ours), keys)
  assert np.isfinite(dk2).all() and not keys.all()
  # What is made of the mask stays marked.
  causal = MASKS["causal"][0]((4, 4))
  assert (mask & causal).dropped > 0 and (mask | mask).dropped > 0


def test_attention_with_a_mask_and_conditions():
  q = jax.random.normal(jax.random.key(0), (2, T, 2, 8))
  k, v = jax.random.normal(jax.random.key(1), (2, 2, S, 1, 8))
  mask = from_blocks() & MASKS["window"][0]((8, 8))
  seen = spread(BLOCKS) & sentence("window") & sentence("causal")
  call = functools.partial(attention, causal=True, return_lse=True, impl="xla")
  o, lse = jax.jit(call)(q, k, v, mask=mask)
  x = jnp.einsum("btnd,bsd->bnts", q, k[:, :, 0]) * 8**-0.5
  expected = jax.nn.logsumexp(jnp.where(seen, x, -jnp.inf), axis=-1)
  np.testing.assert_allclose(lse, expected, atol=1e-5)
  p = jnp.where(
    seen, jnp.exp(x - jnp.where(seen.any(-1), expected, 0)[..., None]), 0
  )
  np.testing.assert_allclose(
    o, jnp.einsum("bnts,bsd->btnd", p, v[:, :, 0]), atol=1e-5
  )


def test_new_lists_of_one_capacity_are_not_traced_again():
  traces = []

  @jax.jit
  def run(blocks, ids):
    traces.append(1)
    mask = BlockMask.from_blocks(blocks, block=(8, 8), capacity=2, causal=True)
    return mask & BlockMask.segments(ids, block=(8, 8))

  @jax.jit
  def density(mask):
    traces.append(2)
    return mask.density

  ids = jnp.zeros((2, 32), jnp.int32)
  for seed in range(3):
    blocks = np.random.default_rng(seed).random((2, 1, 4, 4)) < 0.3
    mask = run(jnp.asarray(blocks), ids + seed)
    density(mask)
  assert traces == [1, 2]
  assert mask.predicate.b == Segments() and mask.lists.block == (8, 8)


def test_vmap_over_the_batch():
  """A mask of a batch, mapped, is that of each row."""
  q = jax.random.normal(jax.random.key(0), (2, 1, T, 2, 8))
  k, v = jax.random.normal(jax.random.key(1), (2, 2, 1, S, 2, 8))

  def run(blocks, ids, q, k, v):
    mask = BlockMask.from_blocks(
      blocks, block=(8, 8), q_length=T, kv_length=S, capacity=3
    )
    return attention(
      q,
      k,
      v,
      mask=mask & BlockMask.segments(ids[:, -T:], ids, block=(8, 8)),
      impl="xla",
    )

  args = jnp.asarray(BLOCKS)[:, None], IDS[:, None], q, k, v
  ours = jax.jit(jax.vmap(run))(*args)
  for row in range(2):
    alone = jax.jit(run)(*(x[row] for x in args))
    np.testing.assert_allclose(ours[row], alone, atol=1e-6)


def test_nothing_grows_with_elements():
  t = 16384

  def build(blocks, ids):
    mask = BlockMask.from_blocks(blocks, causal=True, capacity=16)
    return mask & BlockMask.segments(ids)

  args = (
    jax.ShapeDtypeStruct((1, 1, 128, 128), bool),
    jax.ShapeDtypeStruct((1, t), jnp.int32),
  )
  memory = jax.jit(build).lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < t * t // 100


def test_density():
  assert BlockMask.causal(32, block=(8, 8)).density == 10 / 16
  assert from_blocks().density == np.float32(BLOCKS.mean())
  assert BlockMask.strided(4, 64, block=(8, 8)).density == 1


def test_repr_is_short_also_of_traced_masks():
  said = []

  def build(blocks):
    said.append(repr(BlockMask.from_blocks(blocks, block=(8, 16), capacity=2)))

  jax.eval_shape(build, jax.ShapeDtypeStruct((2, 4, 3, 5), bool))
  assert said == [
    "BlockMask(24 queries, 80 keys, blocks 8 x 16, batch 2, heads 4, capacity "
    "2 + 0, None)"
  ]


def test_refusals_name_both_numbers():
  blocks = jnp.ones((1, 2, 3, 4), bool)
  for settings, message in (
    ({"q_length": 16}, "16 queries are 2 blocks of 8, and 3 are given"),
    ({"kv_length": 33}, "33 keys are 5 blocks of 8, and 4 are given"),
    ({"capacity": 0}, "capacity is 0"),
    ({"block": (8, 0)}, r"block is \(8, 0\)"),
  ):
    with pytest.raises(ValueError, match=message):
      BlockMask.from_blocks(blocks, **{"block": (8, 8), **settings})
  with pytest.raises(ValueError, match="size 0"):
    BlockMask.block_diagonal(0, 8)
  with pytest.raises(ValueError, match="a stride of 4 has no width 5"):
    BlockMask.strided(4, 8, width=5)
