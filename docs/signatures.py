"""Signatures as they stand in the source: shapes, defaults and all.

An evaluated signature would show jaxtyping's classes, the addresses of default
functions, and the fields that Linen adds to every module.
"""

import ast
import functools
import re
from typing import Any

from sources import Module, modules


def process_signature(
  app: Any, what: str, name: str, obj: Any, options: Any, args: Any, result: Any
) -> tuple[str, str | None] | None:
  """Sphinx's `autodoc-process-signature`: (arguments, what is returned)."""
  del app, obj, options, result
  if args is None or what not in ("function", "method", "class"):
    return None
  module, node = _find(name)
  if isinstance(node, ast.FunctionDef):
    return _Text(module).function(node, bound=what == "method")
  if isinstance(node, ast.ClassDef):
    return _Text(module).constructor(node), None
  return None


@functools.cache
def _table() -> dict[str, Module]:
  return {module.full: module for module in modules()}


@functools.cache
def _documented() -> set[str]:
  return {
    f"{module.full}.{name}"
    for module in modules()
    for name in (*module.definitions(), *module.constants())
  }


def _find(name: str) -> tuple[Module | None, ast.stmt | None]:
  """The definition of "isthmus.nets.mlp.Mlp.__call__", and its module."""
  inner: list[str] = []
  while name and name not in _table():
    name, _, last = name.rpartition(".")
    inner.insert(0, last)
  module = _table().get(name)
  body, node = module.tree.body if module else [], None
  for part in inner:
    node = next((n for n in body if getattr(n, "name", None) == part), None)
    body = getattr(node, "body", [])
  return module, node


class _Text(ast.NodeTransformer):
  """Source of a signature, with our own names in full so that they link."""

  def __init__(self, module: Module | None):
    self._names: dict[str, str] = {}
    if module is not None:
      own = (*module.definitions(), *module.constants())
      names = {n: f"{module.full}.{n}" for n in own} | module.imported()
      known = _documented()
      self._names = {n: full for n, full in names.items() if full in known}

  def annotation(self, node: ast.expr | None) -> str | None:
    if node is None:
      return None
    return ast.unparse(self.visit(ast.parse(ast.unparse(node)).body[0].value))

  def function(
    self, node: ast.FunctionDef, *, bound: bool
  ) -> tuple[str, str | None]:
    """("(x: Float[Array, 'b'], *, eps: float = 1e-6)", what it returns)."""
    copy = ast.parse(ast.unparse(node)).body[0]
    arguments = copy.args
    for argument in ast.walk(arguments):
      if isinstance(argument, ast.arg) and argument.annotation:
        argument.annotation = self.visit(argument.annotation)
    text = ast.unparse(arguments)
    plain = {ast.unparse(d) for d in node.decorator_list} & {"staticmethod"}
    if bound and not plain:  # self or cls
      text = text.partition(",")[2].strip()
    return f"({text})", self.annotation(node.returns)

  def constructor(self, node: ast.ClassDef) -> str:
    """The arguments of `__init__`, or the fields of a dataclass."""
    for inner in node.body:
      if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
        return self.function(inner, bound=True)[0]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    keywords = any(
      "kw_only=True" in ast.unparse(d) for d in node.decorator_list
    )
    parts = ["*"] if keywords and fields else []
    for field in fields:
      name = ast.unparse(field.target)
      annotation = self.annotation(field.annotation) or ""
      if annotation.endswith("KW_ONLY"):
        parts.append("*")
      elif name[0] != "_" and not annotation.startswith("ClassVar"):
        default = "" if field.value is None else f" = {_default(field.value)}"
        parts.append(f"{name}: {annotation}{default}")
    return f"({', '.join(parts)})"

  def visit_Constant(self, node):
    """A name in quotes is one that is defined further down."""
    if isinstance(node.value, str) and node.value.isidentifier():
      return self.visit(ast.Name(node.value))
    return node

  def visit_Name(self, node):
    full = self._names.get(node.id)
    return ast.parse(full).body[0].value if full else node

  def visit_Subscript(self, node):
    """A jaxtyping shape stays the string that it is, as a literal does."""
    inner = ast.unparse(node.slice)
    is_text = ast.unparse(node.value).endswith("Literal")
    if is_text or re.match(r"\(?(np\.)?(ndarray|Array), ", inner):
      return node
    return self.generic_visit(node)


def _default(value: ast.expr) -> str:
  if isinstance(value, ast.Call):
    for keyword in value.keywords:
      if keyword.arg == "default_factory":
        return f"{ast.unparse(keyword.value)}()"
      if keyword.arg == "default":
        return ast.unparse(keyword.value)
  return ast.unparse(value)
