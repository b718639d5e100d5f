"""Every public name is documented, and its example runs.

Public is what a module of the five portions defines at its top level without a
leading underscore. Left out are the insides of recipes, which are programs,
and `train/main.py`, which is a command. Protocols and exceptions need no
example: the first are examples of nothing, the second are raised, not used.
"""

import ast
import doctest
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
PATHS = [
  path.relative_to(ROOT)
  for portion in PORTIONS
  for path in sorted((ROOT / portion).rglob("*.py"))
  if "recipes" not in path.parts and path.name not in ("__init__.py", "main.py")
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

Definition = ast.FunctionDef | ast.ClassDef


def _parse(path):
  return ast.parse((ROOT / path).read_text())


def _public(body):
  return [n for n in body if isinstance(n, Definition) and n.name[0] != "_"]


def _module(path):
  return importlib.import_module(
    f"isthmus.{'.'.join(path.with_suffix('').parts)}"
  )


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
  for node in _public(_parse(path).body):
    inner = _public(node.body) if isinstance(node, ast.ClassDef) else []
    bare += [n.name for n in (node, *inner) if not ast.get_docstring(n)]
  assert not bare, f"{path}: no docstring: {', '.join(bare)}"


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_public_names_have_an_example(path):
  """One that prints something, so that it can be wrong."""
  bare = [
    node.name
    for node in _public(_parse(path).body)
    if _needs_example(path, node)
    and not any(example.want for example in _examples(node))
  ]
  assert not bare, f"{path}: no example: {', '.join(bare)}"


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_examples_run(path, tmp_path, monkeypatch):
  """As the site says: in an empty folder, after the imports it names."""
  # `alias` adds a finder, an example may choose another cache.
  monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  module = _module(path)
  names = getattr(module, "__all__", [n for n in dir(module) if n[0] != "_"])
  known = {name: getattr(module, name) for name in names}
  known |= {"jax": jax, "jnp": jnp, "np": np}
  runner, said = doctest.DocTestRunner(optionflags=OPTIONS), []
  nodes = ast.walk(_parse(path))
  nodes = [n for n in nodes if isinstance(n, Definition | ast.Module)]
  for i, node in enumerate(n for n in nodes if _examples(n)):
    test = doctest.DocTestParser().get_doctest(
      ast.get_docstring(node),
      dict(known),
      getattr(node, "name", path.stem),
      str(path),
      getattr(node, "lineno", 0),
    )
    skipped = [e for e in test.examples if e.options.get(doctest.SKIP)]
    assert not skipped, f"{path}: an example of {test.name} is skipped"
    (tmp_path / str(i)).mkdir()
    monkeypatch.chdir(tmp_path / str(i))
    runner.run(test, out=said.append)
  assert not runner.failures, "".join(said)


def test_there_is_something_to_document():
  names = [n.name for path in PATHS for n in _public(_parse(path).body)]
  assert len(names) > 150 and "attention" in names
