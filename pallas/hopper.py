"""Whether a machine runs the Mosaic GPU kernels, which are all for Hopper."""

import jax

from isthmus.pallas.compat import has_mosaic, interpreting
from isthmus.pallas.dispatch import platform


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
