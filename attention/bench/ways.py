"""Ways to choose blocks, by name and by how much they are asked to keep."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.permute import key_order, pbs_attention, pbs_select
from isthmus.attention.proxy import proxy_attention, proxy_select
from isthmus.attention.select import (
  antidiagonal_select,
  pooled_select,
  select_attention,
  window_select,
)
from isthmus.pallas.precision import exact_dot

#: Every way there is, and what its level is a share of.
WAYS: dict[str, str] = {
  "window": "context",
  "top-k": "context",
  "mass": "mass",
  "antidiagonal": "mass",
  "pbs": "mass",
  "pbs-kv": "mass",
  "unpermuted": "mass",
  "proxy": "mass",
  "proxy-kv": "mass",
  "proxy-head": "mass",
}


class Way(NamedTuple):
  """One way at one level, as functions of what a layer attends with.

  Attributes:
    attend: the mechanism, of (q, k, v), the choice among it.
    select: the `BlockMask` that it goes by, of (q, k).
    order: of (q, k): which key comes j-th, int32 [b h s], h being kv heads or
      query heads; None where keys stay in place.

  Example:
    >>> found = way("pbs-kv", 0.9, block=8, length=64)
    >>> q = k = jnp.ones((1, 64, 4, 8))
    >>> found.select(q, k).lengths, found.order(q, k).shape
    ((64, 64), (1, 4, 64))
  """

  attend: Callable[..., Any]
  select: Callable[..., BlockMask]
  order: Callable[..., Any] | None = None


def way(name: str, level: float, *, block: int, length: int) -> Way:
  """A way to choose blocks.

  `window` and `top-k` keep a share of the context, the others what holds a
  share of the mass by their own estimate of it: `mass` by mean queries and
  keys, `antidiagonal` as XAttention, `pbs` as PBS-Attn (an order of keys for
  each query head, as its authors have it), `pbs-kv` for each kv head,
  `unpermuted` without any; `proxy` as ProxyAttn, scores of one proxy for all
  heads, `proxy-kv` for each kv head, `proxy-head` each head's own.

  Args:
    name: of `WAYS`.
    level: the share, in (0, 1].
    block: tokens of a block.
    length: of the context.

  Raises:
    ValueError: no such name, a level outside of (0, 1].

  Example:
    >>> q = k = v = jnp.ones((1, 64, 4, 8))
    >>> window = way("window", 0.25, block=8, length=64)
    >>> window.attend(q, k, v).shape, float(kept_share(window.select(q, k)))
    ((1, 64, 4, 8), 0.7222222089767456)
  """
  if name not in WAYS:
    raise ValueError(f"way {name!r} is none of {', '.join(WAYS)}")
  if not 0 < level <= 1:
    raise ValueError(f"the level of {name} is {level}; it lies in (0, 1]")
  size = {"block": block}
  if name.startswith("proxy"):
    # The paper's least budget, 2048 tokens, is of long contexts.
    least = max(2 * block, min(2048, length // 16))
    bind = functools.partial(
      _proxy, kind=name, gamma=level, min_tokens=least, **size
    )
    return Way(
      functools.partial(bind, proxy_attention),
      functools.partial(bind, proxy_select),
    )
  if name.startswith("pbs"):
    size |= {"segment": 2 * block}
    permute = "kv_head" if name == "pbs-kv" else "head"
    return Way(
      functools.partial(
        pbs_attention, permute=permute, threshold=level, **size
      ),
      functools.partial(_pbs_mask, permute=permute, threshold=level, **size),
      functools.partial(_pbs_order, permute=permute, **size),
    )
  tokens = round(level * length)
  select: Callable[..., BlockMask] = {
    "window": functools.partial(
      window_select, window=tokens, sink=block, **size
    ),
    "top-k": functools.partial(
      pooled_select, threshold=None, top_k=max(tokens // block, 1), **size
    ),
    "mass": functools.partial(pooled_select, threshold=level, **size),
    "antidiagonal": functools.partial(
      antidiagonal_select, threshold=level, **size
    ),
    "unpermuted": functools.partial(_unpermuted, threshold=level, **size),
  }[name]
  return Way(functools.partial(select_attention, select=select), select)


def kept_share(mask: BlockMask) -> Float32[Array, ""]:
  """The blocks that are read over those of causal attention.

  Above 1 if more are read than all queries need: permuted keys lie anywhere in
  a segment, which is then read whole.

  Example:
    >>> float(kept_share(BlockMask.causal(64, block=(8, 8))))
    1.0
  """
  blocks = -(-mask.lengths[1] // mask.lists.block[1])
  return mask.density * (2 * blocks / (blocks + 1))


def kept_mass(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  mask: BlockMask,
  order: Int32[Array, "b h s"] | None = None,
  *,
  queries: Int[Array, "u"],
  scale: float | None = None,
) -> Float32[Array, "b n u"]:
  """Of some queries, the share of their dense softmax that a mask keeps.

  `sum_{j seen} p_ij`, p being causal attention over all keys, in float32. All
  of a query's scores are held, a kv head after the other.

  Args:
    q, k: of self-attention.
    mask: blocks that are kept.
    order: of the keys that the mask is of; default as they stand.
    queries: which, by index.
    scale: of the logits, default d ** -0.5.

  Example:
    >>> q = k = jnp.zeros((1, 8, 2, 4))
    >>> mask = BlockMask.window((1, 0), 8, block=(2, 2))
    >>> kept_mass(q, k, mask, queries=jnp.array([1, 7]))[0, 0].tolist()
    [1.0, 0.5]
  """
  (b, _, n, d), (s, heads) = q.shape, k.shape[1:3]
  scale, block = d**-0.5 if scale is None else scale, mask.lists.block
  full, partial = mask.to_blocks()
  rows = jnp.take(full | partial, queries // block[0], axis=2)
  rows = jnp.broadcast_to(rows, (b, n, *rows.shape[2:]))
  ends = [(0, 0), (0, 0), (0, 0), (0, -s % block[1])]

  def split(x, axis, parts):
    shape = (*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  given = [
    split(jnp.take(q, queries, axis=1), 2, heads),
    split(k, 2, heads),
    split(rows, 1, heads),
  ]
  if order is not None:
    given.append(
      split(jnp.repeat(order, n // order.shape[1], axis=1), 1, heads)
    )

  def one(given):
    q, k, rows, *order = given
    x = exact_dot("bugd,bsd->bgus", q, k[:, :, 0]) * scale
    seen = jnp.arange(s, dtype=jnp.int32) <= queries[:, None]
    x = jnp.where(seen, x, -jnp.inf)
    p = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    if order:
      p = jnp.take_along_axis(p, order[0][:, :, None], axis=-1)
    p = jnp.pad(p, ends).reshape(*p.shape[:3], -1, block[1]).sum(axis=-1)
    return jnp.sum(jnp.where(rows, p, 0), axis=-1)

  found = jnp.moveaxis(jax.lax.map(one, tuple(given)), 0, 1)
  return found.reshape(b, n, -1)


def _proxy(function, q, k, *v, kind, **settings):
  if kind == "proxy-head":
    group = q.shape[2] // k.shape[2]
    k, *v = (jnp.repeat(x, group, axis=2) for x in (k, *v))
  groups = 1 if kind == "proxy" else k.shape[2]
  return function(q, k, *v, groups=groups, **settings)


def _each(q, k, permute):
  """Keys of the heads that have an order of their own."""
  if permute == "head":
    return jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  return k


def _pbs_mask(q, k, *, permute, **settings):
  return pbs_select(q, _each(q, k, permute), **settings)[0]


def _pbs_order(q, k, *, permute, **settings):
  return key_order(q, _each(q, k, permute), **settings)


def _unpermuted(q, k, *, block, **settings):
  """PBS-Attn's choice, of keys as they stand."""
  b, t, heads, _ = k.shape
  order = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, heads, t))
  return pbs_select(
    q, k, block=block, segment=2 * block, order=order, **settings
  )[0]
