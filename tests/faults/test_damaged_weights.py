"""Weight files with bits flipped, bytes lost or doubled: read, or refused."""

import collections
import random
import struct
import tracemalloc

import numpy as np
import pytest

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.gguf import GgufFile
from isthmus.data.weights.pth import PthFile
from isthmus.data.weights.safetensors import SafetensorsFile
from tests.data.weights import make, torch_files
from tests.faults.hostile import quick


def good_gguf():
  """Sizes are multiples of the alignment, so that a changed one is noticed."""
  words = b"".join(make.text(w) for w in ("one", "two"))
  entries = [
    make.entry("general.architecture", 8, make.text("llama")),
    make.entry("n", 4, struct.pack("<I", 7)),
    make.array(8, 2, words, "words"),
    make.array(6, 3, bytes(12), "numbers"),
  ]
  tensors = [
    make.tensor_entry("a.weight", (8, 3)),
    make.tensor_entry("b.weight", (32, 16), kind=8, offset=96),
    make.tensor_entry("c.weight", (16,), kind=30, offset=640),
  ]
  data = np.random.default_rng(0).integers(0, 99, 672, np.uint8)
  return make.gguf(entries, tensors, data.tobytes())


def good_safetensors():
  header = {
    "__metadata__": {"format": "pt"},
    "a.weight": make.slot([3, 8], 0, 96),
    "b.weight": make.slot([16], 96, 128, "BF16"),
    "c.weight": make.slot([2, 2, 2], 128, 192, "I64"),
  }
  return make.safetensors(header, bytes(range(192)))


FUZZED = {
  "gguf": (GgufFile, good_gguf, True),
  "safetensors": (SafetensorsFile, good_safetensors, True),
  "zip pth": (PthFile, torch_files.zipped, True),
  # Without a checksum, and with views shorter than their storage, a smaller
  # shape is as good as the real one.
  "old pth": (PthFile, torch_files.pickled, False),
}


def damaged(content, rng):
  """A few flipped bits, a cut, or bytes that are doubled or left out."""
  content = bytearray(content)
  kind = rng.choice(["flip", "flip", "flip", "cut", "double", "drop"])
  at = rng.randrange(len(content))
  if kind == "flip":
    for _ in range(rng.choice([1, 1, 2, 8])):
      content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif kind == "cut":
    del content[at:]
  elif kind == "double":
    content[at:at] = content[at : at + 8]
  else:
    del content[at : at + rng.randrange(1, 9)]
  return bytes(content)


@pytest.mark.parametrize("kind", FUZZED)
def test_random_damage(tmp_path, kind):
  """Each file reads with the same shapes, or raises WeightsError."""
  reader, make_good, exact = FUZZED[kind]
  good, rng = make_good(), random.Random(0)
  path = tmp_path / "good"
  path.write_bytes(good)
  shapes = sorted(reader(path).shapes.values())
  for name in reader(path).names:
    reader(path).read(name)  # imports what reading needs
  outcomes = collections.Counter()
  tracemalloc.start()
  try:
    for number in range(200):
      path = tmp_path / str(number)
      path.write_bytes(damaged(good, rng))
      with quick():
        try:
          file = reader(path)
          found = {name: file.read(name) for name in file.names}
        except WeightsError as error:
          outcomes["refused"] += 1
          assert str(error).startswith(str(path))
          assert "\n" not in str(error)
        else:
          outcomes["read"] += 1
          if exact:
            assert sorted(file.shapes.values()) == shapes
          for name, array in found.items():
            assert array.shape == file.shapes[name]
            assert array.nbytes <= 8 * len(good)
      path.unlink()
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 16e6  # the files have a few thousand bytes
  assert outcomes["refused"] > 20
  assert outcomes["read"] > 5 or kind == "zip pth"
