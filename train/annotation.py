"""Values and the annotations of fields: what fits, and as what."""

import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
  """Whether `value` is of the annotation `hint`, and the value converted.

  Example:
    >>> fit(3, float | None), fit([1, 2], tuple[int, ...]), fit(True, int)
    ((True, 3.0), (True, (1, 2)), (False, None))
  """
  if hint is Any or isinstance(hint, (str, typing.TypeVar)):
    return True, value
  if hint is None or hint is type(None):
    return value is None, None
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    return fit(value, args[0])
  if origin in (typing.Union, types.UnionType):
    for option in args:
      ok, fitted = fit(value, option)
      if ok:
        return True, fitted
    return False, None
  if origin is typing.Literal:
    exact = [a for a in args if a == value and type(a) is type(value)]
    return bool(exact), value
  if origin in (tuple, list, Sequence) and isinstance(value, (tuple, list)):
    return _fit_sequence(value, origin, args)
  if hint is float and isinstance(value, (int, float)):
    ok = not isinstance(value, bool) and not math.isnan(value)
    return ok, float(value) if ok else None
  plain = origin or hint
  if not isinstance(plain, type):
    return False, None
  if isinstance(value, bool) and plain is not bool:
    return False, None
  return isinstance(value, plain), value


def _fit_sequence(value, origin, args) -> tuple[bool, Any]:
  kind = list if origin is list else tuple
  if not args:
    return True, kind(value)
  if kind is tuple and Ellipsis not in args:
    if len(args) != len(value) and origin is tuple:
      return False, None
    hints = args if origin is tuple else args * len(value)
  else:
    hints = (args[0],) * len(value)
  fitted = [fit(v, h) for v, h in zip(value, hints, strict=True)]
  return all(ok for ok, _ in fitted), kind(v for _, v in fitted)


def is_dtype(old: Any, hint: Any) -> bool:
  """Whether a field holds a dtype: by its annotation, or by what is in it.

  Example:
    >>> is_dtype(np.float32, Any), is_dtype(np.dtype("int8"), Any)
    (True, True)
    >>> is_dtype("float32", str), is_dtype(None, Any)
    (False, False)
  """
  if isinstance(old, np.dtype) or "dtype" in spell(hint).lower():
    return True
  if old is None or isinstance(old, (str, int, float)):
    return False
  try:
    return isinstance(np.dtype(old), np.dtype) and not isinstance(old, tuple)
  except TypeError:
    return False


def dtype(text: str) -> Any:
  """The dtype of numbers that is called so.

  Raises:
    TypeError: none is.

  Example:
    >>> dtype("bfloat16").itemsize
    2
  """
  import jax.numpy as jnp

  name = text.removeprefix("jnp.").strip("'\"")
  # numpy also knows "f4,f4", "O", "3i", and parses digits without end.
  if not re.fullmatch(r"[a-z]{3,}\w{,20}", name):
    raise TypeError(name)
  found = jnp.dtype(name)
  if not jnp.issubdtype(found, jnp.number):
    raise TypeError(name)
  return found


def spell(hint: Any) -> str:
  """An annotation as a message says it.

  Example:
    >>> spell(int), spell(typing.Literal["a", "b"])
    ('int', "Literal['a', 'b']")
  """
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return str(hint).replace("typing.", "")
