"""Attention over a sequence that is divided over devices.

Every schedule computes the same and keeps (q, k, v, o, lse) for its backward
pass. They differ in what travels:

* `kv_ring`: keys and values go round, from device to next device; in the
  backward pass their gradients go with them and end at home;
* `kv_ring_bidir`: the same both ways at once, each half as far;
* `token_ring`: queries go round, and what each device finds is sent straight
  back to their owner; keys, values and their gradients never move;
* `all_gather`: every device fetches all keys and values first;
* `ulysses`: tokens are exchanged for heads, so that each device has some heads
  of the whole sequence.

A part computed meanwhile doesn't need what is being sent, so that a compiler
can do both at once. References: Ring Attention, arxiv.org/abs/2310.01889;
TokenRing, arxiv.org/abs/2412.20501; DeepSpeed Ulysses,
arxiv.org/abs/2309.14509.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.mask import Window, check_window
from isthmus.attention.merge import add_sinks
from isthmus.attention.pair import Setting, Tokens
from isthmus.attention.rotation import BACKWARD, FORWARD
from isthmus.attention.schedule import SCHEDULES, choose_schedule
from isthmus.attention.zigzag import spread
from isthmus.pallas.flash.joint import delta
from isthmus.pallas.flash.lists import overflowed
from isthmus.pallas.flash.ref import LSE, OUT


def ring_attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  axis: str = "seq",
  schedule: str = "auto",
  layout: str = "zigzag",
  causal: bool = False,
  window: Window = None,
  mask: BlockMask | None = None,
  segment_ids: Int[Array, "b t"] | None = None,
  kv_segment_ids: Int[Array, "b s"] | None = None,
  positions: Int32[Array, "#b t"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "n"] | None = None,
  return_lse: bool = False,
  impl: str | Sequence[str] | None = None,
) -> Any:
  """`attention` of a sequence of which each device of an axis has a share.

  To be called inside `jax.shard_map`, with the device's own tokens. A query
  sees keys on all devices; values and gradients are those of
  `isthmus.attention.attention` on the whole sequence.

  Args:
    q, k, v: queries, keys and values of this device.
    axis: the mesh axis that divides the sequence.
    schedule: "kv_ring", "kv_ring_bidir", "token_ring", "all_gather",
      "ulysses", or "auto": that with the fewest bytes by `choose_schedule`.
    layout: which tokens this device has: "zigzag", two chunks as
      `isthmus.attention.zigzag` arranges them, so that causal work is even;
      or "contiguous". It counts if positions do (causal, window, mask).
    causal: a query sees keys at positions up to its own.
    window: as in `attention`; a window of some devices makes a ring shorter.
    mask: a `BlockMask` of the whole sequence in its own order, the same on
      every device; it may be traced.
    segment_ids: of this device's queries, who see keys of equal id only.
    kv_segment_ids: the keys' ids; by default the queries'.
    positions: int32 positions of this device's tokens, which causal and window
      compare; by default those of the layout, for the whole sequence.
    scale, softcap: as in `attention`.
    sinks: as in `attention`; added once, to the merged result.
    return_lse: also return the lse.
    impl: as in `attention`.

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t].

  Raises:
    ValueError: sizes or settings that fit together under no schedule.
    NotImplementedError: what this schedule can't do, with the reason.

  Example:
    >>> from jax.sharding import Mesh, PartitionSpec
    >>> from isthmus.attention import attention
    >>> mesh, spec = Mesh(jax.devices(), "seq"), PartitionSpec(None, "seq")
    >>> run = lambda x: ring_attention(x, x, x)
    >>> run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> x = jax.random.normal(jax.random.key(0), (1, 4 * mesh.size, 2, 8))
    >>> bool(jnp.allclose(jax.jit(run)(x), attention(x, x, x), atol=1e-5))
    True
  """
  devices = _devices(axis)
  (b, t, n, d), (s, heads, dv) = q.shape, v.shape[1:]
  window = check_window(window)
  banded = causal or window is not None
  if segment_ids is None and kv_segment_ids is not None:
    raise ValueError("kv_segment_ids are given without segment_ids")
  if segment_ids is not None and kv_segment_ids is None:
    if t != s:
      raise ValueError(
        f"{t} queries and {s} keys: segment_ids need kv_segment_ids too"
      )
    kv_segment_ids = segment_ids
  if t != s and (banded or positions is not None):
    raise ValueError(
      f"{t} queries and {s} keys on a device: causal, window and positions "
      "are of a sequence that sees itself"
    )
  if layout not in ("zigzag", "contiguous"):
    raise ValueError(f"layout {layout!r}; there are zigzag and contiguous")
  if positions is not None or not (banded or mask is not None):
    layout = "contiguous"  # it doesn't count
  if layout == "zigzag" and (t % 2 or s % 2):
    raise ValueError(
      f"zigzag gives a device two chunks, and it has {t} queries and {s} keys; "
      "pad to even numbers"
    )
  if schedule == "auto":
    schedule = choose_schedule(
      devices,
      q_heads=n,
      kv_heads=heads,
      q_length=t,
      kv_length=s,
      width=d,
      value_width=dv,
      dtype=q.dtype,
      layout=layout,
      causal=causal,
      window=None if positions is not None else window,
    ).schedule
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
  setting = Setting(
    axis,
    devices,
    schedule,
    layout,
    bool(causal),
    window,
    scale,
    softcap,
    impl if impl is None or isinstance(impl, str) else tuple(impl),
    None if mask is None else tuple(mask.lists.block),
  )
  blocks = lost = None
  if mask is not None:
    blocks, lost = _blocks(setting, mask, b, t, s, n, positions)
  if schedule == "ulysses":
    _check_heads(setting, n, heads)
  extra = (
    Tokens(segment_ids, positions),
    Tokens(kv_segment_ids, positions),
    (blocks, lost),
  )
  o, lse = _ring(setting, q, k, v, extra)
  if sinks is not None:
    o, lse = add_sinks(o, lse, sinks)
  return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(setting, q, k, v, extra):
  rank = jax.lax.axis_index(setting.axis)
  o, lse = FORWARD[setting.schedule](setting, rank, q, k, v, extra)
  lost = extra[2][1]
  if lost is not None:
    mine = spread(rank, setting.devices, setting.layout, q.shape[1])
    mine = jnp.take(lost, mine, axis=2)
    lse = jnp.where(mine, jnp.nan, lse)
    o = jnp.where(jnp.swapaxes(mine, 1, 2)[..., None], jnp.nan, o)
  return o.astype(q.dtype), lse


def _forward(setting, q, k, v, extra):
  o, lse = _ring(setting, q, k, v, extra)
  o, lse = checkpoint_name(o, OUT), checkpoint_name(lse, LSE)
  return (o, lse), (q, k, v, extra, o, lse)


def _backward(setting, residuals, cotangents):
  # What is sent is sent again: a compiler that took it from the forward pass
  # would have to keep the keys of all devices until now.
  residuals, cotangents = jax.lax.optimization_barrier((residuals, cotangents))
  q, k, v, extra, o, lse = residuals
  do, dlse = cotangents
  rank = jax.lax.axis_index(setting.axis)
  back = (do, lse, delta(o, lse, do, dlse))
  grads = BACKWARD[setting.schedule](setting, rank, q, k, v, back, extra)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None


_ring.defvjp(_forward, _backward)


def _devices(axis):
  try:
    return jax.lax.axis_size(axis)
  except NameError as error:
    raise ValueError(
      f"ring_attention has no axis {axis!r} here: call it in a jax.shard_map "
      "over a mesh that has it"
    ) from error


def _check_heads(setting, n, heads):
  if n % setting.devices or heads % setting.devices:
    raise NotImplementedError(
      f"ulysses gives each of {setting.devices} devices some heads, and there "
      f"are {n} query heads and {heads} kv heads"
    )
  if setting.block is not None:
    raise NotImplementedError(
      "ulysses takes no mask: a device has other heads than the mask's"
    )


def _blocks(setting, mask, b, t, s, n, positions):
  """(blocks, rows that lost some) of the whole sequence's mask."""
  whole = t * setting.devices, s * setting.devices
  if tuple(mask.lengths) != whole:
    raise ValueError(
      f"a mask of {mask.lengths[0]} queries and {mask.lengths[1]} keys, and "
      f"the sequence has {whole[0]} and {whole[1]}"
    )
  if positions is not None:
    raise NotImplementedError(
      "a mask with positions: its blocks are found by the layout"
    )
  if mask.predicate is not None:
    raise NotImplementedError(
      f"a mask with blocks that are seen in part ({mask.predicate}): its "
      "indices are those of the whole sequence; take whole blocks, with "
      "causal, window and segment_ids as arguments"
    )
  parts = 2 if setting.layout == "zigzag" else 1
  for size, block in zip((t, s), setting.block, strict=True):
    if size // parts % block:
      raise ValueError(
        f"blocks of {block} tokens don't divide a device's {size // parts}"
        + (" of a chunk" if parts == 2 else "")
      )
  full, _ = mask.to_blocks()
  if full.shape[0] not in (1, b) or full.shape[1] not in (1, n):
    raise ValueError(
      f"a mask of batch {full.shape[0]} and {full.shape[1]} heads, and the "
      f"call has {b} and {n}"
    )
  lost = jnp.repeat(overflowed(mask.lists), setting.block[0], axis=2)
  return full, lost
