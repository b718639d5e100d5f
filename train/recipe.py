"""What a recipe's docstring says, read without importing the recipe.

A recipe's docstring opens with its title and holds these fields, each at the
start of a line, a value going on in indented lines:

  Link, Year, Family, Core, Reproduced, Simplified, Command, Claim, Result,
  Measured, Check
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re

from isthmus.train.config import RECIPES, ConfigError, nearest, recipe_names

FIELDS = (
  "Link",
  "Year",
  "Family",
  "Core",
  "Reproduced",
  "Simplified",
  "Command",
  "Claim",
  "Result",
  "Measured",
  "Check",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe's name, its title, and its fields.

  Example:
    >>> found = Recipe("toy", "A toy", {"Family": "vision"})
    >>> found["Family"]
    'vision'
  """

  name: str
  title: str
  fields: dict[str, str]

  def __getitem__(self, field: str) -> str:
    return self.fields[field]


def parse(name: str, docstring: str) -> Recipe:
  """The title and fields of a recipe's docstring.

  Raises:
    ValueError: a field that is missing, doubled or unknown.

  Example:
    >>> lines = ["A toy.", "", *(f"{field}: none" for field in FIELDS)]
    >>> found = parse("toy", "\\n".join(lines))
    >>> found.title, found["Claim"]
    ('A toy', 'none')
  """
  title, _, body = docstring.strip().partition("\n")
  fields: dict[str, str] = {}
  current = None
  for line in body.splitlines():
    match = re.match(r"([A-Z][a-z]+): *(.*)", line)
    if match:
      current = match[1]
      if current not in FIELDS:
        raise ValueError(f"recipe {name}: {current}{nearest(current, FIELDS)}")
      if current in fields:
        raise ValueError(f"recipe {name}: the field {current} stands twice")
      fields[current] = match[2].strip()
    elif line.strip() and current:
      fields[current] = f"{fields[current]} {line.strip()}".strip()
  missing = [f for f in FIELDS if not fields.get(f)]
  if missing:
    raise ValueError(f"recipe {name}: no field {', '.join(missing)}")
  return Recipe(name, title.strip().rstrip("."), fields)


def read(name: str) -> Recipe:
  """The recipe of that name; its file is parsed, not run.

  Example:
    >>> read("quickstart")["Core"]
    'nets/transformer.py'
  """
  if name not in recipe_names():
    raise ConfigError(f"no recipe {name!r}{nearest(name, recipe_names())}")
  spec = importlib.util.find_spec(f"{RECIPES}.{name}")
  assert spec and spec.origin
  tree = ast.parse(pathlib.Path(spec.origin).read_text())
  return parse(name, ast.get_docstring(tree) or "")


def table() -> str:
  """The README's table of systems, from the docstrings.

  Example:
    >>> "`quickstart`" in table()
    True
  """
  lines = [
    "| system | `--config` | family | core file | claim | result |",
    "|---|---|---|---|---|---|",
  ]
  for name in recipe_names():
    r = read(name)
    title = r.title if r["Link"] == "none" else f"[{r.title}]({r['Link']})"
    lines.append(
      f"| {title} | `{name}` | {r['Family']} | `{r['Core']}` | {r['Claim']} "
      f"| {r['Result']} |"
    )
  return "\n".join(lines)


_MARKS = ("<!-- systems: isthmus table -->", "<!-- end -->")


def write_table(document: pathlib.Path) -> None:
  """Puts the table between the two marks of a Markdown document.

  Raises:
    ConfigError: the document can't be read, or lacks the marks.

  Example:
    >>> path = pathlib.Path("README.md")
    >>> _ = path.write_text("<!-- systems: isthmus table --><!-- end -->")
    >>> write_table(path)
    >>> table() in path.read_text()
    True
  """
  try:
    text = document.read_text()
  except OSError as error:
    raise ConfigError(f"{document}: {error.strerror}") from error
  before, begin, rest = text.partition(_MARKS[0])
  _, end, after = rest.partition(_MARKS[1])
  if not begin or not end:
    raise ConfigError(f"{document} lacks the marks {' and '.join(_MARKS)}")
  document.write_text(f"{before}{begin}\n{table()}\n{end}{after}")
