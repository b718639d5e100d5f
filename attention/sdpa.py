"""Exact attention: one function, and the implementations behind it.

The reference is plain XLA with the backward rule of FlashAttention-2
(https://arxiv.org/abs/2307.08691): it keeps (o, lse), and recomputes the
probabilities, so that nothing of size t x s outlives a layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray

from isthmus.attention.mask import Window, check_window
from isthmus.attention.reference import LSE, OUT, Extras, Options, attend
from isthmus.pallas.dispatch import Impl, Op, Row, platform

# cuDNN's forward kernel carries no names; it is known by its primitive.
_CUDNN_FORWARD = "dot_product_attention_fwd"


def attention(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  causal: bool = False,
  window: Window = None,
  mask: Any = None,
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
  All conditions (causal, window, segments, positions) must hold at once. A
  query that sees no key has o = 0, lse = -inf and gradient 0.

  Args:
    q: queries.
    k: keys.
    v: values; their width may differ from the keys'.
    causal: a query sees keys at positions up to its own. By default the last
      query stands at the last key (bottom-right aligned).
    window: a query at p sees keys at p - left .. p + right, both inclusive;
      an int is (int, int), None on a side is no limit.
    mask: reserved for block masks; refused.
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
    shard_axes: reserved; refused. XLA partitions the reference and cuDNN over
      batch and heads by itself.
    impl: implementation, see `isthmus.pallas.dispatch`: "xla" or "cudnn".

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
  options, extras = _normalise(
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
    shard_axes=shard_axes,
  )
  return OP(q, k, v, extras, options=options, impl=impl)


def explain(q: Any, k: Any, v: Any, *, impl=None, **kwargs: Any) -> list[Row]:
  """Which implementation `attention` would take, and why not the others.

  Args:
    q, k, v: arrays or `jax.ShapeDtypeStruct`s; nothing is run or compiled.
    impl: as in `attention`.
    **kwargs: the other arguments of `attention`; `case` is put in the rows.

  Returns:
    A row for each implementation.

  Example:
    >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.bfloat16)
    >>> [(row.name, row.verdict) for row in explain(x, x, x)]  # on a CPU
    [('xla', 'runs'), ('cudnn', 'refuses')]
  """
  case = kwargs.pop("case", "")
  options, extras = _normalise(q, k, v, **kwargs)
  return OP.explain(q, k, v, extras, options=options, impl=impl, case=case)


def report() -> list[Row]:
  """`explain` of a few usual calls on this machine.

  Example:
    >>> row = report()[0]
    >>> row.case, row.name, row.verdict  # on a CPU
    ('bfloat16, causal', 'xla', 'runs')
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
  return primitive.name.startswith(_CUDNN_FORWARD)


def _normalise(
  q,
  k,
  v,
  *,
  causal=False,
  window=None,
  mask=None,
  segment_ids=None,
  kv_segment_ids=None,
  scale=None,
  softcap=None,
  dropout_rate=0.0,
  dropout_key=None,
  return_lse=False,
  shard_axes=None,
  q_positions=None,
  kv_positions=None,
  sinks=None,
) -> tuple[Options, Extras]:
  """The checked arguments; every refusal that no implementation lifts."""
  _check_shapes(q, k, v)
  (b, t, n, d), s, heads = q.shape, k.shape[1], k.shape[2]
  if mask is not None:
    raise NotImplementedError("attention: block masks come in a later release")
  if shard_axes is not None:
    raise NotImplementedError("attention: shard_axes comes in a later release")
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
    _check_extra(name, x, shape)
  options = Options(
    causal=bool(causal),
    window=check_window(window),
    scale=float(d**-0.5 if scale is None else scale),
    softcap=None if softcap is None else float(softcap),
    dropout_rate=float(dropout_rate),
    return_lse=bool(return_lse),
  )
  return options, Extras(
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    q_positions=q_positions,
    kv_positions=kv_positions,
    sinks=sinks,
    dropout_key=dropout_key if dropout_rate else None,
  )


def _check_shapes(q, k, v) -> None:
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


def _check_extra(name, x, sizes) -> None:
  if x is None:
    return
  if len(x.shape) != len(sizes) or any(
    size not in allowed for size, allowed in zip(x.shape, sizes, strict=True)
  ):
    wanted = " ".join("|".join(map(str, sorted(set(a)))) for a in sizes)
    raise ValueError(f"{name} has shape {x.shape}; wanted [{wanted}]")
  if name.endswith("positions") and x.dtype != jnp.int32:
    raise ValueError(f"{name} are {x.dtype}, not int32")


def _xla(q, k, v, extras: Extras, *, options: Options):
  o, lse = attend(q, k, v, extras, options=options)
  return (o, lse) if options.return_lse else o


def _cudnn(q, k, v, extras: Extras, *, options: Options):
  del extras  # refused unless empty
  window = options.window
  if window is not None:
    window = None if window[0] is None else (window[0], 0)
  try:
    o = jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=options.scale,
      is_causal=options.causal,
      local_window_size=window,
      implementation="cudnn",
    )
  except RuntimeError as error:
    if type(error) is not RuntimeError:  # not a refusal: a failure on device
      raise
    raise NotImplementedError(f"cudnn: {error}") from error
  return checkpoint_name(o, OUT)


def _refuse_cudnn(q, k, v, extras: Extras, *, options: Options) -> str | None:
  if platform() != "gpu":
    return f"it needs an NVIDIA GPU, and the platform is {platform()}"
  capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
  if not capability.replace(".", "").isdigit():
    return f"it needs an NVIDIA GPU, and this is {jax.local_devices()[0]}"
  if float(capability) < 8:
    return f"it needs compute capability 8.0, and the GPU has {capability}"
  return _refuse_cudnn_call(q, k, v, extras, options, float(capability) >= 9)


def _refuse_cudnn_call(q, k, v, extras, options, hopper: bool) -> str | None:
  """What cuDNN can't take on any GPU, by shapes and settings alone."""
  given = [
    name
    for name, x in zip(extras._fields, extras, strict=True)
    if x is not None and name != "dropout_key"
  ]
  if given:
    return f"it does not take {', '.join(given)}"
  if options.dropout_rate:
    return f"it does not take dropout ({options.dropout_rate})"
  if options.softcap is not None:
    return f"it does not take softcap ({options.softcap})"
  if options.return_lse:
    return "its lse can't be differentiated"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {q.dtype}"
  if options.causal and q.shape[1] != k.shape[1]:
    return (
      f"its causal mask is aligned top-left, and {q.shape[1]} queries meet "
      f"{k.shape[1]} keys"
    )
  if q.shape[1] % 2 or k.shape[1] % 2:
    return (
      f"its backward pass takes even lengths, not {q.shape[1]} queries and "
      f"{k.shape[1]} keys"
    )
  if options.window is not None and not options.causal:
    return f"it takes a window {options.window} with causal only"
  d, dv, limit = q.shape[3], v.shape[3], 256 if hopper else 128
  if d != dv:
    return f"it takes values as wide as keys, not {dv} and {d}"
  if d % 8 or d > limit:
    return f"it takes head widths of 8, 16, ..., {limit}, not {d}"
  return None


#: `attention` behind its checks; `explain` reads its table.
OP = Op(
  "attention",
  (Impl("xla", _xla), Impl("cudnn", _cudnn, _refuse_cudnn)),
  {"gpu": ("cudnn", "xla"), "cpu": ("xla",), "tpu": ("xla",)},
)
