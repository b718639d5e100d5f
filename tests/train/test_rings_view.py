"""What readers see of rings: which cell is bold, what was measured, crosses."""

import re

import pytest
from matplotlib.axes import Axes

from isthmus.train.rings import Rings
from isthmus.train.rings_view import digest, plot, table

pytestmark = pytest.mark.once

JOB = Rings(length=2**17, devices=(2, 8), groups=(1, 4))


def measured(seconds):
  """Points, of which kv_ring on 8 devices with groups of 4 was measured."""
  return [
    p._replace(measured=seconds) if p[:3] == (4, 8, "kv_ring") else p
    for p in JOB.points()
  ]


def test_the_least_of_a_line_is_bold_and_what_cannot_run_says_why():
  lines = [x for x in digest(JOB, JOB.points()).splitlines() if x[:3] == "| 4"]
  assert len(lines) == len(JOB.devices)
  for line, devices in zip(lines, JOB.devices, strict=True):
    cells = [x.strip() for x in line.strip("| ").split("|")][3:]
    here = [p for p in JOB.points() if (p.group, p.devices) == (4, devices)]
    least = min(p.seconds for p in here)
    for cell, p in zip(cells, here, strict=False):  # ulysses is the last
      close = p.seconds <= 1.001 * least
      assert cell == (f"**{p.seconds:.4g}**" if close else f"{p.seconds:.4g}")
  # 8 key heads divide over 8 devices; over 16 they don't.
  odd = Rings(length=2**17, devices=(16,), groups=(4,))
  assert digest(odd, odd.points()).endswith("| heads |")


def test_tables_say_what_was_measured():
  text = table(JOB, JOB.points())
  assert "measured: not run" in text
  assert text.count("| not run |") == len(JOB.points())
  text = table(JOB, measured(0.321))
  assert "measured: 1 points" in text
  (line,) = re.findall(r".*\| 0\.321 \|", text)
  assert line.startswith("| 4 | 8 | kv_ring |")


def test_a_point_is_drawn_where_it_was_measured(tmp_path, monkeypatch):
  crosses, draw = [], Axes.plot

  def spy(self, *args, **kwargs):
    if "x" in args[2:]:
      crosses.append((self.get_subplotspec().num1, *args[:2]))
    return draw(self, *args, **kwargs)

  monkeypatch.setattr(Axes, "plot", spy)
  points = measured(0.321)
  plot(JOB, points, tmp_path / "rings.png")
  (compute,) = (p.compute for p in points if p.measured)
  assert crosses == [(1, 8, pytest.approx(0.321 / compute))]
  assert (tmp_path / "rings.png").stat().st_size > 20_000
