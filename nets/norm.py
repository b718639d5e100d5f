"""Normalisation layers, with float32 statistics."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.pallas.precision import accumulator

#: "group", "batch", or what makes a layer, such as `RMSNorm`.
Norm = str | Callable[..., nn.Module]


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


def group_norm(
  x: Float[Array, "b *space c"],
  scale: Float[Array, "c"],
  bias: Float[Array, "c"],
  *,
  groups: int,
  eps: float = 1e-6,
) -> Float[Array, "b *space c"]:
  """`scale (x - mean) / sqrt(var + eps) + bias`, over space and a group.

  Means are taken axis by axis. One sum of float32 over a volume of 64^3 has an
  error that grows with its 262,144 terms and depends on how XLA splits it, in
  the backward pass otherwise than in the forward pass; a reversible layer would
  not find its inputs again. Sums of 64 terms are alike.

  Args:
    x: activations.
    scale, bias: one of each a channel.
    groups: divides the channels.
    eps: keeps the root away from 0.

  Returns:
    float32, or float64 of float64.

  Example:
    >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
    >>> print(group_norm(x, jnp.ones(2), jnp.zeros(2), groups=2, eps=0.0))
    [[[-1. -1.]
      [ 1.  1.]]]

  Reference: https://arxiv.org/abs/1803.08494
  """
  y = x.astype(accumulator(x.dtype)).reshape(*x.shape[:-1], groups, -1)

  def mean(values):
    values = values.mean(-1)
    for axis in range(x.ndim - 2, 0, -1):
      # The barrier keeps XLA from making one sum of them again.
      values = jax.lax.optimization_barrier(values.mean(axis))
    return values.reshape(len(x), *(1,) * (x.ndim - 2), groups, 1)

  y = y - mean(y)
  y = y * jax.lax.rsqrt(mean(jnp.square(y)) + eps)
  wide = lambda array: array.astype(y.dtype)
  return y.reshape(x.shape) * wide(scale) + wide(bias)


class GroupNorm(nn.Module):
  """`group_norm` with a learned `scale` [c] and `bias` [c].

  Example:
    >>> y, variables = GroupNorm(2).init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 3, 8))
    ... )
    >>> y.shape, sorted(variables["params"])
    ((1, 3, 8), ['bias', 'scale'])
  """

  num_groups: int
  eps: float = 1e-6
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *space c"]
  ) -> Float[Array, "b *space c"]:
    shape = (x.shape[-1],)
    if shape[0] % self.num_groups:
      raise ValueError(f"{shape[0]} channels in {self.num_groups} groups")
    scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
    return group_norm(x, scale, bias, groups=self.num_groups, eps=self.eps)


def make_norm(
  norm: Norm,
  shape: tuple[int, ...],
  *,
  train: bool = False,
  param_dtype: Any = jnp.float32,
  name: str | None = None,
) -> nn.Module:
  """A convolutional net's normalisation layer.

  Group normalisation has `count_groups` of the channels. Batch normalisation,
  by name or as a partial of `nn.BatchNorm`, reads and moves its statistics of
  the batch in training, and reads the running ones otherwise. The layers may
  return more than their input's precision: cast where that matters.

  Args:
    norm: "group", "batch", or a function `(param_dtype=, name=)`.
    shape: of the input, [b, *space, c].
    train: for batch normalisation.
    param_dtype: what is stored.
    name: of the layer.

  Raises:
    ValueError: another name; groups of one value each, for all become 0.

  Example:
    >>> make_norm("group", (1, 8, 8, 48)).num_groups
    24
    >>> batch = functools.partial(nn.BatchNorm, momentum=0.9)
    >>> make_norm(batch, (8, 48), train=True).use_running_average
    False
  """
  check_norm(norm)
  if norm == "group":
    groups = count_groups(shape[-1])
    if math.prod(shape[1:]) == groups:
      raise ValueError(
        f"{groups} groups of {shape[-1]} channels at 1 place have one value"
        " each, which becomes 0: take more places, or another norm"
      )
    return GroupNorm(groups, param_dtype=param_dtype, name=name)
  make: Any = nn.BatchNorm if norm == "batch" else norm
  kind = getattr(make, "func", make)
  options: dict[str, Any] = {}
  if isinstance(kind, type) and issubclass(kind, nn.BatchNorm):
    options["use_running_average"] = not train
  return make(param_dtype=param_dtype, name=name, **options)


def check_norm(norm: Norm) -> None:
  """Raises ValueError for what `make_norm` doesn't make.

  Example:
    >>> check_norm("layer")
    Traceback (most recent call last):
    ValueError: norm is 'layer'; it is 'group', 'batch', or makes a layer
  """
  if not callable(norm) and norm not in ("group", "batch"):
    raise ValueError(
      f"norm is {norm!r}; it is 'group', 'batch', or makes a layer"
    )


def count_groups(channels: int, *, most: int = 32) -> int:
  """The largest number of groups up to `most` that divides the channels.

  Example:
    >>> [count_groups(channels) for channels in (8, 30, 48, 64, 180)]
    [8, 30, 24, 32, 30]
  """
  return max(g for g in range(1, most + 1) if channels % g == 0)
