"""Mixture of block attention: each query chooses the key blocks it reads.

The call is checked and put into the terms of `isthmus.pallas.moba.api` here;
the implementations, their order and their refusals are `OP`'s.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Int32

from isthmus.attention.sdpa import check_extra, check_shapes
from isthmus.attention.shard import sharded
from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.moba import mosaic
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import BlockLayout, mark_lost, packed, uniform


def moba(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  block: int,
  top_k: int,
  segment_ids: Int[Array, "b t"] | None = None,
  max_segments: int | None = None,
  q_positions: Int32[Array, "#b t"] | None = None,
  centroids: Float[Array, "b g k d"] | None = None,
  causal: bool = True,
  scale: float | None = None,
  return_lse: bool = False,
  impl: str | Sequence[str] | None = None,
) -> Any:
  """Softmax attention over the top_k key blocks that each query chooses.

  Block j has the keys `j block, ..., (j + 1) block - 1` of a segment, fewer at
  its end. The query at p of a query head reads its own block `p // block`, up
  to itself, and of the blocks before, the top_k - 1 of largest `q . kbar_j`,
  with kbar_j the mean key of the block; of equal scores the later block. All
  that it reads goes through one softmax:
  `o_i = sum_j p_ij v_j`, `p_ij = exp(x_ij - lse_i)`, `x_ij = scale q_i . k_j`,
  `lse_i = log(sum_j exp(x_ij))`. Query head n reads kv head
  `n // (n_heads / k_heads)`; heads of a group choose apart.
  No gradient goes through the choice or the centroids.
  A query that sees no key has o = 0, lse = -inf and gradient 0.

  Args:
    q: queries.
    k: keys.
    v: values; their width may differ from the keys'.
    block: tokens of a block.
    top_k: blocks that a query reads, its own among them. From the number of
      blocks on this is dense attention.
    segment_ids: of packed rows, t == s. A segment is a run of equal ids; no
      query reads another one, no block holds keys of two.
    max_segments: segments of a row, at most; it bounds the number of blocks,
      and with it the work. Tokens of more segments are NaN. By default any
      number is right, if slow.
    q_positions: of the queries, int32, per row or shared (size 1), the key at
      index j being at j; by default s - t, ..., s - 1, the last query standing
      at the last key. The own block of a query past the last key is empty.
    centroids: what queries are compared with, instead of the mean keys, such
      as the running ones of a cache; rounded to q's dtype. There are
      g = ceil(s / block), or in packed rows `(t - m) // block + m` with
      m = min(max_segments, t), counted along the row.
    causal: if False, a query reads the top_k blocks of largest scores in its
      whole segment, none being forced.
    scale: of the logits, default d ** -0.5.
    return_lse: also return the lse.
    impl: implementation, see `isthmus.pallas.dispatch`: "mosaic" (kernels for
      Hopper GPUs), "chunked" (XLA in linear memory) or "xla" (with t x s
      logits).

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t] in float32
    (float64 for float64 inputs), natural log, differentiable.

  Raises:
    ValueError: shapes or settings that fit no implementation.
    NotImplementedError: what `impl` can't do, with the reason.

  Example:
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    >>> moba(q, k, v, block=4, top_k=2).shape
    (1, 16, 2, 8)
    >>> from isthmus.attention import attention
    >>> dense = attention(q, k, v, causal=True)
    >>> bool(jnp.allclose(moba(q, k, v, block=4, top_k=4), dense, atol=1e-5))
    True

  Reference: Mixture of Block Attention, https://arxiv.org/abs/2502.13189;
  Optimizing Mixture of Block Attention, https://arxiv.org/abs/2511.11571.
  """
  check_shapes(q, k, v)
  (b, t, n, d), (s, heads) = q.shape, k.shape[1:3]
  for name, x in (("block", block), ("top_k", top_k)):
    if x < 1:
      raise ValueError(f"{name} is {x}; it must be at least 1")
  if s < 1:
    raise ValueError("there are no keys")
  check_extra("segment_ids", segment_ids, ((b,), (t,)))
  check_extra("q_positions", q_positions, ((1, b), (t,)))
  layout = _layout(t, s, block, causal, segment_ids, max_segments, q_positions)
  if centroids is not None:
    g = layout.start.shape[1]
    check_extra("centroids", centroids, ((b,), (g,), (heads,), (d,)))
    centroids = jax.lax.stop_gradient(centroids.astype(q.dtype))
  options = Options(
    block=int(block),
    top_k=int(top_k),
    causal=bool(causal),
    scale=float(d**-0.5 if scale is None else scale),
  )
  labels = BlockLayout(*("b" if x is not None else None for x in layout))
  o, lse = sharded(
    functools.partial(_run, options, impl),
    (q, k, v, Extras(layout, centroids)),
    (
      *("b.n", "b.k", "b.k"),
      Extras(labels, None if centroids is None else "b.k"),
    ),
    ("b.n", "bn"),
    sizes=(b, n, heads),
  )
  return (o, lse) if return_lse else o


def _run(options, impl, q, k, v, extras):
  o, lse = OP(q, k, v, extras, options=options, impl=impl)
  return mark_lost(o, lse, extras.layout)


def _layout(t, s, block, causal, segment_ids, max_segments, q_positions):
  """Where blocks lie; every refusal of what doesn't go together."""
  if q_positions is not None and not causal:
    raise ValueError("q_positions mean nothing without causal")
  if segment_ids is None:
    if max_segments is not None:
      raise ValueError("max_segments is given without segment_ids")
    return uniform(t, s, block=block, causal=causal, positions=q_positions)
  if t != s:
    raise ValueError(f"{t} queries and {s} keys: segment_ids need as many")
  if q_positions is not None:
    raise ValueError("q_positions don't go with segment_ids")
  if max_segments is not None and max_segments < 1:
    raise ValueError(f"max_segments is {max_segments}; it must be at least 1")
  return packed(
    segment_ids, block=block, max_segments=max_segments, causal=causal
  )


#: `moba` behind its checks.
OP = Op(
  "moba",
  (
    Impl("mosaic", mosaic.attend, mosaic.refuse),
    Impl("chunked", "isthmus.pallas.moba.chunked:attend"),
    Impl("xla", "isthmus.pallas.moba.ref:attend"),
  ),
  {"gpu": ("mosaic", "chunked"), "cpu": ("chunked",), "tpu": ("chunked",)},
)
