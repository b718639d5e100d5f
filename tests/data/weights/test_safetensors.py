"""Safetensors: what the package writes is read, alone and in shards."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.safetensors import (
  SafetensorsFile,
  SafetensorsFolder,
  read_json,
)
from tests.data.weights import make

DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
}


def test_what_the_package_wrote(tmp_path):
  path = tmp_path / "w.safetensors"
  rng = np.random.default_rng(0)
  arrays = {
    name: (rng.standard_normal((3, 5)) * 4).astype(dtype)
    for name, dtype in DTYPES.items()
  }
  arrays |= {
    "scalar": np.asarray(2.0, np.float32),
    "none": np.zeros((0, 4), np.float32),
  }
  save_file(arrays, path, metadata={"format": "pt"})
  file = SafetensorsFile(path)
  assert file.metadata == {"format": "pt"}
  assert set(file.names) == set(arrays)
  for name, array in arrays.items():
    found = file.read(name)
    assert found.dtype == array.dtype and found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert file.dtypes.get(name) == name or name in ("scalar", "none")
  assert not file.read("F32").flags.writeable
  with pytest.raises(KeyError, match="no tensor 'x' among its 15"):
    file.read("x")


def test_float8(tmp_path):
  path = tmp_path / "w.safetensors"
  one = np.asarray([1.0, -0.5])
  a, b = one.astype(ml_dtypes.float8_e4m3fn), one.astype(ml_dtypes.float8_e5m2)
  header = {"a": make.slot([2], 0, 2, "F8_E4M3")}
  header["b"] = make.slot([2], 2, 4, "F8_E5M2")
  path.write_bytes(make.safetensors(header, a.tobytes() + b.tobytes()))
  file = SafetensorsFile(path)
  for name in "ab":
    np.testing.assert_array_equal(file.read(name).astype(float), one)


def test_truth_values_are_0_and_1(tmp_path):
  path = tmp_path / "w.safetensors"
  header = {"a": make.slot([3], 0, 3, "BOOL")}
  path.write_bytes(make.safetensors(header, b"\0\1\2"))
  found = SafetensorsFile(path).read("a")
  assert found.view(np.uint8).tolist() == [0, 1, 1]


BYTES = bytes(8)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"\1", "the header's length takes 8 bytes"),
    (make.safetensors(b"{}", length=3), "header of 3 bytes, where 2 are left"),
    (make.safetensors(b"[]"), "JSON, but not an object"),
    (make.safetensors(b"{,}"), "not JSON"),
    (make.safetensors(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    (make.safetensors(b'{"a":1,"a":2}'), "the key 'a' comes twice"),
    (make.safetensors({"a": 1}), "'a' has no dtype"),
    (make.safetensors({"a": make.slot([2], 0, 8, "F4")}, BYTES), "dtype 'F4'"),
    (make.safetensors({"a": make.slot([2], 0, 8, [])}, BYTES), "no dtype"),
    (make.safetensors({"a": make.slot([2], 0, 4)}, BYTES), "0 to 4 for F32"),
    (make.safetensors({"a": make.slot([-2], 0, 8)}, BYTES), r"shape \(-2,\)"),
    (make.safetensors({"a": make.slot([2.0], 0, 8)}, BYTES), r"shape \(2.0,\)"),
    (make.safetensors({"a": make.slot([True], 0, 4)}, BYTES), "shape"),
    (make.safetensors({"a": make.slot([4], 0, 16)}, BYTES), "byte 16 of 8"),
    (make.safetensors({"a": make.slot([1], 4, 8)}, BYTES), "starts at byte 4"),
    (
      make.safetensors({"a": make.slot([1], 0, 4)}, BYTES),
      "byte 4 of 8",
    ),
    (
      make.safetensors(
        {"a": make.slot([2], 0, 8), "b": make.slot([1], 4, 8)}, BYTES
      ),
      "'b' starts at byte 4 of the data; 'a' ends at 8",
    ),
    (make.safetensors({"a": make.slot([0, 1 << 62], 0, 0)}), "takes bytes"),
    (make.safetensors({"a": make.slot([1] * 33, 0, 4)}, BYTES), "33 axes"),
    (make.safetensors({"__metadata__": 3}), "__metadata__ is 3"),
  ],
  ids=make.label,
)
def test_refused(tmp_path, content, message):
  path = tmp_path / "w.safetensors"
  path.write_bytes(content)
  with pytest.raises(WeightsError, match=message) as caught:
    SafetensorsFile(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def shards(folder, placed=None, metadata=None):
  """Two shards, and an index that may lie about them."""
  save_file({"a": np.float32([1])}, folder / "x.safetensors")
  save_file({"b": np.float32([2])}, folder / "y.safetensors")
  placed = placed or {"a": "x.safetensors", "b": "y.safetensors"}
  index = {"metadata": metadata or {}, "weight_map": placed}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


def test_a_folder_of_one_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    SafetensorsFolder(tmp_path)
  save_file({"a": np.float32([1])}, tmp_path / "model.safetensors")
  folder = SafetensorsFolder(tmp_path)
  assert folder.shapes == {"a": (1,)} and folder.read("a") == 1
  shards(tmp_path)
  with pytest.raises(WeightsError, match="keep one"):
    SafetensorsFolder(tmp_path)


def test_shards(tmp_path):
  folder = SafetensorsFolder(shards(tmp_path, metadata={"total_size": 8}))
  assert folder.names == ("a", "b") and folder.metadata == {"total_size": 8}
  assert folder.read("a") == 1 and folder.read("b") == 2
  with pytest.raises(KeyError, match="no tensor 'c' among its 2"):
    folder.read("c")


@pytest.mark.parametrize(
  "placed, message",
  [
    ({"a": "x.safetensors"}, None),
    ({"a": "x.safetensors", "b": "x.safetensors"}, "'b' is not in 'x.safe"),
    ({"a": "../x.safetensors"}, "'../x.safetensors' is not a plain file name"),
    ({"a": "/etc/passwd"}, "'/etc/passwd' is not a plain file name"),
    ({"a": "out.safetensors"}, "a link to .*, outside the folder"),
    ({"a": 3}, "'a' is in 3"),
    ({"c": "x.safetensors"}, "'c' is not in"),
    ([], "no object with tensors"),
  ],
)
def test_indices_that_lie(tmp_path, placed, message):
  folder = tmp_path / "model"
  folder.mkdir()
  save_file({"a": np.float32([1])}, tmp_path / "x.safetensors")
  (folder / "out.safetensors").symlink_to("../x.safetensors")
  shards(folder, placed or {"nothing": []})
  if message is None:  # y is not named, so it is not of this model
    assert SafetensorsFolder(folder).names == ("a",)
    return
  if not placed:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
  with pytest.raises(WeightsError, match=message):
    SafetensorsFolder(folder)


def test_links_are_followed_if_asked(tmp_path):
  """The cache of a model hub is a folder of links."""
  folder = tmp_path / "model"
  folder.mkdir()
  save_file({"a": np.float32([1])}, tmp_path / "blob")
  (folder / "model.safetensors").symlink_to("../blob")
  with pytest.raises(WeightsError, match="follow_links=True reads it"):
    SafetensorsFolder(folder)
  assert SafetensorsFolder(folder, follow_links=True).read("a") == 1


def test_a_tensor_that_no_index_names(tmp_path):
  shards(tmp_path)
  two = {"a": np.float32([1]), "c": np.float32([3])}
  save_file(two, tmp_path / "x.safetensors")
  with pytest.raises(WeightsError, match="'c' of 'x.safetensors' is placed in"):
    SafetensorsFolder(tmp_path)


def test_json(tmp_path):
  path = tmp_path / "c.json"
  path.write_text('{"a": [1, {"b": null}]}')
  assert read_json(path) == {"a": [1, {"b": None}]}
  with pytest.raises(WeightsError, match="23 bytes of JSON; at most 22"):
    read_json(path, most=22)
  path.write_text("[" * 100_000)
  with pytest.raises(WeightsError, match="not JSON"):
    read_json(path)
