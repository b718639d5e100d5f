"""Safetensors: written for others to read, and read with suspicion."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from isthmus.data.weights.file import WeightsError
from isthmus.train.export import export_safetensors, load_safetensors

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


def file_of(header: dict, data: bytes):
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def test_damaged_files_are_named(tmp_path):
  path = tmp_path / "odd.safetensors"
  export_safetensors(path, {"x": np.ones(3)})
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(WeightsError, match=r"odd\.safetensors: 'x' ends at byte"):
    load_safetensors(path)
  with pytest.raises(FileNotFoundError, match="none"):
    load_safetensors(tmp_path / "none")


def test_a_tensor_that_is_also_a_group(tmp_path):
  x = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
  y = {**x, "data_offsets": [4, 8]}
  (tmp_path / "w").write_bytes(file_of({"a": x, "a/b": y}, b"x" * 8))
  with pytest.raises(WeightsError, match="a is a tensor and a group"):
    load_safetensors(tmp_path / "w")
