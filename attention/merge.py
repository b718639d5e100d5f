"""Attention over parts of the keys, made one: what rings and splits need.

`lse` says how much a part weighs, so that softmax over the union of two
disjoint sets of keys follows from (o, lse) of each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
  o: Float[Array, "b t n dv"],
  lse: Float[Array, "b n t"],
  o2: Float[Array, "b t n dv"],
  lse2: Float[Array, "b n t"],
  *,
  sinks: Any = None,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) over the keys of two calls that shared none.

  `lse' = log(exp(lse) + exp(lse2))`,
  `o' = o exp(lse - lse') + o2 exp(lse2 - lse')`, in at least float32.
  A part that saw no key, of lse -inf, weighs nothing; two of them make one
  again. Both results are differentiable in all arguments.

  Args:
    o, lse: of `attention(..., return_lse=True)`, without sinks.
    o2, lse2: of the same queries over other keys.
    sinks: refused, see `add_sinks`.

  Returns:
    o of the wider dtype of o and o2: of a long chain, keep float32; and lse.

  Raises:
    ValueError: sinks.

  Example:
    >>> from isthmus.attention import attention
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    >>> first = attention(q, k[:, :2], v[:, :2], return_lse=True)
    >>> second = attention(q, k[:, 2:], v[:, 2:], return_lse=True)
    >>> o, lse = merge(*first, *second)
    >>> bool(jnp.allclose(o, attention(q, k, v), atol=1e-6))
    True

  Reference: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.
  """
  if sinks is not None:
    raise ValueError(
      "merge takes no sinks: each part's lse would hold them, and the whole "
      "twice; call attention without sinks, merge, then add_sinks once"
    )
  dtype = jnp.result_type(o, o2)
  wide = jnp.result_type(lse, lse2, jnp.float32)
  lse, lse2 = lse.astype(wide), lse2.astype(wide)
  # The result doesn't depend on what is taken off, so neither does a gradient.
  top = jax.lax.stop_gradient(jnp.maximum(lse, lse2))
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  weight, weight2 = jnp.exp(lse - top), jnp.exp(lse2 - top)
  total = weight + weight2
  empty = total == 0
  total = jnp.where(empty, 1.0, total)

  def part(o, weight):
    share = jnp.swapaxes(weight / total, 1, 2)[..., None]
    return o.astype(wide) * share

  o = part(o, weight) + part(o2, weight2)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  return o.astype(dtype), lse


def add_sinks(
  o: Float[Array, "b t n dv"],
  lse: Float[Array, "b n t"],
  sinks: Float[Array, "n"],
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """What `attention(..., sinks=sinks)` returns, from a call without them.

  A sink is a key without a value: `lse' = log(exp(lse) + exp(sink))`,
  `o' = o exp(lse - lse')`. To be applied once, after all merges.

  Args:
    o, lse: of `attention(..., return_lse=True)` or `merge`.
    sinks: a logit for each query head.

  Example:
    >>> from isthmus.attention import attention
    >>> q = k = v = jnp.ones((1, 3, 2, 8))
    >>> sinks = jnp.array([0.5, -1.0])
    >>> o, _ = add_sinks(*attention(q, k, v, return_lse=True), sinks)
    >>> bool(jnp.allclose(o, attention(q, k, v, sinks=sinks), atol=1e-6))
    True
  """
  logits = jnp.broadcast_to(sinks.astype(lse.dtype)[:, None], lse.shape)
  return merge(o, lse, jnp.zeros_like(o), logits)
