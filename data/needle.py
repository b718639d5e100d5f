"""Needles in a text: lines that give a number its value, and ask for it later.

A line is `# key 4821 = 739205`, between two line breaks. Where the key comes a
second time, the value can only be known from the first.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from isthmus.data.source import Example

_LINE = "\n# key {key:04d} = {value:06d}\n"
#: Bytes of a line, and of the value in it: where it begins, its digits.
LENGTH = len(_LINE.format(key=0, value=0))
VALUE, DIGITS = _LINE.format(key=0, value=0).rindex("0") - 5, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
  """Plants needles in rows of bytes, in place of what was there.

  As `Fit.transform` it plants `pairs` keys in a share of the rows, each at two
  random places: the second asks. Of these lines only the asked values count:
  the others can't be predicted.

  Attributes:
    pairs: keys of a row.
    share: of the rows that get any.

  Raises:
    ValueError: no pairs, a share outside [0, 1]; when called, a row that is too
      short.

  Example:
    >>> row = {
    ...   "tokens": np.full(65, 97, np.int32),
    ...   "weights": np.ones(64, np.float32),
    ... }
    >>> found = Needles(pairs=1)(row, np.random.default_rng(4))
    >>> print(bytes(found["tokens"].astype(np.uint8)).decode())
    aaaaaaaaaaaa
    # key 9762 = 970286
    aaaaaaaaa
    # key 9762 = 970286
    aa
    >>> float(found["weights"].sum())  # 64 targets, 2 lines of 21, 6 digits
    28.0
  """

  pairs: int = 8
  share: float = 1.0

  def __post_init__(self):
    if self.pairs < 1:
      raise ValueError(f"pairs is {self.pairs}; it is at least 1")
    if not 0 <= self.share <= 1:
      raise ValueError(f"share is {self.share}; it lies in [0, 1]")

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """A row of `isthmus.data.text` with needles, or as it was."""
    if rng.random() >= self.share:
      return example
    tokens = example["tokens"].copy()
    weights = example["weights"].copy()
    places = self._places(len(tokens), 2 * self.pairs, rng)
    rng.shuffle(places)
    first, second = np.sort(places.reshape(-1, 2), axis=1).T
    for at, line in zip(first, self._lines(rng), strict=True):
      tokens[at : at + LENGTH] = line
      weights[max(at - 1, 0) : at + LENGTH - 1] = 0
    for at, source in zip(second, first, strict=True):
      tokens[at : at + LENGTH] = tokens[source : source + LENGTH]
      weights[max(at - 1, 0) : at + LENGTH - 1] = 0
      weights[at + VALUE - 1 : at + VALUE - 1 + DIGITS] = 1
    return {**example, "tokens": tokens, "weights": weights}

  def probe(
    self,
    tokens: Int[np.ndarray, "t"],
    rng: np.random.Generator,
    *,
    depth: float,
  ) -> tuple[Int[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
    """A row that asks, at its end, for one needle.

    Args:
      tokens: the hay.
      rng: draws numbers, and the places of the other needles, which aren't
        asked for.
      depth: of the needle: 0 is the row's start, 1 just before the question.

    Returns:
      (tokens, which of them are the asked value).

    Raises:
      ValueError: a depth outside [0, 1], a row that is too short.
    """
    if not 0 <= depth <= 1:
      raise ValueError(f"depth is {depth}; it lies in [0, 1]")
    tokens, asked = tokens.copy(), np.zeros(len(tokens), bool)
    places = self._places(len(tokens) - LENGTH, self.pairs, rng)
    # One of them is moved to where it is wanted.
    room = len(tokens) - 2 * LENGTH
    wanted = round(depth * room)
    near = int(np.abs(places - wanted).argmin())
    low = places[near - 1] + LENGTH if near else 0
    high = places[near + 1] - LENGTH if near + 1 < len(places) else room
    places[near] = np.clip(wanted, low, high)
    lines = self._lines(rng)
    for at, line in zip(places, lines, strict=True):
      tokens[at : at + LENGTH] = line
    tokens[-LENGTH:] = lines[near]
    start = len(tokens) - LENGTH + VALUE
    asked[start : start + DIGITS] = True
    return tokens, asked

  def _places(self, length, count, rng):
    """Where lines begin, sorted; none overlaps another."""
    room = length - count * LENGTH
    if room < 0:
      raise ValueError(
        f"{count} lines of {LENGTH} bytes don't fit a row of {length}"
      )
    gaps = np.sort(rng.integers(0, room + 1, count))
    return gaps + np.arange(count) * LENGTH

  def _lines(self, rng):
    """As many lines as pairs, with keys that differ."""
    keys = rng.choice(10_000, self.pairs, replace=False)
    values = rng.integers(0, 10**DIGITS, self.pairs)
    return [
      np.frombuffer(_LINE.format(key=k, value=v).encode(), np.uint8)
      for k, v in zip(keys, values, strict=True)
    ]
