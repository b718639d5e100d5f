"""Gradients of attention through some of the keys, by what all keys gave.

Where the keys are in parts, over devices or calls, and (o, lse) is merged, no
part has to be computed again for the gradients: they follow from the joint
lse and `delta`, part by part, and add up.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from isthmus.attention.sdpa import BACKWARD, prepare
from isthmus.attention.shard import attend_sharded
from isthmus.pallas.flash import joint as joint
from isthmus.pallas.precision import accumulator


def attention_gradient(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  do: Float[Array, "b t n dv"],
  lse: Float[Array, "b n t"],
  delta: Float[Array, "b n t"],
  *,
  shard_axes: Any = None,
  impl: str | Sequence[str] | None = None,
  **settings: Any,
) -> tuple[
  Float[Array, "b t n d"], Float[Array, "b s k d"], Float[Array, "b s k dv"]
]:
  """(dq, dk, dv) through these keys, of queries that may see others too.

  `P = exp(x - lse)`, `dX = P (do . v - delta)`, without a forward pass. Over
  parts that share no key, dq is a sum, and each key's gradient its part's.

  Args:
    q, k, v: the queries, and the keys and values of this part.
    do: the cotangent of the joint o, of q's dtype.
    lse: joint, over the keys of all parts; with sinks, if there are any.
    delta: `rowsum(do o) - dlse` of the joint (o, lse) and their cotangents,
      see `isthmus.pallas.flash.joint`.
    shard_axes, impl: as in `attention`. An implementation that can't give the
      lse of a part ("cudnn") can't take its gradients.
    **settings: the other arguments of `attention`, of this part; but sinks,
      which are in the lse.

  Returns:
    (dq, dk, dv) of the shapes and dtype of q, k, v.

  Raises:
    ValueError: sinks, and what `attention` refuses.
    NotImplementedError: what `impl` can't do, with the reason.

  Example:
    >>> from isthmus.attention import attention
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    >>> o, lse = attention(q, k, v, return_lse=True)
    >>> do, dlse = 0 * o + 1, 0 * lse
    >>> rows = do, lse, joint.delta(o, lse, do, dlse)
    >>> dq, *_ = attention_gradient(q, k[:, :2], v[:, :2], *rows)
    >>> dq2, *_ = attention_gradient(q, k[:, 2:], v[:, 2:], *rows)
    >>> want = jax.grad(lambda q: attention(q, k, v).sum())(q)
    >>> bool(jnp.allclose(dq + dq2, want, atol=1e-6))
    True

  Reference: FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.2.
  """
  if settings.get("sinks") is not None:
    raise ValueError("attention_gradient takes no sinks: they are in the lse")
  options, extras = prepare(q, k, v, return_lse=True, **settings)
  (b, t, n, _), acc = q.shape, accumulator(q.dtype)
  for name, x, shape, dtype in (
    ("do", do, (b, t, n, v.shape[3]), q.dtype),
    ("lse", lse, (b, n, t), acc),
    ("delta", delta, (b, n, t), acc),
  ):
    if x.shape != shape or x.dtype != dtype:
      raise ValueError(
        f"{name} is {x.dtype} {x.shape}; wanted {dtype.name} {shape}"
      )

  # Differentiating the call leaves it to jax who adds up over devices, where
  # they share keys.
  def call(q, k, v):
    return attend_sharded(
      functools.partial(_stand_in, options, impl),
      q,
      k,
      v,
      extras,
      rows=(lse, delta),
      shard_axes=shard_axes,
      out="b.n",
    )

  _, back = jax.vjp(call, q, k, v)
  return back(do)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stand_in(options, impl, q, k, v, extras, lse, delta):
  """In the place of o: nothing is computed, only its gradients are."""
  del options, impl, k, extras, lse, delta
  return jax.lax.full_like(q, 0, shape=(*q.shape[:3], v.shape[3]))


def _forward(options, impl, q, k, v, *rest):
  o = _stand_in(options, impl, q, k, v, *rest)
  return o, (q, k, v, *rest)


def _backward(options, impl, residuals, do):
  q, k, v, extras, lse, delta = residuals
  grads = BACKWARD(q, k, v, extras, do, lse, delta, options=options, impl=impl)
  return *grads, None, None, None


_stand_in.defvjp(_forward, _backward)
