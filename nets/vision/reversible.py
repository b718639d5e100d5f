"""Reversible layers of Linen branches on two halves of the channels."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.nets.mbconv import conv
from isthmus.nets.mlp import Activation
from isthmus.nets.norm import Norm, make_norm
from isthmus.nets.reversible import reversible_stack


class ReversibleBlocks(nn.Module):
  """`depth` layers y1 = x1 + f(x2), y2 = x2 + g(y1), of Linen branches.

  Attributes:
    branch: the template of f and g; `(x, *, train) -> dx` of x's shape. Its
      parameters, `f` and `g`, have a leading axis of depth, and so have its
      running statistics, which a step moves once.
    depth: number of layers.
    dropout: probability that a channel of dx is dropped, in training.
    mode, cache, grid: see `reversible_stack`.

  Raises:
    ValueError: when initialised, a branch with other collections than params
      and batch_stats.

  Example:
    >>> from isthmus.nets.mbconv import MBConv
    >>> blocks = ReversibleBlocks(MBConv(parent=None), depth=3)
    >>> pair = (jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32),) * 2
    >>> (y1, y2), variables = jax.eval_shape(
    ...   blocks.init_with_output, jax.random.key(0), pair
    ... )
    >>> y1.shape, variables["params"]["f"]["expand"]["kernel"].shape
    ((1, 4, 4, 8), (3, 8, 32))
  """

  branch: nn.Module
  depth: int
  dropout: float = 0.0
  mode: str = "reversible"
  cache: float = 0.0
  grid: int | None = 12

  @nn.compact
  def __call__(
    self,
    x: tuple[Float[Array, "b *space c"], Float[Array, "b *space c"]],
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "b *space c"], Float[Array, "b *space c"]]:
    branch: Any = self.branch.clone(parent=None)

    @jax.jit
    def draw(key):
      # No parameter of a convolution depends on the extent.
      small = jnp.zeros((1, *(2,) * (x[0].ndim - 2), x[0].shape[-1]))
      keys = jax.random.split(key, self.depth)
      return jax.vmap(lambda key: dict(branch.init(key, small)))(keys)

    params = tuple(
      self.param(name, lambda key: draw(key)["params"]) for name in "fg"
    )
    kinds = set(jax.eval_shape(draw, jax.random.key(0)))
    if more := kinds - {"params", "batch_stats"}:
      raise ValueError(
        f"the branch has {', '.join(sorted(more))} besides params and"
        " batch_stats, which are all that reversible layers pass on"
      )
    stats = [
      self.variable(
        "batch_stats", name, lambda: draw(jax.random.key(0))["batch_stats"]
      )
      for name in "fg" * ("batch_stats" in kinds)
    ]
    moves = bool(stats) and train

    # Both branches, forwards and backwards, are one program: traced once.
    @jax.jit
    def run(params, x, key, state):
      variables = {"params": params}
      if state is not None:
        variables["batch_stats"] = state
      mutable = ["batch_stats"] if moves else []
      dx, new = branch.apply(variables, x, train=train, mutable=mutable)
      if key is not None:
        dx = _drop(dx, self.dropout, key)
      return dx, new["batch_stats"] if moves else state

    def add(params, x, *, key, state, aux):
      return run(params, x, key, state)

    y, state = reversible_stack(
      add,
      add,
      params,
      x,
      keys=self.make_rng("dropout") if self.dropout and train else None,
      state=tuple(s.value for s in stats) or None,
      mode=self.mode,
      cache=self.cache,
      grid=self.grid,
    )
    if state is not None and moves and not self.is_initializing():
      for variable, new in zip(stats, state, strict=True):
        variable.value = new
    return y


class ConvBlock(nn.Module):
  """`conv(activation(norm(x)))`, a full convolution of three taps an axis.

  Attributes:
    norm, activation, dtype, param_dtype: see `MBConv`.

  Example:
    >>> y, variables = ConvBlock().init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 4, 4, 4, 8))
    ... )
    >>> y.shape, variables["params"]["conv"]["kernel"].shape
    ((1, 4, 4, 4, 8), (3, 3, 3, 8, 8))
  """

  norm: Norm = "group"
  activation: Activation = jax.nn.leaky_relu
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b *space c"], *, train: bool = False
  ) -> Float[Array, "b *space c"]:
    def run(module, x):
      norm = make_norm(
        module.norm,
        x.shape,
        train=train,
        param_dtype=module.param_dtype,
        name="norm",
      )
      h = module.activation(norm(x)).astype(module.dtype)
      kernel = (3,) * (x.ndim - 2)
      return conv(module, x.shape[-1], kernel, scale=1.0, name="conv")(h)

    # So that x alone is kept; the convolution itself isn't computed again.
    return nn.remat(run)(self, x)

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step on x [*space, c]: 6 a multiplication."""
    *space, channels = shape
    return 6.0 * math.prod(space) * 3 ** len(space) * channels**2


def _drop(x, rate, key):
  """Zeros in whole channels of a row: neighbours would tell of a voxel."""
  shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
