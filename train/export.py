"""Parameters as safetensors: a file that other frameworks read.

Layout of the file: the length of a JSON header (8 bytes, little-endian), the
header with dtype, shape and byte range of every tensor, then the bytes.

Reference: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.train import leaves, manifest

# name in the file -> numpy's dtype; the format's names for what jax has.
_DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
  "F8_E5M2": np.dtype(jnp.float8_e5m2),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class SafetensorsError(ValueError):
  """A file that isn't safetensors, or was damaged; names the file."""


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
    SafetensorsError: the file is damaged or is something else.

  Example:
    >>> export_safetensors("model.safetensors", {"mlp": {"kernel": jnp.eye(2)}})
    >>> load_safetensors("model.safetensors")["mlp"]["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  path = pathlib.Path(path)
  header = _read_header(path)
  from safetensors import SafetensorError, deserialize

  try:
    tensors = deserialize(path.read_bytes())
  except SafetensorError as error:
    raise SafetensorsError(f"{path}: {error}") from error
  named: dict[leaves.Name, np.ndarray] = {}
  for name, tensor in tensors:
    dtype = _DTYPES[header[name]["dtype"]]
    array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    named[tuple(name.split("/"))] = array
  groups = {n[:i] for n in named for i in range(1, len(n))}
  for name in named:
    if name in groups:
      raise SafetensorsError(
        f"{path}: {'/'.join(name)} is a tensor and a group of tensors"
      )
  return leaves.nest(named)


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  """The header, once its lengths, names and byte ranges are known to fit."""

  def bad(reason: str) -> SafetensorsError:
    return SafetensorsError(f"{path}: {reason}; is it a safetensors file?")

  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      room = size - 8
      if size < 10 or not 2 <= length <= min(room, _LONGEST_HEADER):
        raise bad(f"a header of {length} bytes in a file of {size}")
      text = file.read(length)
  except OSError as error:
    raise SafetensorsError(f"{path}: {error.strerror or error}") from error
  try:
    header = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise bad(f"the header is not JSON ({error})") from None
  if not isinstance(header, dict):
    raise bad("the header is not a JSON object")
  tensors = {n: e for n, e in header.items() if n != "__metadata__"}
  ranges = []
  for name, entry in tensors.items():
    try:
      dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
      start, end = entry["data_offsets"]
      whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
      raise bad(f"{name}: no dtype, shape or range ({error!r})") from None
    if not whole:
      raise bad(f"{name}: shape {shape}, bytes {start} to {end}")
    if end - start != math.prod(shape) * dtype.itemsize:
      raise bad(
        f"{name}: {end - start} bytes for {entry['dtype']} of shape {shape}"
      )
    if end > room - length:
      raise bad(f"{name} ends at byte {end}, the data at {room - length}")
    ranges.append((start, end, name))
  here = 0
  for start, end, name in sorted(ranges):
    if start != here:
      raise bad(f"{name} starts at byte {start}, not at {here}")
    here = end
  if here != room - length:
    raise bad(f"{room - length - here} bytes belong to no tensor")
  return tensors


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
