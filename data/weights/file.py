"""What the readers of weight files share: bounds, errors, named tensors."""

import abc
import dataclasses
import math
import os
import pathlib
import reprlib
import stat
import struct
from typing import Any, NoReturn

import numpy as np

# A file's own words in an error; a container may hold itself many times over.
_QUOTE = reprlib.Repr()
_QUOTE.maxlevel = 2
_QUOTE.maxstring = _QUOTE.maxother = 80  # characters


class WeightsError(ValueError):
  """A weight file that is damaged, hostile or of a kind that is not read."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies in its file.

  Attributes:
    shape: elements along each axis, the last one contiguous.
    dtype: the format's own name of the element type.
    start: first byte in the file.
    size: bytes.

  Example:
    >>> tensor = Tensor((2, 3), "F32", start=64, size=24)
    >>> tensor.start + tensor.size  # where the next one may lie
    88
  """

  shape: tuple[int, ...]
  dtype: str
  start: int
  size: int


class Weights(abc.ABC):
  """Named tensors of a file, read one at a time.

  Attributes:
    path: the file or folder.
    metadata: what the file says beside its tensors.
    tensors: where each tensor lies, by name, in the file's order.

  Example:
    >>> from safetensors.numpy import save_file
    >>> from isthmus.data.weights.safetensors import SafetensorsFile
    >>> save_file({"w": np.ones((2, 3), np.float32)}, "w.safetensors")
    >>> weights = SafetensorsFile("w.safetensors")
    >>> weights.names, weights.shapes, weights.read("w").shape
    (('w',), {'w': (2, 3)}, (2, 3))
  """

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the tensors, in the file's order."""
    return tuple(self.tensors)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {name: tensor.shape for name, tensor in self.tensors.items()}

  @property
  def dtypes(self) -> dict[str, str]:
    """The format's own name of each tensor's element type."""
    return {name: tensor.dtype for name, tensor in self.tensors.items()}

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """The tensor of that name; KeyError without one."""

  def find(self, name: str) -> Tensor:
    """Where a tensor lies.

    Raises:
      KeyError: no tensor of that name; says how many there are.
    """
    try:
      return self.tensors[name]
    except KeyError:
      raise KeyError(
        f"{self.path} has no tensor {name!r} among its {len(self.tensors)}"
      ) from None


def map_bytes(path: pathlib.Path) -> np.ndarray:
  """A file's bytes, read-only, mapped into memory and not read yet.

  Args:
    path: the file.

  Returns:
    uint8 [size].

  Raises:
    FileNotFoundError: there is none.
    WeightsError: what is there is a folder, a pipe or a device.

  Example:
    >>> _ = pathlib.Path("data").write_bytes(b"abc")
    >>> map_bytes(pathlib.Path("data")).tolist()
    [97, 98, 99]
  """
  if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait
    raise WeightsError(f"{path}: not a regular file")
  if not path.stat().st_size:
    raise WeightsError(f"{path}: the file is empty (0 bytes)")
  # Without np.asarray each slice would be a memmap, which is slow to make.
  return np.asarray(np.memmap(path, np.uint8, mode="r"))


class Cursor:
  """Reads a file's bytes from front to back, never beyond the end.

  Args:
    path: named in errors.
    data: uint8 [size].
    at: the byte to start at.

  Example:
    >>> data = np.array([2, 0, *b"ab"], np.uint8)
    >>> file = Cursor(pathlib.Path("f"), data)
    >>> file.number("H", "a length"), file.take(2, "a name"), file.left
    (2, b'ab', 0)
    >>> file.need(1, "a tensor")
    Traceback (most recent call last):
    isthmus.data.weights.file.WeightsError: f: a tensor takes 1 bytes at ...
  """

  def __init__(self, path: pathlib.Path, data: np.ndarray, at: int = 0):
    self.path = path
    self.at = at
    self._data = memoryview(data)

  @property
  def left(self) -> int:
    """Bytes from here to the end."""
    return len(self._data) - self.at

  def need(self, size: int, what: str) -> None:
    """Raises WeightsError unless `size` bytes are left for `what`."""
    if size > self.left:
      self.fail(
        f"{what} takes {size} bytes at byte {self.at}, where {self.left} are"
        " left"
      )

  def number(self, code: str, what: str) -> Any:
    """The next number, little-endian, of a type code of `struct`."""
    code = "<" + code
    size = struct.calcsize(code)
    self.need(size, what)
    (value,) = struct.unpack_from(code, self._data, self.at)
    self.at += size
    return value

  def take(self, size: int, what: str) -> bytes:
    """The next `size` bytes."""
    self.need(size, what)
    self.at += size
    return bytes(self._data[self.at - size : self.at])

  def fail(self, reason: str) -> NoReturn:
    """Raises WeightsError, which names the file."""
    raise WeightsError(f"{self.path}: {reason}")


def quote(text: Any) -> str:
  """A file's own words as an error may hold them: one line, not long.

  Example:
    >>> quote("name"), len(quote("x" * 1000))
    ("'name'", 80)
  """
  return _QUOTE.repr(text)


def count(shape: tuple[int, ...]) -> int:
  """Elements of a shape, axes of length 0 taken as 1.

  So an empty tensor can't claim an axis that no array could have.

  Example:
    >>> count((2, 3)), count((0, 1000))
    (6, 1000)
  """
  return math.prod(max(n, 1) for n in shape)


def inside(
  folder: pathlib.Path, name: str, *, follow_links: bool = False
) -> pathlib.Path:
  """The file of that name in a folder, and in no other place.

  Args:
    folder: the folder.
    name: a plain file name.
    follow_links: let a link lead out of the folder, as in the cache of a
      model hub, where every file is a link.

  Raises:
    WeightsError: the name leads elsewhere, by itself or through a link.

  Example:
    >>> inside(pathlib.Path("model"), "../secret")
    Traceback (most recent call last):
    isthmus.data.weights.file.WeightsError: model: '../secret' is not a ...
  """
  plain = name not in ("", ".", "..") and not set(name) & set("/\\\0:")
  if not plain:
    raise WeightsError(f"{folder}: {quote(name)} is not a plain file name")
  path = folder / name
  if not follow_links:
    home = os.path.realpath(folder)
    real = os.path.realpath(path)
    if os.path.dirname(real) != home:
      raise WeightsError(
        f"{path}: a link to {real}, outside the folder; follow_links=True"
        " reads it"
      )
  return path
