"""Docstrings as reStructuredText: code in single backticks, nothing else.

Our docstrings are written to be read in the source. Here `|`, `*` and
trailing underscores lose the meaning that reStructuredText gives them, an
indented block becomes a literal one, and a name in backticks is linked.
"""

import functools
import re
from typing import Any

from sources import modules

_SECTION = re.compile(
  r"(Args|Attributes|Example|Examples|Note|Raises|Reference|References"
  r"|Returns|Yields):$"
)
# Code, or an emphasised word.
_SPAN = re.compile(
  r"(``.+?``|`[^`]+`|(?<![\w*])\*\w[^*\n]*\w\*(?![\w*]))", re.S
)
# A star that isn't a bullet's, a bar, an underscore at a word's end, the point
# of "width: m.", which would number a list.
_MEANS = re.compile(r"\*(?! )|\||(?<=\w)_(?!\w)|(?<=: [A-Za-z])\.(?=\s|$)")


def process_docstring(
  app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
  """Sphinx's `autodoc-process-docstring`; runs before napoleon."""
  del app, obj, options
  if what in ("attribute", "data", "property"):  # as in Returns
    lines[:1] = [re.sub(r"^([^`:]*): ", r"\1; ", line) for line in lines[:1]]
  lines[:] = convert(lines, _neighbours(name))


def convert(lines: list[str], known: frozenset[str]) -> list[str]:
  """The lines of a docstring, with links to the `known` names."""
  out: list[str] = []
  text: list[str] = []

  def flush():
    out.extend(_inline("\n".join(text), known).split("\n") if text else [])
    text.clear()

  section = literal = doctest = False
  before = ""
  for line in lines:
    indent = len(line) - len(line.lstrip())
    if line.strip() and not indent:
      section, literal = bool(_SECTION.match(line)), False
    if before in ("Returns:", "Yields:"):
      # What stands before a colon there would be taken for a type.
      line = re.sub(r"^([^`]*?[^`:\s]): ", r"\1 – ", line)
    if line.lstrip().startswith(">>>"):
      doctest = True
    elif not line.strip():
      doctest = False
    begins = indent and not before.strip() and not section and not literal
    if line.strip() and begins and not doctest:
      flush()
      out.extend([".. code-block:: text", ""])
      literal = True
    if doctest or literal:
      flush()
      out.append(line)
    else:
      text.append(line)
    before = line
  flush()
  return out


def _inline(text: str, known: frozenset[str]) -> str:
  parts = _SPAN.split(text)
  out = ""
  for i, part in enumerate(parts):
    if i % 2 == 0:
      out += _MEANS.sub(r"\\\g<0>", part)
      continue
    inner = part.strip("`")
    if out and out[-1].isalnum():
      out += "\\ "
    if not part.startswith("`"):
      out += part
    elif inner in known:
      out += f":py:obj:`{inner}`"
    elif full := _places().get(inner):
      out += f":py:obj:`~{full}`"
    else:
      out += f"``{inner}``"
    if i + 1 < len(parts) and parts[i + 1][:1].isalnum():
      out += "\\ "
  return out


@functools.cache
def _neighbours(name: str) -> frozenset[str]:
  """What is defined at the top level of the module that `name` is of."""
  for module in modules():
    if f"{name}.".startswith(f"{module.full}.") and not module.is_package:
      return frozenset((*module.definitions(), *module.constants()))
  return frozenset()


@functools.cache
def _places() -> dict[str, str]:
  """Names that say enough by themselves, and where they are defined."""
  found: dict[str, list[str]] = {}
  for module in modules():
    found[module.full] = [module.full]
    for name in module.definitions():
      if name[0].isupper():
        found.setdefault(name, []).append(f"{module.full}.{name}")
    for name, home in module.exported().items():
      found.setdefault(f"{module.full}.{name}", []).append(f"{home}.{name}")
  return {name: full[0] for name, full in found.items() if len(full) == 1}
