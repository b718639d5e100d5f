"""Which keys a query sees: the conditions of a call, as one predicate."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from isthmus.pallas.flash.predicate import EMPTY as EMPTY
from isthmus.pallas.flash.predicate import (
  Band,
  Both,
  Positions,
  Predicate,
  Segments,
)

#: A width to both sides, or (left, right); None is no limit.
Window = int | tuple[int | None, int | None] | None


def check_window(window: Window) -> tuple[int | None, int | None] | None:
  """`window` as (left, right), both inclusive; None on a side is no limit.

  Raises:
    ValueError: a negative width, or one of 2**31 or more.

  Example:
    >>> check_window(3)
    (3, 3)
    >>> check_window((8, None))  # 8 keys back, all that follow
    (8, None)
  """
  if window is None:
    return None
  left, right = (window, window) if isinstance(window, int) else window
  for side, width in (("left", left), ("right", right)):
    if width is not None and width < 0:
      raise ValueError(f"window {window}: its {side} width {width} is below 0")
    if width is not None and width >= 2**31:
      raise ValueError(
        f"window {window}: its {side} width {width} is not below {2**31}; "
        "None is no limit"
      )
  return None if left is None and right is None else (left, right)


def conditions(
  t: int,
  s: int,
  causal: bool = False,
  window: Window = None,
  segment_ids: Int[Array, "b t"] | None = None,
  kv_segment_ids: Int[Array, "b s"] | None = None,
  q_positions: Int32[Array, "#b #n t"] | None = None,
  kv_positions: Int32[Array, "#b #k s"] | None = None,
) -> tuple[Predicate | None, tuple[Any, ...], tuple[Any, ...]]:
  """All conditions of a call as one predicate, and its operands.

  Query i sees key j iff, with positions p_i and p_j,
  `p_j <= p_i` (causal), `p_i - left <= p_j <= p_i + right` (window),
  `segment_i == segment_j`, and p_j is not EMPTY.

  Args:
    t: number of queries.
    s: number of keys.
    causal, window: compare positions.
    segment_ids, kv_segment_ids: both or none.
    q_positions, kv_positions: int32; by default the last query stands at the
      last of 0, ..., s - 1. Without causal and window, only EMPTY counts.

  Returns:
    (predicate, operands by query, operands by key), int32 [b|1, n|1, t] and
    [b|1, k|1, s]; the predicate is None if every key is seen.

  Raises:
    ValueError: segment ids of 64 bits.

  Example:
    >>> conditions(3, 5, causal=True, window=(2, None))
    (Band(left=2, right=0, offset=2), (), ())
    >>> conditions(3, 5)
    (None, (), ())
  """
  left, right = check_window(window) or (None, None)
  right = 0 if causal else right
  bounded = left is not None or right is not None
  found: list[Predicate] = []
  q, k = [], []
  if kv_positions is not None or (bounded and q_positions is not None):
    p, j = positions(t, s, q_positions, kv_positions)
    found.append(Positions(left, right))
    q, k = [p], [j]
  elif bounded:
    found.append(Band(left, right, s - t))
  if segment_ids is not None and kv_segment_ids is not None:
    found.append(Segments())
    q.append(_ids("segment_ids", segment_ids))
    k.append(_ids("kv_segment_ids", kv_segment_ids))
  if len(found) == 2:
    return Both(*found), tuple(q), tuple(k)
  return (found[0] if found else None), tuple(q), tuple(k)


def _ids(name, x):
  """Ids [b t] as an operand int32 [b 1 t]."""
  if x.dtype.itemsize > 4:
    raise ValueError(f"{name} are {x.dtype}; kernels compare 32 bits")
  return x.astype(jnp.int32)[:, None]


def positions(
  t: int,
  s: int,
  q_positions: Int32[Array, "#b #n t"] | None,
  kv_positions: Int32[Array, "#b #k s"] | None,
) -> tuple[Int32[Array, "#b #n t"], Int32[Array, "#b #k s"]]:
  """Positions with defaults: the last query stands at the last of 0..s-1.

  Example:
    >>> q, kv = positions(2, 5, None, None)
    >>> q.tolist(), kv.tolist()
    ([[[3, 4]]], [[[0, 1, 2, 3, 4]]])
  """
  if q_positions is None:
    q_positions = jnp.arange(s - t, s, dtype=jnp.int32)[None, None]
  if kv_positions is None:
    kv_positions = jnp.arange(s, dtype=jnp.int32)[None, None]
  return q_positions, kv_positions
