"""Student's intervals against scipy's, and what they say."""

import numpy as np
import pytest
from scipy import stats

from isthmus.train.metrics.interval import (
  Interval,
  differences,
  interval,
  positive,
  together,
  within,
)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_interval_is_scipys(n, level):
  values = np.random.default_rng(n).normal(3, 2, n).tolist()
  found = interval(values, level=level)
  low, high = stats.t.interval(
    level, n - 1, loc=np.mean(values), scale=stats.sem(values)
  )
  np.testing.assert_allclose(found, (np.mean(values), low, high), rtol=1e-9)


def test_it_holds_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  found = [interval(rng.normal(1, 1, 3).tolist()) for _ in range(2000)]
  share = np.mean([x.low <= 1 <= x.high for x in found])
  assert 0.935 < share < 0.965


def test_differences_of_two_rows_are_the_paired_interval():
  a, b = np.random.default_rng(0).normal(size=(2, 5)).tolist()
  found = differences({"a": a, "b": b}, over="a", level=0.9)
  gaps = [y - x for x, y in zip(a, b, strict=True)]
  np.testing.assert_allclose(found["b"], interval(gaps, level=0.9), rtol=1e-9)


def test_differences_are_those_of_the_linear_model():
  """Least squares on indicators of rows and columns."""
  y = np.random.default_rng(1).normal(size=(4, 3))
  found = differences(dict(zip("abcd", y.tolist(), strict=True)), over="a")
  row, column = (x.ravel() for x in np.indices(y.shape))
  design = np.column_stack(
    [row == i for i in range(4)] + [column == i for i in range(1, 3)]
  ).astype(float)
  beta, squares, *_ = np.linalg.lstsq(design, y.ravel())
  spread = np.linalg.inv(design.T @ design) * squares[0] / 6
  for i, name in enumerate("bcd", 1):
    at = np.eye(6)[i] - np.eye(6)[0]
    half = stats.t.ppf(0.975, 6) * np.sqrt(at @ spread @ at)
    gap = at @ beta
    np.testing.assert_allclose(found[name], (gap, gap - half, gap + half))


def test_differences_hold_as_often_as_they_say():
  rng = np.random.default_rng(2)
  seeds = rng.normal(size=(2000, 1, 2)) * 3
  y = np.arange(4)[:, None] + seeds + rng.normal(size=(2000, 4, 2))
  found = [
    differences(dict(zip("abcd", x.tolist(), strict=True)), over="a")["c"]
    for x in y
  ]
  share = np.mean([x.low <= 2 <= x.high for x in found])
  assert 0.935 < share < 0.965


def test_equal_values():
  assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_refused():
  with pytest.raises(ValueError, match="1 values have no interval"):
    interval([1.0])
  with pytest.raises(ValueError, match=r"level is 95"):
    interval([1.0, 2.0], level=95.0)
  two = {"a": [1.0, 2.0], "b": [1.0, 3.0]}
  with pytest.raises(ValueError, match="no row 'c': a, b"):
    differences(two, over="c")
  with pytest.raises(ValueError, match="1 rows of 2 values"):
    differences({"a": [1.0, 2.0]}, over="a")
  with pytest.raises(ValueError, match="2 rows of 1 values"):
    differences({"a": [1.0], "b": [2.0]}, over="a")
  with pytest.raises(ValueError, match="'b' hasn't 2 values"):
    differences({"a": [1.0, 2.0], "b": [1.0]}, over="a")
  with pytest.raises(ValueError, match="level is 0"):
    differences(two, over="a", level=0.0)
  with pytest.raises(ValueError, match="0 verdicts"):
    together([])


def test_verdicts():
  above, below, across = (
    Interval(2, 1, 3),
    Interval(-2, -3, -1),
    Interval(0, -1, 1),
  )
  assert [positive(x) for x in (above, below, across)] == [
    "replicated",
    "refuted",
    "inconclusive",
  ]
  assert positive(below.negative()) == "replicated"
  assert [within(across, b) for b in (1.0, 0.9)] == [
    "replicated",
    "inconclusive",
  ]
  assert within(above, 0.9) == within(below, 0.9) == "refuted"
  assert within(above, 1.5) == "inconclusive"
  assert together(["replicated", "replicated"]) == "replicated"
  assert together(["replicated", "inconclusive"]) == "inconclusive"
  assert together(["inconclusive", "refuted"]) == "refuted"
  assert str(above) == "+2.000 [+1.000, +3.000]"
