"""Safetensors: written for others to read, and read with suspicion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from isthmus.train.export import (
  SafetensorsError,
  export_safetensors,
  load_safetensors,
)

DTYPES = (
  *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
  *("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"),
)


def tree():
  key = jax.random.key(0)
  named = {
    name: (jax.random.normal(key, (3, 5)) * 4).astype(name) for name in DTYPES
  }
  return {
    "decoder": {"mlp": named, "scale": jnp.float32(2.5)},
    "list": [np.arange(3, dtype=np.int64), np.zeros((0, 2))],
  }


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "w.safetensors"
  export_safetensors(path, tree(), metadata={"recipe": "quickstart"})
  back = load_safetensors(path)
  want = tree()
  assert jax.tree.structure(back["decoder"]) == jax.tree.structure(
    want["decoder"]
  )
  want["list"] = {str(i): x for i, x in enumerate(want["list"])}
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(want), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, np.asarray(b))
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_library_reads_it(tmp_path):
  path = tmp_path / "w.safetensors"
  want = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.arange(3)}
  export_safetensors(path, want, metadata={"made": "here"})
  with safetensors.safe_open(path, framework="np") as file:
    assert file.metadata() == {"made": "here"}
    assert sorted(file.keys()) == ["a/b", "c"]
    np.testing.assert_array_equal(file.get_tensor("a/b"), want["a"]["b"])
  header = path.read_bytes()[
    : 8 + int.from_bytes(path.read_bytes()[:8], "little")
  ]
  assert len(header) % 8 == 0  # the data are aligned


def test_it_reads_the_library(tmp_path):
  path = tmp_path / "w.safetensors"
  want = {"a.b": np.arange(4.0), "a/c": np.ones((2, 2), np.float16)}
  safetensors.numpy.save_file(want, path)
  back = load_safetensors(path)
  np.testing.assert_array_equal(back["a.b"], want["a.b"])
  np.testing.assert_array_equal(back["a"]["c"], want["a/c"])
  back["a"]["c"][0] = 2  # its own memory


def test_sharded_arrays_are_gathered(tmp_path):
  mesh = jax.make_mesh((4, 2), ("x", "y"))
  want = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
  sharded = jax.device_put(want, jax.NamedSharding(mesh, jax.P("x", "y")))
  export_safetensors(tmp_path / "w", {"w": sharded})
  np.testing.assert_array_equal(load_safetensors(tmp_path / "w")["w"], want)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "w"
  export_safetensors(path, {"a": jnp.ones(3)})

  gone = jnp.ones(3)
  gone.delete()
  with pytest.raises(RuntimeError):
    export_safetensors(path, {"a": jnp.zeros(3), "b": gone})
  assert [p.name for p in tmp_path.iterdir()] == ["w"]
  np.testing.assert_array_equal(load_safetensors(path)["a"], np.ones(3))


@pytest.mark.parametrize(
  ("params", "words"),
  [
    ({"k": jax.random.key}, "k is function"),
    ({"k": {"n": 3}}, "k/n is int"),
    ({"k": np.ones(2, np.complex64)}, "k is complex64"),
    ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "a/b can't name"),
    ({"__metadata__": np.ones(1)}, "__metadata__ can't name"),
  ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, params, words):
  with pytest.raises(ValueError, match=words):
    export_safetensors(tmp_path / "w", params)
  assert not list(tmp_path.iterdir())


def test_typed_keys_and_odd_metadata_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"k is key<fry>"):
    export_safetensors(tmp_path / "w", {"k": jax.random.key(0)})


def file_of(header: object, data: bytes = b"", length: int | None = None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return length.to_bytes(8, "little") + text + data


def tensor(**change):
  entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
  return {"x": {**entry, **change}}


BAD = {
  "empty": (b"", "a header of 0 bytes in a file of 0"),
  "short": (b"\x01\x02", "in a file of 2"),
  "text": (b"hello, this is no such file", "a header of"),
  "huge header": (file_of(tensor(), b"12345678", length=2**62), "a header of"),
  "header beyond the file": (file_of({}, length=50), "a header of 50 bytes"),
  "not JSON": (file_of(b"{bad json}"), "not JSON"),
  "not UTF-8": (file_of(b"{\xff\xfe}  "), "not JSON"),
  "nested": (file_of(b"[" * 200_000), "not JSON"),
  "a list": (file_of([1, 2, 3]), "not a JSON object"),
  "no fields": (file_of({"x": {}}), "x: no dtype"),
  "no such dtype": (file_of(tensor(dtype="F33"), b"12345678"), "F33"),
  "negative shape": (
    file_of(tensor(shape=[-1, -2], data_offsets=[0, 8]), b"12345678"),
    r"shape \[-1, -2\]",
  ),
  "shape and bytes differ": (
    file_of(tensor(shape=[3]), b"12345678"),
    "8 bytes",
  ),
  "beyond the end": (
    file_of(tensor(), b"1234"),
    "ends at byte 8, the data at 4",
  ),
  "overlap": (
    file_of(
      {**tensor(), "y": {**tensor()["x"], "data_offsets": [4, 12]}}, b"x" * 12
    ),
    "y starts at byte 4, not at 8",
  ),
  "hole": (
    file_of(tensor(data_offsets=[4, 12]), b"x" * 12),
    "byte 4, not at 0",
  ),
  "rest": (file_of(tensor(), b"x" * 9), "1 bytes belong to no tensor"),
  "overflow": (
    file_of(tensor(shape=[2**62, 4], data_offsets=[0, 8]), b"x" * 8),
    "8 bytes",
  ),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_files_are_named(tmp_path, kind):
  data, words = BAD[kind]
  path = tmp_path / "odd.safetensors"
  path.write_bytes(data)
  with pytest.raises(SafetensorsError, match=words) as caught:
    load_safetensors(path)
  assert str(path) in str(caught.value)
  with pytest.raises(SafetensorsError, match="No such file"):
    load_safetensors(tmp_path / "none")


def test_a_tensor_that_is_also_a_group(tmp_path):
  x = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
  y = {**x, "data_offsets": [4, 8]}
  (tmp_path / "w").write_bytes(file_of({"a": x, "a/b": y}, b"x" * 8))
  with pytest.raises(SafetensorsError, match="a is a tensor and a group"):
    load_safetensors(tmp_path / "w")
