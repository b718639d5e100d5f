"""Rows and refusals."""

import pytest

from isthmus.attention.bench.case import Case
from isthmus.attention.bench.rows import Refusal, Row, ratios

pytestmark = pytest.mark.once

CASE = Case("causal", 1, 1024, 2, 64)


def test_ratios_are_of_one_case_and_pass():
  ours = Row("isthmus mosaic", True, CASE, "fwd", ms=2.0)
  rows = [
    ours,
    Row("isthmus chunked", True, CASE, "fwd", ms=9.0),
    Row("slow", False, CASE, "fwd", ms=3.0),
    Row("fast", False, CASE, "fwd", ms=1.0),
    Row("fast", False, CASE, "bwd", ms=7.0),
    Row("fast", False, Case("dense", 1, 1024, 2, 64), "fwd", ms=7.0),
  ]
  assert ratios(ours, rows) == {"slow": 1.5, "fast": 0.5}


def test_a_row_counts_flops():
  row = Row("x", False, CASE, "bwd", ms=0.5)
  flops = 4 * 1024**2 * 2 * 64 * 0.5 * 2.5
  assert row.as_dict()["tflops"] == row.tflops == flops / 0.5e-3 / 1e12
  assert row.as_dict()["density"] == 0.5


def test_a_refusal_is_a_line_and_knows_a_failure():
  limit = Refusal.of("x", NotImplementedError("not\n this"), CASE, "fwd")
  assert str(limit) == "x, causal B1 S1024 H2 D64 fwd: not this"
  assert not limit.failed
  error = Refusal.of("x", RuntimeError("broke"))
  assert str(error) == "x: RuntimeError: broke" and error.failed
