"""Pages that are written from the package at each build.

A new module, recipe or notebook has its page without an edit here. Files are
written only where they changed, so that a second build is fast, and pages of
what is gone are removed.
"""

import ast
import pathlib
import re
from collections.abc import Iterable

from documents import documents
from sources import ROOT, Module, methods, modules

from isthmus.train import recipe

HERE = pathlib.Path(__file__).resolve().parent


def write() -> None:
  """Writes what docs/.gitignore lists."""
  pages = {**documents(), **_reference(), **_gallery(), **_notebooks()}
  for folder in ("reference", "recipes", "notebooks"):
    for path in (HERE / folder).rglob("*.*"):
      if path.relative_to(HERE).as_posix() not in pages:
        path.unlink()
  for name, text in pages.items():
    path = HERE / name
    if not path.is_file() or path.read_text() != text:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)


# --- the reference ---


def _reference() -> dict[str, str]:
  found = list(modules())
  pages = {"reference/index.rst": _contents(found)}
  for module in found:
    path = "reference/" + module.name.replace(".", "/")
    if module.is_package:
      pages[f"{path}/index.rst"] = _package_page(module, found)
    else:
      pages[f"{path}.rst"] = _module_page(module)
  return pages


def _contents(found: list[Module]) -> str:
  portions = [m for m in found if "." not in m.name]
  return "\n".join(
    [
      *_title("Reference"),
      "Every public name, from its docstring. Arrows point down: a portion",
      "imports only from those below it, ``train``, then ``nets`` and",
      "``data``, then ``attention``, then ``pallas``.",
      "",
      "The examples on a page run in the tests, in an empty folder, after",
      "",
      ".. code-block:: python",
      "",
      "   import jax",
      "   import jax.numpy as jnp",
      "   import numpy as np",
      "   from isthmus.nets.mlp import *  # the page's module",
      "",
      "``...`` in a result stands for what differs from machine to machine.",
      "",
      *_table(portions),
      *_toctree(map(_place, portions)),
    ]
  )


def _package_page(package: Module, found: list[Module]) -> str:
  depth = package.name.count(".") + 1
  inside = [
    m
    for m in found
    if m.name.startswith(package.name + ".") and m.name.count(".") == depth
  ]
  lines = [*_title(package.full), f".. automodule:: {package.full}", ""]
  exported = sorted(package.exported().items())
  if exported:
    links = (f":py:obj:`~{module}.{name}`" for name, module in exported)
    lines += [f"Importable from here: {', '.join(links)}.", ""]
  if inside:
    lines += [*_table(inside), *_toctree(map(_place, inside))]
  return "\n".join(lines) + "\n"


def _place(module: Module) -> str:
  """A module's page, from the page of the package that it is in."""
  last = module.name.rpartition(".")[2]
  return f"{last}/index" if module.is_package else last


def _table(found: list[Module]) -> list[str]:
  lines = [".. list-table::", "   :widths: 30 70", ""]
  for module in found:
    lines += [f"   * - :doc:`{_place(module)}`", f"     - {module.summary}"]
  return [*lines, ""]


def _module_page(module: Module) -> str:
  lines = [*_title(module.full), f".. automodule:: {module.full}", ""]
  for name, value in module.constants().items():
    lines += [f".. autodata:: {module.full}.{name}"]
    lines += [f"   :annotation: = {value}", ""]
  for name, node in module.definitions().items():
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    lines += [f".. auto{kind}:: {module.full}.{name}"]
    if isinstance(node, ast.ClassDef) and methods(node):
      lines += [f"   :members: {', '.join(methods(node))}"]
      lines += ["   :member-order: bysource"]
    lines += [""]
  return "\n".join(lines)


def _title(text: str) -> list[str]:
  return [text, "=" * len(text), ""]


def _toctree(names: Iterable[str]) -> list[str]:
  """The side bar's entries, by their short names."""
  entries = (f"   {n.removesuffix('/index')} <{n}>" for n in names)
  return [".. toctree::", "   :hidden:", "", *entries, ""]


# --- the recipes ---


def _gallery() -> dict[str, str]:
  names = recipe.recipe_names()
  entries = "\n".join(_entry(recipe.read(name)) for name in names)
  contents = "\n".join(f"recipes/{name}" for name in names)
  pages = {
    "gallery.md": "# Gallery\n\nOne entry a recipe, from its docstring; "
    "the plots are of the runs that *Measured* speaks of.\n\n"
    f"{entries}\n```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
  }
  for name in names:
    found = recipe.read(name)
    pages[f"recipes/{name}.md"] = (
      f"# {name}\n\n{found.title}. What it claims and what was measured is in "
      f"the [gallery](../gallery.md).\n\n"
      f"```{{literalinclude}} ../../train/recipes/{name}.py\n"
      ":language: python\n```\n"
    )
  return pages


def _entry(found: recipe.Recipe) -> str:
  plot = HERE / "gallery" / f"{found.name}.png"
  core = found["Core"].removesuffix(".py")
  link = found["Link"]
  return "\n".join(
    [
      f"## {found.title}",
      "",
      f"![{found.title}](gallery/{found.name}.png)"
      if plot.is_file()
      else "*No plot yet.*",
      "",
      f"Recipe: [`{found.name}`](recipes/{found.name}.md), {found['Family']}, "
      f"{found['Year']}. Core: [`{found['Core']}`](reference/{core}.rst). "
      + ("" if link == "none" else f"Paper: <{link}>."),
      "",
      *(
        f"**{field}.** {found[field]}\n"
        for field in (
          "Reproduced",
          "Simplified",
          "Claim",
          "Result",
          "Measured",
        )
      ),
      "```sh",
      found["Command"],
      *_check(found),
      "```",
      "",
    ]
  )


def _check(found: recipe.Recipe) -> list[str]:
  """The command that measures again, where a recipe has a check."""
  if found.fields.get("Check", "none") == "none":
    return []
  return [f"isthmus verify {found.name}  # {found['Check']}"]


# --- the notebooks ---


def _notebooks() -> dict[str, str]:
  """Pages of colabs/*.py, which jupytext pairs with the notebooks."""
  pages = {}
  for path in sorted((ROOT / "colabs").glob("*.py")):
    pages[f"notebooks/{path.stem}.md"] = _cells(path.read_text())
  contents = "\n".join(p.removesuffix(".md") for p in pages)
  tree = f"```{{toctree}}\n:maxdepth: 1\n\n{contents}\n```\n"
  text = (
    "# Notebooks\n\nThey lie in `colabs/` as `.ipynb` and, with the same "
    "cells, as `.py`. Each runs from the top on a CPU, and is run in the "
    f"tests.\n\n{tree if pages else 'There are none yet.'}"
  )
  return {"notebooks.md": text.rstrip() + "\n", **pages}


def _cells(source: str) -> str:
  """A percent-format script as Markdown."""
  source = re.sub(r"\A(# ---\n(#.*\n)*?# ---\n)", "", source)
  out = []
  for cell in re.split(r"^# %%", source, flags=re.M)[1:]:
    head, _, body = cell.partition("\n")
    body = body.strip()
    if not body:
      continue
    if "[markdown]" in head:
      out.append(re.sub(r"^# ?", "", body, flags=re.M))
    else:
      body = re.sub(r"^# (?=[%!])", "", body, flags=re.M)
      out.append(f"````python\n{body}\n````")
  return "\n\n".join(out) + "\n"
