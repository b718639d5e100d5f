"""The stack machine: what pickle means by a program, and what it refuses."""

import collections
import os
import pathlib
import pickle

import numpy as np
import pytest

from isthmus.data.weights.file import WeightsError
from isthmus.data.weights.pickled import Storage, View, interpret
from tests.data.weights import make
from tests.faults.hostile import quick

PATH = pathlib.Path("w.pth")
VALUES = {
  "ints": [0, 255, 65535, -1, 1 << 31, -(1 << 70)],
  "floats": (0.5, float("-inf")),
  "texts": ["", "ü" * 300, b"bytes"],
  "flags": (True, False, None),
  "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
  "nested": {"a": [{"b": ()}], 3: {}},
  "ordered": collections.OrderedDict(x=1, y=[2]),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_equals_pickle(protocol):
  values = dict(VALUES)
  if protocol == 2:  # bytes are written as a call then
    values["texts"] = values["texts"][:2]
  program = pickle.dumps(values, protocol)
  value, size = interpret(PATH, program + b"more")
  assert value == pickle.loads(program) and size == len(program)


def test_shared_values_stay_shared():
  inner = [1]
  value, _ = interpret(PATH, pickle.dumps([inner, inner], 2))
  assert value[0] is value[1]


def test_versions_of_modules_are_left_out():
  state = collections.OrderedDict(w=1)
  state._metadata = {"": {"version": 1}}
  assert interpret(PATH, pickle.dumps(state, 2))[0] == {"w": 1}
  state.other = 2
  with pytest.raises(WeightsError, match="attributes .*'other'"):
    interpret(PATH, pickle.dumps(state, 2))


def test_a_tensor():
  array = np.zeros((2, 3), np.float32)
  value, _ = interpret(PATH, make.pickled([make.Saved(array, key="k")]))
  assert value == [View(Storage("k", "float32", 6), 0, (2, 3), (3, 1))]


class Run:
  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
  "value, message",
  [
    (Run(os.system, "touch canary"), f"names {os.name}.system; only tensors"),
    (Run(eval, "1"), "names (builtins|__builtin__).eval"),
    (Run(getattr, 1, "real"), "names (builtins|__builtin__).getattr"),
    (os.path.join, "names posixpath.join"),
    ({1, 2}, "EMPTY_SET|__builtin__.set"),
    (collections.Counter(), "names collections.Counter"),
    ({(1, 2): 3}, "a key of the type tuple"),
    ({1 << 61: 3}, "a key of the type int"),
    ({1.5: 3}, "a key of the type float"),
  ],
  ids=make.label,
)
def test_other_names_and_keys(tmp_path, monkeypatch, protocol, value, message):
  monkeypatch.chdir(tmp_path)
  program = pickle.dumps(value, protocol)
  with pytest.raises(WeightsError, match=message) as caught:
    interpret(PATH, program)
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "program, message",
  [
    (b"", "damaged pickle"),
    (b"\x80\x02", "damaged pickle"),
    (b"\x80\x02.", "an end with 0 values"),
    (b"\x80\x02K\x01K\x02.", "an end with 2 values"),
    (b"\x80\x02a.", "damaged pickle"),
    (b"\x80\x02(a.", "damaged pickle"),
    (b"\x80\x02(.", "an end with 0 values"),
    (b"\x80\x02K\x01\x87.", "TUPLE3 on a stack of 1"),
    (b"\x80\x02K\x01K\x02s.", "damaged pickle"),
    (b"\x80\x02K\x01e.", "damaged pickle"),
    (b"\x80\x02}(K\x01u.", "a key that has no value"),
    (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "the key 1 comes twice"),
    (b"\x80\x02K\x01K\x02a.", "appends to a int"),
    (b"\x80\x02h\x05.", "memo 5, never set"),
    (b"\x80\x02U\xffab.", "damaged pickle"),
    (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "damaged pickle"),
    (b"\x80\x02K\x01Q.", "a storage that is not understood"),
    (b"\x80\x02K\x01)R.", "a call of 1 that is not understood"),
    (b"cos\nsystem\n.", "names os.system"),
    (b"(S'ls'\nios\nsystem\n.", "the opcode"),
    (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    (b"\x80\x02K\x01K\x02K\x03s.", "sets a key of a int"),
    (b"\x80\x02ccollections\nOrderedDict\n](K\x01e\x85R.", "OrderedDict of 1"),
    (b"\x80\x02" + b"N" * (1 << 20) + b".", "more than 262144 opcodes"),
    (b"\x80\x02" + b"0" * 10 + b".", "the opcode POP"),
  ],
  ids=make.label,
)
def test_damaged_and_odd_programs(program, message):
  with quick(), pytest.raises(WeightsError, match=message):
    interpret(PATH, program)
