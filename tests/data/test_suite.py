"""The suite of data sets can fail: a broken one for each of its checks."""

import dataclasses
import itertools

import numpy as np
import pytest

from isthmus.data.source import check_split
from tests.data import suite
from tests.data.suite import Entry

CALLS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Broken:
  """40 rows of x, 10 of them held out, and one defect.

  Args:
    defect: which.
    tag: compared with the other settings.
  """

  defect: str = "none"
  tag: int = 0

  def open(self, split):
    """A source of the split."""
    if self.defect != "any split":
      check_split(split)
    if self.defect == "empty":
      return BrokenSource(self.defect, np.zeros((0, 2), np.float32), split)
    rows = np.arange(80, dtype=np.float32).reshape(40, 2)
    if self.defect == "shared":
      rows[39] = rows[3]
    if self.defect == "all the same":
      rows[:] = 1
    if self.defect == "not finite":
      rows[35] = np.nan
    if self.defect == "new at each opening":
      rows += next(CALLS)
    return BrokenSource(
      self.defect, rows[30:] if split == "eval" else rows[:30], split
    )


@dataclasses.dataclass(frozen=True)
class BrokenSource:
  """See Broken."""

  defect: str
  rows: np.ndarray
  split: str

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    if self.defect == "no end":
      i %= len(self)
    row, last = self.rows[i], i == len(self) - 1 and self.split == "eval"
    if self.defect == "another shape" and last:
      row = row[:1]
    if self.defect == "another dtype" and last:
      row = row.astype(np.float64)
    if self.defect == "another field" and last:
      return {"x": row, "y": row}
    if self.defect == "new at each reading":
      row = row + next(CALLS)
    return {"x": row}

  def take(self, indices):
    """Several rows."""
    return {"x": self.rows[np.sort(indices) if self._is("take") else indices]}

  def __getitems__(self, indices):
    indices = sorted(indices) if self._is("__getitems__") else indices
    return [self[i] for i in indices]

  def _is(self, way):
    return self.defect == f"{way} in order"


@dataclasses.dataclass
class Loose:
  """Settings that can be set."""

  tag: int = 0

  def open(self, split):
    """As Broken's."""
    return Broken().open(split)


def _entry(defect):
  return Entry(
    name=defect, build=lambda folder: Broken(defect), shapes={"x": (2,)}
  )


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
def test_the_sound_data_set_passes(assertion):
  assertion(_entry("none"), None)


@pytest.mark.parametrize(
  "defect, assertion, message",
  [
    ("empty", suite.assert_splits_open, "train is empty"),
    ("any split", suite.assert_splits_open, "'training' was opened"),
    ("another shape", suite.assert_examples_are_alike, r"x has \(1,\), not"),
    ("another dtype", suite.assert_examples_are_alike, "is float64, elsewhere"),
    ("another field", suite.assert_examples_are_alike, r"\['x', 'y'\]"),
    ("not finite", suite.assert_numbers_are_finite, r"eval\[5\] has a x"),
    ("all the same", suite.assert_numbers_are_finite, "are the same"),
    (
      "new at each opening",
      suite.assert_opening_again_changes_nothing,
      "differs when read again",
    ),
    (
      "new at each reading",
      suite.assert_opening_again_changes_nothing,
      "differs when read again",
    ),
    (
      "shared",
      suite.assert_splits_share_no_example,
      r"train\[3\] and eval\[9\] are the same",
    ),
    ("take in order", suite.assert_several_are_as_one_by_one, "take of train"),
    (
      "__getitems__ in order",
      suite.assert_several_are_as_one_by_one,
      "__getitems__ of train",
    ),
    ("no end", suite.assert_the_end_is_the_end, "goes on after its length"),
    (
      "take in order",
      suite.assert_loader_gives_what_it_says,
      "train, row . is not example",
    ),
  ],
)
def test_a_broken_data_set_is_found(defect, assertion, message):
  with pytest.raises(AssertionError, match=message):
    assertion(_entry(defect), None)


@pytest.mark.parametrize(
  "build, message",
  [
    (lambda folder: Loose(), "tag can be set"),
    (lambda folder: Broken(tag=next(CALLS)), "!= Broken"),
  ],
)
def test_settings_that_are_not_plain_are_found(build, message):
  entry = Entry(name="loose", build=build, shapes={"x": (2,)})
  with pytest.raises(AssertionError, match=message):
    suite.assert_settings_are_plain(entry, None)
