"""PBS-Attn: keys are put in another order before their blocks are chosen.

Within segments of some blocks, keys that matter are brought together, so that
fewer blocks hold what is to be kept. Attention over the chosen blocks is exact:
each key keeps its position, which causality is told by.

A choice for early queries looks at the last ones: this is for the prefill of
models that exist, not for training.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.keep import keep_mass
from isthmus.attention.last import importance_and_means, last_importance
from isthmus.attention.pooling import block_scores, pool_blocks
from isthmus.attention.sdpa import attention, check_shapes
from isthmus.attention.select import check_own
from isthmus.pallas.flash.lists import Lists, compact
from isthmus.pallas.flash.plan import ranges
from isthmus.pallas.flash.predicate import Positions
from isthmus.pallas.pool.api import BLOCK


def key_order(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  block: int = 128,
  segment: int = 256,
  scale: float | None = None,
) -> Int32[Array, "b k s"]:
  """Within each whole segment, keys by falling importance to the last queries.

  The importance of a key is its mean share of the softmax of the last `block`
  queries, over the keys of whole segments, without a causal mask; of a kv
  head, the mean over its query heads. Of equal ones the earlier key comes
  first. Keys past the last whole segment stay.

  Args:
    q, k: of self-attention, t == s.
    block: how many queries tell.
    segment: keys among which the order changes.
    scale: of the logits, default d ** -0.5.

  Returns:
    `order[j]`, the key that comes j-th.

  Example:
    >>> k = jnp.array([1.0, 5, 2, 3, 0]).reshape(1, 5, 1, 1)
    >>> key_order(jnp.ones_like(k), k, block=1, segment=2).tolist()
    [[[1, 0, 3, 2, 4]]]
  """
  whole = k.shape[1] // segment * segment
  if not whole:
    return _order(jnp.zeros((*q.shape[:3:2], 0)), k, segment)
  found = last_importance(
    q, k[:, :whole], rows=block, causal=False, scale=scale
  )
  return _order(found, k, segment)


def _order(found, k, segment):
  """Of importance [b n keys of whole segments], the order of all keys."""
  (b, n, whole), (t, heads) = found.shape, k.shape[1:3]
  found = found.reshape(b, heads, n // heads, whole // segment, segment)
  # Stable, so that of equal ones the first comes first.
  order = jnp.argsort(-found.mean(axis=2), axis=-1).astype(jnp.int32)
  index = jnp.arange(t, dtype=jnp.int32)
  order = order + index[:whole:segment, None]
  order = order.reshape(b, heads, whole)
  tail = jnp.broadcast_to(index[whole:], (b, heads, t - whole))
  return jnp.concatenate([order, tail], axis=-1)


def reorder(
  x: Float[Array, "b s k d"], order: Int32[Array, "b k s"]
) -> Float[Array, "b s k d"]:
  """x with its tokens in another order, by head.

  Example:
    >>> x = jnp.array([5.0, 6, 7]).reshape(1, 3, 1, 1)
    >>> reorder(x, jnp.array([[[2, 0, 1]]])).ravel().tolist()
    [7.0, 5.0, 6.0]
  """
  index = jnp.swapaxes(order, 1, 2)[..., None]
  return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def pbs_select(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  block: int = 128,
  segment: int = 256,
  threshold: float = 0.9,
  sink: bool = True,
  order: Int32[Array, "b k s"] | None = None,
  scale: float | None = None,
) -> tuple[BlockMask, Int32[Array, "b k s"]]:
  """The blocks that PBS-Attn keeps, of keys in its order.

  Of the blocks in segments before a query block's own, the fewest with
  `threshold` of the mass of a softmax over the products of mean queries and
  mean keys; all blocks of its own segment; and, with `sink`, the block that
  holds the first token.

  Args:
    q, k: of causal self-attention, t == s.
    block: tokens of a block.
    segment: keys within which the order changes; a multiple of `block`.
    threshold: in (0, 1]; 1 keeps everything.
    sink: whether each query block reads the block of the first token.
    order: of keys, each within its segment; default `key_order`.
    scale: of the logits, default d ** -0.5.

  Returns:
    (mask, order): `mask` is of keys reordered, whose positions are `order`;
    it is causal by them.

  Raises:
    ValueError: lengths that differ, a segment that is no multiple of `block`,
      a threshold outside of (0, 1].

  Example:
    >>> q = k = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> mask, order = pbs_select(q, k, block=8, segment=16)
    >>> mask.lengths, order.shape
    ((64, 64), (1, 2, 64))
  """
  check_shapes(q, k, k)
  (_, t, n, d), heads = q.shape, k.shape[2]
  if t != k.shape[1]:
    raise ValueError(
      f"{t} queries and {k.shape[1]} keys; there must be as many"
    )
  if block < 1 or segment % block:
    raise ValueError(
      f"the segment is {segment} tokens, not a multiple of the block, {block}"
    )
  scale = d**-0.5 if scale is None else scale
  whole = t // segment * segment
  if order is None and whole and block == BLOCK:
    found, means = importance_and_means(
      q, k[:, :whole], rows=block, causal=False, scale=scale
    )
    order = _order(found, k, segment)
  else:
    if order is None:
      order = key_order(q, k, block=block, segment=segment, scale=scale)
    means = pool_blocks(q, block)
  score = block_scores(means, pool_blocks(reorder(k, order), block), scale)
  index = np.arange(score.shape[-1], dtype=np.int32)
  per = segment // block
  past = index // per * per  # how many blocks are before its segment
  forced = None
  if sink:
    # The first token stays in the first segment.
    first = jnp.argmax(order[..., :segment] == 0, axis=-1) // block  # [b k]
    forced = jnp.repeat(first.astype(jnp.int32), n // heads, axis=1)
    forced = forced[..., None]
  num, kept = keep_mass(score, threshold, past, forced=forced)
  # Of a query block's own segment, blocks with a key that is not after it.
  own = past[:, None] + np.arange(per, dtype=np.int32)
  earliest = ranges(order, block).low  # [b k m]
  earliest = jnp.take(earliest, np.minimum(own, index[-1]), axis=-1)
  last = np.minimum((index + 1) * block, t)[:, None] - 1
  some, place = compact((earliest <= last) & (own <= index[-1]))
  lists = Lists(
    num,
    kept,
    jnp.repeat(some, n // heads, axis=1),
    jnp.repeat(place + past[:, None], n // heads, axis=1),
    (block, block),
  )
  positions = jnp.arange(t, dtype=jnp.int32)[None, None]
  mask = BlockMask(
    lists, (positions,), (order,), Positions(None, 0), lengths=(t, t)
  )
  return mask, order


def pbs_attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  block: int = 128,
  segment: int = 256,
  threshold: float = 0.9,
  sink: bool = True,
  permute: str = "kv_head",
  causal: bool = True,
  scale: float | None = None,
  return_lse: bool = False,
  impl: Any = None,
  **others: Any,
) -> Any:
  """Causal attention over the blocks of `pbs_select`.

  Not to be trained with: the choice for a query depends on later ones.

  Args:
    q, k, v: of self-attention; t == s.
    block, segment, threshold, sink, scale: as in `pbs_select`.
    permute: "kv_head", an order of keys for each kv head, or "head", one for
      each query head, as the paper has it: keys and values are then repeated.
    causal: has to be True.
    return_lse, impl: as in `attention`.
    **others: of a layer; those that are set are refused.

  Returns:
    As `attention`.

  Raises:
    ValueError: as `pbs_select`; another `permute`.

  Example:
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> o = pbs_attention(q, k, v, block=8, segment=16, threshold=1)
    >>> bool(jnp.allclose(o, attention(q, k, v, causal=True), atol=1e-5))
    True

  Reference: PBS-Attn, https://arxiv.org/abs/2510.21270.
  """
  check_shapes(q, k, v)
  check_own(causal, others)
  if permute not in ("kv_head", "head"):
    raise ValueError(f"permute is {permute!r}, not 'kv_head' or 'head'")
  if permute == "head":
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  settings: dict[str, Any] = {"scale": scale, "impl": impl}
  settings["return_lse"] = return_lse
  if q.shape[1] <= segment and q.shape[1] == k.shape[1]:
    return attention(q, k, v, causal=True, **settings)
  # A choice has no gradient, and its kernels have none to offer.
  mask, order = pbs_select(
    *jax.lax.stop_gradient((q, k)),
    block=block,
    segment=segment,
    threshold=threshold,
    sink=sink,
    scale=scale,
  )
  # The mask is causal.
  return attention(
    q, reorder(k, order), reorder(v, order), mask=mask, **settings
  )
