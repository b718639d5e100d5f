"""What a recipe's docstring says, and the README's table of them."""

import pytest

from isthmus.train import recipe
from isthmus.train.config import ConfigError, recipe_names

GOOD = """A title.

Link: https://example.org/paper
Year: 2026
Family: language
Core: nets/mlp.py
Reproduced: the first table,
  and the second.
Simplified: nothing: really
Command: python -m train.main
Claim: none
Result: not run
Measured: not run
Check: none
"""


def test_parse():
  found = recipe.parse("name", GOOD)
  assert (found.name, found.title) == ("name", "A title")
  assert tuple(found.fields) == recipe.FIELDS
  assert found["Reproduced"] == "the first table, and the second."
  assert found["Simplified"] == "nothing: really"
  assert found["Link"] == "https://example.org/paper"


@pytest.mark.parametrize(
  "old, new, words",
  [
    ("Year: 2026\n", "", "no field Year"),
    ("Year: 2026", "Year:", "no field Year"),
    ("Year: 2026", "Yaer: 2026", "Yaer; did you mean 'Year'"),
    ("Year: 2026", "Year: 2026\nYear: 2027", "Year stands twice"),
    (GOOD, "A title.", "no field Link, Year"),
    (GOOD, "", "no field Link, Year"),
  ],
)
def test_parse_refuses(old, new, words):
  with pytest.raises(ValueError, match=words):
    recipe.parse("name", GOOD.replace(old, new))


def test_read_does_not_run_the_recipe(monkeypatch):
  import sys

  monkeypatch.delitem(sys.modules, "isthmus.train.recipes.quickstart", False)
  assert recipe.read("quickstart").name == "quickstart"
  assert "isthmus.train.recipes.quickstart" not in sys.modules
  with pytest.raises(ConfigError, match="'quickstart'"):
    recipe.read("quikstart")


def test_table(monkeypatch):
  monkeypatch.setattr(recipe, "recipe_names", lambda: ["a", "b"])
  pages = {"a": GOOD, "b": GOOD.replace("https://example.org/paper", "none")}
  monkeypatch.setattr(recipe, "read", lambda n: recipe.parse(n, pages[n]))
  _, _, first, second = recipe.table().splitlines()
  assert first.startswith("| [A title](https://example.org/paper) | `a` |")
  assert second == (
    "| A title | `b` | language | `nets/mlp.py` | none | not run |"
  )


def test_a_row_for_each_recipe():
  lines = recipe.table().splitlines()
  assert len({line.count("|") for line in lines}) == 1
  for name in recipe_names():
    assert len([x for x in lines if f"| `{name}` |" in x]) == 1


@pytest.mark.parametrize(
  "text",
  ["", "<!-- systems: isthmus table -->", "<!-- end -->", "no marks at all"],
)
def test_write_table_needs_its_marks(tmp_path, text):
  path = tmp_path / "README.md"
  path.write_text(text)
  with pytest.raises(ConfigError, match="lacks the marks"):
    recipe.write_table(path)
  assert path.read_text() == text
  with pytest.raises(ConfigError, match="No such file"):
    recipe.write_table(tmp_path / "other.md")
