"""GGUF: what the package gguf writes is read back, the rest refused."""

import struct
import sys

import numpy as np
import pytest

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.gguf import GgufFile
from tests.data.weights import make

package = pytest.importorskip("gguf")
KINDS = package.GGMLQuantizationType


def test_metadata(tmp_path):
  path = tmp_path / "w.gguf"
  metadata = {
    "n": 7,
    "x": 0.5,
    "flag": True,
    "words": ["a", "", "ü"],
    "numbers": [1, -2, 3],
    "floats": [0.5, 1.5],
    "flags": [True, False],
  }
  make.write_gguf(path, {"t": np.zeros((2, 3), np.float32)}, metadata)
  found = GgufFile(path).metadata
  assert found["general.architecture"] == "llama"
  for key, value in metadata.items():
    same = found[key]
    assert (same.tolist() if isinstance(same, np.ndarray) else same) == value
  assert type(found["flag"]) is bool and found["flags"].dtype == bool


def test_types_of_tensors(tmp_path):
  """Plain ones exactly, quantised ones as the package has them."""
  path = tmp_path / "w.gguf"
  rng = np.random.default_rng(0)
  wide = rng.standard_normal((6, 512)).astype(np.float32)
  kinds = [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0]
  kinds += [KINDS.BF16, KINDS.TQ1_0, KINDS.TQ2_0]
  plain = {
    "f32": wide,
    "f16": wide.astype(np.float16),
    "f64": wide.astype(np.float64),
    "i8": np.arange(5, dtype=np.int8),
    "i32": np.arange(5, dtype=np.int32).reshape(1, 5, 1),
  }
  make.write_gguf(path, plain | {k.name: (wide, k) for k in kinds})
  file = GgufFile(path)
  assert file.names == (*plain, *(k.name for k in kinds))
  for name, array in plain.items():
    found = file.read(name)
    assert found.dtype == (np.float32 if name == "f16" else array.dtype)
    assert found.shape == file.shapes[name] == array.shape
    np.testing.assert_array_equal(found, array)
  for kind in kinds:
    found = file.read(kind.name)
    blocks = package.quants.quantize(wide, kind)
    want = package.quants.dequantize(blocks, kind)
    assert found.dtype == np.float32 and file.dtypes[kind.name] == kind.name
    np.testing.assert_array_equal(found, want)
    error = np.abs(found - wide).max()
    assert error < (2 if kind.name[0] == "T" else 0.6), kind
  with pytest.raises(KeyError, match="no tensor 'x' among its 13"):
    file.read("x")


def test_all_block_sizes_are_the_packages():
  from isthmus.data.weights import gguf

  for number, (name, block, width) in gguf._TYPES.items():
    kind = KINDS(number)
    assert (kind.name, package.GGML_QUANT_SIZES[kind]) == (name, (block, width))


def test_many_blocks_are_dequantised_in_slices(tmp_path, monkeypatch):
  from isthmus.data.weights import gguf

  path = tmp_path / "w.gguf"
  wide = np.random.default_rng(0).standard_normal((10, 96)).astype(np.float32)
  make.write_gguf(path, {"t": (wide, KINDS.Q8_0)})
  whole = GgufFile(path).read("t")
  monkeypatch.setattr(gguf, "_SLICE", 7 * 34)
  np.testing.assert_array_equal(GgufFile(path).read("t"), whole)


@pytest.mark.parametrize("version", [2, 3])
def test_by_hand(tmp_path, version):
  """A file that no package wrote: the layout as the format says."""
  path = tmp_path / "w.gguf"
  data = np.arange(8, dtype=np.float32)
  align = make.entry("general.alignment", 4, struct.pack("<I", 64))
  table = [
    make.tensor_entry("a", (4, 2)),
    make.tensor_entry("b", (), kind=24, offset=64),
  ]
  content = make.gguf([align], table, version=version)
  content += b"\0" * (-len(content) % 64) + data.tobytes() + bytes(32) + b"\7"
  path.write_bytes(content)
  file = GgufFile(path)
  assert file.shapes == {"a": (2, 4), "b": ()}
  np.testing.assert_array_equal(file.read("a"), data.reshape(2, 4))
  assert file.read("b") == 7
  assert file.tensors["b"].start == len(content) - 1


def test_no_tensors(tmp_path):
  path = tmp_path / "w.gguf"
  path.write_bytes(make.gguf([make.entry("k", 8, make.text("v"))])[:-10])
  assert GgufFile(path).metadata == {"k": "v"} and GgufFile(path).names == ()


def test_without_the_package(tmp_path, monkeypatch):
  path = tmp_path / "w.gguf"
  wide = np.ones((1, 32), np.float32)
  make.write_gguf(path, {"a": wide, "q": (wide, KINDS.Q8_0)})
  monkeypatch.setitem(sys.modules, "gguf", None)
  np.testing.assert_array_equal(GgufFile(path).read("a"), wide)
  with pytest.raises(
    ImportError, match=r"Q8_0 .*pip install 'isthmus\[data\]'"
  ):
    GgufFile(path).read("q")


def words(number, payload):
  head = struct.pack("<IQ", 8, number)
  return make.gguf([make.entry("k", 9, head + payload)])


F32 = make.tensor_entry("a", (8,))
BYTES = bytes(32)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"GGUF", "the version takes 4 bytes at byte 4, where 0 are left"),
    (b"GGML" + bytes(20), "begins with b'GGML'"),
    (make.gguf(version=1), "of version 1; "),
    (make.gguf(version=3 << 24), "big-endian"),
    (make.gguf([], [F32] * 2, BYTES * 2), "the tensor 'a' comes twice"),
    (
      make.gguf([make.entry("k", 0, b"1")] * 2),
      "the metadata key 'k' comes twice",
    ),
    (make.gguf([make.entry("k", 7, b"\2")]), "a truth value of 2"),
    (make.gguf([make.entry("k", 13, b"")]), "'k' has the unknown type 13"),
    (make.gguf([make.entry(b"\xff", 0, b"1")]), "not UTF-8 at its byte 0"),
    (
      words(2, make.text("a") + b"\x63" + bytes(7)),
      "string 1 of 2 in 'k' ends at byte",
    ),
    (words(1, make.text(b"\xff")), "a string in 'k' is not UTF-8"),
    (
      make.gguf([], [make.tensor_entry("a", (8,), offset=32)], BYTES * 2),
      "lies at bytes 32 to 64 of the data, which go from 0 to 64",
    ),
    (make.gguf([], [F32], BYTES[:-1]), "0 to 32 .* from 0 to 31"),
    (make.gguf([], [F32], BYTES + b"1"), "1 bytes after the last tensor"),
    (
      make.gguf([], [make.tensor_entry("a", (40,), kind=2)], BYTES),
      "rows of 40 elements; Q4_0 has blocks of 32",
    ),
    (
      make.gguf([], [make.tensor_entry("a", (8,), kind=99)], BYTES),
      "'a' has the type 99",
    ),
    (
      make.gguf([], [make.tensor_entry("a", (1,) * 5)], BYTES),
      "'a' has 5 axes; at most 4",
    ),
    (
      make.gguf([make.entry("general.alignment", 4, struct.pack("<I", 24))]),
      "general.alignment is 24",
    ),
    (
      make.gguf([make.entry("general.alignment", 8, make.text("x"))]),
      "general.alignment is 'x'",
    ),
  ],
  ids=make.label,
)
def test_refused(tmp_path, content, message):
  path = tmp_path / "w.gguf"
  path.write_bytes(content)
  with pytest.raises(WeightsError, match=message) as caught:
    GgufFile(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
