"""Hostile data: archives, arrays, images and records made to do harm.

Fault: names that leave the folder, links, bombs, pickled objects, headers that
lie about sizes, files cut off or with a flipped bit.
Promised: refused in a second, in one line that names the file and the cause;
nothing is written, nothing is run, and what is not refused is read rightly.
"""

import contextlib
import gzip
import io
import math
import os
import pathlib
import stat
import struct
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest

from isthmus.data.archive import extract
from isthmus.data.idx import read_idx
from isthmus.data.image import ImageFolder
from isthmus.data.npz import Npz, read_npz

MAX_BYTES = 10**7
# Of zeros, in a mebibyte of gzip.
GIBIBYTE = gzip.compress(bytes(2**20)) * 1024


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
  """The working folder, with the cache inside, so that a snapshot sees all."""
  (tmp_path / "outer" / "inner").mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "outer" / "inner")
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "outer" / "cache"))
  return tmp_path / "outer" / "inner"


def snapshot():
  """Path -> content, less the locks and the cache's folders, which stay."""
  root = pathlib.Path.cwd().parents[1]
  return {
    path: path.read_bytes() if path.is_file() else None
    for path in root.rglob("*")
    if path.suffix != ".lock" and path.name not in ("cache", "archives")
  }


@contextlib.contextmanager
def quick(limit=1.0):
  """Within a second of this process's time: others may be at work too."""
  begin = time.process_time()
  yield
  spent = time.process_time() - begin
  assert spent <= limit, f"took {spent:.2f} s"


def refuse(read, path, cause):
  """One line that names the file and the cause, in a second, writing naught."""
  before = snapshot()
  with quick(), pytest.raises((ValueError, RuntimeError), match=cause) as info:
    read(path)
  said = str(info.value)
  assert path.name in said and "\n" not in said and len(said) < 500, said
  assert snapshot() == before


def unpack(path):
  target = path.parent / "out"
  extract(path, target, max_bytes=MAX_BYTES, max_files=1000)


def as_images(path):
  ImageFolder(path, size=8, max_bytes=MAX_BYTES, max_files=1000).open("train")


def zipped(path, *members):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, content in members:
      file.writestr(name, content)
  return path


def tarred(path, *members):
  """members: (name, content), or a TarInfo without content."""
  mode = "w:gz" if path.suffix == ".gz" else "w"
  with tarfile.open(path, mode) as file:
    for member in members:
      if isinstance(member, tarfile.TarInfo):
        file.addfile(member)
        continue
      info = tarfile.TarInfo(member[0])
      info.size = len(member[1])
      file.addfile(info, io.BytesIO(member[1]))
  return path


@pytest.mark.parametrize("read", [unpack, as_images])
@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize(
  "name", ["../x", "a/../../x", "/tmp/isthmus-slip", "C:\\x", "a\\..\\..\\x"]
)
def test_slips(place, read, pack, name):
  path = pack(place / "slip", ("a/1.png", b"1"), (name, b"2"))
  refuse(read, path, "leaves the folder|is absolute|backslash")
  assert not os.path.exists("/tmp/isthmus-slip")


@pytest.mark.parametrize("read", [unpack, as_images])
@pytest.mark.parametrize(
  "kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE", "BLKTYPE"]
)
def test_links_and_devices(place, read, kind):
  info = tarfile.TarInfo("a/link")
  info.type, info.linkname = getattr(tarfile, kind), "../../../etc/passwd"
  path = tarred(place / "links.tar", ("a/1.png", b"1"), info)
  refuse(read, path, "'a/link' is a link, device")


def test_link_then_a_file_through_it(place):
  """The classic: a link to elsewhere, and a file below it."""
  link = tarfile.TarInfo("a")
  link.type, link.linkname = tarfile.SYMTYPE, str(place.parent)
  path = tarred(place / "through.tar.gz", link, ("a/x", b"1"))
  refuse(unpack, path, "'a' is a link")
  info = zipfile.ZipInfo("a")
  info.external_attr = (stat.S_IFLNK | 0o777) << 16
  path = zipped(place / "through.zip", (info, str(place.parent)), ("a/x", b"1"))
  refuse(unpack, path, "'a' is a link")


@pytest.mark.parametrize("read", [unpack, as_images])
def test_archive_bombs(place, read):
  zeros = bytes(10 * MAX_BYTES)
  path = zipped(place / "bomb.zip", ("a/1.png", zeros))
  assert path.stat().st_size < MAX_BYTES / 50
  refuse(read, path, f"more than max_bytes of {MAX_BYTES}")
  info = tarfile.TarInfo("a/1.png")
  info.size = 2**30
  path = place / "bomb.tar.gz"
  path.write_bytes(
    gzip.compress(info.tobuf()) + gzip.compress(bytes(2**20)) * 1025
  )
  assert path.stat().st_size < 2**21
  refuse(read, path, f"more than max_bytes of {MAX_BYTES}")
  path = zipped(place / "many.zip", *((f"a/{i}.png", b"") for i in range(1001)))
  refuse(read, path, "more than max_files of 1000")


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
  refuse(lambda _: source[0], path, "cannot be read as an image .*3600000000")


def test_lying_archive_headers(place):
  path = zipped(place / "lie.zip", ("x", bytes(2 * MAX_BYTES)))
  content = bytearray(path.read_bytes())
  for magic, at in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
    begin = content.index(magic) + at
    content[begin : begin + 4] = (100).to_bytes(4, "little")
  path.write_bytes(content)
  refuse(unpack, path, "CRC")
  info = tarfile.TarInfo("x")
  info.size = 2**40
  path = place / "lie.tar"
  path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
  refuse(unpack, path, "unexpected end of data")


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
    refuse(lambda p: Npz(p).open("train"), path, "'x' has dtype.*runs code")
  assert not (place / "unpickled").exists()


def test_lying_npz(place):
  array = np.arange(12, dtype=np.float32)
  assert npy(array, (2**40,)) != npy(array)
  for shape in ((13,), (2**40,), (2**31, 2**31, 2**31)):
    path = zipped(place / "lie.npz", ("x.npy", npy(array, shape)))
    refuse(read_npz, path, "'x' has the shape .* but 48 are there")
  path = zipped(place / "bomb.npz", ("x.npy", npy(np.zeros(10**7))))
  assert path.stat().st_size < 10**5
  refuse(lambda p: Npz(p, max_bytes=10**6).open("train"), path, "max_bytes is")
  for name in ("../x.npy", "/x.npy", "..\\x.npy"):
    path = zipped(place / "slip.npz", (name, npy(array)))
    refuse(read_npz, path, "leaves|absolute|backslash")


def idx(array, shape=None):
  shape = array.shape if shape is None else shape
  return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + (
    array.tobytes()
  )


ITEMS = np.random.default_rng(0).integers(0, 256, (6, 7, 5), np.uint8)


def test_lying_idx(place):
  for name, pack in (("lie.idx", bytes), ("lie.idx.gz", gzip.compress)):
    for shape in ((7, 7, 5), (5, 7, 5), (2**32 - 1,), (2**32 - 1,) * 8):
      path = place / name
      path.write_bytes(pack(idx(ITEMS, shape)))
      refuse(read_idx, path, r"shape \(.* takes")
  # A gibibyte of zeros after a header that asks for 210 bytes.
  path.write_bytes(
    gzip.compress(idx(ITEMS)) + gzip.compress(bytes(2**20)) * 1024
  )
  refuse(read_idx, path, "takes 210 bytes of items, it has more")


def nifti_bytes(array):
  nibabel = pytest.importorskip("nibabel")
  return nibabel.Nifti1Image(array, np.diag([1, 2, 3, 1])).to_bytes()


def read_nifti(path):
  from isthmus.data import nifti

  return nifti.read(path)


def test_lying_nifti(place):
  content = bytearray(nifti_bytes(ITEMS))
  for dims in ((3, 7, 7, 5), (3, 5, 7, 5), (7, *[32767] * 7), (3, -6, 7, 5)):
    struct.pack_into(f"<{len(dims)}h", content, 40, *dims)
    for name, pack in (("lie.nii", bytes), ("lie.nii.gz", gzip.compress)):
      path = place / name
      path.write_bytes(pack(content))
      refuse(read_nifti, path, "shape")
  path.write_bytes(gzip.compress(nifti_bytes(ITEMS)) + GIBIBYTE)
  refuse(read_nifti, path, r"\(6, 7, 5\) takes .* it has more")


# -- flips and cuts --


def spoilt(content, count):
  """Copies of a file, by turns with a bit flipped, some bytes lost, or cut."""
  rng = np.random.default_rng(len(content))
  for i in range(count):
    copy = bytearray(content)
    at = int(rng.integers(len(copy)))
    if i % 3 == 0:
      copy[at] ^= 1 << int(rng.integers(8))
    elif i % 3 == 1:
      del copy[at:]
    else:
      end = at + int(rng.integers(1, 9))
      copy[at:end] = rng.bytes(end - at)
    yield bytes(copy)


def survive(read, path, content, right, *, count=150):
  """Each spoilt file is refused in one line, or read rightly.

  Args:
    read: of a path.
    path: where the file lies.
    content: of the whole file.
    right: (what was read, bytes of the spoilt file) -> whether it is right.
    count: of spoilt files.

  Returns:
    How many were refused.
  """
  path.write_bytes(content)
  assert right(read(path), content)
  before, refused = snapshot(), 0
  for copy in spoilt(content, count):
    path.write_bytes(copy)
    try:
      with quick():
        found = read(path)
    except (ValueError, RuntimeError) as error:
      said = str(error)
      assert path.name in said and "\n" not in said, said
      refused += 1
    else:
      assert right(found, copy), "read, and wrong"
  path.write_bytes(content)
  assert snapshot() == before
  return refused


def equal(found, array):
  return found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_spoilt_idx(place, suffix):
  """Without a checksum: what the header says, to the last byte of the file."""

  def as_said(found, content):
    big = found.astype(found.dtype.newbyteorder(">"))
    begin = 4 + 4 * found.ndim
    return (
      big.tobytes() == content[begin:]
      and struct.unpack_from(f">{found.ndim}I", content, 4) == found.shape
    )

  content, path = idx(ITEMS), place / f"x.idx{suffix}"
  if not suffix:
    assert 50 <= survive(read_idx, path, content, as_said) < 150
    return
  whole = lambda found, _: equal(found, ITEMS)
  packed = gzip.compress(content, mtime=0)
  assert survive(read_idx, path, packed, whole) > 120


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_spoilt_npz(place, save):
  arrays = {"x": ITEMS, "y": np.arange(6) / 7}
  save(place / "x.npz", **arrays)

  def whole(found, _):
    return found.keys() == arrays.keys() and all(
      equal(found[name], array) for name, array in arrays.items()
    )

  path = place / "x.npz"
  assert survive(read_npz, path, path.read_bytes(), whole) > 100


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_spoilt_nifti(place, suffix):
  content = nifti_bytes(ITEMS.astype(np.int16))

  def as_said(found, spoilt):
    """As many as the header says, and they end where the file does."""
    (order,) = (
      o for o in "<>" if struct.unpack_from(f"{o}i", spoilt)[0] == 348
    )
    rank, *dims = struct.unpack_from(f"{order}8h", spoilt, 40)
    bits = struct.unpack_from(f"{order}h", spoilt, 72)[0]
    begin = struct.unpack_from(f"{order}f", spoilt, 108)[0]
    size = math.prod(dims[:rank]) * bits // 8
    return found.data.shape == tuple(dims[:rank]) and begin + size == len(
      spoilt
    )

  path = place / f"x.nii{suffix}"
  if not suffix:
    assert 50 <= survive(read_nifti, path, content, as_said) < 150
    return
  whole = lambda found, _: equal(found.data, ITEMS.astype(np.int16))
  packed = gzip.compress(content, mtime=0)
  assert survive(read_nifti, path, packed, whole) > 120


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_spoilt_archives(place, name):
  members = {"a/1": ITEMS.tobytes(), "a/2": b"", "b/c/3": b"three" * 40}
  pack = zipped if name == "x.zip" else tarred

  def read(path):
    unpack(path)
    files = [p for p in (place / "out").rglob("*") if p.is_file()]
    found = {
      p.relative_to(place / "out").as_posix(): p.read_bytes() for p in files
    }
    for file in sorted((place / "out").rglob("*"), reverse=True):
      file.rmdir() if file.is_dir() else file.unlink()
    (place / "out").rmdir()
    return found

  content = pack(place / name, *members.items()).read_bytes()
  whole = lambda found, _: found == members
  assert survive(read, place / name, content, whole, count=120) > 70


def test_spoilt_array_record(place):
  """Of a data set that someone else prepared: no sizes were noted."""
  pytest.importorskip("array_record")
  from isthmus.data.tfds import Tfds
  from tests.data.squares import Squares

  data = Tfds(Squares, data_dir=place / "sets")
  data.open("train")
  folder = place / "sets" / "squares" / "1.0.0"
  (folder / "isthmus_sizes.json").unlink()
  (path,) = folder.glob("*train*array_record*")

  def read(_):
    try:
      source = data.open("train")
      return source.__getitems__(list(range(len(source))))
    except (ValueError, RuntimeError) as error:
      # A block's damage is found when it is read: the folder is named.
      assert str(folder) in str(error) and "delete" in str(error)
      raise type(error)(f"{error} {path.name}") from error

  def whole(found, _):
    labels = sorted(int(example["label"]) for example in found)
    return labels == list(range(20)) and all(
      (e["image"] == e["label"]).all() for e in found
    )

  content = path.read_bytes()
  used = content.rstrip(b"\0")
  # Most of the 128 KiB are padding, where a flip changes nothing.
  assert survive(read, path, content, whole, count=60) > 15
  for at in range(0, len(used), len(used) // 40):
    if used[at]:
      copy = bytearray(content)
      copy[at] ^= 1
      path.write_bytes(copy)
      with quick():
        try:
          assert whole(read(path), None)
        except RuntimeError as error:
          assert "\n" not in str(error)


def test_spoilt_videos(place, tmp_path_factory, monkeypatch):
  """Without a checksum a flip may go unseen; a file cut short may not."""
  pytest.importorskip("av")
  from isthmus.data.video import VideoClips
  from tests.data.test_video import film

  # What can be read is kept, elsewhere.
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("cache")))

  def read(path):
    clips = VideoClips(path, frames=4, size=8, eval_fraction=0.0)
    return len(clips.open("train").videos[0])

  path = film(place / "x.mp4", count=12)
  content = path.read_bytes()
  right = lambda n, copy: n == 12 or len(copy) == len(content)
  assert survive(read, path, content, right, count=60) > 20
