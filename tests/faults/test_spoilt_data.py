"""Spoilt data: a flipped bit, lost bytes, a file cut off.

Fault: of 60 to 150 copies of a small file each, by turns one bit flipped, the
end cut off, or up to eight bytes overwritten.
Promised: refused in a second, in one line that names the file, with nothing
written; or read rightly, which without a checksum means: as the header says,
to the last byte of the file.
"""

import gzip
import math
import struct

import numpy as np
import pytest

from isthmus.data.idx import read_idx
from isthmus.data.npz import read_npz
from tests.faults.hostile import (
  ITEMS,
  brats_case,
  idx,
  nifti_bytes,
  quick,
  read_brats,
  read_nifti,
  snapshot,
  tarred,
  unpack,
  working_folder,
  zipped,
)

_place = pytest.fixture(autouse=True, name="place")(working_folder)


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


def test_spoilt_brats(place):
  """One of a case's five files, by its checksum."""
  t1 = brats_case(place)
  for path in (t1, t1.with_name("case-seg.nii.gz")):
    first = read_brats(path)
    whole = lambda found, _, first=first: all(
      map(np.array_equal, found.values(), first.values())
    )
    content = path.read_bytes()
    assert survive(read_brats, path, content, whole, count=60) > 45


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
