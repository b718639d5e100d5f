"""The problems: what is seen, and what it counts for."""

import numpy as np
import pytest

from isthmus.attention.bench.case import (
  BLOCK,
  MASKS,
  PASSES,
  SPARSE,
  Case,
  grid,
  must,
)

pytestmark = pytest.mark.once

SIZES = {"batch": 2, "length": 1024, "heads": 3, "width": 64}


@pytest.mark.parametrize("mask", SPARSE)
def test_blocks_are_the_diagonal_and_a_share_of_what_lies_before(mask):
  blocks = Case(mask, **SIZES).blocks
  assert blocks.shape == (2, 3, 8, 8)
  assert not (blocks & ~np.tri(8, dtype=bool)).any()
  for row in range(8):
    assert blocks[..., row, row].all()
    kept = int(np.ceil(row * SPARSE[mask]))
    assert (blocks[..., row, :row].sum(-1) == kept).all()


def test_each_head_has_its_own_blocks():
  flat = Case("sparse8", **SIZES).blocks.reshape(6, -1)
  assert len({row.tobytes() for row in flat}) == 6


def test_the_masks_are_the_same_in_every_process():
  """A new object makes them anew; the checksum tells one from another."""
  for mask in ("sparse8", "documents"):
    sums = {Case(mask, **SIZES).checksum for _ in range(2)}
    other = Case(mask, **SIZES | {"length": 2048}).checksum
    assert len(sums) == 1 and other not in sums
  assert Case("causal", **SIZES).checksum == 0


def test_documents_are_where_they_start():
  case = Case("documents", **SIZES)
  ids, starts = case.documents, case.document_starts
  assert ids.shape == (2, 1024) and (starts[:, 0] == 0).all()
  assert (np.diff(ids, axis=1) >= 0).all() and (ids[:, -1] == 7).all()
  for row, bounds in zip(ids, starts, strict=True):
    assert (np.flatnonzero(np.diff(row)) + 1).tolist() == bounds[1:-1].tolist()


@pytest.mark.parametrize("mask", MASKS)
def test_the_density_is_that_of_the_mask(mask):
  """Of the mask in full; where the diagonal is cut, half of it is counted."""
  case = Case(mask, **SIZES)
  seen = np.ones((2, 3, 1024, 1024))
  if case.sparse:
    seen = seen * case.blocks.repeat(BLOCK, 2).repeat(BLOCK, 3)
  elif mask != "dense":
    seen = np.tril(seen) - np.eye(1024) / 2
  if mask == "documents":
    ids = case.documents
    seen = seen * (ids[:, :, None] == ids[:, None])[:, None]
  assert case.density == pytest.approx(seen.mean())
  pairs = seen.sum()
  assert case.flops("fwd") == pytest.approx(4 * 64 * pairs)
  assert case.flops("bwd") == pytest.approx(10 * 64 * pairs)
  assert case.flops("fwd+bwd") == pytest.approx(14 * 64 * pairs)
  assert set(PASSES) == {"fwd", "bwd", "fwd+bwd"}


def test_what_can_not_be_a_case_is_refused():
  for fields, said in (
    ({"mask": "sparse4"}, "case 'sparse4'; there are dense"),
    ({"mask": "sparse8", "length": 1000}, "128 tokens, and 1000 tokens"),
    ({"mask": "documents", "length": 8}, "want 16 tokens, not 8"),
    ({"mask": "causal", "heads": 0}, "heads is 0"),
  ):
    with pytest.raises(ValueError, match=said):
      Case(**{"mask": "dense", **SIZES, **fields})
  with pytest.raises(ValueError, match="64 channels don't split .* of 48"):
    grid(("dense",), (128,), (48,), tokens=128, hidden=64)


def test_the_grid_keeps_tokens_and_channels():
  for case in grid(MASKS, (1024, 4096), (64, 128), tokens=2048, hidden=256):
    assert case.heads * case.width == 256
    assert case.batch * case.length == max(2048, case.length)


def test_must_holds_the_promised_shapes():
  assert Case("causal", 1, 32768, 16, 128) in must()
  assert {c.mask for c in must()} == {"causal", *SPARSE}
  assert {(c.length, c.width) for c in must()} == {
    (32768, 128),
    (8192, 128),
    (8192, 64),
  }
