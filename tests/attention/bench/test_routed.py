"""Problems of block routing: their work, their lines, and that they run."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench.case import Case
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.report import Report
from isthmus.attention.bench.routed import Routed, Routing, measure, parse
from isthmus.attention.bench.rows import Row

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
  "block, top_k, length", [(4, 3, 22), (5, 1, 20), (8, 9, 30)]
)
def test_work_is_that_of_the_pairs(block, top_k, length):
  pairs = 0
  for i in range(length):
    own = i // block
    pairs += i % block + 1 + min(top_k - 1, own) * block
  routing = Routing(block, top_k, 2, length, 3, 16)
  assert routing.pairs == pairs
  scores = length * -(-length // block) / 2 * 2
  assert routing.flops("bwd") == 2.5 * 4 * pairs * 2 * 3 * 16
  assert routing.flops("fwd") == (4 * pairs + scores) * 2 * 3 * 16


def test_all_blocks_are_causal_attention():
  routing = Routing(16, 99, 1, 256, 1, 8)
  assert routing.pairs == 256 * 257 / 2


def test_speed_is_over_causal_attention_of_the_same_shape():
  shape = dict(batch=2, length=64, heads=4, width=8)
  found = Routed(
    Routing(8, 2, **shape),
    "mosaic",
    {"fwd": 2.0, "routing": 0.5},
    {"fwd": 2**20, "routing": None},
    {},
  )
  rows = [
    Row("cudnn", False, Case("causal", **shape), "fwd", 8.0),
    Row("cudnn", False, Case("dense", **shape), "fwd", 9.0),
    Row("cudnn", False, Case("causal", **shape | {"batch": 1}), "fwd", 4.0),
    Row("cudnn", False, Case("causal", **shape), "fwd+bwd", 30.0),
  ]
  assert found.speeds(rows, "fwd") == {"cudnn": 4.0}
  one, two = found.lines(rows, "NVIDIA H100 80GB HBM3")
  assert one.startswith("moba 8 x 2, B2 S64 H4 D8 fwd mosaic: 2.000 ms, ")
  assert one.endswith(", 4x cudnn, 1 MiB") and "% of NVIDIA H100" in one
  assert two == "moba 8 x 2, B2 S64 H4 D8 routing mosaic: 0.500 ms"
  assert "% of" not in next(found.lines([], "cpu"))


def test_a_problem_runs_and_is_kept(tmp_path):
  routing = Routing(8, 2, 1, 32, 2, 8)
  found = measure(routing, Clock(1, 1e-4), dtype=jnp.float32)
  assert list(found.ms) == ["fwd", "fwd+bwd"] and min(found.ms.values()) > 0
  assert found.impl == "chunked" and np.isfinite(found.peak_bytes["fwd"])
  machine = {"device": "cpu", "copy_bytes_per_second": 1e9}
  report = Report(machine, {}, routed=[found])
  report.write(tmp_path / "bench.json")
  again = Report.read(tmp_path / "bench.json")
  assert again.routed == [found]
  assert list(again.lines()) == list(found.lines([], "cpu"))


@pytest.mark.parametrize("text", ["128", "128x", "0x8", "8 x 2"])
def test_what_is_no_block_and_top_k_is_refused(text):
  assert parse("128x8") == (128, 8)
  with pytest.raises(ValueError, match="such as 128x8"):
    parse(text)
