"""The pace of steps: what is timed, what is told, and what a CPU refuses."""

import json

import numpy as np
import pytest

from isthmus.attention.bench.clock import Clock
from isthmus.attention.reshape import band_width, dense_steps
from isthmus.train.config import ConfigError
from isthmus.train.pace import Pace, kept

pytestmark = pytest.mark.once

SMALL = {
  "sides": (8, 8),
  "heads": 2,
  "head_dim": 8,
  "depth": 1,
  "keep": 0.125,
  "clock": Clock(rounds=1, seconds=1e-3),
}


@pytest.mark.parametrize("width", [0, 3, 19, 40])
def test_kept_is_counted(width):
  apart = np.abs(np.arange(20)[:, None] - np.arange(20))
  assert kept(20, width) == pytest.approx((apart <= width).mean())


def test_every_case_is_timed_and_the_mean_is_the_schedules(tmp_path):
  job = Pace(**SMALL)
  figures = job.run(tmp_path)
  cases = {"plain", "dense", "sparse", "mean"}
  want = {f"attention/{c}" for c in (*cases, "window")}
  want |= {f"layers/{c}" for c in cases}
  assert figures.keys() == {f"{c}/{k}" for c in want for k in ("ms", "saved")}
  share = dense_steps(50, first=15, every=5).mean()
  assert 0.4 < share < 0.5
  for group in ("attention", "layers"):
    ms = {c: figures[f"{group}/{c}/ms"] for c in cases}
    assert min(ms.values()) > 0
    mean = share * ms["dense"] + (1 - share) * ms["sparse"]
    assert ms["mean"] == pytest.approx(mean)
    saved = figures[f"{group}/sparse/saved"]
    assert saved == pytest.approx(1 - ms["sparse"] / ms["plain"])
  assert json.loads((tmp_path / "pace.json").read_text()) == figures
  table = (tmp_path / "pace.md").read_text()
  share = 100 * kept(64, band_width(64, 0.125))
  assert f"64 tokens, 2 heads of 8, bfloat16, {share:.1f}% of the" in table
  assert table.count("\n| ") == 1 + len(want)
  assert (tmp_path / "pace.png").stat().st_size > 5000


def test_a_cpu_refuses_what_a_gpu_is_for(tmp_path):
  assert Pace().tokens == 17776
  with pytest.raises(ConfigError, match="17776 tokens need a GPU"):
    Pace().run(tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"heads": 0}, "heads is 0"),
    ({"steps": 0}, "steps is 0"),
    ({"keep": 0.0}, "keep is 0"),
  ],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    Pace(**{**SMALL, **fields})
