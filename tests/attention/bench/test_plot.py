"""The plot: lines over lengths, bars for a single one."""

import pytest
from matplotlib.figure import Figure

from isthmus.attention.bench.case import Case
from isthmus.attention.bench.plot import draw, plot
from isthmus.attention.bench.rows import Row

pytestmark = pytest.mark.once


def _rows(lengths):
  return [
    Row(who, who == "isthmus", Case("causal", 1, s, 16, 128), which, ms)
    for s in lengths
    for which in ("fwd", "bwd")
    for who, ms in (("peer", 2.0), ("isthmus", 1.0))
  ]


def test_lines_over_lengths():
  figure, rows = Figure(), _rows((1024, 4096))
  draw(rows, figure, "a title")
  forward, backward = figure.axes
  assert [a.get_title() for a in figure.axes] == [
    "causal, D 128, fwd",
    "causal, D 128, bwd",
  ]
  assert [line.get_label() for line in forward.lines] == ["isthmus", "peer"]
  ours = [r.tflops for r in rows if r.who == "isthmus" and r.which == "fwd"]
  assert forward.lines[0].get_ydata().tolist() == ours
  assert backward.lines[0].get_xdata().tolist() == [1024, 4096]


def test_bars_for_one_length():
  figure, rows = Figure(), _rows((1024,))
  draw(rows, figure, "a title")
  bars = [patch.get_width() for patch in figure.axes[0].patches]
  rates = {r.who: r.tflops for r in rows if r.which == "fwd"}
  assert bars == [rates["isthmus"], rates["peer"]]


def test_it_is_written(tmp_path):
  plot(_rows((1024,)), tmp_path / "bench.png", "a title")
  assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
  with pytest.raises(ValueError, match="nothing was measured"):
    plot([], tmp_path / "other.png", "a title")
