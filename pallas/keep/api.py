"""What an implementation of `keep` is told, besides its arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    weigh: what the weights of a row's numbers x_j are, and what the target is
      a part of: "one", weights of 1; "value", x_j itself; or "softmax",
      `exp(x_j) / sum_j exp(x_j)`, over what may be kept. But for "softmax",
      x_j is not negative.

  Example:
    >>> Options("one").weigh
    'one'
  """

  weigh: str

  def __post_init__(self):
    if self.weigh not in ("one", "value", "softmax"):
      raise ValueError(
        f"weigh is {self.weigh!r}, not of 'one', 'value', 'softmax'"
      )
