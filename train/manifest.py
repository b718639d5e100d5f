"""MANIFEST.json: what a finished checkpoint holds, file by file.

A flipped bit in a data file restores silently, so every file's SHA-256 is
written down once and compared on each restore.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable
from importlib import metadata
from typing import Any

NAME = "MANIFEST.json"
FORMAT = 1
# What JSON that isn't one raises.
_NO_MANIFEST = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
PACKAGES = ("isthmus", "jax", "orbax-checkpoint", "tensorstore", "numpy")


class DamageError(ValueError):
  """A checkpoint that isn't what was written: the file, and what is wrong."""


def write(
  path: pathlib.Path, *, step: int, leaves: list[dict[str, Any]], extra: Any
) -> None:
  """Hashes the files below `path` onto the disk, then writes the manifest.

  Files and folders are flushed before the manifest is, so a manifest that is
  there speaks of files that are there.

  Args:
    path: the checkpoint's folder.
    step: its step.
    leaves: name, shape and dtype of each array.
    extra: JSON values kept beside the arrays.

  Example:
    >>> path = pathlib.Path("7")
    >>> path.mkdir()
    >>> _ = (path / "data").write_bytes(b"abc")
    >>> write(path, step=7, leaves=[], extra={"note": "first"})
    >>> read(path, step=7)["files"]["data"]["size"]
    3
  """
  files = {}
  for name in _names(path):
    with (path / name).open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      files[name] = {"size": file.tell(), "sha256": digest}
      os.fsync(file.fileno())
  for folder, _, _ in os.walk(path, topdown=False):
    sync(pathlib.Path(folder))
  body = {
    "format": FORMAT,
    "step": step,
    "versions": {name: _version(name) for name in PACKAGES},
    "extra": extra,
    "leaves": leaves,
    "files": files,
  }
  write_text(
    path / NAME, json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n"
  )


def read(path: pathlib.Path, *, step: int) -> dict[str, Any]:
  """The manifest of the checkpoint at `path`, checked against itself.

  Raises:
    DamageError: it is missing, is no manifest, or was changed.

  Example:
    >>> path = pathlib.Path("7")
    >>> path.mkdir()
    >>> read(path, step=7)
    Traceback (most recent call last):
    isthmus.train.manifest.DamageError: the folder is empty
    >>> write(path, step=7, leaves=[], extra={"note": "first"})
    >>> read(path, step=7)["extra"]
    {'note': 'first'}
  """
  try:
    text = (path / NAME).read_bytes()
  except FileNotFoundError:
    if path.is_dir() and not any(path.iterdir()):
      raise DamageError("the folder is empty") from None
    raise DamageError(f"{NAME}: missing, the save was not finished") from None
  except OSError as error:
    raise DamageError(f"{NAME}: {error.strerror or error}") from None
  try:
    body = json.loads(text)
    digest = body.pop("sha256")
    known = body["format"]
  except _NO_MANIFEST as error:
    raise DamageError(f"{NAME}: not a manifest ({error})") from None
  if _digest(body) != digest:
    raise DamageError(f"{NAME}: changed after it was written")
  if known != FORMAT:
    raise DamageError(f"{NAME}: format {known}, this version reads {FORMAT}")
  if body["step"] != step:
    raise DamageError(f"{NAME}: of step {body['step']}, in folder {step}")
  try:
    _check_names(body)
    _check_sizes(body)
  except _NO_MANIFEST as error:
    raise DamageError(f"{NAME}: not a manifest ({error})") from None
  return body


def verify(path: pathlib.Path, *, step: int) -> dict[str, Any]:
  """Reads the manifest and compares every file with it.

  Returns:
    The manifest.

  Raises:
    DamageError: names the first file that is missing or was changed.

  Example:
    >>> path = pathlib.Path("7")
    >>> path.mkdir()
    >>> _ = (path / "data").write_bytes(b"abc")
    >>> write(path, step=7, leaves=[], extra=None)
    >>> _ = (path / "data").write_bytes(b"abd")  # the size is the same
    >>> verify(path, step=7)
    Traceback (most recent call last):
    isthmus.train.manifest.DamageError: data: its SHA-256 changed, ...
  """
  body = read(path, step=step)
  files = sorted(body["files"].items())
  for name, entry in files:  # sizes first: they cost nothing
    try:
      size = (path / name).stat().st_size
    except FileNotFoundError:
      raise DamageError(f"{name}: missing") from None
    except OSError as error:
      raise DamageError(f"{name}: {error.strerror or error}") from None
    if size != entry["size"]:
      raise DamageError(f"{name}: {size} bytes, {entry['size']} were written")
  for found in path.rglob("*"):
    if found.is_symlink():  # to a file that isn't the checkpoint's
      name = found.relative_to(path).as_posix()
      raise DamageError(f"{name}: a link, which a save doesn't make")
  for name, entry, digest in zip(
    [name for name, _ in files],
    [entry for _, entry in files],
    _digests(path / name for name, _ in files),
    strict=True,
  ):
    if digest != entry["sha256"]:
      raise DamageError(f"{name}: its SHA-256 changed, the data is damaged")
  return body


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file at once: a reader sees the old one or the new one.

  Example:
    >>> write_text(pathlib.Path("note.txt"), "whole, or not at all")
    >>> pathlib.Path("note.txt").read_text()
    'whole, or not at all'
  """
  part = path.with_name(path.name + ".part")
  try:
    with part.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except OSError:
    with contextlib.suppress(OSError):  # of a full disk: give the room back
      part.unlink(missing_ok=True)
    raise
  sync(path.parent)


def sync(folder: pathlib.Path) -> None:
  """Flushes a folder's entries to disk, where the system can do that.

  Example:
    >>> _ = pathlib.Path("data").write_bytes(b"abc")
    >>> sync(pathlib.Path())  # a power cut no longer loses the file's name
    >>> pathlib.Path("data").read_bytes()
    b'abc'
  """
  try:
    handle = os.open(folder, os.O_RDONLY)
  except OSError:
    return
  try:
    os.fsync(handle)
  except OSError:
    pass
  finally:
    os.close(handle)


def _check_names(body: dict[str, Any]) -> None:
  """No name leads out of the folder; raises what is no manifest's."""
  parts = [part for entry in body["leaves"] for part in entry["path"]]
  for name in [*body["files"], *parts]:
    if not name or name[0] == "/" or {"..", "."} & set(name.split("/")):
      raise ValueError(f"the name {name!r}")


def _check_sizes(body: dict[str, Any]) -> None:
  """Arrays are stored as they are: small files don't hold large ones."""
  stored = sum(entry["size"] for entry in body["files"].values())
  held = 0
  for entry in body["leaves"]:
    if type(entry["dtype"]) is not str or any(n < 0 for n in entry["shape"]):
      raise ValueError(f"an array {entry['dtype']}{entry['shape']}")
    held += math.prod(entry["shape"])
  if held > 4 * stored + 2**20:
    raise ValueError(f"{held} elements of arrays in {stored} bytes of files")


def _names(path: pathlib.Path) -> list[str]:
  found = (p for p in path.rglob("*") if p.is_file())
  names = (p.relative_to(path).as_posix() for p in found)
  return sorted(n for n in names if n not in (NAME, NAME + ".part"))


def _digests(paths: Iterable[pathlib.Path]) -> list[str]:
  # hashlib lets go of the interpreter's lock: threads hash files at once.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as x:
    return list(x.map(_file_digest, paths))


def _file_digest(path: pathlib.Path) -> str:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise DamageError(f"{path.name}: {error.strerror or error}") from None


def _digest(body: dict[str, Any]) -> str:
  text = json.dumps(body, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None
