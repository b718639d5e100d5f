"""What an implementation of reduced logits is told, besides its arrays."""

import dataclasses

REDUCE = ("max", "sum", "none")


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    side: keys that are reduced to one number; divides 128.
    reduce: "max" of logits, or "sum", the logarithm of their exponentials', or
      "none": only the lse of all keys is wanted.
    causal: a query sees keys up to its own, the last query standing at the
      last key.
    scale: factor on the logits.

  Example:
    >>> Options(side=32).reduce
    'max'
  """

  side: int
  reduce: str = "max"
  causal: bool = True
  scale: float = 1.0

  def __post_init__(self):
    if self.side < 1 or 128 % self.side:
      raise ValueError(f"side is {self.side}; it divides 128")
    if self.reduce not in REDUCE:
      raise ValueError(f"reduce is {self.reduce!r}, not of {REDUCE}")
