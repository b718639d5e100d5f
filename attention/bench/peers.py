"""What is timed under JAX: our implementations, and the peers that JAX has.

A contender makes, for a case, a function of (q, k, v, *operands) and the
operands. It raises `NotImplementedError` with the reason where it can't, and
`ImportError` where its package isn't there.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from isthmus import attention as attend
from isthmus.attention.bench.case import BLOCK, Case
from isthmus.pallas.dispatch import platform

#: (function of q, k, v and operands, operands)
Made = tuple[Callable[..., jax.Array], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Contender:
  """A name in the table, and how to call what it names.

  Attributes:
    name: as the table has it.
    make: of a case; see the module.
    ours: whether it is an implementation of isthmus.
    package: what it needs besides JAX, if anything.
    gpu: whether it needs one.

  Example:
    >>> [peer.name for peer in JAX_PEERS if not peer.absent()]  # on a CPU
    ['xla']
  """

  name: str
  make: Callable[[Case], Made]
  ours: bool = False
  package: str | None = None
  gpu: bool = False

  def absent(self) -> str | None:
    """Why it can run no case here, or None.

    Example:
      >>> Contender("x", lambda case: None, package="no_such").absent()
      "no_such isn't installed"
    """
    if self.gpu and platform() != "gpu":
      return f"it needs an NVIDIA GPU, not a {platform()}"
    if self.package and importlib.util.find_spec(self.package) is None:
      return f"{self.package} isn't installed"
    return None


def isthmus(impl: str) -> Contender:
  """`isthmus.attention.attention` with an implementation of ours.

  Block lists are arguments of the compiled function: traced, not constants.

  Example:
    >>> function, operands = isthmus("xla").make(Case("causal", 1, 16, 2, 8))
    >>> q = jnp.ones((1, 16, 2, 8))
    >>> function(q, q, q, *operands).shape
    (1, 16, 2, 8)
  """
  return Contender(f"isthmus {impl}", functools.partial(_ours, impl), ours=True)


def best(case: Case, dtype: Any = jnp.bfloat16) -> str:
  """The implementation that `attention` takes for a case by itself.

  Example:
    >>> name = best(Case("causal", 1, 16, 2, 8))  # on a CPU
    >>> name in ("chunked", "xla")
    True
  """
  shape = (case.batch, case.length, case.heads, case.width)
  x = jax.ShapeDtypeStruct(shape, dtype)
  rows = attend.explain(x, x, x, **_condition(case, *_operands(case)))
  for row in rows:
    if row.verdict == "runs":
      return row.name
  reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows)
  raise NotImplementedError(f"no implementation takes it ({reasons})")


def _ours(impl: str, case: Case) -> Made:
  def call(q, k, v, *operands):
    condition = _condition(case, *operands)
    return attend.attention(q, k, v, impl=impl, **condition)

  return call, _operands(case)


def _operands(case: Case) -> tuple[Any, ...]:
  if case.sparse:
    return (block_mask(case),)
  return (jnp.asarray(case.documents),) if case.mask == "documents" else ()


def _condition(case: Case, *operands: Any) -> dict[str, Any]:
  """A case as arguments of `attention`."""
  if case.sparse:
    return {"mask": operands[0]}
  if case.mask == "documents":
    return {"causal": True, "segment_ids": operands[0]}
  return {"causal": case.mask == "causal"}


def block_mask(case: Case) -> Any:
  """The `BlockMask` of a sparse case: all of its blocks are seen whole.

  Example:
    >>> mask = block_mask(Case("sparse8", 1, 512, 2, 64))
    >>> type(mask).__name__
    'BlockMask'
  """
  blocks = jnp.asarray(case.blocks)
  return attend.BlockMask.from_blocks(blocks, block=(BLOCK, BLOCK))


def _only(case: Case, *masks: str) -> None:
  if case.mask not in masks:
    raise NotImplementedError(f"it does not take {case.label}")


def _cudnn(case: Case) -> Made:
  _only(case, "dense", "causal")
  return functools.partial(
    jax.nn.dot_product_attention,
    is_causal=case.mask == "causal",
    implementation="cudnn",
  ), ()


def _jax_mosaic(case: Case) -> Made:
  """JAX's example kernel; its bfloat16 path fails, so it casts."""
  _only(case, "dense", "causal")
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
    block_q=64,
    block_kv=128 if case.width <= 128 else 64,
    max_concurrent_steps=2,
    causal=case.mask == "causal",
    block_q_dkv=64,
    block_kv_dkv=64,
    block_q_dq=64,
    block_kv_dq=64,
    compute_wgs_bwd=2,
  )

  def call(q, k, v):
    half = (x.astype(jnp.float16) for x in (q, k, v))
    return attention_mgpu.attention(*half, config).astype(q.dtype)

  return call, ()


def _flash3(case: Case) -> Made:
  _only(case, "dense", "causal", "documents")
  flash3: Any = importlib.import_module("flash_attn3_jax")
  if case.mask != "documents":
    return functools.partial(
      flash3.flash_mha, is_causal=case.mask == "causal"
    ), ()
  starts = case.document_starts
  rows = starts[:, :-1] + case.length * jnp.arange(case.batch)[:, None]
  ends = jnp.append(rows.reshape(-1), case.batch * case.length)
  longest = int((starts[:, 1:] - starts[:, :-1]).max())

  def call(q, k, v, ends):
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = flash3.flash_mha_varlen(
      *flat,
      ends,
      max_seqlen_q=longest,
      max_seqlen_k=longest,
      is_causal=True,
    )
    return out.reshape(q.shape)

  return call, (ends.astype(jnp.int32),)


def _fa4_jax(case: Case) -> Made:
  _only(case, "dense", "causal", "documents")
  add_dsl_path()
  fa4: Any = importlib.import_module("fa4_jax")
  causal = case.mask != "dense"
  if case.mask != "documents":
    return functools.partial(fa4.flash_attn, causal=causal), ()

  def call(q, k, v, ids):
    mod = fa4.document_mask(ids)
    return fa4.flash_attn(q, k, v, causal=True, mask_mod=mod)

  return call, (jnp.asarray(case.documents),)


def _xla(case: Case) -> Made:
  """XLA with all scores in memory, and the mask of the case expanded."""
  scores = case.batch * case.heads * case.length**2
  need, have = 12 * scores, memory_bytes()
  if need > 0.8 * have:
    raise NotImplementedError(
      f"its scores want about {need / 2**30:.0f} GiB, and there are "
      f"{have / 2**30:.0f}"
    )
  call = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  if case.mask == "documents":
    ids = jnp.asarray(case.documents)
    return lambda q, k, v, ids: call(
      q, k, v, mask=(ids[:, :, None] == ids[:, None])[:, None], is_causal=True
    ), (ids,)
  if case.sparse:

    def sparse(q, k, v, blocks):
      mask = jnp.repeat(jnp.repeat(blocks, BLOCK, axis=2), BLOCK, axis=3)
      return call(q, k, v, mask=mask)

    return sparse, (jnp.asarray(case.blocks),)
  return functools.partial(call, is_causal=case.mask == "causal"), ()


def memory_bytes() -> int:
  """Bytes that the device's memory has, or the machine's for a CPU.

  Example:
    >>> memory_bytes() > 2**28
    True
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return int(stats.get("bytes_limit", host))


def add_dsl_path() -> None:
  """Puts the CuTe DSL's inner folder on the path.

  Its wheel does so by a .pth file, which Python reads in site folders only:
  not in one that `PYTHONPATH` or `pip install --target` names.

  Example:
    >>> before = len(sys.path)
    >>> add_dsl_path()
    >>> len(sys.path) - before in (0, 1)
    True
  """
  spec = importlib.util.find_spec("nvidia_cutlass_dsl")
  roots = spec.submodule_search_locations if spec else None
  for root in roots or ():
    inner = pathlib.Path(root) / "dsl_packages"
    if inner.is_dir() and str(inner) not in sys.path:
      sys.path.insert(0, str(inner))


#: The peers that run under JAX.
JAX_PEERS = (
  Contender("cudnn", _cudnn, gpu=True),
  Contender("jax-mosaic", _jax_mosaic, gpu=True),
  Contender("flash3-jax", _flash3, gpu=True, package="flash_attn3_jax"),
  Contender("fa4-jax", _fa4_jax, gpu=True, package="fa4_jax"),
  Contender("xla", _xla),
)
