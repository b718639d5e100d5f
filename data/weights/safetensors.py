"""Safetensors: one file, or a folder of shards with an index.

Layout of a file: the length of a JSON header (8 bytes, little-endian), the
header with dtype, shape and byte range of every tensor, then the bytes. A
folder's `model.safetensors.index.json` says which file holds which tensor.

Reference: https://github.com/huggingface/safetensors#format
"""

import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.data.weights.file import (
  Cursor,
  Tensor,
  Weights,
  WeightsError,
  count,
  inside,
  map_bytes,
  quote,
)

# The format's name of a dtype -> numpy's.
DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype("<u2"),
  "I16": np.dtype("<i2"),
  "U32": np.dtype("<u4"),
  "I32": np.dtype("<i4"),
  "U64": np.dtype("<u8"),
  "I64": np.dtype("<i8"),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype("<f4"),
  "F64": np.dtype("<f8"),
}
# The format allows ten times as much; a header of a hundred thousand tensors
# fits, and is refused or read within about a second.
_LONGEST_JSON = 10_000_000  # bytes
_MOST_AXES = 32
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFile(Weights):
  """A safetensors file.

  The header is read and checked at once: byte ranges fit shapes, follow each
  other without gaps, and end with the file. `metadata` has its strings.

  Args:
    path: the file.

  Raises:
    FileNotFoundError: no such file.
    WeightsError: a length, dtype, shape or byte range that doesn't fit.

  Example:
    >>> import pathlib, tempfile
    >>> header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> data = np.float32([1, 2]).tobytes()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder, "w.safetensors")
    ...   length = len(header).to_bytes(8, "little")
    ...   _ = path.write_bytes(length + header + data)
    ...   SafetensorsFile(path).read("w")
    array([1., 2.], dtype=float32)
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._data = map_bytes(self.path)
    self.metadata, self.tensors = _header(Cursor(self.path, self._data))

  def read(self, name: str) -> np.ndarray:
    """A tensor, a read-only view of the file.

    Args:
      name: one of `names`.

    Returns:
      `shapes[name]`, of the file's dtype; BF16 and F8 are those of ml_dtypes.

    Raises:
      KeyError: no tensor of that name.
    """
    tensor = self.find(name)
    raw = self._data[tensor.start : tensor.start + tensor.size]
    if tensor.dtype == "BOOL":  # any byte may be in the file
      return (raw != 0).reshape(tensor.shape)
    return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


class SafetensorsFolder(Weights):
  """A folder with `model.safetensors`, or with shards and their index.

  Args:
    path: the folder.
    follow_links: let links lead out of the folder, as in the cache of a model
      hub, where every file is a link.

  Raises:
    FileNotFoundError: neither file is there, or a shard of the index isn't.
    WeightsError: the index names a file outside the folder, or doesn't agree
      with the shards.

  Example:
    >>> from safetensors.numpy import save_file
    >>> save_file({"w": np.float32([1, 2])}, "model.safetensors")
    >>> SafetensorsFolder(".").read("w").tolist()
    [1.0, 2.0]
  """

  def __init__(self, path: str | os.PathLike, *, follow_links: bool = False):
    self.path = pathlib.Path(path)
    whole, index = (
      inside(self.path, name, follow_links=follow_links)
      for name in (_SINGLE, _INDEX)
    )
    if whole.exists() and index.exists():
      raise WeightsError(f"{self.path} has {_SINGLE} and {_INDEX}; keep one")
    self._shards: dict[str, SafetensorsFile] = {}
    if index.exists():
      self._open_shards(index, follow_links)
    elif whole.exists():
      shard = SafetensorsFile(whole)
      self.metadata, self.tensors = shard.metadata, shard.tensors
      self._shards = dict.fromkeys(shard.names, shard)
    else:
      raise FileNotFoundError(f"{self.path} has neither {_SINGLE} nor {_INDEX}")

  def read(self, name: str) -> np.ndarray:
    """A tensor, as `SafetensorsFile.read` gives it."""
    self.find(name)
    return self._shards[name].read(name)

  def _open_shards(self, index: pathlib.Path, follow_links: bool) -> None:
    content = read_json(index)
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
      raise WeightsError(f"{index}: weight_map is no object with tensors")
    self.metadata = content.get("metadata") or {}
    shards: dict[str, SafetensorsFile] = {}
    for name, file in placed.items():
      if not isinstance(file, str):
        raise WeightsError(f"{index}: {quote(name)} is in {quote(file)}")
      if file not in shards:
        place = inside(self.path, file, follow_links=follow_links)
        shards[file] = SafetensorsFile(place)
      if name not in shards[file].tensors:
        raise WeightsError(f"{index}: {quote(name)} is not in {quote(file)}")
      self._shards[name] = shards[file]
    for file, shard in shards.items():
      for name in shard.names:
        if placed.get(name) != file:
          raise WeightsError(
            f"{index}: {quote(name)} of {quote(file)} is placed in"
            f" {quote(placed.get(name))}"
          )
    self.tensors = {n: s.tensors[n] for n, s in self._shards.items()}


def read_json(
  path: pathlib.Path, *, most: int = _LONGEST_JSON
) -> dict[str, Any]:
  """A JSON file that holds an object, each key once.

  Args:
    path: the file.
    most: bytes that are read at most.

  Raises:
    FileNotFoundError: there is none.
    WeightsError: it is longer, or something else.

  Example:
    >>> _ = pathlib.Path("config.json").write_text('{"width": 64}')
    >>> read_json(pathlib.Path("config.json"))
    {'width': 64}
  """
  data = map_bytes(path)
  if len(data) > most:
    raise WeightsError(
      f"{path}: {len(data)} bytes of JSON; at most {most} are read"
    )
  return _parse(path, data.tobytes())


def _parse(path: pathlib.Path, text: bytes) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
      if key in found:
        raise WeightsError(f"{path}: the key {quote(key)} comes twice")
      found[key] = value
    return found

  try:
    content = json.loads(text, object_pairs_hook=unique)
  except WeightsError:
    raise
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{path}: not JSON ({error})") from None
  if not isinstance(content, dict):
    raise WeightsError(f"{path}: JSON, but not an object")
  return content


def _header(file: Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """(metadata, tensors), once everything is known to fit."""
  length = file.number("Q", "the header's length")
  if length > file.left:
    file.fail(
      f"claims a header of {length} bytes, where {file.left} are left; is it a"
      " safetensors file?"
    )
  if length > _LONGEST_JSON:
    file.fail(f"a header of {length} bytes; at most {_LONGEST_JSON} are read")
  header = _parse(file.path, file.take(length, "the header"))
  metadata = header.pop("__metadata__", None) or {}
  if not isinstance(metadata, dict):
    file.fail(f"__metadata__ is {quote(metadata)}, no object")
  begin, room = file.at, file.left
  tensors = {n: _entry(file, n, e, begin, room) for n, e in header.items()}
  here, last = begin, "the header"
  for name, tensor in sorted(
    tensors.items(), key=lambda x: (x[1].start, x[1].size)
  ):
    if tensor.start != here:
      file.fail(
        f"{quote(name)} starts at byte {tensor.start - begin} of the data;"
        f" {quote(last)} ends at {here - begin}"
      )
    here, last = tensor.start + tensor.size, name
  if here != begin + room:
    file.fail(f"the tensors end at byte {here - begin} of {room} of the data")
  return metadata, tensors


def _entry(
  file: Cursor, name: str, entry: Any, begin: int, room: int
) -> Tensor:
  """A tensor of the header, whose byte range fits its shape and the file."""
  try:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    known = dtype in DTYPES
  except (KeyError, TypeError, ValueError):
    file.fail(f"{quote(name)} has no dtype, shape and data_offsets")
  if not known:
    file.fail(f"{quote(name)} has the dtype {quote(dtype)}, which is not read")
  if len(shape) > _MOST_AXES:
    file.fail(f"{quote(name)} has {len(shape)} axes; at most {_MOST_AXES}")
  if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
    file.fail(f"{quote(name)} has the shape {quote(shape)}, or offsets below 0")
  claimed = count(shape) * DTYPES[dtype].itemsize
  size = 0 if 0 in shape else claimed
  if end - start != size or (not size and claimed >> 62):
    file.fail(
      f"{quote(name)} takes bytes {start} to {end} for {dtype} of shape"
      f" {quote(shape)}, {claimed} bytes"
    )
  if end > room:
    file.fail(f"{quote(name)} ends at byte {end} of {room} of the data")
  return Tensor(shape, dtype, begin + start, size)
