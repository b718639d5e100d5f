"""Pickles of tensors, interpreted without running anything.

A pickle is a program for a stack machine. `pickletools` cuts it into opcodes;
here those that build containers, numbers and strings are carried out, and of
those that call something, the few calls that PyTorch writes for tensors. No
name is ever looked up, so no code of the file's choosing can run.

Reference: https://docs.python.org/3/library/pickletools.html
"""

import dataclasses
import pathlib
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn, cast

from isthmus.data.weights.file import WeightsError, quote

_MOST_OPCODES = 1 << 18  # seven thousand tensors; well below a second
_LARGEST_KEY = 1 << 60  # integers from 2^61 - 1 may be chosen to collide
_ORDERED = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"

# Storage class of torch -> element type as numpy or ml_dtypes call it.
STORAGES = {
  "torch.FloatStorage": "float32",
  "torch.DoubleStorage": "float64",
  "torch.HalfStorage": "float16",
  "torch.BFloat16Storage": "bfloat16",
  "torch.LongStorage": "int64",
  "torch.IntStorage": "int32",
  "torch.ShortStorage": "int16",
  "torch.CharStorage": "int8",
  "torch.ByteStorage": "uint8",
  "torch.BoolStorage": "bool",
}
_KNOWN = {_ORDERED, _TENSOR, _PARAMETER, *STORAGES}

# Opcodes that push their argument. Those of protocol 0, written as text, are
# left out: PyTorch has always asked for 2 or more.
_VALUES = {
  *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
  *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
  *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
  # Python 2 wrote these; pickletools reads them as text.
  *("BINSTRING", "SHORT_BINSTRING"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME"}


@dataclasses.dataclass(frozen=True)
class Global:
  """The name of a class or function; never the thing itself.

  Example:
    >>> import pickle
    >>> program = pickle.dumps(pathlib.Path("w"), protocol=2)
    >>> interpret(pathlib.Path("w.pth"), program)
    Traceback (most recent call last):
    isthmus.data.weights.file.WeightsError: w.pth: ...
  """

  name: str


@dataclasses.dataclass(frozen=True)
class Storage:
  """A block of elements that tensors are views of.

  Example:
    >>> Storage("0", "float32", length=6).dtype
    'float32'
  """

  key: str
  dtype: str
  length: int


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor: elements of a storage, by offset, shape and strides.

  Example:
    >>> storage = Storage("0", "float32", length=6)
    >>> transposed = View(storage, offset=0, shape=(3, 2), strides=(1, 3))
    >>> transposed.shape
    (3, 2)
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def interpret(path: pathlib.Path, program: bytes) -> tuple[Any, int]:
  r"""What a pickle describes.

  Args:
    path: named in errors.
    program: bytes that begin with a pickle.

  Returns:
    (value, size): dicts, lists, tuples, numbers, strings, None and `View`s;
    and the bytes that the pickle took.

  Raises:
    WeightsError: it is damaged, too long, or names anything but tensors.

  Example:
    >>> interpret(pathlib.Path("w.pth"), b"\x80\x02K\x01K\x02\x86.")
    ((1, 2), 8)
  """
  steps = _Steps(path)
  number = at = 0
  stack: list[Any] = []  # since the last mark
  below: list[list[Any]] = []  # what lies under each mark
  memo: dict[int, Any] = {}
  try:
    for opcode, pushed, at in pickletools.genops(program):
      name, argument = opcode.name, cast(Any, pushed)
      number += 1
      if number > _MOST_OPCODES:
        steps.fail(f"a pickle of more than {_MOST_OPCODES} opcodes")
      if name in _VALUES:
        stack.append(argument)
      elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
      elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
      elif name in ("BINGET", "LONG_BINGET"):
        if argument not in memo:
          steps.fail(f"a pickle that asks for memo {argument}, never set")
        stack.append(memo[argument])
      elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
      elif name in _EMPTY:
        stack.append(_EMPTY[name]())
      elif name == "MARK":
        below.append(stack)
        stack = []
      elif name in _TUPLES:
        first = len(stack) - _TUPLES[name]
        if first < 0:
          raise IndexError(f"{name} on a stack of {len(stack)}")
        stack[first:] = [tuple(stack[first:])]
      elif name in ("TUPLE", "APPENDS", "SETITEMS"):
        values, stack = stack, below.pop()
        if name == "TUPLE":
          stack.append(tuple(values))
        elif name == "APPENDS":
          steps.extend(stack[-1], values)
        else:
          steps.set(stack[-1], values)
      elif name == "APPEND":
        steps.extend(stack[-2], [stack.pop()])
      elif name == "SETITEM":
        steps.set(stack[-3], [stack.pop(-2), stack.pop()])
      elif name == "GLOBAL":
        stack.append(steps.name(*argument.split(" ", 1)))
      elif name == "STACK_GLOBAL":
        stack.append(steps.name(stack.pop(-2), stack.pop()))
      elif name == "BINPERSID":
        stack.append(steps.storage(stack.pop()))
      elif name == "REDUCE":
        stack.append(steps.call(stack.pop(-2), stack.pop()))
      elif name == "BUILD":
        steps.build(stack[-2], stack.pop())
      elif name == "STOP":
        if len(stack) != 1 or below:
          raise IndexError(f"an end with {len(stack)} values, not 1")
        return stack[0], (at or 0) + 1
      elif name not in _NOTHING:
        steps.fail(f"a pickle with the opcode {name}; only tensors are read")
  except WeightsError:
    raise
  except (ValueError, IndexError, OverflowError) as error:
    reason = quote(str(error))
    raise WeightsError(
      f"{path}: a damaged pickle, near its byte {at}: {reason}"
    ) from None
  steps.fail("a pickle without an end")


class _Steps:
  """What opcodes do that can be refused for their values."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def fail(self, reason: str) -> NoReturn:
    raise WeightsError(f"{self._path}: {reason}")

  def extend(self, target: Any, values: list[Any]) -> None:
    if type(target) is not list:
      self.fail(f"a pickle that appends to a {type(target).__name__}")
    target.extend(values)

  def set(self, target: Any, values: list[Any]) -> None:
    if type(target) is not dict:
      self.fail(f"a pickle that sets a key of a {type(target).__name__}")
    if len(values) % 2:
      self.fail("a pickle with a key that has no value")
    for key, value in zip(values[::2], values[1::2], strict=True):
      whole = type(key) is int and abs(key) < _LARGEST_KEY
      if type(key) is not str and not whole:
        self.fail(f"a key of the type {type(key).__name__}, {quote(key)}")
      if key in target:
        self.fail(f"the key {quote(key)} comes twice")
      target[key] = value

  def name(self, module: Any, attribute: Any) -> Global:
    name = f"{module}.{attribute}"
    if name not in _KNOWN:
      self.fail(f"the pickle names {quote(name)[1:-1]}; only tensors are read")
    return Global(name)

  def storage(self, saved: Any) -> Storage:
    """Of `("storage", class, key, device, elements[, view])`."""
    match saved:
      case ("storage", Global(name), str(key), str(), int(length), *view) if (
        name in STORAGES and length >= 0 and view in ([], [None])
      ):
        return Storage(key, STORAGES[name], length)
    self.fail(f"a storage that is not understood: {quote(saved)}")

  def call(self, function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Global) else quote(function)
    match name, arguments:
      case "collections.OrderedDict", ():
        return {}
      case "collections.OrderedDict", (list(pairs),):
        found: dict[Any, Any] = {}
        for pair in pairs:
          if type(pair) not in (list, tuple) or len(pair) != 2:
            self.fail(f"an OrderedDict of {quote(pair)}")
          self.set(found, list(pair))
        return found
      case "torch._utils._rebuild_parameter", (View() as view, bool(), {}) if (
        not arguments[2]
      ):
        return view
      case "torch._utils._rebuild_tensor_v2", (
        Storage() as storage,
        int(offset),
        tuple(shape),
        tuple(strides),
        bool(),
        *rest,
      ) if not any(rest):  # hooks, and flags such as "conjugated"
        return self._view(storage, offset, shape, strides)
    self.fail(f"a call of {name} that is not understood; only tensors are read")

  def _view(
    self, storage: Storage, offset: int, shape: Any, strides: Any
  ) -> View:
    """A tensor whose every element lies in its storage."""
    sizes = (offset, *shape, *strides)
    whole = all(type(n) is int and n >= 0 for n in sizes)
    if not whole or len(shape) != len(strides) or len(shape) > 32:
      self.fail(
        f"a tensor at {quote(offset)} with the shape {quote(shape)} and the"
        f" strides {quote(strides)}"
      )
    elements, last = 1, offset
    for n, stride in zip(shape, strides, strict=True):
      elements *= max(n, 1)
      last += (max(n, 1) - 1) * stride
    end = last + 1 if 0 not in shape else offset
    # A stride of 0 would repeat one element without end.
    if max(end, elements) > storage.length:
      if 0 not in shape or end > storage.length or elements > 1 << 48:
        self.fail(
          f"a tensor of shape {quote(shape)} reaches element {end} of a"
          f" storage of {storage.length}"
        )
    return View(storage, offset, tuple(shape), tuple(strides))

  def build(self, target: Any, state: Any) -> None:
    """Attributes: PyTorch gives its OrderedDicts versions of modules."""
    if type(target) is not dict or type(state) is not dict:
      self.fail(f"a pickle with BUILD on a {type(target).__name__}")
    if set(state) - {"_metadata"}:
      self.fail(f"attributes {quote(sorted(map(str, state)))} of a dict")
