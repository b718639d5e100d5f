"""Archives: what is fine is unpacked whole, what is not leaves nothing."""

import errno
import io
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from isthmus.data.archive import check_name, extract, unpacked

FILES = {"cat/1.txt": b"meow", "cat/deep/2.txt": b"", "dog.bin": b"\0" * 5000}
FORMS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]


def pack(path, members, form):
  """members: name -> content; None is a folder."""
  if form == "zip":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
      for name, content in members:
        file.writestr(name, b"" if content is None else content)
    return path
  mode = form.removeprefix("tar").replace(".", "w:") or "w"
  with tarfile.open(path, mode) as file:
    for name, content in members:
      info = tarfile.TarInfo(name)
      if content is None:
        info.type = tarfile.DIRTYPE
      else:
        info.size = len(content)
      file.addfile(info, None if content is None else io.BytesIO(content))
  return path


def unpack(path, target, max_bytes=10**6, max_files=100):
  extract(path, target, max_bytes=max_bytes, max_files=max_files)


def tree(root):
  return {
    p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None
    for p in root.rglob("*")
  }


def refused(path, cause, **limits):
  """The archive is refused for its cause, in a line, and nothing is left."""
  before = tree(path.parent)
  with pytest.raises(ValueError, match=cause) as info:
    unpack(path, path.parent / "out", **limits)
  assert path.name in str(info.value) and "\n" not in str(info.value)
  assert tree(path.parent) == before


@pytest.mark.parametrize("form", FORMS)
def test_files_come_out_as_they_went_in(tmp_path, form):
  path = pack(tmp_path / "no_suffix", [("cat/", None), *FILES.items()], form)
  unpack(path, tmp_path / "out")
  found = tree(tmp_path / "out")
  assert {k: v for k, v in found.items() if v is not None} == FILES
  assert sorted(p.name for p in tmp_path.iterdir()) == ["no_suffix", "out"]
  with pytest.raises(FileExistsError, match="out' exists; remove it"):
    unpack(path, tmp_path / "out")


def test_names_as_tar_writes_them_of_a_folder(tmp_path):
  members = [("./", None), ("./cat/", None), ("./cat/x" + "y" * 200, b"1")]
  path = pack(tmp_path / "a.tar", members, "tar")
  unpack(path, tmp_path / "out")
  assert tree(tmp_path / "out/cat") == {"x" + "y" * 200: b"1"}


def test_many_files_of_a_tar(tmp_path):
  members = [(f"{i}.txt", str(i).encode()) for i in range(500)]
  path = pack(tmp_path / "a.tar.gz", members, "tar.gz")
  refused(path, "more than max_files of 499", max_files=499)
  unpack(path, tmp_path / "out", max_files=500)
  assert tree(tmp_path / "out") == dict(members)


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize(
  ("name", "cause"),
  {
    "../x": "leaves the folder",
    "a/../../x": "leaves the folder",
    "..": "leaves the folder",
    "/etc/x": "is absolute",
    "C:x": "is absolute",
    "c:/x": "is absolute",
    "a\\..\\x": "backslash",
    "\\\\host\\x": "backslash",
    "a\nb": "control",
    "n" * 256: "longer than 1024 bytes, or a part of it than 255",
    "ab/" * 400 + "x": "longer than 1024",
    "é" * 128: "longer than 1024",
  }.items(),
)
def test_names_that_leave_the_folder(tmp_path, form, name, cause):
  path = pack(tmp_path / "a", [("fine", b"1"), (name, b"2")], form)
  refused(path, cause)


def test_parts_of_a_name():
  assert check_name("a//b/./c") == ("a", "b", "c")
  assert check_name("./") == ()
  assert check_name("a/..b/...") == ("a", "..b", "...")
  with pytest.raises(ValueError, match=r"'a\\x00b' has a backslash or control"):
    check_name("a\0b")


@pytest.mark.parametrize("form", ["zip", "tar"])
@pytest.mark.parametrize(
  "names", [("a", "a"), ("A/x", "a/y"), ("a", "a/b"), ("a/b", "a"),
            ("\u00e9", "e\u0301"), ("stra\u00dfe", "STRASSE")]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_some_file_system_takes_for_one(tmp_path, form, names):
  path = pack(tmp_path / "x", [(name, b"1") for name in names], form)
  refused(path, "name one file")


@pytest.mark.parametrize(
  "kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"]
)
def test_links_and_devices_of_a_tar(tmp_path, kind):
  with tarfile.open(tmp_path / "a.tar", "w") as file:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = getattr(tarfile, kind), "/etc/passwd"
    file.addfile(info)
  refused(tmp_path / "a.tar", "'link' is a link, device or sparse file")


def test_links_of_a_zip(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    file.writestr(info, "/etc/passwd")
  refused(tmp_path / "a.zip", "'link' is a link or device")


@pytest.mark.parametrize("form", FORMS)
def test_bombs(tmp_path, form):
  path = pack(tmp_path / "a", [("zeros", bytes(3 * 10**6))], form)
  refused(path, "more than max_bytes of 1000000 at 'zeros'")
  unpack(path, tmp_path / "out", max_bytes=3 * 10**6)


def test_bomb_of_a_zip_whose_headers_say_less(tmp_path):
  path = pack(tmp_path / "a.zip", [("zeros", bytes(3 * 10**6))], "zip")
  content = bytearray(path.read_bytes())
  for magic, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
    begin = content.index(magic) + place
    content[begin : begin + 4] = (1000).to_bytes(4, "little")
  path.write_bytes(content)
  refused(path, "CRC")


def test_bombs_in_what_is_not_a_file(tmp_path):
  """A long name, and padding, are bounded too."""
  whole = pack(tmp_path / "a.tar", [("fine", b"1")], "tar").read_bytes()
  (tmp_path / "a.tar").write_bytes(whole + bytes(2 * 10**6))
  refused(tmp_path / "a.tar", "headers take more than 1048576 bytes")
  info = tarfile.TarInfo("././@LongLink")
  info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 * 10**6
  (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(2 * 10**6) + whole)
  refused(tmp_path / "a.tar", "headers take more than 1048576 bytes")


@pytest.mark.parametrize("form", FORMS)
def test_cut_off_archives(tmp_path, form):
  members = [(str(i), os.urandom(700)) for i in range(40)]
  whole = pack(tmp_path / "a", members, form).read_bytes()
  blocks = [512 * (i + 1) for i in range(0, 90, 7)] if form == "tar" else []
  for size in (0, 3, 7, 600, len(whole) // 2, len(whole) * 3 // 4, *blocks):
    (tmp_path / "a").write_bytes(whole[:size])
    refused(tmp_path / "a", "is not unpacked: .")


def test_damaged_header_within_a_tar_is_not_taken_for_its_end(tmp_path):
  path = pack(
    tmp_path / "a.tar", [("a", b"1"), ("b", b"2"), ("c", b"3")], "tar"
  )
  content = bytearray(path.read_bytes())
  content[1024] ^= 1  # of the second header
  path.write_bytes(content)
  refused(path, "damaged or cut off at byte 1024")
  content[1024] ^= 1
  path.write_bytes(content + bytes(20000) + b"more")
  refused(path, "more than padding follows its end")


def test_encrypted_and_otherwise_compressed_zips(tmp_path):
  path = tmp_path / "a.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
    file.writestr("x", b"1" * 100)
  refused(path, "'x' has compression 14; only stored")
  content = bytearray(pack(path, [("x", b"1")], "zip").read_bytes())
  content[content.index(b"PK\1\2") + 8] |= 1
  path.write_bytes(content)
  refused(path, "'x' is encrypted")


def test_a_full_disk_stays_a_full_disk(tmp_path, monkeypatch):
  path = pack(tmp_path / "a.zip", FILES.items(), "zip")

  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("isthmus.data.archive._Writer.add", full)
  with pytest.raises(OSError, match="No space left") as info:
    unpack(path, tmp_path / "out")
  assert info.value.errno == errno.ENOSPC
  assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache" / "archives"


def test_an_archive_is_unpacked_once(tmp_path, cache):
  path = pack(tmp_path / "a.zip", FILES.items(), "zip")
  first = unpacked(path, max_bytes=10**5, max_files=10)
  kept = first.stat().st_ino
  assert first.parent == cache
  assert unpacked(path, max_bytes=10**5, max_files=10) == first
  assert first.stat().st_ino == kept
  pack(path, {**FILES, "more": b"1"}.items(), "zip")
  second = unpacked(path, max_bytes=10**5, max_files=10)
  assert second != first and (second / "more").read_bytes() == b"1"
  left = cache / f".{second.name}.part-0123"
  left.mkdir()
  second.rename(tmp_path / "gone")
  unpacked(path, max_bytes=10**5, max_files=10)
  assert not left.exists()
  if os.getuid():  # root writes anywhere
    os.chmod(cache, 0o500)
    with pytest.raises(PermissionError, match="set ISTHMUS_CACHE"):
      unpacked(pack(path, [], "zip"), max_bytes=1, max_files=1)


KILLED = """
import os, sys, time
import isthmus.data.archive as archive
os.rename = lambda *paths: time.sleep(60)
archive.extract(sys.argv[1], sys.argv[2], max_bytes=10**6, max_files=10)
"""


@pytest.mark.process
def test_killed_unpacking_leaves_no_target(tmp_path):
  """Killed at the last moment, when all but the new name is there."""
  path = pack(tmp_path / "a.tar", [("big", bytes(10**6))], "tar")
  worker = subprocess.Popen(
    [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")]
  )
  whole, deadline = [], time.monotonic() + 60
  while not whole:
    assert time.monotonic() < deadline and worker.poll() is None
    parts = tmp_path.glob(".out.part-*/big")
    whole = [p for p in parts if p.stat().st_size == 10**6]
    time.sleep(0.01)
  worker.kill()
  worker.wait()
  assert not (tmp_path / "out").exists()
  unpack(path, tmp_path / "out")
  assert (tmp_path / "out" / "big").stat().st_size == 10**6
