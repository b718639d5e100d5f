"""Archives that may be hostile, unpacked whole or not at all."""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import re
import secrets
import shutil
import stat
import tarfile
import unicodedata
from collections.abc import Generator
from errno import EINVAL
from typing import IO, Any

from isthmus.data.cache import cache_folder
from isthmus.data.zipped import open_zip

# (name, stream) of a file, (name, None) of a folder.
_Stream = io.BufferedIOBase | IO[bytes] | None
_Members = Generator[tuple[str, _Stream], None, None]

_CHUNK = 2**20
# A name in bytes, and a part of it, as file systems have them.
_MAX_NAME, _MAX_PART = 1024, 255
# Between two files of a tar: long names, extended headers.
_MAX_HEADERS = 2**20


def extract(
  archive: str | os.PathLike,
  folder: str | os.PathLike,
  *,
  max_bytes: int,
  max_files: int,
) -> None:
  """Unpacks a .zip or .tar (.gz, .bz2, .xz) into a folder that is not there.

  Files and folders only: links, devices and names that leave the folder, or
  that a file system could take for one another, refuse the whole archive.
  Bytes and files are counted as they are unpacked, whatever the headers say.
  All goes into a hidden folder beside the target, which is renamed at the
  end, so the target is whole or absent. Permissions and times are not kept.

  Args:
    archive: the file; its format is told by its content, not by its name.
    folder: the target, in a folder that exists.
    max_bytes: the most that the files may hold together.
    max_files: the most files and folders.

  Raises:
    FileExistsError: the target is there already.
    FileNotFoundError: no such archive.
    ValueError: an archive that is refused or damaged; nothing is left then.

  Example:
    >>> import pathlib, zipfile
    >>> with zipfile.ZipFile("a.zip", "w") as file:
    ...   file.writestr("cat/1.txt", "meow")
    >>> extract("a.zip", "a", max_bytes=100, max_files=10)
    >>> pathlib.Path("a", "cat", "1.txt").read_text()
    'meow'
  """
  target = pathlib.Path(folder)
  if target.exists() or target.is_symlink():
    raise FileExistsError(f"{os.fspath(folder)!r} exists; remove it first")
  with open(archive, "rb") as raw:
    part = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}"
    part.mkdir()
    try:
      writer = _Writer(part, max_bytes, max_files)
      try:
        with contextlib.closing(_members(raw)) as members:
          for name, file in members:
            writer.add(name, file)
      except ImportError:
        raise
      except Exception as error:  # decoders raise many kinds
        # A full disk, say. EINVAL is a seek to where no byte can be.
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):
          raise
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
          f"{os.fspath(archive)!r} is not unpacked: {cause}"
        ) from error
      os.rename(part, target)
    except BaseException:
      shutil.rmtree(part, ignore_errors=True)
      raise


def unpacked(
  archive: str | os.PathLike, *, max_bytes: int, max_files: int
) -> pathlib.Path:
  """The folder of an archive's files, unpacked once into the cache.

  One process unpacks under a file lock while others wait for it. The key is
  the hash of the archive, so a changed archive is unpacked anew.

  Args:
    archive: see `extract`, as are max_bytes and max_files.

  Raises:
    FileNotFoundError: no such archive.
    ValueError: an archive that is refused or damaged.
    PermissionError: the cache folder cannot be written; it names the remedy.

  Example:
    >>> import zipfile
    >>> with zipfile.ZipFile("a.zip", "w") as file:
    ...   file.writestr("1.txt", "meow")
    >>> folder = unpacked("a.zip", max_bytes=100, max_files=10)
    >>> [path.name for path in folder.iterdir()]
    ['1.txt']
  """
  import filelock

  with open(archive, "rb") as file:
    key = hashlib.file_digest(file, "blake2b").hexdigest()[:40]
  entry = cache_folder() / "archives" / key
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{entry}.lock"):
      if not entry.is_dir():
        # The lock is held: these are leftovers of processes that were killed.
        for left in entry.parent.glob(f"{_prefix(entry)}*"):
          shutil.rmtree(left, ignore_errors=True)
        extract(archive, entry, max_bytes=max_bytes, max_files=max_files)
  except PermissionError as error:
    raise PermissionError(
      f"the cache folder {cache_folder()} cannot be written ({error}); set"
      " ISTHMUS_CACHE to one that can"
    ) from error
  return entry


def check_name(name: str) -> tuple[str, ...]:
  """The parts of a member's name, none of which leaves the folder.

  Raises:
    ValueError: an absolute name, one with "..", a drive letter, a backslash
      or a control character, or one too long for a file system.

  Example:
    >>> check_name("./cat/1.png")
    ('cat', '1.png')
  """
  shown = ascii(name if len(name) < 80 else f"{name[:76]}...")
  if re.search(r"[\x00-\x1f\x7f\\]", name):
    raise ValueError(f"the name {shown} has a backslash or control character")
  if name.startswith("/") or re.match(r"[A-Za-z]:", name):
    raise ValueError(f"the name {shown} is absolute")
  parts = tuple(part for part in name.split("/") if part not in ("", "."))
  if ".." in parts:
    raise ValueError(f"the name {shown} leaves the folder")
  lengths = [len(part.encode(errors="surrogateescape")) for part in parts]
  if sum(lengths) + len(parts) > _MAX_NAME or max([0, *lengths]) > _MAX_PART:
    raise ValueError(
      f"the name {shown} is longer than {_MAX_NAME} bytes, or a part of it"
      f" than {_MAX_PART}"
    )
  return parts


@dataclasses.dataclass
class _Writer:
  """Writes members below a folder, and counts."""

  root: pathlib.Path
  max_bytes: int
  max_files: int

  def __post_init__(self):
    self.size = 0
    # As a file system that folds case or accents sees it -> (spelt, is file).
    self.seen: dict[tuple[str, ...], tuple[tuple[str, ...], bool]] = {}

  def add(self, name: str, file: _Stream) -> None:
    """A file, or where there is none a folder."""
    parts = check_name(name)
    if not parts:
      if file is None:
        return
      raise ValueError(f"a file has the name {ascii(name)}")
    for depth in range(1, len(parts)):
      self._note(parts[:depth], is_file=False)
    self._note(parts, is_file=file is not None)
    path = self.root.joinpath(*parts)
    if file is None:
      path.mkdir(parents=True, exist_ok=True)
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as out:
      while chunk := file.read(_CHUNK):
        self.size += len(chunk)
        if self.size > self.max_bytes:
          raise ValueError(
            f"it holds more than max_bytes of {self.max_bytes} at {ascii(name)}"
          )
        out.write(chunk)

  def _note(self, parts: tuple[str, ...], *, is_file: bool) -> None:
    key = tuple(unicodedata.normalize("NFC", p).casefold() for p in parts)
    if key not in self.seen:
      if len(self.seen) >= self.max_files:
        raise ValueError(
          f"it holds more than max_files of {self.max_files} files and folders"
        )
      self.seen[key] = (parts, is_file)
      return
    spelt, was_file = self.seen[key]
    if is_file or was_file or spelt != parts:
      raise ValueError(
        f"the names {ascii('/'.join(spelt))} and {ascii('/'.join(parts))}"
        " name one file"
      )


def _members(raw: io.BufferedIOBase) -> _Members:
  begin = raw.read(6)
  raw.seek(0)
  if begin.startswith((b"PK\3\4", b"PK\5\6")):
    return _zip_members(raw)
  return _tar_members(_unpack(raw, begin))


def _unpack(raw: Any, begin: bytes) -> Any:
  # Pythons are built without these now and then.
  if begin.startswith(b"\x1f\x8b"):
    import gzip

    return gzip.GzipFile(fileobj=raw)
  if begin.startswith(b"BZh"):
    import bz2

    return bz2.BZ2File(raw)
  if begin == b"\xfd7zXZ\0":
    import lzma

    return lzma.LZMAFile(raw)
  return raw


def _zip_members(raw: io.BufferedIOBase) -> _Members:
  with open_zip(raw) as archive:
    for info in archive.infolist():
      shown, kind = ascii(info.filename), stat.S_IFMT(info.external_attr >> 16)
      if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{shown} is a link or device, not a file")
      if info.is_dir():
        if info.file_size:
          raise ValueError(f"the folder {shown} has {info.file_size} bytes")
        yield info.filename, None
        continue
      if kind == stat.S_IFDIR:
        raise ValueError(f"{shown} is a folder by its mode, not by its name")
      with archive.open(info) as file:
        yield info.filename, file


def _tar_members(raw: io.BufferedIOBase) -> _Members:
  reader = _Counted(raw)
  # As a stream: nothing is read twice, and what was read is counted.
  with tarfile.open(fileobj=reader, mode="r|") as archive:  # ty: ignore
    while (info := archive.next()) is not None:
      if not (info.isreg() or info.isdir()) or info.issparse():
        raise ValueError(
          f"{ascii(info.name)} is a link, device or sparse file, not a file"
        )
      file = None if info.isdir() else archive.extractfile(info)
      reader.left = None
      yield info.name, file
      reader.left = _MAX_HEADERS
      archive.members.clear()  # tarfile keeps them all otherwise
    # tarfile takes a damaged header for the end; the end is zeros.
    rest = reader.since(archive.offset)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
      raise ValueError(f"it is damaged or cut off at byte {archive.offset}")
  while chunk := reader.read(_CHUNK):
    if chunk.strip(b"\0"):
      raise ValueError("more than padding follows its end")


class _Counted:
  """A stream that knows its position, and lets no more than `left` be read."""

  def __init__(self, raw: io.BufferedIOBase):
    self.raw = raw
    self.left: int | None = _MAX_HEADERS
    self.position, self.recent = 0, (b"", b"")

  def read(self, count: int) -> bytes:
    data = self.raw.read(count)
    self.position += len(data)
    self.recent = (self.recent[1], data)
    if self.left is not None:
      self.left -= len(data)
      if self.left < 0:
        raise ValueError(f"its headers take more than {_MAX_HEADERS} bytes")
    return data

  def since(self, begin: int) -> bytes:
    """What was read from a position on, which lies in the last two reads."""
    recent = b"".join(self.recent)
    return recent[max(0, len(recent) - (self.position - begin)) :]


def _prefix(target: pathlib.Path) -> str:
  return f".{target.name}.part-"
