"""Signatures as they stand in the source: shapes, defaults and all.

An evaluated signature would show jaxtyping's classes, the addresses of default
functions, and the fields that Linen adds to every module.
"""

import ast
import functools
from typing import Any

from sources import Module, modules


def process_signature(
  app: Any, what: str, name: str, obj: Any, options: Any, args: Any, result: Any
) -> tuple[str, str | None] | None:
  """Sphinx's `autodoc-process-signature`: (arguments, what is returned)."""
  del app, obj, options, result
  if args is None or what not in ("function", "method", "class"):
    return None
  node = _find(name)
  if isinstance(node, ast.FunctionDef):
    return _of_function(node, bound=what == "method")
  if isinstance(node, ast.ClassDef):
    return _of_class(node), None
  return None


@functools.cache
def _table() -> dict[str, Module]:
  return {module.full: module for module in modules()}


def _find(name: str) -> ast.stmt | None:
  """The definition of "isthmus.nets.mlp.Mlp.__call__"."""
  inner: list[str] = []
  while name and name not in _table():
    name, _, last = name.rpartition(".")
    inner.insert(0, last)
  if not name:
    return None
  body, node = _table()[name].tree.body, None
  for part in inner:
    node = next((n for n in body if getattr(n, "name", None) == part), None)
    if node is None:
      return None
    body = getattr(node, "body", [])
  return node


def _of_function(
  node: ast.FunctionDef, *, bound: bool
) -> tuple[str, str | None]:
  plain = {ast.unparse(d) for d in node.decorator_list} & {"staticmethod"}
  arguments = ast.unparse(_unquoted(node.args))
  if bound and not plain:  # self or cls
    arguments = arguments.partition(",")[2].strip()
  result = node.returns and ast.unparse(_unquoted(node.returns))
  return f"({arguments})", result


def _of_class(node: ast.ClassDef) -> str:
  for inner in node.body:
    if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
      return _of_function(inner, bound=True)[0]
  fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
  keywords = any("kw_only=True" in ast.unparse(d) for d in node.decorator_list)
  parts = ["*"] if keywords and fields else []
  for field in fields:
    annotation = ast.unparse(_unquoted(field.annotation))
    name = ast.unparse(field.target)
    if annotation.endswith("KW_ONLY"):
      parts.append("*")
    elif name[0] != "_" and not annotation.startswith("ClassVar"):
      default = "" if field.value is None else f" = {_default(field.value)}"
      parts.append(f"{name}: {annotation}{default}")
  return f"({', '.join(parts)})"


def _default(value: ast.expr) -> str:
  if isinstance(value, ast.Call):
    for keyword in value.keywords:
      if keyword.arg == "default_factory":
        return f"{ast.unparse(keyword.value)}()"
      if keyword.arg == "default":
        return ast.unparse(keyword.value)
  return ast.unparse(value)


class _Unquote(ast.NodeTransformer):
  """Names that stand in quotes because they are defined further down."""

  def visit_Constant(self, node):
    if isinstance(node.value, str) and node.value.isidentifier():
      return ast.Name(node.value)
    return node

  def visit_Subscript(self, node):  # a jaxtyping shape stays a string
    return node


def _unquoted(node: Any) -> Any:
  return _Unquote().visit(node)
