"""CONTRIBUTING's page followed to the letter, in a copy of the tree."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from isthmus.train import recipe

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")


def _tracked():
  try:
    done = subprocess.run(
      ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("not a git checkout")
  names = [pathlib.Path(n) for n in done.stdout.decode().split("\0") if n]
  return [n for n in names if (ROOT / n).is_file()]


def _contents(tree):
  return {
    p.relative_to(tree): p.read_bytes()
    for p in tree.rglob("*")
    if p.is_file()
    and "__pycache__" not in p.parts
    and ".pytest_cache" not in p.parts
  }


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """The tree after the page's two steps: (folder, contents before)."""
  tree = tmp_path_factory.mktemp("copy") / "isthmus"
  for name in _tracked():
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_bytes((ROOT / name).read_bytes())
  before = _contents(tree)
  page = (tree / "CONTRIBUTING.md").read_text()
  first, second = re.findall(r"```python\n(.*?)```", page, re.S)[:2]
  # 1. The recipe, into the file that its first line names.
  header, _, body = first.partition("\n")
  path = header.removeprefix("# ")
  assert not (tree / path).exists()
  (tree / path).write_text(body)
  # 2. The list entry.
  where = re.search(r"list entry\*\*, in `([^`]+)`", page)
  assert where
  suite = tree / where[1]
  text, changed = re.subn(
    r"^RECIPES = \[.*?^\]\n", second, suite.read_text(), flags=re.S | re.M
  )
  assert changed == 1 and text != suite.read_text()
  lines, had = set(text.splitlines()), set(suite.read_text().splitlines())
  # The page's list has what the tree's has, and the new recipe.
  assert lines - had == {'  "toy",'} and not had - lines
  suite.write_text(text)
  return tree, before


def _run(tree, *argv):
  """A Python in the copy, whose `isthmus` is the copy too."""
  names = tree.parent / "path" / "isthmus"
  if not names.exists():
    names.mkdir(parents=True)
    for portion in PORTIONS:
      (names / portion).symlink_to(tree / portion)
  environment = {
    **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    "PYTHONPATH": str(names.parent),
    "JAX_PLATFORMS": "cpu",
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  return subprocess.run(
    [sys.executable, *argv],
    cwd=tree,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


def _check(done):
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
  return done.stdout


@pytest.mark.process
def test_the_page_is_all_there_is_to_it(copy):
  tree, before = copy
  # What runs below is the copy.
  where = "import isthmus.train as t; print(t.__file__)"
  file = pathlib.Path(_check(_run(tree, "-c", where)).strip())
  assert file.resolve().is_relative_to(tree.resolve()), file

  listed = _check(_run(tree, "-m", "train.main", "--list"))
  assert "toy " in listed and "residual perceptron" in listed

  # The new row; then the suite, and the house's test of the table.
  assert "| `toy` |" not in (tree / "README.md").read_text()
  _check(
    _run(tree, "-m", "isthmus.train.main", "table", "--write", "README.md")
  )
  assert "| `toy` |" in (tree / "README.md").read_text()
  _check(_run(tree, "-m", "tests.golden", "--write"))
  suite = ["-m", "pytest", "tests/train/recipes", "tests/test_house.py", "-v"]
  ran = _check(_run(tree, *suite, "-k", "toy or every_recipe or table"))
  for name in (
    "test_every_recipe_is_in_the_suite",
    "test_smoke_learns_logs_and_resumes[toy]",
    "test_eight_devices_give_the_loss_of_one[toy]",
    "test_recipe_docstring[toy]",
    "test_readme_table_is_generated",
  ):
    assert f"{name} PASSED" in ran, ran

  after = _contents(tree)
  changed = {
    str(p)
    for p in before.keys() | after.keys()
    if before.get(p) != after.get(p)
  }
  assert changed == {
    "README.md",
    "tests/golden/recipes/toy.txt",
    "tests/train/recipes/test_recipes.py",
    "train/recipes/toy.py",
  }


def test_the_example_of_the_page_is_formatted(copy):
  """As `make test` would ask of a contribution."""
  tree, _ = copy
  for command in (["check"], ["format", "--check"]):
    _check(_run(tree, "-m", "ruff", *command, "train/recipes/toy.py"))


def test_the_page_names_every_field():
  page = (ROOT / "CONTRIBUTING.md").read_text()
  for field in recipe.FIELDS:
    assert f"\n{field}:" in page
