"""PyTorch files: real ones of both formats, and what is refused in them."""

import zipfile

import numpy as np
import pytest

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.pth import PthFile
from tests.data.weights import make, torch_files

ROW = np.arange(6, dtype=np.float32)


def opened(tmp_path, content):
  path = tmp_path / "w.pth"
  path.write_bytes(content)
  return PthFile(path)


@pytest.mark.parametrize("kind", ["zipped", "pickled"])
def test_what_torch_wrote(tmp_path, kind):
  file = opened(tmp_path, getattr(torch_files, kind)())
  want = torch_files.contents()
  assert set(file.names) == set(want)
  assert file.metadata == torch_files.METADATA
  for name, array in want.items():
    found = file.read(name)
    assert found.shape == file.shapes[name] == array.shape
    np.testing.assert_array_equal(found.astype(array.dtype), array)
  assert file.dtypes["half"] == "bfloat16" == file.read("half").dtype.name
  assert file.read("steps").dtype == np.int64
  assert file.read("flag").dtype == bool
  assert not file.read("model/weight").flags.writeable
  with pytest.raises(KeyError, match="no tensor 'weight' among its 8"):
    file.read("weight")


def test_views_share_a_storage(tmp_path):
  tree = {
    "a": make.Saved(ROW),
    "b": make.Saved(ROW, offset=1, shape=(2, 2), strides=(3, 1)),
  }
  for content in (
    make.pth(tree, {"0": ROW.tobytes()}),
    make.old_pth(tree, {"0": (6, ROW.tobytes())}),
  ):
    file = opened(tmp_path, content)
    np.testing.assert_array_equal(file.read("a"), ROW)
    np.testing.assert_array_equal(file.read("b"), [[1, 2], [4, 5]])
    a, b = file.tensors["a"], file.tensors["b"]
    assert (b.start, a.size, b.size) == (a.start + 4, 24, 16)


def test_a_damaged_storage_is_noticed_when_read(tmp_path):
  content = make.pth({"a": make.Saved(ROW)}, {"0": ROW.tobytes()})
  at = content.index(ROW.tobytes())
  file = opened(
    tmp_path, content[:at] + b"\1" + content[at + 1 :]
  )  # the header is whole
  assert file.shapes == {"a": (6,)}
  with pytest.raises(WeightsError, match="checksum .*; the file is damaged"):
    file.read("a")


def saved(**fields):
  return {"a": make.Saved(ROW, **fields)}


@pytest.mark.parametrize(
  "tree, message",
  [
    (saved(shape=(7,)), r"shape \(7,\) reaches element 7 of a storage of 6"),
    (saved(shape=(3, 2), strides=(4, 1)), "element 10 of a storage of 6"),
    (saved(offset=1), "element 7 of a storage of 6"),
    (saved(shape=(1 << 40,), strides=(0,)), "of a storage of 6"),
    (saved(shape=(0, 1 << 60), strides=(0, 0)), "of a storage of 6"),
    (saved(shape=(-1,)), r"the shape \(-1,\)"),
    (saved(shape=(2, 3)), r"the shape \(2, 3\) and the strides \(1,\)"),
    (saved(offset=-1), "a tensor at -1"),
    (saved(length=5), "element 6 of a storage of 5"),
    (saved(length=1 << 60), "has 24 bytes; 1152921504606846976 elements"),
    (saved(storage="ComplexFloatStorage"), "names torch.ComplexFloatStorage"),
    (saved(extra=({"conj": True},)), "_rebuild_tensor_v2 that is not under"),
    ({"a": make.Saved(ROW), "b": make.Saved(ROW, length=7)}, "is also"),
    (saved(key="1"), "the archive has no 'a/data/1'"),
  ],
  ids=make.label,
)
def test_tensors_stay_in_their_storage(tmp_path, tree, message):
  with pytest.raises(WeightsError, match=message):
    opened(tmp_path, make.pth(tree, {"0": ROW.tobytes()}))


def test_archives(tmp_path):
  tree, data = {"a": make.Saved(ROW)}, {"0": ROW.tobytes()}

  def refused(message, **changes):
    with pytest.raises(WeightsError, match=message):
      opened(
        tmp_path, make.pth(**({"value": tree, "storages": data} | changes))
      )

  refused("is compressed", method=zipfile.ZIP_DEFLATED)
  refused("TorchScript", extra={"a/constants.pkl": b""})
  refused("byte order is b'big'", extra={"a/byteorder": b"big"})
  refused("2 members data.pkl", extra={"b/data.pkl": b""})
  refused("3 bytes after the pickle", value=make.pickled(tree) + b"abc")


def test_the_older_format(tmp_path):
  tree, data = {"a": make.Saved(ROW)}, {"0": (6, ROW.tobytes())}

  def refused(message, content):
    with pytest.raises(WeightsError, match=message):
      opened(tmp_path, content)

  good = make.old_pth(tree, data)
  refused(
    "has 5 elements; its tensors say 6", make.old_pth(tree, {"0": (5, b"")})
  )
  refused("takes 24 bytes at byte .* 20 are left", good[:-4])
  refused("4 bytes after the last storage", good + bytes(4))
  refused("'1' is no tensor's", make.old_pth(tree, data, keys=["0", "1"]))
  refused("'0' is not in the file", make.old_pth(tree, {}, keys=[]))
  refused("no list of strings", make.old_pth(tree, data, keys=[0]))
  refused("neither a zip archive", make.pickled(7) + good)
  refused("no pickle at byte 0", b"P" + good)
  big = good.replace(b"\x88", b"\x89", 1)  # True, False
  refused("not little-endian", big)


def test_only_tensors_are_values(tmp_path):
  tree = {"a": make.Saved(ROW), "n": {"x": [1, "two", None, (2.5,)], "y": {}}}
  file = opened(tmp_path, make.pth(tree, {"0": ROW.tobytes()}))
  assert file.metadata == {
    **{"n/x/0": 1, "n/x/1": "two", "n/x/2": None, "n/x/3/0": 2.5},
    "n/y": {},
  }
  clash = {"a/b": make.Saved(ROW), "a": {"b": 1}}
  with pytest.raises(WeightsError, match="two values are named 'a/b'"):
    opened(tmp_path, make.pth(clash, {"0": ROW.tobytes()}))


# ---- against torch; pytest -m parity


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch(tmp_path, zipped, protocol):
  torch = pytest.importorskip("torch")
  net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3),
    torch.nn.BatchNorm2d(4),
    torch.nn.Linear(4, 5, dtype=torch.bfloat16),
  )
  adam = torch.optim.Adam(net.parameters())
  for weight in net.parameters():
    weight.grad = torch.ones_like(weight)
  adam.step()
  base = torch.arange(24.0).reshape(4, 6)
  names = ("int8", "uint8", "int16", "int32", "int64", "float16", "float64")
  tree = {
    "net": net.state_dict(),
    "adam": adam.state_dict(),
    "weights": dict(net.named_parameters()),
    "views": [base[1:, ::2], base.t(), base[0, 0], torch.zeros(0, 3)],
    "types": {n: torch.arange(3).to(getattr(torch, n)) for n in names},
    "flags": torch.tensor([True, False]),
    "epoch": 3,
  }
  path = tmp_path / "w.pth"
  torch.save(
    tree,
    path,
    pickle_protocol=protocol,
    _use_new_zipfile_serialization=zipped,
  )
  file, want = PthFile(path), dict(flatten((), tree))
  tensors = {n: x for n, x in want.items() if isinstance(x, torch.Tensor)}
  assert set(file.names) == set(tensors) and len(tensors) > 40
  for name, tensor in tensors.items():
    found = file.read(name)
    assert found.shape == tuple(tensor.shape)
    assert str(tensor.dtype) == f"torch.{found.dtype.name}"
    wide = tensor.detach().double().numpy()
    np.testing.assert_array_equal(found.astype(np.float64), wide)
  assert file.metadata == {n: x for n, x in want.items() if n not in tensors}
  torch.save(net, path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(WeightsError, match="names torch.nn.modules.container"):
    PthFile(path)


def flatten(parts, value):
  """(name, leaf) of nested dicts, lists and tuples."""
  if isinstance(value, (dict, list, tuple)) and value:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
      yield from flatten((*parts, str(key)), inner)
  else:
    yield "/".join(parts), value
