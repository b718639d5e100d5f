"""Feed-forward layers: width -> hidden -> width."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.dispatch import platform

Activation = Callable[[jax.Array], jax.Array]


def fan_in(scale: float = 1.0) -> nn.initializers.Initializer:
  """Normal of standard deviation `scale / sqrt(inputs)`."""
  return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


# Rematerialised: the gate and the value are kept, not what lies between.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def gated(
  gate: Float[Array, "... f"],
  up: Float[Array, "... f"],
  activation: Activation,
) -> Float[Array, "... f"]:
  """`activation(gate) up`."""
  return activation(gate) * up


class Mlp(nn.Module):
  """`down(activation(up(x)))`, without biases.

  Attributes:
    hidden: f, the inner width.
    activation: applied elementwise to the inner activations.
    out_scale: factor on the initial standard deviation of `down`.
    dtype: what is multiplied.
    param_dtype: what is stored.
  """

  hidden: int
  activation: Activation = jax.nn.gelu
  out_scale: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    _check_hidden(self.hidden)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "... m"], *, train: bool = False
  ) -> Float[Array, "... m"]:
    dense = functools.partial(_dense, self)
    h = self.activation(dense(self.hidden, name="up")(x))
    return dense(x.shape[-1], scale=self.out_scale, name="down")(h)


class GatedMlp(nn.Module):
  """SwiGLU, `down(activation(gate(x)) up(x))`, without biases.

  Attributes:
    hidden: f, the inner width.
    activation: applied to the gate.
    out_scale: factor on the initial standard deviation of `down`.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Reference: https://arxiv.org/abs/2002.05202
  """

  hidden: int
  activation: Activation = jax.nn.silu
  out_scale: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    _check_hidden(self.hidden)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "... m"], *, train: bool = False
  ) -> Float[Array, "... m"]:
    dense = functools.partial(_dense, self)
    gate = dense(self.hidden, name="gate")(x)
    up = dense(self.hidden, name="up")(x)
    if platform() == "cpu":
      # Its transpose keeps the activation's derivative out of the loop that
      # transposes it for the kernel's gradient, which would not be vectorised.
      gate, up = jax.lax.optimization_barrier((gate, up))
    h = gated(gate, up, self.activation)
    return dense(x.shape[-1], scale=self.out_scale, name="down")(h)


def _dense(module, features: int, *, name: str, scale: float = 1.0) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=False,
    dtype=module.dtype,
    param_dtype=module.param_dtype,
    kernel_init=fan_in(scale),
    name=name,
  )


def _check_hidden(hidden: int) -> None:
  if hidden < 1:
    raise ValueError(f"hidden is {hidden}; it must be at least 1")
