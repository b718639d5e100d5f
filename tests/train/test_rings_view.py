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


def test_the_least_is_bold_and_so_is_what_is_as_near_as_a_thousandth():
  job = Rings(length=2**17, devices=(2,), groups=(4,))
  seconds = (1.0, 1.0009, 1.002, 2.0, 1.0)
  points = [
    p._replace(seconds=x) for p, x in zip(job.points(), seconds, strict=True)
  ]
  line = digest(job, points).splitlines()[-1]
  assert line.endswith("| **1** | **1.001** | 1.002 | 2 | **1** |")
  assert line.startswith("| 4 | 2 | ")
  # 8 key heads divide over 8 devices; over 16 they don't.
  assert len(digest(JOB, JOB.points()).splitlines()) == 4 + 4
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
