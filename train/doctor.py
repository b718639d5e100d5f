"""`isthmus doctor`: devices, versions, and which kernel each op would take."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import jax

PACKAGES = (
  "isthmus",
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "jax-cuda12-plugin",
  "jax-triton",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorflow-datasets",
  "array_record",
  "tokenizers",
)


def report() -> Iterator[str]:
  """Lines for a person, and for an issue's text.

  Example:
    >>> for line in report():
    ...   print(line)
    python 3... on ...
    isthmus ...
    ...
    attention, bfloat16, causal: ...
  """
  from isthmus.train import peak

  yield f"python {platform.python_version()} on {platform.machine()}"
  for name in PACKAGES:
    try:
      yield f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
      yield f"{name} not installed"
  yield f"{os.cpu_count()} CPU cores, {jax.process_count()} process(es)"
  for device in jax.local_devices():
    capability = getattr(device, "compute_capability", None)
    more = f", compute capability {capability}" if capability else ""
    yield f"device {device.id}: {device.platform} {device.device_kind}{more}"
  device = jax.local_devices()[0]
  sheet = peak.datasheet(device)
  yield (
    f"matrix products: {peak.measure(device) / 1e12:.3g} TF/s measured, "
    + (
      f"{sheet / 1e12:.4g} by the datasheet" if sheet else "no datasheet known"
    )
  )
  yield from _kernels()


def _kernels() -> Iterator[str]:
  from isthmus.attention import sdpa

  for row in sdpa.report():
    reason = f": {row.reason}" if row.reason else ""
    yield f"{row.op}, {row.case}: {row.name} {row.verdict}{reason}"
