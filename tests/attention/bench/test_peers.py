"""All that run here compute the same thing for the same case."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench import peers
from isthmus.attention.bench.case import BLOCK, MASKS, Case
from isthmus.attention.bench.clock import inputs

pytestmark = pytest.mark.once


def _oracle(case, q, k, v):
  """Float64, the mask in full."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  seen = np.ones((case.batch, case.heads, case.length, case.length), bool)
  if case.sparse:
    seen &= case.blocks.repeat(BLOCK, 2).repeat(BLOCK, 3)
  elif case.mask != "dense":
    seen &= np.tri(case.length, dtype=bool)
  if case.mask == "documents":
    ids = case.documents
    seen &= (ids[:, :, None] == ids[:, None])[:, None]
  x = np.einsum("btnd,bsnd->bnts", q, k) / case.width**0.5
  p = np.where(seen, np.exp(x - x.max(-1, keepdims=True)), 0)
  return np.einsum("bnts,bsnd->btnd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("mask", MASKS)
def test_they_see_the_same_keys(mask):
  case = Case(mask, batch=2, length=512, heads=2, width=16)
  (q, k, v), *_ = inputs(2, 512, 2, 16, jnp.float32, count=3)
  expected = _oracle(case, q, k, v)
  (xla,) = [p for p in peers.JAX_PEERS if p.name == "xla"]
  for one in (peers.isthmus(peers.best(case)), xla):
    function, operands = one.make(case)
    out = jax.jit(function)(q, k, v, *operands)
    np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=one.name)


def test_block_lists_are_traced():
  """One compiled function serves any selection of a shape."""
  case = Case("sparse8", 1, 1024, 2, 16)
  call, (mask,) = peers.isthmus(peers.best(case)).make(case)
  other = peers.block_mask(dataclasses.replace(case, mask="sparse32"))
  q = jax.random.normal(jax.random.key(0), (1, 1024, 2, 16))
  traces = []

  def counted(*arguments):
    traces.append(1)
    return call(*arguments)

  jitted = jax.jit(counted)
  a, b = jitted(q, q, q, mask), jitted(q, q, q, other)
  assert len(traces) == 1 and not np.allclose(a, b)


def test_who_is_absent_says_why():
  found = {p.name: p.absent() for p in peers.JAX_PEERS}
  assert found.pop("xla") is None
  for reason in found.values():
    assert reason == "it needs an NVIDIA GPU, not a cpu"
  one = peers.Contender("x", lambda case: None, package="no_such_package")
  assert one.absent() == "no_such_package isn't installed"


def test_xla_refuses_scores_beyond_the_memory():
  (xla,) = [p for p in peers.JAX_PEERS if p.name == "xla"]
  with pytest.raises(NotImplementedError, match="scores want about 3072 GiB"):
    xla.make(Case("dense", 1, 131072, 16, 128))


def test_the_inner_folder_comes_onto_the_path(tmp_path, monkeypatch):
  """As the package's .pth would do it, and once."""
  inner = tmp_path / "nvidia_cutlass_dsl" / "dsl_packages"
  inner.mkdir(parents=True)
  monkeypatch.setattr(peers.sys, "path", [str(tmp_path), *peers.sys.path])
  peers.add_dsl_path()
  peers.add_dsl_path()
  assert peers.sys.path.count(str(inner)) == 1
