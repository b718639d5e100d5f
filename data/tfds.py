"""TensorFlow Datasets without TensorFlow: array_record files, random access."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.data.source import Example, check_split

_SIZES = "isthmus_sizes.json"


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A data set of tensorflow_datasets, read through its `as_data_source`.

  What is not prepared yet is downloaded and prepared as array_record, under
  a file lock, so processes that start together prepare it once. Nested
  features come flattened, "outer/inner"; Text and other strings as bytes.

  Args:
    builder: a name ("mnist", "mnist/config:3.0.1") or a builder class.
    train: the TFDS split that is the training split, e.g. "train[:90%]".
    eval: the TFDS split that is held out.
    data_dir: where data sets live; None means TFDS's folder.
    manual_dir: of files that TFDS asks to be downloaded by hand.

  Raises:
    ImportError: when opened, where tensorflow_datasets, array_record or
      importlib_resources is missing.
    ValueError: when opened, a prepared file whose size has changed, or that
      holds another number of examples than it was prepared with.
    RuntimeError: when opened or read, a damaged file.

  Example:
    >>> data = Tfds("mnist", train="train[:90%]", eval="train[90%:]")
    >>> data.builder, data.eval  # nothing is read before data.open("train")
    ('mnist', 'train[90%:]')
  """

  builder: str | type
  _: dataclasses.KW_ONLY
  train: str = "train"
  eval: str = "test"
  data_dir: str | os.PathLike | None = None
  manual_dir: str | os.PathLike | None = None

  def open(self, split: str) -> "TfdsSource":
    """The examples of a split; prepares the data set if it must."""
    check_split(split)
    builder = self._prepare()
    name = self.train if split == "train" else self.eval
    data = builder.as_data_source(split=name)
    folder = os.fspath(builder.data_dir)
    if not pathlib.Path(folder, _SIZES).exists():  # prepared by someone else
      _check_counts(builder)
    return TfdsSource(data, folder)

  def _make(self) -> Any:
    tfds = _import()
    data_dir = None if self.data_dir is None else os.fspath(self.data_dir)
    # By name, a prepared data set comes back in the format it has on disk.
    by_name = functools.partial(tfds.builder, self.builder)
    make = by_name if isinstance(self.builder, str) else self.builder
    try:
      builder = make(data_dir=data_dir)
    except Exception:
      self._check_descriptions()
      raise
    if _is_prepared(builder):
      return builder
    return make(data_dir=data_dir, file_format="array_record")

  def _check_descriptions(self) -> None:
    """Names the file, where TFDS only says that some JSON is damaged."""
    name = str(getattr(self.builder, "name", self.builder)).partition(":")[0]
    root = self.data_dir or _import().core.constants.DATA_DIR
    for path in pathlib.Path(root, name).rglob("dataset_info.json"):
      try:
        described = json.loads(path.read_text()).get("splits")
      except (AttributeError, ValueError) as error:
        raise _damaged(os.fspath(path), error) from error
      if not described:
        raise _damaged(os.fspath(path), ValueError("it describes no split"))

  def _prepare(self) -> Any:
    import filelock

    builder = self._make()
    if _is_prepared(builder):
      return _checked(builder)
    folder = pathlib.Path(builder.data_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
      builder = self._make()  # another process may have prepared it meanwhile
      if not _is_prepared(builder):
        # The lock is held: these are leftovers of processes that were killed.
        for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
          shutil.rmtree(left, ignore_errors=True)
        tfds, options = _import(), {}
        if self.manual_dir is not None:
          options["manual_dir"] = os.fspath(self.manual_dir)
        builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(**options)
        )
        _note_sizes(folder)
    return _checked(builder)


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
  """Examples of a `tfds.data_source`; see Tfds.

  Example:
    >>> class Records(list):
    ...   def __getitems__(self, indices):
    ...     return [self[i] for i in indices]
    >>> records = Records([{"size": {"x": 3, "y": 4}, "name": b"a"}])
    >>> TfdsSource(records, "folder")[0]
    {'size/x': array(3), 'size/y': array(4), 'name': b'a'}
  """

  data: Any
  folder: str

  def __len__(self) -> int:
    return len(self.data)

  def __getitem__(self, i: int) -> Example:
    return self.__getitems__([i])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    length = len(self)
    for i in indices:
      if not 0 <= i < length:
        raise IndexError(f"index {i} is outside [0, {length})")
    try:
      records = self.data.__getitems__(list(indices))
    # Damaged blocks, and all that decoders say of damaged examples.
    except Exception as error:
      raise _damaged(self.folder, error) from error
    return [_flatten(record) for record in records]


def _flatten(record: dict[str, Any], prefix: str = "") -> Example:
  flat = {}
  for name, value in record.items():
    if isinstance(value, dict):
      flat.update(_flatten(value, f"{prefix}{name}/"))
    else:
      text = isinstance(value, bytes | str)
      flat[prefix + name] = value if text else np.asarray(value)
  return flat


def _damaged(place: str, error: Exception) -> RuntimeError:
  cause = " ".join(str(error).split()) or type(error).__name__
  return RuntimeError(
    f"cannot read {place!r} ({cause}); delete that data set's folder to have"
    " it prepared again"
  )


def _is_prepared(builder: Any) -> bool:
  return pathlib.Path(builder.data_dir, "dataset_info.json").exists()


def _note_sizes(folder: pathlib.Path) -> None:
  """Sizes of the data files: array_record opens a truncated one silently."""
  sizes = {p.name: p.stat().st_size for p in folder.glob("*.array_record*")}
  part = folder / f"{_SIZES}.part"
  part.write_text(json.dumps(sizes))
  os.replace(part, folder / _SIZES)


def _check_counts(builder: Any) -> None:
  """A file cut off at a block's end opens, and holds fewer examples."""
  records = importlib.import_module("array_record.python.array_record_module")
  for split in builder.info.splits.values():
    paths = [pathlib.Path(path) for path in split.filepaths]
    for path, length in zip(paths, split.shard_lengths, strict=True):
      if ".array_record" not in path.name:
        continue
      try:
        reader = records.ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
      except Exception as error:
        raise _damaged(os.fspath(path), error) from error
      if found != length:
        raise ValueError(
          f"{os.fspath(path)!r} holds {found} examples, it was prepared with"
          f" {length}; delete {os.fspath(path.parent)!r} to have it prepared"
          " again"
        )


def _checked(builder: Any) -> Any:
  folder = pathlib.Path(builder.data_dir)
  if not (folder / _SIZES).exists():  # prepared by someone else
    return builder
  for name, size in json.loads((folder / _SIZES).read_text()).items():
    path = folder / name
    found = path.stat().st_size if path.exists() else 0
    if found != size:
      raise ValueError(
        f"{os.fspath(path)!r} holds {found} bytes, it was prepared with"
        f" {size}; delete {os.fspath(folder)!r} to have it prepared again"
      )
  return builder


def _import() -> Any:
  try:
    import array_record  # noqa: F401
    import importlib_resources  # noqa: F401
    import tensorflow_datasets
  except ImportError as error:
    raise ImportError(
      f"Tfds needs the package {error.name}: pip install 'isthmus[data]'"
    ) from error
  return tensorflow_datasets
