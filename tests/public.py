"""What is public, read from the source; tests of documents hold on to it.

Public is what a module of the five portions defines at its top level without a
leading underscore. Left out are the insides of recipes, which are programs,
and `train/main.py`, which is a command.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
PATHS = [
  path.relative_to(ROOT)
  for portion in PORTIONS
  for path in sorted((ROOT / portion).rglob("*.py"))
  if "recipes" not in path.parts and path.name not in ("__init__.py", "main.py")
]

Definition = ast.FunctionDef | ast.ClassDef


def parse(path: pathlib.Path) -> ast.Module:
  return ast.parse((ROOT / path).read_text())


def public(body: list[ast.stmt]) -> list[Definition]:
  """Functions and classes of a module's or a class's body."""
  return [n for n in body if isinstance(n, Definition) and n.name[0] != "_"]


def module_name(path: pathlib.Path) -> str:
  return ".".join(("isthmus", *path.with_suffix("").parts))
