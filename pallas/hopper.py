"""A Hopper GPU, for the Mosaic GPU kernels: what they take, what it has."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from isthmus.pallas.compat import has_mosaic, interpreting
from isthmus.pallas.dispatch import platform

#: The head widths that kernels are compiled for; others are padded with zeros.
WIDTHS = (64, 128, 192, 256)
#: Processors of an H100 or H200 SXM, and registers of one.
PROCESSORS, REGISTERS = 132, 65536
#: Registers of a thread that only loads.
FEW = 24


def refuse_machine() -> str | None:
  """Why this machine can't run the kernels, or None.

  It needs jax 0.11, and a GPU of compute capability 9.0, or `interpreted`.

  Example:
    >>> print(refuse_machine())  # on a CPU; before jax 0.11 for that alone
    it needs ...
  """
  if not has_mosaic():
    return f"it needs jax 0.11, and this is {jax.__version__}"
  if interpreting():
    return None
  if platform() != "gpu":
    return f"it needs an NVIDIA Hopper GPU, and the platform is {platform()}"
  device = jax.local_devices()[0]
  capability = str(getattr(device, "compute_capability", ""))
  if capability != "9.0":
    return (
      "it needs a Hopper GPU of compute capability 9.0, and this is "
      f"{device} of {capability or 'none'}"
    )
  return None


def refuse_arrays(q: Any, k: Any) -> str | None:
  """Why kernels of queries and keys can't take these, on any machine, or None.

  Args:
    q, k: arrays, or their shapes and dtypes: [b t n d], [b s k d].

  Example:
    >>> refuse_arrays(*[jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)] * 2)
    'it takes bfloat16 and float16, not float32'
  """
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {q.dtype}"
  if q.shape[3] > WIDTHS[-1]:
    return f"it takes widths up to {WIDTHS[-1]}, not {q.shape[3]}"
  if min(q.size, k.size) == 0:
    return f"it takes no empty arrays: {q.shape}, {k.shape}"
  return None


def padded(x: Shaped[Array, "b t n d"], tile: int) -> Shaped[Array, "b T n D"]:
  """Zeros added, up to whole tiles of tokens and one of `WIDTHS`.

  Args:
    x: queries or keys.
    tile: tokens of a tile.

  Example:
    >>> padded(jnp.ones((1, 100, 2, 40)), 128).shape
    (1, 128, 2, 64)
  """
  width = next(size for size in WIDTHS if size >= x.shape[3])
  ends = ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, width - x.shape[3]))
  return jnp.pad(x, ends)


def walks(work: float, steps: int) -> int:
  """Into how many a row of tiles is cut, that processors have as much to do.

  As many as leave none shorter than an even share of all the work; of more,
  some would start when the others are done.

  Args:
    work: tiles of all rows.
    steps: those of a row.

  Example:
    >>> walks(16 * 256, 256), walks(1000 * 256, 256)
    (8, 1)
  """
  return max(int(steps // max(work / PROCESSORS, 1)), 1)


def registers(workers: int, few: int) -> int:
  """Those of a worker's thread, where one warpgroup more has few.

  Args:
    workers: warpgroups that compute.
    few: registers of a thread of the other one.

  Example:
    >>> registers(4, 24), registers(2, 24)
    (112, 240)
  """
  equal = REGISTERS // (128 * (workers + 1)) // 8 * 8
  return (equal * (workers + 1) - few) // workers // 8 * 8
