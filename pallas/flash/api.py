"""What an implementation of attention is told, besides q, k and v."""

import dataclasses
from typing import Any, NamedTuple

from isthmus.pallas.flash.predicate import Predicate


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    scale: factor on the logits.
    softcap: bounds the logits, after scaling and before masking.
    dropout_rate: share of the probabilities that is dropped.
    predicate: the element mask over (i, j) and `Extras.q`, `Extras.k`; None
      if there is none. Without lists it holds for every pair; with lists it
      is asked within partial blocks only (full ones satisfy it, and blocks
      that are not listed are not seen).
    return_lse: whether the caller wants (o, lse).

  Example:
    >>> from isthmus.pallas.flash.predicate import Band
    >>> causal = Options(scale=0.125, predicate=Band(None, 0))
    >>> causal == Options(scale=0.125, predicate=Band(None, 0))
    True
  """

  scale: float = 1.0
  softcap: float | None = None
  dropout_rate: float = 0.0
  predicate: Predicate | None = None
  return_lse: bool = False


class Extras(NamedTuple):
  """The optional arrays of a call.

  Attributes:
    lists: `isthmus.pallas.flash.lists.Lists`, or None for every block.
    q: operands of the predicate by query, each int32 [b|1, n|1, t].
    k: operands by key, each int32 [b|1, k|1, s].
    sinks: float [n], or None.
    dropout_key: a typed key, or None.
    first: int32 [2], the batch row and query head that this call's first ones
      are of a whole that is divided over devices; None is (0, 0). Dropout
      adds them to its indices, so that the whole has one mask.

  Example:
    >>> Extras(q=("by query",), k=("by key",)).lists is None
    True
  """

  lists: Any = None
  q: tuple[Any, ...] = ()
  k: tuple[Any, ...] = ()
  sinks: Any = None
  dropout_key: Any = None
  first: Any = None
