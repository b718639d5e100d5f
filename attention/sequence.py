"""Attention of whole arrays whose tokens a mesh axis divides.

`isthmus.attention.ring` is for a device with its share; here is the map around
it, for a model that is written for whole arrays.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from isthmus.attention.mask import Window
from isthmus.attention.ring import ring_attention
from isthmus.attention.sdpa import attention, check_shapes
from isthmus.attention.shard import sharded


def sequence_attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  axis: str = "seq",
  schedule: str = "auto",
  layout: str = "zigzag",
  causal: bool = False,
  window: Window = None,
  segment_ids: Int[Array, "b t"] | None = None,
  kv_segment_ids: Int[Array, "b s"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "n"] | None = None,
  return_lse: bool = False,
  shard_axes: Any = None,
  impl: str | Sequence[str] | None = None,
) -> Any:
  """`attention` by all devices of the current mesh, tokens divided too.

  Under `jax.set_mesh` the tokens are divided by `axis`, the rows and heads as
  `attention` divides them, and keys and values go from device to device.
  Without that axis, or with one device on it, this is `attention`.

  Args:
    q, k, v: whole arrays, their tokens in the order of the layout.
    axis: the mesh axis that divides the tokens.
    schedule: of `isthmus.attention.ring_attention`.
    layout: which order the tokens are in: "zigzag", that of
      `isthmus.attention.zigzag`, or "contiguous", their own.
    causal, window, scale, softcap, sinks: as in `attention`.
    segment_ids, kv_segment_ids: in the order of the tokens.
    return_lse: also return the lse.
    shard_axes: (batch axes, head axes), as in `attention`.
    impl: as in `attention`.

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t].

  Raises:
    ValueError: tokens, heads or rows that the mesh doesn't divide.
    NotImplementedError: what the schedule can't do.

  Example:
    >>> from isthmus.attention import attention
    >>> from isthmus.attention.zigzag import unzigzag, zigzag
    >>> devices = len(jax.devices())
    >>> x = jax.random.normal(jax.random.key(0), (1, 4 * devices, 2, 8))
    >>> mesh = jax.make_mesh(
    ...   (devices,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,)
    ... )
    >>> run = functools.partial(sequence_attention, causal=True)
    >>> with jax.set_mesh(mesh):
    ...   o = jax.jit(run)(*[zigzag(x, devices)] * 3)
    >>> o = unzigzag(o, devices)
    >>> bool(abs(o - attention(x, x, x, causal=True)).max() < 1e-5)
    True
  """
  check_shapes(q, k, v)
  settings: dict[str, Any] = {
    "causal": causal,
    "window": window,
    "scale": scale,
    "softcap": softcap,
    "return_lse": return_lse,
    "impl": impl,
  }
  arrays: dict[str, Any] = {
    "segment_ids": segment_ids,
    "kv_segment_ids": kv_segment_ids,
    "sinks": sinks,
  }
  devices = jax.sharding.get_abstract_mesh().shape.get(axis, 1)
  if devices == 1:
    return attention(q, k, v, shard_axes=shard_axes, **settings, **arrays)
  for name, size in (("queries", q.shape[1]), ("keys", k.shape[1])):
    if size % devices:
      raise ValueError(
        f"{size} {name} are not a multiple of the {devices} devices of mesh "
        f"axis {axis}"
      )
  run = functools.partial(
    ring_attention, axis=axis, schedule=schedule, layout=layout, **settings
  )

  def local(q, k, v, arrays):
    return run(q, k, v, **arrays)

  labels = {"segment_ids": "bt", "kv_segment_ids": "bt", "sinks": "n"}
  return sharded(
    local,
    (q, k, v, arrays),
    ("btn", "btk", "btk", labels),
    ("btn", "bnt") if return_lse else "btn",
    sizes=(q.shape[0], q.shape[2], k.shape[2]),
    shard_axes=shard_axes,
    seq=axis,
  )
