"""The peers under torch, timed in a process of their own.

Torch and JAX share a GPU's memory badly. `run` starts this module as a program,
hands it the cases on its standard input, and reads rows from its standard
output, a JSON object a line. Both sides make the masks from the same seed; the
checksum of each case is compared before anything is timed.
"""

import functools
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from isthmus.attention.bench.case import BLOCK, Case
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.peers import add_dsl_path
from isthmus.attention.bench.rows import Refusal, Row
from isthmus.pallas.dispatch import platform

#: A peer makes, for a case, q, k, v, do and a function of (q, k, v).
Made = tuple[list[Any], Callable[..., Any]]

#: The peers that run under torch.
TORCH_PEERS = ("torch-fa4", "torch-flex", "torch-cudnn", "torch-flash")


def run(
  cases: Sequence[Case],
  passes: Sequence[str],
  peers: Sequence[str],
  *,
  limit: float,
  quick: bool = False,
) -> Iterator[Row | Refusal]:
  """Rows of the torch peers, as they come.

  Args:
    cases: what to measure.
    passes: which passes of each.
    peers: names out of `TORCH_PEERS`.
    limit: seconds after which the process is ended; what is left then is
      refused, by name.
    quick: time shorter.

  Example:
    >>> list(run([], ["fwd"], [], limit=60))
    []
  """
  for peer in peers:
    reason = absent(peer)
    if reason:
      yield Refusal(peer, reason)
  peers = [peer for peer in peers if absent(peer) is None]
  if not cases or not peers:
    return
  order = {
    "cases": [c.as_dict() | {"checksum": c.checksum} for c in cases],
    "passes": list(passes),
    "peers": list(peers),
    "quick": quick,
  }
  left = [(p, c, w) for c in cases for p in peers for w in passes]
  for found in _child(order, limit):
    if isinstance(found, str):
      yield from (
        Refusal(peer, found, case, which, failed=True)
        for peer, case, which in left
      )
      return
    left = [
      one
      for one in left
      if not (
        one[0] == found.who
        and found.case in (None, one[1])
        and found.which in (None, one[2])
      )
    ]
    yield found


def absent(peer: str) -> str | None:
  """Why a peer can't run here at all, or None.

  Example:
    >>> reason = absent("torch-fa4")
    >>> reason is None or "isn't installed" in reason or "GPU" in reason
    True
  """
  needs = ["torch", *(["flash_attn"] if peer == "torch-fa4" else [])]
  for package in needs:
    if importlib.util.find_spec(package) is None:
      return f"{package} isn't installed"
  if platform() != "gpu":
    return f"it needs an NVIDIA GPU, not a {platform()}"
  return None


def _child(order, limit) -> Iterator[Row | Refusal | str]:
  """What the process says; at last why it ended early, if it did."""
  process = subprocess.Popen(
    [sys.executable, "-m", "isthmus.attention.bench.torch_peers"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    # This process needs JAX for nothing but its imports.
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert process.stdin and process.stdout
  process.stdin.write(json.dumps(order))
  process.stdin.close()
  lines: queue.Queue[str | None] = queue.Queue()

  def read(stream):
    for line in stream:
      lines.put(line)
    lines.put(None)

  threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
  end = time.monotonic() + limit
  try:
    while True:
      try:
        line = lines.get(timeout=max(0.0, end - time.monotonic()))
      except queue.Empty:
        yield f"no time was left: torch's peers had {limit:.0f} s"
        return
      if line is None:
        status = process.wait()
        if status:
          yield f"torch's process ended with status {status}"
        return
      if line.startswith("{"):
        yield decode(line)
  finally:
    process.kill()
    process.wait()


def encode(found: Row | Refusal) -> str:
  """A row or refusal as a line.

  Example:
    >>> decode(encode(Refusal("torch-fa4", "no")))
    Refusal(who='torch-fa4', reason='no', case=None, which=None, ...)
  """
  fields = vars(found) | {"case": found.case and found.case.as_dict()}
  return json.dumps({type(found).__name__: fields})


def decode(line: str) -> Row | Refusal:
  """The way back from `encode`.

  Example:
    >>> case = Case("causal", 1, 16, 2, 8)
    >>> decode(encode(Row("torch-flex", False, case, "fwd", ms=1.0))).ms
    1.0
  """
  ((kind, fields),) = json.loads(line).items()
  fields["case"] = fields["case"] and Case(**fields["case"])
  return {"Row": Row, "Refusal": Refusal}[kind](**fields)


# --- the process ---


def main() -> None:
  """Reads the order, prints rows.

  Example:
    >>> callable(main)  # it reads standard input: run it as `run` does
    True
  """
  order = json.load(sys.stdin)
  for fields in order["cases"]:
    checksum = fields.pop("checksum")
    case = Case(**fields)
    if case.checksum != checksum:
      raise SystemExit(f"{case}: checksum {case.checksum}, not {checksum}")
    for peer in order["peers"]:
      for found in _measure(peer, case, order["passes"], order["quick"]):
        print(encode(found), flush=True)


def _measure(peer, case, passes, quick) -> Iterator[Row | Refusal]:
  start = time.perf_counter()
  try:
    torch, triton = _package("torch"), _package("triton")
    (q, k, v, do), call = _MAKE[peer](case)
  except Exception as error:
    yield Refusal.of(peer, error, case)
    return
  kept = []

  def bench(call):
    # It has been called before. A slow call is timed once.
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    if once > Clock().slow:
      return once * 1e3
    warm, rep = (10, 40) if quick else (50, 200)
    ms = triton.testing.do_bench(call, warm, rep, return_mode="median")
    return float(ms)

  def backward():
    if not kept:
      kept.append(call(q, k, v))
    return torch.autograd.grad(kept[0], (q, k, v), do, retain_graph=True)

  def both():
    kept.clear()
    return torch.autograd.grad(call(q, k, v), (q, k, v), do)

  todo = {"fwd": lambda: call(q, k, v), "bwd": backward, "fwd+bwd": both}
  for which in passes:
    try:
      torch.cuda.reset_peak_memory_stats()
      todo[which]()
      torch.cuda.synchronize()
      first = time.perf_counter() - start
      peak = torch.cuda.max_memory_allocated()
      ms = bench(todo[which])
    except Exception as error:
      yield Refusal.of(peer, error, case, which)
    else:
      yield Row(
        peer, False, case, which, ms, peak_bytes=peak, first_seconds=first
      )
    start = time.perf_counter()


def _tensors(case, *, heads_first) -> list[Any]:
  torch = _package("torch")
  shape = (case.batch, case.length, case.heads, case.width)
  if heads_first:
    shape = (shape[0], shape[2], shape[1], shape[3])
  torch.manual_seed(0)
  return [
    torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
    for i in range(4)
  ]


def _sdpa(backend: str, case: Case) -> Made:
  torch, kernels = _package("torch"), _package("torch.nn.attention")
  if case.mask not in ("dense", "causal"):
    raise NotImplementedError(f"it does not take {case.label}")

  def call(q, k, v):
    with kernels.sdpa_kernel(getattr(kernels.SDPBackend, backend)):
      return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=case.mask == "causal"
      )

  return _tensors(case, heads_first=True), call


def _flex(case: Case) -> Made:
  torch, flex = _package("torch"), _package("torch.nn.attention.flex_attention")
  if case.mask == "dense":
    mask = None
  elif case.mask == "causal":
    size = case.length
    mask = flex.create_block_mask(_causal, None, None, size, size)
  elif case.mask == "documents":
    ids = torch.from_numpy(case.documents).cuda()

    def seen(b, h, i, j):
      return (ids[b, i] == ids[b, j]) & (i >= j)

    size = case.length
    mask = flex.create_block_mask(seen, case.batch, None, size, size)
  else:
    num, index = _lists(case.blocks)
    zero = torch.zeros_like(num)
    mask = flex.BlockMask.from_kv_blocks(
      zero, torch.zeros_like(index), num, index, BLOCK_SIZE=BLOCK
    )
  call = functools.partial(_compiled_flex(), block_mask=mask)
  return _tensors(case, heads_first=True), call


@functools.cache
def _compiled_flex() -> Any:
  """Compiled anew for each shape and kind of mask, not for each list."""
  torch, flex = _package("torch"), _package("torch.nn.attention.flex_attention")
  # The pullback is called many times on what the forward pass kept.
  _package("torch._functorch.config").donated_buffer = False
  # Past its limit of 8 dynamo would fall back, in silence, to all scores.
  torch._dynamo.config.recompile_limit = 256
  return torch.compile(flex.flex_attention, dynamic=False)


def _package(name: str) -> Any:
  return importlib.import_module(name)


def _causal(b, h, i, j):
  return i >= j


def _fa4(case: Case) -> Made:
  add_dsl_path()
  flash = _package("flash_attn.cute.interface")
  lists = _package("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
  if case.mask == "documents":
    raise NotImplementedError("its packed call is not measured here")
  options: dict[str, Any] = {"causal": case.mask == "causal"}
  if case.sparse:
    for name, blocks in (
      ("block_sparse_tensors", case.blocks),
      ("block_sparse_tensors_bwd", case.blocks.swapaxes(-1, -2)),
    ):
      num, index = _lists(blocks)
      options[name] = lists(
        num.new_zeros(num.shape),
        index.new_zeros(index.shape),
        num,
        index,
        block_size=(BLOCK, BLOCK),
      )

  def call(q, k, v):
    out = flash.flash_attn_func(q, k, v, **options)
    return out[0] if isinstance(out, tuple | list) else out

  return _tensors(case, heads_first=False), call


def _lists(blocks: np.ndarray) -> tuple[Any, Any]:
  torch = _package("torch")
  num, index = listed(blocks)
  return torch.from_numpy(num).cuda(), torch.from_numpy(index).cuda()


def listed(
  blocks: Bool[np.ndarray, "*lead kb"],
) -> tuple[Int32[np.ndarray, "*lead"], Int32[np.ndarray, "*lead kb"]]:
  """(num, indices), int32: how many blocks are True, and those first.

  Example:
    >>> num, index = listed(np.array([[False, True, False, True]]))
    >>> num.tolist(), index.tolist()
    ([2], [[1, 3, 0, 2]])
  """
  index = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
  return blocks.sum(axis=-1).astype(np.int32), index


_MAKE: dict[str, Callable[[Case], Made]] = {
  "torch-flash": lambda case: _sdpa("FLASH_ATTENTION", case),
  "torch-cudnn": lambda case: _sdpa("CUDNN_ATTENTION", case),
  "torch-flex": _flex,
  "torch-fa4": _fa4,
}

if __name__ == "__main__":
  main()
