"""Which blocks to keep: the best ones, by mass or by number."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from isthmus.pallas.dispatch import Impl, Op
from isthmus.pallas.keep import mosaic
from isthmus.pallas.keep.api import Options


def keep_count(
  score: Float[Array, "*#lead m"],
  count: Int32[Array, "*#lead"],
  limit: Int32[Array, "*#lead"] | None = None,
  *,
  impl: Any = None,
) -> Bool[Array, "*lead m"]:
  """The best `count` of each row, of equal ones the first.

  Scores that are the same for several counts are not repeated.

  Args:
    score: not negative.
    count: how many, or as many as there are.
    limit: only the first so many of a row may be kept; default all.
    impl: of `KEEP`, an implementation's name.

  Example:
    >>> score = jnp.array([0.1, 0.4, 0.3, 0.2])
    >>> keep_count(score, jnp.array(3)).tolist()
    [False, True, True, True]
  """
  return KEEP(
    score, count, _limit(score, limit), options=Options("one"), impl=impl
  )


def keep_sum(
  score: Float[Array, "*#lead m"],
  target: Float[Array, "*#lead"],
  limit: Int32[Array, "*#lead"] | None = None,
  *,
  impl: Any = None,
) -> Bool[Array, "*lead m"]:
  """The fewest of each row that sum to `target`, or all.

  Args:
    score: not negative.
    target: what their sum must reach; none are kept if it is <= 0.
    limit: only the first so many of a row may be kept; default all.
    impl: of `KEEP`, an implementation's name.

  Example:
    >>> score = jnp.array([0.1, 0.4, 0.3, 0.2])
    >>> keep_sum(score, jnp.array(0.6)).tolist()
    [False, True, True, False]
  """
  return KEEP(
    score, target, _limit(score, limit), options=Options("value"), impl=impl
  )


def keep_mass(
  score: Float[Array, "*#lead m"],
  threshold: float,
  limit: Int32[Array, "*#lead"],
  *,
  impl: Any = None,
) -> Bool[Array, "*lead m"]:
  """The fewest blocks with `threshold` of the softmax's mass.

  `p_j = exp(x_j) / sum_j exp(x_j)` over what is allowed, in float32; kept are
  the largest until their sum is `threshold`, or all.

  Args:
    score: logits x.
    threshold: in (0, 1]; 1 keeps all that is allowed.
    limit: only the first so many of a row may be kept.
    impl: of `KEEP`, an implementation's name.

  Raises:
    ValueError: a threshold outside of (0, 1].

  Example:
    >>> score = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    >>> keep_mass(score, 0.7, jnp.array(4)).tolist()
    [False, True, False, True]
  """
  if not 0 < threshold <= 1:
    raise ValueError(f"the threshold is {threshold}, not in (0, 1]")
  if threshold == 1:
    place = jnp.arange(score.shape[-1], dtype=jnp.int32)
    lead = jnp.broadcast_shapes(score.shape[:-1], limit.shape)
    return jnp.broadcast_to(place < limit[..., None], (*lead, place.size))
  return KEEP(
    score, jnp.float32(threshold), limit, options=Options("softmax"), impl=impl
  )


def _limit(score, limit):
  return jnp.int32(score.shape[-1]) if limit is None else limit


#: `isthmus.pallas.keep.ref.keep` and what else does it.
KEEP = Op(
  "keep",
  (
    Impl("mosaic", mosaic.keep, mosaic.refuse),
    Impl("xla", "isthmus.pallas.keep.ref:keep"),
  ),
  {"gpu": ("mosaic", "xla"), "cpu": ("xla",), "tpu": ("xla",)},
)
