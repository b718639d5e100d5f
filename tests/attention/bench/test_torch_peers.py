"""The protocol with torch's process; torch itself needs a GPU machine."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from isthmus.attention.bench import torch_peers
from isthmus.attention.bench.case import Case
from isthmus.attention.bench.rows import Refusal, Row

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
