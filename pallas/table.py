"""Tables of what was measured best on a device, which kernels are built by.

`tables/<device kind>/<op>.json` comes with the package; a file of the same
name under the user's folder for caches goes before it. Both are written by
`python -m isthmus.pallas.tune OP`.
"""

import functools
import json
import os
import pathlib
import re
import sys
from typing import Any

import jax

#: The tables that come with the package.
PACKAGED = pathlib.Path(__file__).parent / "tables"


def device_kind() -> str:
  """What the device that ops run on is called; honours default_device.

  Example:
    >>> with jax.default_device(jax.devices("cpu")[0]):
    ...   device_kind()
    'cpu'
  """
  device = jax.config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.local_devices(backend=device)[0]
  return device.device_kind


def cached() -> pathlib.Path:
  """The user's tables: under $ISTHMUS_CACHE or the folder for caches.

  Example:
    >>> os.environ["ISTHMUS_CACHE"] = "/scratch/isthmus"
    >>> print(cached())
    /scratch/isthmus/tables
  """
  home = pathlib.Path.home()
  if chosen := os.environ.get("ISTHMUS_CACHE"):
    return pathlib.Path(chosen).expanduser() / "tables"
  if sys.platform == "darwin":
    return home / "Library" / "Caches" / "isthmus" / "tables"
  shared = os.environ.get("XDG_CACHE_HOME")
  root = pathlib.Path(shared) if shared else home / ".cache"
  return root / "isthmus" / "tables"


def place(folder: pathlib.Path, kind: str, op: str) -> pathlib.Path:
  """The file of an op's table for a kind of device.

  Example:
    >>> place(pathlib.Path("tables"), "NVIDIA H100 80GB HBM3", "flash").parts
    ('tables', 'NVIDIA_H100_80GB_HBM3', 'flash.json')
  """
  return folder / re.sub(r"[^\w.-]+", "_", kind) / f"{op}.json"


def destination(kind: str, op: str) -> pathlib.Path:
  """Where a new table belongs: in a checkout with the package, else cached.

  Example:
    >>> destination("cpu", "flash").name
    'flash.json'
  """
  checkout = (PACKAGED.parents[1] / "pyproject.toml").is_file()
  return place(PACKAGED if checkout else cached(), kind, op)


def find(kind: str, op: str) -> list[tuple[pathlib.Path, dict[str, Any]]]:
  """(file, what it says is best) of each table there is, the user's first.

  Raises:
    ValueError: a file that is no table.

  Example:
    >>> find("abacus", "flash")
    []
  """
  files = (place(folder, kind, op) for folder in (cached(), PACKAGED))
  return [(file, _best(file)) for file in files if file.is_file()]


@functools.cache
def _best(file: pathlib.Path) -> dict[str, Any]:
  try:
    table = json.loads(file.read_text())
  except ValueError as error:  # also text that is not UTF-8
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(table, dict) or not isinstance(table.get("best"), dict):
    raise ValueError(f'{file}: "best" is missing, or not an object')
  return table["best"]
