"""Lists of key blocks for each query block: what a kernel walks along.

`Lists` is static in shape and traced in content: one compiled kernel serves
every selection of one capacity. Blocks in `full` need no element mask; those
in `partial` are tested element by element. Both are ascending.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
  """Key blocks of each query block, by batch row and query head.

  A count above its list's capacity says that entries were dropped: the rows
  of that query block are NaN, in outputs and gradients. Entries past the count repeat a valid
  index, so that they can be loaded and ignored.

  Attributes:
    full_num: int32 [b|1, n|1, qb], blocks that are seen whole.
    full: int32 [b|1, n|1, qb, capacity], their indices, ascending.
    partial_num: int32 [b|1, n|1, qb], or None if no block is partial.
    partial: int32 [b|1, n|1, qb, capacity], or None.
    block: (bq, bk), tokens of a query block and of a key block; static.
  """

  full_num: Any
  full: Any
  partial_num: Any
  partial: Any
  block: tuple[int, int] = dataclasses.field(metadata={"static": True})


def compact(
  seen: Bool[Array, "*lead kb"], capacity: int | None = None
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead capacity"]]:
  """(num, indices): where each row is True, ascending, padded validly.

  Example:
    >>> num, index = compact(jnp.array([[False, True, True, False]]))
    >>> num.tolist(), index.tolist()
    ([2], [[1, 2, 2, 2]])
  """
  size = seen.shape[-1]
  capacity = size if capacity is None else capacity
  num = jnp.sum(seen, axis=-1, dtype=jnp.int32)
  index = jnp.where(seen, jnp.arange(size, dtype=jnp.int32), size)
  index = jnp.sort(index, axis=-1)[..., :capacity]
  last = jnp.take_along_axis(
    index, jnp.clip(num - 1, 0, capacity - 1)[..., None], axis=-1
  )
  # A row without blocks points at block 0.
  last = jnp.where(num[..., None] > 0, last, 0)
  return num, jnp.where(index < size, index, last)
