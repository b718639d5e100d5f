"""Feed-forward layers: width -> hidden -> width; residual stacks of them."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.nets.norm import RMSNorm
from isthmus.nets.stack import Stack, check_stack
from isthmus.pallas.dispatch import platform
from isthmus.pallas.precision import dot

#: Applied elementwise.
Activation = Callable[[jax.Array], jax.Array]


def fan_in(scale: float = 1.0) -> nn.initializers.Initializer:
  """Normal of standard deviation `scale / sqrt(inputs)`.

  Example:
    >>> kernel = fan_in()(jax.random.key(0), (1024, 64), jnp.float32)
    >>> print(f"{kernel.std():.3f}, {1024**-0.5:.3f}")
    0.031, 0.031
  """
  return nn.initializers.variance_scaling(scale**2, "fan_in", "normal")


# Rematerialised: the gate and the value are kept, not what lies between.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def gated(
  gate: Float[Array, "... f"],
  up: Float[Array, "... f"],
  activation: Activation,
) -> Float[Array, "... f"]:
  """`activation(gate) up`.

  Example:
    >>> gate, up = jnp.array([-1.0, 2.0]), jnp.array([3.0, 3.0])
    >>> gated(gate, up, jax.nn.relu).tolist()
    [0.0, 6.0]
  """
  return activation(gate) * up


class Mlp(nn.Module):
  """`down(activation(up(x)))`, without biases.

  Attributes:
    hidden: f, the inner width.
    activation: applied elementwise to the inner activations.
    out_scale: factor on the initial standard deviation of `down`.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Example:
    >>> y, variables = Mlp(32).init_with_output(
    ...   jax.random.key(0), jnp.ones((3, 8))
    ... )
    >>> y.shape, variables["params"]["up"]["kernel"].shape
    ((3, 8), (8, 32))
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

  Example:
    >>> y, variables = GatedMlp(32).init_with_output(
    ...   jax.random.key(0), jnp.ones((3, 8))
    ... )
    >>> y.shape, sorted(variables["params"])
    ((3, 8), ['down', 'gate', 'up'])

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


class MlpBlock(nn.Module):
  """The residual block `x + down(activation(up(norm(x))))`.

  With `hidden` above x's width it is the conventional feed-forward block; with
  `hidden` below, the hourglass's: the residual runs through the wide part.

  Attributes:
    hidden: f, the inner width.
    activation: applied elementwise to the inner activations.
    norm: makes the normalisation layer, such as `RMSNorm` or `nn.LayerNorm`.
    out_scale: factor on the initial standard deviation of `down`.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Example:
    >>> block = MlpBlock(4)  # narrower than x: an hourglass's
    >>> y, variables = block.init_with_output(
    ...   jax.random.key(0), jnp.ones((3, 8))
    ... )
    >>> y.shape, sorted(variables["params"])
    ((3, 8), ['mlp', 'norm'])
  """

  hidden: int
  activation: Activation = jax.nn.gelu
  norm: Callable[..., nn.Module] = RMSNorm
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
    mlp = Mlp(
      self.hidden,
      self.activation,
      out_scale=self.out_scale,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="mlp",
    )
    norm = self.norm(param_dtype=self.param_dtype, name="norm")
    return x + mlp(norm(x), train=train)


class ResidualMlp(nn.Module):
  """`depth` blocks `x + down(activation(up(norm(x))))` at x's own width.

  Attributes:
    hidden: f, the inner width of each block.
    depth: number of blocks.
    activation, norm, dtype, param_dtype: see `MlpBlock`.
    scan, mode: see `Stack`.

  Example:
    >>> model = ResidualMlp(hidden=32, depth=2)
    >>> x = jnp.ones((3, 8))
    >>> y, variables = model.init_with_output(jax.random.key(0), x)
    >>> y.shape
    (3, 8)
  """

  hidden: int
  depth: int
  activation: Activation = jax.nn.gelu
  norm: Callable[..., nn.Module] = RMSNorm
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scan: bool = True
  mode: str = "plain"

  def __post_init__(self):
    _check_hidden(self.hidden)
    check_stack(self.depth, self.mode)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "... m"], *, train: bool = False
  ) -> Float[Array, "... m"]:
    block = MlpBlock(
      self.hidden,
      self.activation,
      self.norm,
      out_scale=self.depth**-0.5,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      parent=None,
    )
    stack = Stack(
      block, self.depth, scan=self.scan, mode=self.mode, name="stack"
    )
    return stack(x, train=train)[0]


class HourglassMlp(nn.Module):
  """`readout(blocks(lift(x)))`: the residual runs at a width above x's own.

      z_0 = x W_in,   z_{i+1} = z_i + down_i(activation(up_i(norm_i(z_i)))),
      y = z_depth W_out

  with `W_in` [m, width], `W_out` [width, features] and blocks that narrow to
  `hidden`. Under `lift="random"` W_in is normal(1 / sqrt(m)) and never
  trained; the model's variables hold the typed key that it is drawn from, in
  the collection `lift`, and nothing else of it: no gradient, no optimiser
  state, a few bytes in a checkpoint.

  Attributes:
    width: of the residual, dz.
    hidden: inner width of the blocks, dh.
    depth: number of blocks.
    features: of the result; None: as many as the input has.
    lift: "random" or "trained".
    activation, norm, dtype, param_dtype: see `MlpBlock`.
    scan, mode: see `Stack`.

  Raises:
    ValueError: sizes below 1, another lift; when called, a width below the
      input's, which would be no lift.

  Example:
    >>> model = HourglassMlp(width=16, hidden=4, depth=2)
    >>> y, variables = model.init_with_output(
    ...   jax.random.key(0), jnp.ones((3, 8))
    ... )
    >>> y.shape, variables["lift"]["key"].shape
    ((3, 8), ())

  Reference: "Rethinking the shape convention of an MLP",
    https://arxiv.org/abs/2510.01796
  """

  width: int
  hidden: int
  depth: int
  features: int | None = None
  lift: Literal["random", "trained"] = "random"
  activation: Activation = jax.nn.gelu
  norm: Callable[..., nn.Module] = RMSNorm
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scan: bool = True
  mode: str = "plain"

  def __post_init__(self):
    _check_hidden(self.hidden)
    check_stack(self.depth, self.mode)
    for name in ("width", "features"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    if self.lift not in ("random", "trained"):
      raise ValueError(f"lift is {self.lift!r}, neither 'random' nor 'trained'")
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Float[Array, "... m"], *, train: bool = False
  ) -> Float[Array, "... y"]:
    m = x.shape[-1]
    if self.width < m:
      raise ValueError(
        f"width is {self.width}, below the input's {m}; a lift widens"
      )
    if self.lift == "random":
      key = self.variable("lift", "key", self.make_rng, "params")
      w_in = fan_in()(key.value, (m, self.width), self.param_dtype)
      z = dot("...m,mz->...z", x.astype(self.dtype), w_in.astype(self.dtype))
      z = z.astype(self.dtype)
    else:
      z = _dense(self, self.width, name="lift")(x)
    blocks = ResidualMlp(
      self.hidden,
      self.depth,
      self.activation,
      self.norm,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      scan=self.scan,
      mode=self.mode,
      name="blocks",
    )
    z = blocks(z, train=train)
    return _dense(self, self.features or m, name="readout")(z)


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
