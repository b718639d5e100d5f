"""ProxyAttn: what blocks matter is told by few heads, how many by each head.

Heads that share a proxy read the same blocks first; a head that needs more
mass goes further down the list. Like every choice that looks at the last
queries, this is for the prefill of models that exist, not for training.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.keep import causal_mask, keep_count, keep_sum
from isthmus.attention.last import last_mass
from isthmus.attention.pooling import tile_softmax
from isthmus.attention.sdpa import attention, check_shapes
from isthmus.attention.select import check_own
from isthmus.pallas.precision import accumulator


def proxy_scores(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  groups: int = 1,
  stride: int = 4,
  block: int = 128,
  scale: float | None = None,
) -> Float[Array, "b groups m m"]:
  """The largest probability in each tile of a proxy's attention.

  A proxy is the mean of the heads of a group. Of its queries and keys the
  first of every `stride` is kept, and tiles of block / stride of them by as
  many make a block's score: `max P`, P being their causal softmax.

  Args:
    q, k: of causal self-attention, t == s.
    groups: of heads, each with whole kv heads.
    stride: of tokens; divides `block`.
    block: tokens of a block.
    scale: of the logits, default d ** -0.5.

  Example:
    >>> q = k = jax.random.normal(jax.random.key(0), (1, 64, 4, 8))
    >>> proxy_scores(q, k, block=16).shape
    (1, 1, 4, 4)
  """
  b, d = q.shape[0], q.shape[3]

  def proxy(x):
    x = x[:, ::stride]
    x = x.reshape(b, x.shape[1], groups, -1, d)
    return jnp.mean(x, axis=3, dtype=accumulator(x.dtype)).astype(x.dtype)

  # Sampled queries and keys stand at multiples of the stride, so that one is
  # at or before another if its index is.
  return tile_softmax(
    proxy(q),
    proxy(k),
    side=block // stride,
    scale=d**-0.5 if scale is None else scale,
  )


def block_budget(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  gamma: float = 0.95,
  block: int = 128,
  scale: float | None = None,
) -> Int32[Array, "b n"]:
  """How many blocks hold `gamma` of the last queries' attention, by head.

  The mean causal softmax of the last `block` queries is summed over blocks;
  counted are the largest until they sum to gamma, or all.

  Args:
    q, k: of causal self-attention, t == s.
    gamma: in (0, 1]; 1 is all blocks.
    block: tokens of a block, and how many queries tell.
    scale: of the logits, default d ** -0.5.

  Example:
    >>> q = k = jnp.zeros((1, 64, 2, 8))
    >>> block_budget(q, k, gamma=0.5, block=16).tolist()
    [[2, 2]]
  """
  if gamma == 1:
    blocks = -(-q.shape[1] // block)
    return jnp.full((q.shape[0], q.shape[2]), blocks, jnp.int32)
  mass = last_mass(q, k, rows=block, block=block, causal=True, scale=scale)
  mass = mass / jnp.sum(mass, axis=-1, keepdims=True)
  return keep_sum(mass, np.asarray(gamma, np.float32))[0]


def proxy_select(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  *,
  groups: int = 1,
  stride: int = 4,
  gamma: float = 0.95,
  block: int = 128,
  min_tokens: int = 2048,
  scale: float | None = None,
) -> BlockMask:
  """The blocks that ProxyAttn keeps, causally.

  Query block m of a head has m + 1 blocks to choose from and keeps those of
  the largest `proxy_scores` of its group, of equal ones the earlier:
  `max(min_tokens / block, ceil(budget (m + 1) / blocks))` of them, and the
  diagonal block in any case. (The paper counts the budget of all blocks.)

  Args:
    q, k, groups, stride, block, scale: as in `proxy_scores`.
    gamma: as in `block_budget`; 1 keeps everything.
    min_tokens: that each query block keeps at least, if it has them.

  Raises:
    ValueError: lengths that differ, a stride that doesn't divide the block,
      groups that don't divide the kv heads, a gamma outside of (0, 1].

  Example:
    >>> q = k = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> proxy_select(q, k, block=8, min_tokens=16).lengths
    (64, 64)
  """
  check_shapes(q, k, k)
  (_, t, n, _), heads = q.shape, k.shape[2]
  if t != k.shape[1]:
    raise ValueError(
      f"{t} queries and {k.shape[1]} keys; there must be as many"
    )
  if stride < 1 or block % stride:
    raise ValueError(f"the stride, {stride}, doesn't divide the block, {block}")
  if groups < 1 or heads % groups:
    raise ValueError(f"{heads} kv heads don't split into {groups} groups")
  if not 0 < gamma <= 1:
    raise ValueError(f"gamma is {gamma}, not in (0, 1]")
  score = proxy_scores(
    q, k, groups=groups, stride=stride, block=block, scale=scale
  )
  budget = block_budget(q, k, gamma=gamma, block=block, scale=scale)
  blocks = score.shape[-1]
  row = np.arange(blocks, dtype=np.int32)
  wanted = -(-budget[..., None] * (row + 1) // blocks)
  wanted = jnp.maximum(wanted, -(-min_tokens // block))
  wanted = wanted.reshape(-1, groups, n // groups, blocks)
  num, index = keep_count(score[:, :, None], wanted, row + 1, ends=row)
  return causal_mask(
    num.reshape(-1, n, blocks),
    index.reshape(-1, n, blocks, blocks),
    block=block,
    length=t,
  )


def proxy_attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  groups: int = 1,
  stride: int = 4,
  gamma: float = 0.95,
  block: int = 128,
  min_tokens: int = 2048,
  causal: bool = True,
  scale: float | None = None,
  return_lse: bool = False,
  impl: Any = None,
  **others: Any,
) -> Any:
  """Causal attention over the blocks of `proxy_select`.

  Not to be trained with: the choice for a query depends on later ones.

  Args:
    q, k, v: of self-attention; t == s.
    groups, stride, gamma, block, min_tokens, scale: as in `proxy_select`.
    causal: has to be True.
    return_lse, impl: as in `attention`.
    **others: of a layer; those that are set are refused.

  Returns:
    As `attention`.

  Raises:
    ValueError: as `proxy_select`.

  Example:
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
    >>> o = proxy_attention(q, k, v, block=8, gamma=1)
    >>> bool(jnp.allclose(o, attention(q, k, v, causal=True), atol=1e-5))
    True

  Reference: ProxyAttn, https://arxiv.org/abs/2509.24745.
  """
  check_shapes(q, k, v)
  check_own(causal, others)
  # A choice has no gradient, and its kernels have none to offer.
  mask = proxy_select(
    *jax.lax.stop_gradient((q, k)),
    groups=groups,
    stride=stride,
    gamma=gamma,
    block=block,
    min_tokens=min_tokens,
    scale=scale,
  )
  return attention(
    q,
    k,
    v,
    mask=mask,
    scale=scale,
    return_lse=return_lse,
    impl=impl,
  )
