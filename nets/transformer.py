"""A decoder of pre-norm blocks: RoPE, grouped-query attention, SwiGLU."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from isthmus.attention.cache import KVCache
from isthmus.attention.module import Attention, check_heads
from isthmus.attention.sdpa import attention, save_attention
from isthmus.nets.mlp import GatedMlp, fan_in
from isthmus.nets.norm import RMSNorm
from isthmus.nets.ops import embed_lookup, project
from isthmus.nets.rotary import RopeScaling, rope, rotation
from isthmus.nets.stack import Stack, check_stack


class Block(nn.Module):
  """`x <- x + attn(norm(x))`, `x <- x + mlp(norm(x))`.

  What is added are the branches `attend(x)` and `feed(x)`, which a stack of
  two streams runs on one stream each.

  Attributes:
    attn: returns (y, aux).
    mlp: returns y.
    dropout: rate on what is added to x, in training.
    eps: of the norms.
    param_dtype: of the norms.

  Example:
    >>> block = Block(Attention(4, 2, head_dim=8), GatedMlp(32))
    >>> (y, aux), variables = block.init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 3, 16))
    ... )
    >>> y.shape, sorted(variables["params"])
    ((1, 3, 16), ['attn', 'mlp', 'norm_attn', 'norm_mlp'])
  """

  attn: nn.Module
  mlp: nn.Module
  dropout: float = 0.0
  eps: float = 1e-6
  param_dtype: Any = jnp.float32

  branches: ClassVar[tuple[str, str]] = ("attend", "feed")

  def setup(self):
    for name in ("attn", "mlp"):
      norm = RMSNorm(eps=self.eps, param_dtype=self.param_dtype)
      setattr(self, f"norm_{name}", norm)
      if self.dropout:
        setattr(self, f"drop_{name}", nn.Dropout(self.dropout))

  def __call__(
    self, x: Float[Array, "b t m"], *, train: bool = False, **inputs: Any
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """Runs the block; `inputs` go to `attn`, whose aux is returned."""
    y, aux = self.attend(x, train=train, **inputs)
    x = x + y
    return x + self.feed(x, train=train), aux

  def attend(
    self, x: Float[Array, "b t m"], *, train: bool = False, **inputs: Any
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """What attention adds to x, and its aux; `inputs` go to `attn`."""
    y, aux = self.attn(self.norm_attn(x), train=train, **inputs)
    if self.dropout:
      y = self.drop_attn(y, deterministic=not train)
    return y, aux

  def feed(
    self, x: Float[Array, "b t m"], *, train: bool = False, **inputs: Any
  ) -> Float[Array, "b t m"]:
    """What `mlp` adds to x; `inputs` are those of `attend`, not read here."""
    y = self.mlp(self.norm_mlp(x), train=train)
    if self.dropout:
      y = self.drop_mlp(y, deterministic=not train)
    return y


class Decoder(nn.Module):
  """A causal language model.

  Initial weights: the token table is normal(0.02), so that tied logits start
  small; kernels are normal(1 / sqrt(inputs)), and those that write into the
  residual (`attn/o`, `mlp/down`) are smaller by sqrt(2 depth), so that its
  size does not grow with the depth; norms start at 1.

  Parameter paths: `embed/embedding` [v, m], `norm/scale` [m], `head/kernel`
  [m, v] if not tied, and under `stack/blocks` (`stack/block_00` if scan=False)
  `norm_attn/scale`, `attn/{q,k,v,o}/kernel`, `norm_mlp/scale` and
  `mlp/{gate,up,down}/kernel`, kernels being [inputs, outputs].

  Attributes:
    vocab_size: v; a multiple of 8 or more is faster on a GPU.
    width: m.
    depth: number of blocks.
    num_heads: n, query heads.
    num_kv_heads: k; default n.
    head_dim: d; default width / num_heads.
    hidden: f, inner width of the SwiGLU; default 8 m / 3 rounded up to 64.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: slows rotations down, for contexts longer than those of
      training: `LinearScaling` or `Llama3Scaling` of `isthmus.nets.rotary`.
    tied: the head's kernel is the token table.
    dropout: rate on the embedding and on what each layer adds, in training.
    logits_softcap: bounds logits to (-c, c) by `c tanh(x / c)`.
    eps: of the norms.
    dtype: what is multiplied; statistics and logits are float32.
    param_dtype: what is stored.
    attend: the attention mechanism, see `Attention`.
    scan, mode, policy, streams, grid, cache: see `Stack`. Mode "reversible"
      stores no layer's activations.
    stable_embedding: the token table is Xavier-uniform, within
      `sqrt(6 / (v + m))`, and its rows are normalised in float32 once they are
      looked up, by a LayerNorm `embed_norm/{scale,bias}` [m]. Tied logits then
      start larger.

  Raises:
    ValueError: sizes that don't fit, at construction.

  Example:
    >>> import jax
    >>> model = Decoder(vocab_size=64, width=32, depth=2, num_heads=4)
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> logits, aux = model.apply(variables, tokens)
    >>> logits.shape
    (1, 8, 64)

  Reference: https://arxiv.org/abs/2110.02861 (`stable_embedding`)
  """

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  hidden: int | None = None
  rope_theta: float = 1e4
  rope_scaling: RopeScaling | None = None
  tied: bool = True
  dropout: float = 0.0
  logits_softcap: float | None = None
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
  stable_embedding: bool = False

  def __post_init__(self):
    check_stack(
      self.depth,
      self.mode,
      scan=self.scan,
      streams=self.streams,
      cache=self.cache,
    )
    for name in ("vocab_size", "width", "num_heads"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
    if self.head_dim is None and self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not a multiple of num_heads {self.num_heads}"
      )
    _, kv_heads, head_dim, hidden = self.sizes
    check_heads(self.num_heads, kv_heads)
    if head_dim < 2 or head_dim % 2:
      raise ValueError(f"head_dim is {head_dim}; rotary positions pair it up")
    if hidden < 1:
      raise ValueError(f"hidden is {hidden}; it is at least 1")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout is {self.dropout}, not in [0, 1)")
    if self.logits_softcap is not None and not self.logits_softcap > 0:
      raise ValueError(f"logits_softcap is {self.logits_softcap}, not above 0")
    super().__post_init__()

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """(num_heads, num_kv_heads, head_dim, hidden), defaults filled in."""
    kv_heads = self.num_kv_heads
    head_dim, hidden = self.head_dim, self.hidden
    return (
      self.num_heads,
      self.num_heads if kv_heads is None else kv_heads,
      self.width // self.num_heads if head_dim is None else head_dim,
      -(-8 * self.width // (3 * 64)) * 64 if hidden is None else hidden,
    )

  def setup(self):
    self.embed = Table(
      self.vocab_size,
      self.width,
      self.param_dtype,
      xavier=self.stable_embedding,
    )
    if self.stable_embedding:
      self.embed_norm = nn.LayerNorm(
        epsilon=self.eps, dtype=jnp.float32, param_dtype=self.param_dtype
      )
    self.stack = self._stack()
    self.norm = RMSNorm(eps=self.eps, param_dtype=self.param_dtype)
    if self.dropout:
      self.drop = nn.Dropout(self.dropout)
    if not self.tied:
      self.head = Kernel(self.width, self.vocab_size, self.param_dtype)

  def _stack(self) -> nn.Module:
    """All layers."""
    return Stack(
      self._block(attend=self.attend),
      self.depth,
      scan=self.scan,
      mode=self.mode,
      policy=self.policy,
      streams=self.streams,
      grid=self.grid,
      cache=self.cache,
    )

  def _block(self, **fields: Any) -> Block:
    """A layer; `fields` are those that its `Attention` has besides."""
    n, k, d, hidden = self.sizes
    kinds: dict[str, Any] = {
      "out_scale": (2 * self.depth) ** -0.5,
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
      "parent": None,
    }
    return Block(
      Attention(n, k, d, **fields, **kinds),
      GatedMlp(hidden, **kinds),
      dropout=self.dropout,
      eps=self.eps,
      param_dtype=self.param_dtype,
      parent=None,
    )

  def _start(self, cache: Any) -> Any:
    """Where the tokens after a cache stand."""
    return cache.length[0]

  def _inputs(self, turn: Any, cache: Any) -> tuple[Any, dict[str, Any]]:
    """(inputs of which each layer has its own, those that all share)."""
    return {} if cache is None else {"cache": cache}, {"turn": turn}

  def __call__(
    self,
    tokens: Int[Array, "b t"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "#b t"] | None = None,
    cache: KVCache | tuple[Any, ...] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b t v"], dict[str, Any]]:
    """Logits of the token after each.

    Args:
      tokens: ids in [0, v).
      segment_ids: documents packed into a row; attention stays within each.
      positions: what rotates queries and keys, and with a cache also what
        causality compares; default 0, 1, ..., after the cache's length.
      cache: from `init_cache`; the tokens are appended to it.
      train: applies dropout, with the rng `dropout`.

    Returns:
      (logits, aux): logits in float32; aux has `hidden` [b t m], what the head
      reads, and `cache`, the longer one, if one was given.
    """
    t = tokens.shape[1]
    if positions is None:
      start = 0 if cache is None else self._start(cache)
      positions = (start + jnp.arange(t, dtype=jnp.int32))[None]
    _, _, head_dim, _ = self.sizes
    turn = rotation(
      positions,
      head_dim=head_dim,
      theta=self.rope_theta,
      scaling=self.rope_scaling,
    )
    layers, shared = self._inputs(jax.tree_util.Partial(rope, turn=turn), cache)
    shared["train"] = train
    if cache is not None:
      shared["positions"] = positions.astype(jnp.int32)
    if segment_ids is not None:
      shared["segment_ids"] = segment_ids
    x = self._embedded(tokens)
    if self.dropout:
      x = self.drop(x, deterministic=not train)
    x, aux = self.stack(x, layers=layers, **shared)
    hidden = self.norm(x)
    return self.project(hidden), {**aux, "hidden": hidden}

  def _embedded(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t m"]:
    if not self.stable_embedding:
      return embed_lookup(self.embed().astype(self.dtype), tokens)
    return self.embed_norm(embed_lookup(self.embed(), tokens)).astype(
      self.dtype
    )

  def project(self, hidden: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
    """Logits of `aux["hidden"]`, or of some of its tokens."""
    kernel = self.embed().T if self.tied else self.head()
    logits = project(hidden, kernel, dtype=self.dtype)
    if self.logits_softcap is not None:
      cap = self.logits_softcap
      logits = cap * jnp.tanh(logits / cap)
    return logits

  def init_cache(self, *, batch: int, capacity: int, dtype: Any = None) -> Any:
    """An empty cache of all layers; by default in the compute dtype."""
    _, kv_heads, head_dim, _ = self.sizes
    return KVCache.init(
      batch=batch,
      capacity=capacity,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      depth=self.depth,
      dtype=self.dtype if dtype is None else dtype,
    )

  def param_count(self) -> int:
    """Number of parameters."""
    table = self.vocab_size * self.width
    norms = (2 * self.depth + 1) * self.width
    norms += 2 * self.width if self.stable_embedding else 0
    return self._matmul_params() + norms + (table if not self.tied else 0)

  def flops_per_token(self, seq_len: int) -> float:
    """Model FLOPs of a training step (forward and backward), per token.

    `6 P + 6 depth seq_len n d`, with P the parameters that are multiplied
    (the head included, the lookup of the embedding not): 2 for the forward
    and 4 for the backward pass. The second term is causal attention's two
    matmuls, half of the square's `12 depth seq_len n d`. Recomputation, norms
    and the optimiser are not counted.

    Args:
      seq_len: tokens in a row.
    """
    n, _, d, _ = self.sizes
    return 6 * self._matmul_params() + 6 * self.depth * seq_len * n * d

  def _matmul_params(self) -> int:
    n, k, d, hidden = self.sizes
    layer = 2 * self.width * (n + k) * d + 3 * self.width * hidden
    return self.depth * layer + self.vocab_size * self.width


class Table(nn.Module):
  """The parameter `embedding` [v, m], normal(0.02) or Xavier-uniform.

  Example:
    >>> table, variables = Table(64, 16).init_with_output(jax.random.key(0))
    >>> table.shape, list(variables["params"])
    ((64, 16), ['embedding'])
  """

  rows: int
  width: int
  param_dtype: Any = jnp.float32
  xavier: bool = False

  @nn.compact
  def __call__(self) -> Float[Array, "v m"]:
    draw = nn.initializers.normal(0.02)
    if self.xavier:
      draw = nn.initializers.xavier_uniform()
    return self.param(
      "embedding",
      draw,
      (self.rows, self.width),
      self.param_dtype,
    )


class Kernel(nn.Module):
  """The parameter `kernel` [inputs, outputs], normal(1 / sqrt(inputs)).

  Example:
    >>> kernel, variables = Kernel(16, 64).init_with_output(jax.random.key(0))
    >>> kernel.shape, list(variables["params"])
    ((16, 64), ['kernel'])
  """

  inputs: int
  outputs: int
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self) -> Float[Array, "m v"]:
    return self.param(
      "kernel", fan_in(), (self.inputs, self.outputs), self.param_dtype
    )
