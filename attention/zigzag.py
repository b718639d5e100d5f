"""Which tokens a device has: a sequence divided over a mesh axis.

Causal attention gives late tokens more keys than early ones. Cut into 2 P
chunks, of which device r has the chunks r and 2 P - 1 - r, a sequence is as
much work for every device, and for every pair of devices. A loader arranges
its batches so once; no step has to.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

Layout = Literal["zigzag", "contiguous"]


def zigzag(
  x: Shaped[Any, "..."], devices: int, axis: int = 1
) -> Shaped[Any, "..."]:
  """An array in the order in which equal shares of it are the devices'.

  Args:
    x: a numpy or jax array, in the order of the sequence.
    devices: P; the axis' size has to be a multiple of 2 P.
    axis: that of the tokens.

  Raises:
    ValueError: a length that 2 P doesn't divide.

  Example:
    >>> zigzag(np.arange(8), 2, axis=0).tolist()  # the first 4 are device 0's
    [0, 1, 6, 7, 2, 3, 4, 5]
  """
  return _chunked(x, _order(devices), axis)


def unzigzag(
  x: Shaped[Any, "..."], devices: int, axis: int = 1
) -> Shaped[Any, "..."]:
  """What `zigzag` was given.

  Example:
    >>> unzigzag(zigzag(np.arange(8), 2, axis=0), 2, axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
  """
  return _chunked(x, np.argsort(_order(devices)), axis)


def zigzag_positions(length: int, devices: int) -> Int32[np.ndarray, "t"]:
  """The positions of the tokens of a sequence that `zigzag` arranged.

  Example:
    >>> zigzag_positions(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
  """
  return zigzag(np.arange(length, dtype=np.int32), devices, axis=0)


def chunks(rank: Any, devices: int, layout: Layout) -> tuple[Any, ...]:
  """The indices of a device's chunks, in its order; `rank` may be traced.

  Example:
    >>> chunks(1, 4, "zigzag"), chunks(1, 4, "contiguous")
    ((1, 6), (1,))
  """
  if layout == "zigzag":
    return rank, 2 * devices - 1 - rank
  return (rank,)


def spread(
  rank: Any, devices: int, layout: Layout, size: int
) -> Int32[Array, "size"]:
  """The positions of a device's `size` tokens; `rank` may be traced.

  Example:
    >>> spread(1, 2, "zigzag", 4).tolist()
    [2, 3, 4, 5]
  """
  mine = chunks(rank, devices, layout)
  chunk = size // len(mine)
  starts = jnp.stack([jnp.asarray(x, jnp.int32) * chunk for x in mine])
  inside = jnp.arange(chunk, dtype=jnp.int32)
  return (starts[:, None] + inside).reshape(-1)


def reach(
  devices: int,
  size: int,
  layout: Layout,
  left: int | None,
  right: int | None,
) -> tuple[int, ...]:
  """The shifts i of 1, ..., P - 1 at which some device sees keys of i before.

  Device r sees keys of device (r - i) mod P iff a query of r is at a distance
  from -right to left of one of its keys.

  Args:
    devices: P.
    size: tokens of a device.
    layout: how they are divided.
    left, right: how far a query sees; None is no limit.

  Example:
    >>> reach(8, 100, "contiguous", 150, 0), reach(8, 100, "zigzag", 40, 0)
    ((1, 2), (1, 7))
  """
  ranks = np.arange(devices)
  chunk = size // len(chunks(0, devices, layout))
  found = []
  for shift in range(1, devices):
    q = np.stack(chunks(ranks, devices, layout))[:, None]
    k = np.stack(chunks((ranks - shift) % devices, devices, layout))[None]
    behind = (q - k) * chunk  # of the chunks' first tokens
    seen = np.ones(behind.shape, bool)
    if left is not None:
      seen &= behind - (chunk - 1) <= left
    if right is not None:
      seen &= behind + (chunk - 1) >= -right
    if seen.any():
      found.append(shift)
  return tuple(found)


def _order(devices):
  return np.stack(chunks(np.arange(devices), devices, "zigzag"), 1).reshape(-1)


def _chunked(x, order, axis):
  """`x` cut into chunks along an axis, and these in another order."""
  size, axis = x.shape[axis], axis % len(x.shape)
  if size % len(order):
    raise ValueError(
      f"{size} tokens are not a multiple of {len(order)}: zigzag gives each of"
      f" {len(order) // 2} devices two chunks"
    )
  lead, rest = x.shape[:axis], x.shape[axis + 1 :]
  cut = x.reshape(*lead, len(order), size // len(order), *rest)
  numpy = np if isinstance(x, np.ndarray) else jnp
  return numpy.take(cut, order, axis=axis).reshape(x.shape)
