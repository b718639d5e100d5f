"""What a backward pass knows of rows: of all their keys, wherever those are.

Parts of the keys may be with other calls, or on other devices. By the joint
(o, lse) each part's share of the gradients follows without the others'.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def delta(
  o: Float[Array, "b t n dv"],
  lse: Float[Array, "b n t"],
  do: Float[Array, "b t n dv"],
  dlse: Float[Array, "b n t"],
) -> Float[Array, "b n t"]:
  """`rowsum(do o) - dlse`: what the gradients need of o.

  Of a row without keys o is 0, and do may be anything.

  Example:
    >>> o, lse = jnp.ones((1, 1, 2, 8)), jnp.array([[[1.0], [-jnp.inf]]])
    >>> delta(o, lse, o, jnp.full((1, 2, 1), 3.0))[0, 0].tolist()
    [5.0]
  """
  acc = lse.dtype
  inner = jnp.where(o == 0, 0, do.astype(acc) * o.astype(acc))
  inner = jnp.swapaxes(jnp.sum(inner, axis=-1), 1, 2)
  return inner - jnp.where(jnp.isneginf(lse), 0, dlse)


def sinks_back(
  sinks: Float[Array, "n"] | None,
  lse: Float[Array, "b n t"],
  delta: Float[Array, "b n t"],
) -> Float[Array, "n"] | None:
  """The sinks' gradient; None if there are none.

  Example:
    >>> rows = jnp.zeros((1, 1, 3))
    >>> sinks_back(jnp.zeros(1), rows, rows + 2).tolist()
    [-6.0]
  """
  if sinks is None:
    return None
  share = jnp.exp(sinks.astype(lse.dtype)[:, None] - weightless(lse))
  return -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)


def weightless(lse: Float[Array, "b n t"]) -> Float[Array, "b n t"]:
  """inf where the lse is -inf, so that `exp(x - lse)` of no key is 0.

  Example:
    >>> weightless(jnp.array([[[2.0, -jnp.inf]]])).tolist()
    [[[2.0, inf]]]
  """
  return jnp.where(jnp.isneginf(lse), jnp.inf, lse)
