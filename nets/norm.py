"""Normalisation layers, with float32 statistics."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator


# Rematerialised, so that a layer keeps x and no float32 copy of it. Without
# barriers: inside a loop nothing can be shared with the forward pass anyway.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def rms_norm(
  x: Float[Array, "... m"], scale: Float[Array, "m"], eps: float
) -> Float[Array, "... m"]:
  """`scale x / sqrt(mean(x^2) + eps)` over the last axis.

  Args:
    x: activations; the result has their dtype.
    scale: one factor a channel.
    eps: keeps the root away from 0.

  Example:
    >>> rms_norm(jnp.array([[3.0, -3.0]]), jnp.array([1.0, 2.0]), 0.0).tolist()
    [[1.0, -2.0]]

  Reference: https://arxiv.org/abs/1910.07467
  """
  wide = accumulator(x.dtype)
  y = x.astype(wide)
  mean = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
  scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
  return (y * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with a learned scale, `scale` [m], that starts at 1.

  Example:
    >>> y, variables = RMSNorm().init_with_output(
    ...   jax.random.key(0), jnp.ones((2, 8))
    ... )
    >>> y.shape, variables["params"]["scale"].shape
    ((2, 8), (8,))
  """

  eps: float = 1e-6
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... m"]) -> Float[Array, "... m"]:
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    return rms_norm(x, scale, self.eps)
