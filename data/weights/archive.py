"""Where the members of an uncompressed zip archive lie in its file.

PyTorch's archives are never compressed, so a member is a range of the file's
bytes: nothing is unpacked, and no archive can claim more than it has.

Reference: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import pathlib
import struct
import zlib

import numpy as np

from isthmus.data.weights.file import Cursor, WeightsError, quote

_END = struct.Struct("<4s4H2LH")  # end of the central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_MEMBERS = 1 << 16
_LONGEST_COMMENT = (1 << 16) - 1


class Archive:
  """Members of a zip file.

  Args:
    path: named in errors.
    data: the file's bytes, uint8 [size].

  Raises:
    WeightsError: no zip file, a damaged one, or one with members that are
      compressed, encrypted or doubled.

  Example:
    >>> import zipfile
    >>> with zipfile.ZipFile("w.zip", "w") as file:
    ...   file.writestr("data/0", b"abc")
    >>> path = pathlib.Path("w.zip")
    >>> archive = Archive(path, np.frombuffer(path.read_bytes(), np.uint8))
    >>> archive.read("data/0").tobytes()
    b'abc'
  """

  def __init__(self, path: pathlib.Path, data: np.ndarray):
    self.path = path
    self._data = data
    self._sums: dict[str, int] = {}
    self.members: dict[str, tuple[int, int]] = {}
    number, begin, end = self._directory()
    file = Cursor(path, data[:end], begin)
    for _ in range(number):
      self._add(file)
    if file.left:
      file.fail(f"{file.left} bytes after the last entry of the zip directory")

  def read(self, name: str) -> np.ndarray:
    """A member's bytes, a view of the file, once their checksum is right.

    Args:
      name: one of `members`.

    Returns:
      uint8 [size].

    Raises:
      WeightsError: no such member, or its checksum is wrong.
    """
    if name not in self.members:
      raise WeightsError(f"{self.path}: the archive has no {quote(name)}")
    start, end = self.members[name]
    data = self._data[start:end]
    found = zlib.crc32(memoryview(data))
    if found != self._sums[name]:
      raise WeightsError(
        f"{self.path}: {quote(name)} has the checksum {found:08x}, not"
        f" {self._sums[name]:08x}; the file is damaged"
      )
    return data

  def _directory(self) -> tuple[int, int, int]:
    """(entries, first byte, end) of the directory."""
    size = len(self._data)
    first = max(0, size - _END.size - _LONGEST_COMMENT)
    tail = self._data[first:].tobytes()
    found = tail.rfind(b"PK\5\6")
    at = first + found
    if found < 0 or at + _END.size > size:
      self._fail("no end of a zip directory; is the file cut off?")
    fields = _END.unpack_from(self._data, at)
    number, length, begin = fields[4:7]
    wide = at - _LOCATOR.size
    if wide >= 0 and bytes(self._data[wide : wide + 4]) == b"PK\6\7":
      at = _LOCATOR.unpack_from(self._data, wide)[2]
      if at + _END64.size > wide:
        self._fail(f"the zip64 directory ends at byte {at} of {wide}")
      fields = _END64.unpack_from(self._data, at)
      if fields[0] != b"PK\6\6":
        self._fail(f"no end of a zip64 directory at byte {at}")
      number, length, begin = fields[7:10]
    if begin + length != at or number * _ENTRY.size > length:
      self._fail(
        f"a zip directory of {number} entries in bytes {begin} to"
        f" {begin + length}, before byte {at}"
      )
    if number > _MOST_MEMBERS:
      self._fail(f"{number} members; at most {_MOST_MEMBERS} are read")
    return number, begin, begin + length

  def _add(self, file: Cursor) -> None:
    fields = _ENTRY.unpack(file.take(_ENTRY.size, "an entry of the directory"))
    if fields[0] != b"PK\1\2":
      file.fail(f"no entry of a zip directory at byte {file.at - _ENTRY.size}")
    flags, method, crc, packed, size = (fields[i] for i in (3, 4, 7, 8, 9))
    name = file.take(fields[10], "a member's name").decode("utf-8", "replace")
    extra = file.take(fields[11], "an extra field")
    file.take(fields[12], "a comment")
    start = fields[16]
    size, packed, start = self._widen(name, extra, size, packed, start)
    if method or flags & 1 or packed != size:
      file.fail(
        f"{quote(name)} is compressed or encrypted, {packed} bytes for {size};"
        " PyTorch's archives never are"
      )
    if name in self.members:
      file.fail(f"the archive has {quote(name)} twice")
    if start + _LOCAL.size > len(self._data):
      file.fail(f"{quote(name)} starts at byte {start} of {len(self._data)}")
    local = _LOCAL.unpack_from(self._data, start)
    start += _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\3\4" or start + size > len(self._data):
      file.fail(
        f"{quote(name)} takes bytes {start} to {start + size} of"
        f" {len(self._data)}"
      )
    self.members[name], self._sums[name] = (start, start + size), crc

  def _widen(
    self, name: str, extra: bytes, *sizes: int
  ) -> tuple[int, int, int]:
    """Sizes and offset, those of 2^32 - 1 taken from the zip64 field."""
    wanted = list(sizes)
    while len(extra) >= 4 and (1 << 32) - 1 in wanted:
      kind, length = struct.unpack_from("<2H", extra)
      field, extra = extra[4 : 4 + length], extra[4 + length :]
      if kind == 1:
        for i, size in enumerate(wanted):
          if size == (1 << 32) - 1:
            if len(field) < 8:
              self._fail(f"{quote(name)} has a zip64 field that is too short")
            wanted[i], field = int.from_bytes(field[:8], "little"), field[8:]
        break
    return wanted[0], wanted[1], wanted[2]

  def _fail(self, reason: str) -> None:
    raise WeightsError(f"{self.path}: {reason}")
