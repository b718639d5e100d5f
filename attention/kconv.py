"""A short causal convolution of keys, before they are compared or read.

A key that carries its neighbours' content lifts the mean of its block, which
is what block routing compares queries with.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from isthmus.attention.mask import EMPTY
from isthmus.pallas.precision import accumulator


def kconv(
  k: Float[Array, "b t k d"],
  kernel: Float[Array, "w h c"],
  *,
  segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t k d"]:
  """`k'_t = k_t + silu(sum_{l < w} W_l k_{t - l})`, each channel by itself.

  Before the first token, and before a segment's first, there are zeros.

  Args:
    k: keys.
    kernel: W [w, k, d]; `kernel[l]` is that of the key l tokens back.
    segment_ids: a segment is a run of equal ids; nothing passes from one to
      the next.

  Returns:
    k' of k's dtype, summed in at least float32.

  Raises:
    ValueError: a kernel of other channels than the keys.

  Example:
    >>> k, ids = jnp.ones((1, 4, 1, 1)), jnp.array([[5, 5, 6, 6]])
    >>> taps = jnp.array([0.0, 100.0]).reshape(2, 1, 1)  # silu(100) = 100
    >>> kconv(k, taps).ravel().tolist()
    [1.0, 101.0, 101.0, 101.0]
    >>> kconv(k, taps, segment_ids=ids).ravel().tolist()
    [1.0, 101.0, 1.0, 101.0]

  Reference: https://arxiv.org/abs/2511.11571
  """
  _check(k, kernel)
  t, w = k.shape[1], kernel.shape[0]
  at = jnp.arange(t)[None]
  began = jnp.zeros_like(at)
  if segment_ids is not None:
    opens = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    began = jax.lax.cummax(jnp.where(opens, at, 0), axis=1)

  def back(l):
    moved = jnp.pad(k, ((0, 0), (l, 0), (0, 0), (0, 0)))[:, :t]
    # A product with 0 would let NaN through.
    return jnp.where((at - l >= began)[..., None, None], moved, 0)

  return _add(k, kernel, [back(l) for l in range(w)])


def extend_kconv(
  k: Float[Array, "b t k d"],
  kernel: Float[Array, "w h c"],
  tail: Float[Array, "b last h c"],
  *,
  positions: Int32[Array, "#b t"] | None = None,
) -> tuple[Float[Array, "b t k d"], Float[Array, "b last h c"]]:
  """`kconv` of the tokens that follow others.

  Args:
    k: keys of the new tokens.
    kernel: W.
    tail: the last w - 1 keys so far [b, w - 1, k, d], oldest first; zeros
      where there are none.
    positions: of the new tokens; those at EMPTY are padding, which is passed
      over: its own result means nothing, and no other token reads it.

  Returns:
    (k', the new tail).

  Example:
    >>> k, taps = jnp.ones((1, 3, 1, 1)), jnp.full((2, 1, 1), 50.0)
    >>> tail = jnp.zeros((1, 1, 1, 1))
    >>> for i in range(3):
    ...   new, tail = extend_kconv(k[:, i : i + 1], taps, tail)
    ...   print(new.item())
    51.0
    101.0
    101.0
  """
  _check(k, kernel)
  (b, t, heads, d), last = k.shape, kernel.shape[0] - 1
  if tail.shape != (b, last, heads, d):
    raise ValueError(f"tail {tail.shape}; it is {(b, last, heads, d)}")
  row = jnp.concatenate([tail.astype(k.dtype), k], axis=1)
  real = jnp.ones((b, last + t), bool)
  if positions is not None:
    real = real.at[:, last:].set(positions != EMPTY)
  # The real tokens of a row in their order, and how many come up to each.
  order = jnp.argsort(~real, axis=1, stable=True)
  count = jnp.cumsum(real, axis=1)

  def pick(rank):
    where = jnp.take_along_axis(order, jnp.maximum(rank, 0), axis=1)
    return jnp.take_along_axis(row, where[..., None, None], axis=1)

  rank = count[:, last:] - 1
  taps = [k, *(pick(rank - l) for l in range(1, last + 1))]
  ends = count[:, -1:] - last + jnp.arange(last)[None]
  return _add(k, kernel, taps), pick(ends).astype(tail.dtype)


def _add(k, kernel, taps):
  wide = accumulator(k.dtype)
  kernel = kernel.astype(wide)
  x = sum(kernel[l] * tap.astype(wide) for l, tap in enumerate(taps))
  return (k.astype(wide) + jax.nn.silu(x)).astype(k.dtype)


def _check(k, kernel) -> None:
  if kernel.shape[1:] != k.shape[2:] or not len(kernel):
    raise ValueError(
      f"kernel {kernel.shape} for keys of {k.shape[2:]}; it is (w, *those)"
    )


class KeyConv(nn.Module):
  """`kconv` with a learned `kernel` [w, k, d], at first normal(0.02).

  Attributes:
    width: w, its taps.
    param_dtype: what is stored.

  Raises:
    ValueError: a width below 1, at construction.

  Example:
    >>> (y, aux), variables = KeyConv(3).init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 5, 2, 8))
    ... )
    >>> y.shape, variables["params"]["kernel"].shape, aux
    ((1, 5, 2, 8), (3, 2, 8), {})
  """

  width: int
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if self.width < 1:
      raise ValueError(f"width is {self.width}; it is at least 1")
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    k: Float[Array, "b t k d"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    tail: Float[Array, "b last k d"] | None = None,
    positions: Int32[Array, "#b t"] | None = None,
  ) -> tuple[Float[Array, "b t k d"], dict[str, Any]]:
    """The new keys; with a `tail`, aux has the `tail` of the next tokens."""
    kernel = self.param(
      "kernel",
      nn.initializers.normal(0.02),
      (self.width, *k.shape[2:]),
      self.param_dtype,
    )
    if tail is None:
      return kconv(k, kernel, segment_ids=segment_ids), {}
    k, tail = extend_kconv(k, kernel, tail, positions=positions)
    return k, {"tail": tail}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyConvCache:
  """A layer's cache of convolved keys, and the last keys before that.

  Attributes:
    cache: a `KVCache`, or another one of a layer.
    tail: [b w-1 k d], see `extend_kconv`.

  Example:
    >>> from isthmus.attention.cache import KVCache
    >>> inner = KVCache.init(batch=1, capacity=8, num_kv_heads=2, head_dim=4)
    >>> cache = KeyConvCache.init(inner, width=3)
    >>> cache.tail.shape, int(cache.length)
    ((1, 2, 2, 4), 0)
  """

  cache: Any
  tail: Any

  @classmethod
  def init(cls, cache: Any, *, width: int) -> "KeyConvCache":
    """Around an empty cache."""
    b, _, heads, d = cache.k.shape
    return cls(cache, jnp.zeros((b, width - 1, heads, d), cache.k.dtype))

  @property
  def length(self) -> Int32[Array, ""]:
    """The slots written so far."""
    return self.cache.length
