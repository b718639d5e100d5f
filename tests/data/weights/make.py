"""Weight files, well formed and otherwise, written without our readers."""

import collections
import dataclasses
import io
import json
import pickle
import struct
import sys
import types
import zipfile

import numpy as np


def label(value):
  """Names a case by its words; a file's bytes may hold the time."""
  return value if isinstance(value, str) else type(value).__name__


# ---- GGUF


def text(value):
  """A GGUF string."""
  value = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(value)) + value


def entry(key, kind, payload):
  """A GGUF metadata entry of a type by number."""
  return text(key) + struct.pack("<I", kind) + payload


def array(kind, length, payload=b"", key="k"):
  """A GGUF metadata entry that claims an array of `length` elements."""
  return entry(key, 9, struct.pack("<IQ", kind, length) + payload)


def tensor_entry(name, dims, kind=0, offset=0):
  """An entry of GGUF's table; dims are in the file's order."""
  head = text(name) + struct.pack("<I", len(dims))
  return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def gguf(entries=(), tensors=(), data=b"", *, counts=None, version=3):
  """A GGUF file; `counts` lies about (tensors, entries)."""
  counts = counts or (len(tensors), len(entries))
  head = b"GGUF" + struct.pack("<IQQ", version, *counts)
  head += b"".join(entries) + b"".join(tensors)
  return head + b"\0" * (-len(head) % 32) + data


def write_gguf(path, arrays, metadata=None, architecture="llama"):
  """By the package gguf: float32, or quantised as (array, type)."""
  import gguf as package

  writer = package.GGUFWriter(path, architecture)
  for key, value in (metadata or {}).items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_array(key, value)
  for name, array in arrays.items():
    if isinstance(array, tuple):
      array, kind = array
      array = package.quants.quantize(array, kind)
      writer.add_tensor(name, array, raw_dtype=kind)
    else:
      writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


# ---- safetensors


def safetensors(header, data=b"", *, length=None):
  """A safetensors file; `length` lies about the header's."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  length = len(header) if length is None else length
  return struct.pack("<Q", length) + header + data


def slot(shape, start, end, dtype="F32"):
  """A tensor in a safetensors header."""
  return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ---- PyTorch


@dataclasses.dataclass
class Saved:
  """What the pickler writes for a tensor; its fields may lie."""

  array: np.ndarray
  key: str = "0"
  offset: int = 0
  shape: tuple | None = None
  strides: tuple | None = None
  length: int | None = None
  storage: str = "FloatStorage"
  extra: tuple = ()

  def arguments(self):
    shape = self.array.shape if self.shape is None else self.shape
    steps = tuple(s // self.array.itemsize for s in self.array.strides)
    strides = steps if self.strides is None else self.strides
    hooks = collections.OrderedDict()
    return (self, self.offset, shape, strides, False, hooks, *self.extra)


class _Storage:
  def __init__(self, saved):
    self.saved = saved


class _Pickler(pickle.Pickler):
  def reducer_override(self, value):
    if isinstance(value, Saved):
      _, *rest = value.arguments()
      rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
      return rebuild, (_Storage(value), *rest)
    return NotImplemented

  def persistent_id(self, value):
    if not isinstance(value, _Storage):
      return None
    saved = value.saved
    kind = getattr(sys.modules["torch"], saved.storage)
    length = saved.array.size if saved.length is None else saved.length
    return ("storage", kind, saved.key, "cpu", length)


def pickled(value, protocol=2):
  """As PyTorch's pickler writes it, by stand-ins for its names."""
  names = ("Float", "BFloat16", "Long", "Bool", "ComplexFloat")
  torch, inner = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for name in names:
    kind = type(f"{name}Storage", (), {"__module__": "torch"})
    setattr(torch, kind.__name__, kind)

  def _rebuild_tensor_v2():
    pass

  _rebuild_tensor_v2.__module__ = "torch._utils"
  _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
  inner._rebuild_tensor_v2 = _rebuild_tensor_v2
  torch._utils = inner
  kept = {n: sys.modules.get(n) for n in ("torch", "torch._utils")}
  sys.modules.update({"torch": torch, "torch._utils": inner})
  try:
    file = io.BytesIO()
    _Pickler(file, protocol).dump(value)
  finally:
    for name, module in kept.items():
      sys.modules.pop(name)
      if module is not None:
        sys.modules[name] = module
  return file.getvalue()


def pth(value, storages, *, extra=None, method=zipfile.ZIP_STORED):
  """A zip checkpoint; `value` is a tree, or the pickle's bytes."""
  program = value if isinstance(value, bytes) else pickled(value)
  members = {"a/data.pkl": program, "a/byteorder": b"little"}
  members |= {f"a/data/{key}": bytes(s) for key, s in storages.items()}
  members |= extra or {}
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", method) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


def old_pth(value, storages, *, keys=None):
  """A checkpoint of the older format; storages are (elements, bytes)."""
  machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
  program = value if isinstance(value, bytes) else pickled(value)
  parts = [
    pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    pickle.dumps(1001, 2),
    pickle.dumps(machine, 2),
    program,
    pickle.dumps(sorted(storages) if keys is None else keys, 2),
  ]
  for key in sorted(storages):
    length, content = storages[key]
    parts.append(struct.pack("<q", length) + bytes(content))
  return b"".join(parts)
