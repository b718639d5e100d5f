"""`isthmus doctor`: devices, versions, and which kernel each op would take.

`summary` is its short form, which the notebooks print first.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import jax

from isthmus.pallas.dispatch import Row

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


def summary() -> Iterator[str]:
  """Device, versions and chosen kernels, a line each; then the `notices`.

  Nothing is measured, so it is there at once.

  Example:
    >>> for line in list(summary())[1:]:
    ...   print(line)
    python 3..., isthmus 0..., jax 0..., flax 0..., optax 0..., numpy 2...
    attention, bfloat16, causal: chunked
    ...
  """
  devices = jax.local_devices()
  count = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
  yield f"{count}: {_name(devices[0])}"
  versions = [
    f"{name} {importlib.metadata.version(name)}"
    for name in ("isthmus", "jax", "flax", "optax", "numpy")
  ]
  yield ", ".join([f"python {platform.python_version()}", *versions])
  for row in _rows():
    if row.verdict == "runs":
      yield f"{row.op}, {row.case}: {row.name}"
  yield from notices()


# Implementations that XLA compiles by itself.
_PLAIN = ("xla", "chunked")


def notices() -> Iterator[str]:
  """A line for each op that has fast kernels, none of which runs here.

  Example:
    >>> print(*notices())  # on a CPU
    cpu: attention runs on XLA; the fast kernels need an NVIDIA GPU of sm_80...
  """
  rows = list(_rows())
  fast = [row for row in rows if row.name not in _PLAIN]
  runs = {row.op for row in fast if row.verdict == "runs"}
  device = jax.local_devices()[0]
  needs = "" if _capability(device) else "an NVIDIA GPU of "
  for op in sorted({row.op for row in fast} - runs):
    yield (
      f"{_name(device)}: {op} runs on XLA; the fast kernels need {needs}sm_80 "
      "or newer"
    )


def _kernels() -> Iterator[str]:
  for row in _rows():
    reason = f": {row.reason}" if row.reason else ""
    yield f"{row.op}, {row.case}: {row.name} {row.verdict}{reason}"


def _rows() -> Iterator[Row]:
  from isthmus.attention import sdpa

  yield from sdpa.report()


def _name(device: Any) -> str:
  """`Tesla T4 (sm_75)`, `TPU v5 lite`, `cpu`."""
  capability = _capability(device)
  return device.device_kind + (f" (sm_{capability})" if capability else "")


def _capability(device: Any) -> str:
  """`75` of an NVIDIA GPU of compute capability 7.5; "" of anything else."""
  digits = str(getattr(device, "compute_capability", "")).replace(".", "")
  return digits if digits.isdigit() else ""
