"""Means with intervals, and what they say of a statement."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

#: What is said of a statement.
Verdict = Literal["replicated", "refuted", "inconclusive"]


class Interval(NamedTuple):
  """A mean and the ends of its confidence interval.

  Example:
    >>> print(Interval(0.3, 0.1, 0.5).negative())
    -0.300 [-0.500, -0.100]
  """

  mean: float
  low: float
  high: float

  def negative(self) -> "Interval":
    """The interval of what has the opposite sign."""
    return Interval(-self.mean, -self.high, -self.low)

  def __str__(self) -> str:
    return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
  """Student's interval of a mean, `mean +- t_{n-1} s / sqrt(n)`.

  Args:
    values: at least two independent figures, such as one a seed.
    level: share of such intervals that hold the true mean, if the values are
      normal.

  Raises:
    ValueError: fewer than two values, or a level outside (0, 1).

  Example:
    >>> print(interval([1.0, 1.2, 1.1]))
    +1.100 [+0.852, +1.348]
  """
  from scipy import stats

  n = len(values)
  if n < 2:
    raise ValueError(f"{n} values have no interval; it takes at least 2")
  if not 0 < level < 1:
    raise ValueError(f"level is {level}; it is between 0 and 1")
  mean = math.fsum(values) / n
  variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
  half = float(stats.t.ppf((1 + level) / 2, n - 1)) * math.sqrt(variance / n)
  return Interval(mean, mean - half, mean + half)


def positive(x: Interval) -> Verdict:
  """What an interval says of "this is above 0".

  Example:
    >>> positive(Interval(0.3, 0.1, 0.5)), positive(Interval(0.3, -0.1, 0.7))
    ('replicated', 'inconclusive')
  """
  if x.low > 0:
    return "replicated"
  return "refuted" if x.high < 0 else "inconclusive"


def within(x: Interval, bound: float) -> Verdict:
  """What an interval says of "this differs from 0 by at most `bound`".

  Example:
    >>> within(Interval(0.02, -0.03, 0.07), 0.1)
    'replicated'
    >>> within(Interval(0.3, 0.2, 0.4), 0.1)
    'refuted'
  """
  if -bound <= x.low and x.high <= bound:
    return "replicated"
  outside = x.low > bound or x.high < -bound
  return "refuted" if outside else "inconclusive"


def together(verdicts: Sequence[Verdict]) -> Verdict:
  """Of a statement about several cases: one that is refuted refutes it.

  Example:
    >>> together(["replicated", "inconclusive"])
    'inconclusive'
  """
  if not verdicts:
    raise ValueError("0 verdicts say nothing")
  if "refuted" in verdicts:
    return "refuted"
  if "inconclusive" in verdicts:
    return "inconclusive"
  return "replicated"
