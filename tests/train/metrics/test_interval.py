"""Student's intervals against scipy's, and what they say."""

import numpy as np
import pytest
from scipy import stats

from isthmus.train.metrics.interval import (
  Interval,
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


def test_equal_values():
  assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_refused():
  with pytest.raises(ValueError, match="1 values have no interval"):
    interval([1.0])
  with pytest.raises(ValueError, match=r"level is 95"):
    interval([1.0, 2.0], level=95.0)
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
