"""What an implementation of reduced scores is told, besides its arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
  """The static settings of a call; hashable.

  Attributes:
    side: columns that are reduced to one number; divides 128.
    reduce: "max" or "sum".
    queries: "rows", the columns being keys, or "columns", the rows being keys.
    causal: a query sees keys up to its own, the last query standing at the
      last key.
    scale: factor on the logits.

  Example:
    >>> Options(side=32).reduce
    'max'
  """

  side: int
  reduce: str = "max"
  queries: str = "rows"
  causal: bool = True
  scale: float = 1.0

  def __post_init__(self):
    if self.side < 1 or 128 % self.side:
      raise ValueError(f"side is {self.side}; it divides 128")
    for name, known in (
      ("reduce", ("max", "sum")),
      ("queries", ("rows", "columns")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} is {getattr(self, name)!r}, not of {known}")


def offset(rows: int, columns: int, options: Options) -> int:
  """What is added to a query's index to make it that of its own key.

  Example:
    >>> offset(3, 10, Options(1)), offset(10, 3, Options(1, queries="columns"))
    (7, 7)
  """
  keys, queries = columns, rows
  if options.queries == "columns":
    keys, queries = rows, columns
  return keys - queries
