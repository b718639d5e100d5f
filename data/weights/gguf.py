"""GGUF, llama.cpp's format: metadata and tensors, often quantised.

Layout: magic, version, two counts, the metadata, the table of tensors, then
the data, aligned. Every count, length and offset is compared with the bytes
that are there before anything is looped over or allocated.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import pathlib
import struct
from typing import Any

import numpy as np

from isthmus.data.weights.file import (
  Cursor,
  Tensor,
  Weights,
  count,
  map_bytes,
  quote,
)

# number in the file -> name, elements of a block, bytes of a block.
_TYPES = {
  0: ("F32", 1, 4),
  1: ("F16", 1, 2),
  2: ("Q4_0", 32, 18),
  3: ("Q4_1", 32, 20),
  6: ("Q5_0", 32, 22),
  7: ("Q5_1", 32, 24),
  8: ("Q8_0", 32, 34),
  10: ("Q2_K", 256, 84),
  11: ("Q3_K", 256, 110),
  12: ("Q4_K", 256, 144),
  13: ("Q5_K", 256, 176),
  14: ("Q6_K", 256, 210),
  16: ("IQ2_XXS", 256, 66),
  17: ("IQ2_XS", 256, 74),
  18: ("IQ3_XXS", 256, 98),
  19: ("IQ1_S", 256, 50),
  20: ("IQ4_NL", 32, 18),
  21: ("IQ3_S", 256, 110),
  22: ("IQ2_S", 256, 82),
  23: ("IQ4_XS", 256, 136),
  24: ("I8", 1, 1),
  25: ("I16", 1, 2),
  26: ("I32", 1, 4),
  27: ("I64", 1, 8),
  28: ("F64", 1, 8),
  29: ("IQ1_M", 256, 56),
  30: ("BF16", 1, 2),
  34: ("TQ1_0", 256, 54),
  35: ("TQ2_0", 256, 66),
}
_NUMBERS = {name: number for number, (name, _, _) in _TYPES.items()}
_PLAIN = {
  "F32": "<f4",
  "F16": "<f2",
  "F64": "<f8",
  "I8": "i1",
  "I16": "<i2",
  "I32": "<i4",
  "I64": "<i8",
}
# number in the file -> code of `struct`, which numpy reads the same way.
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "B",
  10: "Q",
  11: "q",
  12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Above any model's, and few enough to refuse the file within a second.
_MOST_ENTRIES = 1 << 12  # of metadata
_MOST_TENSORS = 1 << 14
_MOST_STRINGS = 1 << 20  # in all arrays of strings together
_MOST_AXES = 4
_LONGEST_KEY = (1 << 16) - 1  # bytes; the format's own limit
_SLICE = 1 << 20  # bytes that are dequantised at a time


class GgufFile(Weights):
  """A GGUF file of version 2 or 3, little-endian.

  The header is read and checked at once; tensors stay on the disk until
  `read`. `metadata` has numbers, strings, arrays of numbers as numpy arrays,
  and arrays of strings as lists.

  Args:
    path: the file.

  Raises:
    FileNotFoundError: no such file.
    WeightsError: a count, length, type or offset that doesn't fit.

  Example:
    >>> import gguf
    >>> writer = gguf.GGUFWriter("w.gguf", "llama")
    >>> writer.add_tensor("w", np.eye(2, dtype=np.float32))
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> file = GgufFile("w.gguf")
    >>> file.metadata["general.architecture"], file.read("w").tolist()
    ('llama', [[1.0, 0.0], [0.0, 1.0]])
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._data = map_bytes(self.path)
    header = _Header(self.path, self._data)
    self.metadata, self.tensors = header.metadata, header.tensors

  def read(self, name: str) -> np.ndarray:
    """A tensor's values, dequantised.

    Args:
      name: one of `names`.

    Returns:
      float32, of `shapes[name]`; integers and F64 keep their type. F32 is a
      read-only view of the file.

    Raises:
      KeyError: no tensor of that name.
      ImportError: a quantised tensor, where the package gguf is missing.
    """
    tensor = self.find(name)
    raw = self._data[tensor.start : tensor.start + tensor.size]
    if tensor.dtype in _PLAIN:
      values = raw.view(_PLAIN[tensor.dtype])
      if tensor.dtype == "F16":
        values = values.astype(np.float32)
    elif tensor.dtype == "BF16":  # the upper half of a float32
      values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
      values = _dequantize(raw, tensor.dtype)
    return values.reshape(tensor.shape)


class _Header(Cursor):
  """Metadata and the table of tensors, checked while they are read."""

  def __init__(self, path: pathlib.Path, data: np.ndarray):
    super().__init__(path, data)
    magic = self.take(4, "the magic number")
    if magic != b"GGUF":
      self.fail(f"begins with {magic!r}, not b'GGUF'; is it a GGUF file?")
    version = self.number("I", "the version")
    if version not in (2, 3):
      swapped = version in (2 << 24, 3 << 24)
      kind = "big-endian" if swapped else f"of version {version}"
      self.fail(f"GGUF {kind}; little-endian versions 2 and 3 are read")
    num_tensors = self.number("Q", "the number of tensors")
    num_entries = self.number("Q", "the number of metadata entries")
    # Least bytes of a tensor: name's length, axes, type, offset; of an entry:
    # key's length, type, one byte.
    self._check_count(num_tensors, 24, _MOST_TENSORS, "tensors")
    self._check_count(num_entries, 13, _MOST_ENTRIES, "metadata entries")
    self.strings = 0
    self.metadata: dict[str, Any] = {}
    for _ in range(num_entries):
      key = self._string("a metadata key", _LONGEST_KEY)
      if key in self.metadata:
        self.fail(f"the metadata key {quote(key)} comes twice")
      kind = self.number("I", f"the type of {quote(key)}")
      self.metadata[key] = self._value(kind, quote(key))
    self.tensors = self._table(num_tensors)

  def _check_count(self, number: int, least: int, most: int, what: str):
    if number * least > self.left:
      self.fail(
        f"claims {number} {what}, at least {number * least} bytes, where"
        f" {self.left} are left"
      )
    if number > most:
      self.fail(f"claims {number} {what}; at most {most} are read")

  def _string(self, what: str, most: int | None = None) -> str:
    length = self.number("Q", f"the length of {what}")
    if most is not None and length > most:
      self.fail(f"{what} has {length} bytes; at most {most} are read")
    text = self.take(length, what)
    try:
      return text.decode("utf-8")
    except UnicodeDecodeError as error:
      self.fail(f"{what} is not UTF-8 at its byte {error.start}")

  def _value(self, kind: int, what: str) -> Any:
    if kind in _SCALARS:
      value = self.number(_SCALARS[kind], what)
      if kind == _BOOL:
        self._check_bools(what, value)
        value = bool(value)
      return value
    if kind == _STRING:
      return self._string(what)
    if kind == _ARRAY:
      return self._array(what)
    self.fail(f"{what} has the unknown type {kind}; types are 0 to 12")

  def _array(self, what: str) -> Any:
    kind = self.number("I", f"the element type of {what}")
    length = self.number("Q", f"the length of {what}")
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
      self.need(length * dtype.itemsize, f"{what}, {length} numbers,")
      values = np.frombuffer(self.take(length * dtype.itemsize, what), dtype)
      if kind == _BOOL:
        self._check_bools(what, int(values.max(initial=0)))
        values = values.astype(bool)
      return values
    if kind == _STRING:
      self.strings += length
      self._check_count(length, 8, _MOST_STRINGS, f"strings in {what}")
      if self.strings > _MOST_STRINGS:
        self.fail(
          f"claims {self.strings} strings up to {what}; at most"
          f" {_MOST_STRINGS} are read"
        )
      return self._strings(what, length)
    reason = "arrays in it, which are not read" if kind == _ARRAY else "none"
    self.fail(f"the array {what} has the element type {kind}: {reason}")

  def _strings(self, what: str, length: int) -> list[str]:
    """Many strings, in a loop without calls: `_string` would take seconds."""
    found, at, data, size = [], self.at, self._data, len(self._data)
    unpack = struct.Struct("<Q").unpack_from
    for _ in range(length):
      begin = at + 8
      if begin > size:
        break
      at = begin + unpack(data, at)[0]
      if at > size:
        break
      found.append(bytes(data[begin:at]))
    if len(found) < length:
      self.fail(
        f"string {len(found)} of {length} in {what} ends at byte"
        f" {max(at, begin)} of {size}"
      )
    self.at = at
    try:
      return [text.decode("utf-8") for text in found]
    except UnicodeDecodeError:
      self.fail(f"a string in {what} is not UTF-8")

  def _check_bools(self, what: str, largest: int) -> None:
    if largest > 1:
      self.fail(f"{what} is a truth value of {largest}, neither 0 nor 1")

  def _table(self, number: int) -> dict[str, Tensor]:
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(number):
      name = self._string("a tensor's name", _LONGEST_KEY)
      if name in found:
        self.fail(f"the tensor {quote(name)} comes twice")
      axes = self.number("I", f"the number of axes of {quote(name)}")
      if axes > _MOST_AXES:
        self.fail(f"{quote(name)} has {axes} axes; at most {_MOST_AXES}")
      self.need(8 * axes + 12, f"the entry of {quote(name)}")
      dims = tuple(self.number("Q", "an axis") for _ in range(axes))
      kind = self.number("I", "a type")
      found[name] = (dims[::-1], kind, self.number("Q", "an offset"))
    step = self.metadata.get("general.alignment", 32)
    if type(step) is not int or step < 1 or step & (step - 1) or step > 1 << 16:
      self.fail(f"general.alignment is {step!r}; a power of two up to 65536")
    begin = self.at + -self.at % step
    tensors, here = {}, 0
    for name, (shape, kind, offset) in found.items():
      if kind not in _TYPES:
        self.fail(f"{quote(name)} has the type {kind}, which is not read")
      dtype, block, width = _TYPES[kind]
      if (shape[-1] if shape else 1) % block:
        row = shape[-1] if shape else 1
        self.fail(
          f"{quote(name)} has rows of {row} elements; {dtype} has blocks of"
          f" {block}"
        )
      claimed = count(shape) // block * width
      room = max(self.at + self.left - begin, 0)
      if offset != here or offset + claimed > room:
        self.fail(
          f"{quote(name)} of shape {shape} lies at bytes {offset} to"
          f" {offset + claimed} of the data, which go from {here} to {room}"
        )
      size = claimed if 0 not in shape else 0
      tensors[name] = Tensor(shape, dtype, begin + offset, size)
      here += size + -size % step
    end = max(begin + here, self.at)
    if self.at + self.left > end:
      self.fail(f"{self.at + self.left - end} bytes after the last tensor")
    return tensors


def _dequantize(raw: np.ndarray, dtype: str) -> np.ndarray:
  """float32 [elements] of the blocks in `raw`."""
  try:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType
  except ImportError as error:
    raise ImportError(
      f"{dtype} tensors need the package gguf: pip install 'isthmus[data]'"
    ) from error
  kind = GGMLQuantizationType(_NUMBERS[dtype])
  _, block, width = _TYPES[_NUMBERS[dtype]]
  values = np.empty(raw.size // width * block, np.float32)
  step = _SLICE // width
  for first in range(0, raw.size // width, step):
    piece = raw[first * width : (first + step) * width]
    values[first * block : (first + step) * block] = quants.dequantize(
      piece.reshape(1, -1), kind
    ).reshape(-1)
  return values
