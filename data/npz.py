"""Arrays of .npz files, read without pickle and never beyond what is there."""

import contextlib
import dataclasses
import io
import math
import os
import zipfile
import zlib
from typing import Any

import numpy as np

from isthmus.data.archive import check_name
from isthmus.data.bounded import DEFLATE, read_last
from isthmus.data.permutation import permute
from isthmus.data.source import ArraySource, check_split
from isthmus.data.text import check_fraction
from isthmus.data.zipped import open_zip

_SLACK = 64


@dataclasses.dataclass(frozen=True)
class Npz:
  """The arrays of a .npz file; an example is a row of each.

  The fields are the arrays' names. All are read into memory when the data
  set is opened.

  Args:
    path: the file, as numpy.savez or savez_compressed writes it.
    eval_fraction: share of the rows that is held out, drawn once and for all.
    eval_path: a file with the same fields that holds the eval split instead;
      eval_fraction is then not used.
    max_bytes: the most that the arrays of a file may take.

  Raises:
    ValueError: eval_fraction outside [0, 1]; when opened, a file that
      `read_npz` refuses, arrays that differ in length, an empty split, or an
      eval file with other fields.
    FileNotFoundError: when opened, no such file.

  Example:
    >>> np.savez("x.npz", x=np.zeros((10, 3)), y=np.arange(10))
    >>> data = Npz("x.npz", eval_fraction=0.2)
    >>> len(data.open("train")), len(data.open("eval"))
    (8, 2)
  """

  path: str | os.PathLike
  _: dataclasses.KW_ONLY
  eval_fraction: float = 0.1
  eval_path: str | os.PathLike | None = None
  max_bytes: int = 2**32

  def __post_init__(self):
    check_fraction(self.eval_fraction)

  def open(self, split: str) -> ArraySource:
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    separate = self.eval_path is not None
    path = self.eval_path if separate and split == "eval" else self.path
    assert path is not None
    arrays = read_npz(path, max_bytes=self.max_bytes)
    if separate and split == "eval":
      self._check_fields(arrays)
    try:
      source = ArraySource(arrays)
    except ValueError as error:
      raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    rows, count = len(source), round(self.eval_fraction * len(source))
    if separate:
      chosen = np.arange(rows)
    else:
      order = permute(np.arange(rows), rows, 0) if rows else np.arange(0)
      chosen = np.sort(order[:count] if split == "eval" else order[count:])
    if not len(chosen):
      raise ValueError(
        f"split {split!r} has 0 of the {rows} rows of {os.fspath(path)!r}; set"
        f" eval_path, or another eval_fraction than {self.eval_fraction}"
      )
    return source if separate else ArraySource(source.take(chosen))

  def _check_fields(self, arrays: dict[str, np.ndarray]) -> None:
    train = read_headers(self.path, max_bytes=self.max_bytes)
    for name in sorted({*train, *arrays}):
      kinds = [
        (found[name].dtype.str, found[name].shape[1:])
        if name in found
        else "absent"
        for found in (arrays, train)
      ]
      if kinds[0] != kinds[1]:
        raise ValueError(
          f"field {name!r} is {kinds[0]} in {os.fspath(self.eval_path or '')!r}"
          f" and {kinds[1]} in {os.fspath(self.path)!r}"
        )


@dataclasses.dataclass(frozen=True)
class Header:
  """What a .npy file says of its array.

  Attributes:
    dtype: of the items.
    shape: of the array.
    fortran: whether the first axis varies fastest.

  Example:
    >>> Header(np.dtype(np.float32), (3, 4), fortran=False).size
    48
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  fortran: bool

  @property
  def size(self) -> int:
    """Bytes of the array."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_npz(
  path: str | os.PathLike, *, max_bytes: int = 2**32
) -> dict[str, np.ndarray]:
  """The arrays of a .npz file, by name.

  Numbers, truth values and strings only: nothing is unpickled. Names, sizes
  and headers are checked against each other before memory is taken, and the
  checksums as the arrays are read.

  Args:
    path: the file.
    max_bytes: the most that its arrays may take together.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a file that is damaged, or made to look smaller than it is;
      object and structured arrays; a name twice, or one with "..".

  Example:
    >>> np.savez("x.npz", x=np.arange(3))
    >>> read_npz("x.npz")
    {'x': array([0, 1, 2])}
  """
  with _opened(path) as file:
    arrays = {}
    for name, info in _members(file, max_bytes).items():
      with _naming(name), file.open(info) as member:
        header = _header(member, info.file_size)
        arrays[name] = _array(member, header)
    return arrays


def read_headers(
  path: str | os.PathLike, *, max_bytes: int = 2**32
) -> dict[str, Header]:
  """Types and shapes of the arrays of a .npz file; see `read_npz`.

  Example:
    >>> np.savez("x.npz", x=np.zeros((3, 2)))
    >>> read_headers("x.npz")["x"].shape
    (3, 2)
  """
  with _opened(path) as file:
    headers = {}
    for name, info in _members(file, max_bytes).items():
      with _naming(name), file.open(info) as member:
        headers[name] = _header(member, info.file_size)
    return headers


@contextlib.contextmanager
def _opened(path: str | os.PathLike):
  with open(path, "rb") as raw:
    try:
      with open_zip(raw) as file:
        yield file
    # zipfile and numpy raise many kinds for damaged headers.
    except (
      *(EOFError, OSError, ValueError, KeyError, IndexError, RuntimeError),
      *(zipfile.BadZipFile, zlib.error, MemoryError, OverflowError),
    ) as error:
      cause = " ".join(str(error).split()) or type(error).__name__
      raise ValueError(
        f"{os.fspath(path)!r} is not read as .npz: {cause}"
      ) from error


@contextlib.contextmanager
def _naming(name: str):
  try:
    yield
  except ValueError as error:
    raise ValueError(f"array {ascii(name)} {error}") from error


def _members(
  file: zipfile.ZipFile, max_bytes: int
) -> dict[str, zipfile.ZipInfo]:
  members, total = {}, 0
  for info in file.infolist():
    shown = ascii(info.filename)
    name = "/".join(check_name(info.filename))
    if not name.endswith(".npy") or info.filename != name:
      raise ValueError(f"the member {shown} is not NAME.npy")
    if name in members:
      raise ValueError(f"the member {shown} is there twice")
    ratio = DEFLATE if info.compress_type == zipfile.ZIP_DEFLATED else 1
    most = info.compress_size * ratio + _SLACK
    if info.file_size > most:
      raise ValueError(
        f"the member {shown} claims {info.file_size} bytes, its"
        f" {info.compress_size} compressed ones give at most {most}"
      )
    total += info.file_size
    if total > max_bytes:
      raise ValueError(
        f"it holds at least {total} bytes, max_bytes is {max_bytes}"
      )
    members[name] = info
  if not members:
    raise ValueError("it holds no array")
  return {name.removesuffix(".npy"): info for name, info in members.items()}


def _header(member: io.BufferedIOBase, length: int) -> Header:
  """Header of a .npy file of `length` bytes, checked against it."""
  try:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
      read: Any = np.lib.format.read_array_header_1_0
    elif version == (2, 0):
      read = np.lib.format.read_array_header_2_0
    else:
      raise ValueError(f"format {version}, not (1, 0) or (2, 0)")
    shape, fortran, dtype = read(member)
  except Exception as error:  # the header is a Python literal: any may come
    cause = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"has a bad header ({cause})") from error
  if dtype.hasobject:
    raise ValueError(
      f"has dtype {dtype}, whose objects would be unpickled, which runs code;"
      " save numbers or strings"
    )
  if dtype.kind not in "biufcSU" or not dtype.itemsize:
    raise ValueError(
      f"has dtype {dtype}; save numbers, truth values or strings, and the"
      " fields of a structured array one by one"
    )
  if len(shape) > 32 or min([0, *shape]) < 0:
    raise ValueError(f"has the shape {shape}")
  header = Header(dtype, tuple(int(n) for n in shape), bool(fortran))
  begin = member.tell()
  if begin + header.size != length:
    raise ValueError(
      f"has the shape {header.shape} of {dtype}, {header.size} bytes, but"
      f" {length - begin} are there"
    )
  return header


def _array(member: io.BufferedIOBase, header: Header) -> np.ndarray:
  items = read_last(member, header.size, header.shape)
  order = "F" if header.fortran else "C"
  array = items.view(header.dtype).reshape(header.shape, order=order)
  return array.astype(header.dtype.newbyteorder("="), order="C")
