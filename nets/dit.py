"""A diffusion transformer: blocks that the time of a sampler modulates."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from isthmus.attention.reshape import reshaped
from isthmus.attention.sdpa import attention, save_attention
from isthmus.nets.mlp import Mlp, fan_in
from isthmus.nets.modulated import AdaBlock, StepAttention, modulated_norm
from isthmus.nets.ops import embed_lookup
from isthmus.nets.stack import Stack, check_stack
from isthmus.nets.transformer import Table
from isthmus.nets.vision.vit import patches
from isthmus.pallas.precision import accumulator


class DiT(nn.Module):
  """The velocity of a flow from noise to images, at a time in [0, 1].

  Each square of `patch` x `patch` pixels is one token; every token attends to
  all. A condition, of the time's sinusoids through a perceptron plus a class's
  embedding, modulates each layer (adaLN-zero): at the start all layers are the
  identity, and the velocity is 0.

  Parameter paths: `patchify/kernel` [patch patch c, m]; `time/{up,down}/kernel`
  [m, m]; `labels/embedding` [classes + 1, m], the last row being that of no
  class; `positions/embedding` [t, m] if they are learned; under `stack/blocks`
  (`stack/block_00` if scan=False) `attn/{q,k,v,o}/kernel`,
  `mlp/{up,down}/kernel` and `modulate_{attn,mlp}/{kernel,bias}`;
  `modulate_out/{kernel,bias}` and `head/{kernel,bias}`.

  Attributes:
    size: pixels of a side, or of (y, x).
    patch: pixels of a patch's side.
    width: m, a multiple of 4.
    depth: number of blocks.
    num_heads: n, each m / n wide.
    channels: c, of the image.
    classes: that a label may name; None for a net without labels.
    hidden: f, inner width of the Mlp; default 4 m.
    positions: "sincos", fixed, or "learned".
    eps: of the norms.
    dtype: what is multiplied; statistics and the head are float32.
    param_dtype: what is stored.
    attend: `(q, k, v) -> o` or, where a state is given,
      `(q, k, v, state, dense=...) -> (o, state)`, such as
      `functools.partial(isthmus.attention.rettention, window=...)`.
    scan, mode, policy, streams, grid, cache: see `Stack`. Mode "reversible"
      stores no layer's activations.

  Raises:
    ValueError: sizes that don't fit, at construction; when called, an image of
      another shape, or a label that the net has no table for.

  Example:
    >>> model = DiT(size=8, patch=2, width=32, depth=2, num_heads=4, classes=10)
    >>> x, t = jnp.ones((5, 8, 8, 3)), jnp.full((5,), 0.5)
    >>> (v, aux), variables = model.init_with_output(jax.random.key(0), x, t)
    >>> v.shape, float(jnp.abs(v).max())
    ((5, 8, 8, 3), 0.0)

  Reference: Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv
    2212.09748; here without biases in attention and perceptrons.
  """

  size: int | tuple[int, int]
  patch: int
  width: int
  depth: int
  num_heads: int
  channels: int = 3
  classes: int | None = None
  hidden: int | None = None
  positions: str = "sincos"
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
    for name in ("patch", "width", "num_heads", "channels", "classes"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it is at least 1")
    if self.hidden is not None and self.hidden < 1:
      raise ValueError(f"hidden is {self.hidden}; it is at least 1")
    for axis, side in zip("yx", self.sides, strict=True):
      if side < 1 or side % self.patch:
        raise ValueError(
          f"size {side} along {axis} is not a multiple of patch {self.patch}"
        )
    if self.width % 4 or self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not a multiple of 4 and of num_heads"
        f" {self.num_heads}"
      )
    if self.positions not in ("sincos", "learned"):
      raise ValueError(
        f"positions is {self.positions!r}, neither 'sincos' nor 'learned'"
      )
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
    self,
    x: Float[Array, "b y x c"],
    t: Float[Array, "b"],
    label: Int[Array, "b"] | None = None,
    *,
    train: bool = False,
    state: Any = None,
    dense: Bool[Array, ""] | bool | None = None,
  ) -> tuple[Float[Array, "b y x c"], dict[str, Any]]:
    """The velocity at x and t.

    Args:
      x: noisy images, of the sides and channels that the net was built for.
      t: their times; 1 is noise, 0 is data.
      label: classes; `classes` means none, as does no label at all.
      train: changes nothing, for there is no dropout.
      state: what `attend` carries, stacked along a leading axis of `depth`:
        from `init_state`, or the aux of the step before.
      dense: handed to `attend` with the state; may be traced.

    Returns:
      (velocity, aux): velocity in float32; aux has `state`, the next one, if
      one was given.
    """
    del train
    self._check(x.shape[1:], label)
    kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    c = self._condition(t, label, kinds)
    project = nn.Dense(
      self.width, use_bias=False, kernel_init=fan_in(), name="patchify", **kinds
    )
    z = project(patches(x, self.patch))
    z = z + self._positions().astype(z.dtype)
    layers = None if state is None else {"state": state}
    shared = {"c": c} if dense is None else {"c": c, "dense": dense}
    z, aux = self._stack(kinds)(z, layers=layers, **shared)

    modulate = nn.Dense(
      2 * self.width,
      kernel_init=nn.initializers.zeros,
      name="modulate_out",
      **kinds,
    )
    shift, scale = jnp.split(modulate(c), 2, axis=-1)
    z = modulated_norm(z, shift, scale, self.eps)
    wide = accumulator(self.dtype)
    head = nn.Dense(
      self.patch**2 * self.channels,
      dtype=wide,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.zeros,
      name="head",
    )
    v = head(z.astype(wide))
    return from_patches(v, self.patch, self.sides), aux

  def init_state(
    self, batch: int, make: Callable[[jax.Array], Any] = reshaped
  ) -> Any:
    """The state before the first step, of all layers.

    Args:
      batch: rows.
      make: gives a layer's, of an output of attention [b, t, n, d].

    Returns:
      What `make` gives, each leaf with a leading axis of `depth`.
    """
    n = self.num_heads
    shape = (batch, self.tokens, n, self.width // n)
    return jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (self.depth, *leaf.shape)),
      make(jnp.zeros(shape, self.dtype)),
    )

  def _condition(self, t, label, kinds):
    mlp = Mlp(self.width, nn.silu, name="time", **kinds)
    c = mlp(time_features(t, self.width).astype(self.dtype))
    if self.classes is not None:
      if label is None:
        label = jnp.full(t.shape, self.classes, jnp.int32)
      rows = self.classes + 1
      table = Table(rows, self.width, self.param_dtype, name="labels")()
      c = c + embed_lookup(table.astype(c.dtype), label[:, None])[:, 0]
    return nn.silu(c)

  def _positions(self):
    if self.positions == "learned":
      return Table(
        self.tokens, self.width, self.param_dtype, name="positions"
      )()
    y, x = (side // self.patch for side in self.sides)
    return jnp.asarray(place_features(y, x, self.width), jnp.float32)

  def _stack(self, kinds: dict[str, Any]) -> Stack:
    out_scale = (2 * self.depth) ** -0.5
    n = self.num_heads
    attn = StepAttention(
      n,
      self.width // n,
      attend=self.attend,
      out_scale=out_scale,
      parent=None,
      **kinds,
    )
    block = AdaBlock(
      attn,
      Mlp(self._hidden, out_scale=out_scale, parent=None, **kinds),
      self.width,
      eps=self.eps,
      parent=None,
      **kinds,
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
    tables = 0 if self.classes is None else (self.classes + 1) * self.width
    if self.positions == "learned":
      tables += self.tokens * self.width
    biases = (6 * self.depth + 2) * self.width + self.patch**2 * self.channels
    return self._token_params() + self._row_params() + tables + biases

  def flops_per_row(self, shape: tuple[int, ...]) -> float:
    """Model FLOPs of a training step (forward and backward) on an image.

    `6 t P + 12 depth t^2 m + 6 C`, with P the parameters that each of the t
    tokens is multiplied by and C those of the condition. The second term is
    attention's two matmuls.

    Args:
      shape: of the image, (y, x, c).
    """
    self._check(shape, None)
    t = self.tokens
    square = 2 * self.depth * t * t * self.width
    return 6.0 * (t * self._token_params() + square + self._row_params())

  @property
  def _hidden(self) -> int:
    return 4 * self.width if self.hidden is None else self.hidden

  def _token_params(self) -> int:
    layer = 4 * self.width**2 + 2 * self.width * self._hidden
    ends = 2 * self.patch**2 * self.channels * self.width
    return ends + self.depth * layer

  def _row_params(self) -> int:
    return (6 * self.depth + 4) * self.width**2

  def _check(self, shape, label) -> None:
    built = (*self.sides, self.channels)
    if tuple(shape) != built:
      raise ValueError(
        f"an image of (y, x, c) = {tuple(shape)} in a net of {built}; set size"
        " and channels"
      )
    if label is not None and self.classes is None:
      raise ValueError("a label is given to a net without classes; set classes")


def from_patches(
  tokens: Float[Array, "b t p"], patch: int, sides: tuple[int, int]
) -> Float[Array, "b y x c"]:
  """The image of these patches: undoes `isthmus.nets.vision.vit.patches`.

  Args:
    tokens: the pixels of each square.
    patch: pixels of a square's side.
    sides: pixels of (y, x).

  Example:
    >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> again = from_patches(patches(image, 2), 2, (4, 4))
    >>> bool((again == image).all())
    True
  """
  y, x = (side // patch for side in sides)
  z = tokens.reshape(len(tokens), y, x, patch, patch, -1)
  return z.transpose(0, 1, 3, 2, 4, 5).reshape(len(tokens), *sides, -1)


def time_features(
  t: Float[Array, "b"], width: int, *, scale: float = 1000.0
) -> Float[Array, "b {width}"]:
  """Cosines and sines of a time, at frequencies from `scale` to 1e-4 of it.

  Args:
    t: times in [0, 1].
    width: even; half of it cosines, then half of it sines.
    scale: the largest frequency, in radians.

  Example:
    >>> time_features(jnp.zeros(1), 4).tolist()
    [[1.0, 1.0, 0.0, 0.0]]
  """
  angle = t.astype(jnp.float32)[:, None] * (scale * _waves(width // 2))
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def place_features(y: int, x: int, width: int) -> Float[np.ndarray, "t m"]:
  """Sines and cosines of each place of a grid, row by row.

  A quarter each of sines and cosines of the row, then of the column.

  Args:
    y, x: sides of the grid.
    width: m, a multiple of 4.

  Example:
    >>> print(place_features(1, 2, 4).round(2))
    [[0.   1.   0.   1.  ]
     [0.   1.   0.84 0.54]]
  """
  grid = np.stack(np.meshgrid(np.arange(y), np.arange(x), indexing="ij"), -1)
  angle = grid.reshape(-1, 2, 1) * _waves(width // 4)
  features = np.stack([np.sin(angle), np.cos(angle)], 2)
  return features.reshape(y * x, width).astype(np.float32)


def _waves(count):
  """Frequencies from 1 down to 1e-4, the last one left out."""
  return (1e-4 ** (np.arange(count) / count)).astype(np.float32)
