"""Projections around a mechanism of attention."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from isthmus.attention.decode import decode
from isthmus.attention.kconv import KeyConv, KeyConvCache
from isthmus.attention.layer import (
  LayerCache,
  bound_moba,
  check_cache,
  check_moba,
  init_cache,
  parts,
  read_blocks,
)
from isthmus.attention.mask import Window, check_window
from isthmus.attention.moba import moba
from isthmus.attention.moba_cache import MobaCache
from isthmus.attention.sdpa import attention

#: Queries up to which a cache is read by `decode`: it holds all their scores.
FEW = 8
# Arguments of `attention` that `decode` takes too.
_DECODE = {"causal", "window", "scale", "softcap", "sinks", "shard_axes"}


class Attention(nn.Module):
  """Projections around one call of an attention mechanism.

  `y = attend(turn(q(x)), turn(k(x)), v(x)) o`, with kernels `q` [m, n d],
  `k` [m, k d], `v` [m, k dv] and `o` [n dv, m], normal(1 / sqrt(inputs)).

  Attributes:
    num_heads: n, query heads.
    num_kv_heads: k, of which n is a multiple.
    head_dim: d.
    attend: the mechanism, `isthmus.attention.attention` or one that takes the
      same arguments; settings of its own are bound by `functools.partial`. It
      is passed those that are set here, and no others. With a cache and few
      queries, `attention` itself is replaced by `decode`, which is equal. It
      may be `functools.partial(isthmus.attention.moba, block=..., top_k=...)`,
      whose `max_segments` counts where there are segments.
    causal: queries see no later keys.
    out_scale: factor on the initial standard deviation of `o`.
    dtype: what is multiplied.
    param_dtype: what is stored.
    value_dim: dv; default d.
    window, scale, softcap: as in `attention`.
    dropout: rate on the probabilities in training, with the rng `dropout`.
    sinks: a learned logit per head joins the denominator, `sinks` [n].
    qkv_bias: biases in `q`, `k` and `v`.
    out_bias: a bias in `o`.
    qk_norm: makes a module for the heads of queries, `q_norm`, and one for
      those of keys, `k_norm`, such as `isthmus.nets.RMSNorm`; called with
      `name` and `param_dtype`.
    kconv: width of a `KeyConv` of the keys, before their norm and turn; None
      for none.
    dense_decode: of moba with a cache: up to 8 queries read all keys, as its
      authors' code decodes. By default they read the blocks that they choose,
      as they did in training.

  Raises:
    ValueError: sizes or settings that don't fit, at construction.

  Example:
    >>> layer = Attention(num_heads=4, num_kv_heads=2, head_dim=8)
    >>> (y, aux), variables = layer.init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 3, 16))
    ... )
    >>> y.shape, variables["params"]["k"]["kernel"].shape
    ((1, 3, 16), (16, 16))
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  attend: Callable[..., Any] = attention
  causal: bool = True
  out_scale: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  value_dim: int | None = None
  window: Window = None
  scale: float | None = None
  softcap: float | None = None
  dropout: float = 0.0
  sinks: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: Callable[..., nn.Module] | None = None
  kconv: int | None = None
  dense_decode: bool = False

  def __post_init__(self):
    check_heads(self.num_heads, self.num_kv_heads)
    for name in ("num_heads", "head_dim", "value_dim"):
      size = getattr(self, name)
      if size is not None and size < 1:
        raise ValueError(f"{name} is {size}; it is at least 1")
    check_window(self.window)
    if self.softcap is not None and not self.softcap > 0:
      raise ValueError(f"softcap is {self.softcap}; it must be above 0")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout is {self.dropout}, not in [0, 1)")
    if self.kconv is not None and self.kconv < 1:
      raise ValueError(f"kconv is {self.kconv}; it is at least 1, or None")
    check_moba(
      self.attend,
      dense_decode=self.dense_decode,
      window=self.window,
      softcap=self.softcap,
      dropout=self.dropout or None,
      sinks=self.sinks or None,
    )
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t m"],
    *,
    kv: Float[Array, "b s c"] | None = None,
    turn: Callable[[jax.Array], jax.Array] | None = None,
    kv_turn: Callable[[jax.Array], jax.Array] | None = None,
    positions: Int[Array, "#b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    mask: Any = None,
    cache: LayerCache | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b t m"], dict[str, Any]]:
    """Attends within x, to kv, or to a cache that x is first appended to.

    Args:
      x: activations; queries come from them.
      kv: where keys and values come from, for cross attention; default x. It
        takes part in causality as keys do: aligned at the end.
      turn: applied to queries [b t n d], and to keys if they come from x, such
        as `jax.tree_util.Partial(rope, turn=rotation(...))`.
      kv_turn: applied to the keys of kv.
      positions: int32, of x; causality and the window compare them. By default
        those after the cache's, or 0, 1, ....
      segment_ids: attention stays within equal ids; not with a cache.
      kv_segment_ids: ids of kv.
      mask: a `BlockMask`; with a cache, over all of its slots.
      cache: keys and values of the past, from `init_cache`.
      train: applies dropout.

    Returns:
      (y, aux); aux has `cache`, the longer one, if one was given.

    Raises:
      ValueError: arguments that exclude each other.
    """
    _check_inputs(kv, kv_turn, positions, segment_ids, kv_segment_ids, cache)
    self._check_call(kv, positions, mask, cache)
    (b, t, width), n, k = x.shape, self.num_heads, self.num_kv_heads
    d, dv = self.head_dim, self.value_dim or self.head_dim
    source = x if kv is None else kv
    dense = functools.partial(self._dense, use_bias=self.qkv_bias)
    q = dense(n * d, "q")(x).reshape(b, t, n, d)
    key = dense(k * d, "k")(source).reshape(b, -1, k, d)
    value = dense(k * dv, "v")(source).reshape(b, -1, k, dv)
    if cache is not None and positions is None:
      positions = (cache.length + jnp.arange(t, dtype=jnp.int32))[None]
    if self.kconv is not None:
      conv = KeyConv(self.kconv, self.param_dtype, name="k_conv")
      past: dict[str, Any] = {"segment_ids": segment_ids}
      if isinstance(cache, KeyConvCache):
        past = {"tail": cache.tail, "positions": positions}
      key, conv_aux = conv(key, **past)
    if (norm := self.qk_norm) is not None:
      kind = {"param_dtype": self.param_dtype}
      q = norm(name="q_norm", **kind)(q).astype(q.dtype)
      key = norm(name="k_norm", **kind)(key).astype(key.dtype)
    kv_turn = turn if kv is None else kv_turn
    q = q if turn is None else turn(q)
    key = key if kv_turn is None else kv_turn(key)

    settings = self._settings(train)
    if mask is not None:
      settings["mask"] = mask
    if segment_ids is not None:
      settings["segment_ids"] = segment_ids
    if kv_segment_ids is not None:
      settings["kv_segment_ids"] = kv_segment_ids
    if cache is None:
      if positions is not None:
        settings["q_positions"] = settings["kv_positions"] = positions[:, None]
      attend = self.attend
      if segment_ids is None and (bound := bound_moba(attend)) is not None:
        # There are no segments to count.
        bound = {k: v for k, v in bound.items() if k != "max_segments"}
        attend = functools.partial(moba, **bound)
      o, aux = attend(q, key, value, **settings), {}
    else:
      wrapped = isinstance(cache, KeyConvCache)
      inner = cache.cache if isinstance(cache, KeyConvCache) else cache
      inner = inner.append(key, value, positions=positions)
      o = self._read(q, inner, positions, settings)
      longer = KeyConvCache(inner, conv_aux["tail"]) if wrapped else inner
      aux = {"cache": longer}
    o = o.reshape(b, t, n * dv)
    out = self._dense(width, "o", use_bias=self.out_bias, scale=self.out_scale)
    return out(o), aux

  def _check_call(self, kv, positions, mask, cache) -> None:
    """Refuses what moba or a convolution of keys can't do."""
    blocks = bound_moba(self.attend)
    kinds = {"moba": blocks is not None, "kconv": self.kconv is not None}
    for name in (name for name, there in kinds.items() if there):
      if kv is not None:
        raise ValueError(f"{name} is of a row's own keys; kv is given")
      if cache is None and positions is not None:
        raise ValueError(
          f"{name} takes tokens as they stand; positions need a cache"
        )
    if blocks is not None and mask is not None:
      raise ValueError("moba has no mask: queries choose; mask is given")
    if blocks is not None and cache is not None and not self.causal:
      raise ValueError("moba reads a cache causally; causal is False")
    if cache is not None:
      block = None if blocks is None else blocks["block"]
      check_cache(cache, block=block, kconv=self.kconv)

  def init_cache(
    self, *, batch: int, capacity: int, dtype: Any = None
  ) -> LayerCache:
    """An empty cache of this layer; by default in the compute dtype.

    A `KVCache`, for moba a `MobaCache`, with `kconv` a `KeyConvCache` of it.
    """
    return init_cache(
      batch=batch,
      capacity=capacity,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      value_dim=self.value_dim,
      dtype=self.dtype if dtype is None else dtype,
      block=(bound_moba(self.attend) or {}).get("block"),
      kconv=self.kconv,
    )

  def _read(self, q, cache, positions, settings):
    """Attention to the cache."""
    func, bound = parts(self.attend)
    given, few = {**bound, **settings}, q.shape[1] <= FEW
    if isinstance(cache, MobaCache):
      dense = few and self.dense_decode
      return read_blocks(q, cache, positions, given, few=few, dense=dense)
    if func is attention and few and given.keys() <= _DECODE:
      return decode(q, cache, positions=positions, **given)
    return self.attend(
      q,
      cache.k.astype(q.dtype),
      cache.v.astype(q.dtype),
      q_positions=positions[:, None],
      kv_positions=cache.positions[:, None],
      **settings,
    )

  def _settings(self, train) -> dict[str, Any]:
    """What the mechanism is told, as far as it is set."""
    settings: dict[str, Any] = {"causal": self.causal}
    for name in ("window", "scale", "softcap"):
      if getattr(self, name) is not None:
        settings[name] = getattr(self, name)
    if self.sinks:
      settings["sinks"] = self.param(
        "sinks", nn.initializers.zeros, (self.num_heads,), self.param_dtype
      )
    if self.dropout and train:
      settings["dropout_rate"] = self.dropout
      settings["dropout_key"] = self.make_rng("dropout")
    return settings

  def _dense(self, features, name, *, use_bias, scale=1.0) -> nn.Dense:
    return nn.Dense(
      features,
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=nn.initializers.variance_scaling(
        scale**2, "fan_in", "normal"
      ),
      name=name,
    )


def check_heads(num_heads: int, num_kv_heads: int) -> None:
  """Raises ValueError for query heads that kv heads can't be shared among.

  Example:
    >>> check_heads(4, 3)
    Traceback (most recent call last):
    ValueError: num_heads 4 is not a multiple of num_kv_heads 3
  """
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(
      f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}"
    )


def _check_inputs(
  kv, kv_turn, positions, segment_ids, kv_segment_ids, cache
) -> None:
  if cache is not None and segment_ids is not None:
    raise ValueError("segment_ids and a cache are not taken together")
  if cache is not None and kv is not None:
    raise ValueError("kv and a cache are not taken together")
  if kv is None:
    for name, x in (("kv_turn", kv_turn), ("kv_segment_ids", kv_segment_ids)):
      if x is not None:
        raise ValueError(f"{name} is given without kv")
  elif positions is not None:
    raise ValueError("kv and positions are not taken together")
