"""Parameters as safetensors: a file that other frameworks read.

`isthmus.data.weights.safetensors` has the layout, and reads it.
"""

import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.safetensors import DTYPES, SafetensorsFile
from isthmus.train import leaves, manifest

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export_safetensors(
  path: str | pathlib.Path,
  params: Any,
  *,
  metadata: dict[str, str] | None = None,
) -> None:
  """Writes parameters to one file, under names like "decoder/mlp/kernel".

  The file appears at once, when it is complete. Sharded arrays are gathered
  one at a time; with several processes each of them calls this, and process 0
  writes.

  Args:
    path: the file; replaced if it is there.
    params: tree of arrays; typed keys have no place in the format.
    metadata: strings to keep in the header.

  Raises:
    ValueError: a leaf that the format can't hold, or metadata that aren't
      strings.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"mlp": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
    >>> export_safetensors("model.safetensors", params)
    >>> load_safetensors("model.safetensors")["mlp"]["kernel"].dtype
    dtype(bfloat16)
  """
  path = pathlib.Path(path)
  for key, value in (metadata or {}).items():
    if not isinstance(key, str) or not isinstance(value, str):
      raise ValueError(f"metadata {key!r}: {value!r} is not a pair of strings")
  named: dict[str, Any] = {}
  for parts, leaf in leaves.flatten(params).items():
    name = "/".join(parts)
    if name in named or name == "__metadata__":
      raise ValueError(f"{name} can't name a tensor, or names two")
    named[name] = leaf
  # Wide elements first, as other writers do: all are then aligned.
  order = sorted(named, key=lambda n: (-_dtype(n, named[n]).itemsize, n))
  header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
  end = 0
  for name in order:
    dtype, shape = _dtype(name, named[name]), np.shape(named[name])
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": _NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  if jax.process_index() != 0:
    for name in order:
      _gather(named[name])
    return
  part = path.with_name(path.name + ".part")
  try:
    with part.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name in order:
        array = np.ascontiguousarray(_gather(named[name]))
        file.write(array.reshape(-1).view(np.uint8))
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise
  manifest.sync(path.parent)


def load_safetensors(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a file into nested dicts of numpy arrays, cut at each "/".

  Args:
    path: the file.

  Returns:
    `{"decoder": {"mlp": {"kernel": array}}}`; bfloat16 stays bfloat16.

  Raises:
    FileNotFoundError: no such file.
    WeightsError: the file is damaged or is something else.

  Example:
    >>> export_safetensors("model.safetensors", {"mlp": {"kernel": np.eye(2)}})
    >>> load_safetensors("model.safetensors")["mlp"]["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  file = SafetensorsFile(path)
  named: dict[leaves.Name, np.ndarray] = {
    tuple(name.split("/")): np.array(file.read(name)) for name in file.names
  }
  groups = {n[:i] for n in named for i in range(1, len(n))}
  for name in named:
    if name in groups:
      raise WeightsError(
        f"{path}: {'/'.join(name)} is a tensor and a group of tensors"
      )
  return leaves.nest(named)


def _dtype(name: str, leaf: Any) -> np.dtype:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None or leaves.is_key(leaf) or np.dtype(dtype) not in _NAMES:
    raise ValueError(
      f"{name} is {dtype or type(leaf).__name__}; safetensors has no such dtype"
    )
  return np.dtype(dtype)


def _gather(leaf: Any) -> np.ndarray:
  """The whole array on this process; all processes call it."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    if leaf.is_fully_replicated:
      return np.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)
