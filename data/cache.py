"""Token streams on disk: built once, memory-mapped by every process."""

import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Stream(NamedTuple):
  """Documents in a row, each preceded by a start token.

  Attributes:
    tokens: [n] unsigned.
    sizes: [n] bytes that each token stands for; None means one byte a token
      and none for a start token.

  Example:
    >>> Stream(np.array([256, *b"to be"], np.uint16), None).tokens.tolist()
    [256, 116, 111, 32, 98, 101]
  """

  tokens: np.ndarray
  sizes: np.ndarray | None


#: Pieces of a stream, in order: a document at a time.
Pieces = Callable[[], Iterator[Stream]]


def cache_folder() -> pathlib.Path:
  """$ISTHMUS_CACHE, or the platform's folder for caches.

  Example:
    >>> os.environ["ISTHMUS_CACHE"] = "/scratch/isthmus"
    >>> print(cache_folder())
    /scratch/isthmus
  """
  if chosen := os.environ.get("ISTHMUS_CACHE"):
    return pathlib.Path(chosen).expanduser()
  if sys.platform == "darwin":
    return pathlib.Path.home() / "Library" / "Caches" / "isthmus"
  if sys.platform == "win32":
    local = os.environ.get("LOCALAPPDATA")
    root = pathlib.Path(local) if local else pathlib.Path.home() / ".cache"
    return root / "isthmus"
  shared = os.environ.get("XDG_CACHE_HOME")
  root = pathlib.Path(shared) if shared else pathlib.Path.home() / ".cache"
  return root / "isthmus"


def collect(pieces: Pieces) -> Stream:
  """The stream in memory.

  Example:
    >>> def pieces():
    ...   yield Stream(np.array([256, 104], np.uint16), None)
    ...   yield Stream(np.array([256, 105], np.uint16), None)
    >>> collect(pieces).tokens.tolist()
    [256, 104, 256, 105]
  """
  parts = list(pieces())
  if not parts:
    return Stream(np.zeros(0, np.uint16), None)
  tokens = np.concatenate([part.tokens for part in parts])
  if parts[0].sizes is None:
    return Stream(tokens, None)
  return Stream(tokens, np.concatenate([part.sizes for part in parts]))


def open_cached(
  key: str, pieces: Pieces, *, folder: str | os.PathLike | None = None
) -> Stream:
  """Memory-maps the stream of a key, building it where it is not whole.

  One process builds under a file lock while others wait for it. The entry
  appears by a rename, so a killed build leaves none; an entry whose files
  don't have the digests noted at the end of its build is built anew.

  Args:
    key: hash of everything that the stream depends on.
    pieces: gives the stream piece by piece when called.
    folder: where the cache lives; None means cache_folder().

  Raises:
    OSError: the folder cannot be written; it names the remedy.

  Example:
    >>> def pieces():
    ...   print("building")
    ...   yield Stream(np.array([256, 104, 105], np.uint16), None)
    >>> open_cached("key", pieces, folder="cache").tokens.tolist()
    building
    [256, 104, 105]
    >>> open_cached("key", pieces, folder="cache").tokens.tolist()
    [256, 104, 105]
  """
  import filelock

  folder = cache_folder() if folder is None else pathlib.Path(folder)
  entry = folder / "text" / key
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{entry}.lock"):
      stream = _open_entry(entry)
      if stream is None:
        _remove(entry)
        _build(entry, pieces)
        stream = _open_entry(entry)
  except PermissionError as error:
    raise PermissionError(
      f"the cache folder {folder} cannot be written ({error}); set"
      " ISTHMUS_CACHE to one that can"
    ) from error
  if stream is None:
    raise OSError(f"the cache entry {entry} is damaged right after its build")
  return stream


def _open_entry(entry: pathlib.Path) -> Stream | None:
  """The stream of an entry, None unless it is there and whole."""
  try:
    digests = json.loads((entry / "digests.json").read_text())
    for name, digest in digests.items():
      if _digest(entry / name) != digest:
        return None
    arrays = {
      name: np.load(entry / name, mmap_mode="r", allow_pickle=False)
      for name in digests
    }
    return Stream(arrays["tokens.npy"], arrays.get("sizes.npy"))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (ValueError, KeyError, TypeError, AttributeError):
    return None  # not ours


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "blake2b").hexdigest()


def _remove(entry: pathlib.Path) -> None:
  if entry.is_dir() and not entry.is_symlink():
    shutil.rmtree(entry)
  else:
    entry.unlink(missing_ok=True)


def _build(entry: pathlib.Path, pieces: Pieces) -> None:
  # The lock is held, so leftovers of killed builds of this key are no one's.
  for left in entry.parent.glob(f"{entry.name}.part-*"):
    shutil.rmtree(left, ignore_errors=True)
  part = tempfile.mkdtemp(prefix=f"{entry.name}.part-", dir=entry.parent)
  folder = pathlib.Path(part)
  try:
    writers: dict[str, _Writer] = {}
    try:
      for piece in pieces():
        for name, array in piece._asdict().items():
          if array is None:
            continue
          if name not in writers:
            writers[name] = _Writer(folder / f"{name}.npy", array.dtype)
          writers[name].append(array)
    finally:
      for writer in writers.values():
        writer.close()
    names = [f"{name}.npy" for name in writers]
    digests = {name: _digest(folder / name) for name in names}
    (folder / "digests.json").write_text(json.dumps(digests))
    os.rename(folder, entry)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


class _Writer:
  """A one-dimensional .npy file that grows."""

  def __init__(self, path: pathlib.Path, dtype: np.dtype):
    self.file, self.dtype, self.count = open(path, "wb"), dtype, 0
    self._write_header()
    self.begin = self.file.tell()

  def _write_header(self):
    header = {
      "descr": np.lib.format.dtype_to_descr(self.dtype),
      "fortran_order": False,
      "shape": (self.count,),
    }
    np.lib.format.write_array_header_1_0(self.file, header)

  def append(self, array: np.ndarray):
    array.astype(self.dtype, copy=False).tofile(self.file)
    self.count += len(array)

  def close(self):
    # numpy pads the header so that a growing first axis never moves the data.
    self.file.seek(0)
    self._write_header()
    assert self.file.tell() == self.begin
    self.file.close()
