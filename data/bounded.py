"""Streams that may be hostile: no more memory than their bytes can fill."""

import contextlib
import gzip
import io
import os
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

# Deflate spends at least a bit on a symbol, which stands for 258 bytes at most.
DEFLATE = 1032
_CHUNK = 2**20


class Bounded(NamedTuple):
  """An open file, unpacked as it is read.

  Attributes:
    file: the stream.
    length: bytes that it holds; of a gzipped file, the most it can hold.
    packed: whether the file is gzipped.

  Example:
    >>> import io
    >>> bounded = Bounded(io.BytesIO(b"12345678"), 8, packed=False)
    >>> bounded.check(8, shape=(4, 2), max_bytes=100)
    >>> bounded.check(9, shape=(3, 3), max_bytes=100)
    Traceback (most recent call last):
    ValueError: its shape (3, 3) takes 9 bytes, it holds 8
  """

  file: io.BufferedIOBase
  length: int
  packed: bool

  def check(self, size: int, shape: tuple[int, ...], max_bytes: int) -> None:
    """Raise a ValueError unless the file can be of `size` bytes in all."""
    if size > max_bytes:
      raise ValueError(
        f"its shape {shape} takes {size} bytes, max_bytes is {max_bytes}"
      )
    if size > self.length or (not self.packed and size < self.length):
      most = "at most " if self.packed else ""
      raise ValueError(
        f"its shape {shape} takes {size} bytes, it holds {most}{self.length}"
      )


@contextlib.contextmanager
def open_packed(path: str | os.PathLike) -> Generator[Bounded, None, None]:
  """Opens a file, gzipped or not, which its content tells, not its name.

  Example:
    >>> import gzip, pathlib
    >>> _ = pathlib.Path("x").write_bytes(gzip.compress(b"hello"))
    >>> with open_packed("x") as bounded:
    ...   bounded.packed, bounded.file.read()
    (True, b'hello')
  """
  with open(path, "rb") as raw:
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    length = os.fstat(raw.fileno()).st_size
    if not packed:
      yield Bounded(raw, length, False)
      return
    with gzip.GzipFile(fileobj=raw) as file:
      yield Bounded(file, length * DEFLATE, True)


def read_last(
  file: io.BufferedIOBase, size: int, shape: tuple[int, ...]
) -> UInt8[np.ndarray, "n"]:
  """The `size` bytes that are left of a stream, their checksum compared.

  Args:
    file: the stream.
    size: bytes of the items.
    shape: of the items, for the errors.

  Raises:
    ValueError: fewer bytes are left, or more.

  Example:
    >>> import io
    >>> read_last(io.BytesIO(b"abc"), 3, shape=(3,)).tolist()
    [97, 98, 99]
  """
  items = np.empty(size, np.uint8)
  view, done = memoryview(items), 0
  while done < size:
    count = file.readinto(view[done : done + _CHUNK])
    if not count:
      raise ValueError(
        f"its shape {shape} takes {size} bytes of items, it has {done}"
      )
    done += count
  if file.read(1):  # gzip and zip compare checksums at their end
    raise ValueError(
      f"its shape {shape} takes {size} bytes of items, it has more"
    )
  return items
