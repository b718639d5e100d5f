"""One device's queries and one device's keys: a ring's unit of work.

What the pair has to compute depends on who they are: all of it, half of it
without a mask (causal zigzag), nothing, or the pairs of positions in a window.
`attend` computes (o, lse) over these keys; `pull` the share of the gradients
that passes through them, given the lse over all keys.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.gradient import attention_gradient
from isthmus.attention.sdpa import attention
from isthmus.attention.zigzag import Layout, chunks, spread
from isthmus.pallas.flash.predicate import Positions, Range, Segments
from isthmus.pallas.precision import accumulator


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is static of a ring's call; hashable.

  Attributes:
    axis, devices: the mesh axis and its size.
    schedule, layout: see `isthmus.attention.ring`.
    causal: keys up to a query's own position.
    window: (left, right), or None.
    scale, softcap, impl: of `attention`.
    block: the mask's block sizes, or None if there is no mask.

  Example:
    >>> Setting("seq", 4, "kv_ring", "zigzag", causal=True).banded
    True
  """

  axis: str
  devices: int
  schedule: str
  layout: Layout
  causal: bool = False
  window: tuple[int | None, int | None] | None = None
  scale: float | None = None
  softcap: float | None = None
  impl: Any = None
  block: tuple[int, int] | None = None

  @property
  def banded(self) -> bool:
    """Whether positions count."""
    return self.causal or self.window is not None

  @property
  def limits(self) -> tuple[int | None, int | None]:
    """How far before and after its own position a query sees."""
    left, right = self.window or (None, None)
    return left, 0 if self.causal else right


class Tokens(NamedTuple):
  """What travels with some tokens; each may be None.

  Attributes:
    ids: int [b t], of segments.
    positions: int32 [b|1 t]; None where the layout says them.

  Example:
    >>> Tokens(positions=jnp.arange(3)[None]).ids is None
    True
  """

  ids: Any = None
  positions: Any = None


class _Form(NamedTuple):
  """A part of a pair that one call of `attention` computes."""

  rows: int = 0  # its first query
  keys: int | None = None  # how many keys
  kind: str = "all"  # or "band", by index, or "placed", by position


def attend(
  setting: Setting,
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  who: tuple[Tokens, Tokens],
  ranks: tuple[Any, Any],
  blocks: Any = None,
  *,
  same: bool = False,
) -> tuple[Float[Array, "b t n dv"], Float[Array, "b n t"]]:
  """(o, lse) of the queries of one device over the keys of one device.

  Args:
    setting: of the call.
    q, k, v: of the two devices.
    who: of the queries, of the keys.
    ranks: theirs; may be traced. The keys' is None if they are the whole
      sequence in its order; `same` is to be set then.
    blocks: bool [b|1 n|1 qb kb], of the whole sequence.
    same: both are one device.

  Example:
    >>> setting = Setting("seq", 2, "kv_ring", "contiguous", causal=True)
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> later = attend(setting, x, x, x, (Tokens(), Tokens()), (0, 1))
    >>> later[1][0, 0].tolist()  # of device 1, device 0 sees nothing
    [-inf, -inf, -inf, -inf]
  """

  def call(form, q, k, v, who, blocks):
    parts = q[:, form.rows :], k[:, : form.keys], v[:, : form.keys]
    extra = _settings(setting, form, who, ranks, blocks, *parts[:2])
    o, lse = attention(*parts, return_lse=True, **extra)
    return _pad(o, form.rows), _pad(lse, form.rows, 2, -jnp.inf)

  def nothing(q, k, v, who, blocks):
    shape = (*q.shape[:3], v.shape[3])
    acc = accumulator(q.dtype)
    lse = (q.shape[0], q.shape[2], q.shape[1])
    return (
      jax.lax.full_like(q, 0, q.dtype, shape=shape),
      jax.lax.full_like(q, -jnp.inf, acc, shape=lse),
    )

  run = _switch(setting, q, k, who, ranks, blocks, same)
  return run(call, nothing, q, k, v, who, blocks)


def pull(
  setting: Setting,
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  back: tuple[Any, Any, Any],
  who: tuple[Tokens, Tokens],
  ranks: tuple[Any, Any],
  blocks: Any = None,
  *,
  same: bool = False,
) -> tuple[Any, Any, Any]:
  """What a pair adds to the gradients of its queries, keys and values.

  With the lse over all keys, `P = exp(x - lse)`, `dX = P (do . v - delta)`,
  and the sums over pairs are the gradients. No pair is computed again.

  Args:
    setting, q, k, v, who, ranks, blocks, same: as in `attend`.
    back: do [b t n dv]; the lse [b n t] over all keys; and
      `delta = rowsum(do o) - dlse` [b n t].

  Returns:
    (dq, dk, dv), in q's dtype.

  Example:
    >>> setting = Setting("seq", 1, "kv_ring", "contiguous")
    >>> x, who = jnp.ones((1, 4, 2, 8)), (Tokens(), Tokens())
    >>> o, lse = attend(setting, x, x, x, who, (0, 0))
    >>> delta = jnp.sum(o, axis=-1).swapaxes(1, 2)
    >>> back = jnp.ones_like(o), lse, delta
    >>> _, _, dv = pull(setting, x, x, x, back, who, (0, 0))
    >>> print(dv[0, 0, 0].round(3))
    [1. 1. 1. 1. 1. 1. 1. 1.]
  """

  def call(form, q, k, v, back, who, blocks):
    first, last = form.rows, form.keys
    parts = q[:, first:], k[:, :last], v[:, :last]
    do, lse, delta = back
    mine = do[:, first:], lse[..., first:], delta[..., first:]
    extra = _settings(setting, form, who, ranks, blocks, *parts[:2])
    dq, dk, dv = attention_gradient(*parts, *mine, **extra)
    short = k.shape[1] - dk.shape[1]
    return _pad(dq, first), _pad(dk, 0, end=short), _pad(dv, 0, end=short)

  def nothing(q, k, v, back, who, blocks):
    return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)

  run = _switch(setting, q, k, who, ranks, blocks, same)
  return run(call, nothing, q, k, v, back, who, blocks)


def _switch(setting, q, k, who, ranks, blocks, same):
  """A function that runs what the two devices have in common."""
  forms, index = _forms(setting, q.shape[1], k.shape[1], who, ranks, same)
  seen = None if same else _seen(setting, who, ranks, q, k, blocks)

  def run(call, nothing, *args):
    branches = [_bind(call, form) for form in forms]
    if seen is None and len(forms) == 1:
      return branches[0](*args)
    last = len(forms)
    which = index if seen is None else jnp.where(seen, index, last)
    branches = branches if seen is None else [*branches, nothing]
    return jax.lax.switch(which, branches, *args)

  return run


def _bind(call, form):
  def run(*args):
    return call(form, *args)

  return run


def _forms(setting, t, s, who, ranks, same):
  """The forms that a pair may have, and which it has."""
  if setting.block is not None or who[0].positions is not None:
    return [_Form(kind="placed")], 0
  if not setting.banded:
    return [_Form()], 0
  one = setting.layout == "contiguous"
  if same and (one or setting.window is None):
    return [_Form(kind="band")], 0
  if setting.window is not None:
    return [_Form(kind="placed")], 0
  if one:
    return [_Form()], 0
  # Of a device before, all queries see the early chunk; of one behind, the
  # late chunk's queries see all keys.
  forms = [_Form(keys=s // 2), _Form(rows=t // 2)]
  return forms, jnp.where(ranks[1] < ranks[0], 0, 1)


def _seen(setting, who, ranks, q, k, blocks):
  """Whether any query may see any key, traced; None if some surely does."""
  pieces, some = len(chunks(0, 1, setting.layout)), []
  if who[1].positions is not None or (
    # Of two devices of a causal zigzag, each sees some of the other's.
    setting.banded and (setting.layout, setting.window) != ("zigzag", None)
  ):
    places = _places(setting, who, ranks, (q.shape[1], k.shape[1]))
    ranges = _ranges(places, pieces)
    some.append(Positions(*setting.limits).tiles(None, None, *ranges)[0])
  if who[0].ids is not None:
    ranges = _ranges((who[0].ids, who[1].ids), pieces)
    some.append(Segments().tiles(None, None, *ranges)[0])
  seen = jnp.any(functools.reduce(jnp.logical_and, some)) if some else None
  if blocks is None:
    return seen
  listed = jnp.any(_own_blocks(setting, blocks, ranks, q, k))
  return listed if seen is None else seen & listed


def _ranges(pair, pieces):
  """Least and greatest of each chunk: [b, chunks of q, chunks of k]."""
  q, k = (x.reshape(x.shape[0], pieces, -1) for x in pair)
  q = Range(jnp.min(q, -1)[:, :, None], jnp.max(q, -1)[:, :, None])
  k = Range(jnp.min(k, -1)[:, None], jnp.max(k, -1)[:, None])
  return (q,), (k,)


def _places(setting, who, ranks, sizes):
  """Positions of the queries and of the keys, [b|1 t]."""
  return tuple(
    spread(rank, setting.devices, setting.layout, size)[None]
    if one.positions is None
    else one.positions
    for one, rank, size in zip(who, ranks, sizes, strict=True)
  )


def _own_blocks(setting, blocks, ranks, q, k):
  """[b|1 n|1 qb kb] of two devices' tokens, from those of the sequence."""
  for axis, rank, x in ((2, ranks[0], q), (3, ranks[1], k)):
    if rank is None:
      continue
    count = x.shape[1] // setting.block[axis - 2]
    mine = spread(rank, setting.devices, setting.layout, count)
    blocks = jnp.take(blocks, mine, axis=axis)
  return blocks


def _settings(setting, form, who, ranks, blocks, q, k):
  """The arguments of `attention` for a form, besides q, k and v."""
  extra: dict[str, Any] = {}
  ids, kv_ids = who[0].ids, who[1].ids
  if ids is not None:
    extra["segment_ids"] = ids[:, form.rows :]
    extra["kv_segment_ids"] = kv_ids[:, : form.keys]
  if form.kind != "all":
    extra |= {"causal": setting.causal, "window": setting.window}
  if form.kind == "placed" and (setting.banded or who[1].positions is not None):
    q_places, k_places = _places(setting, who, ranks, (q.shape[1], k.shape[1]))
    extra["q_positions"] = q_places[:, None]
    extra["kv_positions"] = k_places[:, None]
  if blocks is not None:
    mine = _own_blocks(setting, blocks, ranks, q, k)
    extra["mask"] = BlockMask.from_blocks(mine, block=setting.block)
  return extra | {
    "scale": setting.scale,
    "softcap": setting.softcap,
    "impl": setting.impl,
  }


def _pad(x, start, axis=1, value=0, end=0):
  """`x` with so many more rows before and after it."""
  if not start and not end:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (start, end)
  return jnp.pad(x, widths, constant_values=value)
