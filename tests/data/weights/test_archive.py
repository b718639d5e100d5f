"""Zip directories: those of zipfile, and what is wrong with others."""

import io
import pathlib
import struct
import zipfile

import numpy as np
import pytest

from isthmus.data.weights.archive import Archive
from isthmus.data.weights.file import WeightsError
from tests.data.weights import make

MEMBERS = {"a/data.pkl": b"abc", "a/data/0": bytes(range(100)), "ü": b""}


def written(members=MEMBERS, comment=b"", **settings):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", **settings) as archive:
    archive.comment = comment
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


def opened(content):
  return Archive(pathlib.Path("w.pth"), np.frombuffer(content, np.uint8))


@pytest.mark.parametrize("comment", [b"", b"x" * 60000])
def test_members(comment):
  archive = opened(written(comment=comment))
  assert set(archive.members) == set(MEMBERS)
  for name, content in MEMBERS.items():
    assert archive.read(name).tobytes() == content
  with pytest.raises(WeightsError, match="w.pth: the archive has no 'b'"):
    archive.read("b")


def test_zip64():
  """Large sizes go into fields of their own."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, content in MEMBERS.items():
      with archive.open(name, "w", force_zip64=True) as member:
        member.write(content)
  plain = file.getvalue()
  assert opened(plain).read("a/data/0").tobytes() == MEMBERS["a/data/0"]
  # The same directory, as files above 4 GiB have it.
  end = plain.rindex(b"PK\5\6")
  number, length, begin = struct.unpack("<4xHHHHII", plain[end : end + 20])[3:]
  directory, at = plain[begin:end], 0
  wide = b""
  for _ in range(number):
    fields = list(struct.unpack_from("<4s6H3L5H2L", directory, at))
    name = directory[at + 46 : at + 46 + fields[10]]
    at += 46 + fields[10] + fields[11] + fields[12]
    extra = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
    fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
    fields[11], fields[12] = len(extra), 0
    wide += struct.pack("<4s6H3L5H2L", *fields) + name + extra
  tail = struct.pack(
    *("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0),
    *(number, number, len(wide), begin),
  )
  tail += struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(wide), 1)
  tail += struct.pack(
    "<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, *2 * [2**32 - 1], 0
  )
  content = plain[:begin] + wide + tail
  with zipfile.ZipFile(io.BytesIO(content)) as archive:  # ours is well formed
    assert archive.read("a/data/0") == MEMBERS["a/data/0"]
  found = opened(content)
  assert {n: found.read(n).tobytes() for n in found.members} == MEMBERS


def patched(content, marker, offset, code, value):
  at = content.rindex(marker) + offset
  new = struct.pack(code, value)
  return content[:at] + new + content[at + len(new) :]


PLAIN = written({"m": b"abcdef"})


@pytest.mark.parametrize(
  "content, message",
  [
    (b"PK\3\4" + bytes(100), "no end of a zip directory"),
    (PLAIN[:-30], "no end of a zip directory"),
    (PLAIN[3:], "a zip directory of 1 entries"),
    (written(compression=zipfile.ZIP_DEFLATED), "compressed"),
    (patched(PLAIN, b"PK\1\2", 24, "<I", 1 << 31), "for 2147483648"),
    (patched(PLAIN, b"PK\1\2", 8, "<H", 1), "compressed or encrypted"),
    (patched(PLAIN, b"PK\1\2", 42, "<I", 1 << 30), "starts at byte 1073741824"),
    (patched(PLAIN, b"PK\1\2", 42, "<I", 1), "takes bytes"),
    (patched(PLAIN, b"PK\1\2", 28, "<H", 9999), "name takes 9999 bytes"),
    (patched(PLAIN, b"PK\1\2", 0, "<I", 0), "no entry of a zip directory"),
    (patched(PLAIN, b"PK\3\4", 28, "<H", 9999), "takes bytes"),
    (patched(PLAIN, b"PK\5\6", 10, "<H", 2), "a zip directory of 2 entries"),
    (patched(PLAIN, b"PK\5\6", 10, "<H", 0), "47 bytes after the last entry"),
    (patched(PLAIN, b"PK\5\6", 12, "<I", 1 << 31), "in bytes 37 to 2147483685"),
  ],
  ids=make.label,
)
def test_refused(content, message):
  with pytest.raises(WeightsError, match=message):
    opened(content)


def test_twice_and_too_many():
  with pytest.warns(UserWarning, match="Duplicate"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr("a", b"1")
      archive.writestr("a", b"2")
  with pytest.raises(WeightsError, match="the archive has 'a' twice"):
    opened(file.getvalue())
  at = PLAIN.rindex(b"PK\5\6")
  filler = bytes(46 * 70000)
  begin = struct.unpack_from("<I", PLAIN, at + 16)[0]
  tail = struct.pack(
    "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 0, 70000, len(filler), begin
  )
  tail += struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(filler), 1)
  content = PLAIN[:begin] + filler + tail + PLAIN[at:]
  with pytest.raises(WeightsError, match="70000 members; at most 65536"):
    opened(content)


def test_checksums():
  damaged = bytearray(PLAIN)
  damaged[PLAIN.index(b"abcdef")] ^= 1
  with pytest.raises(WeightsError, match="'m' has the checksum"):
    opened(bytes(damaged)).read("m")
