"""A Vision Transformer: an image's patches as the tokens of a transformer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.attention.module import Attention
from isthmus.attention.sdpa import attention, save_attention
from isthmus.nets.mlp import Mlp, fan_in
from isthmus.nets.norm import RMSNorm
from isthmus.nets.stack import Stack, check_stack
from isthmus.nets.transformer import Block, Table
from isthmus.pallas.precision import accumulator


class ViT(nn.Module):
  """A classifier of images.

  Each square of `patch` x `patch` pixels is one token, its pixels times one
  kernel plus a learned position; every token attends to all. Logits are read
  from the mean of the normalised tokens.

  Initial weights: positions and the head's kernel are normal(0.02), so that
  logits start small; kernels are normal(1 / sqrt(inputs)), and those that
  write into the residual (`attn/o`, `mlp/down`) are smaller by
  sqrt(2 depth); norms start at 1.

  Parameter paths: `patchify/kernel` [patch patch c, m], its inputs ordered
  (y, x, c); `positions/embedding` [t, m], row by row of the image;
  `norm/scale` [m], `head/kernel` [m, v], `head/bias` [v], and under
  `stack/blocks` (`stack/block_00` if scan=False) `norm_attn/scale`,
  `attn/{q,k,v,o}/kernel`, `norm_mlp/scale` and `mlp/{up,down}/kernel`, kernels
  being [inputs, outputs].

  Attributes:
    classes: v.
    size: pixels of a side, or of (y, x).
    patch: pixels of a patch's side.
    width: m.
    depth: number of blocks.
    num_heads: n, each m / n wide.
    channels: c, of the image.
    hidden: f, inner width of the Mlp; default 4 m.
    dropout: rate on the tokens and on what each layer adds, in training.
    eps: of the norms.
    dtype: what is multiplied; statistics, the mean over tokens and the head
      are float32.
    param_dtype: what is stored.
    attend: the attention mechanism, see `Attention`.
    scan, mode, policy, streams, grid, cache: see `Stack`. Mode "reversible"
      stores no layer's activations.

  Raises:
    ValueError: sizes that don't fit, at construction; when called, an image of
      another shape.

  Example:
    >>> import jax
    >>> model = ViT(classes=10, size=8, patch=2, width=32, depth=2, num_heads=4)
    >>> (logits, aux), variables = model.init_with_output(
    ...   jax.random.key(0), jnp.ones((5, 8, 8, 3))
    ... )
    >>> logits.shape, aux["hidden"].shape
    ((5, 10), (5, 16, 32))

  Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv
    2010.11929; here with RMSNorm, without biases but the head's, and with a
    mean in place of the class token.
  """

  classes: int
  size: int | tuple[int, int]
  patch: int
  width: int
  depth: int
  num_heads: int
  channels: int = 3
  hidden: int | None = None
  dropout: float = 0.0
  eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  attend: Callable[..., Any] = attention
  scan: bool = True
  mode: str = "plain"
  policy: Callable[..., Any] | None = save_attention
  streams: int | None = None
  grid: int | None = 12
  cache: float = 0.0

  def __post_init__(self):
    check_stack(
      self.depth,
      self.mode,
      scan=self.scan,
      streams=self.streams,
      cache=self.cache,
    )
    for name in ("classes", "patch", "width", "num_heads", "channels"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if self.hidden is not None and self.hidden < 1:
      raise ValueError(f"hidden is {self.hidden}; it is at least 1")
    for axis, side in zip("yx", self.sides, strict=True):
      if side < 1 or side % self.patch:
        raise ValueError(
          f"size {side} along {axis} is not a multiple of patch {self.patch}"
        )
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not a multiple of num_heads {self.num_heads}"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout is {self.dropout}, not in [0, 1)")
    super().__post_init__()

  @property
  def sides(self) -> tuple[int, int]:
    """Pixels of (y, x)."""
    if isinstance(self.size, int):
      return self.size, self.size
    y, x = self.size
    return y, x

  @property
  def tokens(self) -> int:
    """t, patches of an image."""
    y, x = self.sides
    return (y // self.patch) * (x // self.patch)

  @nn.compact
  def __call__(
    self, image: Float[Array, "b y x c"], *, train: bool = False
  ) -> tuple[Float[Array, "b v"], dict[str, Any]]:
    """Logits of each image's class.

    Args:
      image: of the sides and channels that the net was built for.
      train: applies dropout, with the rng `dropout`.

    Returns:
      (logits, aux): logits in float32; aux has `hidden` [b t m], the tokens
      whose mean the head reads.
    """
    self._check_shape(image.shape[1:])
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    project = nn.Dense(
      self.width, use_bias=False, kernel_init=fan_in(), name="patchify", **kinds
    )
    x = project(patches(image, self.patch))
    table = Table(self.tokens, self.width, self.param_dtype, name="positions")
    x = x + table().astype(x.dtype)
    if self.dropout:
      x = nn.Dropout(self.dropout, name="drop")(x, deterministic=not train)
    x, _ = self._stack(kinds)(x, train=train)
    norm = RMSNorm(eps=self.eps, param_dtype=self.param_dtype, name="norm")
    hidden = norm(x)
    wide = accumulator(self.dtype)
    head = nn.Dense(
      self.classes,
      dtype=wide,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.normal(0.02),
      name="head",
    )
    return head(hidden.astype(wide).mean(1)), {"hidden": hidden}

  def _stack(self, kinds: dict[str, Any]) -> Stack:
    out_scale = (2 * self.depth) ** -0.5
    attn = Attention(
      self.num_heads,
      self.num_heads,
      self.width // self.num_heads,
      attend=self.attend,
      causal=False,
      out_scale=out_scale,
      parent=None,
      **kinds,
    )
    block = Block(
      attn,
      Mlp(self._hidden, out_scale=out_scale, parent=None, **kinds),
      dropout=self.dropout,
      eps=self.eps,
      param_dtype=self.param_dtype,
      parent=None,
    )
    return Stack(
      block,
      self.depth,
      scan=self.scan,
      mode=self.mode,
      policy=self.policy,
      streams=self.streams,
      grid=self.grid,
      cache=self.cache,
      name="stack",
    )

  def param_count(self) -> int:
    """Number of parameters."""
    norms = (2 * self.depth + 1) * self.width
    positions = self.tokens * self.width
    head = (self.width + 1) * self.classes
    return self._token_params() + norms + positions + head

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step (forward and backward) on an image.

    `6 t P + 12 depth t^2 m + 6 m v`, with P the parameters that each of the t
    tokens is multiplied by: 2 for the forward and 4 for the backward pass. The
    second term is attention's two matmuls, the third the head's. What is
    computed again, norms and the optimiser are not counted.

    Args:
      shape: of the image, (y, x, c).
    """
    self._check_shape(shape)
    t, head = self.tokens, self.width * self.classes
    square = 2 * self.depth * t * t * self.width
    return 6.0 * (t * self._token_params() + square + head)

  @property
  def _hidden(self) -> int:
    return 4 * self.width if self.hidden is None else self.hidden

  def _token_params(self) -> int:
    layer = 4 * self.width**2 + 2 * self.width * self._hidden
    return self.patch**2 * self.channels * self.width + self.depth * layer

  def _check_shape(self, shape: tuple[int, ...]) -> None:
    built = (*self.sides, self.channels)
    if tuple(shape) != built:
      raise ValueError(
        f"an image of (y, x, c) = {tuple(shape)} in a net of {built}; set size"
        " and channels"
      )


def patches(
  image: Float[Array, "b y x c"], patch: int
) -> Float[Array, "b t p"]:
  """The pixels of each `patch` x `patch` square, squares and pixels by rows.

  Args:
    image: sides that are multiples of patch.
    patch: pixels.

  Example:
    >>> image = jnp.arange(8.0).reshape(1, 2, 4, 1)
    >>> patches(image, 2)[0].tolist()
    [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
  """
  b, y, x, c = image.shape
  z = image.reshape(b, y // patch, patch, x // patch, patch, c)
  z = z.transpose(0, 1, 3, 2, 4, 5)
  return z.reshape(b, -1, patch * patch * c)
