"""Stochastic rounding: small updates of bfloat16 parameters aren't lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray


class RoundingState(NamedTuple):
  """Steps done, of which the random bits are made.

  Example:
    >>> RoundingState(jnp.zeros((), jnp.int32)).count.item()
    0
  """

  count: Any


def round_stochastically(
  x: Float32[Array, "..."], key: PRNGKeyArray
) -> BFloat16[Array, "..."]:
  """x up or down to bfloat16, so that its mean is x.

  What is not finite stays as it is.

  Args:
    x: numbers.
    key: of the random bits.

  Example:
    >>> x = jnp.full(10_000, 1.001)  # between 1 and 1.0078
    >>> y = round_stochastically(x, jax.random.key(0))
    >>> y.dtype, round(float(y.astype(jnp.float32).mean()), 4)
    (dtype(bfloat16), 1.001)
  """
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  low = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  up = (bits + low) & jnp.uint32(0xFFFF0000)
  up = lax.bitcast_convert_type(up, jnp.float32)
  return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformation:
  """The last part of a chain: `p + update` is rounded at random, not to even.

  Of bfloat16 parameters only. An update below half a step of bfloat16, 0.2% of
  the parameter, would else be lost each time.

  Args:
    seed: of the random bits; those of a step are the same however often it is
      taken, and wherever.

  Example:
    >>> params = jnp.ones(4096, jnp.bfloat16)
    >>> tx = stochastic_rounding()
    >>> update = jnp.full(4096, 1e-4)
    >>> u, _ = tx.update(update, tx.init(params), params)
    >>> moved = optax.apply_updates(params, u).astype(jnp.float32)
    >>> bool(abs(moved.mean() - 1.0001) < 1e-4), moved.max().item()
    (True, 1.0078125)
  """

  def init(params: Any) -> RoundingState:
    del params
    return RoundingState(jnp.zeros((), jnp.int32))

  def update(updates: Any, state: Any, params: Any = None):
    if params is None:
      raise ValueError("stochastic rounding needs the parameters")
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    leaves, tree = jax.tree.flatten(updates)
    out = []
    for i, (u, p) in enumerate(
      zip(leaves, tree.flatten_up_to(params), strict=True)
    ):
      if p.dtype == jnp.bfloat16:
        wide = p.astype(jnp.float32)
        new = round_stochastically(
          wide + u.astype(jnp.float32), jax.random.fold_in(key, i)
        )
        # Of two bfloat16 numbers: p + u is `new` again once it is rounded.
        u = new.astype(jnp.float32) - wide
      out.append(u)
    count = optax.safe_increment(state.count)
    return tree.unflatten(out), RoundingState(count)

  return optax.GradientTransformation(init, update)
