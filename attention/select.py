"""Attention over chosen blocks, and plain ways to choose them.

PBS-Attn and ProxyAttn stand beside these. A selector takes queries and keys of
causal self-attention and gives a `BlockMask`. But for the window, a choice for
early queries may look at later ones of their block: they are for the prefill
of models that exist, not for training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.keep import (
  causal_mask,
  keep_count,
  keep_mass,
  keep_sum,
)
from isthmus.attention.pooling import block_scores, pool_blocks, tile_softmax
from isthmus.attention.sdpa import attention, check_shapes


def select_attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  select: Callable[..., BlockMask],
  causal: bool = True,
  scale: float | None = None,
  return_lse: bool = False,
  impl: Any = None,
  **others: Any,
) -> Any:
  """Attention over the blocks that a selector keeps, as a layer's mechanism.

  `functools.partial(select_attention, select=...)` is an `attend` of
  `isthmus.attention.Attention`, or of a whole decoder.

  Args:
    q, k, v: of causal self-attention; t == s.
    select: gives a `BlockMask` for (q, k), such as
      `functools.partial(pooled_select, threshold=0.95)`.
    causal: has to be True.
    scale, return_lse, impl: as in `attention`.
    **others: of a layer; those that are set are refused.

  Returns:
    As `attention`.

  Raises:
    ValueError: what no selector takes, by name.

  Example:
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> select = lambda q, k: pooled_select(q, k, block=8, threshold=1)
    >>> o = select_attention(q, k, v, select=select)
    >>> bool(jnp.allclose(o, attention(q, k, v, causal=True), atol=1e-5))
    True
  """
  check_own(causal, others)
  # A choice has no gradient, and its kernels have none to offer.
  mask = select(*jax.lax.stop_gradient((q, k)))
  return attention(
    q, k, v, mask=mask, scale=scale, return_lse=return_lse, impl=impl
  )


def check_own(causal: bool, others: dict[str, Any]) -> None:
  """Raises ValueError for settings that a choice of blocks doesn't take.

  Args:
    causal: of the call.
    others: arguments that `attention` takes and a choice doesn't.

  Example:
    >>> check_own(True, {"window": 3})
    Traceback (most recent call last):
    ValueError: a choice of blocks takes no window; it is 3
  """
  if not causal:
    raise ValueError("a choice of blocks is causal; causal is False")
  for name, x in others.items():
    if name.endswith("positions") and x is not None:
      raise ValueError(
        f"a choice of blocks is of a row's own keys, not of a cache's; {name}"
        " are given"
      )
    if x is not None:
      raise ValueError(f"a choice of blocks takes no {name}; it is {x}")


def pooled_select(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  block: int = 128,
  threshold: float | None = 0.9,
  top_k: int | None = None,
  sink: bool = True,
  scale: float | None = None,
) -> BlockMask:
  """Blocks by the products of mean queries and mean keys.

  Of the blocks before its own a query block keeps the fewest with `threshold`
  of their softmax's mass, or the `top_k - 1` best; and its own.

  Args:
    q, k: t == s.
    block: tokens of a block.
    threshold: in (0, 1], or None.
    top_k: blocks, the own one among them; then `threshold` is None.
    sink: whether each keeps the first block too.
    scale: of the logits, default d ** -0.5.

  Raises:
    ValueError: lengths that differ; both of `threshold` and `top_k`, or none.

  Example:
    >>> q = k = jnp.ones((1, 64, 2, 8))
    >>> mask = pooled_select(q, k, block=8, threshold=None, top_k=2, sink=False)
    >>> print(mask.density)
    0.234375
  """
  t = _length(q, k)
  if (threshold is None) == (top_k is None):
    raise ValueError(
      f"threshold is {threshold} and top_k {top_k}; one of them is wanted"
    )
  scale = q.shape[3] ** -0.5 if scale is None else scale
  score = block_scores(pool_blocks(q, block), pool_blocks(k, block), scale)
  own = np.arange(score.shape[-1], dtype=np.int32)
  forced = np.asarray(0 if sink else -1, np.int32)
  if threshold is not None:
    kept = keep_mass(score, threshold, own, forced=forced)
  else:
    assert top_k is not None
    # Positive, in the same order: bits are compared.
    least = jnp.min(score, axis=-1, keepdims=True)
    count = np.asarray(top_k - 1, np.int32)
    kept = keep_count(score - least, count, own, forced=forced)
  return causal_mask(*kept, block=block, length=t)


def window_select(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  window: int,
  sink: int = 128,
  block: int = 128,
) -> BlockMask:
  """The blocks of the last `window` keys, and of the first `sink` ones.

  Args:
    q, k: t == s; nothing but their lengths matters.
    window: keys before the first query of a block.
    sink: keys at the start.
    block: tokens of a block.

  Raises:
    ValueError: lengths that differ.

  Example:
    >>> q = k = jnp.ones((1, 8, 1, 4))
    >>> mask = window_select(q, k, window=1, sink=2, block=2)
    >>> print(mask.to_dense()[0, 0, -1].astype(int))
    [1 1 0 0 1 1 1 1]
  """
  t = _length(q, k)
  index = jnp.arange(-(-t // block), dtype=jnp.int32)
  kept = index >= (index[:, None] * block - window) // block
  kept = kept | (index * block < sink) | (index == index[:, None])
  size = (block, block)
  return BlockMask.from_blocks(
    kept[None, None], block=size, causal=True, q_length=t, kv_length=t
  )


def antidiagonal_select(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  block: int = 128,
  stride: int = 8,
  threshold: float = 0.9,
  sink: bool = True,
  scale: float | None = None,
) -> BlockMask:
  """Blocks by sums along antidiagonals, the scores of XAttention.

  The mean of `x_ij` over the antidiagonal of each `stride` by `stride` square,
  i + j = stride - 1 in it, takes the place of the square in a causal softmax;
  a block's score is the sum of its squares' probabilities. Kept are the fewest
  blocks with `threshold` of a query block's sum, and its own.

  Args:
    q, k: t == s.
    block: tokens of a block.
    stride: of squares; divides `block`.
    threshold: in (0, 1]; 1 keeps everything.
    sink: whether each keeps the first block too.
    scale: of the logits, default d ** -0.5.

  Raises:
    ValueError: lengths that differ, a stride that doesn't divide the block.

  Example:
    >>> q = k = jnp.ones((1, 64, 2, 8))
    >>> antidiagonal_select(q, k, block=16, threshold=1).density.item()
    0.625

  Reference: XAttention, https://arxiv.org/abs/2503.16428.
  """
  t = _length(q, k)
  if stride < 1 or block % stride:
    raise ValueError(f"the stride, {stride}, doesn't divide the block, {block}")
  if not 0 < threshold <= 1:
    raise ValueError(f"the threshold is {threshold}, not in (0, 1]")
  (b, _, n, d), heads = q.shape, k.shape[2]
  scale = d**-0.5 if scale is None else scale
  ends = ((0, 0), (0, -t % stride), (0, 0), (0, 0))

  def squares(x, heads):
    x = jnp.pad(x, ends).reshape(b, -1, stride, heads, d)
    return jnp.moveaxis(x, 2, 3)

  q = squares(q, n).reshape(b, -1, n, stride * d)
  k = jnp.flip(squares(k, heads), axis=3).reshape(b, -1, heads, stride * d)
  score = tile_softmax(
    q, k, side=block // stride, reduce="sum", scale=scale / stride
  )
  own = np.arange(score.shape[-1], dtype=np.int32)
  target = jnp.float32(jnp.inf)
  if threshold < 1:
    target = threshold * jnp.sum(score, axis=-1)
  forced = np.asarray(0 if sink else -1, np.int32)
  kept = keep_sum(score, target, own + 1, ends=own, forced=forced)
  return causal_mask(*kept, block=block, length=t)


def _length(q, k) -> int:
  """t, of as many keys."""
  check_shapes(q, k, k)
  t, s = q.shape[1], k.shape[1]
  if t != s:
    raise ValueError(f"{t} queries and {s} keys; there must be as many")
  return t
