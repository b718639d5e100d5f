"""House rules that a machine can hold: style, layers, names, documents."""

import ast
import pathlib
import re
import subprocess
import sysconfig

import pytest

from isthmus.train import recipe
from tests import shares

ROOT = pathlib.Path(__file__).parents[1]
PORTIONS = ("attention", "data", "nets", "pallas", "train")
SCRIPTS = pathlib.Path(sysconfig.get_paths()["scripts"])


def _sources():
  return [p for d in PORTIONS for p in sorted((ROOT / d).rglob("*.py"))]


def _run(*command):
  done = subprocess.run(
    [str(c) for c in command], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.process
def test_ruff():
  _run(SCRIPTS / "ruff", "check", ".")
  _run(SCRIPTS / "ruff", "format", "--check", ".")


def test_no_grab_bags():
  bad = {"utils", "util", "common", "helpers", "misc"}
  assert not [p for p in _sources() if p.stem in bad]


def test_every_module_says_what_it_is():
  for path in _sources():
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_module_has_its_test():
  """tests/ mirrors the tree; recipes are held by one suite."""
  shared = {"__init__", "main", "task"}
  for path in _sources():
    inner = path.relative_to(ROOT)
    if path.stem in shared or "recipes" in inner.parts:
      continue
    mirror = ROOT / "tests" / inner.parent / f"test_{path.stem}.py"
    assert mirror.is_file(), f"{inner} has no {mirror.relative_to(ROOT)}"


def test_what_is_shared_out_is_there():
  """Files by which processes share the tests; parts of two of them."""
  assert not [x for x in shares.LONG if not (ROOT / x).is_file()]
  share, inner = shares.share, "tests/test_docstrings.py::"
  assert share(f"{inner}test_examples_run[nets/lm/llama.py]") == (
    share(f"{inner}test_public_names_are_documented[nets/lm/hybrid.py]")
  )
  assert share(f"{inner}test_examples_run[nets/mlp.py]") == f"{inner}nets"
  recipes = "tests/train/recipes/test_recipes.py"
  assert share(f"{recipes}::test_it[moba]") != share(f"{recipes}::test_it[toy]")
  assert share("tests/test_docs.py::test_it[a/b]") == "tests/test_docs.py"


def test_nothing_heavy_at_import():
  """What is optional, or slow to import, is imported where it is used."""
  heavy = {
    *("PIL", "array_record", "matplotlib", "orbax", "safetensors", "sklearn"),
    *("tensorboardX", "tensorflow_datasets", "tokenizers", "jax_triton"),
    *("av", "gguf", "mlxtend", "nibabel", "nilearn", "skimage", "skvideo"),
    *("torch", "transformers"),
  }
  for path in _sources():
    for node in ast.parse(path.read_text()).body:
      names = []
      if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      assert not {n.split(".")[0] for n in names} & heavy, (path, names)


def test_no_pickle_and_no_eval():
  for path in _sources():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in ("eval", "exec"), (path, node.lineno)
      if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [a.name for a in node.names] + [getattr(node, "module", "")]
        assert not {"pickle", "cloudpickle", "dill"} & set(names), path


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_recipe_docstring(name):
  """All fields, and a figure that says whose it is."""
  found = recipe.read(name)
  assert (ROOT / found["Core"]).is_file(), found["Core"]
  assert re.fullmatch(r"\d{4}", found["Year"])
  assert found["Command"].startswith("python -m train.main")
  assert found["Measured"] == "not run" or re.search(
    r"measured by us", found["Measured"]
  )
  short, hardware = found["Result"], r"(H100|H200|CPU cores)[^()]*\)"
  assert len(short) <= 160, len(short)
  assert (short == "not run") == (found["Measured"] == "not run")
  assert short == "not run" or re.search(hardware, short), short
  assert found["Claim"] == "none" or "paper's claim" in found["Claim"]


def test_readme_table_is_generated():
  readme = (ROOT / "README.md").read_text()
  between = re.search(
    r"<!-- systems: isthmus table -->\n(.*?)\n<!-- end -->", readme, re.S
  )
  assert between, "README has no table of systems"
  assert between[1].strip() == recipe.table(), "run `isthmus table`"


def test_readme_names_what_exists():
  """Files and commands of the README and CONTRIBUTING are there."""
  for document in ("README.md", "CONTRIBUTING.md"):
    text = (ROOT / document).read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
      assert (ROOT / path).exists(), f"{document} links to {path}"
    for target in re.findall(r"^make (\w+)|`make (\w+)", text, re.M):
      target = "".join(target)
      assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_no_test_is_without_an_assertion():
  """A test asserts, or calls a function beside it that does."""
  words = ("assert", "raises", "_run(", "same(", "close(")
  for path in sorted((ROOT / "tests").rglob("test_*.py")):
    functions = [
      node
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.FunctionDef)
    ]
    asserting = [f.name + "(" for f in functions if "assert" in ast.unparse(f)]
    for test in functions:
      if test.name.startswith("test"):
        text = ast.unparse(test).partition(":")[2]
        good = any(word in text for word in (*words, *asserting))
        assert good, f"{path.name}: {test.name}"
