"""Weight files that lie, bomb or run code: refused at once, nothing done."""

import collections
import functools
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.gguf import GgufFile
from isthmus.data.weights.pth import PthFile
from isthmus.data.weights.safetensors import SafetensorsFile, SafetensorsFolder
from tests.data.weights import make
from tests.faults.hostile import quick

HUGE = 1 << 60
ROW = np.arange(6, dtype=np.float32)


class Call:
  """Pickles as a call of any function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


# ---- GGUF


def nested(depth):
  """An array of one array of one array of ..."""
  inner = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)
  return make.entry("k", 9, inner)


GGUFS = {
  "2^60 tensors": (make.gguf(counts=(HUGE, 0)), f"claims {HUGE} tensors"),
  "2^60 entries": (
    make.gguf(counts=(0, HUGE)),
    f"claims {HUGE} metadata entries",
  ),
  "more tensors than bytes": (
    make.gguf(counts=(100, 0)),
    "claims 100 tensors, at least 2400 bytes, where 8 are left",
  ),
  "too many tiny entries": (
    lambda: make.gguf(
      [make.entry(b"%07d" % i, 0, b"1") for i in range(1 << 17)]
    ),
    "claims 131072 metadata entries; at most 4096",
  ),
  "a string of 2^60 bytes": (
    make.gguf([make.entry("k", 8, struct.pack("<Q", HUGE))]),
    f"'k' takes {HUGE} bytes at byte",
  ),
  "a string of 2^64 - 1 bytes": (
    make.gguf([struct.pack("<Q", (1 << 64) - 1) + bytes(99)]),
    "a metadata key has 18446744073709551615 bytes",
  ),
  "an array of 2^60 numbers": (
    make.gguf([make.array(10, HUGE)]),
    f"'k', {HUGE} numbers, takes {8 * HUGE} bytes",
  ),
  "an array of 2^60 strings": (
    make.gguf([make.array(8, HUGE)]),
    f"claims {HUGE} strings in 'k'",
  ),
  "three million empty strings": (
    lambda: make.gguf([make.array(8, 3 << 20, bytes(24 << 20))]),
    "claims 3145728 strings in 'k'; at most 1048576",
  ),
  "a million strings more than that": (
    lambda: make.gguf(
      [
        make.array(8, 1 << 16, bytes(1 << 19), "a"),
        make.array(8, 1 << 20, bytes(1 << 23), "b"),
      ]
    ),
    "claims 1114112 strings up to 'b'; at most 1048576",
  ),
  "a string of 2^60 bytes in an array": (
    make.gguf([make.array(8, 2, make.text("a") + struct.pack("<Q", HUGE))]),
    f"string 1 of 2 in 'k' ends at byte {HUGE + 66} of 96",
  ),
  "nested arrays": (
    lambda: make.gguf([nested(100_000)]),
    "arrays in it, which are",
  ),
  "an unknown type": (
    make.gguf([make.entry("k", 77, bytes(99))]),
    "'k' has the unknown type 77",
  ),
  "2^31 axes": (
    make.gguf([], [make.text("a") + struct.pack("<I", 1 << 31) + bytes(99)]),
    "'a' has 2147483648 axes; at most 4",
  ),
  "axes whose product overflows": (
    make.gguf([], [make.tensor_entry("a", (1 << 32,) * 4)], bytes(64)),
    f"bytes 0 to {1 << 130} of the data, which go from 0 to 64",
  ),
  "an empty tensor of 2^60 rows": (
    make.gguf([], [make.tensor_entry("a", (HUGE, 0))], bytes(64)),
    f"bytes 0 to {4 * HUGE} of the data",
  ),
  "an offset past the end": (
    make.gguf([], [make.tensor_entry("a", (8,), offset=1 << 40)], bytes(64)),
    f"bytes {1 << 40} to {(1 << 40) + 32} of the data, .* to 64",
  ),
  "an offset that wraps around": (
    make.gguf(
      [], [make.tensor_entry("a", (8,), offset=(1 << 64) - 32)], bytes(64)
    ),
    "of the data, which go from 0 to 64",
  ),
  "tensors on top of each other": (
    make.gguf(
      [],
      [make.tensor_entry("a", (8,)), make.tensor_entry("b", (8,))],
      bytes(64),
    ),
    "'b' .* bytes 0 to 32 of the data, which go from 32 to 64",
  ),
  "an alignment of 2^31": (
    make.gguf([make.entry("general.alignment", 4, struct.pack("<I", 1 << 31))]),
    "general.alignment is 2147483648",
  ),
  "a cut header": (make.gguf(counts=(1, 1))[:30], "takes|claims"),
}

# ---- safetensors


def deep(depth):
  return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


SAFETENSORS = {
  "a header of 2^60 bytes": (
    make.safetensors(b"{}", length=HUGE),
    f"claims a header of {HUGE} bytes, where 2 are left",
  ),
  "a header of 2^64 - 1 bytes": (
    make.safetensors(b"{}", length=(1 << 64) - 1),
    "claims a header of 18446744073709551615 bytes",
  ),
  "a header of 11 MB": (
    lambda: make.safetensors(b"{" + b" " * 11_000_000 + b"}"),
    "a header of 11000002 bytes; at most 10000000",
  ),
  "lists in lists": (lambda: make.safetensors(deep(200_000)), "not JSON"),
  "a number of a million digits": (
    lambda: make.safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "not JSON",
  ),
  "axes whose product overflows": (
    make.safetensors({"a": make.slot([1 << 32, 1 << 32], 0, 8)}, bytes(8)),
    f"bytes 0 to 8 for F32 of shape .*, {1 << 66} bytes",
  ),
  "an empty tensor of 2^60 rows": (
    make.safetensors({"a": make.slot([HUGE, 0], 0, 0)}),
    f"{4 * HUGE} bytes",
  ),
  "bytes past the end": (
    make.safetensors({"a": make.slot([HUGE], 0, 4 * HUGE)}, bytes(8)),
    f"'a' ends at byte {4 * HUGE} of 8",
  ),
  "an offset past the end": (
    make.safetensors({"a": make.slot([2], HUGE, HUGE + 8)}, bytes(8)),
    f"'a' ends at byte {HUGE + 8} of 8",
  ),
  "offsets below 0": (
    make.safetensors({"a": make.slot([2], -8, 0)}, bytes(8)),
    "offsets below 0",
  ),
  "offsets the wrong way round": (
    make.safetensors({"a": make.slot([2], 8, 0)}, bytes(8)),
    "'a' takes bytes 8 to 0",
  ),
  "tensors on top of each other": (
    make.safetensors(
      {"a": make.slot([2], 0, 8), "b": make.slot([2], 0, 8)}, bytes(8)
    ),
    "'b' starts at byte 0 of the data; 'a' ends at 8",
  ),
  "a key twice": (make.safetensors(b'{"a":1,"a":1}'), "'a' comes twice"),
  "no JSON": (make.safetensors(b"\xff\xfe\0" * 9), "not JSON"),
  "a pickle": (
    pickle.dumps(Call(os.system, "touch canary")),
    "claims a header",
  ),
}

# ---- PyTorch


def laughs(levels):
  """Lists that hold the one before ten times: 10^levels values."""
  inner = [1]
  for _ in range(levels):
    inner = [inner] * 10
  return pickle.dumps(inner, 2)


def cycle():
  inner = []
  inner.append(inner)
  return pickle.dumps(inner, 2)


def collisions():
  """Keys of equal hash: a dict of n of them takes n^2 steps."""
  prime = (1 << 61) - 1
  return pickle.dumps({i * prime: 0 for i in range(1, 9)}, 2)


def tensor(**fields):
  return make.pickled({"a": make.Saved(ROW, **fields)})


CALLS = {
  "os.system": Call(os.system, "touch canary"),
  "eval": Call(eval, "open('canary', 'w')"),
  "exec": Call(exec, "open('canary', 'w')"),
  "open": Call(open, "canary", "w"),
  "os.mkdir": Call(os.mkdir, "canary"),
  "getattr": Call(getattr, "x", "upper"),
  "partial": Call(functools.partial, os.mkdir, "canary"),
  "a counter": collections.Counter("ab"),
  "a list's method": Call([].append, 1),
}
PROGRAMS = {
  "a value past the stack": (b"\x80\x02R.", "damaged pickle"),
  "a string of 2^63 bytes": (
    b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.",
    "damaged pickle",
  ),
  "a million values": (
    b"\x80\x02" + b"N" * (1 << 20) + b".",
    "more than 26214",
  ),
  "lists of lists of lists": (laughs(12), "more than 4096 containers that"),
  "a list in itself": (cycle(), "more than 32 containers in each"),
  "one long list many times": (
    pickle.dumps([[1] * 1000] * 1000, 2),
    "more than 262144 values",
  ),
  "keys of equal hash": (collisions(), "a key of the type int"),
  "a tensor past its storage": (tensor(offset=1), "reaches element 7"),
  "a tensor of 2^60 rows": (
    tensor(shape=(HUGE,), strides=(1,)),
    f"reaches element {HUGE} of a storage of 6",
  ),
  "one element 2^40 times": (
    tensor(shape=(1 << 40,), strides=(0,)),
    "of a storage of 6",
  ),
  "a stride that overflows": (
    tensor(shape=(2, 2), strides=(1 << 63, 1)),
    "of a storage of 6",
  ),
  "strides below 0": (
    tensor(shape=(2, 3), strides=(-3, 1), offset=3),
    "the strides",
  ),
  "a storage of 2^60 elements": (
    tensor(length=HUGE),
    f"24 bytes; {HUGE} elements|has 6 elements; its tensors say {HUGE}",
  ),
}


def bomb():
  """64 MB of zeros in 64 KB."""
  return make.pth(
    {"a": make.Saved(np.zeros(1 << 24, np.float32))},
    {"0": bytes(1 << 26)},
    method=zipfile.ZIP_DEFLATED,
  )


def slip():
  """A member that would land outside a folder, if one were unpacked."""
  good = make.pickled({"a": make.Saved(ROW, key="../../../canary")})
  return make.pth(good, {"../../../other": ROW.tobytes()})


def forms(name, program, message):
  """The same pickle in both formats."""
  yield f"zip: {name}", make.pth(program, {"0": ROW.tobytes()}), message
  old = make.old_pth(program, {"0": (6, ROW.tobytes())})
  yield f"old: {name}", old, message


PTHS = {
  f"{form}, protocol {protocol}": (content, message)
  for name, value in CALLS.items()
  for protocol in (2, 4)
  for form, content, message in forms(
    name,
    pickle.dumps({"a": 1, "b": value}, protocol),
    "the pickle names [a-z_.]+(Counter)?; only tensors are read",
  )
}
PTHS |= {
  form: (content, message)
  for name, (program, why) in PROGRAMS.items()
  for form, content, message in forms(name, program, why)
}
PTHS |= {
  "a compressed member": (
    bomb,
    "'a/data.pkl' is compressed or encrypted, 1.. bytes for 1..",
  ),
  "a member outside": (slip(), "the archive has no 'a/data/../../../canary'"),
  "TorchScript": (
    make.pth({}, {}, extra={"a/constants.pkl": b"", "a/code/x.py": b"1/0"}),
    "TorchScript archive, which holds code",
  ),
  "a call before the magic number": (
    pickle.dumps(Call(os.system, "touch canary"), 2),
    "names posix.system|names nt.system",
  ),
  "a call among the storages' keys": (
    make.old_pth({}, {}, keys=[Call(os.system, "touch canary")]),
    "names posix.system|names nt.system",
  ),
  "text": (b"cos\nsystem\n(S'touch canary'\ntR.", "no pickle at byte 0"),
  "a zip without an end": (
    lambda: b"PK\3\4" + bytes(1 << 20),
    "no end of a zip",
  ),
}

CASES = [
  *((GgufFile, "w.gguf", name, *case) for name, case in GGUFS.items()),
  *(
    (SafetensorsFile, "w.safetensors", name, *case)
    for name, case in SAFETENSORS.items()
  ),
  *((PthFile, "w.pth", name, *case) for name, case in PTHS.items()),
]


@pytest.mark.parametrize(
  "reader, file, name, content, message",
  CASES,
  ids=[f"{case[1]}: {case[2]}" for case in CASES],
)
def test_refused(tmp_path, monkeypatch, reader, file, name, content, message):
  """In a second, in one line that names the file; nothing run or written."""
  content = content() if callable(content) else content  # the large ones
  path = tmp_path / "in" / file
  path.parent.mkdir()
  path.write_bytes(content)
  monkeypatch.chdir(path.parent)  # where "canary" would be made
  with quick(), pytest.raises(WeightsError, match=message) as caught:
    reader(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
  left = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
  assert [str(p) for p in left] == ["in", f"in/{file}"]
  assert path.read_bytes() == content


def test_the_canary_sings(tmp_path, monkeypatch):
  """The files above do run something where pickle reads them."""
  monkeypatch.chdir(tmp_path)
  for name in ("os.system", "eval", "exec", "open", "os.mkdir"):
    pickle.loads(pickle.dumps({"b": CALLS[name]}, 2))
    canary = tmp_path / "canary"
    assert canary.exists(), name
    canary.rmdir() if canary.is_dir() else canary.unlink()


@pytest.mark.parametrize(
  "name", ["../w", "/etc/passwd", "a/../../w", "link", "..", "w\0", "a\\w"]
)
def test_an_index_that_leaves_its_folder(tmp_path, name):
  folder = tmp_path / "model"
  folder.mkdir()
  save_file({"a": ROW}, tmp_path / "w")
  (folder / "link").symlink_to("../w")
  index = {"weight_map": {"a": name}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(WeightsError, match="plain file name|outside the folder"):
    SafetensorsFolder(folder)
