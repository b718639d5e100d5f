"""What an implementation of importance is told, besides its arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    causal: a query sees keys up to its own, the last query standing at the
      last key.
    scale: factor on the logits.

  Example:
    >>> Options().causal
    True
  """

  causal: bool = True
  scale: float = 1.0
