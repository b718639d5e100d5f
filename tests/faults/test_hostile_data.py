"""Hostile data: archives, arrays, images and volumes made to do harm.

Fault: names that leave the folder, links, bombs, pickled objects, headers that
lie about sizes.
Promised: refused in a second, in one line that names the file and the cause;
nothing is written and nothing is run.
"""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from isthmus.data.idx import read_idx
from isthmus.data.image import ImageFolder
from isthmus.data.npz import Npz, read_npz
from tests.faults.hostile import (
  ITEMS,
  MAX_BYTES,
  assert_refused,
  brats_case,
  idx,
  nifti_bytes,
  read_brats,
  read_nifti,
  tarred,
  unpack,
  working_folder,
  zipped,
)

_place = pytest.fixture(autouse=True, name="place")(working_folder)

# Of zeros, in a mebibyte of gzip.
GIBIBYTE = gzip.compress(bytes(2**20)) * 1024


def as_images(path):
  ImageFolder(path, size=8, max_bytes=MAX_BYTES, max_files=1000).open("train")


@pytest.mark.parametrize("read", [unpack, as_images])
@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize(
  "name", ["../x", "a/../../x", "/tmp/isthmus-slip", "C:\\x", "a\\..\\..\\x"]
)
def test_slips(place, read, pack, name):
  path = pack(place / "slip", ("a/1.png", b"1"), (name, b"2"))
  assert_refused(read, path, "leaves the folder|is absolute|backslash")
  assert not os.path.exists("/tmp/isthmus-slip")


@pytest.mark.parametrize("read", [unpack, as_images])
@pytest.mark.parametrize(
  "kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE", "BLKTYPE"]
)
def test_links_and_devices(place, read, kind):
  info = tarfile.TarInfo("a/link")
  info.type, info.linkname = getattr(tarfile, kind), "../../../etc/passwd"
  path = tarred(place / "links.tar", ("a/1.png", b"1"), info)
  assert_refused(read, path, "'a/link' is a link, device")


def test_link_then_a_file_through_it(place):
  """The classic: a link to elsewhere, and a file below it."""
  link = tarfile.TarInfo("a")
  link.type, link.linkname = tarfile.SYMTYPE, str(place.parent)
  path = tarred(place / "through.tar.gz", link, ("a/x", b"1"))
  assert_refused(unpack, path, "'a' is a link")
  info = zipfile.ZipInfo("a")
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  path = zipped(place / "through.zip", (info, str(place.parent)), ("a/x", b"1"))
  assert_refused(unpack, path, "'a' is a link")


@pytest.mark.parametrize("read", [unpack, as_images])
def test_archive_bombs(place, read):
  zeros = bytes(10 * MAX_BYTES)
  path = zipped(place / "bomb.zip", ("a/1.png", zeros))
  assert path.stat().st_size < MAX_BYTES / 50
  assert_refused(read, path, f"more than max_bytes of {MAX_BYTES}")
  info = tarfile.TarInfo("a/1.png")
  info.size = 2**30
  path = place / "bomb.tar.gz"
  path.write_bytes(
    gzip.compress(info.tobuf()) + gzip.compress(bytes(2**20)) * 1025
  )
  assert path.stat().st_size < 2**21
  assert_refused(read, path, f"more than max_bytes of {MAX_BYTES}")
  path = zipped(place / "many.zip", *((f"a/{i}.png", b"") for i in range(1001)))
  assert_refused(read, path, "more than max_files of 1000")


def test_image_bomb(place):
  """A picture of 3.6 gigapixels in a hundred bytes."""
  image = pytest.importorskip("PIL.Image")
  path = place / "images" / "a" / "1.png"
  path.parent.mkdir(parents=True)
  image.new("1", (8, 8)).save(path)
  content = bytearray(path.read_bytes())
  content[16:24] = struct.pack(">2I", 60000, 60000)
  content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
  path.write_bytes(content)
  source = ImageFolder(place / "images", size=8, eval_fraction=0.0).open(
    "train"
  )
  assert_refused(
    lambda _: source[0], path, "cannot be read as an image .*3600000000"
  )


def test_lying_archive_headers(place):
  path = zipped(place / "lie.zip", ("x", bytes(2 * MAX_BYTES)))
  content = bytearray(path.read_bytes())
  for magic, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
    begin = content.index(magic) + at
    content[begin : begin + 4] = (100).to_bytes(4, "little")
  path.write_bytes(content)
  assert_refused(unpack, path, "CRC")
  info = tarfile.TarInfo("x")
  info.size = 2**40
  path = place / "lie.tar"
  path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
  assert_refused(unpack, path, "unexpected end of data")


class Mark:
  """Leaves a file when it is unpickled."""

  def __reduce__(self):
    return open, ("unpickled", "w")


def npy(array, shape=None):
  out = io.BytesIO()
  np.save(out, array, allow_pickle=True)
  content = out.getvalue()
  if shape is not None:
    old, new = repr(array.shape).encode(), repr(shape).encode()
    content = content.replace(
      old + b", }" + b" " * (len(new) - len(old)), new + b", }"
    )
  return content


def test_pickled_objects_in_npz(place):
  plain = np.array([Mark()], object)
  nested = np.zeros(1, [("n", "i4"), ("deep", [("o", "O", (2,))])])
  for array in (plain, nested):
    path = zipped(place / "objects.npz", ("x.npy", npy(array)))
    assert_refused(
      lambda p: Npz(p).open("train"), path, "'x' has dtype.*runs code"
    )
  assert not (place / "unpickled").exists()


def test_lying_npz(place):
  array = np.arange(12, dtype=np.float32)
  assert npy(array, (2**40,)) != npy(array)
  for shape in ((13,), (2**40,), (2**31, 2**31, 2**31)):
    path = zipped(place / "lie.npz", ("x.npy", npy(array, shape)))
    assert_refused(read_npz, path, "'x' has the shape .* but 48 are there")
  path = zipped(place / "bomb.npz", ("x.npy", npy(np.zeros(10**7))))
  assert path.stat().st_size < 10**5
  assert_refused(
    lambda p: Npz(p, max_bytes=10**6).open("train"), path, "max_bytes is"
  )
  for name in ("../x.npy", "/x.npy", "..\\x.npy"):
    path = zipped(place / "slip.npz", (name, npy(array)))
    assert_refused(read_npz, path, "leaves|absolute|backslash")


def test_lying_idx(place):
  for name, pack in (("lie.idx", bytes), ("lie.idx.gz", gzip.compress)):
    for shape in ((7, 7, 5), (5, 7, 5), (2**32 - 1,), (2**32 - 1,) * 8):
      path = place / name
      path.write_bytes(pack(idx(ITEMS, shape)))
      assert_refused(read_idx, path, r"shape \(.* takes")
  # A gibibyte of zeros after a header that asks for 210 bytes.
  path.write_bytes(
    gzip.compress(idx(ITEMS)) + gzip.compress(bytes(2**20)) * 1024
  )
  assert_refused(read_idx, path, "takes 210 bytes of items, it has more")


def test_lying_nifti(place):
  content = bytearray(nifti_bytes(ITEMS))
  for dims in ((3, 7, 7, 5), (3, 5, 7, 5), (7, *[32767] * 7), (3, -6, 7, 5)):
    struct.pack_into(f"<{len(dims)}h", content, 40, *dims)
    for name, pack in (("lie.nii", bytes), ("lie.nii.gz", gzip.compress)):
      path = place / name
      path.write_bytes(pack(content))
      assert_refused(read_nifti, path, "shape")
  path.write_bytes(gzip.compress(nifti_bytes(ITEMS)) + GIBIBYTE)
  assert_refused(read_nifti, path, r"\(6, 7, 5\) takes .* it has more")


def test_lying_brats(place):
  """One file of a case does harm; that one is named."""
  for kind in ("-t1n", "-seg"):
    path = brats_case(place).with_name(f"case{kind}.nii.gz")
    honest = gzip.decompress(path.read_bytes())
    content = bytearray(honest)
    for dims in ((3, 7, 7, 5), (7, *[32767] * 7), (3, -6, 7, 5)):
      struct.pack_into(f"<{len(dims)}h", content, 40, *dims)
      path.write_bytes(gzip.compress(content))
      assert_refused(read_brats, path, "shape")
    path.write_bytes(gzip.compress(honest) + GIBIBYTE)
    assert_refused(read_brats, path, r"\(6, 7, 5\) takes .* it has more")
