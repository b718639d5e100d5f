"""The table of chosen blocks, what is promised of them, and their plot."""

import dataclasses

import pytest

from isthmus.attention.bench.chosen_view import plot, table, verdicts
from tests.attention.bench.test_chosen import ROW

pytestmark = pytest.mark.once

FAST = dataclasses.replace(ROW, way="pbs", fwd=40.0, choice=4.0)
LONG = dataclasses.replace(FAST, length=262144, dense={"cudnn": 200.0})


def test_the_fastest_of_a_length_is_bold():
  head, _, *lines = table([ROW, FAST, LONG]).splitlines()
  assert head.endswith("| worst head | isthmus | cudnn |")
  assert [line.split(" | ")[2] for line in lines] == [
    "mass=0.9",
    "**pbs=0.9**",
    "**pbs=0.9**",
  ]
  assert lines[0].endswith("| 4.50x | 4.00x |")
  assert lines[2].endswith("|  | 5.00x |")


def test_a_promise_holds_or_not():
  one, two = verdicts([ROW, FAST, LONG])
  assert one == (
    "drawn, 131072 tokens: pbs=0.9 is 6x cudnn, choice 10.0%: 3x promised,"
    " holds"
  )
  assert two.endswith("is 5x cudnn, choice 10.0%: 6x promised, does not hold")
  # A choice that takes long, and one that keeps less than it is asked to.
  assert verdicts([ROW])[0].endswith("does not hold")
  lossy = dataclasses.replace(FAST, mass=0.89)
  assert "mass=0.9 is 4x" in verdicts([ROW, lossy])[0]
  assert verdicts([lossy]) == []
  assert verdicts([dataclasses.replace(FAST, dense={"isthmus": 9.0})]) == []


def test_sources_are_drawn_side_by_side(tmp_path):
  other = dataclasses.replace(LONG, source="smollm2", dense={})
  plot([ROW, FAST, LONG, other], tmp_path / "chosen.png", "an example")
  assert (tmp_path / "chosen.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="nothing was measured"):
    plot([], tmp_path / "none.png", "")
