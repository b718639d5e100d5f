"""Layers of attention that choose blocks or convolve keys: caches, refusals."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from isthmus.attention.cache import KVCache
from isthmus.attention.decode import decode
from isthmus.attention.kconv import KeyConvCache
from isthmus.attention.moba import moba
from isthmus.attention.moba_cache import MobaCache, is_lost
from isthmus.attention.moba_decode import moba_decode, moba_prefill

#: What a layer appends its keys and values to.
LayerCache = KVCache | MobaCache | KeyConvCache
# Arguments of `moba` that may be bound.
_MOBA = {"block", "top_k", "max_segments", "impl"}


def parts(attend: Callable[..., Any]) -> tuple[Any, Mapping[str, Any]]:
  """(function, bound keywords) of a mechanism.

  Example:
    >>> parts(functools.partial(moba, block=4, top_k=2))[1]
    {'block': 4, 'top_k': 2}
  """
  if isinstance(attend, functools.partial) and not attend.args:
    return attend.func, attend.keywords
  return attend, {}


def bound_moba(attend: Callable[..., Any]) -> Mapping[str, Any] | None:
  """What moba is bound to, if it is the mechanism.

  Example:
    >>> bound_moba(functools.partial(moba, block=4, top_k=2))["block"]
    4
    >>> bound_moba(decode) is None
    True
  """
  func, bound = parts(attend)
  return bound if func is moba else None


def check_moba(
  attend: Callable[..., Any], *, dense_decode: bool = False, **settings: Any
) -> None:
  """Raises ValueError for settings of a layer that moba doesn't have.

  Args:
    attend: the mechanism.
    dense_decode: see `Attention`.
    **settings: of the layer, None where they are not set.

  Example:
    >>> check_moba(functools.partial(moba, block=4, top_k=2), softcap=5.0)
    Traceback (most recent call last):
    ValueError: moba has no softcap; softcap is 5.0
  """
  if (blocks := bound_moba(attend)) is None:
    if dense_decode:
      raise ValueError("dense_decode is of moba, which attend is not")
    return
  for name in ("block", "top_k"):
    if not blocks.get(name, 0) >= 1:
      raise ValueError(
        f"moba's {name} is {blocks.get(name)}; bind one of at least 1"
      )
  if unknown := blocks.keys() - _MOBA:
    raise ValueError(
      f"moba in a layer is bound to {', '.join(sorted(unknown))}; it takes"
      f" {', '.join(sorted(_MOBA))}"
    )
  for name, value in settings.items():
    if value is not None:
      raise ValueError(f"moba has no {name}; {name} is {value}")


def init_cache(
  *, block: int | None = None, kconv: int | None = None, **sizes: Any
) -> LayerCache:
  """An empty cache of a layer.

  Args:
    block: of moba, or None for another mechanism.
    kconv: width of the convolution of keys, or None.
    **sizes: of `KVCache.init`, without a depth.

  Example:
    >>> sizes = {"batch": 1, "capacity": 8, "num_kv_heads": 1, "head_dim": 4}
    >>> type(init_cache(block=2, kconv=3, **sizes).cache).__name__
    'MobaCache'
  """
  cache: KVCache | MobaCache
  if block is None:
    cache = KVCache.init(**sizes)
  else:
    cache = MobaCache.init(**sizes, block=block)
  return cache if kconv is None else KeyConvCache.init(cache, width=kconv)


def check_cache(
  cache: LayerCache, *, block: int | None = None, kconv: int | None = None
) -> None:
  """Raises ValueError for a cache that isn't the layer's.

  Example:
    >>> cache = KVCache.init(batch=1, capacity=8, num_kv_heads=1, head_dim=4)
    >>> check_cache(cache, block=2)
    Traceback (most recent call last):
    ValueError: the layer reads a MobaCache, not a KVCache; use its init_cache
  """
  wanted: list[type] = [KVCache if block is None else MobaCache]
  if kconv is not None:
    wanted.insert(0, KeyConvCache)
  inner: Any = cache
  for kind in wanted:
    if not isinstance(inner, kind):
      raise ValueError(
        f"the layer reads a {kind.__name__}, not a {type(inner).__name__};"
        " use its init_cache"
      )
    if kconv is not None and isinstance(inner, KeyConvCache):
      if inner.tail.shape[1] != kconv - 1:
        raise ValueError(
          f"kconv {kconv} meets a cache for {inner.tail.shape[1] + 1}"
        )
      inner = inner.cache
  if block is not None and inner.block != block:
    raise ValueError(f"moba's block is {block}, the cache's {inner.block}")


def read_blocks(
  q: Float[Array, "b t n d"],
  cache: MobaCache,
  positions: Int32[Array, "#b t"],
  settings: Mapping[str, Any],
  *,
  few: bool,
  dense: bool = False,
) -> Float[Array, "b t n dv"]:
  """Moba's attention to its cache, which holds the queries' tokens.

  Args:
    q: queries.
    cache: of the layer.
    positions: of the queries.
    settings: `top_k`, and those of `scale` and `impl` that are set.
    few: the queries are few, so that each gathers the blocks it reads.
    dense: they read all keys.

  Example:
    >>> cache = init_cache(
    ...   block=2, batch=1, capacity=8, num_kv_heads=1, head_dim=4
    ... )
    >>> x, at = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1), jnp.int32)
    >>> cache = cache.append(x, x)
    >>> read_blocks(x, cache, at, {"top_k": 2}, few=True).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
  """
  kept = {k: settings[k] for k in ("scale", "impl") if k in settings}
  if dense:
    kept.pop("impl", None)
    o = decode(q, cache.kv, positions=positions, **kept)
    lost = is_lost(cache, positions)[..., None, None]
    return jnp.where(lost, jnp.nan, o)
  call = moba_decode if few and "impl" not in kept else moba_prefill
  return call(q, cache, top_k=settings["top_k"], positions=positions, **kept)
