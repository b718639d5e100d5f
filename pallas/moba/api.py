"""What an implementation of block routing is told, besides q, k and v."""

import dataclasses
from typing import Any, NamedTuple

from isthmus.pallas.moba.layout import BlockLayout


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    block: tokens of a key block.
    top_k: blocks that a query reads, its own among them if causal.
    causal: a query reads its own block up to itself, and chooses among the
      blocks before; else among all.
    scale: factor on the logits.

  Example:
    >>> Options(block=64, top_k=4) == Options(block=64, top_k=4)
    True
  """

  block: int
  top_k: int
  causal: bool = True
  scale: float = 1.0


class Extras(NamedTuple):
  """The arrays of a call that have no gradient.

  Attributes:
    layout: where blocks lie, and which of them each query may choose.
    centroids: what queries are compared with, [b, g, k, d] of q's dtype; None
      for the mean of each block's keys.

  Example:
    >>> from isthmus.pallas.moba.layout import uniform
    >>> Extras(uniform(4, 4, block=2)).centroids is None
    True
  """

  layout: BlockLayout
  centroids: Any = None
