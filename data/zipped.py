"""Zip files that may be hostile, with a directory that is all there."""

import contextlib
import os
import struct
import zipfile
from collections.abc import Generator
from io import BufferedIOBase

_END, _END64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
# The end record, and the comment that may follow it.
_TAIL = 22 + 2**16


@contextlib.contextmanager
def open_zip(raw: BufferedIOBase) -> Generator[zipfile.ZipFile, None, None]:
  """A zip file whose members can be read one by one, within bounds.

  Its members are stored or deflated, which unpack a bounded amount at a time,
  and as many as its end record counts: zipfile reads a damaged directory as
  far as it goes.

  Args:
    raw: the open file; it has to be seekable.

  Raises:
    ValueError: encrypted members, other compressions, names with a zero byte,
      fewer or more members than are counted.
    zipfile.BadZipFile: no zip file.

  Example:
    >>> import io
    >>> raw = io.BytesIO()
    >>> with zipfile.ZipFile(raw, "w") as file:
    ...   file.writestr("x", "hello")
    >>> with open_zip(raw) as file:
    ...   file.namelist()
    ['x']
  """
  with zipfile.ZipFile(raw) as file:
    members = file.infolist()
    counted = _count(raw)
    if len(members) != counted:
      raise ValueError(
        f"its directory lists {len(members)} members, its end counts {counted}"
      )
    for info in members:
      shown = ascii(info.filename)
      if info.flag_bits & 1:
        raise ValueError(f"the member {shown} is encrypted")
      if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
          f"the member {shown} has compression {info.compress_type}; only"
          " stored (0) and deflated (8) are read"
        )
      # zipfile cuts a name at its first zero byte.
      if info.orig_filename != info.filename:
        raise ValueError(f"the name {ascii(info.orig_filename)} is not plain")
    yield file


def _count(raw: BufferedIOBase) -> int:
  """Members that the end record counts; zip64 has a record of its own."""
  length = raw.seek(0, os.SEEK_END)
  begin = max(0, length - _TAIL)
  raw.seek(begin)
  tail = raw.read()
  at = tail.rfind(_END)
  if at < 0 or len(tail) - at < 22:
    raise zipfile.BadZipFile("it has no end record")
  counted = struct.unpack_from("<H", tail, at + 10)[0]
  if counted < 0xFFFF or at < 20 or tail[at - 20 : at - 16] != _LOCATOR:
    return counted
  raw.seek(struct.unpack_from("<Q", tail, at - 12)[0])
  record = raw.read(56)
  if record[:4] != _END64 or len(record) < 56:
    raise zipfile.BadZipFile("its zip64 end record is not where it should be")
  return struct.unpack_from("<Q", record, 32)[0]
