"""Means with intervals, and what they say of a statement."""

import math
from collections.abc import Mapping, Sequence
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


def differences(
  rows: Mapping[str, Sequence[float]], *, over: str, level: float = 0.95
) -> dict[str, Interval]:
  """Mean differences of every row from one of them, with intervals.

  A value is taken for row + column + noise, the noise of one variance
  everywhere, so that few columns (seeds) serve if there are many rows (cases):
  with `s^2` the squares that rows and columns leave, over their `f = (rows - 1)
  (columns - 1)` degrees of freedom, `mean +- t_f s sqrt(2 / columns)`. Of two
  rows that is `interval` of their differences.

  Args:
    rows: name -> values, one a column.
    over: the row that others are compared with.
    level: as of `interval`, of each difference by itself.

  Returns:
    The difference of every row but `over`.

  Raises:
    ValueError: fewer than two rows or columns, rows of other lengths, no row
      `over`, a level outside (0, 1).

  Example:
    >>> found = differences({"a": [1.0, 2.0], "b": [1.5, 2.7]}, over="a")
    >>> print(found["b"])
    +0.600 [-0.671, +1.871]
  """
  from scipy import stats

  if over not in rows:
    raise ValueError(f"there is no row {over!r}: {', '.join(rows)}")
  columns = len(rows[over])
  if len(rows) < 2 or columns < 2:
    raise ValueError(
      f"{len(rows)} rows of {columns} values have no interval; it takes at "
      "least 2 of 2"
    )
  if wrong := [name for name, row in rows.items() if len(row) != columns]:
    raise ValueError(f"row {wrong[0]!r} hasn't {columns} values, as {over!r}")
  if not 0 < level < 1:
    raise ValueError(f"level is {level}; it is between 0 and 1")
  means = {name: math.fsum(row) / columns for name, row in rows.items()}
  mean = math.fsum(means.values()) / len(rows)
  of_column = [
    math.fsum(row[i] for row in rows.values()) / len(rows)
    for i in range(columns)
  ]
  freedom = (len(rows) - 1) * (columns - 1)
  variance = (
    math.fsum(
      (value - means[name] - of_column[i] + mean) ** 2
      for name, row in rows.items()
      for i, value in enumerate(row)
    )
    / freedom
  )
  t = float(stats.t.ppf((1 + level) / 2, freedom))
  half = t * math.sqrt(2 * variance / columns)
  return {
    name: Interval(gap := means[name] - means[over], gap - half, gap + half)
    for name in rows
    if name != over
  }


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
