"""Recipes by name or path, and dotted overrides of the objects they build.

A recipe is a Python file with `get_config(variant)`; it returns a job built
from real objects: Linen modules, `functools.partial`s, frozen dataclasses.
`--set a.b=value` walks those objects, so there is no second, mirrored tree of
settings. A recipe given by path is the user's own code and is run as such.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from isthmus.train import annotation

RECIPES = "isthmus.train.recipes"
_REFUSALS = (ValueError, TypeError, KeyError)  # of objects being built


class ConfigError(ValueError):
  """A setting that can't be used, said in one line."""


def recipe_names() -> list[str]:
  """The names that `--config` takes.

  Example:
    >>> "quickstart" in recipe_names()
    True
  """
  package = importlib.import_module(RECIPES)
  return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(config: str, overrides: Sequence[str] = ()) -> Any:
  """The job of `NAME[:variant]` or `path.py[:variant]`, overrides applied.

  Args:
    config: a recipe's name, or the path of a Python file that is run.
    overrides: texts of the form `dotted.name=value`, applied in order.

  Returns:
    The job: a frozen dataclass with `run(workdir)`.

  Raises:
    ConfigError: a name, field, type or value that can't be used, and the
      nearest one that can.

  Example:
    >>> job = load("quickstart:smoke", ["batch_size=4"])
    >>> job.batch_size
    4
  """
  name, variant = _split(config)
  module = _module(name)
  build = getattr(module, "get_config", None)
  if not callable(build):
    raise ConfigError(f"recipe {name!r} has no function get_config(variant)")
  expected = Exception if name.endswith(".py") else _REFUSALS
  try:
    job = build(variant) if variant else build()
  except ConfigError as error:
    raise ConfigError(f"recipe {config!r}: {error}") from error
  except expected as error:
    raise ConfigError(f"recipe {config!r}: {_blame(error, name)}") from error
  if not callable(getattr(job, "run", None)):
    raise ConfigError(
      f"recipe {config!r} returned {type(job).__name__}, which has no run()"
    )
  return override(job, overrides)


def choose(variants: dict[str, Any], variant: str) -> Any:
  """`variants[variant]()`, or a ConfigError that names the nearest variant.

  Example:
    >>> choose({"full": lambda: 600, "smoke": lambda: 8}, "smoke")
    8
  """
  if variant not in variants:
    raise ConfigError(f"no variant {variant!r}{nearest(variant, variants)}")
  return variants[variant]()


def override(job: Any, overrides: Iterable[str]) -> Any:
  """A copy of `job` with each `dotted.name=value` applied.

  Fields of one object are set together, so that sizes which depend on each
  other can change at once; of one name given twice the later value holds.

  Example:
    >>> from isthmus.train.mesh import Mesh
    >>> override(Mesh(), ["fsdp=4", "model=2"])
    Mesh(data=-1, fsdp=4, model=2, seq=1)
  """
  tree: dict[str, Any] = {}
  for item in overrides:
    name, equals, text = item.partition("=")
    name = name.strip()
    if not equals or not name:
      raise ConfigError(f"--set {item!r} is not of the form name=value")
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
      if isinstance(node, str):
        raise ConfigError(f"--set {name}: {parent!r} is also set whole")
    if isinstance(node.get(last), dict):
      raise ConfigError(f"--set {name}: fields of it are set too")
    node[last] = text.strip()
  return _set(job, tree, "") if tree else job


def flatten(job: Any) -> dict[str, str]:
  """The resolved settings as `dotted.name -> text`, for files and compares.

  Example:
    >>> from isthmus.train.mesh import Mesh
    >>> flatten(Mesh(fsdp=4))
    {'job': 'Mesh', 'data': '-1', 'fsdp': '4', 'model': '1', 'seq': '1'}
  """
  return dict(_flatten(job, ""))


def nearest(name: str, names: Iterable[str]) -> str:
  """`; did you mean 'x'?`, or the names that there are.

  Example:
    >>> nearest("quikstart", ["quickstart", "toy"])
    "; did you mean 'quickstart'?"
  """
  names = [str(n) for n in names]
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  if near:
    return f"; did you mean {near[0]!r}?"
  return f"; there are {', '.join(names)}" if names else "; there are none"


def _one_line(error: BaseException | str) -> str:
  return " ".join(str(error).split()) or type(error).__name__


def _blame(error: BaseException, path: str) -> str:
  """An error of a recipe in one line: its kind, its words, its line."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f", line {f.lineno}" for f in frames if f.filename == path]
  kind = "" if isinstance(error, _REFUSALS) else f"{type(error).__name__}: "
  return f"{kind}{_one_line(error)}{lines[-1] if lines else ''}"


def _split(config: str) -> tuple[str, str]:
  """`NAME:variant` and `C:/x.py:variant` alike."""
  if ".py" in config:
    path, dot, variant = config.rpartition(".py")
    return path + dot, variant.removeprefix(":")
  name, _, variant = config.partition(":")
  return name, variant


def _module(name: str) -> types.ModuleType:
  if name.endswith(".py"):
    path = pathlib.Path(name)
    if not os.path.isfile(path):
      raise ConfigError(f"--config {_one_line(name)[:300]}: no such file")
    spec = importlib.util.spec_from_file_location("recipe_" + path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
      spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
      raise ConfigError(f"--config {name}: {_blame(error, name)}") from error
    return module
  names = recipe_names()
  if name not in names:
    raise ConfigError(
      f"--config {name!r}: no such recipe{nearest(name, names)}"
    )
  return importlib.import_module(f"{RECIPES}.{name}")


def _fields(node: Any) -> dict[str, dataclasses.Field]:
  """Fields a user may set: Linen's own `parent` and `name` are not settings."""
  hidden = {"parent", "name"} if hasattr(node, "scope") else set()
  return {
    f.name: f
    for f in dataclasses.fields(node)
    if f.init and f.name not in hidden
  }


def _is_node(value: Any) -> bool:
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _set(node: Any, tree: dict[str, Any], prefix: str) -> Any:
  """`node` with the values of `tree` in place of its own."""
  if isinstance(node, functools.partial):
    known = _keywords(node)
    old = {n: node.keywords.get(n, p.default) for n, p in known.items()}
    hints, kind = _hints(node.func), f"{_name(node.func)} has no argument"
  elif isinstance(node, dict):
    old, kind = node, "no key"
    hints = {n: type(v) for n, v in node.items() if v is not None}
  elif _is_node(node):
    old = {n: getattr(node, n) for n in _fields(node)}
    hints, kind = _hints(type(node)), f"{type(node).__name__} has no field"
  else:
    raise ConfigError(
      f"--set {prefix}{next(iter(tree))}: {_text(node)} has no fields"
    )
  for name in tree:
    if name not in old:
      raise ConfigError(
        f"--set {prefix}{name}: {kind} {name!r}{nearest(name, old)}"
      )
  new = {
    n: _set(old[n], value, f"{prefix}{n}.")
    if isinstance(value, dict)
    else _value(old[n], value, prefix + n, hints.get(n, Any))
    for n, value in tree.items()
  }
  try:
    if isinstance(node, functools.partial):
      return functools.partial(
        node.func, *node.args, **{**node.keywords, **new}
      )
    if isinstance(node, dict):
      return {**node, **new}
    return dataclasses.replace(node, **new)
  except (ValueError, TypeError) as error:  # refused by a __post_init__
    given = " ".join(f"{prefix}{n}={_text(v)}" for n, v in new.items())
    raise ConfigError(f"--set {given}: {_one_line(error)}") from error


def _value(old: Any, text: str, full: str, hint: Any) -> Any:
  if _is_node(old) or isinstance(old, (functools.partial, dict)):
    if text == "None" and type(None) in typing.get_args(hint):
      return None
    inner = _fields(old) if _is_node(old) else _members(old)
    raise ConfigError(
      f"--set {full}: {_text(old)} is not set whole; set one of "
      + ", ".join(f"{full}.{n}" for n in inner)
    )
  return parse(text, hint, full, old)


def _members(node: Any) -> Iterable[str]:
  return _keywords(node) if isinstance(node, functools.partial) else node


def _keywords(node: functools.partial) -> dict[str, inspect.Parameter]:
  parameters = list(inspect.signature(node.func).parameters.values())
  parameters = parameters[len(node.args) :]
  return {
    p.name: p
    for p in parameters
    if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
  }


def _hints(owner: Any) -> dict[str, Any]:
  try:
    return typing.get_type_hints(owner)
  except Exception:  # an annotation that names what isn't importable: unchecked
    return {}


def parse(text: str, hint: Any, full: str, old: Any = None) -> Any:
  """`text` as a value of the annotation `hint`, or a ConfigError.

  An int serves as a float, a bool never as a number; a dtype is given by its
  name; a list or tuple serves as either. `old` tells a dtype field apart
  where the annotation alone can't.

  Example:
    >>> parse("3", float | None, "clip")
    3.0
    >>> parse("True", int, "steps")
    Traceback (most recent call last):
    isthmus.train.config.ConfigError: --set steps=True: int is wanted
  """
  if text != "None" and annotation.is_dtype(old, hint):
    try:
      return annotation.dtype(text)
    except TypeError:
      raise ConfigError(
        f"--set {full}={text}: not the name of a dtype"
      ) from None
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  for candidate in (value, text):  # `--set name=3` for a field of text
    ok, fitted = annotation.fit(candidate, hint)
    if ok:
      return fitted
  if callable(old) and not isinstance(old, type):
    raise ConfigError(
      f"--set {full}: a function is chosen in a recipe, not on the command line"
    )
  wanted = (
    typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
  )
  if wanted:
    raise ConfigError(
      f"--set {full}={text}: not allowed{nearest(text, wanted)}"
    )
  raise ConfigError(f"--set {full}={text}: {annotation.spell(hint)} is wanted")


def _name(function: Any) -> str:
  return getattr(function, "__qualname__", None) or type(function).__name__


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
  """Depth first, so that the order is that of the objects' own fields."""
  dot = prefix + "." if prefix else ""
  if _is_node(node):
    yield prefix or "job", type(node).__name__
    for name in _fields(node):
      yield from _flatten(getattr(node, name), dot + name)
  elif isinstance(node, functools.partial):
    yield prefix, _text(node.func)
    for i, value in enumerate(node.args):
      yield from _flatten(value, f"{dot}{i}")
    for name in sorted(node.keywords):
      yield from _flatten(node.keywords[name], dot + name)
  elif isinstance(node, dict):
    for name in node:
      yield from _flatten(node[name], dot + str(name))
  elif isinstance(node, (list, tuple)) and any(map(_is_node, node)):
    for i, value in enumerate(node):
      yield from _flatten(value, f"{dot}{i}")
  else:
    yield prefix, _text(node)


def _text(value: Any) -> str:
  """A stable text: no memory addresses, functions by their import path."""
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, type) or inspect.isroutine(value):
    try:
      dtype = np.dtype(value)  # jnp.bfloat16 is a class
    except TypeError:
      dtype = np.dtype(object)  # as of any class
    if dtype.kind != "O":
      return dtype.name
    return f"{value.__module__}:{value.__qualname__}"
  if isinstance(value, (str, int, float, bool, type(None))):
    return repr(value)
  if _is_node(value) or isinstance(value, functools.partial):
    name = _name(value.func) if isinstance(value, functools.partial) else ""
    return f"a {name or type(value).__name__}"
  if isinstance(value, (tuple, list)):
    return "(" + ", ".join(_text(v) for v in value) + ")"
  if type(value).__repr__ is object.__repr__:
    return f"{type(value).__module__}:{type(value).__qualname__}"
  try:
    return np.dtype(value).name
  except TypeError:
    return repr(value)
