"""What the package's files define, read with `ast`; nothing is imported."""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
# Recipes have pages of their own; `train.main` is the command.
_LEFT_OUT = ("train.recipes", "train.main")

Definition = ast.FunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Module:
  """A file of the package.

  Attributes:
    name: dotted, without `isthmus.`: "nets.mlp".
    path: of the file.
  """

  name: str
  path: pathlib.Path

  @property
  def full(self) -> str:
    return f"isthmus.{self.name}"

  @property
  def is_package(self) -> bool:
    return self.path.name == "__init__.py"

  @functools.cached_property
  def lines(self) -> list[str]:
    return self.path.read_text().splitlines()

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.path.read_text())

  @functools.cached_property
  def summary(self) -> str:
    """The first paragraph of its docstring, as one line."""
    first = (ast.get_docstring(self.tree) or "").partition("\n\n")[0]
    return " ".join(first.split())

  def definitions(self) -> dict[str, Definition]:
    """Public functions and classes, in the order of the file."""
    return {n.name: n for n in self.tree.body if _is_public(n)}

  def constants(self) -> dict[str, str]:
    """Names with a `#:` comment right above them, and what they stand for."""
    found = {}
    for node in self.tree.body:
      target = node.targets[0] if isinstance(node, ast.Assign) else None
      if isinstance(node, ast.AnnAssign):
        target = node.target
      if isinstance(target, ast.Name) and target.id[0] != "_":
        if self.lines[node.lineno - 2].startswith("#:"):
          value = ast.unparse(node.value) if node.value else ""
          found[target.id] = value if len(value) < 120 else "..."
    return found

  def exported(self) -> dict[str, str]:
    """A package's re-exports: name -> the module that defines it."""
    found = {}
    for node in ast.walk(self.tree):
      if isinstance(node, ast.ImportFrom) and node.module:
        if node.module.startswith(self.full + "."):
          found.update({alias.name: node.module for alias in node.names})
    return found

  def imported(self) -> dict[str, str]:
    """Names from our own modules -> their full names."""
    return {
      alias.asname or alias.name: f"{node.module}.{alias.name}"
      for node in ast.walk(self.tree)
      if isinstance(node, ast.ImportFrom)
      and (node.module or "").startswith("isthmus.")
      for alias in node.names
    }


def methods(cls: ast.ClassDef) -> list[str]:
  """Public methods and properties with a docstring, and `__call__`."""
  return [
    n.name
    for n in cls.body
    if isinstance(n, ast.FunctionDef)
    and (n.name[0] != "_" or n.name == "__call__")
    and ast.get_docstring(n)
  ]


@functools.cache
def modules() -> tuple[Module, ...]:
  """All files of the package, packages before what they hold."""
  return tuple(_modules())


def _modules() -> Iterator[Module]:
  for portion in PORTIONS:
    for path in sorted((ROOT / portion).rglob("*.py"), key=_place):
      parts = path.relative_to(ROOT).with_suffix("").parts
      name = ".".join(p for p in parts if p != "__init__")
      if not name.startswith(_LEFT_OUT):
        yield Module(name, path)


def _place(path: pathlib.Path) -> tuple[str, ...]:
  return tuple("" if p == "__init__.py" else p for p in path.parts)


def _is_public(node: ast.stmt) -> bool:
  return (
    isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
  )
