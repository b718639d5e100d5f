"""Exact attention: one function, and the implementations behind it.

The argument is checked and put into the terms of `isthmus.pallas.flash.api`
here; the implementations, their order and their refusals are `OP`'s.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, Shaped

from isthmus.attention.block_mask import BlockMask
from isthmus.attention.mask import Window, conditions
from isthmus.attention.shard import attend_sharded, choose
from isthmus.pallas.dispatch import Impl, Op, Row
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.cudnn import FORWARD
from isthmus.pallas.flash.plan import restrict
from isthmus.pallas.flash.predicate import both
from isthmus.pallas.flash.ref import LSE, OUT


def attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  causal: bool = False,
  window: Window = None,
  mask: BlockMask | None = None,
  segment_ids: Int[Array, "b t"] | None = None,
  kv_segment_ids: Int[Array, "b s"] | None = None,
  q_positions: Int32[Array, "#b #n t"] | None = None,
  kv_positions: Int32[Array, "#b #k s"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, "n"] | None = None,
  dropout_rate: float = 0.0,
  dropout_key: PRNGKeyArray | None = None,
  return_lse: bool = False,
  shard_axes: Any = None,
  impl: str | Sequence[str] | None = None,
) -> Any:
  """Softmax attention over the keys that each query may see.

  `o_i = sum_j p_ij v_j`, `p_ij = exp(x_ij - lse_i)`,
  `lse_i = log(sum_j exp(x_ij))` over the visible j, with
  `x_ij = scale q_i . k_j`, or `softcap tanh(scale q_i . k_j / softcap)`.
  Query head n reads kv head `n // (n_heads / k_heads)`.
  All conditions (causal, window, mask, segments, positions) must hold at once.
  A query that sees no key has o = 0, lse = -inf and gradient 0.

  Args:
    q: queries.
    k: keys.
    v: values; their width may differ from the keys'.
    causal: a query sees keys at positions up to its own. By default the last
      query stands at the last key (bottom-right aligned).
    window: a query at p sees keys at p - left .. p + right, both inclusive;
      an int is (int, int), None on a side is no limit.
    mask: a `BlockMask`: the key blocks that each query block sees, for each
      batch row and head or shared. Query blocks with more key blocks than its
      capacity are NaN.
    segment_ids: queries see keys of equal id only.
    kv_segment_ids: the keys' ids; by default the queries', if t == s.
    q_positions: int32 positions that causal and window compare, per row and
      head or shared (size 1); default s - t, ..., s - 1.
    kv_positions: the keys' positions; default 0, ..., s - 1. A key at
      2**31 - 1 (`EMPTY`) is seen by no query.
    scale: default d ** -0.5.
    softcap: bounds the logits to (-softcap, softcap); before masking.
    sinks: a logit per head that joins the denominator, and so the lse, but
      has no value. With it a query that sees no key has lse = sink.
    dropout_rate: share of the probabilities set to 0, the rest being scaled
      up; the lse is that without dropout.
    dropout_key: a typed key; needed if dropout_rate > 0.
    return_lse: also return the lse.
    shard_axes: (batch axes, head axes) of the mesh that divide the call; by
      default `data` and `fsdp`, and `model`, see `isthmus.attention.shard`.
    impl: implementation, see `isthmus.pallas.dispatch`: "mosaic", "cudnn",
      "chunked" (XLA in linear memory) or "xla" (with t x s scores).

  Returns:
    o [b t n dv] of q's dtype, or (o, lse) with lse [b n t] in float32
    (float64 for float64 inputs), natural log, differentiable.

  Raises:
    ValueError: shapes or settings that fit no implementation.
    NotImplementedError: what `impl` can't do, with the reason.

  Example:
    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> attention(q, k, v, causal=True).shape
    (1, 4, 2, 8)
  """
  options, extras = prepare(
    q,
    k,
    v,
    causal=causal,
    window=window,
    mask=mask,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    q_positions=q_positions,
    kv_positions=kv_positions,
    scale=scale,
    softcap=softcap,
    sinks=sinks,
    dropout_rate=dropout_rate,
    dropout_key=dropout_key,
    return_lse=return_lse,
  )
  return attend_sharded(
    functools.partial(OP, options=options, impl=impl),
    q,
    k,
    v,
    extras,
    shard_axes=shard_axes,
    out=("b.n", "bn") if return_lse else "b.n",
  )


def explain(q: Any, k: Any, v: Any, *, impl=None, **kwargs: Any) -> list[Row]:
  """Which implementation `attention` would take, and why not the others.

  Args:
    q, k, v: arrays or `jax.ShapeDtypeStruct`s; nothing is run or compiled.
    impl: as in `attention`.
    **kwargs: the other arguments of `attention`, structs for arrays too;
      `case` is put in the rows.

  Returns:
    A row for each implementation.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    >>> rows = explain(x, x, x)  # on a CPU
    >>> [row.name for row in rows if row.verdict == "runs"]
    ['chunked']
    >>> [row.name for row in rows if row.verdict == "refuses"]
    ['mosaic', 'cudnn']
  """
  case = kwargs.pop("case", "")
  shard_axes = kwargs.pop("shard_axes", None)
  arrays = {name: kwargs.pop(name, None) for name in _ARRAYS}
  found = []

  def checked(q, k, v, arrays):
    options, extras = prepare(q, k, v, **arrays, **kwargs)
    found.append(options)
    return extras

  extras = jax.eval_shape(checked, q, k, v, arrays)
  choose(q.shape[0], q.shape[2], k.shape[2], shard_axes)
  (options,) = found
  return OP.explain(q, k, v, extras, options=options, impl=impl, case=case)


def report() -> list[Row]:
  """`explain` of a few usual calls on this machine.

  Example:
    >>> row = report()[0]
    >>> row.case, row.name, row.verdict  # on a CPU
    ('bfloat16, causal', 'chunked', 'runs')
  """
  tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

  def rows(case, dtype, **kwargs):
    x = jax.ShapeDtypeStruct((1, 4096, 16, 64), dtype)
    return explain(x, x, x, causal=True, case=case, **kwargs)

  return [
    *rows("bfloat16, causal", jnp.bfloat16),
    *rows("bfloat16, causal, packed", jnp.bfloat16, segment_ids=tokens),
    *rows("bfloat16, causal, lse", jnp.bfloat16, return_lse=True),
    *rows("float32, causal", jnp.float32),
  ]


def save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
  """A policy of `jax.checkpoint`: keep (o, lse), so the kernel runs once.

  Example:
    >>> layer = jax.checkpoint(attention, policy=save_attention)
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> jax.grad(lambda q: layer(q, x, x).sum())(x).shape
    (1, 4, 2, 8)
  """
  if primitive.name == "name":
    return params["name"] in (OUT, LSE)
  return primitive.name.startswith(FORWARD)


# Arguments of `attention` that are arrays, or trees of them.
_ARRAYS = (
  "mask",
  "segment_ids",
  "kv_segment_ids",
  "q_positions",
  "kv_positions",
  "sinks",
  "dropout_key",
)


def prepare(
  q: Any,
  k: Any,
  v: Any,
  *,
  causal=False,
  window=None,
  mask=None,
  segment_ids=None,
  kv_segment_ids=None,
  q_positions=None,
  kv_positions=None,
  scale=None,
  softcap=None,
  sinks=None,
  dropout_rate=0.0,
  dropout_key=None,
  return_lse=False,
) -> tuple[Options, Extras]:
  """The checked arguments of `attention`, as its implementations take them.

  Args:
    q, k, v: arrays, or `jax.ShapeDtypeStruct`s.
    causal, window, mask, segment_ids, kv_segment_ids: of `attention`.
    q_positions, kv_positions, scale, softcap, sinks: of `attention`.
    dropout_rate, dropout_key, return_lse: of `attention`.

  Raises:
    ValueError: every refusal that no implementation lifts.

  Example:
    >>> x = jnp.ones((1, 4, 2, 16))
    >>> options, extras = prepare(x, x, x, causal=True)
    >>> options.scale, options.predicate
    (0.25, Band(left=None, right=0, offset=0))
  """
  check_shapes(q, k, v)
  (b, t, n, d), s, heads = q.shape, k.shape[1], k.shape[2]
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap is {softcap}; it must be above 0")
  if not 0 <= dropout_rate < 1:
    raise ValueError(f"dropout_rate is {dropout_rate}, not in [0, 1)")
  if dropout_rate and dropout_key is None:
    raise ValueError(f"dropout_rate is {dropout_rate}, and there is no key")
  if segment_ids is None and kv_segment_ids is not None:
    raise ValueError("kv_segment_ids are given without segment_ids")
  if segment_ids is not None and kv_segment_ids is None:
    if t != s:
      raise ValueError(
        f"{t} queries and {s} keys: segment_ids need kv_segment_ids too"
      )
    kv_segment_ids = segment_ids
  for name, x, shape in (
    ("segment_ids", segment_ids, ((b,), (t,))),
    ("kv_segment_ids", kv_segment_ids, ((b,), (s,))),
    ("q_positions", q_positions, ((1, b), (1, n), (t,))),
    ("kv_positions", kv_positions, ((1, b), (1, heads), (s,))),
    ("sinks", sinks, ((n,),)),
  ):
    check_extra(name, x, shape)
  predicate, q_ops, k_ops = conditions(
    t,
    s,
    bool(causal),
    window,
    segment_ids,
    kv_segment_ids,
    q_positions,
    kv_positions,
  )
  lists = None
  if mask is not None:
    _check_mask(mask, b, t, n, s, heads)
    lists = restrict(mask.lists, predicate, q_ops, k_ops, t=t, s=s, num_heads=n)
    predicate = both(mask.predicate, predicate)
    q_ops, k_ops = (*mask.q, *q_ops), (*mask.k, *k_ops)
  options = Options(
    scale=float(d**-0.5 if scale is None else scale),
    softcap=None if softcap is None else float(softcap),
    dropout_rate=float(dropout_rate),
    predicate=predicate,
    return_lse=bool(return_lse),
  )
  return options, Extras(
    lists=lists,
    q=q_ops,
    k=k_ops,
    sinks=sinks,
    dropout_key=dropout_key if dropout_rate else None,
  )


def check_shapes(
  q: Float[Array, "..."], k: Float[Array, "..."], v: Float[Array, "..."]
) -> None:
  """Raises ValueError for q, k and v that no attention fits.

  Example:
    >>> x = jnp.ones((1, 4, 3, 8))
    >>> check_shapes(x, x[:, :, :2], x[:, :, :2])
    Traceback (most recent call last):
    ValueError: 3 query heads are not a multiple of 2 kv heads
  """
  if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
    raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: each has 4 axes")
  if k.shape[:3] != v.shape[:3]:
    raise ValueError(f"keys {k.shape} and values {v.shape} differ in b, s or k")
  if q.shape[0] != k.shape[0]:
    raise ValueError(f"queries of batch {q.shape[0]}, keys of {k.shape[0]}")
  if q.shape[3] != k.shape[3]:
    raise ValueError(f"queries of width {q.shape[3]}, keys of {k.shape[3]}")
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads"
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; not one")


def check_extra(
  name: str,
  x: Shaped[Array, "..."] | None,
  sizes: Sequence[tuple[int, ...]],
) -> None:
  """Raises ValueError for an array of another shape; positions are int32.

  Args:
    name: of the argument.
    x: the array, or None, which is let pass.
    sizes: what each axis may be.

  Example:
    >>> check_extra("q_positions", jnp.zeros((2, 4), int), ((1, 3), (4,)))
    Traceback (most recent call last):
    ValueError: q_positions has shape (2, 4); wanted [1|3 4]
  """
  if x is None:
    return
  if len(x.shape) != len(sizes) or any(
    size not in allowed for size, allowed in zip(x.shape, sizes, strict=True)
  ):
    wanted = " ".join("|".join(map(str, sorted(set(a)))) for a in sizes)
    raise ValueError(f"{name} has shape {x.shape}; wanted [{wanted}]")
  if name.endswith("positions") and x.dtype != jnp.int32:
    raise ValueError(f"{name} are {x.dtype}, not int32")


def _check_mask(mask, b, t, n, s, heads) -> None:
  if not isinstance(mask, BlockMask):
    raise TypeError(f"mask is a {type(mask).__name__}; it is to be a BlockMask")
  if tuple(mask.lengths) != (t, s):
    raise ValueError(
      f"a mask of {mask.lengths[0]} queries and {mask.lengths[1]} keys, and "
      f"the call has {t} and {s}"
    )
  rows, lists_heads = mask.lists.full_num.shape[:2]
  if rows not in (1, b):
    raise ValueError(f"a mask of batch {rows}, and the call's is {b}")
  if lists_heads not in (1, n):
    raise ValueError(
      f"a mask of {lists_heads} heads, and the call has {n} query heads"
    )
  for name, xs, sizes in (
    ("q", mask.q, ((1, b), (1, n), (t,))),
    ("k", mask.k, ((1, b), (1, heads), (s,))),
  ):
    for x in xs:
      check_extra(f"the mask's {name} operand", x, sizes)


def _implementation(name: str, module: str, function: str = "attend") -> Impl:
  """A function and `refuse` of a module that is imported when first asked."""

  def load():
    try:
      return importlib.import_module(module)
    except ImportError as error:
      raise NotImplementedError(
        f"{name}: {module} can't be imported: {error}"
      ) from error

  def run(q, k, v, extras, *back, options):
    found = getattr(load(), function)(q, k, v, extras, *back, options=options)
    return found if back or options.return_lse else found[0]

  def refuse(q, k, v, extras, *_, options):
    try:
      found = load()
    except NotImplementedError as error:
      return str(error)
    if not hasattr(found, function):
      return f"it has no {function} pass of its own"
    ask = getattr(found, "refuse", None)
    return None if ask is None else ask(q, k, v, extras, options=options)

  return Impl(name, run, refuse)


_MODULES = {
  "mosaic": "isthmus.pallas.flash.mosaic",
  "cudnn": "isthmus.pallas.flash.cudnn",
  "chunked": "isthmus.pallas.flash.chunked",
  "xla": "isthmus.pallas.flash.ref",
}
_ORDER = {
  "gpu": ("mosaic", "cudnn", "chunked"),
  "cpu": ("chunked",),
  "tpu": ("chunked",),
}

#: `attention` behind its checks; `explain` reads its table.
OP = Op(
  "attention", tuple(_implementation(*row) for row in _MODULES.items()), _ORDER
)

#: Its backward pass by a joint lse, see `isthmus.attention.gradient`: the same
#: table, so that who computed a part also takes its gradients.
BACKWARD = Op(
  "attention's backward pass",
  tuple(_implementation(*row, "backward") for row in _MODULES.items()),
  _ORDER,
)
