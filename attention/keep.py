"""Which blocks to keep: the best ones, by mass or by number, as lists.

Each gives (num, index): how many of a row are kept, and which, ascending;
entries past the number are some index or other. Arguments of numpy are
constants of a compiled program, which spends no kernels on them.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from isthmus.attention.block_mask import BlockMask
from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.flash.lists import Lists
from isthmus.pallas.flash.predicate import Band
from isthmus.pallas.keep import mosaic
from isthmus.pallas.keep.api import Options


def keep_count(
  score: Float[Array, "*#lead m"],
  count: Int32[Array | np.ndarray, "*#lead"],
  limit: Int32[Array | np.ndarray, "*#lead"] | None = None,
  *,
  ends: Int32[Array | np.ndarray, "*#lead"] | None = None,
  forced: Int32[Array | np.ndarray, "*#lead"] | None = None,
  impl: Any = None,
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead m"]]:
  """The best `count` of each row, of equal ones the first.

  Scores that are the same for several counts are not repeated.

  Args:
    score: not negative.
    count: how many, or as many as there are.
    limit: only the first so many of a row may be kept; default all.
    ends: of what is kept, what is listed is below it; default `limit`.
    forced: is listed in any case, if it is below both; -1, the default, none.
    impl: of `KEEP`, an implementation's name.

  Example:
    >>> score = jnp.array([0.1, 0.4, 0.3, 0.2])
    >>> num, index = keep_count(score, jnp.array(3))
    >>> index[:num].tolist()
    [1, 2, 3]
    >>> num, index = keep_count(
    ...   score, jnp.array(3), ends=jnp.array(2), forced=jnp.array(0)
    ... )
    >>> index[:num].tolist()
    [0, 1]
  """
  return _keep("one", score, count, limit, ends, forced, impl)


def keep_sum(
  score: Float[Array, "*#lead m"],
  target: Float[Array | np.ndarray, "*#lead"],
  limit: Int32[Array | np.ndarray, "*#lead"] | None = None,
  *,
  ends: Int32[Array | np.ndarray, "*#lead"] | None = None,
  forced: Int32[Array | np.ndarray, "*#lead"] | None = None,
  impl: Any = None,
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead m"]]:
  """The fewest of each row that sum to `target`, or all.

  Args:
    score: not negative.
    target: what their sum must reach; none are kept if it is <= 0.
    limit, ends, forced, impl: as in `keep_count`.

  Example:
    >>> score = jnp.array([0.1, 0.4, 0.3, 0.2])
    >>> num, index = keep_sum(score, jnp.array(0.6))
    >>> index[:num].tolist()
    [1, 2]
  """
  return _keep("value", score, target, limit, ends, forced, impl)


def keep_mass(
  score: Float[Array, "*#lead m"],
  threshold: float,
  limit: Int32[Array | np.ndarray, "*#lead"],
  *,
  ends: Int32[Array | np.ndarray, "*#lead"] | None = None,
  forced: Int32[Array | np.ndarray, "*#lead"] | None = None,
  impl: Any = None,
) -> tuple[Int32[Array, "*lead"], Int32[Array, "*lead m"]]:
  """The fewest blocks with `threshold` of the softmax's mass.

  `p_j = exp(x_j) / sum_j exp(x_j)` over what is allowed, in float32; kept are
  the largest until their sum is `threshold`, or all.

  Args:
    score: logits x.
    threshold: in (0, 1]; 1 keeps all that is allowed.
    limit, ends, forced, impl: as in `keep_count`.

  Raises:
    ValueError: a threshold outside of (0, 1].

  Example:
    >>> score = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    >>> num, index = keep_mass(score, 0.7, jnp.array(4))
    >>> index[:num].tolist()
    [1, 3]
  """
  if not 0 < threshold <= 1:
    raise ValueError(f"the threshold is {threshold}, not in (0, 1]")
  # What no sum reaches keeps all.
  target = np.asarray(np.inf if threshold == 1 else threshold, np.float32)
  return _keep("softmax", score, target, limit, ends, forced, impl)


def _keep(weigh, score, target, limit, ends, forced, impl):
  limit = np.asarray(score.shape[-1], np.int32) if limit is None else limit
  ends = limit if ends is None else ends
  forced = np.asarray(-1, np.int32) if forced is None else forced
  options = Options(weigh)
  return KEEP(score, target, limit, forced, ends, options=options, impl=impl)


def causal_mask(
  num: Int32[Array, "b n m"],
  index: Int32[Array, "b n m m"],
  *,
  block: int,
  length: int,
) -> BlockMask:
  """The mask of blocks listed before each query block's own, and of that one.

  Args:
    num, index: how many, and which, all before the own one.
    block: tokens of a block.
    length: of the row, in tokens.

  Example:
    >>> num, index = jnp.array([[[0, 1, 1]]]), jnp.zeros((1, 1, 3, 3), int)
    >>> mask = causal_mask(num, index, block=2, length=6)
    >>> print(mask.to_dense()[0, 0, 1::2].astype(int))
    [[1 1 0 0 0 0]
     [1 1 1 1 0 0]
     [1 1 0 0 1 1]]
  """
  own = jnp.arange(num.shape[-1], dtype=jnp.int32)
  lists = Lists(
    num,
    index,
    jnp.ones_like(num),
    jnp.broadcast_to(own, num.shape)[..., None],
    (block, block),
  )
  band = Band(None, 0, 0)
  return BlockMask(lists, predicate=band, lengths=(length, length))


#: `isthmus.pallas.keep.ref.keep` and what else does it.
KEEP = Op(
  "keep",
  (
    Impl("mosaic", mosaic.keep, mosaic.refuse),
    Impl("xla", "isthmus.pallas.keep.ref:keep"),
  ),
  {"gpu": ("mosaic", "xla"), "cpu": ("xla",), "tpu": ("xla",)},
)
