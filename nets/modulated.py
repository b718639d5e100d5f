"""Blocks that a condition modulates, whose attention may keep a state."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from isthmus.attention.sdpa import attention
from isthmus.nets.mlp import fan_in
from isthmus.pallas.precision import accumulator


class StepAttention(nn.Module):
  """Self-attention that may carry a state from one call to the next.

  Parameters are those of `Attention`: `q`, `k`, `v`, `o`, each with `kernel`.

  Attributes:
    num_heads: n.
    head_dim: d.
    attend: `(q, k, v) -> o` or, if a state is given,
      `(q, k, v, state, dense=...) -> (o, state)`.
    out_scale: factor on the initial standard deviation of `o`.
    dtype: what is multiplied.
    param_dtype: what is stored.

  Example:
    >>> layer = StepAttention(num_heads=2, head_dim=8)
    >>> (y, aux), variables = layer.init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 3, 16))
    ... )
    >>> y.shape, aux, sorted(variables["params"])
    ((1, 3, 16), {}, ['k', 'o', 'q', 'v'])
  """

  num_heads: int
  head_dim: int
  attend: Callable[..., Any] = attention
  out_scale: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t m"],
    *,
    state: Any = None,
    dense: Bool[Array, ""] | bool | None = None,
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """(y, aux); aux has `state`, the next one, if one was given."""
    if (state is None) != (dense is None):
      raise ValueError("state and dense are given together, or neither is")
    (b, t, width), n, d = x.shape, self.num_heads, self.head_dim
    q, k, v = (
      self._project(n * d, name, 1.0)(x).reshape(b, t, n, d) for name in "qkv"
    )
    if state is None:
      o, aux = self.attend(q, k, v), {}
    else:
      o, state = self.attend(q, k, v, state, dense=dense)
      aux = {"state": state}
    out = self._project(width, "o", self.out_scale)
    return out(o.reshape(b, t, n * d)), aux

  def _project(self, features, name, scale):
    return nn.Dense(
      features,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=fan_in(scale),
      name=name,
    )


# Rematerialised as `rms_norm` is: x is kept, and no float32 copy of it.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def modulated_norm(
  x: Float[Array, "b t m"],
  shift: Float[Array, "b m"],
  scale: Float[Array, "b m"],
  eps: float,
) -> Float[Array, "b t m"]:
  """`(1 + scale) (x - mean) / sqrt(var + eps) + shift`, over the last axis.

  Args:
    x: activations; the result has their dtype.
    shift, scale: of each row.
    eps: keeps the root away from 0.

  Example:
    >>> x = jnp.array([[[-3.0, 3.0]]])
    >>> one = jnp.ones((1, 2))
    >>> modulated_norm(x, one, one, 0.0).tolist()
    [[[-1.0, 3.0]]]

  Reference: adaLN of https://arxiv.org/abs/2212.09748
  """
  wide = accumulator(x.dtype)
  y = x.astype(wide)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  shift, scale = (z.astype(wide)[:, None] for z in (shift, scale))
  return ((1 + scale) * y + shift).astype(x.dtype)


class AdaBlock(nn.Module):
  """`x <- x + gate attn(norm(x))`, `x <- x + gate mlp(norm(x))`.

  Shift and scale of each norm, and each gate, are linear in a condition, with
  kernels `modulate_attn`, `modulate_mlp` that start at 0: so does what is
  added. The two are the branches that a stack of two streams runs.

  Attributes:
    attn: returns (y, aux).
    mlp: returns y.
    width: m.
    eps: of the norms.
    dtype: what is multiplied; statistics are float32.
    param_dtype: what is stored.

  Example:
    >>> from isthmus.nets.mlp import Mlp
    >>> block = AdaBlock(StepAttention(2, head_dim=8), Mlp(32), width=16)
    >>> x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    >>> (y, aux), variables = block.init_with_output(
    ...   jax.random.key(0), x, c=jnp.ones((1, 16))
    ... )
    >>> bool((y == x).all()), sorted(variables["params"])
    (True, ['attn', 'mlp', 'modulate_attn', 'modulate_mlp'])
  """

  attn: nn.Module
  mlp: nn.Module
  width: int
  eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  branches: ClassVar[tuple[str, str]] = ("attend", "feed")

  def setup(self):
    self.modulate_attn = self._modulate()
    self.modulate_mlp = self._modulate()

  def _modulate(self):
    return nn.Dense(
      3 * self.width,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )

  def __call__(
    self, x: Float[Array, "b t m"], *, c: Float[Array, "b m"], **inputs: Any
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """Runs the block; `inputs` go to `attn`, whose aux is returned."""
    y, aux = self.attend(x, c=c, **inputs)
    x = x + y
    return x + self.feed(x, c=c), aux

  def attend(
    self, x: Float[Array, "b t m"], *, c: Float[Array, "b m"], **inputs: Any
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """What attention adds to x, and its aux; `inputs` go to `attn`."""
    shift, scale, gate = jnp.split(self.modulate_attn(c), 3, axis=-1)
    y, aux = self.attn(modulated_norm(x, shift, scale, self.eps), **inputs)
    return gate[:, None] * y, aux

  def feed(
    self, x: Float[Array, "b t m"], *, c: Float[Array, "b m"], **inputs: Any
  ) -> Float[Array, "b t m"]:
    """What `mlp` adds to x; `inputs` are those of `attend`, not read here."""
    shift, scale, gate = jnp.split(self.modulate_mlp(c), 3, axis=-1)
    return gate[:, None] * self.mlp(modulated_norm(x, shift, scale, self.eps))
