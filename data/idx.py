"""IDX files, MNIST's format, plain or gzipped, from anyone's hands."""

import math
import os
import struct
import zlib

import numpy as np

from isthmus.data.bounded import Bounded, open_packed, read_last

# The third byte of the file.
_TYPES = {
  0x08: np.dtype(">u1"),
  0x09: np.dtype(">i1"),
  0x0B: np.dtype(">i2"),
  0x0C: np.dtype(">i4"),
  0x0D: np.dtype(">f4"),
  0x0E: np.dtype(">f8"),
}
_MAX_RANK = 32


def read_idx(path: str | os.PathLike, *, max_bytes: int = 2**32) -> np.ndarray:
  """The array of an IDX file.

  The file is two zero bytes, a byte for the type, a byte for the rank, a
  big-endian uint32 for each dimension, then the items. All of it is checked
  against the length of the file before memory is taken for the items, and
  of a gzipped file no more is unpacked than its header asks for.

  Args:
    path: the file; gzip is recognised by its content, not by its name.
    max_bytes: the most that header and items may take.

  Returns:
    Array of the header's shape and type, in the machine's byte order.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not an IDX file; a header that promises more or fewer items
      than there are, or more than max_bytes; damaged gzip.

  Example:
    >>> import pathlib
    >>> content = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])
    >>> _ = pathlib.Path("x.idx").write_bytes(content)
    >>> read_idx("x.idx")
    array([7, 8, 9], dtype=uint8)

  Reference:
    LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits.
  """
  try:
    with open_packed(path) as bounded:
      return _read(bounded, max_bytes)
  except FileNotFoundError:
    raise
  except (EOFError, OSError, ValueError, zlib.error) as error:
    raise ValueError(
      f"{os.fspath(path)!r} is not a whole IDX file ({error}); get it again"
    ) from error


def _read(bounded: Bounded, max_bytes: int) -> np.ndarray:
  magic = _take(bounded, 4)
  if magic[:2] != b"\0\0" or magic[2] not in _TYPES:
    raise ValueError(f"it begins with {magic.hex()}, not 0000 and a type")
  dtype, rank = _TYPES[magic[2]], magic[3]
  if not 1 <= rank <= _MAX_RANK:
    raise ValueError(f"its rank is {rank}, outside [1, {_MAX_RANK}]")
  shape = struct.unpack(f">{rank}I", _take(bounded, 4 * rank))
  size = math.prod(shape) * dtype.itemsize
  bounded.check(4 + 4 * rank + size, shape, max_bytes)
  items = read_last(bounded.file, size, shape)
  return items.view(dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _take(bounded: Bounded, count: int) -> bytes:
  data = bounded.file.read(count)
  if len(data) < count:
    raise ValueError("it ends within its header")
  return data
