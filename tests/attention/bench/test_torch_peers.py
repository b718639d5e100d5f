"""The protocol with torch's process; torch itself needs a GPU machine."""

import contextlib
import dataclasses
import importlib.util
import types

import numpy as np
import pytest

from isthmus.attention.bench import torch_peers
from isthmus.attention.bench.case import MASKS, PASSES, Case
from isthmus.attention.bench.rows import Refusal, Row

pytestmark = pytest.mark.once

CASE = Case("sparse8", 1, 512, 2, 64)


def test_lists_hold_the_blocks():
  num, index = torch_peers.listed(CASE.blocks)
  assert num.dtype == index.dtype == np.int32
  found = np.zeros_like(CASE.blocks)
  for place in np.ndindex(num.shape):
    found[(*place, index[place][: num[place]])] = True
    assert (np.diff(index[place][: num[place]]) > 0).all()
  assert (found == CASE.blocks).all()


def test_rows_travel_whole():
  row = Row("torch-flex", False, CASE, "bwd", 1.5, peak_bytes=7, note="x")
  for found in (row, Refusal("torch-fa4", "no", CASE, "fwd", failed=True)):
    assert torch_peers.decode(torch_peers.encode(found)) == found


def test_who_is_absent_is_said(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  peers = torch_peers.TORCH_PEERS
  found = list(torch_peers.run([CASE], ["fwd"], peers, limit=9))
  assert [str(f) for f in found] == [
    f"{peer}: torch isn't installed" for peer in peers
  ]


@pytest.fixture
def asked(monkeypatch):
  """Runs the process, though there is no torch for it."""
  monkeypatch.setattr(torch_peers, "absent", lambda peer: None)

  def run(passes, limit):
    peers = ("torch-flash", "torch-flex")
    case = dataclasses.replace(CASE)  # whose checksum is not known yet
    return list(torch_peers.run([case], passes, peers, limit=limit))

  return run


@pytest.mark.process
@pytest.mark.skipif(
  importlib.util.find_spec("torch") is not None, reason="torch is installed"
)
def test_the_process_answers(asked):
  """It makes the mask of the same checksum, and finds no torch."""
  found = asked(["fwd", "bwd"], limit=120)
  assert {f.who for f in found} == {"torch-flash", "torch-flex"}
  assert all("No module named 'torch'" in f.reason for f in found)
  assert all(f.case == CASE for f in found)


@pytest.mark.process
def test_other_masks_are_not_timed(asked, monkeypatch):
  """The process ends; whatever it was to measure is refused by name."""
  monkeypatch.setattr(Case, "checksum", 1)
  found = asked(["fwd", "bwd"], limit=120)
  assert len(found) == 4 and all(f.failed for f in found)
  assert {f.reason for f in found} == {"torch's process ended with status 1"}


def test_what_time_is_not_left_for_is_said(asked):
  found = asked(["fwd"], limit=0)
  assert [(f.who, f.which) for f in found] == [
    ("torch-flash", "fwd"),
    ("torch-flex", "fwd"),
  ]
  assert all("torch's peers had 0 s" in f.reason for f in found)


class _Tensor(np.ndarray):
  """An array with what the module asks of a tensor."""

  def cuda(self):
    return self

  def new_zeros(self, shape):
    return np.zeros(shape, self.dtype).view(_Tensor)


class _Stand:
  """In place of torch, Triton, FlexAttention and FlashAttention-4.

  What the peers are called with is kept in `calls`.
  """

  def __init__(self):
    self.calls = []
    zeros = lambda x: np.zeros_like(x)
    names = types.SimpleNamespace
    torch = names(
      cuda=names(
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
        max_memory_allocated=lambda: 7,
      ),
      autograd=names(grad=lambda out, x, do, retain_graph=False: do),
      manual_seed=lambda seed: None,
      randn=lambda shape, **options: np.zeros(1).view(_Tensor),
      bfloat16=None,
      zeros_like=zeros,
      from_numpy=lambda x: x.view(_Tensor),
      compile=lambda function, dynamic: function,
      _dynamo=names(config=names()),
      nn=names(
        functional=names(scaled_dot_product_attention=self._call("sdpa"))
      ),
    )
    self.modules = {
      "torch": torch,
      "triton": names(testing=names(do_bench=self._bench)),
      "torch._functorch.config": names(),
      "torch.nn.attention": names(
        sdpa_kernel=contextlib.nullcontext,
        SDPBackend=names(FLASH_ATTENTION=1, CUDNN_ATTENTION=2),
      ),
      "torch.nn.attention.flex_attention": names(
        flex_attention=self._call("flex"),
        create_block_mask=lambda seen, *sizes: ("made", *sizes),
        BlockMask=names(from_kv_blocks=lambda *x, **options: x),
      ),
      "flash_attn.cute.interface": names(flash_attn_func=self._call("fa4")),
      "flash_attn.cute.block_sparsity": names(
        BlockSparseTensorsTorch=lambda *x, block_size: x
      ),
    }

  def _call(self, name):
    def call(q, k, v, **options):
      self.calls.append((name, options))
      return q

    return call

  def _bench(self, call, warm, rep, return_mode):
    call()
    return 0.25


@pytest.fixture
def stand(monkeypatch):
  found = _Stand()
  monkeypatch.setattr(torch_peers, "_package", found.modules.__getitem__)
  torch_peers._compiled_flex.cache_clear()
  yield found
  torch_peers._compiled_flex.cache_clear()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("peer", torch_peers.TORCH_PEERS)
def test_each_pass_has_a_row_or_a_reason(peer, mask, stand):
  case = dataclasses.replace(CASE, mask=mask)
  found = list(torch_peers._measure(peer, case, tuple(PASSES), True))
  takes = {
    "torch-flex": True,
    "torch-fa4": mask != "documents",
    "torch-cudnn": mask in ("dense", "causal"),
    "torch-flash": mask in ("dense", "causal"),
  }[peer]
  if takes:
    assert [(f.which, f.ms, f.peak_bytes) for f in found] == [
      (which, 0.25, 7) for which in PASSES
    ]
  else:
    (refusal,) = found
    assert not refusal.failed and refusal.which is None


def test_the_same_lists_reach_all(stand):
  """Whole blocks by query, and by key for FlashAttention-4's backward."""
  for peer in ("torch-flex", "torch-fa4"):
    list(torch_peers._measure(peer, CASE, ("fwd",), True))
  flex = dict(stand.calls)["flex"]["block_mask"]
  fa4 = dict(stand.calls)["fa4"]
  num, index = torch_peers.listed(CASE.blocks)
  for lists in (flex, fa4["block_sparse_tensors"]):
    partial_num, _, full_num, full = lists
    assert not partial_num.any()
    assert (full_num == num).all() and (full == index).all()
  _, _, num, index = fa4["block_sparse_tensors_bwd"]
  seen = np.zeros_like(CASE.blocks)
  for b, n, key in np.ndindex(num.shape):
    seen[b, n, index[b, n, key][: num[b, n, key]], key] = True
  assert (seen == CASE.blocks).all() and not fa4["causal"]
