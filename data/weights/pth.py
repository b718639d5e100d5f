"""PyTorch checkpoints, in the zip format and in the one before it.

The zip format is an uncompressed archive: `data.pkl` describes the tensors,
`data/0`, `data/1`, ... are their storages. The older one is a row of pickles
(a magic number, the protocol, the machine, the object, the storages' keys),
then the storages, each after its number of elements. The pickles are
interpreted by `isthmus.data.weights.pickled`, which runs nothing.

Reference: https://pytorch.org/docs/stable/notes/serialization.html
"""

import os
import pathlib
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from isthmus.data.weights.archive import Archive
from isthmus.data.weights.file import (
  Cursor,
  Tensor,
  Weights,
  WeightsError,
  count,
  map_bytes,
  quote,
)
from isthmus.data.weights.pickled import (
  Global,
  Storage,
  View,
  interpret,
)

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LONGEST_PICKLE = 1 << 25  # bytes
_LONGEST_PREFACE = 1 << 12  # bytes of each pickle before the object
_DEEPEST = 32  # containers within containers
_MOST_VALUES = 1 << 18
_MOST_REPEATS = 1 << 12  # of containers that were visited before


class PthFile(Weights):
  """A checkpoint that `torch.save` wrote.

  Nested dicts, lists and tuples are flattened: their tensors are named
  "state_dict/conv.weight" and the like, and numbers, strings and empty
  containers are `metadata` under such names. A storage's checksum is compared
  when it is first read (the older format has none).

  Args:
    path: the file.

  Raises:
    FileNotFoundError: no such file.
    WeightsError: a damaged file, a tensor that leaves its storage, or a
      pickle that names anything but tensors.

  Example:
    >>> import pickle, zipfile
    >>> with zipfile.ZipFile("run.pth", "w") as file:  # as torch.save writes
    ...   file.writestr("run/data.pkl", pickle.dumps({"epoch": 7}, protocol=2))
    >>> file = PthFile("run.pth")
    >>> file.metadata, file.names
    ({'epoch': 7}, ())
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._data = map_bytes(self.path)
    zipped = self._data[:4].tobytes() == b"PK\3\4"
    kind = _Zipped if zipped else _Pickled
    self._layout = kind(self.path, self._data)
    tree = _Tree(self.path, self._layout.value)
    self.metadata, self._views = tree.metadata, tree.views
    self._starts = self._layout.place(tree.storages)
    self.tensors = {n: self._locate(v) for n, v in self._views.items()}

  def _locate(self, view: View) -> Tensor:
    width = _dtype(view.storage).itemsize
    start = self._starts[view.storage.key] + view.offset * width
    size = 0 if 0 in view.shape else count(view.shape) * width
    return Tensor(view.shape, view.storage.dtype, start, size)

  def read(self, name: str) -> np.ndarray:
    """A tensor, a read-only view of the file.

    Args:
      name: one of `names`.

    Returns:
      `shapes[name]`, of the file's dtype and strides; bfloat16 is that of
      ml_dtypes.

    Raises:
      KeyError: no tensor of that name.
      WeightsError: its storage's checksum is wrong.
    """
    self.find(name)
    view = self._views[name]
    self._layout.check(view.storage)
    dtype = _dtype(view.storage)
    start = self._starts[view.storage.key]
    values = np.ndarray(
      view.shape,
      dtype,
      self._data[start : start + view.storage.length * dtype.itemsize],
      view.offset * dtype.itemsize,
      tuple(stride * dtype.itemsize for stride in view.strides),
    )
    # Any byte may be in the file, and numpy's truth values are 0 and 1.
    return values != 0 if view.storage.dtype == "bool" else values


class _Zipped:
  """The zip format."""

  def __init__(self, path: pathlib.Path, data: np.ndarray):
    self._path = path
    self._archive = archive = Archive(path, data)
    found = [n for n in archive.members if n.endswith("/data.pkl")]
    if len(found) != 1:
      _fail(path, f"a zip archive with {len(found)} members data.pkl, not 1")
    self._folder = folder = found[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in archive.members:
      _fail(path, "a TorchScript archive, which holds code; it is not read")
    if folder + "byteorder" in archive.members:
      order = archive.read(folder + "byteorder")[:16].tobytes()
      if order != b"little":
        _fail(path, f"its byte order is {order!r}; b'little' is read")
    start, end = archive.members[found[0]]
    if end - start > _LONGEST_PICKLE:
      _fail(
        path,
        f"{quote(found[0])} has {end - start} bytes; at most {_LONGEST_PICKLE}"
        " are read",
      )
    self.value, size = interpret(path, archive.read(found[0]).tobytes())
    if size != end - start:
      _fail(path, f"{end - start - size} bytes after the pickle's end")
    self._checked: set[str] = set()

  def place(self, storages: dict[str, Storage]) -> dict[str, int]:
    starts = {}
    for key, storage in storages.items():
      name = f"{self._folder}data/{key}"
      if name not in self._archive.members:
        _fail(self._path, f"the archive has no {quote(name)}")
      start, end = self._archive.members[name]
      size = storage.length * _dtype(storage).itemsize
      if end - start != size:
        _fail(
          self._path,
          f"{quote(name)} has {end - start} bytes; {storage.length} elements of"
          f" {storage.dtype} take {size}",
        )
      starts[key] = start
    return starts

  def check(self, storage: Storage) -> None:
    if storage.key not in self._checked:
      self._archive.read(f"{self._folder}data/{storage.key}")
      self._checked.add(storage.key)


class _Pickled:
  """The older format."""

  def __init__(self, path: pathlib.Path, data: np.ndarray):
    self._path, self._data = path, data
    self._file = file = Cursor(path, data)
    if self._pickle("the magic number", _LONGEST_PREFACE) != _MAGIC:
      file.fail("neither a zip archive nor PyTorch's pickles; is it a .pth?")
    protocol = self._pickle("the protocol", _LONGEST_PREFACE)
    if protocol != _PROTOCOL:
      file.fail(f"protocol {quote(protocol)}; {_PROTOCOL} is read")
    machine = self._pickle("the machine", _LONGEST_PREFACE)
    if type(machine) is not dict or machine.get("little_endian") is not True:
      file.fail(f"written by a machine not little-endian: {quote(machine)}")
    self.value = self._pickle("the object", _LONGEST_PICKLE)
    self._keys = self._pickle("the storages' keys", _LONGEST_PICKLE)

  def _pickle(self, what: str, most: int) -> Any:
    file = self._file
    size = min(file.left, most)
    program = self._data[file.at : file.at + size].tobytes()
    if program[:1] != b"\x80":  # without the name of a protocol of 2 or more
      file.fail(f"{what}: no pickle at byte {file.at}; is it a .pth file?")
    value, used = interpret(self._path, program)
    file.at += used
    return value

  def place(self, storages: dict[str, Storage]) -> dict[str, int]:
    file, starts, keys = self._file, {}, self._keys
    if type(keys) is not list or not all(type(k) is str for k in keys):
      file.fail(f"storages' keys that are no list of strings: {quote(keys)}")
    for key in keys:
      if key not in storages or key in starts:
        file.fail(f"the storage {quote(key)} is no tensor's, or comes twice")
      storage = storages[key]
      length = file.number("q", f"the length of the storage {quote(key)}")
      if length != storage.length:
        file.fail(
          f"the storage {quote(key)} has {length} elements; its tensors say"
          f" {storage.length}"
        )
      size = length * _dtype(storage).itemsize
      file.need(size, f"the storage {quote(key)}")
      starts[key] = file.at
      file.at += size
    if set(storages) - set(starts):
      missing = next(key for key in storages if key not in starts)
      file.fail(f"the storage {quote(missing)} is not in the file")
    if file.left:
      file.fail(f"{file.left} bytes after the last storage")
    return starts

  def check(self, storage: Storage) -> None:
    """There are no checksums."""


class _Tree:
  """Tensors and everything else of nested containers, by name."""

  def __init__(self, path: pathlib.Path, root: Any):
    self.views: dict[str, View] = {}
    self.metadata: dict[str, Any] = {}
    self.storages: dict[str, Storage] = {}
    # A container may hold another one many times, or itself.
    visits, repeats, seen = 0, 0, set()
    waiting = [("", root, 0)]
    while waiting:
      name, value, depth = waiting.pop()
      if type(value) in (dict, list, tuple) and value:
        visits += len(value)
        repeats += id(value) in seen
        seen.add(id(value))
        for what, number, most in (
          ("containers in each other", depth, _DEEPEST),
          ("values", visits, _MOST_VALUES),
          ("containers that come again", repeats, _MOST_REPEATS),
        ):
          if number > most:
            _fail(path, f"more than {most} {what}, at {quote(name)}")
        pairs = value.items() if type(value) is dict else enumerate(value)
        before = name + "/" if depth else ""
        inner = [(f"{before}{key}", v, depth + 1) for key, v in pairs]
        waiting += reversed(inner)
        continue
      if name in self.views or name in self.metadata:
        _fail(path, f"two values are named {quote(name)}")
      if type(value) is View:
        self.views[name] = value
        known = self.storages.setdefault(value.storage.key, value.storage)
        if known != value.storage:
          _fail(path, f"{quote(name)}: {value.storage} is also {known}")
      elif type(value) in (Global, Storage):
        _fail(path, f"{quote(name)} is {quote(value)}, not a tensor")
      else:
        self.metadata[name] = value


def _dtype(storage: Storage) -> np.dtype:
  """Of a storage's elements, as they lie in the file."""
  if storage.dtype == "bfloat16":
    return np.dtype(ml_dtypes.bfloat16)
  name = "uint8" if storage.dtype == "bool" else storage.dtype
  return np.dtype(name).newbyteorder("<")


def _fail(path: pathlib.Path, reason: str) -> NoReturn:
  raise WeightsError(f"{path}: {reason}")
